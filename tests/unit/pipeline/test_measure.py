"""The verbs that read a checkpoint: what they refuse before they load it, and what the page of a report holds."""

import json
from dataclasses import replace

import pytest
import tiny

from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import Curve, CurvePoint, DenseQuality
from moeify.pipeline import generate_text, measure, profile_checkpoint, report_checkpoint, reports
from moeify.pipeline.measure import conversion_id
from moeify.pipeline.reports import without_folders

COST = {
    "ffn_dense": 4e6,
    "ffn_unconverted": 0.0,
    "experts": 4e6,
    "router": 1e6,
    "attention_proj": 2e6,
    "attention_scores": 0.0,
    "head": 3e6,
    "other": 0.0,
}
POINT = CurvePoint(
    rule="topk", value=2.0, active_fraction=0.5, ffn_flops_fraction=0.75, flops_fraction=8 / 9, quality=11.0, quality_ratio=1.1, kl=0.1
)


@pytest.mark.parametrize("cost", [None, COST])
def test_report_has_the_curve_the_routers_and_the_cost_where_it_was_recorded(tmp_path, cost):
    pytest.importorskip("matplotlib")
    tiny.save_converted_tiny(tmp_path)
    record = {"schema": 1, "sites": [], "calibration": {"router_scores": {"model.layers.0.mlp": {"captured@0.5": 0.875}}}}
    (tmp_path / "moeify.json").write_text(json.dumps(record))
    extra = {"calibrated": {"rule": "topk", "value": 2.0}} | ({} if cost is None else {"cost": cost})
    dense = DenseQuality(quality=10.0, flops_per_token=9e6)
    Curve(model="m", metric="perplexity", dense=dense, points=(POINT,), extra=extra).write(tmp_path / "curve.json")
    report_checkpoint(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| `model.layers.0.mlp` | 0.8750 |" in text
    assert ("| experts | 4.000 | 2.000 |" in text) == (cost is not None)
    assert ("## Cost" in text) == (cost is not None)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "0.8750" in page
    assert ("Where the FLOPs are" in page) == (cost is not None)


@pytest.mark.parametrize("scores", [[], {"a": 0.5}, {"a": {"captured": "x"}}, None])
def test_report_of_a_record_of_another_shape_says_what_is_wrong(tmp_path, scores):
    (tmp_path / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {"router_scores": scores}}))
    with pytest.raises(CheckpointError, match=r"moeify.json': calibration: ScoreRecord.router_scores.*; convert the model again"):
        report_checkpoint(tmp_path)


def test_report_into_a_folder_that_cannot_be_made_names_the_way_out(tmp_path):
    (tmp_path / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {"router_scores": {}}}))
    Curve(model="m", metric="perplexity", dense=DenseQuality(quality=1.0, flops_per_token=1.0)).write(tmp_path / "curve.json")
    with pytest.raises(CheckpointError, match=r"cannot make the folder '.*curve.json/page': .*; choose another --out"):
        report_checkpoint(tmp_path, out=tmp_path / "curve.json" / "page")


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_generate_text_refuses_a_temperature_that_is_none_before_loading(temperature):
    with pytest.raises(ConfigError, match="temperature must be at least 0 and finite"):
        generate_text("nowhere", "a", temperature=temperature)


def test_profile_refuses_bad_eps_and_bad_data_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="eps must be finite and >= 0, got nan"):
        profile_checkpoint("m", data=DataConfig(data="builtin:pydoc"), eps=float("nan"))
    with pytest.raises(DataError, match="no such file or folder"):
        profile_checkpoint("m", data=DataConfig(data=str(tmp_path / "typo.txt")))


def test_report_takes_no_curve_of_a_neighbour(tmp_path):
    for name in ("a", "b"):
        tiny.save_converted_tiny(tmp_path / name)
        (tmp_path / name / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {}}))
    dense = DenseQuality(quality=10.0, flops_per_token=9e6)
    Curve(model=str(tmp_path / "a"), metric="perplexity", dense=dense, points=(POINT,)).write(tmp_path / "curve.json")
    assert "html" in report_checkpoint(tmp_path / "a")
    with pytest.raises(DataError, match=r"no such file: '.*b/curve\.json', nor a curve of this checkpoint beside it"):
        report_checkpoint(tmp_path / "b")


def test_report_refuses_a_curve_from_before_the_conversion(tmp_path):
    here = tmp_path / "moe"
    tiny.save_converted_tiny(here)
    (here / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {"scope": "global"}}))
    dense = DenseQuality(quality=10.0, flops_per_token=9e6)
    curve = Curve(model=str(here), metric="perplexity", dense=dense, points=(POINT,), extra={"conversion": conversion_id(here)})
    curve.write(here / "curve.json")
    assert "html" in report_checkpoint(here)

    (here / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {"scope": "layer"}}))
    message = r"moe/curve\.json' was measured before this conversion, or on another checkpoint; moeify sweep or --data measures this one"
    with pytest.raises(DataError, match=message):
        report_checkpoint(here)
    with pytest.raises(DataError, match=message):
        report_checkpoint(here, curve=here / "curve.json")
    replace(curve, extra={"conversion": conversion_id(here)}).write(tmp_path / "curve.json")
    assert "html" in report_checkpoint(here)  # one of this conversion lies beside it


def test_paths_in_a_report_are_names_alone():
    command = "moeify report /home/ann/clients/moe --data '/home/ann/x y/a.txt' --out ~/out/page --model org/name --flops 1/2"
    assert without_folders(command) == "moeify report moe --data 'x y/a.txt' --out page --model org/name --flops 1/2"


def test_report_without_matplotlib_is_the_page_alone(tmp_path, monkeypatch):
    tiny.save_converted_tiny(tmp_path)
    (tmp_path / "moeify.json").write_text(json.dumps({"schema": 1, "sites": [], "calibration": {}}))
    dense = DenseQuality(quality=10.0, flops_per_token=9e6)
    Curve(model="m", metric="perplexity", dense=dense, points=(POINT,)).write(tmp_path / "curve.json")
    monkeypatch.setattr(reports, "has_plots", lambda: False)
    assert set(report_checkpoint(tmp_path)) == {"html", "page"}
    assert "![" not in (tmp_path / "report" / "report.md").read_text()
