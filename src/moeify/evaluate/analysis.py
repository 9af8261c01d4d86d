"""Where the compute goes: executed experts by layer and token, non-zero activations, methods compared at equal cost.

Everything here runs a model or reads points that were measured; `moeify.report` draws what comes out.

Letters: B batch, S sequence, T tokens, F FFN width, L MoE layers, H and W rows and columns of patches.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..controls import record_active, set_mode, set_rule
from ..cost import site_flops_per_token
from ..errors import ConfigError, DataError
from ..layers import ActiveRecorder, MoEFFN, moe_layers
from ..select import Rule
from ..sites import FFNSite
from ..sites.probe import eval_mode
from ..sparsity import ActivationProfile, profile_activations
from .quality import METRICS, Batch, run_batch
from .sweep import CostAxis, CurvePoint, quality_at, rules_restored

BINS = 100
"""Bins of a histogram over shares in [0, 1]."""
SCHEMA = 1
"""Version of the JSON objects made here."""

_S = TypeVar("_S", bound="_Stored")
_T = TypeVar("_T")


class _Stored:
    """A result with a JSON form."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"schema": SCHEMA, **_config.to_dict(self)}

    @classmethod
    def from_json(cls: type[_S], data: Mapping[str, Any]) -> _S:
        """What `to_json` wrote.

        Raises:
            DataError: not such an object, or of a newer schema.
        """
        return _read(cls.__name__, data, lambda values: _config.from_dict(cls, values))


def _read(what: str, data: Any, build: Callable[[Mapping[str, Any]], _T]) -> _T:
    """``build`` of the object without its schema; whatever is wrong with it is a `DataError`."""
    if not isinstance(data, Mapping) or not isinstance(data.get("schema"), int):
        raise DataError(f"this is no {what} of moeify: a JSON object with a 'schema' is.")
    if data["schema"] > SCHEMA:
        raise DataError(f"{what} has schema {data['schema']}, this moeify reads up to {SCHEMA}; upgrade moeify.")
    try:
        return build({key: value for key, value in data.items() if key != "schema"})
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is no {what} of moeify: {error}") from None


