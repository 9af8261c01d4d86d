"""Activation sparsity and how much of its pattern stays, on a fixed probe batch between training steps.

Letters: T tokens, D model width, F FFN width, E experts, n neurons that are compared.

Neurons keep their identity while a model trains; where a switch permutes them, what is remembered is permuted with them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._dist import ALONE, Ranks, gathered
from .._random import restored
from ..channels import kept
from ..errors import CheckpointError, DataError
from ..layers import MoEFFN, moe_layers
from ..routers import expert_sums
from ..sites import mask_name, token_mask_of
from ..sites.probe import eval_mode
from ..split import ExpertSplit, balanced_kmeans, parameter_features
from .controller import Signals, SSDConfig


class Similarity(ABC):
    """How much of one FFN's pattern is as it was at the measurement before: 1 where all is, smaller where less is."""

    name: ClassVar[str]
    reads_weights: ClassVar[bool]
    """Whether `measure` looks at features."""

    def observe(self, fires_TF: Tensor) -> None:  # noqa: B027 - nothing where weights alone are compared
        """Take in which neurons fire on some tokens of the probe."""

    def merge(self, ranks: Ranks) -> None:  # noqa: B027
        """Take in what other processes observed."""

    @abstractmethod
    def measure(self, features_FK: Tensor | None) -> Tensor | None:
        """Compare with the measurement before, and take its place.

        Args:
            features_FK: the neurons' `parameter_features`; None where they are not looked at.

        Returns:
            A scalar on any device; None the first time.
        """

    @abstractmethod
    def permute(self, order_F: Tensor) -> None:
        """Follow the neurons: new neuron i is old neuron ``order_F[i]``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the next measurement is compared with."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""


class CoactivationSimilarity(Similarity):
    """Pearson correlation, over pairs i < j, of c_ij = C_ij / sqrt(C_ii C_jj) then and now; C_ij: tokens on which both neurons fire.

    A neuron that never fires has c = 0 with all others. Of two patterns without any variance: 1 where they are equal, else 0.

    Source: ours; what the SSD paper compares is not known (docs/ssd.md). Cost: 2 n^2 operations a token, n^2 numbers.
    """

    name = "coactivation"
    reads_weights = False

    def __init__(self, config: SSDConfig, *, num_neurons: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._neurons_n = torch.randperm(num_neurons, generator=generator)[: config.probe_neurons].sort().values
        self._counts_nn: Tensor | None = None
        self._last_P: Tensor | None = None

    def observe(self, fires_TF: Tensor) -> None:
        """Count pairs; no host sync."""
        fires_Tn = fires_TF[:, self._neurons_n.to(fires_TF.device)].float()
        counts_nn = fires_Tn.t() @ fires_Tn
        self._counts_nn = counts_nn if self._counts_nn is None else self._counts_nn + counts_nn

    def merge(self, ranks: Ranks) -> None:
        """Counts are whole numbers: their sum is exact below 2^24 tokens."""
        n = len(self._neurons_n)
        self._counts_nn = ranks.sum(torch.zeros(n, n) if self._counts_nn is None else self._counts_nn)

    def measure(self, features_FK: Tensor | None) -> Tensor | None:
        """The correlation; features are not looked at."""
        assert self._counts_nn is not None
        counts_nn, self._counts_nn = self._counts_nn, None
        root_n = counts_nn.diagonal().clamp_min(1).sqrt()
        first_P, second_P = torch.triu_indices(len(counts_nn), len(counts_nn), offset=1, device=counts_nn.device)
        now_P = (counts_nn / (root_n[:, None] * root_n))[first_P, second_P]
        last_P, self._last_P = self._last_P, now_P
        return None if last_P is None else correlation(last_P.to(now_P.device), now_P)

    def permute(self, order_F: Tensor) -> None:
        """The same neurons under new numbers."""
        # Not sorted again: c_ij stays where it is.
        self._neurons_n = order_F.argsort()[self._neurons_n]

    def tensors(self) -> dict[str, Tensor]:
        """Which neurons, and their c_ij."""
        return {"neurons": self._neurons_n} | ({} if self._last_P is None else {"last": self._last_P})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        self._neurons_n, self._last_P = tensors["neurons"], tensors.get("last")


class _ClusterSimilarity(Similarity):
    """Of clusterings of the input weights, each started from the one before."""

    reads_weights = True

    def __init__(self, config: SSDConfig, *, num_neurons: int, seed: int) -> None:
        self._num_experts, self._seed = config.num_experts, seed
        self._split: ExpertSplit | None = None

    def measure(self, features_FK: Tensor | None) -> Tensor | None:
        assert features_FK is not None
        last = self._split
        if last is None:
            self._split = balanced_kmeans(features_FK, num_experts=self._num_experts, seed=self._seed).split
            return None
        self._split = balanced_kmeans(features_FK, num_experts=self._num_experts, warm_start=last).split
        return torch.tensor(self._compare(features_FK, last, self._split))

    @abstractmethod
    def _compare(self, features_FK: Tensor, last: ExpertSplit, now: ExpertSplit) -> float: ...

    def permute(self, order_F: Tensor) -> None:
        if self._split is not None:
            labels_F = self._split.labels_F()[order_F]
            self._split = ExpertSplit.from_order(labels_F.argsort(stable=True), num_experts=self._num_experts)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._split is None else {"order": self._split.order_F}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._split = ExpertSplit(order_F=tensors["order"], num_experts=self._num_experts) if tensors else None


class RandSimilarity(_ClusterSimilarity):
    """Adjusted Rand index of the two clusterings.

    Source: ours. Cost: one warm-started clustering a measurement.
    """

    name = "rand"

    def _compare(self, features_FK: Tensor, last: ExpertSplit, now: ExpertSplit) -> float:
        return adjusted_rand_index(last.labels_F(), now.labels_F())


class InertiaSimilarity(_ClusterSimilarity):
    """Inertia of today's best clustering over that of the clustering before on today's weights, in (0, 1].

    The best is the lower of one started from the clustering before and a fresh one, which is then kept.

    Source: ours. Cost: two clusterings a measurement.
    """

    name = "inertia"

    def _compare(self, features_FK: Tensor, last: ExpertSplit, now: ExpertSplit) -> float:
        fresh = balanced_kmeans(features_FK, num_experts=self._num_experts, seed=self._seed).split
        before = balanced_kmeans(features_FK, num_experts=self._num_experts, warm_start=last, iterations=0).history[0]
        self._split = best = min((now, fresh), key=_inertia)
        return _inertia(best) / before if before > 0 else 1.0


SIMILARITIES: dict[str, type[CoactivationSimilarity] | type[RandSimilarity] | type[InertiaSimilarity]] = {
    "coactivation": CoactivationSimilarity,
    "rand": RandSimilarity,
    "inertia": InertiaSimilarity,
}
"""By the name that `SSDConfig.similarity` has; each is made as ``(config, num_neurons=F, seed=...)``."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One measurement; layers in module order."""

    signals: Signals
    """Means over layers."""
    sparsity: tuple[float, ...]
    """By layer."""
    similarity: tuple[float, ...]
    """By layer; empty the first time."""
    captured: tuple[float, ...]
    """By layer; empty in dense phases."""


