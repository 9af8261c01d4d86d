"""The case that puts load on the server."""

import json

import pytest

from bench import run as bench_run

pytest.importorskip("fastapi")


def test_quick_run_loses_nothing_and_has_a_row_for_dense_and_each_preset(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["serve", "--quick", "--json", str(out), "--modes", "packed"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["mode"], row["side"]) for row in rows] == [("packed", side) for side in ("dense", "default", "fast")]
    for row in rows:
        assert (row["lost"], row["requests"], row["clients"], row["tokens"]) == (0, 8, 4, 64)
        assert 0 < row["p50_s"] <= row["p95_s"]
        assert row["tokens_per_s"] > 0


def test_a_checkpoint_without_the_other_is_refused(capsys):
    assert bench_run.main(["serve", "--dense", "somewhere"]) == 2
    assert "give --dense and --converted, or neither." in capsys.readouterr().err
