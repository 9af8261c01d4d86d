"""Tables to the letter."""

import io

from rich.console import Console

from moeify.evaluate import Curve, CurvePoint, DenseQuality
from moeify.report import cost_markdown, curve_markdown, curve_table

CURVE = Curve(
    model="tiny",
    metric="perplexity",
    dense=DenseQuality(quality=29.2, flops_per_token=1e6),
    points=(
        CurvePoint(
            rule="topk",
            value=8,
            active_fraction=0.5,
            ffn_flops_fraction=0.55,
            flops_fraction=0.8,
            quality=30.5,
            quality_ratio=1.0445,
            kl=None,
        ),
        CurvePoint(
            rule="dynk_max",
            value=0.25,
            active_fraction=0.2,
            ffn_flops_fraction=0.25,
            flops_fraction=0.6,
            quality=40,
            quality_ratio=1.37,
            kl=0.3,
        ),
    ),
    extra={"calibrated": {"rule": "topk", "value": 8.0}},
)


def test_curve_markdown_is_sorted_by_cost_with_calibrated_in_bold_and_dense_last():
    assert curve_markdown(CURVE).splitlines() == [
        "| rule | knob | active | FFN FLOPs | all FLOPs | perplexity | ratio | KL |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dynk_max | 0.25 | 20.0 % | 25.0 % | 60.0 % | 40 | 1.3700 | 0.3000 |",
        "| **topk** | **8** | **50.0 %** | **55.0 %** | **80.0 %** | **30.5** | **1.0445** |  |",
        "| dense |  | 100.0 % | 100.0 % | 100.0 % | 29.2 | 1.0000 |  |",
    ]


def test_curve_table_prints_every_point():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(curve_table(CURVE))
    text = console.export_text()
    assert all(word in text for word in ("dynk_max", "topk", "dense", "1.0445"))


def test_cost_markdown_is_in_mflops():
    assert "| ffn dense | 1.500 |" in cost_markdown({"ffn_dense": 1.5e6, "head": 2e5})
