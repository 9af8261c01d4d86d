"""Which layer gets how much of a global budget: measured, starting from what each layer costs the model when it alone is cut.

Letters: T tokens, E experts, K input channels.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress, Task
from ..channels import record_channels, sparse_inputs
from ..controls import record_active, set_mode, set_rule
from ..errors import ConfigError, UnsupportedModelError
from ..evaluate import DenseReference, default_metric, measure_quality, model_cost, model_weights
from ..evaluate.sweep import rules_restored
from ..layers import MoEFFN, moe_layers
from ..select import Rule, RuleConfig
from ..select.calibrate import Calibrator
from ..sites import in_decoder, token_mask_of
from .curves import Point, around, spread, through
from .price import UNITS, Batch, Clock, Counted, Executor, Prices, dense_run, hooked, timed_prices
from .scale import READINGS, find_scale

GRID = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""Active fractions at which each layer is measured alone; at 1 the loss is 0."""
FEWEST = 0.02
"""No layer is asked for less; a rule's own least may be more."""
LATENCY_TOLERANCE = 0.05
"""Of the asked ratio of times."""

_SCORES = 1 << 20  # scores kept of a layer, 4 MiB: 0.1 points of active fraction at 2048 tokens and 512 experts
_TOKENS = 2048
_EQUAL_COST = 5e-4  # candidates are compared at costs that differ by less
_MOST_STEPS = 8  # to reach a cost
_STEP, _LEAST_STEP = 0.4, 0.05  # share of a layer's own fraction by which it is moved at the working point


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """A budget and how hard to look."""

    unit: str
    """What it counts: 'flops' of the whole model, 'ffn_flops', 'bytes' of weights that decoding one token reads, or measured 'latency'."""
    fraction: float
    """Of what the dense model needs, in (0, 1]."""
    passes: int = 4
    """How often layers are measured again with all others at the working point, two forwards of the data a layer each; 0: only alone."""
    rounds: int = 9
    """Timed runs of each side, of a latency budget."""

    def __post_init__(self) -> None:
        _config.lookup(dict.fromkeys(UNITS), self.unit, where="unit")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"the budget must be in (0, 1] of the dense model's {self.unit}, got {self.fraction}.")
        if self.passes < 0 or self.rounds < 1:
            raise ConfigError(f"passes must be at least 0 and rounds at least 1, got {self.passes} and {self.rounds}.")


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to spend a budget."""

    rules: dict[str, RuleConfig]
    """What `moeify.set_rule` takes."""
    loss: float
    """As `Allocation.loss`, on the same batches."""
    reached: float
    """Cost / dense cost in the budget's unit. Counted ones are at most the budget where a rule of the kind can be; time is the median of
    readings taken after its scale was chosen, near the budget or, where rules or machine do not allow that, as near as was found."""


Curves = Mapping[str, Mapping[float, float]]
"""Loss by active fraction of each layer alone."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Rules of all layers within a budget, and what was measured with them on the calibration batches."""

    rules: dict[str, RuleConfig]
    """What `moeify.set_rule` takes."""
    active: dict[str, float]
    """Active fraction of each layer."""
    active_fraction: float
    """Of the model: neurons of MoE layers, or without any the parameters of thinned ones."""
    reached: float
    """Cost / dense cost in the budget's unit; time is measured, as in `Alternative`, and within 5 % of the budget or below it with
    everything running (then it is what the layers' own times add up to)."""
    costs: dict[str, float]
    """The counted costs / dense, by unit."""
    loss: float
    """Mean KL(dense || these rules) in nats, or 1 - cosine where there are no logits."""
    compared: dict[str, Alternative] = field(default_factory=dict)
    """Where the search started: "fraction" (the same active fraction in each layer), "knob" (one knob for all; only where all rules are of
    one kind), "alone" (layers measured one at a time). None of them loses less at this cost (at a time within the tolerance); empty where
    nothing must be saved."""
    curves: dict[str, dict[float, float]] = field(default_factory=dict)
    """Loss by active fraction of each layer alone: they hold for other budgets, too."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """Rules, and what a forward of all batches told of them."""

    rules: Mapping[str, Rule]
    active: Mapping[str, float]
    active_fraction: float
    loss: float
    cost: float


class Knobs:
    """Rules of layers by the active fraction that they give, from the scores of calibration tokens with everything running."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.layers: dict[str, Executor] = {**sparse_inputs(model), **moe_layers(model)}
        scores = _scores(model, self.layers, batches)
        missing = [name for name in self.layers if name not in scores]
        if missing:
            raise ConfigError(f"'{missing[0]}' saw no token of the calibration data, so nothing can be said of its rule.")
        kinds = {name: type(layer.rule) for name, layer in self.layers.items()}
        self._calibrators = {
            kind: Calibrator(
                kind,
                {name: scores[name] for name in self.layers if kinds[name] is kind},
                weights={name: _size(layer) for name, layer in self.layers.items() if kinds[name] is kind},
                always_on={
                    name: layer.always_on for name, layer in self.layers.items() if kinds[name] is kind and isinstance(layer, MoEFFN)
                },
            )
            for kind in dict.fromkeys(kinds.values())
        }
        self._of = {name: self._calibrators[kind] for name, kind in kinds.items()}

    def rules(self, fractions: Mapping[str, float]) -> dict[str, Rule]:
        """The rule of each named layer at its active fraction, or the nearest that it can have."""
        found = {}
        for name, fraction in fractions.items():
            calibrator = self._of[name]
            knob = calibrator.layers[name].nearest(min(max(fraction, FEWEST), 1.0))
            found[name] = calibrator.rule_type.at(knob)
        return found

    def one_knob(self, fraction: float) -> dict[str, Rule] | None:
        """One knob for all layers, that runs a mean fraction; None where their rules are of several kinds."""
        calibrators = list(self._calibrators.values())
        return calibrators[0].solve(min(max(fraction, FEWEST), 1.0), scope="global").rules if len(calibrators) == 1 else None


