"""The case and the tuner of GPU kernels of experts: they run in Triton's interpreter, in a process of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, tune
from bench import run as bench_run
from bench.cases import moe_ffn_gpu
from moeify.kernels import build_plan, gpu_linear, masked

needs_triton = pytest.mark.skipif(gpu_linear.unavailable() is not None, reason=str(gpu_linear.unavailable()))
ROOT = Path(__file__).parents[2]
TIMES = {"dense_us", "ours_us", "ratio", "of_bound", "floor_us", "of_floor", "dense_floor_us", "dense_of_floor", "f", "union"}


def rows_of(tmp_path, *command):
    out = tmp_path / "rows.jsonl"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json", str(out), "--quick"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@needs_triton
def test_quick_run_checks_and_times_every_regime_and_a_step(tmp_path):
    first, *rows, last = rows_of(tmp_path, "bench.run", "moe_ffn_gpu", "--tokens", "1")
    (target, *rest), models = [row for row in rows if "model" not in row], [row for row in rows if "model" in row]
    assert (target["target"], target["masks"], target["tokens"]) == (True, "recorded", 5) and rows[0] == target
    assert [(row["what"], row["f"]) for row in models] == [("generate", 0.5), ("step", 0.25)]
    assert all(row["dense_ms"] > 0 and row["ours_ms"] > 0 and row["floor_ms"] > 0 and row["is_right"] for row in models)
    rows = [target, *rest]
    assert first["what"] == "ceilings" and first["copy_bytes_per_s"] > 0 and first["product_flops_per_s"] > 0
    assert [(row["what"], row["tokens"]) for row in rows] == [("ffn", 5), ("ffn", 1), ("step", 5)]
    for row in rows:
        assert set(row) >= TIMES and row["bound_by"] in ("bytes", "flops")
        assert all(row[key] > 0 for key in TIMES)
        assert row["of_bound"] == pytest.approx(row["ratio"] * row["f"])
        assert row["is_right"] and 0 < row["error"] < 2e-3
        assert row["dense_floor_us"] >= row["floor_us"]
        assert (
            (row["layer_is_right"] and row["layer_us"] > 0)
            if row["what"] == "ffn"
            else row["worst"] in ("x_TD", "up_FD", "gate_FD", "down_FD")
        )
    assert (last["what"], last["rows"]) == ("left out", "")


@needs_triton
def test_what_the_budget_has_no_time_for_is_named(tmp_path):
    _, last = rows_of(tmp_path, "bench.run", "moe_ffn_gpu", "--tokens", "1", "--budget", "0")
    assert last["rows"] == "tiny 5 0.5 16 recorded; models; tiny 1 0.5 16; tiny 5 0.5 16 step"


@needs_triton
def test_the_tuner_names_the_fastest_of_each_regime(tmp_path):
    rows = rows_of(tmp_path, "bench.tune", "--regimes", "1,16")
    assert [(row["what"], row["regime"]) for row in rows] == [(what, r) for r in ("1", "16") for what in ("tiles", "tiles", "best")]
    for one, other, best in (rows[:3], rows[3:]):
        assert best["default_us"] == one["us"] and one["tiles"] == {} and len(other["tiles"]) == 1
        is_faster = other["us"] < tune.GAIN * one["us"]
        assert (best["tiles"], best["us"]) == ((other["tiles"], other["us"]) if is_faster else ({}, one["us"]))


def a_case(monkeypatch, **changes):
    """`run` on the CPU with everything that takes time, or needs a GPU, left out."""
    calls = []

    def fake(name, row):
        def call(_, T, fraction, G, *, mode, of=None):
            calls.append((name, T, mode))
            return row

        return call

    monkeypatch.setattr(gpu, "device", lambda: "cpu")
    monkeypatch.setattr(gpu, "ceilings", lambda *_, **__: (1.0, 1.0))
    monkeypatch.setattr(gpu, "layers_of", lambda *_, **__: [])
    monkeypatch.setattr(moe_ffn_gpu._Bench, "forward", fake("ffn", {}))
    monkeypatch.setattr(moe_ffn_gpu._Bench, "step", fake("step", {}))
    monkeypatch.setattr(moe_ffn_gpu.gpu_models, "rows", lambda **_: iter(()))
    tuned = [{"what": "tiles"}, {"what": "best", "architecture": "sm90", "regime": "1", "tiles": {"neurons": 4}}]
    monkeypatch.setattr(moe_ffn_gpu.tuning, "tune", lambda *_, **options: calls.append(("tune", options["end"])) or iter(tuned))
    monkeypatch.setattr(moe_ffn_gpu, "TUNED", {})
    return list(moe_ffn_gpu.run(quick=False, **changes)), calls


def test_by_default_tiles_are_tuned_and_the_targets_dense_side_is_autotuned(monkeypatch):
    rows, (first, *calls) = a_case(monkeypatch, tokens=(1, 8))
    assert [row["what"] for row in rows[:2]] == ["ceilings", "best"] and moe_ffn_gpu.TUNED == {("sm90", "1"): {"neurons": 4}}
    assert first[0] == "tune" and first[1] - time.perf_counter() < 0.25 * 500
    targets = len(moe_ffn_gpu.TARGETS)
    assert {mode for *_, mode in calls[:targets]} == {"max-autotune-no-cudagraphs"} and {mode for *_, mode in calls[targets:]} == {
        "default"
    }
    _, calls = a_case(monkeypatch, shapes=("gpt2",), tokens=(1,), autotune=True)
    assert {mode for *_, mode in calls} == {"max-autotune-no-cudagraphs"}, "chosen rows are tuned when asked for"
    _, calls = a_case(monkeypatch, tokens=(1,), no_tune=True, no_compiled=True)
    assert {mode for *_, mode in calls} == {None}
    _, calls = a_case(monkeypatch, tokens=(1,), no_tune=True, budget=moe_ffn_gpu.AUTOTUNE_S - 1.0)
    assert {mode for *_, mode in calls} == {"default"}, "too little time is left for max-autotune"


def test_wrong_results_have_no_times(monkeypatch):
    bench = moe_ffn_gpu._Bench(gpu.TINY, torch.float32, kind="cpu", peaks=(1e9, 1e9), quick=True)
    x_TD, mask_TE = torch.randn(5, 32), torch.rand(5, 4) < 0.5

    def off_by(factor):
        def call(x, weights, plan, *, activation, impl):
            y = masked.moe_ffn(x, weights, plan, activation=activation)
            return y * factor if impl == "triton" else y

        return call

    for module in (gpu, moe_ffn_gpu):
        monkeypatch.setattr(module, "moe_ffn", off_by(1.0))
    assert bench._checked(x_TD, build_plan(mask_TE), "silu")["is_right"]
    assert bench._checked_step(x_TD, torch.randn(5, 32), mask_TE, "silu")["is_right"]
    for module in (gpu, moe_ffn_gpu):
        monkeypatch.setattr(module, "moe_ffn", off_by(1.001))
    assert set(bench.forward(5, 0.5, 16, mode=None, of="random")) == {"error", "plain_error", "is_right"}
    assert set(bench.step(5, 0.5, 16, mode=None)) == {"error", "plain_error", "is_right", "worst"}
    monkeypatch.setattr(tune, "moe_ffn", off_by(1.1))
    weights, plan = bench.layers, build_plan(mask_TE)
    exact_TD = masked.moe_ffn(x_TD, weights[0], plan, activation="silu")
    with pytest.raises(RuntimeError, match="wrong result: relative error"):
        tune._time({}, ("none", "16"), x_TD, weights, plan, exact_TD, shape=gpu.TINY, kind="cpu")


def test_without_a_gpu_there_is_nothing_to_measure(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert bench_run.main(["moe_ffn_gpu"]) == 2
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("there is nothing to measure: ") == 2


def test_unknown_names_are_errors(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "device", lambda: "cpu")
    for command in (
        lambda: bench_run.main(["moe_ffn_gpu", "--shapes", "gpt3"]),
        lambda: bench_run.main(["moe_ffn_gpu", "--dtypes", "int4"]),
        lambda: tune.main(["--regimes", "2"]),
    ):
        assert command() == 2
    assert capsys.readouterr().err.count("unknown") == 3
