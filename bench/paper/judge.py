"""What the paper claims of each figure, asked of the figure's numbers: verdicts follow from these alone.

Files from before a number was stored say "not measured" where it decides.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from . import claims, distributions
from .claims import Series, Verdict
from .measure import is_measured, series
from .recipes import WEIGHTS

Data = Mapping[str, Any]
"""A figure's "data"."""
Curves = dict[str, Series]
"""By name."""


def figure_3(data: Data) -> list[Verdict]:
    """Non-zero activations."""
    found = {
        name: [[(layer["mean"], layer["deviation"]) for layer in seed.values()] for seed in one["seeds"]]
        for name, one in data["models"].items()
    }
    return distributions.fewer_but_more_varied(found["relu"], found["sadmoe"])


def figure_5(data: Data) -> list[Verdict]:
    """SADMoE and MoEfication of a GPT."""
    claim = "SADMoE's loss is below MoEfication's at every budget"
    return _both_ways(data, "all", lambda c: [claims.better_everywhere(claim, c["sadmoe"], c["baseline"], lower_is_better=True)])


def figure_6(data: Data) -> list[Verdict]:
    """All methods on BERT."""
    dense = data["dense"]

    def judge(curves: Curves) -> list[Verdict]:
        return [
            claims.keeps_quality_at_half(curves["full"], curves["baseline"], dense=dense),
            claims.lower_floor(curves["full"], curves["sadmoe"], dense=dense),
            *claims.best_only_at_the_lowest(curves["ztw"], curves["full"]),
            claims.saves(curves["full"], dense=dense),
        ]

    return [*_both_ways(data, "all", judge), _trained_projections(data)]


def figure_7(data: Data) -> list[Verdict]:
    """The same of a ViT."""
    dense, (low, high) = data["dense"], claims.MEDIUM

    def judge(curves: Curves) -> list[Verdict]:
        above = partial(claims.better_everywhere, lower_is_better=False, low=low, high=high)
        return [
            above("SADMoE is above MoEfication at medium budgets", curves["full"], curves["baseline"]),
            above("SADMoE is above ZTW at medium budgets", curves["full"], curves["ztw"]),
            claims.saves(curves["full"], dense=dense),
        ]

    return [*_both_ways(data, "all", judge), _trained_projections(data)]


def figure_8(data: Data) -> list[Verdict]:
    """The ablation; curves are its steps in their order."""
    dense, labels = data["dense"], {name: curve["label"] for name, curve in data["curves"].items()}

    def judge(curves: Curves) -> list[Verdict]:
        return [
            claims.each_step_better({labels[name]: one for name, one in curves.items()}, lower_is_better=False),
            claims.lower_floor(curves["full"], curves["sadmoe"], dense=dense),
            claims.keeps_quality_at_half(curves["full"], curves["baseline"], dense=dense),
        ]

    return _both_ways(data, "all", judge)


def figure_9(data: Data) -> list[Verdict]:
    """ReLU and GELU."""
    return _both_ways(data, "ffn", claims.sparsified_gelu_is_like_relu)


def sizes(data: Data) -> list[Verdict]:
    """Figures 10 and 13. Here the paper's claim depends on how FLOPs are counted, so that either way has verdicts of its own."""
    ours, authors = (
        claims.smaller_experts_are_better({_size_of(name): one for name, one in _curves(data, axis).items()}, accounting=accounting)
        for axis, accounting in (("ffn", "our accounting"), ("authors_ffn", "the authors' accounting"))
    )
    return [*ours, *(_told_apart(*pair) for pair in zip(ours, authors, strict=True))]


def figure_11(data: Data) -> list[Verdict]:
    """Executed experts of FFNs."""
    found = {name: _numbers(_executed(one), "mean") for name, one in data["models"].items()}
    everything = {  # the last bin of the histograms
        tau: [fmean(layer["histogram"][-1] / layer["tokens"] for layer in seed[tau].values()) for seed in data["models"]["sadmoe"]["seeds"]]
        for tau in data["models"]["sadmoe"]["seeds"][0]
    }
    return [*distributions.fewer_executed_experts(found["relu"], found["sadmoe"]), distributions.never_all_experts(everything)]


