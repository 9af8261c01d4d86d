"""The case that puts training-free methods side by side."""

import pytest

from bench.cases import compare
from moeify.errors import ConfigError


@pytest.fixture(scope="module")
def rows():
    methods = ("teal", "ffn sensitivity", "chess", "top-k activation", "d2dmoe", "moefication", "random", "oracle")
    return list(compare.run(quick=True, methods=methods, skip=(0.25, 0.5)))


def test_every_method_reaches_its_budget_and_costs_what_it_keeps(rows):
    dense, *others = rows
    assert dense["method"] == "dense" and dense["ratio"] == 1
    assert len(others) == 2 * 8
    for row in others:
        assert row["reached"] == pytest.approx(row["skip"], abs=0.12), row
        assert row["ratio"] > 0.9 and row["kl"] > 0 and 0 < row["top1"] < 1, row
        assert row["block_weights"] > 0.3 and row["bytes"] > 0.3 and row["flops"] > 0.3, row
    teal = [row for row in others if row["method"] == "teal"]
    assert [row["block_weights"] for row in teal] == pytest.approx([1 - row["reached"] for row in teal], abs=0.01)
    ffn = [row for row in others if row["method"] == "ffn sensitivity"]
    assert all(row["block_weights"] > 1 - row["reached"] + 0.05 for row in ffn)  # attention stays whole
    chess = [row for row in others if row["method"] == "chess"]
    assert all(row["block_weights"] > 1 - row["reached"] + 0.05 for row in chess)  # and so does the gate


def test_skipping_more_loses_more_and_the_oracle_beats_chance(rows):
    kl = {(row["method"], row["skip"]): row["kl"] for row in rows[1:]}
    assert all(kl[name, 0.25] < kl[name, 0.5] for name, _ in kl)
    assert kl["oracle", 0.5] < kl["random", 0.5]


def test_the_plot_is_written(tmp_path):
    list(compare.run(quick=True, methods=("teal",), skip=(0.5,), plot=tmp_path / "compare.png"))
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_unknown_methods_and_shares_are_refused():
    with pytest.raises(ConfigError, match="--methods: unknown name 'teel'"):
        list(compare.run(quick=True, methods=("teel",)))
    with pytest.raises(ConfigError, match="takes multiples of"):
        list(compare.run(quick=True, skip=(0.33,)))
