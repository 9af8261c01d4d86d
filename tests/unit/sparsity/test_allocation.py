"""Allocations by hand: who skips how much, and that the mean over costs is the budget."""

import math

import pytest

from moeify.errors import ConfigError
from moeify.sparsity.allocation import ALLOCATIONS, GRID, MOST, Budget, block_keeps, greedy_shares

COSTS = {"a.q": 4.0, "a.k": 1.0, "a.down": 5.0, "b.q": 4.0, "b.k": 1.0, "b.down": 5.0}


def budget(skip_frac, *, error=None, influence=None):
    return Budget(
        skip_frac=skip_frac,
        costs=COSTS,
        blocks={name: name[0] for name in COSTS},
        error=error or (lambda name, share: len(name) * share**2),
        influence=lambda: influence or {"a": 0.3, "b": 0.1},
    )


def mean(shares):
    return sum(COSTS[name] * share for name, share in shares.items()) / sum(COSTS.values())


@pytest.mark.parametrize("skip_frac", [0.0, 0.25, 0.6, 0.95])
@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "shared"])
def test_every_allocation_meets_the_budget_and_gives_each_layer_a_share(name, skip_frac):
    shares = ALLOCATIONS[name](budget(skip_frac))
    assert shares.keys() == COSTS.keys()
    assert mean(shares) == pytest.approx(skip_frac)
    assert all(0 <= share < 1 for share in shares.values())


def test_a_shared_level_is_left_to_the_scores():
    assert ALLOCATIONS["shared"](budget(0.5)) is None


def test_greedy_measures_each_layer_alone_on_the_grid_and_nothing_for_no_budget():
    asked = []
    ALLOCATIONS["greedy"](budget(0.5, error=lambda *one: asked.append(one) or 0.0))
    assert asked == [(name, share) for name in COSTS for share in GRID]
    asked.clear()
    assert set(ALLOCATIONS["greedy"](budget(0.0, error=lambda *one: asked.append(one) or 0.0)).values()) == {0.0}
    assert asked == []


def test_greedy_of_quadratic_errors_finds_the_shares_of_least_total():
    # least of sum w s^2 with sum c s given: s proportional to c / w
    costs, weights = {"q": 4.0, "k": 1.0, "down": 5.0}, {"q": 8.0, "k": 1.0, "down": 5.0}
    curves = {name: [weights[name] * share**2 for share in GRID] for name in costs}
    shares = greedy_shares(curves, costs, skip_frac=0.4)
    scale = 0.4 * sum(costs.values()) / sum(costs[name] ** 2 / weights[name] for name in costs)
    for name, share in shares.items():
        assert share == pytest.approx(scale * costs[name] / weights[name], abs=0.06)  # a step of the grid and one of the budget
    assert sum(costs[name] * share for name, share in shares.items()) == pytest.approx(0.4 * sum(costs.values()))


def test_greedy_takes_all_it_may_from_a_layer_that_does_not_matter():
    curves = {"free": [0.0] * len(GRID), "dear": [share**2 for share in GRID]}
    shares = greedy_shares(curves, {"free": 1.0, "dear": 3.0}, skip_frac=0.5)
    assert shares["free"] == MOST
    assert shares["dear"] == pytest.approx((0.5 * 4 - MOST) / 3)
    with pytest.raises(ConfigError, match=r"no layer skip more than 0\.95"):
        greedy_shares(curves, {"free": 1.0, "dear": 3.0}, skip_frac=0.96)


def test_block_influence_by_hand():
    sigmoid = {b: 1 / (1 + math.exp(-13.1072 * v)) for b, v in {"a": 0.1, "b": -0.1}.items()}
    middle = (sigmoid["a"] + sigmoid["b"]) / 2
    shares = ALLOCATIONS["block_influence"](budget(0.6))
    for name, share in shares.items():
        assert share == pytest.approx(1 - 0.4 * sigmoid[name[0]] / middle)


def test_block_that_would_keep_more_than_all_shrinks_the_differences():
    # s = 0.788, 0.212, so that at 0.9 the first would keep 1.42: deviations times 0.1 / (0.52 * 1.05)
    keeps = block_keeps({"a": 0.3, "b": 0.1}, {"a": 1.0, "b": 1.0}, keep_frac=0.9)
    assert keeps["a"] == pytest.approx(0.9 + 0.1 / 1.05)
    assert keeps["b"] == pytest.approx(0.9 - 0.1 / 1.05)
    assert block_keeps({"a": 0.3, "b": 0.1}, {"a": 1.0, "b": 1.0}, keep_frac=1.0) == {"a": 1.0, "b": 1.0}
    # blocks of other cost: the mean over costs is what is kept
    keeps = block_keeps({"a": 0.3, "b": 0.1}, {"a": 1.0, "b": 3.0}, keep_frac=0.4)
    assert keeps["a"] + 3 * keeps["b"] == pytest.approx(4 * 0.4)
    assert keeps["a"] > keeps["b"]