# -- how many neurons a token takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How a number of neurons per token, in [0, F], is spread over tokens. All but the counts are shares of F."""

    tokens: int
    """Tokens counted, padding left out; at least 1."""
    num_neurons: int
    """F."""
    num_values: int
    """Values above 0 that the share can take, at about equal distances: E where whole experts run, else F."""
    histogram: tuple[int, ...]
    """Tokens in each of `BINS` bins of equal width over [0, 1]; the last one holds 1, too."""
    mean: float
    """Mean share."""
    deviation: float
    """Standard deviation over these tokens: their mean squared distance from the mean is its square."""
    p5: float
    """Smallest share that at least 5 % of the tokens do not exceed; likewise the other quantiles."""
    p25: float
    """25 %."""
    p50: float
    """The median."""
    p75: float
    """75 %."""
    p95: float
    """95 %."""

    def __post_init__(self) -> None:
        """Refuse what no tokens make."""
        if len(self.histogram) != BINS or sum(self.histogram) != self.tokens or self.tokens < 1:
            raise ConfigError(f"histogram must have {BINS} bins with all {self.tokens} tokens in them, at least 1.")

    @property
    def relative_deviation(self) -> float | None:
        """deviation / mean; None where every token has none."""
        return self.deviation / self.mean if self.mean else None

    @classmethod
    def of_counts(cls, tokens_F1: Tensor, *, num_values: int | None = None) -> "Distribution":
        """The distribution of exact counts: ``tokens_F1[n]`` tokens have n neurons, n = 0 ... F; at least one token; None is F."""
        tokens_F1 = tokens_F1.cpu().to(torch.int64)
        num_neurons, tokens = len(tokens_F1) - 1, int(tokens_F1.sum())
        count_F1 = torch.arange(num_neurons + 1)
        bin_F1 = (count_F1 * BINS // num_neurons).clamp(max=BINS - 1)  # in integers: 0.29 * 100 is less than 29
        histogram = torch.zeros(BINS, dtype=torch.int64).index_add_(0, bin_F1, tokens_F1)
        share_F1, weight_F1 = count_F1.double() / num_neurons, tokens_F1.double() / tokens
        mean = float((share_F1 * weight_F1).sum())
        below_F1 = tokens_F1.cumsum(0)
        quantiles = {f"p{p}": int((below_F1 * 100 < p * tokens).sum()) / num_neurons for p in (5, 25, 50, 75, 95)}
        return cls(
            tokens=tokens,
            num_neurons=num_neurons,
            num_values=num_values or num_neurons,
            histogram=tuple(histogram.tolist()),
            mean=mean,
            deviation=math.sqrt(float(((share_F1 - mean).square() * weight_F1).sum())),
            **quantiles,
        )


@dataclass(frozen=True, kw_only=True)
class ExecutedExperts(_Stored):
    """What share of each FFN's neurons a token executes, at several settings of the selection rules."""

    settings: Mapping[str, Mapping[str, Distribution]]
    """By the setting's label, then by layer, both in the order in which they ran."""

    def active_fraction(self) -> dict[str, dict[str, float]]:
        """Mean executed share by setting and layer: the active fraction of each layer."""
        return {label: {name: found.mean for name, found in layers.items()} for label, layers in self.settings.items()}


@dataclass(frozen=True, kw_only=True)
class NonzeroActivations(_Stored):
    """What share of each dense FFN's activations is not exactly zero on a token."""

    layers: Mapping[str, Distribution]
    """By site name; the number of non-zero activations is the share times ``num_neurons``."""

    @classmethod
    def of_profiles(cls, profiles: Mapping[str, ActivationProfile]) -> "NonzeroActivations":
        """The same from profiles that exist already; those without a token are left out.

        Raises:
            DataError: no profile has a token.
        """
        layers = {name: Distribution.of_counts(p.nonzero_tokens_F1) for name, p in profiles.items() if p.tokens}
        if not layers:
            raise DataError("no profile has a token to count.")
        return cls(layers=layers)


class _CountRecorder(ActiveRecorder):
    """How many tokens execute exactly n neurons, for every n; on the device, no host sync."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_F1: dict[str, Tensor] = {}
        self.num_experts: dict[str, int] = {}

    def add_tokens(self, layer: MoEFFN, active_T: Tensor, keep_T: Tensor | None, *, shape: Sequence[int]) -> None:
        name = layer.site.name
        if name not in self.tokens_F1:
            self.num_experts[name] = layer.num_experts
            self.tokens_F1[name] = torch.zeros(layer.site.d_ff + 1, dtype=torch.int64, device=active_T.device)
        self.tokens_F1[name].index_add_(0, active_T, torch.ones_like(active_T) if keep_T is None else keep_T.to(active_T.dtype))

    def distributions(self) -> dict[str, Distribution]:
        """By layer; those that no token reached are left out, with one warning that names them."""
        found = {name: tokens_F1.cpu() for name, tokens_F1 in self.tokens_F1.items()}
        empty = [name for name, tokens_F1 in found.items() if not tokens_F1.any()]
        if len(empty) == len(found):
            raise DataError("no token reached a MoE layer: there is no batch, or nothing but padding.")
        if empty:
            warnings.warn(f"no token reached {', '.join(empty)}; it is left out.", stacklevel=4)
        real = {name: tokens_F1 for name, tokens_F1 in found.items() if name not in empty}
        return {name: Distribution.of_counts(tokens_F1, num_values=self.num_experts[name]) for name, tokens_F1 in real.items()}


@torch.no_grad()
def executed_experts(
    model: nn.Module,
    batches: Sequence[Batch],
    rules: Mapping[str, Rule | Mapping[str, Rule]] | None = None,
    *,
    progress: Progress = NO_PROGRESS,
) -> ExecutedExperts:
    """How many of its experts a token executes, by layer and setting of the rules. Neurons are counted, so that experts of unequal size
    weigh what they cost.

    Args:
        model: a converted model; rules, modes and recorders are restored, also after an error.
        batches: inputs, in memory; re-used for every setting. Padding is left out as `record_active` does.
        rules: settings by label (`rules_at`): a rule for all layers, or rules by layer; a layer that is not named keeps its own. None: one
            setting, "as it is", the model with its present rules.
        progress: told the number of batches of all settings.

    Returns:
        A distribution for each setting and layer.

    Raises:
        ConfigError: the model has no MoE layer, no setting, or a name that is none of its layers.
        DataError: no batch, or only padding.

    Cost: one forward per batch and setting; results are fetched from the device once per setting.

    Source: figures 11 and 15 to 18 of Szatkowski et al. 2024, arXiv:2310.04361.
    """
    _layers_of(model)
    if not batches:
        raise DataError("there is no batch to run.")
    settings: Mapping[str, Rule | Mapping[str, Rule]] = {"as it is": {}} if rules is None else rules
    if not settings:
        raise ConfigError("there is no rule to run with; give at least one, or None for those of the model.")
    found = {}
    with sparse_mode(model), progress.task("executed experts", total=len(settings) * len(batches)) as task:
        own = {name: layer.rule for name, layer in moe_layers(model).items()}
        for label, rule in settings.items():
            set_rule(model, {**own, **rule} if isinstance(rule, Mapping) else rule)
            recorder = _CountRecorder()
            with record_active(model, recorder):
                for batch in batches:
                    run_batch(model, batch)
                    task.advance(1)
            found[label] = recorder.distributions()
    return ExecutedExperts(settings=found)


def rules_at(rule_type: type[Rule], values: Sequence[float]) -> dict[str, Rule]:
    """Settings for `executed_experts`: the rule at each value of its knob, labelled "tau = 0.1".

    Raises:
        ConfigError: a value is out of the knob's range.
    """
    return {f"{rule_type.knob} = {value:g}": rule_type.at(value) for value in values}


def nonzero_activations(
    model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Batch], *, progress: Progress = NO_PROGRESS
) -> NonzeroActivations:
    """How many activations of each FFN of a dense model are not zero on a token.

    Args:
        model: dense, or a converted one in dense mode.
        sites: as `find_ffn_sites` returned.
        batches: inputs; padding is left out.
        progress: told the number of batches.

    Raises:
        ConfigError, DataError: as `profile_activations`; DataError also where there is no token.

    Cost: that of `profile_activations`, which counts much more in the same pass; `NonzeroActivations.of_profiles` takes its result.

    Source: figure 3 of Szatkowski et al. 2024, arXiv:2310.04361.
    """
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    return NonzeroActivations.of_profiles(profile_activations(model, sites, inputs, progress=progress))


# -- what each token costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCosts:
    """FLOPs of the MoE layers by token (multiply and add are 2): router and executed experts. Padded positions are NaN."""

    layers: tuple[str, ...]
    """Names of the layers."""
    flops_LBS: Tensor
    """fp64, CPU."""
    dense_flops: tuple[float, ...]
    """Of one token in each layer, run dense."""
    router_flops: tuple[float, ...]
    """Of one token in each layer's router; contained in ``flops_LBS``."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches where the model reads images and its last positions are the patches; else None."""

    @property
    def flops_BS(self) -> Tensor:
        """Summed over layers."""
        return self.flops_LBS.sum(0)

    @property
    def fraction_LBS(self) -> Tensor:
        """FLOPs / dense FLOPs of the same layer; above 1 where the router costs more than the idle experts save."""
        return self.flops_LBS / torch.tensor(self.dense_flops, dtype=torch.float64)[:, None, None]

    @property
    def fraction_BS(self) -> Tensor:
        """FLOPs / dense FLOPs, all layers together."""
        return self.flops_BS / sum(self.dense_flops)

    @property
    def patches_BHW(self) -> Tensor:
        """`fraction_BS` of the patches, in their places in the image.

        Raises:
            ConfigError: the positions are no patches of an image.
        """
        rows, columns = self._known_grid()
        return self.fraction_BS[:, -rows * columns :].reshape(-1, rows, columns)

    @property
    def specials_BS(self) -> Tensor:
        """`fraction_BS` of the positions before the patches (the class token, registers).

        Raises:
            ConfigError: the positions are no patches of an image.
        """
        rows, columns = self._known_grid()
        return self.fraction_BS[:, : self.flops_LBS.shape[2] - rows * columns]

    def _known_grid(self) -> tuple[int, int]:
        if self.grid is None:
            raise ConfigError("these positions are not the patches of an image in a grid.")
        return self.grid

    def to_json(self) -> dict[str, Any]:
        """The JSON object; NaN is null."""
        flops = [[[None if math.isnan(f) else f for f in row] for row in rows] for rows in self.flops_LBS.tolist()]
        return {
            "schema": SCHEMA,
            "layers": list(self.layers),
            "flops": flops,
            "dense_flops": list(self.dense_flops),
            "router_flops": list(self.router_flops),
            "grid": None if self.grid is None else list(self.grid),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TokenCosts":
        """What `to_json` wrote.

        Raises:
            DataError: not such an object, or of a newer schema.
        """

        def build(values: Mapping[str, Any]) -> TokenCosts:
            flops = [[[math.nan if f is None else f for f in row] for row in rows] for rows in values["flops"]]
            costs = cls(
                layers=tuple(values["layers"]),
                flops_LBS=torch.tensor(flops, dtype=torch.float64),
                dense_flops=tuple(values["dense_flops"]),
                router_flops=tuple(values["router_flops"]),
                grid=None if values["grid"] is None else (int(values["grid"][0]), int(values["grid"][1])),
            )
            if costs.flops_LBS.dim() != 3 or not len(costs.layers) == len(costs.flops_LBS) == len(costs.dense_flops):
                raise DataError("'flops' does not fit 'layers'.")
            return costs

        return _read(cls.__name__, data, build)


class _TokenRecorder(ActiveRecorder):
    """Executed neurons of every token of every layer, with NaN at padding; calls of one layer are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.active: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add_tokens(self, layer: MoEFFN, active_T: Tensor, keep_T: Tensor | None, *, shape: Sequence[int]) -> None:
        name, active_T = layer.site.name, active_T.double()
        active_T = active_T if keep_T is None else active_T.masked_fill(~keep_T, math.nan)
        if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
            raise ConfigError(f"'{name}' runs on different positions in one forward; its tokens have no cost each.")
        self.active[name] = self.active[name] + active_T if name in self.active else active_T
        self.calls[name] = self.calls.get(name, 0) + 1


@torch.no_grad()
def token_costs(model: nn.Module, batch: Batch, *, layers: Sequence[str] | None = None) -> TokenCosts:
    """What each token, or patch of an image, costs in the MoE layers, with the model's present rules.

    FLOPs of a token in a layer: router + dense * executed neurons / F, times the calls of that layer.

    Args:
        model: a converted model; its modes and recorders are restored, also after an error.
        batch: inputs; padding, where a mask of the tokens' shape tells it, costs NaN.
        layers: names of the MoE layers to count; None: all.

    Returns:
        Costs by layer, sequence and position.

    Raises:
        ConfigError: no MoE layer, a name that is none of them, or layers that see different positions (encoder and decoder, stages that
            pool): name those of one kind.

    Cost: one forward.

    Source: the compute heat-maps of Szatkowski et al. 2024, arXiv:2310.04361.
    """
    executors = _layers_of(model)
    chosen = list(executors if layers is None else layers)
    if not chosen:
        raise ConfigError("layers is empty; name at least one MoE layer, or None for all.")
    for name in chosen:
        _config.lookup(executors, name, where="layers")
    recorder = _TokenRecorder()
    with sparse_mode(model), record_active(model, recorder):
        run_batch(model, batch)
    if silent := [name for name in chosen if name not in recorder.active]:
        raise ConfigError(f"'{silent[0]}' did not run in this forward; name the layers that do.")
    num_sequences = len(next(value for name, value in batch.items() if name != "labels"))
    shapes = {name: positions(recorder.shapes[name], num_sequences) for name in chosen}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"'{name}' {shape}" for name, shape in {shape: (name, shape) for name, shape in shapes.items()}.values())
        raise ConfigError(f"the MoE layers see different positions: {found}; name layers of one kind.")
    shape_BS = shapes[chosen[0]]
    dense = [float(recorder.calls[name] * site_flops_per_token(executors[name].site)) for name in chosen]
    router = [float(recorder.calls[name] * executors[name].router.flops_per_token) for name in chosen]
    flops = []
    for name, dense_flops, router_flops in zip(chosen, dense, router, strict=True):
        share_T = recorder.active[name].cpu() / (recorder.calls[name] * executors[name].site.d_ff)
        flops.append((router_flops + dense_flops * share_T).reshape(shape_BS))
    return TokenCosts(
        layers=tuple(chosen),
        flops_LBS=torch.stack(flops),
        dense_flops=tuple(dense),
        router_flops=tuple(router),
        grid=patch_grid(model, batch, shape_BS[1]),
    )


def positions(shape: tuple[int, ...], num_sequences: int) -> tuple[int, int]:
    """(B, S) of what a layer saw, also where the model has flattened it."""
    tokens = math.prod(shape)
    return (shape[0], tokens // max(1, shape[0])) if len(shape) == 2 else (num_sequences, tokens // num_sequences)


def patch_grid(model: nn.Module, batch: Batch, positions: int) -> tuple[int, int] | None:
    """Rows and columns of patches, if the batch holds images and there are positions for all of them."""
    pixels, config = batch.get("pixel_values"), getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", None) or config, "patch_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if pixels is None or pixels.dim() != 4 or len(sides) != 2 or not all(sides):
        return None
    rows, columns = pixels.shape[2] // sides[0], pixels.shape[3] // sides[1]
    return (rows, columns) if 0 < rows * columns <= positions else None


def _layers_of(model: nn.Module) -> dict[str, MoEFFN]:
    if not (layers := moe_layers(model)):
        raise ConfigError("the model has no MoE layer, so nothing is left out of any token; convert it first.")
    return layers


@contextmanager
def sparse_mode(model: nn.Module) -> Iterator[None]:
    """Eval and moe mode inside; rules, modes and training flags are given back, also after an error."""
    with eval_mode(model), rules_restored(model):
        set_mode(model, "moe")
        yield


# -- methods at equal cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One method or variant."""

    name: str
    """As the caller calls it."""
    quality: tuple[float | None, ...]
    """At each of the table's fractions; None where the method was not measured that cheap, or that dear."""
    cheapest: float | None
    """Smallest fraction at which the quality is within the table's tolerance; None where it nowhere is."""


@dataclass(frozen=True, kw_only=True)
class AblationTable(_Stored):
    """Methods at equal cost, and cost at (nearly) equal quality."""

    metric: str
    """Key of `METRICS`."""
    cost: str
    """Which fraction: "ffn_flops_fraction" or "flops_fraction"."""
    dense: float
    """Quality of the dense model that all rows are held against."""
    within: float
    """What may be lost against ``dense``, in units of the metric."""
    fractions: tuple[float, ...]
    """Costs at which qualities are given."""
    rows: tuple[AblationRow, ...]
    """In the order in which they came."""

    def cost_ratios(self, name: str) -> dict[str, float | None]:
        """Of each row, ``cheapest`` / that of the row ``name``: 0.5 is as good at half the FLOPs. None where one of them has none.

        Raises:
            ConfigError: no such row.
        """
        base = _config.lookup({row.name: row for row in self.rows}, name, where="row").cheapest
        return {row.name: row.cheapest / base if base and row.cheapest is not None else None for row in self.rows}


def ablation(
    rows: Mapping[str, Sequence[CurvePoint]],
    *,
    metric: str,
    dense: float,
    within: float,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    cost: CostAxis = "flops_fraction",
) -> AblationTable:
    """Compare methods by their measured points.

    Points that another one beats at no more cost are left out, and the rest, the front, is joined by straight lines: between two rules,
    tokens can be dealt to either. Nothing is said below a row's cheapest point and above its dearest; between its best and its dearest
    point stands the best.

    Args:
        rows: points by the name of the method, e.g. ``Curve.points``; at least one row, each with a point.
        metric: key of `METRICS`, of all points.
        dense: quality of the dense model.
        within: loss that is accepted, >= 0, in units of the metric: 0.01 is a point of accuracy.
        fractions: costs at which qualities are wanted.
        cost: which fraction of the dense FLOPs.

    Raises:
        ConfigError: unknown metric or cost, or a negative tolerance. DataError: no row, or a row without a point; names it.

    Source: figure 8 of Szatkowski et al. 2024, arXiv:2310.04361.
    """
    sign = -1.0 if _config.lookup(METRICS, metric, where="metric").lower_is_better else 1.0
    _config.lookup(dict.fromkeys(("ffn_flops_fraction", "flops_fraction"), True), cost, where="cost")
    if not within >= 0:
        raise ConfigError(f"within must be at least 0, got {within}.")
    if not rows:
        raise DataError("there is no method to compare.")
    if empty := [name for name, points in rows.items() if not points]:
        raise DataError(f"'{empty[0]}' has no point; moeify sweep measures them.")
    limit = dense - sign * within
    found = []
    for name, points in rows.items():
        front = _front(points, cost, sign)
        dearest = max(float(getattr(point, cost)) for point in points)
        best = float(getattr(front[-1], cost))
        qualities = (front[-1].quality if best <= at <= dearest else quality_at(front, at, cost=cost) for at in fractions)
        found.append(AblationRow(name=name, quality=tuple(qualities), cheapest=_cheapest(front, cost, sign, limit)))
    return AblationTable(metric=metric, cost=cost, dense=dense, within=within, fractions=tuple(fractions), rows=tuple(found))


def _front(points: Sequence[CurvePoint], cost: str, sign: float) -> list[CurvePoint]:
    """Points that no other beats at the same or less cost, cheapest first; quality grows strictly along them."""
    front: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (getattr(p, cost), -sign * p.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def _cheapest(front: Sequence[CurvePoint], cost: str, sign: float, limit: float) -> float | None:
    """Where the front crosses ``limit``; its cheapest point's cost where all of it is good enough."""
    before: CurvePoint | None = None
    for point in front:
        if sign * point.quality >= sign * limit:
            right = float(getattr(point, cost))
            if before is None:
                return right
            left = float(getattr(before, cost))
            return left + (right - left) * (limit - before.quality) / (point.quality - before.quality)
        before = point
    return None
