"""The case that compares a sparse FFN with the dense one on the CPU."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import moe_ffn_cpu
from moeify.kernels import AUTO_ORDER, build_plan, cpu, moe_ffn
from moeify.layers import MoEFFN
from moeify.select import DynKMax

LABELS = {"case", "shape", "regime", "dtype", "weights", "expert_size", "tokens", "masks", "layers", "device", "threads", "torch"}
NUMBERS = {"f", "dense_us", "ours_us", "layer_us", "ratio", "of_bound", "layer_ratio", "router_us", "router_share", "spread"}


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
        assert_allclose(row["layer_ratio"], row["dense_us"] / row["layer_us"])
        assert (row["expert_size"], row["weights"]) == (8, row["dtype"])


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
        (["--converted", "x", "--shapes", "gpt2"], "leave --shapes and --expert-size out"),
        (["--converted", "x", "--expert-size", "8"], "leave --shapes and --expert-size out"),
        (["--expert-size", "8,0"], "--expert-size must be between 1 and 1536, got 8,0."),
        (["--shapes", "gpt2", "--expert-size", "4000"], "--expert-size must be between 1 and 3072, got 4000."),
        (["--weights", "int7"], "did you mean 'int8'?"),
    ],
)
def test_options_that_mean_nothing_are_one_line(capsys, options, message):
    assert bench_run.main(["moe_ffn_cpu", "--quick", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_recorded_masks_are_the_converted_models_own(small, tmp_path):
    tiny.save_converted_tiny(tmp_path / "moe", rule=DynKMax(tau=0.7))
    shape, draw, fraction = moe_ffn_cpu._recorded(tmp_path / "moe", most=65)
    assert shape == moe_ffn_cpu.Shape(d_model=32, d_ff=48, activation="relu", gated=True, num_experts=6)
    mask_TE = draw(65, 0.5)
    assert mask_TE.shape == (65, 6)
    assert mask_TE.any(1).all()
    assert not mask_TE.all()
    assert not torch.equal(mask_TE, draw(65, 0.5)), "a new selection at every call"
    assert abs(fraction - torch.cat([draw(65, 0.5) for _ in range(200)]).float().mean()) < 0.05
    (row,) = rows_of(tmp_path, "--quick", "--converted", str(tmp_path / "moe"), "--tokens", "65", "--dtypes", "float32")
    assert (row["shape"], row["masks"]) == ("moe", "recorded")
    assert 1 / 6 <= row["f"] < 1
    assert_allclose(row["of_bound"], row["ratio"] * row["f"])


def test_a_model_that_is_not_converted_has_no_masks(tmp_path, capsys):
    tiny.save_dense_tiny(tmp_path / "dense")
    assert bench_run.main(["moe_ffn_cpu", "--quick", "--converted", str(tmp_path / "dense")]) == 2
    assert "is not a converted model" in capsys.readouterr().err


def test_expert_sizes_and_int8_weights_are_rows_of_their_own(small, tmp_path):
    options = ("--quick", "--shapes", "small", "--dtypes", "float32", "--tokens", "2,6", "--expert-size", "1,11", "--weights", "float,int8")
    rows = rows_of(tmp_path, *options)
    assert [(r["expert_size"], r["weights"], r["tokens"]) for r in rows] == [
        (size, weights, tokens) for size in (1, 11) for weights in ("float32", "int8") for tokens in (2, 6)
    ]
    for row in rows:
        assert ("over_float" in row) == (row["weights"] == "int8")
        if row["weights"] == "int8":
            assert_allclose(row["over_float"], row["float_us"] / row["ours_us"])
            assert ("call_over_float" in row) == (cpu.unavailable() is None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # torch's compiler uses torch.jit
def test_compiled_dense_side_is_a_column(small, tmp_path):
    (row,) = rows_of(tmp_path, "--quick", "--shapes", "small", "--dtypes", "float32", "--tokens", "2", "--compiled")
    assert row["compiled_us"] > 0
    assert_allclose(row["compiled_over_ours"], row["compiled_us"] / row["ours_us"])


def layers_of(shape, dtype=torch.float32, weights="float"):
    return moe_ffn_cpu._layers(shape, dtype, moe_ffn_cpu.WEIGHTS[weights])


@pytest.fixture
def shape(small):
    return replace(moe_ffn_cpu.SHAPES["small"], num_experts=11)


def test_layer_runs_the_fraction_that_it_was_prepared_for_by_its_own_router(shape):
    layers = layers_of(shape)
    inputs_NTD = torch.randn(moe_ffn_cpu.NUM_INPUTS, 30, shape.d_model)
    sides = moe_ffn_cpu._sides(shape, layers, inputs_NTD, compiled=False)
    for fraction in (0.25, 0.75):
        sides.prepare(fraction)
        selections = [[sides.calls["router"](i, None) for _ in range(len(inputs_NTD))] for i in range(len(layers))]
        for i, masks in enumerate(selections):
            assert abs(torch.cat(masks).float().mean() - fraction) < 0.01
            assert not torch.equal(masks[0], masks[1]), "another selection each time"
            expected = moe_ffn(inputs_NTD[0], layers[i].ours, build_plan(layers[i].moe.select(inputs_NTD[0])), activation="silu")
            torch.testing.assert_close(layers[i].ffn(inputs_NTD[0]), expected)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("num_tokens", [3, 30])
def test_router_is_the_native_selection_of_the_layer(shape, num_tokens, monkeypatch):
    layers = layers_of(shape)
    sides = moe_ffn_cpu._sides(shape, layers, torch.randn(moe_ffn_cpu.NUM_INPUTS, num_tokens, shape.d_model), compiled=False)
    sides.prepare(0.5)
    monkeypatch.setattr(MoEFFN, "select", None)
    assert sides.calls["router"](1, None).shape == (num_tokens, 11)


@pytest.mark.parametrize("weights", moe_ffn_cpu.WEIGHTS)
def test_dense_side_has_the_weights_that_ours_stand_for_in_the_order_of_their_shapes(shape, weights):
    layers = layers_of(shape, torch.bfloat16, weights)
    assert len(layers) == moe_ffn_cpu.MIN_LAYERS
    for layer in layers:
        up_FD, gate_FD, down_DF, up_bias_F, down_bias_D = layer.dense
        expected = layer.ours.dequantized(torch.bfloat16)
        assert torch.equal(up_FD, expected.up_FD)
        assert torch.equal(gate_FD, expected.gate_FD)
        assert torch.equal(down_DF, expected.down_FD.t())
        assert all(w.is_contiguous() and w.dtype is torch.bfloat16 for w in (up_FD, gate_FD, down_DF, up_bias_F, down_bias_D))
        assert (layer.ours.up_FD.dtype is torch.int8) == (weights == "int8")
    assert len({layer.dense[2].data_ptr() for layer in layers}) == len(layers), "layers have memory of their own"


def test_both_sides_are_called_on_every_layer_with_a_new_selection_each_time(small):
    calls = {"dense": [], "ours": [], "router": [], "layer": []}

    def side(name):
        return lambda layer, mask_TE: calls[name].append((layer, mask_TE))

    sides = moe_ffn_cpu._Sides({name: side(name) for name in calls}, 12, lambda mask_TE: "cpu", lambda fraction: None)
    masks = moe_ffn_cpu._random(replace(moe_ffn_cpu.SHAPES["small"], num_experts=6))
    row = moe_ffn_cpu._measure(sides, masks, 9, 0.5, rounds=2)
    for seen in calls.values():
        assert sorted(layer for layer, _ in seen[2:]) == sorted([*range(12)] * 2)
    for (dense, first), (ours, second), (router, _), (layer, _) in zip(*calls.values(), strict=True):
        assert first is second
        assert len({dense, ours, router, layer}) == 4, "what one side has just read must not be in the cache for the next"
    drawn = [mask_TE for _, mask_TE in calls["ours"]]
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False))
    assert row["chosen"] == "cpu"
