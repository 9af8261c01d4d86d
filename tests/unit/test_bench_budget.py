"""The case that compares allocated budgets with uniform knobs."""

import json

import pytest
from numpy.testing import assert_allclose

from bench import run as bench_run


def test_rows_hold_every_set_and_the_margin_over_them(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["budget", "--quick", "--unit", "ffn_flops", "--budgets", "0.6", "--passes", "1", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["budget/set", "budget/set", "budget/margin"]
    for row in rows[:2]:
        assert_allclose(row["reached"], 0.6, atol=0.03)
        assert row["set_kl_ours"] <= min(row["set_kl_fraction"], row["set_kl_knob"], row["set_kl_alone"]) + 1e-12
    margin = rows[2]
    differences = [row["kl_knob"] - row["kl_ours"] for row in rows[:2]]
    assert_allclose(margin["margin_knob"], sum(differences) / 2)
    assert_allclose(margin["least_margin_knob"], min(differences))
    assert_allclose(margin["noise_knob"], abs(differences[0] - differences[1]) / 2**0.5)


@pytest.mark.parametrize("options", [["--unit", "latency"], ["--sets", "-1"]])
def test_options_that_make_no_sense_are_refused(options, capsys):
    assert bench_run.main(["budget", "--quick", *options]) == 2
    assert "--unit is flops, ffn_flops or bytes" in capsys.readouterr().err
