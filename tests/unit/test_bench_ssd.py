"""The case that compares SSD with dense training and its ablations."""

import importlib
import json
import math
from dataclasses import replace

import pytest

from bench.cases import ssd as case
from moeify._config import from_dict
from moeify.errors import ConfigError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return {row["arm"]: row for row in case.run(quick=True, steps=20, work=work, plot=work / "curves.svg")}, work


def test_arms_have_equal_tokens_and_their_flops_are_as_their_names_say(rows):
    rows, _ = rows
    assert tuple(rows) == case.ARMS
    equal = [row for arm, row in rows.items() if arm != "sparse_longer"]
    assert len({row["tokens"] for row in equal}) == 1
    assert rows["dense"]["sparse_share"] == 0.0
    assert rows["sparse_only"]["sparse_share"] == 1.0
    assert 0 < rows["ssd"]["sparse_share"] < 1
    for arm in ("one_switch", "random_experts"):
        assert rows[arm]["sparse_share"] == pytest.approx(rows["ssd"]["sparse_share"])
        assert rows[arm]["flops"] == pytest.approx(rows["ssd"]["flops"], rel=0.03)  # what is measured costs twice in sparse phases
    trained = {arm: row["curve"][-1][2] for arm, row in rows.items()}  # without measurements
    assert trained["sparse_longer"] == pytest.approx(trained["ssd"], rel=1 / 20)
    assert trained["sparse_only"] < trained["ssd"] < trained["dense"]
    assert len(rows["one_switch"]["switches"]) == 1
    assert rows["random_experts"]["switches"] == rows["ssd"]["switches"]


def test_rows_hold_what_is_asked_of_the_final_models(rows):
    rows, _ = rows
    assert rows["dense"]["ratio"] == 1.0
    for row in rows.values():
        assert set(row["moe_ratio"]) == {"1", "2", "4", "8", "16", "32"}
        assert row["moe_ratio"]["32"] == pytest.approx(1.0, abs=2e-3)  # all experts are the dense model, but for bf16's rounding
        assert all(math.isfinite(value) for point in row["curve"] for value in point)
        assert row["curve"] == sorted(row["curve"])
        assert row["dense_step_s"] > 0
        assert row["sparse_step_s"] > 0


def test_finished_arms_are_found_again_and_the_picture_is_drawn(rows, monkeypatch):
    rows, work = rows
    assert (work / "curves.svg").stat().st_size > 10_000
    monkeypatch.setattr(
        importlib.import_module("moeify.pipeline.pretrain"), "train", lambda *_args, **_kwargs: pytest.fail("trained again")
    )
    again = list(case.run(quick=True, steps=20, work=work, arms=("dense", "ssd")))
    assert [row["loss"] for row in again] == [rows[arm]["loss"] for arm in ("dense", "ssd")]
    with pytest.raises(ConfigError, match="of another recipe"):
        list(case.run(quick=True, steps=21, work=work, arms=("dense",)))
    with pytest.raises(ConfigError, match="of other data"):
        list(case.run(quick=True, steps=20, work=work, arms=("dense",), data="builtin:stdlib"))
    monkeypatch.setattr("bench.paper.code.library_code", lambda: "other")
    with pytest.raises(ConfigError, match=r"other code .* choose another --work, or --keep-runs where"):
        list(case.run(quick=True, steps=20, work=work, arms=("dense",)))


def test_what_cannot_be_compared_is_one_line(tmp_path, rows):
    with pytest.raises(ConfigError, match="no arm 'desne'; known: dense, ssd"):
        list(case.run(quick=True, arms=("desne",)))
    with pytest.raises(ConfigError, match="add ssd"):
        list(case.run(quick=True, arms=("dense", "one_switch")))
    base = case.read_pretrain(case.RECIPE)
    with pytest.raises(ConfigError, match="has not switched once"):
        case._arm("one_switch", base, replace(_result(rows), decisions=()))


def _result(rows):
    plain = json.loads((rows[1] / "ssd-0" / "pretrain.json").read_text(encoding="utf-8"))
    return from_dict(case.PretrainResult, plain, where="pretrain.json")
