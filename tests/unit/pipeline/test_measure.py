"""The verbs that read a checkpoint: what the page of a report holds."""

import json

import pytest

from moeify.evaluate import Curve, CurvePoint, DenseQuality
from moeify.pipeline import report_checkpoint

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
