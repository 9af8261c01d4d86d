"""Quality against cost from one converted model: selection rules are switched, weights are not touched.

Letters: T tokens, E experts.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .._config import LATER, from_dict, to_dict
from .._progress import NO_PROGRESS, Progress
from ..channels import SparseInput, kept, record_channels, sparse_inputs
from ..controls import record_active, set_mode, set_rule, with_modes
from ..cost import CostBreakdown, MoECost, WeightCost, estimate_flops, estimate_weights
from ..errors import ConfigError, DataError
from ..layers import MoEFFN, moe_layers
from ..select import Rule
from ..sites import FFNSite, find_ffn_sites
from .quality import METRICS, Batch, DenseReference, measure_quality

SCHEMA = 1
"""Version of ``curve.json``."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One operating point of a converted model; fractions are of the dense model."""

    rule: str
    """Name of the selection rule."""
    value: float
    """Its knob."""
    active_fraction: float
    """Executed / all neurons of the MoE layers, padding left out; of a model without them, kept / all input channels of its linear layers
    that skip some, weighted by parameters."""
    ffn_flops_fraction: float
    """(experts + routers + kept channels) / dense FFNs; replaced linear layers count as FFNs, and what they were as dense ones."""
    flops_fraction: float
    """Whole model, at the context length of the batches; also where layers were replaced, of the model from before. So models with and
    without replaced layers compare by this one."""
    quality: float
    """What the curve's metric says."""
    quality_ratio: float
    """quality / dense quality."""
    kl: float | None = None
    """Mean KL(dense || moe) per token or example in nats; none for models without logits."""
    projection_flops_fraction: float | None = field(default=None, metadata=LATER)
    """Where linear layers were replaced by MLPs: (experts + routers) of these / the layers; contained in ``ffn_flops_fraction``."""
    bytes_fraction: float | None = field(default=None, metadata=LATER)
    """Bytes of weights that decoding one token reads."""
    latency_fraction: float | None = field(default=None, metadata=LATER)
    """Measured time / dense time, both on ``machine``; None where it was not timed."""
    machine: str | None = field(default=None, metadata=LATER)
    """Where ``latency_fraction`` was measured, on how many threads and tokens."""


@dataclass(frozen=True, kw_only=True)
class DenseQuality:
    """The dense model on the same batches."""

    quality: float
    """What the curve's metric says."""
    flops_per_token: float
    """Multiply and add are 2."""