@torch.no_grad()
def allocate(
    model: nn.Module,
    batches: Sequence[Batch],
    config: AllocateConfig,
    *,
    inputs: Sequence[Batch] = (),
    dense: nn.Module | None = None,
    clock: Callable[[], tuple[float, float]] | None = None,
    curves: Curves | None = None,
    progress: Progress = NO_PROGRESS,
) -> Allocation:
    """Spread a budget over the layers of a converted or thinned model so that it loses little; the rules that it has come back.

    1. Each layer alone runs at the fractions of `GRID`, all others whole: loss_l(fraction), cost_l(fraction).
    2. `spread` finds the fractions that lose least together for the budget, losses added.
    3. Losses do not add where layers err alike. So the best of three starts at equal cost (these fractions, one fraction for all, one knob
       for all) is the working point, around which each layer is moved down and up with all others in place; `spread` of the measured
       changes gives the next point, which counts if it loses less at the same cost; else the step is halved.
    4. With a latency budget the layers' costs are times measured alone, which need not add up. So at the end the fractions of each
       candidate (the three starts and the refined point) are scaled until the whole model, timed in turns with the dense one, takes the
       budget's time; of those within 5 %, by the median of fresh readings, the one that loses least is taken.

    Args:
        model: converted or thinned; its routers' scores decide, so they must be trained.
        batches: calibration data, keyword arguments of the model; some thousand tokens.
        config: the budget.
        inputs: for a latency budget, what is timed: all of these batches are one run.
        dense: for a latency budget, the dense model; None makes one from a copy of ``model``.
        clock: gives (model's time / dense time, dense ms) with the model's present rules; None is `moeify.budget.price.Clock`.
        curves: `Allocation.curves` of another budget on the same batches, which need not be measured again.
        progress: told every forward.

    Returns:
        Rules, and what they cost and lose on ``batches``; of two that lose the same the first of "fraction", "knob", "alone", refined.

    Raises:
        ConfigError: the budget is below what the model can reach (names that), no candidate's confirmed time is within 5 % of it, or
            nothing to time.
        UnsupportedModelError: the model is dense.

    Cost: one forward of all batches for each layer and point of `GRID`, then two a layer and pass, and some ten more.
    """
    if not moe_layers(model) and not sparse_inputs(model):
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
    if config.unit == "latency" and not inputs and clock is None:
        raise ConfigError("a latency budget needs inputs to time.")
    with rules_restored(model):
        return _Search(model, batches, config, inputs=inputs, dense=dense, clock=clock, progress=progress).run(curves)


