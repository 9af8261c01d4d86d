"""Claims of how tokens spread over shares of neurons that are not zero, or executed (figures 3, 11 and 15 to 18).

A distribution is a `moeify.evaluate.Distribution` as JSON.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .claims import Verdict
from .draw import bins_merged
from .wording import in_percent, signed, unsigned

Executed = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""Distributions of executed shares by setting, seed and layer."""
SIDE = 0.1
"""A peak of a bimodal distribution has at least this share of the tokens on its side of the valley."""
VALLEY = 0.5
"""The valley is at most this share of the lower peak."""


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
            sentence=f"{in_percent(shares[0])} of the neurons on a token without, {in_percent(shares[1])} with it:"
            f" {means[0] / max(means[1], 1e-12):.1f} times fewer (far: twice).",
            numbers={"plain": means[0], "sparsified": means[1]},
        ),
        Verdict(
            claim="their number varies more from token to token, relatively",
            holds=relative[1] > relative[0],
            sentence=f"Deviation over mean, a layer: {unsigned(varied[0])} without, {unsigned(varied[1])} with it.",
            numbers={"plain": relative[0], "sparsified": relative[1]},
        ),
    ]


def fewer_executed_experts(
    base: Mapping[str, Sequence[Sequence[float]]], sparsified: Mapping[str, Sequence[Sequence[float]]]
) -> list[Verdict]:
    """Of the mean executed share by setting, seed and layer: the sparsified model runs fewer experts at equal tau, deep layers run more."""
    by_seed = {tau: [_layers_mean(model[tau]) for model in (base, sparsified)] for tau in base}
    fractions = {tau: tuple(map(fmean, pair)) for tau, pair in by_seed.items()}
    listed = ", ".join(f"{tau}: {in_percent(b)} and {in_percent(s)}" for tau, (b, s) in by_seed.items())
    correlations = {tau: [rank_correlation(layers) for layers in sparsified[tau]] for tau in sparsified}
    rises = {tau: fmean(values) for tau, values in correlations.items()}
    risen = ", ".join(f"{tau}: {signed(values, digits=2)}" for tau, values in correlations.items())
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
    listed = ", ".join(f"{tau}: {in_percent(shares)}" for tau, shares in full.items())
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
    by_seed = {tau: [_layers_mean(one[tau]) for one in (projection, ffn)] for tau in projection}
    pairs = {tau: tuple(map(fmean, pair)) for tau, pair in by_seed.items()}
    listed = ", ".join(f"{tau}: {in_percent(p)} and {in_percent(f)}" for tau, (p, f) in by_seed.items())
    return Verdict(
        claim=f"the {name} projections are less sparse than the FFNs",
        holds=all(p > f for p, f in pairs.values()),
        sentence=f"Executed of projections and FFNs at {listed}.",
        numbers={tau: list(pair) for tau, pair in pairs.items()},
    )


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their positions, in [-1, 1]; ties share their mean rank; 0 where all are equal."""
    ranks = [fmean(i for i, other in enumerate(sorted(values)) if other == value) for value in values]
    centre = (len(values) - 1) / 2
    top = sum((i - centre) * (rank - centre) for i, rank in enumerate(ranks))
    bottom = math.sqrt(sum((i - centre) ** 2 for i in range(len(values))) * sum((rank - centre) ** 2 for rank in ranks))
    return top / bottom if bottom else 0.0


def projections_vary_more(
    projection: Mapping[str, Sequence[Sequence[float]]], ffn: Mapping[str, Sequence[Sequence[float]]], *, name: str
) -> Verdict:
    """Of the standard deviation over tokens of the executed share, by setting, seed and layer: whether a replaced projection has a larger
    one than the FFNs at equal tau."""
    found = {tau: [_layers_mean(one[tau]) for one in (projection, ffn)] for tau in projection}
    pairs = {tau: tuple(map(fmean, pair)) for tau, pair in found.items()}
    listed = ", ".join(f"{tau}: {in_percent(p)} and {in_percent(f)}" for tau, (p, f) in found.items())
    return Verdict(
        claim=f"the executed share of the {name} projections varies more from token to token than that of the FFNs",
        holds=all(p > f for p, f in pairs.values()),
        sentence=f"Standard deviation over tokens, a layer, of projections and FFNs at {listed}.",
        numbers={tau: list(pair) for tau, pair in pairs.items()},
    )


def some_are_bimodal(projection: Executed, *, name: str) -> Verdict:
    """Whether a layer's executed share has two peaks at some tau, in every seed."""
    found = {
        tau: [
            place
            for place, seeds in enumerate(zip(*by_seed, strict=True), start=1)
            if all(is_bimodal(layer["histogram"], num_values=layer["num_values"]) for layer in seeds)
        ]
        for tau, by_seed in projection.items()
    }
    listed = ", ".join(f"{tau}: {', '.join(map(str, layers)) or 'none'}" for tau, layers in found.items())
    return Verdict(
        claim=f"some layers' {name} projections are bimodal",
        holds=any(found.values()),
        sentence=f"Layers with two peaks in every seed at {listed} (each peak twice as high as the valley between or higher, a tenth of the"
        " tokens or more on its side).",
        numbers=found,
    )


def one_pair_is_alike(distances: Mapping[str, Mapping[str, Sequence[float]]] | None) -> Verdict:
    """Of the distances between "q and k" and between "v and o" by setting and seed (`distance`): whether the first are the smaller ones."""
    claim = "q and k are more alike than v and o"
    if distances is None:
        return Verdict(claim=claim, holds=None, sentence="Not measured: this figure's file is older than its question.")
    by_seed = {tau: (distances["q and k"][tau], distances["v and o"][tau]) for tau in distances["q and k"]}
    pairs = {tau: tuple(map(fmean, pair)) for tau, pair in by_seed.items()}
    listed = ", ".join(f"{tau}: {in_percent(first)} and {in_percent(second)}" for tau, (first, second) in by_seed.items())
    return Verdict(
        claim=claim,
        holds=all(first < second for first, second in pairs.values()),
        sentence=f"Mean difference of the executed shares of tokens of equal rank, q and k, and v and o, at {listed}.",
        numbers={tau: list(pair) for tau, pair in pairs.items()},
    )


def is_bimodal(histogram: Sequence[int], *, num_values: int) -> bool:
    """Whether a histogram of executed shares has two peaks: bins with a valley between them of at most `VALLEY` of the lower one, and
    `SIDE` of the tokens or more on either side of it.

    Args:
        histogram: tokens in bins of equal width.
        num_values: shares that can be; bins are merged until each holds some of them, or bins without any would be valleys.
    """
    merge = bins_merged(len(histogram), num_values)
    counts = [sum(histogram[i : i + merge]) for i in range(0, len(histogram), merge)]
    tokens = sum(counts)
    for valley in range(1, len(counts) - 1):
        left, right = counts[:valley], counts[valley + 1 :]
        if min(sum(left), sum(right)) >= SIDE * tokens and counts[valley] <= VALLEY * min(max(left), max(right)):
            return True
    return False


def _layers_mean(layers: Sequence[Sequence[float]]) -> list[float]:
    """Means over layers, by seed."""
    return [fmean(shares) for shares in layers]
