"""What the paper claims, of synthetic numbers: both outcomes each, and what is said where a number was not stored."""

import json
import math

import pytest

from bench.paper import claims, distributions, judge
from bench.paper.figures import FIGURES, stated
from bench.paper.measure import distance


def line(start, end, *, low=0.1, high=1.0, seeds=1):
    """A straight curve, the same for every seed."""
    return [[(low, start), (high, end)] for _ in range(seeds)]


def test_better_everywhere_needs_every_shared_budget():
    ours, other = line(4.0, 3.0, seeds=2), line(5.0, 3.1, seeds=2)
    found = claims.better_everywhere("c", ours, other, lower_is_better=True)
    assert found.holds is True
    assert found.numbers["least"] == pytest.approx(0.1)
    assert found.numbers["gain"]["0.1"] == pytest.approx(1.0)
    crossing = claims.better_everywhere("c", ours, line(5.0, 2.9, seeds=2), lower_is_better=True)
    assert crossing.holds is False
    assert crossing.numbers["least"] == pytest.approx(-0.1)
    assert "does not hold" in crossing.line()
    assert claims.better_everywhere("c", ours, other, lower_is_better=False).holds is False


def test_no_gain_is_no_win_and_the_seeds_deviation_is_told():
    assert claims.better_everywhere("c", line(3.0, 3.0), line(3.0, 3.0), lower_is_better=True).holds is False
    ours, other = [[(0.1, 2.9), (1.0, 2.9)], [(0.1, 2.7), (1.0, 2.7)]], line(3.0, 3.0, seeds=2)
    found = claims.better_everywhere("c", ours, other, lower_is_better=True)
    assert "Better at 19 of 19 budgets from 10 % to 100 %, at 19 by more than the seeds' deviation" in found.sentence
    assert "the largest gain +0.2000 ± 0.1414 at 10 %" in found.sentence
    noisy = [[(0.1, 3.1), (1.0, 3.1)], [(0.1, 2.7), (1.0, 2.7)]]
    assert "at 0 by more than the seeds' deviation" in claims.better_everywhere("c", noisy, other, lower_is_better=True).sentence
    assert "±" not in claims.better_everywhere("c", ours[:1], other[:1], lower_is_better=True).sentence


def test_every_seeds_own_cost_of_keeping_quality_is_told():
    ours = [[(0.2, 0.9), (1.0, 0.9)], [(0.2, 0.5), (1.0, 0.5)]]
    found = claims.keeps_quality_at_half(ours, line(0.9, 0.9, seeds=2), dense=[0.9, 0.9])
    assert found.numbers["ours_by_seed"] == [pytest.approx(0.2), None]
    assert "By seed 20 %, never and 10 %, 10 %." in found.sentence


def test_what_can_be_saved_without_a_drop():
    series = [[(0.2, 0.5), (0.3, 0.9), (1.0, 0.9)], [(0.2, 0.5), (0.3, 0.9), (1.0, 0.9)]]
    found = claims.saves(series, dense=[0.9, 0.9])
    assert found.holds is True
    assert found.numbers["cost"] == pytest.approx(0.2975, abs=0.005)
    assert found.sentence.startswith(
        "70.2 % with at most 1 point lost against dense; from these shares of the FLOPs on by seed: 29.8 %, 29.8 %"
    )
    assert claims.saves(series, dense=[0.9, 0.9], claimed=0.8).holds is False
    never = claims.saves(series[:1], dense=[0.95])
    assert (never.holds, never.sentence) == (False, "Nothing with at most 1 point lost against dense.")


def test_all_experts_are_run_by_nobody_or_by_somebody():
    assert distributions.never_all_experts({"tau = 0.1": [0.0, 0.0]}).holds is True
    found = distributions.never_all_experts({"tau = 0.1": [0.0, 0.0], "tau = 0.01": [0.0, 0.02]})
    assert found.holds is False
    assert "tau = 0.01: 1 ± 1.4 %" in found.sentence


def test_curves_without_a_common_budget_are_not_judged():
    found = claims.better_everywhere("c", line(1, 1, low=0.1, high=0.3), line(1, 1, low=0.5, high=0.9), lower_is_better=True)
    assert found.holds is None
    assert "cannot be told" in found.line()


def test_values_are_those_on_each_seeds_own_line():
    series = [[(0.0, 0.0), (1.0, 1.0)], [(0.5, 3.0), (0.0, 1.0), (1.0, 4.0)]]
    assert claims.values_at(series, 0.25) == pytest.approx([0.25, 2.0])
    assert claims.values_at([*series, [(0.5, 1.0), (1.0, 1.0)]], 0.25) is None


