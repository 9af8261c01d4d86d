"""Files appear, are pictures, and bad input says what to do."""

import sys

import pytest

from moeify.errors import DataError
from moeify.evaluate import Curve, CurvePoint, DenseQuality
from moeify.report import plot_curve


def _point(rule, value, ratio):
    return CurvePoint(
        rule=rule,
        value=value,
        active_fraction=value,
        ffn_flops_fraction=value + 0.05,
        flops_fraction=0.5 + value / 2,
        quality=10 * ratio,
        quality_ratio=ratio,
        kl=0.1,
    )


def _curve(*points):
    return Curve(
        model="tiny",
        metric="perplexity",
        dense=DenseQuality(quality=10.0, flops_per_token=1e6),
        points=points,
        extra={"calibrated": {"rule": "dynk_max", "value": 0.5}},
    )


CURVE = _curve(_point("dynk_max", 0.2, 900.0), _point("dynk_max", 0.5, 1.1), _point("topk", 0.3, 1.2))


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_plot_curve_writes_a_picture(tmp_path, name, magic):
    plot_curve(CURVE, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_plot_curve_marks_dense_calibrated_and_each_rule(tmp_path):
    plot_curve({"norm": CURVE, "mlp": _curve(_point("topk", 0.4, 1.3))}, tmp_path / "a.svg")
    labels = (tmp_path / "a.svg").read_text()
    for label in ("norm dynk_max", "norm topk", "mlp topk", "dense", "calibrated", "FFN FLOPs / dense", "all FLOPs / dense"):
        assert f"<!-- {label}" in labels


def test_plot_curve_with_bad_arguments_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"one of \.png, \.svg"):
        plot_curve(CURVE, tmp_path / "a.gif")
    with pytest.raises(DataError, match="no point"):
        plot_curve(_curve(), tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot write"):
        plot_curve(CURVE, tmp_path / "missing" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"moeify\[report\]"):
        plot_curve(CURVE, tmp_path / "a.png")