class _Search:
    """One call of `allocate`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        config: AllocateConfig,
        *,
        inputs: Sequence[Batch],
        dense: nn.Module | None,
        clock: Callable[[], tuple[float, float]] | None,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.config, self.progress = model, batches, config, progress
        self.knobs = Knobs(model, batches)
        self.names = list(self.knobs.layers)
        self.metric = _metric(model, batches[0])
        self.reference = DenseReference(model, batches, metric=self.metric, progress=progress)
        self.counted = Counted(flops=model_cost(model, batches[0]), weights=model_weights(model))
        self.clock: Callable[[], tuple[float, float]] | None = None
        self.known: dict[tuple[Rule, ...], _State] = {}
        if config.unit == "latency":
            self.clock = clock or Clock(model, inputs, dense=dense, rounds=config.rounds)
        self.prices = self._prices(inputs)

    def _prices(self, inputs: Sequence[Batch]) -> Prices:
        if self.clock is None:
            return self.counted.prices(self.config.unit, self.names)
        set_rule(self.model, self.knobs.rules(dict.fromkeys(self.names, 1.0)))
        ratio, dense_ms = self.clock()
        if not inputs:  # somebody else's clock, and nothing to run: FLOPs stand for the layers' share of the time
            flops = self.counted.prices("flops", self.names)
            scale = ratio / flops.total(dict.fromkeys(self.names, 1.0))
            return Prices(base=flops.base * scale, of={name: _scaled(price, scale) for name, price in flops.of.items()})
        options = {"dense_ms": dense_ms, "all_on_ms": ratio * dense_ms, "rounds": self.config.rounds}
        return timed_prices(self.model, self.knobs.rules, inputs, **options)  # type: ignore[arg-type]

    # -- measuring -------------------------------------------------------------------------------------------------------------------

    def measure(self, rules: Mapping[str, Rule], task: Task | None = None) -> _State:
        """The model with these rules on all batches; what was measured once is not again."""
        key = tuple(rules[name] for name in self.names)
        if key not in self.known:
            set_rule(self.model, rules)
            set_mode(self.model, "moe")
            with record_active(self.model) as executed, record_channels(self.model) as skipped:
                found = measure_quality(self.model, self.batches, metric=self.metric, reference=self.reference)
            active = {name: 1 - share for name, share in skipped.per_layer().items()} | executed.per_layer()
            active = {name: active[name] for name in self.names if not math.isnan(active.get(name, math.nan))}
            agreement = found.agreement
            assert agreement is not None
            self.known[key] = _State(
                rules=dict(rules),
                active=active,
                active_fraction=executed.active_fraction() if moe_layers(self.model) else 1 - skipped.skipped_frac(),
                loss=agreement.kl if agreement.kl is not None else 1 - found.value,
                cost=self.prices.total({name: active.get(name, 1.0) for name in self.names}),
            )
        if task is not None:
            task.advance(1)
        return self.known[key]

    def at_cost(self, family: Callable[[float], Mapping[str, Rule] | None], start: float) -> tuple[_State, float] | None:
        """The member of a family of rules whose measured cost is the budget, or just below it where it cannot be; and its parameter.

        The family's cost grows with its parameter, which is about the mean active fraction.
        """
        target, best = self.config.fraction, None
        low, high, at = 0.0, math.inf, start
        for _ in range(_MOST_STEPS):
            rules = family(at)
            if rules is None:
                return None
            state = self.measure(rules)
            over = state.cost - target
            if best is None or _miss(over) < _miss(best[0].cost - target):
                best = state, at
            if abs(over) <= _EQUAL_COST:
                break
            low, high = (at, high) if over < 0 else (low, at)
            variable = state.cost - self.prices.base
            step = at * (target - self.prices.base) / variable if variable > 0 else at / 2
            at = step if low < step < high else (low + high) / 2 if high < math.inf else 2 * at
            if at >= 1.5 and over < 0:
                break
        return best

    # -- the search --------------------------------------------------------------------------------------------------------------------

    def run(self, alone: Curves | None) -> Allocation:
        """See `allocate`."""
        self._check_reachable()
        full = self.measure(self.knobs.rules(dict.fromkeys(self.names, 1.0)))
        if full.cost <= self.config.fraction:
            return self._finished(full, {}, {})
        alone = alone or self._alone()
        curves = {name: through(losses, self.prices.of.get(name, _free)) for name, losses in alone.items()}
        mean = (self.config.fraction - self.prices.base) / (full.cost - self.prices.base)
        found = {
            "fraction": self.at_cost(lambda f: self.knobs.rules(dict.fromkeys(self.names, min(f, 1.0))), mean),
            "knob": self.at_cost(lambda f: self.knobs.one_knob(min(f, 1.0)), mean),
            "alone": self.at_cost(lambda f: self.knobs.rules(self._spread(curves, f, full)), mean),
        }
        states = {name: best[0] for name, best in found.items() if best is not None}
        best = self._refined(min(states.values(), key=lambda state: state.loss + self._excess(state)))
        if self.clock is not None:
            best, states = self._at_time(best, states)
        return self._finished(best, states, alone)

    def _excess(self, state: _State) -> float:
        """Nothing for a point that costs what was asked; infinite for one that costs more (a rule whose knob is whole cannot do better)."""
        return 0.0 if state.cost <= self.config.fraction + 2 * _EQUAL_COST else math.inf

    def _check_reachable(self) -> None:
        least = self.measure(self.knobs.rules(dict.fromkeys(self.names, FEWEST)))
        cost = least.cost
        if self.clock is not None:
            set_rule(self.model, least.rules)
            cost = self.clock()[0] / (1 + LATENCY_TOLERANCE)
            if cost > self.config.fraction:  # one slow reading is no reason to refuse
                cost = statistics.median(self.clock()[0] for _ in range(READINGS)) / (1 + LATENCY_TOLERANCE)
        if cost > self.config.fraction:
            raise ConfigError(
                f"a budget of {self.config.fraction:g} of the dense model's {self.config.unit} cannot be reached: with every layer at its "
                f"least this model needs {cost:.3g}; ask for more, or convert it to smaller experts or cheaper routers."
            )

    def _alone(self) -> dict[str, dict[float, float]]:
        everything = dict.fromkeys(self.names, 1.0)
        curves = {}
        with self.progress.task("each layer alone", total=len(self.names) * len(GRID)) as task:
            whole = self.measure(self.knobs.rules(everything)).loss
            for name in self.names:
                measured = {1.0: 0.0}
                for fraction in GRID:
                    state = self.measure(self.knobs.rules({**everything, name: fraction}), task)
                    measured[state.active.get(name, 1.0)] = max(state.loss - whole, 0.0)
                curves[name] = measured
        return curves

    def _spread(self, curves: Mapping[str, Sequence[Point]], share: float, full: _State) -> dict[str, float]:
        """`spread` of a budget given as a share of what layers decide."""
        layers = self.prices.total(dict.fromkeys(self.names, 1.0)) - self.prices.base
        return spread(curves, min(share, 1.0) * min(layers, full.cost - self.prices.base))

    def _refined(self, state: _State) -> _State:
        """Passes around the working point."""
        step = _STEP
        with self.progress.task("all layers together", total=2 * len(self.names) * self.config.passes) as task:
            for _ in range(self.config.passes):
                if step < _LEAST_STEP:
                    break
                now = {name: state.active.get(name, 1.0) for name in self.names}
                curves = {name: self._around(state, name, now[name], step, task) for name in self.names}
                goal = sum(self.prices.of.get(name, _free)(f) for name, f in now.items())
                moved = spread(curves, goal)
                better = self._along(state, now, moved)
                if better is None:
                    step /= 2
                else:
                    state = better
        return state

    def _around(self, state: _State, name: str, fraction: float, step: float, task: Task) -> list[Point]:
        changes = {}
        for other in (max(fraction * (1 - step), FEWEST), min(fraction * (1 + step), 1.0)):
            tried = self.measure({**state.rules, **self.knobs.rules({name: other})}, task)
            reached = tried.active.get(name, fraction)
            if abs(reached - fraction) > 1e-6:
                changes[reached] = tried.loss - state.loss
        return around(fraction, changes, self.prices.of.get(name, _free))

    def _along(self, state: _State, now: Mapping[str, float], moved: Mapping[str, float]) -> _State | None:
        """The better of the whole step and half of it, at the budget's cost; None where neither loses less."""
        for share in (1.0, 0.5):
            to = {name: now[name] + share * (moved[name] - now[name]) for name in self.names}
            found = self.at_cost(lambda s, to=to: self.knobs.rules({name: min(s * f, 1.0) for name, f in to.items()}), 1.0)  # type: ignore[misc]
            if found is not None and found[0].loss < state.loss and not self._excess(found[0]):
                return found[0]
        return None

    def _finished(self, state: _State, others: Mapping[str, _State], curves: Curves) -> Allocation:
        return Allocation(
            rules=_configs(state.rules),
            active=dict(state.active),
            active_fraction=state.active_fraction,
            reached=state.cost,
            costs=self.counted.fractions(state.active),
            loss=state.loss,
            compared={k: Alternative(rules=_configs(s.rules), loss=s.loss, reached=s.cost) for k, s in others.items()},
            curves={name: dict(losses) for name, losses in curves.items()},
        )

    # -- time --------------------------------------------------------------------------------------------------------------------------

    def _at_time(self, refined: _State, others: Mapping[str, _State]) -> tuple[_State, dict[str, _State]]:
        """Every candidate at the budget's measured time, and the one of those within the tolerance that loses least; a cost is a measured
        time then."""
        target = self.config.fraction
        candidates = {**others, "refined": refined}
        with self.progress.task("time", total=len(candidates)) as task:
            timed: dict[str, _State] = {}
            for name, state in candidates.items():
                same = next((k for k in timed if candidates[k].rules == state.rules), None)
                timed[name] = self._on_time(state) if same is None else timed[same]
                task.advance(1)
        met = [state for state in timed.values() if self._is_met(state)]
        if not met:
            nearest = min((state.cost for state in timed.values()), key=lambda cost: abs(cost - target))
            raise ConfigError(
                f"a budget of {target:g} of the dense model's latency was not met within {LATENCY_TOLERANCE:.0%}: the nearest is "
                f"{nearest:.3g}; time more inputs or rounds, or let the machine do nothing else."
            )
        return min(met, key=lambda state: state.loss), {name: timed[name] for name in others}

    def _on_time(self, state: _State) -> _State:
        """All fractions scaled by one factor, at which the measured time is that of the budget; or near it, where that was not found."""
        clock, now = self.clock, {name: state.active.get(name, 1.0) for name in self.names}
        assert clock is not None

        def rules(scale: float) -> dict[str, Rule]:
            return self.knobs.rules({name: min(scale * fraction, 1.0) for name, fraction in now.items()})

        def read(scale: float) -> float:
            set_rule(self.model, rules(scale))
            return clock()[0]

        scale, ratio = find_scale(
            read,
            self.config.fraction,
            base=self.prices.base,
            least=min(1.0, FEWEST / max(now.values())),
            most=1 / max(min(now.values()), FEWEST),
            tolerance=LATENCY_TOLERANCE,
        )
        return replace(self.measure(rules(scale)), cost=ratio)

    def _is_met(self, state: _State) -> bool:
        """Whether a measured time is that of the budget; nothing takes longer than everything does."""
        target = self.config.fraction
        return abs(state.cost / target - 1) <= LATENCY_TOLERANCE or (state.cost < target and min(state.active.values()) >= 1)


