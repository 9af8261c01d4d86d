"""The paper's qualitative claims as functions of measured numbers: each holds or not, by how much, in one sentence.

A series is a list over seeds of the points (x, y) of a curve; what is compared at a budget x is the mean over the seeds of the values on
the straight line between each seed's two nearest points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from moeify.evaluate import on_line

Series = Sequence[Sequence[tuple[float, float]]]
"""Points (x, y) of every seed."""
GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))
"""Budgets at which curves are compared: fractions of the dense FLOPs."""
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


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


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
        f"Better at {wins} of {len(budgets)} budgets from {_percent(budgets[0])} to {_percent(budgets[-1])}"
        + (f", at {clear} by more than the seeds' deviation" if seeds > 1 else "")
        + f"; the largest gain {_signed(found[best])} at {_percent(best)}, the smallest {_signed(found[worst])} at {_percent(worst)}."
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
    by_seed = [
        [cheapest_within([points], start - tolerance) for points, start in zip(series, dense, strict=True)] for series in (ours, other)
    ]
    numbers = {"level": level, "ours": mine, "other": theirs, "ours_by_seed": by_seed[0], "other_by_seed": by_seed[1]}
    seeds = " By seed {} and {}.".format(*(_listed(costs) for costs in by_seed)) if len(dense) > 1 else ""
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
            sentence=f"The full method is from {_percent(mine)} of the FLOPs on; MoEfication never is.{seeds}",
            numbers=numbers,
        )
    sentence = (
        f"From {_percent(mine)} of the dense FLOPs on, MoEfication from {_percent(theirs)} on: {mine / theirs:.2f} of its cost.{seeds}"
    )
    return Verdict(claim=claim, holds=mine <= share * theirs, sentence=sentence, numbers={**numbers, "ratio": mine / theirs})


def saves(series: Series, *, dense: Sequence[float], tolerance: float = 0.01, claimed: float = 0.6) -> Verdict:
    """Whether ``claimed`` of the whole model's FLOPs can be left out with no more than ``tolerance`` lost (higher is better)."""
    claim = f"{_percent(claimed)} of the FLOPs are saved without a significant drop"
    cost = cheapest_within(series, fmean(dense) - tolerance)
    by_seed = [cheapest_within([points], start - tolerance) for points, start in zip(series, dense, strict=True)]
    found = "Nothing" if cost is None else _percent(1 - cost)
    seeds = f"; from these shares of the FLOPs on by seed: {_listed(by_seed)}" if len(dense) > 1 else ""
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
    listed = ", ".join(f"{name} {_signed(values)}" for name, values in found.items())
    better = sum(value > 0 for value in means.values())
    sentence = f"{better} of {len(means)} steps do; mean gain over the budgets that a step shares with the one before: {listed}."
    return Verdict(claim=claim, holds=better == len(means), sentence=sentence, numbers=means)


def lower_floor(with_projections: Series, without: Series) -> Verdict:
    """Whether replaced projections reach costs that FFNs alone cannot reach."""
    claim = "projections lower the floor of FFN-only conversion"
    lows = [[min(x for x, _ in points) for points in series] for series in (with_projections, without)]
    low, floor = map(fmean, lows)
    sentence = f"Cheapest point at {_shares(lows[0])} of the dense FLOPs with them, {_shares(lows[1])} without."
    return Verdict(claim=claim, holds=low < floor, sentence=sentence, numbers={"with": low, "without": floor})


