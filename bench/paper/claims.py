"""The paper's qualitative claims as functions of measured numbers: each holds or not, by how much, in one sentence.

A series is a list over seeds of the points (x, y) of a curve; what is compared at a budget x is the mean over the seeds of the values on
the straight line between each seed's two nearest points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from moeify.evaluate import on_line

from .wording import each_in_percent, in_percent, percent, signed, spread, unsigned

Series = Sequence[Sequence[tuple[float, float]]]
"""Points (x, y) of every seed."""
GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))
"""Budgets at which curves are compared: fractions of the dense FLOPs."""
LOWEST = 0.25
"""Budgets up to here are the lowest at which early exits are compared: what is below `MEDIUM`."""
LOW = 0.5
"""Budgets up to here are low: beyond them next to all of what matters runs, whatever the method."""
MEDIUM = (0.3, 0.7)
"""Budgets of the whole model between which early exits are compared."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the numbers say about one claim."""

    claim: str
    """The claim, in a few words."""
    holds: bool | None
    """None where the numbers do not decide: curves that share no budget."""
    sentence: str
    """What was found, with numbers."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What decided, as JSON values."""

    def line(self) -> str:
        """Claim, verdict and sentence in one line."""
        word = {True: "holds", False: "does not hold", None: "cannot be told"}[self.holds]
        return f"{self.claim}: {word}. {self.sentence}"


def values_at(series: Series, x: float) -> list[float] | None:
    """Each seed's value at x; None where a seed's points do not reach it."""
    found = [on_line(points, x) for points in series]
    return None if not found or None in found else [y for y in found if y is not None]


def mean_at(series: Series, x: float) -> float | None:
    """Mean over the seeds at x."""
    values = values_at(series, x)
    return None if values is None else fmean(values)


