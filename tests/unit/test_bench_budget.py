"""The case that compares allocated budgets with uniform knobs."""

import json

import pytest
import tiny
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import budget
from moeify.budget import Allocation
from moeify.layers import moe_layers


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


def test_a_share_of_time_is_read_anew_by_a_clock_of_the_cases_own(monkeypatch):
    class Readings:
        left = iter([0.71, 0.9, 0.72, 0.5, 0.74])

        def __init__(self, *_):
            pass

        def __call__(self):
            return next(self.left), 1.0

    model = tiny.convert_tiny(tiny.tiny_llama())
    rules = {name: layer.rule for name, layer in moe_layers(model).items()}
    ours = Allocation(rules=rules, active={}, active_fraction=0.5, reached=0.69, costs={}, loss=0.1)
    monkeypatch.setattr(budget, "allocate", lambda *_, **__: ours)
    monkeypatch.setattr(budget, "Clock", Readings)
    row = budget._timed(model, [tiny.tiny_inputs()], 0.7, tokens=4, passes=0)
    assert (row["asked"], row["calibrated"], row["reached"], row["within"]) == (0.7, 0.69, 0.72, True)
    Readings.left = iter([0.74] * 5)
    assert not budget._timed(model, [tiny.tiny_inputs()], 0.7, tokens=4, passes=0)["within"]


@pytest.mark.parametrize("options", [["--unit", "latency"], ["--sets", "-1"]])
def test_options_that_make_no_sense_are_refused(options, capsys):
    assert bench_run.main(["budget", "--quick", *options]) == 2
    assert "--unit is flops, ffn_flops or bytes" in capsys.readouterr().err
