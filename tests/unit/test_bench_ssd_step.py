"""The case that compares a sparse training step with the dense one."""

import json

from bench import run as bench_run
from moeify.kernels import AUTO_ORDER


def test_quick_run_has_a_row_per_part_and_dtype(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["ssd_step", "--json", str(out), "--quick"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["part"], r["dtype"]) for r in rows] == [(part, dtype) for part in ("ffn", "step") for dtype in ("float32", "bfloat16")]
    for row in rows:
        assert row["chosen"] in AUTO_ORDER
        assert row["dense_over_ours"] == row["dense_ms"] / row["ours_ms"] > 0
        assert row["dense_over_grouped"] == row["dense_ms"] / row["grouped_ms"] > 0
        assert (row["tokens"], row["experts"], row["selected"]) == (128, 8, 2)


def test_parts_and_dtypes_are_chosen_by_name(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["ssd_step", "--json", str(out), "--quick", "--parts", "ffn", "--dtypes", "float32"]) == 0
    assert len(out.read_text().splitlines()) == 1
    assert bench_run.main(["ssd_step", "--quick", "--parts", "fnn"]) == 2
    assert "did you mean 'ffn'" in capsys.readouterr().err
