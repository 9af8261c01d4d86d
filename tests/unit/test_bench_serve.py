"""The case that puts load on the server."""

import contextlib
import io
import json

import pytest

from bench import run as bench_run
from bench.cases import serve

pytest.importorskip("fastapi")


def test_quick_run_loses_nothing_and_has_a_row_for_dense_and_each_preset(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["serve", "--quick", "--json", str(out), "--modes", "packed"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["mode"], row["side"]) for row in rows] == [("packed", side) for side in ("dense", "default", "fast", "mixed")]
    for row in rows:
        assert (row["lost"], row["requests"], row["clients"], row["tokens"]) == (0, 8, 4, 64)
        assert 0 < row["p50_s"] <= row["p95_s"]
        assert row["tokens_per_s"] > 0


def test_a_checkpoint_without_the_other_is_refused(capsys):
    assert bench_run.main(["serve", "--dense", "somewhere"]) == 2
    assert "give --dense and --converted, or neither." in capsys.readouterr().err


def test_mixed_requests_name_the_presets_in_turns(monkeypatch):
    named = []

    def urlopen(request, timeout):
        named.append(json.loads(request.data)["model"])
        return contextlib.closing(io.BytesIO(b'{"usage": {"completion_tokens": 3}}'))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    side = serve._Side("mixed", "http://127.0.0.1:1/v1", ["moe@default", "moe@fast"])
    for number in range(4):
        serve._ask(side, number, 8)
    assert named == ["moe@default", "moe@fast"] * 2
    assert (side.tokens, side.lost) == (12, 0)