def _configs(rules: Mapping[str, Rule]) -> dict[str, RuleConfig]:
    return {name: cast(RuleConfig, rule) for name, rule in rules.items()}


def _miss(over: float) -> tuple[bool, float]:
    """How far a cost is from what was asked; what costs more than that is worse than anything that does not."""
    return over > _EQUAL_COST, abs(over)


def _scores(model: nn.Module, layers: Mapping[str, Executor], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Scores of evenly spaced tokens of each layer while the model runs dense; padding is left out."""
    total = sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
    found: dict[str, list[Tensor]] = {}
    batch: Batch = {}

    def tell(name: str, x: Tensor) -> None:
        layer = layers[name]
        side = "decoder_attention_mask" if in_decoder(model, layer.site) else "attention_mask"
        keep_T = token_mask_of(batch.get(side), x.shape[:-1])
        x_TD = x.reshape(-1, x.shape[-1])
        x_TD = x_TD if keep_T is None else x_TD[keep_T.to(x.device).reshape(-1)]
        width = layer.num_experts if isinstance(layer, MoEFFN) else layer.site.d_in
        every = max(1, math.ceil(total / min(_TOKENS, max(1, _SCORES // width))))
        found.setdefault(name, []).append(_layer_scores(layer, x_TD[::every]))

    with hooked(model, tell), dense_run(model):
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    return {name: torch.cat(parts) for name, parts in found.items() if sum(map(len, parts))}


def _layer_scores(layer: Executor, x_TD: Tensor) -> Tensor:
    if isinstance(layer, MoEFFN):
        return layer.scores(x_TD).float().cpu()
    size = x_TD.abs().float()
    ratio_TK = torch.where(layer.level_K > 0, size / layer.level_K, math.inf)
    return ratio_TK.clamp(max=torch.finfo(torch.float32).max).cpu()  # a level of 0 keeps whatever it reads


def _size(layer: Executor) -> float:
    return float(layer.site.d_ff if isinstance(layer, MoEFFN) else layer.site.d_in * layer.site.d_out)


def _metric(model: nn.Module, batch: Batch) -> str:
    try:
        return default_metric(model, batch)
    except ConfigError:  # a head of another task: its hidden states are compared
        return "cosine"


def _scaled(price: Callable[[float], float], scale: float) -> Callable[[float], float]:
    return lambda fraction: scale * price(fraction)


def _free(_fraction: float) -> float:
    return 0.0