@pytest.mark.parametrize(
    ("ours", "holds", "ratio"),
    [
        pytest.param([(0.1, 0.80), (0.2, 0.90), (1.0, 0.90)], True, 0.19 / 0.8, id="at a quarter"),
        pytest.param([(0.1, 0.50), (0.5, 0.80), (0.6, 0.90), (1.0, 0.90)], False, 0.59 / 0.8, id="at three quarters"),
    ],
)
def test_quality_kept_at_half_the_cost(ours, holds, ratio):
    other = [[(0.4, 0.7), (0.8, 0.89), (1.0, 0.91)]]
    found = claims.keeps_quality_at_half([ours], other, dense=[0.9])
    assert found.holds is holds
    assert found.numbers["ratio"] == pytest.approx(ratio, rel=0.02)


def test_quality_that_is_never_reached_is_said():
    assert claims.keeps_quality_at_half(line(0.5, 0.8), line(0.5, 0.95), dense=[0.9]).holds is False
    assert "MoEfication never is" in claims.keeps_quality_at_half(line(0.9, 0.9), line(0.5, 0.8), dense=[0.9]).sentence


def test_a_dip_after_the_first_crossing_counts():
    series = [[(0.1, 0.9), (0.3, 0.9), (0.4, 0.5), (0.5, 0.9), (1.0, 0.9)]]
    assert claims.cheapest_within(series, 0.85) == pytest.approx(0.4875, abs=0.01)
    assert claims.cheapest_within(series, 0.95) is None


def test_steps_of_the_ablation():
    steps = {"a": line(0.5, 0.9), "b": line(0.6, 0.9), "c": line(0.7, 0.9)}
    assert claims.each_step_better(steps, lower_is_better=False).holds is True
    worse = claims.each_step_better({**steps, "d": line(0.6, 0.9)}, lower_is_better=False)
    assert worse.holds is False
    assert worse.numbers["d"] < 0 < worse.numbers["c"]


def test_a_cheaper_point_is_no_lower_floor_if_it_keeps_no_quality():
    cheap_but_useless = [[(0.1, 0.2), (0.6, 0.9), (1.0, 0.9)]]
    ffn_only = [[(0.4, 0.7), (0.5, 0.9), (1.0, 0.9)]]
    found = claims.lower_floor(cheap_but_useless, ffn_only, dense=[0.9])
    assert found.holds is False
    assert found.numbers["with_floor"] < found.numbers["without_floor"], "told, and not what is judged by"
    assert found.numbers["with"] > found.numbers["without"]
    assert "its cheapest point, at 10 %, keeps 0.2000." in found.sentence
    assert claims.lower_floor([[(0.1, 0.2), (0.3, 0.9), (1.0, 0.9)]], ffn_only, dense=[0.9]).holds is True


def test_a_floor_that_one_or_neither_model_reaches():
    good, bad = line(0.9, 0.9), line(0.5, 0.5)
    assert claims.lower_floor(good, bad, dense=[0.9]).holds is True
    never = claims.lower_floor(bad, good, dense=[0.9])
    assert (never.holds, never.numbers["with"]) == (False, None)
    assert "The model with them never is; its cheapest" in never.sentence
    assert claims.lower_floor(bad, bad, dense=[0.9]).holds is None


def test_early_exit_is_judged_at_the_lowest_budgets_and_at_medium_ones():
    ours = [[(0.1, 0.2), (0.28, 0.2), (0.3, 0.9), (1.0, 0.9)]]
    assert [v.holds for v in claims.best_only_at_the_lowest(line(0.8, 0.85), ours)] == [True, True]
    assert [v.holds for v in claims.best_only_at_the_lowest(line(0.95, 0.95), ours)] == [True, False]
    assert [v.holds for v in claims.best_only_at_the_lowest(line(0.1, 0.1), ours)] == [False, True]
    lowest, _ = claims.best_only_at_the_lowest(line(0.1, 0.1, low=0.3), ours)
    assert lowest.holds is None


@pytest.mark.parametrize(("trained", "holds"), [([0.91, 0.885], True), ([0.91, 0.87], False)])
def test_trained_projections_against_dense(trained, holds):
    found = claims.projections_keep_quality(trained, dense=[0.9, 0.9])
    assert found.holds is holds
    assert found.numbers["by_seed"] == pytest.approx([y - 0.9 for y in trained])
    assert "by seed +0.0100, -0.0" in found.sentence


