"""How good a model is on fixed batches, and how far its moe mode is from its dense mode.

Letters: B batch, S sequence, W windows, V vocabulary or classes, D model width, N rows (positions or examples that count).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._progress import NO_PROGRESS, Progress
from ..channels import kept
from ..controls import set_mode, token_mask, with_modes
from ..errors import CheckpointError, ConfigError, DataError
from ..sites.probe import eval_mode

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model; ``labels`` are compared with, not passed on."""

Rows = Callable[[slice], Tensor]
"""A slice of rows (N, V) or (N, D) of an output that need not exist as a whole."""

_CHUNK_ELEMENTS = 1 << 21  # of one fp32 work tensor: 8 MiB; five of them exist at once
_CACHE_BYTES = 256 << 20
_OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
_SUPPORTED = (
    "supported are language models that generate (perplexity), sequence and image classifiers (accuracy), and encoders and masked language "
    "models (cosine to the dense model)"
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close two modes of one model are on the same inputs; padding is left out."""

    kl: float | None = None
    """Mean over rows of KL(dense || moe) in nats; None without logits."""
    top1: float | None = None
    """Share of rows whose most likely class is the same; None without logits."""
    hidden_cosine: float | None = None
    """Mean cosine of the hidden vectors; only for models without a head, and for metric "cosine"."""
    sentence_cosine: float | None = None
    """Mean cosine of the mean-pooled sentence vectors; only for models without a head, and for metric "cosine"."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One measurement."""

    value: float
    """Perplexity, pseudo-perplexity, accuracy in [0, 1], or mean cosine to the dense sentence vectors (of the last hidden states)."""
    count: int
    """Predicted positions or examples."""
    agreement: Agreement | None = None
    """With the dense reference, where one was given."""


class Output(NamedTuple):
    """What a forward gave that can be compared."""

    tensor: Tensor
    """(B, S, V) or (B, V) logits, else (B, S, D) hidden states."""
    is_logits: bool

    @property
    def rows(self) -> Tensor:
        """(N, V) or (N, D) view."""
        return self.tensor.reshape(-1, self.tensor.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a quality is summed over batches."""

    tally: Callable[[Output, Batch], tuple[float, int]]
    """(output, batch) -> (sum, count)."""
    finish: Callable[[float], float]
    """Mean -> the number that is reported."""
    lower_is_better: bool
    """Perplexities are; accuracy and cosine are not."""


def perplexity(model: nn.Module, windows_WS: Tensor, *, batch_size: int = 1, progress: Progress = NO_PROGRESS) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        model: causal language model, in the mode that is to be measured.
        windows_WS: fixed windows; each is seen alone.
        batch_size: windows per forward.
        progress: told the number of batches.

    Raises:
        CheckpointError: logits are not finite.

    Cost: one forward per batch; the loss is taken in fp32 in chunks of rows, so that no second copy of the logits is made.
    """
    batches = [{"input_ids": batch_BS} for batch_BS in torch.split(windows_WS, batch_size)]
    return measure_quality(model, batches, metric="perplexity", progress=progress).value


def accuracy(model: nn.Module, batches: Sequence[Batch], *, progress: Progress = NO_PROGRESS) -> float:
    """Share of ``labels`` that the largest logit hits; labels of -100 do not count."""
    return measure_quality(model, batches, metric="accuracy", progress=progress).value


@torch.no_grad()
def agreement(model: nn.Module, batches: Sequence[Batch], *, progress: Progress = NO_PROGRESS) -> Agreement:
    """Dense mode against moe mode with the present rules, batch by batch; nothing is kept but sums.

    Args:
        model: a converted model; its mode is restored.
        batches: inputs; any ``attention_mask`` excludes padding.
        progress: told the number of batches.
    """
    tally = _AgreementTally()
    with _evaluating(model), progress.task("compare with dense", total=len(batches)) as task:
        for batch in batches:
            set_mode(model, "dense")
            dense = _forward(model, batch).rows
            set_mode(model, "moe")
            tally.add(dense.__getitem__, _forward(model, batch), batch)
            task.advance(1)
    return tally.result()


@torch.no_grad()
def measure_quality(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    metric: str,
    reference: "DenseReference | None" = None,
    progress: Progress = NO_PROGRESS,
) -> Quality:
    """Quality of the model as it stands (mode and rules) on fixed batches.

    Args:
        model: any module whose output has ``logits`` or ``last_hidden_state``.
        batches: the same for every state that is compared.
        metric: key of `METRICS`.
        reference: dense outputs of the same batches, for the agreement; needed for metric "cosine".
        progress: told the number of batches.

    Raises:
        ConfigError: unknown metric, or "cosine" without a reference.
        DataError: nothing to count: no batch, or no label.
        CheckpointError: the output is not finite.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
    if metric == "cosine" and reference is None:
        raise ConfigError("metric 'cosine' compares with the dense model; give a reference.")
    total, count = 0.0, 0
    tally = _AgreementTally()
    with _evaluating(model), progress.task(metric, total=len(batches)) as task:
        for i, batch in enumerate(batches):
            output = _forward(model, batch, hidden=metric == "cosine")
            part, rows = METRICS[metric].tally(output, batch)
            total, count = total + part, count + rows
            if reference is not None:
                tally.add(reference.rows(i), output, batch)
            task.advance(1)
    compared = tally.result() if reference is not None else None
    if metric == "cosine" and compared is not None:
        assert compared.sentence_cosine is not None
        return Quality(value=compared.sentence_cosine, count=len(batches), agreement=compared)
    if count == 0:
        raise DataError(f"there is nothing to measure {metric} on: no batch, or windows of a single token.")
    value = METRICS[metric].finish(total / count)
    if not math.isfinite(value):
        raise CheckpointError(f"{metric} is {value}: the model's outputs are not finite; its weights are damaged or its dtype overflows.")
    return Quality(value=value, count=count, agreement=compared)


class DenseReference:
    """Dense outputs of fixed batches, made once and compared with many times.

    Kept is, by what fits: the outputs themselves (classifiers, small vocabularies); else the input of the vocabulary projection, from which
    rows of logits are made again when asked for (V / D times smaller; only if the first batch proves that the projection alone gives the
    model's logits, which a soft cap or a scale after it would break); else nothing, and the dense model runs again for each comparison.

    Args:
        model: a converted model.
        batches: inputs.
        metric: key of `METRICS`; the dense quality is measured on the way.
        cache_bytes: most bytes to keep.
        progress: told the number of batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        metric: str,
        cache_bytes: int = _CACHE_BYTES,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        if metric not in METRICS:
            raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
        if not batches:
            raise DataError("there is no batch to evaluate on.")
        self._model, self._batches = model, batches
        self._hidden = metric == "cosine"
        self._head = None if self._hidden else _head_of(model)
        self._kept: list[Tensor] = []
        self.keeps = "outputs"
        total, count = 0.0, 0
        with torch.no_grad(), _evaluating(model), progress.task(f"dense {metric}", total=len(batches)) as task:
            set_mode(model, "dense")
            for i, batch in enumerate(batches):
                output, hidden = self._forward(batch)
                if i == 0:
                    self.keeps = self._choose(output, hidden, cache_bytes)
                if self.keeps == "outputs":
                    self._kept.append(output.rows)
                elif self.keeps == "head inputs":
                    assert hidden is not None
                    self._kept.append(hidden.reshape(-1, hidden.shape[-1]))
                part, rows = METRICS[metric].tally(output, batch)
                total, count = total + part, count + rows
                task.advance(1)
        if metric != "cosine" and count == 0:
            raise DataError(f"there is nothing to measure {metric} on: no label, or windows of a single token.")
        self.quality = 1.0 if metric == "cosine" else METRICS[metric].finish(total / count)
        if not math.isfinite(self.quality):
            raise CheckpointError(f"the dense model's {metric} is {self.quality}: its weights are damaged or its dtype overflows.")
        if self.quality == 0:
            raise DataError(f"the dense model's {metric} is 0 on these batches; do the labels match the model's classes?")

    def rows(self, i: int) -> Rows:
        """Dense output of batch ``i`` by rows."""
        if self.keeps == "outputs":
            return self._kept[i].__getitem__
        if self.keeps == "head inputs":
            head, hidden_ND = self._head, self._kept[i]
            assert head is not None
            return lambda rows: head(hidden_ND[rows])
        with _evaluating(self._model):
            set_mode(self._model, "dense")
            return _forward(self._model, self._batches[i], hidden=self._hidden).rows.__getitem__

    def _choose(self, output: Output, hidden: Tensor | None, cache_bytes: int) -> str:
        def total(tensor: Tensor) -> int:
            return tensor.numel() * tensor.element_size() * len(self._batches)

        if total(output.tensor) <= cache_bytes:
            return "outputs"
        if hidden is None or self._head is None or total(hidden) > cache_bytes:
            return "nothing"
        sample, expected = self._head(hidden.reshape(-1, hidden.shape[-1])[:64]).float(), output.rows[:64].float()
        if sample.shape != expected.shape or (sample - expected).abs().max() > 1e-3 * expected.abs().max():
            return "nothing"
        return "head inputs"

    def _forward(self, batch: Batch) -> tuple[Output, Tensor | None]:
        if self._head is None:
            return _forward(self._model, batch, hidden=self._hidden), None
        seen: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            return _forward(self._model, batch), seen[0] if len(seen) == 1 else None
        finally:
            handle.remove()


class _AgreementTally:
    """Sums of the agreement over batches."""

    def __init__(self) -> None:
        self._rows = self._sentences = 0
        self._kl = self._top1 = self._hidden = self._sentence = 0.0
        self._is_logits = True

    def add(self, dense: Rows, output: Output, batch: Batch) -> None:
        """Compare one batch."""
        self._is_logits = output.is_logits
        keep = _kept_positions(output, batch)
        flat = output.rows
        if not self._is_logits:
            self._add_hidden(dense(slice(None)).view_as(output.tensor).float(), output.tensor.float(), keep)
            return
        step = max(1, _CHUNK_ELEMENTS // flat.shape[1])
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            p_NV, q_NV = dense(rows).float().log_softmax(-1), flat[rows].float().log_softmax(-1)
            kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
            same_N = p_NV.argmax(-1) == q_NV.argmax(-1)
            if keep is not None:
                kl_N, same_N = kl_N[keep.reshape(-1)[rows]], same_N[keep.reshape(-1)[rows]]
            self._kl += kl_N.double().sum().item()
            self._top1 += same_N.sum().item()
            self._rows += len(kl_N)

    def _add_hidden(self, dense_BSD: Tensor, moe_BSD: Tensor, keep_BS: Tensor | None) -> None:
        weight_BS1 = torch.ones_like(dense_BSD[..., :1]) if keep_BS is None else keep_BS.to(dense_BSD)[..., None]
        cosine_BS = F.cosine_similarity(dense_BSD, moe_BSD, dim=-1)
        self._hidden += (cosine_BS * weight_BS1[..., 0]).double().sum().item()
        self._rows += int(weight_BS1.sum())
        # the mean over tokens: its length does not matter to the cosine
        cosine_B = F.cosine_similarity((dense_BSD * weight_BS1).sum(1), (moe_BSD * weight_BS1).sum(1), dim=-1)
        self._sentence += cosine_B.double().sum().item()
        self._sentences += len(dense_BSD)

    def result(self) -> Agreement:
        """The means."""
        if self._rows == 0:
            raise DataError("there is nothing to compare with the dense model: no batch, or only padding.")
        if self._is_logits:
            # rounding can leave a mean of -1e-9
            return Agreement(kl=max(0.0, self._kl / self._rows), top1=self._top1 / self._rows)
        return Agreement(hidden_cosine=self._hidden / self._rows, sentence_cosine=self._sentence / self._sentences)


def _tally_nll(output: Output, batch: Batch) -> tuple[float, int]:
    """Sum of -log p of each next token, in fp32 by chunks of rows."""
    _require_logits(output, "perplexity")
    side = "decoder_" if "decoder_input_ids" in batch else ""  # an encoder-decoder's logits are those of its decoder
    ids_BS = batch[f"{side}input_ids"]
    if output.tensor.shape[:2] != ids_BS.shape:
        raise ConfigError(
            f"perplexity needs one row of logits per input token, got {tuple(output.tensor.shape)} for {tuple(ids_BS.shape)}."
        )
    targets_BS = ids_BS[:, 1:]
    mask_BS = batch.get(f"{side}attention_mask")
    if mask_BS is not None:
        targets_BS = targets_BS.masked_fill(mask_BS[:, 1:] == 0, -100)
    total, step = 0.0, max(1, _CHUNK_ELEMENTS // output.tensor.shape[-1])
    for logits_SV, targets_S in zip(output.tensor, targets_BS.to(output.tensor.device), strict=True):
        for start in range(0, len(targets_S), step):
            rows = slice(start, min(start + step, len(targets_S)))
            total += F.cross_entropy(logits_SV[rows].float(), targets_S[rows], reduction="sum").item()
    return total, int((targets_BS != -100).sum())


def _tally_hits(output: Output, batch: Batch) -> tuple[float, int]:
    """Number of labels that the largest logit hits."""
    _require_logits(output, "accuracy")
    if "labels" not in batch:
        raise DataError("accuracy needs labels, and a batch has none; name a label column.")
    labels = batch["labels"].to(output.tensor.device)
    if not torch.isfinite(output.tensor).all():
        return math.nan, 1
    counts = labels != -100
    return ((output.tensor.argmax(-1) == labels) & counts).sum().item(), int(counts.sum())


def _tally_masked_nll(output: Output, batch: Batch) -> tuple[float, int]:
    """Sum of -log p of each label, in fp32, one sequence at a time: of the masked positions only."""
    _require_logits(output, "pseudo_perplexity")
    if "labels" not in batch:
        raise DataError("pseudo_perplexity needs labels at masked positions, and a batch has none.")
    total, labels_BS = 0.0, batch["labels"].to(output.tensor.device)
    for logits_SV, labels_S in zip(output.tensor, labels_BS, strict=True):
        masked_S = labels_S != -100
        total += F.cross_entropy(logits_SV[masked_S].float(), labels_S[masked_S], reduction="sum").item()
    return total, int((labels_BS != -100).sum())


def _tally_nothing(_output: Output, _batch: Batch) -> tuple[float, int]:
    """The cosine comes from the comparison with the dense reference."""
    return 0.0, 0


METRICS: dict[str, Metric] = {
    "perplexity": Metric(tally=_tally_nll, finish=lambda mean: math.exp(min(mean, 700.0)), lower_is_better=True),
    "pseudo_perplexity": Metric(tally=_tally_masked_nll, finish=lambda mean: math.exp(min(mean, 700.0)), lower_is_better=True),
    "accuracy": Metric(tally=_tally_hits, finish=float, lower_is_better=False),
    "cosine": Metric(tally=_tally_nothing, finish=float, lower_is_better=False),
}
"""Metrics by the name that ``curve.json`` stores."""


def default_metric(model: nn.Module, batch: Batch) -> str:
    """What to measure where nobody says: accuracy with labels (pseudo-perplexity of masked language models), perplexity of models that
    generate, else cosine.

    Cosine takes the last hidden states: of encoders, and of heads that predict something else than the next token, as masked language
    models do. Plain modules that give logits count as models that generate.

    Raises:
        ConfigError: the head has another task, or its hidden states cannot be had.
    """
    if "labels" in batch:
        return "pseudo_perplexity" if type(model).__name__.endswith("ForMaskedLM") else "accuracy"
    if type(model).__name__.endswith(_OTHER_HEADS):
        raise ConfigError(f"the quality of a {type(model).__name__} cannot be measured; {_SUPPORTED}.")
    can_generate = getattr(model, "can_generate", None)
    hidden = callable(can_generate) and not can_generate()
    with torch.no_grad(), _evaluating(model):
        set_mode(model, "dense")
        output = _forward(model, {name: value[:1] for name, value in batch.items()}, hidden=hidden)
        return "perplexity" if output.is_logits else "cosine"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; training flags and each layer's mode are restored, also after an error."""
    with eval_mode(model), kept(with_modes(model), "mode"):
        yield


def run_batch(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """What the model returns for a batch without its labels, on the model's device; recorders leave its padding out."""
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    with token_mask(model, inputs.get("attention_mask"), decoder_mask_BS=inputs.get("decoder_attention_mask")):
        return model(**inputs, **more)


def _forward(model: nn.Module, batch: Batch, *, hidden: bool = False) -> Output:
    """One forward; with ``hidden`` the last hidden states, also of a model with a head."""
    more: dict[str, Any] = {"output_hidden_states": True} if hidden and hasattr(model, "config") else {}
    outputs = run_batch(model, batch, **more)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is not None and not hidden:
        return Output(logits, is_logits=True)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None:
        # of an encoder-decoder the decoder's: what its head reads
        layers = getattr(outputs, "decoder_hidden_states", None) or getattr(outputs, "hidden_states", None)
        states = layers[-1] if layers else None
    if states is None or states.dim() < 3:
        raise ConfigError(f"{type(model).__name__} gives neither logits of a known kind nor hidden states to compare; {_SUPPORTED}.")
    return Output(cast(Tensor, states), is_logits=False)


def _kept_positions(output: Output, batch: Batch) -> Tensor | None:
    """bool mask of the positions that are not padding, where the output has positions."""
    mask_BS = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if mask_BS is None or output.tensor.dim() != 3 or mask_BS.shape != output.tensor.shape[:2]:
        return None
    return mask_BS.to(output.tensor.device) != 0


def _require_logits(output: Output, metric: str) -> None:
    if not output.is_logits:
        raise ConfigError(f"{metric} needs logits, and this model has no head; measure 'cosine', or load it with its head.")


def _head_of(model: nn.Module) -> nn.Module | None:
    """The vocabulary projection, by the transformers protocol."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