def shared_budgets(*series: Series, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Budgets of `GRID` in [low, high] that every seed of every series reaches."""
    return [x for x in GRID if low <= x <= high and all(values_at(one, x) is not None for one in series)]


def gains(ours: Series, other: Series, budgets: Sequence[float], *, lower_is_better: bool) -> dict[float, list[float]]:
    """By how much ours is better at each budget: a number for each seed, negative where it is worse. Both have the same seeds in order."""
    sign = 1.0 if lower_is_better else -1.0
    found = {}
    for x in budgets:
        a, b = values_at(ours, x), values_at(other, x)
        assert a is not None and b is not None and len(a) == len(b)
        found[x] = [sign * (theirs - mine) for mine, theirs in zip(a, b, strict=True)]
    return found


def better_everywhere(claim: str, ours: Series, other: Series, *, lower_is_better: bool, low: float = 0.0, high: float = 1.0) -> Verdict:
    """Whether ours is better, in the mean, at every budget that both reach."""
    budgets = shared_budgets(ours, other, low=low, high=high)
    if not budgets:
        return _undecided(claim)
    found = gains(ours, other, budgets, lower_is_better=lower_is_better)
    means = {x: fmean(values) for x, values in found.items()}
    worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    wins = sum(value > 0 for value in means.values())
    clear = sum(means[x] > spread(values) for x, values in found.items())
    seeds = len(found[worst])
    sentence = (
        f"Better at {wins} of {len(budgets)} budgets from {percent(budgets[0])} to {percent(budgets[-1])}"
        + (f", at {clear} by more than the seeds' deviation" if seeds > 1 else "")
        + f"; the largest gain {signed(found[best])} at {percent(best)}, the smallest {signed(found[worst])} at {percent(worst)}."
    )
    numbers = {"gain": {f"{x:g}": value for x, value in means.items()}, "least": means[worst], "spread": spread(found[worst])}
    return Verdict(claim=claim, holds=wins == len(budgets), sentence=sentence, numbers=numbers)


def cheapest_within(series: Series, level: float) -> float | None:
    """The least x of the mean curve from which on it stays at ``level`` or above; None if its dearest point is below.

    Between budgets of a fine grid the mean curve is a straight line; the crossing is on it.
    """
    low = max(min(x for x, _ in points) for points in series)
    high = min(max(x for x, _ in points) for points in series)
    places = [low + (high - low) * i / 200 for i in range(201)]
    curve = [(x, mean) for x in places if (mean := mean_at(series, x)) is not None]
    if not curve or curve[-1][1] < level:
        return None
    for (x0, y0), (x1, y1) in reversed(list(zip(curve, curve[1:], strict=False))):
        if y0 < level:
            return x1 if y1 == y0 else x0 + (level - y0) / (y1 - y0) * (x1 - x0)
    return curve[0][0]


def keeps_quality_at_half(ours: Series, other: Series, *, dense: Sequence[float], tolerance: float = 0.01, share: float = 0.5) -> Verdict:
    """Whether ours stays within ``tolerance`` of dense down to ``share`` of the cost at which the other does (higher is better)."""
    claim = f"within {100 * tolerance:g} point of dense at half the FLOPs at which MoEfication is"
    level = fmean(dense) - tolerance
    mine, theirs = cheapest_within(ours, level), cheapest_within(other, level)
    by_seed = [_each_cheapest_within(series, dense, tolerance) for series in (ours, other)]
    numbers = {"level": level, "ours": mine, "other": theirs, "ours_by_seed": by_seed[0], "other_by_seed": by_seed[1]}
    seeds = " By seed {} and {}.".format(*(each_in_percent(costs) for costs in by_seed)) if len(dense) > 1 else ""
    if mine is None:
        top = fmean(y for points in ours for _, y in [max(points)])
        return Verdict(
            claim=claim,
            holds=False,
            sentence=f"The full method never is: {top:.4f} with everything on, dense {fmean(dense):.4f}.{seeds}",
            numbers=numbers,
        )
    if theirs is None:
        return Verdict(
            claim=claim,
            holds=True,
            sentence=f"The full method is from {percent(mine)} of the FLOPs on; MoEfication never is.{seeds}",
            numbers=numbers,
        )
    sentence = f"From {percent(mine)} of the dense FLOPs on, MoEfication from {percent(theirs)} on: {mine / theirs:.2f} of its cost.{seeds}"
    return Verdict(claim=claim, holds=mine <= share * theirs, sentence=sentence, numbers={**numbers, "ratio": mine / theirs})


def saves(series: Series, *, dense: Sequence[float], tolerance: float = 0.01, claimed: float = 0.6) -> Verdict:
    """Whether ``claimed`` of the whole model's FLOPs can be left out with no more than ``tolerance`` lost (higher is better)."""
    claim = f"{percent(claimed)} of the FLOPs are saved without a significant drop"
    cost = cheapest_within(series, fmean(dense) - tolerance)
    by_seed = _each_cheapest_within(series, dense, tolerance)
    found = "Nothing" if cost is None else percent(1 - cost)
    seeds = f"; from these shares of the FLOPs on by seed: {each_in_percent(by_seed)}" if len(dense) > 1 else ""
    return Verdict(
        claim=claim,
        holds=cost is not None and 1 - cost >= claimed,
        sentence=f"{found} with at most {100 * tolerance:g} point lost against dense{seeds}.",
        numbers={"cost": cost, "by_seed": by_seed},
    )


def each_step_better(steps: Mapping[str, Series], *, lower_is_better: bool) -> Verdict:
    """Whether every curve is better, in the mean over the budgets that it shares with the one before it, than that one."""
    claim = "every step of the method improves on the one before"
    found: dict[str, list[float]] = {}
    names = list(steps)
    for before, after in zip(names, names[1:], strict=False):
        budgets = shared_budgets(steps[before], steps[after])
        if not budgets:
            return _undecided(claim)
        found[after] = _mean_gains(steps[after], steps[before], budgets, lower_is_better=lower_is_better)
    means = {name: fmean(values) for name, values in found.items()}
    listed = ", ".join(f"{name} {signed(values)}" for name, values in found.items())
    better = sum(value > 0 for value in means.values())
    sentence = f"{better} of {len(means)} steps do; mean gain over the budgets that a step shares with the one before: {listed}."
    return Verdict(claim=claim, holds=better == len(means), sentence=sentence, numbers=means)


def lower_floor(with_projections: Series, without: Series, *, dense: Sequence[float], tolerance: float = 0.01) -> Verdict:
    """Whether replaced projections keep the quality at costs at which FFN-only conversion does not (higher is better).

    The cheapest points that were measured, at any quality, are numbers beside: that more can be left out where more is converted is no
    finding.
    """
    claim = f"projections lower the cost from which on FFN-only conversion stays within {100 * tolerance:g} point of dense"
    level = fmean(dense) - tolerance
    numbers: dict[str, Any] = {}
    told = []
    for name, series in (("with", with_projections), ("without", without)):
        cost, by_seed = cheapest_within(series, level), _each_cheapest_within(series, dense, tolerance)
        floor = [min(points) for points in series]
        numbers |= {name: cost, f"{name}_by_seed": by_seed}
        numbers |= {f"{name}_floor": fmean(x for x, _ in floor), f"{name}_floor_quality": fmean(y for _, y in floor)}
        seeds = f" (by seed {each_in_percent(by_seed)})" if len(dense) > 1 else ""
        reached = "never is" if cost is None else f"is from {percent(cost)} of the dense FLOPs on"
        told.append(
            f"The model {name} them {reached}{seeds}; its cheapest point, at {in_percent([x for x, _ in floor])}, keeps"
            f" {unsigned([y for _, y in floor])}."
        )
    mine, theirs = numbers["with"], numbers["without"]
    return Verdict(
        claim=claim,
        holds=None if mine is None and theirs is None else mine is not None and (theirs is None or mine < theirs),
        sentence=" ".join(told),
        numbers=numbers,
    )


def projections_keep_quality(trained: Sequence[float], *, dense: Sequence[float], tolerance: float = 0.005) -> Verdict:
    """Whether models with replaced projections, trained and not converted, are at most ``tolerance`` below dense (higher is better)."""
    gaps = _less(trained, dense)
    seeds = f", by seed {', '.join(f'{gap:+.4f}' for gap in gaps)}" if len(gaps) > 1 else ""
    return Verdict(
        claim=f"replaced projections, trained and before conversion, are within {100 * tolerance:g} points of dense (an aim of this suite)",
        holds=fmean(gaps) >= -tolerance,
        sentence=f"{signed(gaps)} against dense{seeds}; after distillation and training under the penalty, not after distillation alone.",
        numbers={"gap": fmean(gaps), "by_seed": gaps},
    )


def best_only_at_the_lowest(ztw: Series, ours: Series) -> list[Verdict]:
    """Whether early exit is above the full method at every one of the lowest budgets, and at no medium one (higher is better)."""
    lowest = better_everywhere("early exit is best at the lowest budgets", ztw, ours, lower_is_better=False, high=LOWEST)
    medium = better_everywhere("early exit is worse at medium budgets", ours, ztw, lower_is_better=False, low=MEDIUM[0], high=MEDIUM[1])
    return [lowest, medium]


def sparsified_gelu_is_like_relu(curves: Mapping[str, Series]) -> list[Verdict]:
    """Of the losses of "relu", "relu_hoyer", "gelu", "gelu_hoyer": the paper's three remarks on them."""
    low = shared_budgets(*curves.values(), high=LOW)
    claims = (
        "sparsified GELU is about as good as sparsified ReLU",
        "GELU without enforcement falls off first",
        "ReLU gains less by enforcement than GELU",
    )
    if not low:
        return [_undecided(claim) for claim in claims]
    by_seed = {name: _means(series, low) for name, series in curves.items()}
    mean = {name: fmean(values) for name, values in by_seed.items()}
    apart, gelu_gains, relu_gains = (
        _less(by_seed[a], by_seed[b]) for a, b in (("gelu_hoyer", "relu_hoyer"), ("gelu", "gelu_hoyer"), ("relu", "relu_hoyer"))
    )
    gelu_gain, relu_gain = fmean(gelu_gains), fmean(relu_gains)
    where = f"Mean loss at {percent(low[0])} to {percent(low[-1])} of the FLOPs"
    listed = ", ".join(f"{name} {unsigned(values)}" for name, values in by_seed.items())
    worst = max(mean, key=mean.__getitem__)
    return [
        Verdict(
            claim=claims[0],
            holds=abs(fmean(apart)) < 0.25 * abs(gelu_gain),
            sentence=f"{where}: GELU's is {signed(apart)} higher, where enforcement brings GELU {signed(gelu_gains)} (alike: less than a"
            " quarter of that).",
            numbers=mean,
        ),
        Verdict(claim=claims[1], holds=worst == "gelu", sentence=f"{where}: {listed}.", numbers=mean),
        Verdict(
            claim=claims[2],
            holds=relu_gain < gelu_gain,
            sentence=f"{where}: enforcement brings ReLU {signed(relu_gains)}, GELU {signed(gelu_gains)}.",
            numbers={"relu": relu_gain, "gelu": gelu_gain},
        ),
    ]


def smaller_experts_are_better(sizes: Mapping[int, Series], *, accounting: str) -> list[Verdict]:
    """Of the losses by expert size: whether smaller ones are better, but for size 1, with FLOPs counted in the way that is named."""
    claims = (f"smaller experts are better ({accounting})", f"experts of one neuron are worse than larger ones ({accounting})")
    ordered = {size: sizes[size] for size in sorted(sizes)}
    low = shared_budgets(*ordered.values(), high=LOW)
    if not low:
        return [_undecided(claim) for claim in claims]
    by_seed = {size: _means(series, low) for size, series in ordered.items()}
    mean = {size: fmean(values) for size, values in by_seed.items()}
    larger = [size for size in mean if size > 1]
    pairs = list(zip(larger, larger[1:], strict=False))
    right = sum(mean[small] < mean[large] for small, large in pairs)
    where = f"Mean loss at {percent(low[0])} to {percent(low[-1])} of the FLOPs"
    listed = ", ".join(f"{size}: {unsigned(values)}" for size, values in by_seed.items())
    numbers = {str(size): value for size, value in mean.items()}
    verdicts = [
        Verdict(
            claim=claims[0],
            holds=right == len(pairs),
            sentence=f"{where} by size {listed}; {right} of {len(pairs)} neighbours in order.",
            numbers=numbers,
        )
    ]
    if 1 in mean and larger:
        best = min(larger, key=mean.__getitem__)
        gaps = _less(by_seed[1], by_seed[best])
        verdicts.append(
            Verdict(
                claim=claims[1],
                holds=fmean(gaps) > 0,
                sentence=f"{where}: size 1 is {signed(gaps)} higher than the best larger size, {best}.",
                numbers={"gap": fmean(gaps)},
            )
        )
    return verdicts


def sparser_bases_are_better(sadmoe: Mapping[float, Series], moefication: Mapping[float, Series]) -> list[Verdict]:
    """Of the losses by weight of the penalty, of both methods: whether more enforcement helps both, and ours is better at each weight."""
    weights = sorted(sadmoe)
    assert weights == sorted(moefication)
    verdicts = []
    for name, curves in (("SADMoE", sadmoe), ("MoEfication", moefication)):
        claim = f"a sparser base model is better for {name}"
        low = shared_budgets(*curves.values(), high=LOW)
        if not low:
            verdicts.append(_undecided(claim))
            continue
        by_seed = {weight: _means(curves[weight], low) for weight in weights}
        mean = {weight: fmean(values) for weight, values in by_seed.items()}
        falls = sum(mean[b] < mean[a] for a, b in zip(weights, weights[1:], strict=False))
        listed = ", ".join(f"{weight:g}: {unsigned(values)}" for weight, values in by_seed.items())
        sentence = f"Mean loss at {percent(low[0])} to {percent(low[-1])} of the FLOPs by weight {listed}."
        verdicts.append(
            Verdict(claim=claim, holds=falls == len(weights) - 1, sentence=sentence, numbers={f"{w:g}": v for w, v in mean.items()})
        )
    claim = "SADMoE is better than MoEfication at every weight"
    found = {}
    for weight in weights:
        budgets = shared_budgets(sadmoe[weight], moefication[weight], high=LOW)
        if not budgets:
            return [*verdicts, _undecided(claim)]
        found[weight] = _mean_gains(sadmoe[weight], moefication[weight], budgets, lower_is_better=True)
    listed = ", ".join(f"{weight:g}: {signed(values)}" for weight, values in found.items())
    verdicts.append(
        Verdict(
            claim=claim,
            holds=all(fmean(values) > 0 for values in found.values()),
            sentence=f"Mean gain over shared budgets up to {percent(LOW)} of the FLOPs by weight {listed}.",
            numbers={f"{w:g}": fmean(values) for w, values in found.items()},
        )
    )
    return verdicts


def pays_unless_all_run(break_even: Mapping[int, float], *, width: int, needed: float = 0.85) -> Verdict:
    """Of the executed share at which a converted FFN costs what the dense one does, by router width: near 1 at the published width."""
    listed = ", ".join(f"{w}: {percent(share)}" for w, share in break_even.items())
    return Verdict(
        claim="a converted FFN is cheaper unless nearly all experts run",
        holds=break_even[width] >= needed,
        sentence="With experts of one neuron, the dearest case, it breaks even by router width at"
        f" {listed}; the published width is {width}, and {percent(needed)} is taken for nearly all.",
        numbers={str(w): share for w, share in break_even.items()},
    )


def _mean_gains(ours: Series, other: Series, budgets: Sequence[float], *, lower_is_better: bool) -> list[float]:
    """Mean gain over the budgets, by seed."""
    found = gains(ours, other, budgets, lower_is_better=lower_is_better)
    return [fmean(values) for values in zip(*found.values(), strict=True)]


def _means(series: Series, budgets: Sequence[float]) -> list[float]:
    """Mean value over budgets that every seed reaches, by seed."""
    return [fmean(values) for values in zip(*(values_at(series, x) or [] for x in budgets), strict=True)]


def _less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Differences by seed."""
    return [a - b for a, b in zip(one, other, strict=True)]


def _undecided(claim: str) -> Verdict:
    return Verdict(claim=claim, holds=None, sentence="The curves share no budget.")


def _each_cheapest_within(series: Series, dense: Sequence[float], tolerance: float) -> list[float | None]:
    """`cheapest_within` of every seed by itself, against its own dense model."""
    return [cheapest_within([points], start - tolerance) for points, start in zip(series, dense, strict=True)]