class Monitor:
    """Measures a converted model on the same batches every time.

    The model's function, modes, gradients and random numbers are left as they were; it runs in eval mode.

    Args:
        model: converted model.
        batches: the probe; arguments of the model, with labels where losses are to be compared. On any device.
        config: what is measured.
        compute: dtype of matrix products (autocast); None: the weights' own.

    Raises:
        DataError: no batch.

    Several processes (`ranks`) run every n-th batch each, and their sums are added: as many batches as processes, or a multiple, waste
    nothing.

    Cost: one forward over the probe, two in sparse phases, and the similarity's; one host sync at the end of each. Of n processes a part
    of ceil(batches / n) / batches of the forwards, and 4 n^2 bytes sent a layer for n compared neurons.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], config: SSDConfig, *, compute: torch.dtype | None = None
    ) -> None:
        if not batches:
            raise DataError("the probe has no batch.")
        self._model, self._batches, self._config, self._compute = model, batches, config, compute
        self._counts = True
        self._weights = _label_shares(batches)
        self.ranks = ALONE
        """The processes that measure together; all of them call `measure` alike."""
        self._layers = moe_layers(model)
        self.similarities: dict[str, Similarity] = {
            name: SIMILARITIES[config.similarity](config, num_neurons=layer.site.d_ff, seed=config.seed + i)
            for i, (name, layer) in enumerate(self._layers.items())
        }

    def measure(self, step: int, *, sparse: bool) -> Probe:
        """Measure now.

        Args:
            step: what the signals say.
            sparse: also what experts capture, and both losses.
        """
        device = next(self._model.parameters()).device
        seen = {name: _Sums() for name in self._layers}
        with eval_mode(self._model), kept(list(self._layers.values()), "mode"), restored(device), torch.no_grad():
            with self._watched(seen, sparse=sparse):
                dense_loss = self._run("dense", device)
            sparse_loss = self._run("moe", device) if sparse else None
            self._merge(seen)
            measured = [similarity.measure(self._features(name, similarity)) for name, similarity in self.similarities.items()]
        sparsity = tuple(float(sums.silent) / sums.values for sums in seen.values())
        captured = tuple(float(sums.captured / sums.total) for sums in seen.values()) if sparse else ()
        similarity = tuple(float(value) for value in measured if value is not None)
        signals = Signals(
            step=step,
            sparsity=_mean(sparsity),
            similarity=_mean(similarity),
            captured=_mean(captured),
            dense_loss=None if not sparse or dense_loss is None else float(dense_loss),
            sparse_loss=None if sparse_loss is None else float(sparse_loss),
        )
        return Probe(signals=signals, sparsity=sparsity, similarity=similarity, captured=captured)

    def permute(self, name: str, order_F: Tensor) -> None:
        """Neurons of one FFN have been permuted: new neuron i is old neuron ``order_F[i]``."""
        self.similarities[name].permute(order_F)

    def tensors(self) -> dict[str, Tensor]:
        """What the next measurement is compared with, by '<site>/<name>'."""
        return {f"{site}/{key}": tensor for site, similarity in self.similarities.items() for key, tensor in similarity.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`.

        Raises:
            CheckpointError: they are of another model, or another similarity.
        """
        by_site: dict[str, dict[str, Tensor]] = {name: {} for name in self.similarities}
        try:
            for key, tensor in tensors.items():
                site, _, name = key.rpartition("/")
                by_site[site][name] = tensor
            for site, similarity in self.similarities.items():
                similarity.load(by_site[site])
        except KeyError as error:
            raise CheckpointError(f"the monitor's state is of another model or similarity: {error} differs.") from error

    def _run(self, mode: str, device: torch.device) -> Tensor | None:
        """The mean loss over the probe's batches; None where the model gives none."""
        for layer in self._layers.values():
            layer.mode = "dense" if mode == "dense" else "moe"
        losses = []
        for i in range(self.ranks.rank, -(-len(self._batches) // self.ranks.size) * self.ranks.size, self.ranks.size):
            self._counts = i < len(self._batches)  # else only because the others run one
            batch = self._batches[i if self._counts else 0]
            with torch.autocast(device.type, dtype=self._compute) if self._compute is not None else nullcontext():
                outputs = self._model(**{key: value.to(device) for key, value in batch.items()})
            loss = getattr(outputs, "loss", None)
            if loss is None:
                return None
            losses.append(loss.float() * self._weights[i] if self._counts else torch.zeros_like(loss, dtype=torch.float32))
        return self.ranks.sum(torch.stack(losses).sum())

    def _features(self, name: str, similarity: Similarity) -> Tensor | None:
        if not similarity.reads_weights:
            return None
        layer = self._layers[name]
        with gathered(layer.leaves()):
            return parameter_features(layer.weights())

    def _merge(self, seen: Mapping[str, "_Sums"]) -> None:
        """Add up what processes have seen."""
        if self.ranks.size == 1:
            return
        device = next(self._model.parameters()).device
        own = [torch.stack([torch.as_tensor(v, dtype=torch.float64).to(device) for v in sums.all()]) for sums in seen.values()]
        for sums, total in zip(seen.values(), self.ranks.sum(torch.stack(own)), strict=True):
            sums.silent, sums.captured, sums.total = total[0], total[1], total[2]
            sums.values = int(total[3])
        for similarity in self.similarities.values():
            similarity.merge(self.ranks)

    @contextmanager
    def _watched(self, seen: Mapping[str, "_Sums"], *, sparse: bool) -> Iterator[None]:
        masks: dict[str, Tensor | None] = {}

        def remember_masks(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            masks.clear()
            masks.update({key: kwargs.get(key) for key in ("attention_mask", "decoder_attention_mask")})

        def remember_input(_module: nn.Module, args: tuple[Tensor, ...], *, sums: _Sums) -> None:
            sums.x = args[0]

        def watch(_module: nn.Module, args: tuple[Tensor, ...], *, name: str, layer: MoEFFN) -> None:
            keep_T = token_mask_of(masks.get(mask_name(self._model, layer.site)), args[0].shape[:-1])
            self._count(seen[name], name, layer, args[0], keep_T)

        with ExitStack() as hooks:
            hooks.callback(self._model.register_forward_pre_hook(remember_masks, with_kwargs=True).remove)
            for name, layer in self._layers.items():
                first, down = layer.projections()
                if sparse:
                    hooks.callback(first.register_forward_pre_hook(partial(remember_input, sums=seen[name])).remove)
                hooks.callback(down.register_forward_pre_hook(partial(watch, name=name, layer=layer)).remove)
            yield

    def _count(self, sums: "_Sums", name: str, layer: MoEFFN, h: Tensor, keep_T: Tensor | None) -> None:
        h_TF = h.reshape(-1, h.shape[-1])
        x_TD = None if sums.x is None else sums.x.reshape(-1, sums.x.shape[-1])
        sums.x = None
        if keep_T is not None:
            keep_T = keep_T.to(h.device)
            h_TF, x_TD = h_TF[keep_T], None if x_TD is None else x_TD[keep_T]
        # Before the return: where processes hold parts of the routers, they gather them together.
        mask_TE = None if x_TD is None else layer.rule(layer.scores(x_TD))
        if not self._counts:
            return
        fires_TF = h_TF.abs() > self._config.eps
        sums.silent = sums.silent + (~fires_TF).sum(dtype=torch.float64)
        sums.values += fires_TF.numel()
        self.similarities[name].observe(fires_TF)
        if mask_TE is not None:
            mass_TE = expert_sums(h_TF.float(), layer.bounds)
            sums.captured = sums.captured + (mass_TE * mask_TE).sum(dtype=torch.float64)
            sums.total = sums.total + mass_TE.sum(dtype=torch.float64)


def _label_shares(batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """What each batch's mean loss counts in that of all: its share of the labels, so that it does not matter how a probe is cut."""
    counts = [int((batch["labels"] != -100).sum()) if isinstance(batch.get("labels"), Tensor) else 0 for batch in batches]
    return [count / sum(counts) if sum(counts) else 1 / len(batches) for count in counts]


class _Sums:
    """Of one layer over the probe; on the device."""

    def __init__(self) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self.silent, self.captured, self.total = zero, zero, zero
        self.values = 0
        self.x: Tensor | None = None

    def all(self) -> tuple[Tensor | int, ...]:
        """Whatever is a sum."""
        return self.silent, self.captured, self.total, self.values


def correlation(a_P: Tensor, b_P: Tensor) -> Tensor:
    """Pearson correlation; without variance in one of the two 0, but 1 where they are equal."""
    a_P, b_P = a_P.double(), b_P.double()
    a_P, b_P = a_P - a_P.mean(), b_P - b_P.mean()
    norm = a_P.norm() * b_P.norm()
    is_flat = norm <= torch.finfo(torch.float32).tiny
    flat = ((a_P - b_P).abs().amax() == 0).double()
    return torch.where(is_flat, flat, (a_P * b_P).sum() / norm.clamp_min(torch.finfo(torch.float32).tiny))


def adjusted_rand_index(a_F: Tensor, b_F: Tensor) -> float:
    """Agreement of two partitions over pairs, 0 for chance and 1 for equal ones.

    (I - A B / N) / ((A + B) / 2 - A B / N),   I: pairs together in both, A and B: in each, N: all pairs

    Args:
        a_F: int64 labels >= 0 of the one.
        b_F: of the other.

    Source: Hubert and Arabie 1985, eq. 5.
    """
    table = torch.bincount(a_F * (int(b_F.max()) + 1) + b_F).double()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    both, a, b = pairs(table), pairs(torch.bincount(a_F).double()), pairs(torch.bincount(b_F).double())
    chance, most = a * b / math.comb(len(a_F), 2) if len(a_F) > 1 else 0.0, (a + b) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


def _inertia(split: ExpertSplit) -> float:
    assert split.inertia is not None
    return split.inertia


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
