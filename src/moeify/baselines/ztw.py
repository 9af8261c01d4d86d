"""Early exit with cascaded heads and geometric ensembling (Zero Time Waste), on a frozen classifier.

Letters: B batch, D model width, C classes, P places with a head, N examples, F features (the widths of all places together).

    early = fit(model, data, ZTWConfig())        heads trained on features that one pass of the model gave
    found = exits(early, batches)                accuracy against cost, a point for each threshold
    early(theta=0.9, **inputs)                   one input; blocks after the exit are not run
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._config import from_dict, to_dict
from .._progress import NO_PROGRESS, Progress
from .._random import seeded
from ..cost import estimate_flops
from ..errors import CheckpointError, ConfigError, DataError
from ..sites.probe import eval_mode
from ..train.loop import TrainConfig, TrainingData, TrainRecord, sequences_read, train
from ..train.work import fingerprint, read_tensors, weights_checksum, write_tensors
from .features import capture_features
from .places import Batch, Left, Place, Token, find_places, num_classes, own_token, pooled, to_device, visited

SCHEMA = 1
"""Version of ``ztw.json``."""
ENSEMBLE_SHARE = 0.05
"""Of all training: 5 of 100 epochs, as published."""

_META, _HEADS = "ztw.json", "heads.safetensors"
_WIDTH_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class ZTWConfig:
    """Heads and their training."""

    positions: tuple[int, ...] | None = None
    """Numbers of the places that get a head, from 1, rising; none: all but the last. Places are ends of blocks, with half_blocks two a
    block."""
    half_blocks: bool = False
    """Count the inputs of FFNs as places, too, as published for BERT."""
    depth: int = 3
    """Linear layers of a head."""
    hidden: int | None = None
    """Width of a head's hidden layers; none: 4 D. Published are 8192, 10.7 D of ViT-B, which on a sentence of 20 tokens is a third of
    MiniLM's cost for each head."""
    token: Literal["auto", "first", "mean"] = "auto"
    """What a head reads of a hidden state: the first token, the mean over tokens, or what the model's own head reads."""
    views: int = 1
    """Passes over the data when features are captured. Where the data is varied at random (augmentation), heads see so many variations of
    each example, whatever the number of steps; else more than one is the same again."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1900, batch_sequences=256, lr=1e-3, weight_decay=5e-5, min_lr_frac=1e-3)
    )
    """First stage: the cascade of heads."""
    ensemble: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, batch_sequences=256, lr=1e-3))
    """Second stage: weights and biases of the ensembles."""
    seed: int = 0
    """Of the heads' first weights and of what the data draws; added to the seeds of both stages."""

    def __post_init__(self) -> None:
        for name in ("depth", "hidden", "views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.positions is not None:
            rising = all(a < b for a, b in itertools.pairwise(self.positions))
            if not self.positions or self.positions[0] < 1 or not rising:
                raise ConfigError(f"positions must be rising numbers from 1, at least one, got {list(self.positions)}.")

    def for_sequences(self, sequences: int) -> "ZTWConfig":
        """The same with as many steps as read so many examples at least, 5 % of them in the second stage."""
        second = ENSEMBLE_SHARE * sequences
        return replace(
            self,
            train=replace(self.train, steps=max(1, math.ceil((sequences - second) / self.train.batch_sequences))),
            ensemble=replace(self.ensemble, steps=max(1, math.ceil(second / self.ensemble.batch_sequences))),
        )


class ZTWHeads(nn.Module):
    """A head for each place, and an ensemble of each with those before it.

    z_i = W_i [MLP_i(x_i), LayerNorm(z_{i-1})] + c_i,   the first without z
    q_i = 1 / (i + 1) sum_{j <= i} exp(w_ij) log_softmax(z_j) + b_i

    MLP_i is depth - 1 times Linear and GELU. No gradient flows back through z_{i-1}: each head minimises its own loss alone. The network's
    own last head takes no part.

    Args:
        widths: D of each place.
        num_classes: C.
        depth: linear layers of a head.
        hidden: width of hidden layers.

    Source: Wojcik et al. 2023 (Zero Time Waste), arXiv:2106.05409, sections 3.1 and 3.2; depth, GELU and LayerNorm as in the code of
    Szatkowski et al. 2024, arXiv:2310.04361.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, depth: int, hidden: int) -> None:
        super().__init__()
        self.widths = tuple(widths)
        places = len(self.widths)
        self.bodies, self.norms, self.outs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(self.widths):
            layers: list[nn.Module] = []
            for _ in range(depth - 1):
                layers += [nn.Linear(width, hidden), nn.GELU()]
                width = hidden
            self.bodies.append(nn.Sequential(*layers))
            self.norms.append(nn.LayerNorm(num_classes) if i else nn.Identity())
            self.outs.append(nn.Linear(width + (num_classes if i else 0), num_classes))
        self.weights_PP = nn.Parameter(0.01 * torch.randn(places, places))
        """w; only j <= i is used."""
        self.biases_PC = nn.Parameter(torch.zeros(places, num_classes))
        """b."""

    def head(self, i: int, x_BD: Tensor, before_BC: Tensor | None) -> Tensor:
        """z_i (B, C) from what its place gives and z_{i-1}; None for the first."""
        hidden = self.bodies[i](x_BD)
        if before_BC is not None:
            hidden = torch.cat([hidden, self.norms[i](before_BC.detach())], dim=-1)
        return cast(Tensor, self.outs[i](hidden))

    def cascade(self, x_BF: Tensor) -> Tensor:
        """z (P, B, C) from the places' vectors side by side."""
        z: list[Tensor] = []
        for i, x_BD in enumerate(x_BF.split(self.widths, dim=1)):
            z.append(self.head(i, x_BD, z[-1] if z else None))
        return torch.stack(z)

    def ensembles(self, z_PBC: Tensor) -> Tensor:
        """q (P, B, C) of the first P places."""
        places = len(z_PBC)
        with torch.autocast(z_PBC.device.type, enabled=False):  # a weighted sum in bfloat16 loses what the second stage learns
            count_P1 = torch.arange(1, places + 1, device=z_PBC.device)[:, None]
            mix_PP = self.weights_PP[:places, :places].exp().tril() / count_P1
            log_p_PBC = z_PBC.to(mix_PP.dtype).log_softmax(-1)
            return torch.einsum("ij,jbc->ibc", mix_PP, log_p_PBC) + self.biases_PC[:places, None]


@dataclass(frozen=True)
class ExitOutput:
    """What one input gave."""

    logits: Tensor
    """(1, C): q of the head that it left by, or the network's own logits."""
    exit: int
    """Number of the head from 0; P where it left by none."""


class EarlyExit(nn.Module):
    """A frozen classifier with heads.

    Args:
        model: the classifier; its weights are never changed.
        heads: trained or not; moved to where the model is.
        places: of the heads, in the order in which a forward reaches them.
        token: what heads read.
        config: how they were made.
        records: of both stages, where they were trained in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: ZTWHeads,
        places: Sequence[Place],
        *,
        token: Token,
        config: ZTWConfig,
        records: Sequence[TrainRecord] = (),
    ) -> None:
        super().__init__()
        self.model, self.places, self.token, self.config, self.records = model, tuple(places), token, config, tuple(records)
        self.heads = heads.to(next(model.parameters()).device).eval()

    @torch.no_grad()
    def forward(self, *, theta: float, **inputs: Tensor) -> ExitOutput:
        """Run blocks until a head is sure: max softmax(q_i) > theta. What comes after it is not executed.

        Args:
            theta: in [0, 1]; 0 leaves by the first head, 1 by none.
            inputs: the model's, of one example; ``labels`` are not passed on.

        Raises:
            ConfigError: theta out of range, or several examples, which leave at different places (`exits` measures those).
        """
        check_theta(theta)
        if (count := len(next(iter(inputs.values())))) != 1:
            raise ConfigError(f"early exit runs one example at a time, got {count}; ztw.exits measures batches.")
        return self._run(inputs, theta=theta)

    def _run(self, inputs: Batch, *, theta: float = 1.0, last: int | None = None) -> ExitOutput:
        """As `forward`; or leave by head ``last`` whatever it says."""
        z: list[Tensor] = []
        left: list[ExitOutput] = []

        def visit(i: int, hidden_BSD: Tensor) -> None:
            x_BD = pooled(hidden_BSD, inputs.get("attention_mask"), self.token)
            z.append(self.heads.head(i, x_BD, z[-1] if z else None))
            q_BC = self.heads.ensembles(torch.stack(z))[-1]
            if i == last or bool((q_BC.softmax(-1).amax(-1) > theta).all()):
                left.append(ExitOutput(q_BC, i))
                raise Left

        with eval_mode(self.model), visited(self.model, self.places, visit):
            try:
                logits = self.model(**to_device({k: v for k, v in inputs.items() if k != "labels"}, self.model)).logits
            except Left:
                return left[0]
        return ExitOutput(logits.float(), len(self.places))

    @torch.no_grad()
    def all_logits(self, batch: Batch) -> Tensor:
        """(P + 1, B, C): q of every head, and the network's own logits, from one whole forward."""
        x: list[Tensor] = []
        with (
            eval_mode(self.model),
            visited(self.model, self.places, lambda _i, h_BSD: x.append(pooled(h_BSD, batch.get("attention_mask"), self.token))),
        ):
            logits = self.model(**to_device({k: v for k, v in batch.items() if k != "labels"}, self.model)).logits
        q_PBC = self.heads.ensembles(self.heads.cascade(torch.cat(x, dim=1)))
        return torch.cat([q_PBC, logits.float()[None]])


class _Cascade(nn.Module):
    """First stage: the mean of the heads' cross-entropies. (The published mean has the network's own loss in it, which has no gradient.)"""

    def __init__(self, heads: ZTWHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x_NF: Tensor, labels: Tensor) -> "_Loss":
        return _Loss(_mean_loss(self.heads.cascade(x_NF), labels))


class _Ensembling(nn.Module):
    """Second stage: the same of the ensembles; the heads themselves stay."""

    def __init__(self, heads: ZTWHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x_NF: Tensor, labels: Tensor) -> "_Loss":
        with torch.no_grad():
            z_PBC = self.heads.cascade(x_NF)
        return _Loss(_mean_loss(self.heads.ensembles(z_PBC), labels))


@dataclass(frozen=True)
class _Loss:
    loss: Tensor


def _mean_loss(logits_PBC: Tensor, labels_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_PBC.flatten(0, 1), labels_B.repeat(len(logits_PBC)))


def fit(
    model: nn.Module,
    data: TrainingData,
    config: ZTWConfig | None = None,
    *,
    work: Path | None = None,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> EarlyExit:
    """Train heads on a frozen classifier.

    What each head reads of each example that the steps come to is computed once (`capture_features`); both stages train on that, by
    `moeify.train.train`.

    Args:
        model: sequence or image classifier; neither its weights nor its mode change.
        data: examples with a class each.
        config: heads and training; None takes the defaults.
        work: folder for features and states; the same call goes on there where it was killed, to the same heads. None keeps features in
            memory.
        run: JSON object that tells ``data`` from other data of as many examples with the same first ones.
        progress: told of the capture and every step.

    Returns:
        The model with its heads.

    Raises:
        UnsupportedModelError: as `find_places` and `own_token`.
        ConfigError: positions that the model does not have.
        DataError: as `capture_features`.
        CheckpointError: ``work`` holds the states of another training.

    Cost: one forward for each example and view that is read; then 6 FLOPs a step, example and parameter of the heads.
    """
    config = config or ZTWConfig()
    if len(data) == 0:
        raise DataError("the training data has no example.")
    example = data.batch(range(min(2, len(data))), generator=torch.Generator().manual_seed(config.seed))
    classes = num_classes(model, {name: value for name, value in example.items() if name != "labels"})
    places, token = find_heads(model, example, config)
    made_from = {
        "weights": weights_checksum(model),
        "places": [to_dict(place) for place in places],
        "token": token,
        "views": config.views,
        "seed": config.seed,
        "examples": len(data),
        "first": fingerprint([example]),
        "run": dict(run or {}),
    }
    stages = [replace(options, seed=options.seed + config.seed) for options in (config.train, config.ensemble)]
    rows = sorted({row for options in stages for row in sequences_read(config.views * len(data), options)})
    features = capture_features(
        model,
        data,
        places,
        token=token,
        num_classes=classes,
        views=config.views,
        seed=config.seed,
        rows=rows,
        folder=None if work is None else work / "features",
        run=made_from,
        progress=progress,
    )
    with seeded(config.seed):
        heads = build_heads(places, classes, config)
    heads.to(next(model.parameters()).device)
    ensembling = {"weights_PP", "biases_PC"}
    records = []
    for name, stage, options in zip(("heads", "ensemble"), (_Cascade(heads), _Ensembling(heads)), stages, strict=True):
        for key, parameter in heads.named_parameters():
            parameter.requires_grad_((key in ensembling) == (name == "ensemble"))
        made_from |= {"depth": config.depth, "hidden": config.hidden}
        state = None if work is None else work / name
        records.append(train(stage, features, options, state=state, run=made_from, progress=progress))
        made_from |= {"heads": to_dict(options)}
    heads.requires_grad_(requires_grad=False)
    return EarlyExit(model, heads, places, token=token, config=config, records=records)


def find_heads(model: nn.Module, batch: Batch, config: ZTWConfig) -> tuple[list[Place], Token]:
    """Where a model's heads will be and what they read; errors as `fit`."""
    found = find_places(model, batch, half_blocks=config.half_blocks)
    places = _chosen(found, config)
    return places, own_token(model, batch, found[-1]) if config.token == "auto" else config.token


def build_heads(places: Sequence[Place], num_classes: int, config: ZTWConfig) -> ZTWHeads:
    """Heads with new weights, drawn from torch's generator."""
    widths = [place.d_model for place in places]
    return ZTWHeads(widths, num_classes, depth=config.depth, hidden=config.hidden or _WIDTH_FACTOR * max(widths))


def _chosen(found: Sequence[Place], config: ZTWConfig) -> list[Place]:
    if config.positions is None:
        if len(found) == 1:
            raise ConfigError("the model has a single block, so there is nowhere to exit before its end; set half_blocks or positions.")
        return list(found[:-1])
    if config.positions[-1] > len(found):
        raise ConfigError(f"positions must be at most {len(found)}, the number of places of the model, got {config.positions[-1]}.")
    return [found[i - 1] for i in config.positions]


# ---- quality against cost


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """One threshold."""

    theta: float
    """An example leaves by the first head whose largest probability is above it."""
    quality: float
    """Accuracy in [0, 1]."""
    exits: tuple[float, ...]
    """Share of the examples that leave by each head; the last by none."""
    flops: float
    """Of an example, mean: blocks up to the exit, all heads on the way, the network's own head where there was no exit. Multiply and add
    are 2."""
    flops_fraction: float
    """Over those of the whole dense model without heads: `CurvePoint.flops_fraction`'s unit. Above 1 where nobody leaves."""

    @property
    def macs(self) -> float:
        """The same in multiply-adds, the unit of the papers' figures."""
        return self.flops / 2


@dataclass(frozen=True, kw_only=True)
class Exits:
    """What `exits` measured."""

    dense_quality: float
    """Accuracy of the model itself."""
    dense_flops: float
    """Of one example, without heads."""
    costs: tuple[float, ...]
    """FLOPs of an example that leaves by each head; the last by none."""
    qualities: tuple[float, ...]
    """Accuracy of each head on all examples."""
    points: tuple[ExitPoint, ...]
    """In the order of the thresholds."""

    def line(self) -> list[tuple[float, float]]:
        """(flops_fraction, quality) of each point, cheapest first: to be drawn with `CurvePoint.flops_fraction` and its quality."""
        return sorted((point.flops_fraction, point.quality) for point in self.points)


@torch.no_grad()
def exits(
    early: EarlyExit,
    batches: Sequence[Batch],
    thetas: Sequence[float] | Literal["linspace", "quantiles"] = "linspace",
    *,
    num: int = 100,
    progress: Progress = NO_PROGRESS,
) -> Exits:
    """Accuracy, exits and cost at each threshold, from one whole forward of every batch.

    Args:
        early: from `fit` or `load`.
        batches: inputs with labels; those of -100 do not count. Cost is that of an example of the first batch, padding included, as
            `moeify.evaluate.model_cost` takes it.
        thetas: in [0, 1]; "linspace": ``num`` from 0 to 1, as published; "quantiles": 0, 1, and between them quantiles of the heads'
            confidences on these batches, which spread the points evenly over the curve.
        num: how many, at least 2.
        progress: told the batches.

    Raises:
        ConfigError: a threshold out of range.
        DataError: no batch, or no label.

    Cost: a forward of each batch, and one of a single example for every place.
    """
    if isinstance(thetas, str):
        if thetas not in ("linspace", "quantiles") or num < 2:
            raise ConfigError(f"thetas must be numbers, 'linspace' or 'quantiles' with num >= 2, got {thetas!r} and {num}.")
    else:
        for theta in thetas:
            check_theta(theta)
    if not batches:
        raise DataError("there is no batch to evaluate on.")
    sure, right = [], []
    with progress.task("early exits", total=len(batches)) as task:
        for batch in batches:
            if "labels" not in batch:
                raise DataError("early exit is measured by accuracy, which needs labels, and a batch has none; name a label column.")
            logits_PBC = early.all_logits(batch).cpu()
            counts_B = batch["labels"].cpu() != -100
            sure.append(logits_PBC[:-1, counts_B].softmax(-1).amax(-1))
            right.append((logits_PBC.argmax(-1) == batch["labels"].cpu())[:, counts_B])
            task.advance(1)
    sure_PN, right_QN = torch.cat(sure, dim=1), torch.cat(right, dim=1).double()  # Q = P + 1
    if not right_QN.shape[1]:
        raise DataError("there is no label to measure accuracy on.")
    chosen = _thresholds(thetas, num, sure_PN) if isinstance(thetas, str) else [float(theta) for theta in thetas]
    one = {name: value[:1] for name, value in batches[0].items()}
    costs = exit_flops(early, one)
    with eval_mode(early.model):
        dense = estimate_flops(early.model, one).dense_flops
    places = len(costs) - 1
    points = []
    for theta in chosen:
        leaves_PN = sure_PN > theta
        exit_N = torch.where(leaves_PN.any(0), leaves_PN.int().argmax(0), places)
        shares = (torch.bincount(exit_N, minlength=places + 1).double() / len(exit_N)).tolist()
        flops = math.fsum(share * cost for share, cost in zip(shares, costs, strict=True))
        quality = right_QN.gather(0, exit_N[None]).mean().item()
        points.append(ExitPoint(theta=theta, quality=quality, exits=tuple(shares), flops=flops, flops_fraction=flops / dense))
    *qualities, dense_quality = right_QN.mean(1).tolist()
    return Exits(
        dense_quality=dense_quality, dense_flops=float(dense), costs=tuple(costs), qualities=tuple(qualities), points=tuple(points)
    )


def exit_flops(early: EarlyExit, inputs: Batch) -> list[float]:
    """FLOPs of ``inputs`` when they leave by each head, and by none, watched in forwards that end there; heads passed by are included."""
    with eval_mode(early):  # of a wrapper, estimate_flops would put back the wrapper's mode
        return [float(estimate_flops(_Until(early, i), inputs).dense_flops) for i in (*range(len(early.places)), None)]


class _Until(nn.Module):
    """The early-exit forward that leaves by one head, as a module whose cost can be estimated."""

    def __init__(self, early: EarlyExit, last: int | None) -> None:
        super().__init__()
        self.early, self.last = early, last

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.early._run(inputs, last=self.last, theta=math.inf).logits


def check_theta(theta: float) -> None:
    """Refuse what is no threshold of a probability."""
    if not 0 <= theta <= 1:
        raise ConfigError(f"theta must be in [0, 1], got {theta}.")


def _thresholds(kind: str, num: int, sure_PN: Tensor) -> list[float]:
    if kind == "linspace":
        return [float(theta) for theta in torch.linspace(0, 1, num, dtype=torch.float64)]
    values = sure_PN.flatten().double().sort().values
    inner = [float(values[int(i * len(values) / (num - 1))]) for i in range(1, num - 1)]
    return [0.0, *(min(1.0, theta) for theta in inner), 1.0]


# ---- on disk


def save(early: EarlyExit, folder: str | Path) -> None:
    """Write the heads: ``heads.safetensors``, and ``ztw.json`` with their places and a checksum of the model that they belong to.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    meta = {
        "schema": SCHEMA,
        "model": type(early.model).__name__,
        "weights": weights_checksum(early.model),
        "num_classes": int(early.heads.biases_PC.shape[1]),
        "token": early.token,
        "places": [to_dict(place) for place in early.places],
        "config": to_dict(early.config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / _HEADS, {name: t.detach().cpu().contiguous() for name, t in early.heads.state_dict().items()}, {})
        temporary = folder / f"{_META}.new"
        temporary.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / _META)
    except OSError as error:
        raise CheckpointError(f"cannot write '{folder}': {error.strerror}; free space or choose another folder.") from error


def load(folder: str | Path, model: nn.Module) -> EarlyExit:
    """Put saved heads on the model that they were trained on.

    Raises:
        CheckpointError: missing or damaged, of a newer schema, or of a model with other weights.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"'{folder}' has no {_META}; ztw.save writes one.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{folder / _META}' cannot be read: {error}; save the heads again.") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("schema"), int):
        raise CheckpointError(f"'{folder / _META}' does not describe heads of moeify; save them again.")
    if meta["schema"] > SCHEMA:
        raise CheckpointError(f"'{folder / _META}' has schema {meta['schema']}, this moeify reads up to {SCHEMA}; upgrade moeify.")
    try:
        config = from_dict(ZTWConfig, meta["config"], where="config")
        places = [from_dict(Place, place, where=f"places[{i}]") for i, place in enumerate(meta["places"])]
        token, classes, weights = meta["token"], int(meta["num_classes"]), meta["weights"]
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise CheckpointError(f"'{folder / _META}' is damaged: {error}; save the heads again.") from None
    if (found := weights_checksum(model)) != weights:
        raise CheckpointError(
            f"the heads in '{folder}' are of a {meta.get('model')} with weights {weights}, this {type(model).__name__} has {found}: load"
            " the model they were trained on, in its dtype, or train new ones."
        )
    with seeded(0):
        heads = build_heads(places, classes, config)
    read = read_tensors(folder / _HEADS)
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    if read is None or {name: tensor.shape for name, tensor in read[0].items()} != expected:
        raise CheckpointError(f"'{folder / _HEADS}' is missing, damaged or of other heads than {_META} says; save them again.")
    heads.load_state_dict(read[0])
    return EarlyExit(model, heads.requires_grad_(requires_grad=False), places, token=token, config=config)
