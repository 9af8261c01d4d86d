"""How good a conversion is, measured once on sequences that nothing was fitted to, before it is saved."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._config import to_dict
from .._progress import NO_PROGRESS, Progress
from ..channels import sparse_inputs
from ..errors import ConfigError, MoeifyError
from ..evaluate import Curve, DenseQuality, DenseReference, LayerRules, agreement, default_metric, measure_quality, model_cost, sweep
from ..layers import moe_layers

_MOST_TOKENS = 256  # of a sequence: the logits of 1024 tokens would be the largest tensor of a whole conversion
_CACHE_BYTES = 1 << 26  # of dense outputs: those of a large vocabulary are made again rather than kept, or measuring would set the peak
_WITH_LOGITS = ("ForSequenceClassification", "ForImageClassification", "ForMaskedLM")
_PARTS = {
    "experts": "experts",
    "routers": "router",
    "FFNs not converted": "ffn_unconverted",
    "replaced projections": "projections",
    "attention": "attention_proj",
    "attention scores": "attention_scores",
    "head": "head",
    "other": "other",
}


def measure_converted(
    model: nn.Module, held_out: Sequence[Mapping[str, Tensor]], *, progress: Progress = NO_PROGRESS
) -> dict[str, Any] | None:
    """The model as it is now against its dense mode.

    Args:
        model: converted or thinned model with its calibrated rules.
        held_out: batches that it was not fitted to; text windows are cut to 256 tokens.
        progress: told every batch.

    Returns:
        JSON values: ``metric``, ``quality``, ``dense_quality``, ``quality_ratio``, ``kl`` (None without logits), ``active_fraction``,
        ``ffn_flops_fraction``, ``flops_fraction``, the number of ``sequences``, and ``cost``: FLOPs per token by part, "dense" and
        "converted". None where there is nothing to measure on, or, with a warning, no way to measure such a model.
    """
    batches = [short for batch in held_out for short in _cut(batch)]
    if not batches:
        return None
    try:
        return _measure(model, batches, context_of=held_out[0], progress=progress)
    except (MoeifyError, ValueError) as error:  # what was fitted for hours is worth saving all the same
        warnings.warn(f"the converted model was not measured: {error}", stacklevel=2)
        return None


def before_replacing(
    model: nn.Module, held_out: Sequence[Mapping[str, Tensor]], *, progress: Progress = NO_PROGRESS
) -> Callable[[nn.Module], dict[str, Any] | None]:
    """Measure a dense model, some of whose layers are to be replaced.

    Args:
        model: as it is before.
        held_out: batches that nothing is fitted to; text windows are cut to 256 tokens.
        progress: told every batch.

    Returns:
        A function that measures the model as it is then, on the same batches: JSON values ``metric``, ``dense_quality`` (before),
        ``quality``, ``quality_ratio``, ``kl`` (None without logits, or where the outputs of before are too large to keep) and
        ``sequences``. It gives None where there is nothing to measure on, or, with a warning, no way to measure such a model.
    """
    batches = [short for batch in held_out for short in _cut(batch)]
    try:
        if not batches:
            return lambda _model: None
        metric = _metric(model, batches[0])
        reference = DenseReference(model, batches, metric=metric, cache_bytes=_CACHE_BYTES, progress=progress)
    except (MoeifyError, ValueError) as error:
        warnings.warn(f"the model was not measured before its layers were replaced: {error}", stacklevel=2)
        return lambda _model: None
    is_kept = reference.keeps != "nothing"  # what was not kept would be made again by the model, which is another by then

    def measure(model: nn.Module) -> dict[str, Any] | None:
        if metric == "cosine" and not is_kept:
            warnings.warn("the outputs of the model before its layers were replaced are too large to keep: not measured.", stacklevel=2)
            return None
        found = measure_quality(model, batches, metric=metric, reference=reference if is_kept else None, progress=progress)
        return {
            "metric": metric,
            "dense_quality": reference.quality,
            "quality": found.value,
            "quality_ratio": found.value / reference.quality,
            "kl": None if found.agreement is None else found.agreement.kl,
            "sequences": len(batches),
        }

    return measure


def replaced_rows(measured: Mapping[str, Any] | None) -> dict[str, str]:
    """What `before_replacing` found, as rows of the model card."""
    if measured is None:
        return {}
    values = f"{measured['quality']:.4g} (before {measured['dense_quality']:.4g}, ratio {measured['quality_ratio']:.4f})"
    return {f"held-out {measured['metric']} with replaced layers, before conversion": values}


def card_rows(measured: Mapping[str, Any] | None) -> dict[str, str]:
    """`measure_converted`'s result as rows of the model card."""
    if measured is None:
        return {"measured": "nothing; `moeify sweep` does"}
    metric, kl = measured["metric"], measured["kl"]
    rows = {
        f"held-out {metric}": f"{measured['quality']:.4g} (dense {measured['dense_quality']:.4g}, ratio {measured['quality_ratio']:.4f})",
        **({} if kl is None else {"held-out KL from the dense model": f"{kl:.4g} nats"}),
        "held-out active fraction": f"{measured['active_fraction']:.4g}",
        "held-out FLOPs": f"{measured['ffn_flops_fraction']:.4g} of the FFNs, {measured['flops_fraction']:.4g} of all",
    }
    dense, converted = measured["cost"]["dense"], measured["cost"]["converted"]
    for label, key in _PARTS.items():
        if dense.get(key) or converted.get(key):
            rows[f"MFLOPs per token, {label}"] = f"{converted[key] / 1e6:.4g} (dense {dense[key] / 1e6:.4g})"
    return rows