_EXTRA: dict[str, tuple[type, ...]] = {"calibrated": (str, int, float), "cost": (int, float), "versions": (str,)}
"""Objects among a curve's further keys, and the types of their values."""
_COST = {"ffn_dense", "ffn_unconverted", "experts", "router", "attention_proj", "attention_scores", "head", "other"}
_FINITE = ("value", "active_fraction", "ffn_flops_fraction", "flops_fraction", "bytes_fraction", "latency_fraction")
_MOST_BYTES = 2**26
"""Of a ``curve.json``: a point has some 300."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one model on one set of batches: the content of ``curve.json``."""

    model: str
    """Id or path of the converted model."""
    metric: str
    """Key of `moeify.evaluate.METRICS`."""
    dense: DenseQuality
    """The dense model on the same batches."""
    points: tuple[CurvePoint, ...] = ()
    """In the order in which they were asked for."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further top-level keys: data, column, window, tokens, seed, versions, checkpoint (weights, routers and rules), conversion (rules and
    calibration), calibrated ({"rule", "value"}), cost (`CostBreakdown.lines` with every expert on)."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "metric": self.metric,
            "dense": to_dict(self.dense),
            "points": [to_dict(point) for point in self.points],
            **self.extra,
        }

    def is_same_run(self, other: "Curve") -> bool:
        """Whether the points of both may stand in one curve: everything but the points is equal."""
        ours, theirs = self.to_json() | {"points": []}, other.to_json() | {"points": []}
        return bool(json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs)))

    def calibrated_point(self) -> CurvePoint | None:
        """The checkpoint's own point, if ``extra`` names it and it was measured."""
        named = self.extra.get("calibrated") or {}
        return next((p for p in self.points if (p.rule, p.value) == (named.get("rule"), named.get("value"))), None)

    def cost_by_part(self, point: CurvePoint | None = None) -> dict[str, float]:
        """FLOPs per token by part at a point, or of the dense model; empty for a curve without ``cost``.

        Routers, scores and head cost the same at every point; so do FFNs that were not converted where others were. What a point saves of
        the FFNs it saves of the experts, or of the FFNs as they are where there are none, and what else it saves is skipped channels of
        attention. Replaced projections are a part of their own, the layers that were there in the dense model's place, but in curves from
        before they had one, where they are among the FFNs.
        """
        if not (parts := dict(self.extra.get("cost") or {})):
            return {}
        dense, replaced = parts.pop("ffn_dense"), parts.pop("projections_dense", 0.0)
        own = {"projections": replaced} if "projections" in parts else {}
        if point is None:
            return parts | {"experts": dense - replaced - parts["ffn_unconverted"], "router": 0.0, **own}
        ffn = point.ffn_flops_fraction * dense
        elsewhere = (1 - point.flops_fraction) * self.dense.flops_per_token - (dense - ffn)
        if elsewhere > 1e-9 * self.dense.flops_per_token:  # what is less is rounding
            parts["attention_proj"] -= elsewhere
        if own and point.projection_flops_fraction is not None:
            parts["projections"] = point.projection_flops_fraction * replaced
            ffn -= parts["projections"]
        if not parts["experts"]:
            return parts | {"ffn_unconverted": ffn - parts["router"]}
        return parts | {"experts": ffn - parts["ffn_unconverted"] - parts["router"]}

    def write(self, path: str | Path) -> None:
        """Write ``curve.json`` in one step: a reader sees the old file or the whole new one.

        Raises:
            DataError: the file cannot be written; what was there is unharmed.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot write '{path}': {error.strerror}; free space or name another file.") from None

    @classmethod
    def read(cls, path: str | Path) -> "Curve":
        """Read a ``curve.json``.

        Raises:
            DataError: missing, not JSON, not a curve, or of a newer schema.
        """
        path = Path(path)
        try:
            if (size := path.stat().st_size) > _MOST_BYTES:
                raise DataError(f"'{path}' has {size} bytes, more than {_MOST_BYTES}, so it is not a curve; moeify sweep writes one.")
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no such file: '{path}'; moeify sweep writes one.") from None
        except OSError as error:
            raise DataError(f"cannot read '{path}': {error.strerror}.") from None
        except DataError:
            raise
        except RecursionError:
            raise DataError(f"'{path}' is nested too deeply for a curve; moeify sweep writes one.") from None
        except ValueError as error:
            raise DataError(f"'{path}' is not JSON ({error}), so not a curve; moeify sweep writes one.") from None
        if not isinstance(data, dict) or not {"schema", "model", "metric", "dense", "points"} <= set(data):
            raise DataError(f"'{path}' is not a curve of moeify; moeify sweep writes one.")
        if _is_deep(data):
            raise DataError(f"'{path}' is nested too deeply for a curve; moeify sweep writes one.")
        if not isinstance(data["schema"], int) or not 1 <= data["schema"] <= SCHEMA:
            raise DataError(f"'{path}' has schema {repr(data['schema'])[:80]}, this moeify reads up to {SCHEMA}; upgrade moeify.")
        known = {"schema", "model", "metric", "dense", "points"}
        if not isinstance(data["metric"], str) or data["metric"] not in METRICS:
            raise DataError(f"'{path}' is measured by {str(data['metric'])[:80]!r}; this moeify knows {', '.join(METRICS)}.")
        for key, kind in _EXTRA.items():
            if not isinstance(data.get(key) or {}, Mapping) or not all(isinstance(v, kind) for v in (data.get(key) or {}).values()):
                raise DataError(f"'{path}' is not a curve of moeify: {key!r} has another shape; moeify sweep writes one.")
        if (cost := data.get("cost")) and (missing := _COST - set(cost)):
            raise DataError(f"'{path}' is not a curve of moeify: 'cost' lacks {min(missing)!r}; moeify sweep writes one.")
        try:
            curve = cls(
                model=str(data["model"]),
                metric=str(data["metric"]),
                dense=from_dict(DenseQuality, data["dense"], where="dense"),
                points=tuple(from_dict(CurvePoint, point, where=f"points[{i}]") for i, point in enumerate(data["points"])),
                extra={key: value for key, value in data.items() if key not in known},
            )
        except (ConfigError, TypeError) as error:
            raise DataError(f"'{path}' is not a curve of moeify: {str(error)[:300]}") from None
        numbers = {f"points[{i}].{name}": getattr(point, name) for i, point in enumerate(curve.points) for name in _FINITE}
        numbers |= {"dense.quality": curve.dense.quality, "dense.flops_per_token": curve.dense.flops_per_token}
        numbers |= {f"cost.{name}": value for name, value in (cost or {}).items()}
        if bad := next((name for name, value in numbers.items() if value is not None and not abs(value) <= sys.float_info.max), None):
            raise DataError(f"'{path}' is not a curve of moeify: {bad[:80]} is {str(numbers[bad])[:40]}; moeify sweep writes one.")
        return curve


def _is_deep(value: Any, *, most: int = 16) -> bool:
    """Whether a JSON value has more than ``most`` levels: a curve has four, and whoever writes it again must be able to."""
    if not isinstance(value, (dict, list)):
        return False
    return most == 0 or any(_is_deep(item, most=most - 1) for item in (value.values() if isinstance(value, dict) else value))


CostAxis = Literal["ffn_flops_fraction", "flops_fraction"]
"""What a point costs: its FFNs, or the whole model."""


def quality_at(points: Iterable[CurvePoint], fraction: float, *, cost: CostAxis = "ffn_flops_fraction") -> float | None:
    """Quality at a cost between two points of a curve, on the straight line that joins them; None beyond the cheapest and the dearest."""
    return on_line(((float(getattr(point, cost)), point.quality) for point in points), fraction)


def on_line(line: Iterable[tuple[float, float]], x: float) -> float | None:
    """y at x on the straight lines that join points (x, y); None beyond the first and the last. A single point is a line of that x."""
    line = sorted(line)
    for (left, first), (right, second) in zip(line, line[1:] or line, strict=False):
        if left <= x <= right:
            return first if left == right else first + (second - first) * (x - left) / (right - left)
    return None


@dataclass(frozen=True, kw_only=True)
class LayerRules:
    """One operating point with a rule of its own for each layer."""

    value: float
    """The number that stands in the curve for all of them: the mean of their knobs."""
    rules: Mapping[str, Rule]
    """Rule by site name; a layer that is not named keeps the rule it has."""


def sweep(
    model: nn.Module,
    batches: Sequence[Batch],
    rule_type: type[Rule],
    values: Iterable[float | LayerRules],
    *,
    quality: str = "perplexity",
    cost: CostBreakdown | None = None,
    reference: DenseReference | None = None,
    clock: Callable[[], tuple[float, str]] | None = None,
    done: Sequence[CurvePoint] = (),
    on_point: Callable[[CurvePoint], None] | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[CurvePoint]:
    """Measure a converted or thinned model at each value of a rule's knob, all on the same batches.

    Args:
        model: a converted model; its rules and modes are restored, also after an error. Of a thinned one without MoE layers the rules of
            its channels are set: with ``Threshold`` the knob multiplies their levels.
        batches: inputs, in memory; re-used for every value.
        rule_type: the rule, from `moeify.select.RULES`.
        values: knobs, or rules per layer.
        quality: key of `METRICS`.
        cost: from `model_cost`; measured on the first batch if None.
        reference: dense outputs of the same batches; made if None.
        clock: called with the rules of each new point set: its time over the dense model's, and where that was measured. None: points have
            no time.
        done: points of an earlier run on the same batches; a value that is among them is not measured again. Of steps with one value and
            different rules, the first takes the first such point.
        on_point: called after each new point, so that the caller can save it.
        progress: told the number of batches of all values.

    Returns:
        A point for each value, in the order of ``values``.

    Raises:
        ConfigError: the model is dense, or a value is out of the knob's range (before anything is measured).

    Cost: one forward per batch and value, plus one dense pass if ``reference`` is None.
    """
    if not with_modes(model):
        raise ConfigError("the model has no MoE layer and skips no channel; convert or thin it first.")
    if not batches:
        raise DataError("there is no batch to evaluate on.")
    steps = [(value.value, value.rules) if isinstance(value, LayerRules) else (value, rule_type.at(value)) for value in values]
    distinct: list[_Step] = []
    for step in steps:
        if step not in distinct:
            distinct.append(step)
    points = _known_points(distinct, [point for point in done if point.rule == rule_type.name])
    todo = [i for i in range(len(distinct)) if i not in points]
    if todo:
        cost = cost or model_cost(model, batches[0])
        reference = reference or DenseReference(model, batches, metric=quality, progress=progress)
        weights = model_weights(model)
        with rules_restored(model), progress.task(f"sweep {rule_type.name}", total=len(todo) * len(batches)) as task:
            for i in todo:
                value, rule = distinct[i]
                set_mode(model, "moe")
                set_rule(model, rule)
                points[i] = _measure_point(
                    model,
                    batches,
                    labels=(rule_type.name, float(value)),
                    quality=quality,
                    cost=cost,
                    weights=weights,
                    reference=reference,
                    clock=clock,
                    progress=_Forward(task.advance),
                )
                if on_point is not None:
                    on_point(points[i])
    return [points[distinct.index(step)] for step in steps]


_Step = tuple[float, Rule | Mapping[str, Rule]]  # the number that stands in the curve, and what to set


def _known_points(steps: Sequence[_Step], done: Sequence[CurvePoint]) -> dict[int, CurvePoint]:
    """The points that were measured already, by index of the step: two steps may have one mean knob. Each point serves once."""
    left, known = list(done), {}
    for i, (value, _) in enumerate(steps):
        if (found := next((point for point in left if point.value == value), None)) is not None:
            left.remove(found)
            known[i] = found
    return known


def _measure_point(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    labels: tuple[str, float],
    quality: str,
    cost: CostBreakdown,
    weights: WeightCost,
    reference: DenseReference,
    clock: Callable[[], tuple[float, str]] | None,
    progress: Progress,
) -> CurvePoint:
    """The model with the rules that it has now, under the name and the knob of ``labels``."""
    with record_active(model) as stats, record_channels(model) as skipped:
        measured = measure_quality(model, batches, metric=quality, reference=reference, progress=progress)
    per_layer = {name: active for name, active in stats.per_layer().items() if not math.isnan(active)}
    active = stats.active_fraction() if per_layer else 1 - skipped.skipped_frac()
    per_layer |= {name: 1 - share for name, share in skipped.per_layer().items() if not math.isnan(share)}
    assert measured.agreement is not None
    latency, machine = (None, None) if clock is None else clock()
    return CurvePoint(
        rule=labels[0],
        value=labels[1],
        active_fraction=active,
        ffn_flops_fraction=cost.ffn_flops_fraction(per_layer),
        flops_fraction=cost.flops_fraction(per_layer),
        quality=measured.value,
        quality_ratio=measured.value / reference.quality,
        kl=measured.agreement.kl,
        projection_flops_fraction=cost.projection_flops_fraction(per_layer),
        bytes_fraction=weights.read_bytes_fraction(per_layer),
        latency_fraction=latency,
        machine=machine,
    )


@torch.no_grad()
def model_cost(model: nn.Module, batch: Batch, *, sites: Iterable[FFNSite] = ()) -> CostBreakdown:
    """`estimate_flops` of a converted model at the context length of ``batch``, from a short dense forward.

    Args:
        model: a converted model; its modes are restored.
        batch: inputs as they will be evaluated.
        sites: FFNs that were not converted, to be counted as FFN, too; of a model without MoE layers they are looked for if none is given.
    """
    layers = moe_layers(model)
    short = {name: value[:1] for name, value in batch.items() if name != "labels"}
    context = None
    if "input_ids" in short and all(value.dim() == 2 for value in short.values()) and "decoder_input_ids" not in short:
        # 64 positions tell the cost of any number (`CostBreakdown.at_context`), and cost no time to run.
        context = short["input_ids"].shape[1]
        short = {name: value[:, :64] for name, value in short.items()}
    with rules_restored(model):
        set_mode(model, "dense")
        sites = list(sites)
        if not layers and not sites:
            sites = find_ffn_sites(model, short)
        all_sites = {site.name: site for site in (*sites, *(layer.site for layer in layers.values()))}
        moe = {name: MoECost(num_experts=layer.num_experts, router_flops=_router_flops(layer)) for name, layer in layers.items()}
        cost = estimate_flops(model, short, sites=all_sites.values(), moe=moe, channels=sparse_inputs(model))
    return cost if context is None else cost.at_context(context)


def model_weights(model: nn.Module) -> WeightCost:
    """`estimate_weights` of a converted model: what decoding one token reads, as the active fraction goes."""
    layers = moe_layers(model)
    return estimate_weights(
        model,
        sites=[layer.site for layer in layers.values()],
        routers={n: layer.router for n, layer in layers.items()},
        channels=sparse_inputs(model),
        router_shares={n: layer.router.ffn_share for n, layer in layers.items()},
    )


def _router_flops(layer: MoEFFN) -> float:
    return float(layer.router.flops_per_token)


@contextmanager
def rules_restored(model: nn.Module) -> Iterator[None]:
    """Put back each layer's rule and mode, also after an error; the rule in the model's config, too, which `set_rule` writes."""
    layers: dict[str, MoEFFN | SparseInput] = {**sparse_inputs(model), **moe_layers(model)}
    before = {name: layer.rule for name, layer in layers.items()}
    with kept(with_modes(model), "mode"):
        try:
            yield
        finally:
            set_rule(model, before)


class _Forward:
    """A listener that hands the steps of an inner task on to the outer one."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    @contextmanager
    def task(self, label: str, *, total: int) -> Iterator["_Forward"]:
        yield self