def figure_12(data: Data) -> list[Verdict]:
    """Weights of the penalty."""

    def judge(curves: Curves) -> list[Verdict]:
        by_weight = {
            method: {WEIGHTS[name.partition("-")[2]]: one for name, one in curves.items() if name.startswith(f"{method}-")}
            for method in ("sadmoe", "baseline")
        }
        return claims.sparser_bases_are_better(by_weight["sadmoe"], by_weight["baseline"])

    return _both_ways(data, "ffn", judge)


def figure_14(data: Data) -> list[Verdict]:
    """Cost ratios."""
    return [claims.pays_unless_all_run({int(w): share for w, share in data["break_even"].items()}, width=128)]


def projections(data: Data) -> list[Verdict]:
    """Figures 15 to 18: executed experts of one kind of replaced projection; what is said of two kinds stands beside k."""
    role = data["role"]
    projection, ffn = (_executed(data["models"][name]) for name in ("projection", "ffn"))
    return [
        distributions.projections_are_less_sparse(_numbers(projection, "mean"), _numbers(ffn, "mean"), name=role),
        distributions.projections_vary_more(_numbers(projection, "deviation"), _numbers(ffn, "deviation"), name=role),
        distributions.some_are_bimodal(projection, name=role),
        *([distributions.one_pair_is_alike(data.get("distances"))] if role == "k" else []),
    ]


def _size_of(name: str) -> int:
    """Neurons of an expert of a curve of figures 10 and 13."""
    return int(name.rpartition("-size")[2])


def _curves(data: Data, axis: str) -> Curves:
    return {name: series(data, name, axis) for name in data["curves"]}


def _both_ways(data: Data, axis: str, judge: Callable[[Curves], list[Verdict]]) -> list[Verdict]:
    """Verdicts by our accounting, each with what it is by the authors'."""
    ours = judge(_curves(data, axis))
    if not is_measured(data, f"authors_{axis}"):
        return [replace(verdict, sentence=f"{verdict.sentence} By the authors' accounting: not measured.") for verdict in ours]
    return [_with_authors(*pair) for pair in zip(ours, judge(_curves(data, f"authors_{axis}")), strict=True)]


def _with_authors(ours: Verdict, authors: Verdict) -> Verdict:
    if authors.holds is ours.holds:
        told = {True: "it holds, too", False: "it does not hold either", None: "it cannot be told either"}[ours.holds]
    else:
        word = {True: "it holds", False: "it does not hold", None: "it cannot be told"}[authors.holds]
        told = f"{word}: {authors.sentence.rstrip('.')}"
    return replace(
        ours,
        sentence=f"{ours.sentence} By the authors' accounting {told}.",
        numbers={**ours.numbers, "authors": {"holds": authors.holds, **authors.numbers}},
    )


def _told_apart(ours: Verdict, authors: Verdict) -> Verdict:
    """The authors' verdict on experts of one neuron, with the part of the gap that is their accounting."""
    mine, theirs = ours.numbers.get("gap"), authors.numbers.get("gap")
    if mine is None or theirs is None or theirs <= 0:
        return authors
    share = 1 - mine / theirs
    sentence = f"{authors.sentence} By ours it is {mine:+.4f}: {100 * share:.0f} % of the gap is how FLOPs are counted."
    return replace(authors, sentence=sentence, numbers={**authors.numbers, "accounting_share": share})


def _trained_projections(data: Data) -> Verdict:
    return claims.projections_keep_quality(data["curves"]["full"]["trained"], dense=data["dense"])


def _executed(model: Mapping[str, Any]) -> distributions.Executed:
    """Distributions of executed shares by setting, seed and layer."""
    return {tau: [list(seed[tau].values()) for seed in model["seeds"]] for tau in model["seeds"][0]}


def _numbers(executed: distributions.Executed, key: str) -> dict[str, list[list[float]]]:
    """A number of each distribution."""
    return {tau: [[layer[key] for layer in layers] for layers in seeds] for tau, seeds in executed.items()}
