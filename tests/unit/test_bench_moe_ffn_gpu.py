"""The case and the tuner of GPU kernels of experts: they run in Triton's interpreter, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, tune
from bench import run as bench_run
from moeify.kernels import gpu_linear

needs_triton = pytest.mark.skipif(gpu_linear.unavailable() is not None, reason=str(gpu_linear.unavailable()))
ROOT = Path(__file__).parents[2]
TIMES = {"dense_us", "ours_us", "ratio", "of_bound", "floor_us", "of_floor", "f", "union"}


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
    assert all(row["dense_ms"] > 0 and row["ours_ms"] > 0 and row["floor_ms"] > 0 for row in models)
    rows = [target, *rest]
    assert first["what"] == "ceilings" and first["copy_bytes_per_s"] > 0 and first["product_flops_per_s"] > 0
    assert [(row["what"], row["tokens"]) for row in rows] == [("ffn", 5), ("ffn", 1), ("step", 5)]
    for row in rows:
        assert set(row) >= TIMES and row["bound_by"] in ("bytes", "flops")
        assert all(row[key] > 0 for key in TIMES)
        assert row["of_bound"] == pytest.approx(row["ratio"] * row["f"])
        if row["what"] == "ffn":
            assert row["is_right"] and row["error"] < 1e-3 and row["layer_us"] > 0
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