def layer(**tokens):
    """Of 48 experts: so many tokens in the bins of these numbers."""
    histogram = [tokens.get(f"bin{i}", 0) for i in range(100)]
    total = sum(histogram)
    mean = sum(i * count for i, count in enumerate(histogram)) / (100 * total)
    deviation = math.sqrt(sum((i / 100 - mean) ** 2 * count for i, count in enumerate(histogram)) / total)
    return {"histogram": histogram, "tokens": total, "num_values": 48, "mean": mean, "deviation": deviation}


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        pytest.param({"bin15": 50, "bin85": 50}, True, id="two peaks"),
        pytest.param({"bin15": 50, "bin25": 20, "bin35": 45}, True, id="a valley of less than half"),
        pytest.param({"bin15": 50, "bin25": 30, "bin35": 30, "bin45": 45}, False, id="a valley too high"),
        pytest.param({"bin15": 95, "bin85": 5}, False, id="a tail"),
        pytest.param({"bin5": 20, "bin15": 60, "bin25": 20}, False, id="one peak"),
        pytest.param({"bin12": 30, "bin14": 30, "bin16": 30}, False, id="shares that cannot be are no valley"),
    ],
)
def test_two_peaks_of_a_histogram(tokens, found):
    assert distributions.is_bimodal(layer(**tokens)["histogram"], num_values=48) is found


def test_distance_is_how_far_tokens_lie_apart():
    assert distance(layer(bin10=4), layer(bin30=8)) == pytest.approx(0.2)
    assert distance(layer(bin10=1, bin30=1), layer(bin20=2)) == pytest.approx(0.1)
    assert distance(layer(bin10=1, bin30=1), layer(bin10=5, bin30=5)) == 0


def of_projections(role, projection, ffn, **more):
    """The data of a figure of projections: two seeds and two layers, alike."""
    models = {name: {"seeds": [{"tau = 0.1": {"a": one, "b": one}}] * 2} for name, one in (("projection", projection), ("ffn", ffn))}
    return {"role": role, "models": models, **more}


def test_what_is_claimed_of_projections_can_hold_and_fail():
    narrow, wide = layer(bin20=90, bin21=10), layer(bin15=50, bin85=50)
    holding = judge.projections(of_projections("q", wide, narrow))
    assert [v.holds for v in holding] == [True, True, True]
    assert "tau = 0.1: 1, 2 (" in holding[2].sentence
    failing = judge.projections(of_projections("v", narrow, wide))
    assert [v.holds for v in failing] == [False, False, False]
    assert "tau = 0.1: none" in failing[2].sentence


def test_a_layer_is_bimodal_only_if_it_is_in_every_seed():
    data = of_projections("q", layer(bin15=50, bin85=50), layer(bin20=1))
    data["models"]["projection"]["seeds"] = [
        data["models"]["projection"]["seeds"][0],
        {"tau = 0.1": {"a": layer(bin20=1), "b": layer(bin20=1)}},
    ]
    assert judge.projections(data)[2].holds is False


def test_q_and_k_against_v_and_o_stands_beside_k_and_may_not_be_measured():
    one = layer(bin20=1)
    distances = {"q and k": {"tau = 0.1": [0.01, 0.03]}, "v and o": {"tau = 0.1": [0.1, 0.2]}}
    assert judge.projections(of_projections("k", one, one, distances=distances))[3].holds is True
    swapped = {"q and k": distances["v and o"], "v and o": distances["q and k"]}
    assert judge.projections(of_projections("k", one, one, distances=swapped))[3].holds is False
    old = judge.projections(of_projections("k", one, one))[3]
    assert old.holds is None
    assert "Not measured" in old.sentence
    assert len(judge.projections(of_projections("q", one, one, distances=distances))) == 3


def loss_curves(*, authors=None, **levels):
    """Data of flat curves; ``authors``: how much dearer each is in the authors' accounting."""
    curves = {}
    for name, level in levels.items():
        rows = [{"all": x, "ffn": x, "y": level - x} for x in (0.1, 0.5, 1.0)]
        if authors is not None:
            rows = [{**row, "authors_all": row["all"] + authors[name], "authors_ffn": row["ffn"] + authors[name]} for row in rows]
        curves[name] = {"label": name, "trained": [level], "points": [rows]}
    return {"y": "loss", "dense": [2.0], "curves": curves}


