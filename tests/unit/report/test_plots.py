"""Files appear, are pictures, and bad input says what to do."""

import re
import sys

import pytest

from moeify.baselines.ztw import ExitPoint
from moeify.errors import DataError
from moeify.evaluate import Curve, CurvePoint, DenseQuality
from moeify.report import plot_curve, plot_nonzeros, plot_qualities


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


def _texts(path):
    """What the comments of an SVG file say: matplotlib draws letters, and keeps the text beside them."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_plot_qualities_has_a_line_for_each_model_and_level(tmp_path):
    curves = {"relu": CURVE.points, "MoEfication": [_point("topk", 0.3, 1.5)], "unconverted": []}
    plot_qualities(curves, tmp_path / "a.svg", metric="perplexity", levels={"dense": 10.0, "control": 9.5}, title="tiny")
    texts = _texts(tmp_path / "a.svg")
    for text in ("relu", "MoEfication", "dense: 10", "control: 9.5", "tiny", "perplexity (lower is better)"):
        assert text in texts
    assert "unconverted" not in texts


def test_plot_qualities_with_early_exit_is_over_the_flops_of_the_whole_model(tmp_path):
    early = [ExitPoint(theta=0.5, quality=8.0, exits=(0.5, 0.5), flops=10.0, flops_fraction=0.7)]
    for name, points in (("without", []), ("with", early)):
        plot_qualities({"relu": CURVE.points}, tmp_path / f"{name}.svg", metric="accuracy", levels={"dense": 10.0}, early=points)
    assert {"ZTW", "all FLOPs / dense"} <= set(_texts(tmp_path / "with.svg"))
    assert "FFN FLOPs / dense (routers included)" in _texts(tmp_path / "without.svg")
    assert "ZTW" not in _texts(tmp_path / "without.svg")


@pytest.mark.parametrize(("metric", "inside", "outside"), [("perplexity", "20", "9000"), ("accuracy", "10", "0")])
def test_plot_qualities_cuts_the_axis_off_at_twice_or_half_of_the_first_level(tmp_path, metric, inside, outside):
    points = [_point("topk", 0.1, 900.0 if metric == "perplexity" else 0.0), _point("topk", 0.9, 1.0)]
    plot_qualities({"a": points}, tmp_path / "a.svg", metric=metric, levels={"dense": 10.0})
    assert inside in _texts(tmp_path / "a.svg")
    assert outside not in _texts(tmp_path / "a.svg")


def test_plot_nonzeros_has_a_line_for_each_model_and_a_tick_for_each_layer(tmp_path):
    plot_nonzeros({"with": [3.0, 2.0], "without": [30.0, 20.0, 10.0]}, tmp_path / "a.svg", title="tiny")
    texts = _texts(tmp_path / "a.svg")
    for text in ("with", "without", "layer", "2", "30", "mean non-zeros of a token", "tiny"):
        assert text in texts


def test_plots_of_nothing_say_so(tmp_path):
    with pytest.raises(DataError, match="no point to plot"):
        plot_qualities({"a": []}, tmp_path / "a.svg", metric="accuracy", levels={"dense": 1.0})
    with pytest.raises(DataError, match="no layer to plot"):
        plot_nonzeros({}, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
