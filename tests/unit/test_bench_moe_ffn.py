"""The case that compares a sparse FFN with the dense one on the CPU."""

import json

import pytest
import tiny
import torch
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import moe_ffn_cpu
from moeify.kernels import AUTO_ORDER
from moeify.select import DynKMax

LABELS = {"case", "shape", "regime", "dtype", "tokens", "masks", "layers", "device", "threads", "torch"}
NUMBERS = {"f", "dense_us", "ours_us", "ratio", "of_bound", "router_us", "router_share", "spread"}


@pytest.fixture
def small(monkeypatch):
    """A shape of microseconds, and few layers."""
    monkeypatch.setitem(moe_ffn_cpu.SHAPES, "small", moe_ffn_cpu.Shape(d_model=16, d_ff=44, activation="silu", gated=True, biased=True))
    monkeypatch.setattr(moe_ffn_cpu, "COLD_BYTES", 1)


def rows_of(tmp_path, *options):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["moe_ffn_cpu", "--json", str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_quick_run_has_a_row_per_dtype_and_tokens_with_every_key(small, tmp_path):
    rows = rows_of(tmp_path, "--quick", "--shapes", "small")
    regimes = {1: "decode", 65: "prefill"}
    assert [(r["dtype"], r["tokens"], r["regime"], r["f"]) for r in rows] == [
        (dtype, tokens, regimes[tokens], 0.25) for dtype in ("float32", "bfloat16") for tokens in (1, 65)
    ]
    for row in rows:
        assert LABELS | NUMBERS | {"chosen"} <= set(row)
        assert all(row[key] > 0 for key in NUMBERS)
        assert (row["case"], row["shape"], row["masks"], row["layers"]) == ("moe_ffn_cpu", "small", "random", 12)
        assert row["chosen"] in AUTO_ORDER
        assert row["spread"] >= 1
        assert_allclose(row["ratio"], row["dense_us"] / row["ours_us"])
        assert_allclose(row["of_bound"], row["ratio"] * row["f"])
        assert_allclose(row["router_share"], row["router_us"] / row["dense_us"])


def test_options_choose_a_part_and_full_runs_have_every_fraction(small, tmp_path):
    rows = rows_of(tmp_path, "--shapes", "small", "--dtypes", "bfloat16", "--tokens", "8")
    assert [row["f"] for row in rows] == [1.0, 0.75, 0.5, 0.25, 0.1]
    assert {(row["dtype"], row["tokens"], row["regime"]) for row in rows} == {("bfloat16", 8, "small batch")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "gpt3"], "did you mean 'gpt2'?"),
        (["--dtypes", "float16"], "did you mean 'bfloat16'?"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0."),
        (["--converted", "x", "--shapes", "gpt2"], "leave --shapes out"),
    ],
)
def test_options_that_mean_nothing_are_one_line(capsys, options, message):
    assert bench_run.main(["moe_ffn_cpu", "--quick", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_recorded_masks_are_the_converted_models_own(small, tmp_path):
    tiny.save_converted_tiny(tmp_path / "moe", rule=DynKMax(tau=0.7))
    shape, draw = moe_ffn_cpu._recorded(tmp_path / "moe", most=65)
    assert shape == moe_ffn_cpu.Shape(d_model=32, d_ff=48, activation="relu", gated=True, num_experts=6)
    mask_TE = draw(65, 0.5)
    assert mask_TE.shape == (65, 6)
    assert mask_TE.any(1).all()
    assert not mask_TE.all()
    assert not torch.equal(mask_TE, draw(65, 0.5)), "a new selection at every call"
    (row,) = rows_of(tmp_path, "--quick", "--converted", str(tmp_path / "moe"), "--tokens", "65", "--dtypes", "float32")
    assert (row["shape"], row["masks"]) == ("moe", "recorded")
    assert 1 / 6 <= row["f"] < 1
    assert_allclose(row["of_bound"], row["ratio"] * row["f"])


def test_a_model_that_is_not_converted_has_no_masks(tmp_path, capsys):
    tiny.save_dense_tiny(tmp_path / "dense")
    assert bench_run.main(["moe_ffn_cpu", "--quick", "--converted", str(tmp_path / "dense")]) == 2
    assert "is not a converted model" in capsys.readouterr().err


def test_both_sides_are_called_on_every_layer_with_a_new_selection_each_time(small):
    calls = {"dense": [], "ours": [], "router": []}

    def side(name):
        return lambda layer, mask_TE: calls[name].append((layer, mask_TE))

    sides = moe_ffn_cpu._Sides({name: side(name) for name in calls}, 12, lambda mask_TE: "cpu")
    masks = moe_ffn_cpu._random(moe_ffn_cpu.SHAPES["small"])
    row = moe_ffn_cpu._measure(sides, masks, 9, 0.5, rounds=2)
    for seen in calls.values():
        assert sorted(layer for layer, _ in seen[2:]) == sorted([*range(12)] * 2)
    for (dense, first), (ours, second), (router, _) in zip(*calls.values(), strict=True):
        assert first is second
        assert len({dense, ours, router}) == 3, "what one side has just read must not be in the cache for the next"
    drawn = [mask_TE for _, mask_TE in calls["ours"]]
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False))
    assert row["chosen"] == "cpu"