@pytest.mark.parametrize(
    ("authors", "told"),
    [
        pytest.param(None, "By the authors' accounting: not measured.", id="an old file"),
        pytest.param({"sadmoe": 0.01, "baseline": 0.0}, "By the authors' accounting it holds, too.", id="the same"),
        pytest.param({"sadmoe": 0.3, "baseline": 0.0}, "By the authors' accounting it does not hold: Better at 0 of", id="not theirs"),
    ],
)
def test_verdicts_say_what_they_are_by_the_authors_accounting(authors, told):
    (found,) = judge.figure_5(loss_curves(sadmoe=3.0, baseline=3.1, authors=authors))
    assert found.holds is True
    assert told in found.sentence
    assert ("authors" in found.numbers) == (authors is not None)


def test_what_both_ways_to_count_make_of_experts_of_one_neuron():
    levels = {"relu_hoyer-size1": 3.01, "relu_hoyer-size8": 3.0, "relu_hoyer-size32": 3.1}
    data = loss_curves(**levels, authors={"relu_hoyer-size1": 0.04, "relu_hoyer-size8": 0.0, "relu_hoyer-size32": 0.0})
    *_, single, authors = (v for v in judge.sizes(data) if "one neuron" in v.claim)
    assert (single.holds, authors.holds) == (True, True)
    assert single.numbers["gap"] == pytest.approx(0.01)
    assert authors.numbers["gap"] == pytest.approx(0.05)
    assert authors.numbers["accounting_share"] == pytest.approx(0.8)
    assert "By ours it is +0.0100: 80 % of the gap is how FLOPs are counted." in authors.sentence


def test_claims_are_json_values():
    data = loss_curves(sadmoe=3.0, baseline=3.1)
    assert json.loads(json.dumps(stated(FIGURES["5"], data))) == stated(FIGURES["5"], data)


def test_the_four_curves_of_figure_9():
    curves = {"relu": line(3.2, 3), "relu_hoyer": line(3.1, 3), "gelu": line(5, 3), "gelu_hoyer": line(3.15, 3)}
    assert [v.holds for v in claims.sparsified_gelu_is_like_relu(curves)] == [True, True, True]
    curves |= {"gelu": line(3.2, 3), "gelu_hoyer": line(4, 3), "relu": line(6, 3)}
    assert [v.holds for v in claims.sparsified_gelu_is_like_relu(curves)] == [False, False, False]


def test_sizes_in_both_orders():
    fine = {1: line(3.5, 3), 2: line(3.1, 3), 8: line(3.2, 3), 32: line(3.4, 3)}
    smaller, single = claims.smaller_experts_are_better(fine, accounting="ours")
    assert (smaller.holds, single.holds) == (True, True)
    assert single.numbers["gap"] > 0
    coarse = {1: line(3.0, 3), 2: line(3.3, 3), 8: line(3.2, 3)}
    assert [v.holds for v in claims.smaller_experts_are_better(coarse, accounting="ours")] == [False, False]


def test_sparser_bases():
    falling, flat = {0.0: line(4, 3), 1e-3: line(3.5, 3)}, {0.0: line(5, 3), 1e-3: line(5, 3)}
    assert [v.holds for v in claims.sparser_bases_are_better(falling, flat)] == [True, False, True]
    assert [v.holds for v in claims.sparser_bases_are_better(flat, falling)] == [False, True, False]


def test_non_zeros_and_their_spread():
    plain, sparse = [[(0.4, 0.04), (0.2, 0.02)]], [[(0.05, 0.02), (0.05, 0.02)]]
    assert [v.holds for v in distributions.fewer_but_more_varied(plain, sparse)] == [True, True]
    assert [v.holds for v in distributions.fewer_but_more_varied(sparse, plain)] == [False, False]


def test_executed_experts_by_depth():
    base, sparse = {"0.1": [[0.8, 0.9, 1.0]]}, {"0.1": [[0.1, 0.2, 0.3]]}
    assert [v.holds for v in distributions.fewer_executed_experts(base, sparse)] == [True, True]
    assert [v.holds for v in distributions.fewer_executed_experts(sparse, {"0.1": [[0.9, 0.8, 0.7]]})] == [False, False]
    assert distributions.projections_are_less_sparse(base, sparse, name="q").holds is True
    assert distributions.projections_are_less_sparse(sparse, base, name="q").holds is False


def test_rank_correlation_of_ties_and_reversed_order():
    assert distributions.rank_correlation([1, 2, 5]) == 1
    assert distributions.rank_correlation([3, 2, 1]) == -1
    assert distributions.rank_correlation([2, 2, 2]) == 0
    assert distributions.rank_correlation([1, 1, 2]) == pytest.approx(0.866, abs=1e-3)


def test_break_even_of_routers():
    assert claims.pays_unless_all_run({128: 0.9, 512: 0.6}, width=128).holds is True
    assert claims.pays_unless_all_run({128: 0.9, 512: 0.6}, width=512).holds is False
