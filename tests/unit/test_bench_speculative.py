"""The case that times a model with its own draft, by the command line."""

import json

import pytest
from numpy.testing import assert_allclose

from bench import run as bench_run

QUICK = ("speculative_cpu", "--quick", "--highs", "1,own", "--drafts", "0.2", "--lengths", "3,0", "--steps", "1", "--shape", "1,16,32")
ALWAYS = {
    "model",
    "dtype",
    "high",
    "temperature",
    "draft",
    "length",
    "plain_per_s",
    "drafted_per_s",
    "ratio",
    "spread",
    "high_mb",
    "draft_mb",
}
EXPLAINED = {"acceptance", "alpha", "drafted", "tokens_per_round", "draft_cost", "verify_cost", "expected", "accounted"}


def test_quick_run_trains_a_model_keeps_it_and_explains_every_ratio(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main([*QUICK, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["high"], row["length"]) for row in rows] == [
        (high, length) for high in ("1", "own") for length in ("3", "adapted", "assistant_model")
    ]
    for row in rows:
        assert set(row) >= ALWAYS
        assert row["other_texts"] == 0
        assert_allclose(row["ratio"], row["drafted_per_s"] / row["plain_per_s"])
        assert row["draft_mb"] <= row["high_mb"]
        if row["length"] == "assistant_model":
            continue
        assert set(row) >= EXPLAINED
        assert 0 <= row["acceptance"] <= row["alpha"] <= 1
        paid = row["drafted"] * row["draft_cost"] + row["verify_cost"]
        assert_allclose(row["accounted"] * paid, row["tokens_per_round"])
        assert (row["expected"] is None) == (row["length"] == "adapted")
    kept = next((tmp_path / "work").glob("*/moe/model.safetensors"))
    before = kept.stat().st_mtime_ns
    assert bench_run.main([*QUICK[:2], "--drafts", "0.2", "--lengths", "2", "--model", str(kept.parent)]) == 0
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--highs", "most"], "neither an active fraction nor 'own'"),
        (["--lengths", "-1"], "--lengths must be at least 0"),
        (["--temperatures", "-1"], "--temperatures must be at least 0"),
        (["--shape", "2,20,32"], "--shape must be layers, width"),
        (["--model", "x", "--steps", "3"], "leave them out with --model"),
        (["--dtypes", "float31"], "did you mean 'float32'?"),
        (["--model", "nowhere/at/all"], "does not exist"),
    ],
)
def test_options_that_mean_nothing_are_one_line(capsys, options, message):
    assert bench_run.main(["speculative_cpu", "--quick", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