def best_only_at_the_lowest(ztw: Series, ours: Series) -> Verdict:
    """Whether early exit is above the full method at no medium budget (higher is better)."""
    claim = "early exit is worse at medium budgets"
    return better_everywhere(claim, ours, ztw, lower_is_better=False, low=MEDIUM[0], high=MEDIUM[1])


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
    where = f"Mean loss at {_percent(low[0])} to {_percent(low[-1])} of the FLOPs"
    listed = ", ".join(f"{name} {_level(values)}" for name, values in by_seed.items())
    worst = max(mean, key=mean.__getitem__)
    return [
        Verdict(
            claim=claims[0],
            holds=abs(fmean(apart)) < 0.25 * abs(gelu_gain),
            sentence=f"{where}: GELU's is {_signed(apart)} higher, where enforcement brings GELU {_signed(gelu_gains)} (alike: less than a"
            " quarter of that).",
            numbers=mean,
        ),
        Verdict(claim=claims[1], holds=worst == "gelu", sentence=f"{where}: {listed}.", numbers=mean),
        Verdict(
            claim=claims[2],
            holds=relu_gain < gelu_gain,
            sentence=f"{where}: enforcement brings ReLU {_signed(relu_gains)}, GELU {_signed(gelu_gains)}.",
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
    where = f"Mean loss at {_percent(low[0])} to {_percent(low[-1])} of the FLOPs"
    listed = ", ".join(f"{size}: {_level(values)}" for size, values in by_seed.items())
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
                sentence=f"{where}: size 1 is {_signed(gaps)} higher than the best larger size, {best}.",
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
        listed = ", ".join(f"{weight:g}: {_level(values)}" for weight, values in by_seed.items())
        sentence = f"Mean loss at {_percent(low[0])} to {_percent(low[-1])} of the FLOPs by weight {listed}."
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
    listed = ", ".join(f"{weight:g}: {_signed(values)}" for weight, values in found.items())
    verdicts.append(
        Verdict(
            claim=claim,
            holds=all(fmean(values) > 0 for values in found.values()),
            sentence=f"Mean gain over shared budgets up to {_percent(LOW)} of the FLOPs by weight {listed}.",
            numbers={f"{w:g}": fmean(values) for w, values in found.items()},
        )
    )
    return verdicts


def fewer_but_more_varied(
    plain: Sequence[Sequence[tuple[float, float]]], sparsified: Sequence[Sequence[tuple[float, float]]]
) -> list[Verdict]:
    """Of (mean, standard deviation) of the non-zeros of a token by seed and layer: far fewer with enforcement, relatively more spread."""
    models = (plain, sparsified)
    shares = [[fmean(mean for mean, _ in layers) for layers in model] for model in models]
    varied = [[fmean(deviation / mean if mean else 0.0 for mean, deviation in layers) for layers in model] for model in models]
    means, relative = [fmean(model) for model in shares], [fmean(model) for model in varied]
    return [
        Verdict(
            claim="enforcement leaves far fewer non-zero activations",
            holds=means[1] < 0.5 * means[0],
            sentence=f"{_shares(shares[0])} of the neurons on a token without, {_shares(shares[1])} with it:"
            f" {means[0] / max(means[1], 1e-12):.1f} times fewer (far: twice).",
            numbers={"plain": means[0], "sparsified": means[1]},
        ),
        Verdict(
            claim="their number varies more from token to token, relatively",
            holds=relative[1] > relative[0],
            sentence=f"Deviation over mean, a layer: {_level(varied[0])} without, {_level(varied[1])} with it.",
            numbers={"plain": relative[0], "sparsified": relative[1]},
        ),
    ]


def fewer_executed_experts(
    base: Mapping[str, Sequence[Sequence[float]]], sparsified: Mapping[str, Sequence[Sequence[float]]]
) -> list[Verdict]:
    """Of the mean executed share by setting, seed and layer: the sparsified model runs fewer experts at equal tau, deep layers run more."""
    by_seed = {tau: [_by_seed(model[tau]) for model in (base, sparsified)] for tau in base}
    fractions = {tau: tuple(map(fmean, pair)) for tau, pair in by_seed.items()}
    listed = ", ".join(f"{tau}: {_shares(b)} and {_shares(s)}" for tau, (b, s) in by_seed.items())
    correlations = {tau: [rank_correlation(layers) for layers in sparsified[tau]] for tau in sparsified}
    rises = {tau: fmean(values) for tau, values in correlations.items()}
    risen = ", ".join(f"{tau}: {_signed(values, digits=2)}" for tau, values in correlations.items())
    return [
        Verdict(
            claim="the sparsified model executes fewer experts at equal tau",
            holds=all(s < b for b, s in fractions.values()),
            sentence=f"Executed without and with enforcement at {listed}.",
            numbers={tau: list(pair) for tau, pair in fractions.items()},
        ),
        Verdict(
            claim="deeper layers execute more",
            holds=all(value > 0 for value in rises.values()),
            sentence=f"Rank correlation of depth and executed share, with enforcement, at {risen}.",
            numbers=rises,
        ),
    ]


def never_all_experts(full: Mapping[str, Sequence[float]]) -> Verdict:
    """Of the share of tokens that run all experts of a layer, in the mean over layers, by setting and seed: nowhere any."""
    listed = ", ".join(f"{tau}: {_shares(shares)}" for tau, shares in full.items())
    return Verdict(
        claim="the sparsified model never runs all experts",
        holds=all(share == 0 for shares in full.values() for share in shares),
        sentence=f"99 % of the experts of a layer or more are run by these shares of the tokens, at {listed}.",
        numbers={tau: fmean(shares) for tau, shares in full.items()},
    )


def projections_are_less_sparse(
    projection: Mapping[str, Sequence[Sequence[float]]], ffn: Mapping[str, Sequence[Sequence[float]]], *, name: str
) -> Verdict:
    """Of the mean executed share by setting, seed and layer: the replaced projection runs a larger share than the FFNs at equal tau."""
    by_seed = {tau: [_by_seed(one[tau]) for one in (projection, ffn)] for tau in projection}
    pairs = {tau: tuple(map(fmean, pair)) for tau, pair in by_seed.items()}
    listed = ", ".join(f"{tau}: {_shares(p)} and {_shares(f)}" for tau, (p, f) in by_seed.items())
    return Verdict(
        claim=f"the {name} projections are less sparse than the FFNs",
        holds=all(p > f for p, f in pairs.values()),
        sentence=f"Executed of projections and FFNs at {listed}.",
        numbers={tau: list(pair) for tau, pair in pairs.items()},
    )


def pays_unless_all_run(break_even: Mapping[int, float], *, width: int, needed: float = 0.85) -> Verdict:
    """Of the executed share at which a converted FFN costs what the dense one does, by router width: near 1 at the published width."""
    listed = ", ".join(f"{w}: {_percent(share)}" for w, share in break_even.items())
    return Verdict(
        claim="a converted FFN is cheaper unless nearly all experts run",
        holds=break_even[width] >= needed,
        sentence="With experts of one neuron, the dearest case, it breaks even by router width at"
        f" {listed}; the published width is {width}, and {_percent(needed)} is taken for nearly all.",
        numbers={str(w): share for w, share in break_even.items()},
    )


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their positions, in [-1, 1]; ties share their mean rank; 0 where all are equal."""
    ranks = [fmean(i for i, other in enumerate(sorted(values)) if other == value) for value in values]
    centre = (len(values) - 1) / 2
    top = sum((i - centre) * (rank - centre) for i, rank in enumerate(ranks))
    bottom = math.sqrt(sum((i - centre) ** 2 for i in range(len(values))) * sum((rank - centre) ** 2 for rank in ranks))
    return top / bottom if bottom else 0.0


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


def _by_seed(layers: Sequence[Sequence[float]]) -> list[float]:
    """Means over layers, by seed."""
    return [fmean(shares) for shares in layers]


def _signed(values: Sequence[float], *, digits: int = 4) -> str:
    """Mean and standard deviation over the seeds; of a single one no deviation is known."""
    return f"{fmean(values):+.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")


def _level(values: Sequence[float]) -> str:
    return _signed(values)[1:]  # of what is never negative


def _shares(values: Sequence[float]) -> str:
    """The same in percent."""
    return f"{100 * fmean(values):.3g}" + (f" ± {100 * spread(values):.2g}" if len(values) > 1 else "") + " %"


def _listed(costs: Sequence[float | None]) -> str:
    return ", ".join("never" if cost is None else _percent(cost) for cost in costs)


def _undecided(claim: str) -> Verdict:
    return Verdict(claim=claim, holds=None, sentence="The curves share no budget.")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