def int8_rows(record: Mapping[str, Any]) -> dict[str, str]:
    """What quantising the weights did, as rows of the model card; none for a calibration record of floating weights."""
    if record.get("weights") != "int8":
        return {}
    errors = record["int8_errors"].values()
    rows = {"relative error of the int8 weights": f"{sum(errors) / len(errors):.2g}, largest of one {max(errors):.2g}"}
    if (before := record["measured_float"]) is not None:
        rows[f"held-out {before['metric']} with floating weights"] = f"{before['quality']:.4g} (dense {before['dense_quality']:.4g})"
    return rows


def _measure(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, context_of: Mapping[str, Tensor], progress: Progress
) -> dict[str, Any]:
    metric = _metric(model, batches[0])
    reference = DenseReference(model, batches, metric=metric, cache_bytes=_CACHE_BYTES, progress=progress)
    cost = model_cost(model, context_of)
    rules = {name: layer.rule for name, layer in (moe_layers(model) or sparse_inputs(model)).items()}
    step = LayerRules(value=sum(rule.value for rule in rules.values()) / len(rules), rules=rules)
    (point,) = sweep(
        model, batches, type(next(iter(rules.values()))), [step], quality=metric, cost=cost, reference=reference, progress=progress
    )
    dense = DenseQuality(quality=reference.quality, flops_per_token=cost.dense_flops_per_token)
    curve = Curve(model="", metric=metric, dense=dense, extra={"cost": cost.lines()})
    numbers = {key: value for key, value in to_dict(point).items() if key not in ("rule", "value")}
    if metric == "cosine" and type(model).__name__.endswith(_WITH_LOGITS):
        numbers["kl"] = agreement(model, batches, progress=progress).kl
    return {
        "metric": metric,
        "dense_quality": reference.quality,
        **numbers,
        "sequences": len(batches),
        "cost": {"dense": curve.cost_by_part(), "converted": curve.cost_by_part(point)},
    }


def _metric(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    try:
        return default_metric(model, batch)
    except ConfigError:  # a head of another task: its hidden states are compared
        return "cosine"


def _cut(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """One sequence at a time; windows of plain text in consecutive pieces, of two tokens at least."""
    for i in range(len(next(iter(batch.values())))):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if set(row) == {"input_ids"}:
            yield from ({"input_ids": ids} for ids in torch.split(row["input_ids"], _MOST_TOKENS, dim=1) if ids.shape[1] > 1)
        else:
            yield row
