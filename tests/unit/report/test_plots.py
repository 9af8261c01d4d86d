"""Files appear, are pictures, and bad input says what to do."""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from moeify.baselines.ztw import ExitPoint
from moeify.errors import ConfigError, DataError
from moeify.evaluate import Curve, CurvePoint, DenseQuality, Distribution, ExecutedExperts, NonzeroActivations, TokenCosts
from moeify.report import (
    check_plots,
    plot_active_by_layer,
    plot_curve,
    plot_executed_experts,
    plot_nonzero_distribution,
    plot_nonzeros,
    plot_patch_costs,
    plot_qualities,
)


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
    assert "measured time" not in labels


def test_plot_curve_has_bytes_and_time_where_points_have_them(tmp_path):
    points = [replace(_point("topk", share, 1.1), bytes_fraction=share, latency_fraction=share) for share in (0.4, 0.6)]
    plot_curve(_curve(*points, _point("topk", 0.8, 1.0)), tmp_path / "a.svg")
    assert {"bytes that a decoded token reads / dense", "measured time / dense"} <= set(_texts(tmp_path / "a.svg"))


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


def test_plot_qualities_with_replaced_projections_is_over_the_flops_of_the_whole_model(tmp_path):
    points = [replace(point, projection_flops_fraction=0.5) for point in CURVE.points]
    plot_qualities({"ffn": CURVE.points, "all": points}, tmp_path / "a.svg", metric="perplexity", levels={"dense": 10.0})
    assert "all FLOPs / dense" in _texts(tmp_path / "a.svg")


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


def _spread(*counts):
    return Distribution.of_counts(torch.tensor(counts))


def _experts(*labels):
    return ExecutedExperts(settings={label: {"a": _spread(0, 3, 1, 0, 0), "b": _spread(0, 0, 0, 0, 2)} for label in labels})


def test_plot_executed_experts_has_a_panel_for_each_setting_and_model(tmp_path):
    plot_executed_experts(_experts("tau = 0.1", "tau = 0.5"), tmp_path / "a.svg", title="a $\\frac$ b")
    texts = _texts(tmp_path / "a.svg")
    for text in ("tau = 0.1", "tau = 0.5", "layer", "executed experts / all", "log(1 + density of tokens)", "a $\\frac$ b"):
        assert text in texts
    both = {"base": _experts("tau = 0.1", "own"), "sparsified": _experts("tau = 0.1")}
    plot_executed_experts(both, tmp_path / "b.svg")
    assert [text for text in _texts(tmp_path / "b.svg") if ", " in text] == ["base, tau = 0.1", "sparsified, tau = 0.1"]
    plot_executed_experts(_experts(*"abcdef"), tmp_path / "c.png", settings=["e", "a"])


def test_density_of_few_experts_is_flat_where_every_share_is_as_frequent():
    from moeify.report.plots import _log_density

    counts = torch.zeros(1537, dtype=torch.int64)
    counts[::8] = 10  # 192 experts of 8 neurons: one or two shares to a bin of 1 %
    drawn = _log_density(Distribution.of_counts(counts, num_values=192))
    raw = _log_density(Distribution.of_counts(counts))
    assert len(drawn) == len(raw) == 100
    assert raw.max() / raw.min() > 1.5
    assert drawn.max() / drawn.min() < 1.25
    assert (math.e**drawn - 1).mean() == pytest.approx(1.0), "a density"


def test_plot_executed_experts_without_a_common_setting_says_which_there_are(tmp_path):
    with pytest.raises(DataError, match=r"no setting that every model ran with to plot; settings: x; y\."):
        plot_executed_experts({"a": _experts("x"), "b": _experts("y")}, tmp_path / "a.png")
    with pytest.raises(DataError, match="not every model ran with 'z'"):
        plot_executed_experts(_experts("x"), tmp_path / "a.png", settings=["z"])
    with pytest.raises(DataError, match="no model to plot"):
        plot_executed_experts({}, tmp_path / "a.png")


def test_plot_active_by_layer_writes_every_number_and_leaves_missing_layers_empty(tmp_path):
    plot_active_by_layer({"calibrated": {"a": 0.25, "b": 0.5}, "0.9": {"a": 0.875}}, tmp_path / "a.svg", title="tiny")
    texts = _texts(tmp_path / "a.svg")
    for text in ("0.25", "0.50", "0.88", "calibrated", "0.9", "active fraction"):
        assert text in texts
    assert "nan" not in texts
    with pytest.raises(DataError, match="no active fraction"):
        plot_active_by_layer({"a": {}}, tmp_path / "b.svg")


def _costs(*, positions, grid=None):
    flops_LBS = torch.linspace(100, 400, positions, dtype=torch.float64).expand(1, 1, -1)
    return TokenCosts(layers=("a",), flops_LBS=flops_LBS, dense_flops=(400.0,), router_flops=(20.0,), grid=grid)


def test_plot_patch_costs_puts_the_class_token_beside_the_patches(tmp_path):
    costs, pixels = _costs(positions=7, grid=(2, 3)), [torch.rand(8, 12).tolist()]
    plot_patch_costs(costs, pixels, tmp_path / "a.svg")
    texts = _texts(tmp_path / "a.svg")
    for text in ("image", "cost of patches (class token 0.25)", "FLOPs of the sparse layers / dense"):
        assert text in texts
    plot_patch_costs(_costs(positions=6, grid=(2, 3)), pixels, tmp_path / "b.svg")
    assert "cost of patches" in _texts(tmp_path / "b.svg")
    with pytest.raises(DataError, match="2 images for the costs of 1"):
        plot_patch_costs(costs, pixels * 2, tmp_path / "c.svg")
    with pytest.raises(ConfigError, match="not the patches"):
        plot_patch_costs(_costs(positions=6), pixels, tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()


def test_plot_nonzero_distribution_names_every_model(tmp_path):
    silent = NonzeroActivations(layers={"a": _spread(0, 1, 3), "b": _spread(4, 0, 0)})
    plot_nonzero_distribution({"dense": silent, "sparsified": silent}, tmp_path / "a.svg", title="tiny")
    texts = _texts(tmp_path / "a.svg")
    for text in ("dense", "sparsified", "deviation / mean", "layer", "tiny"):
        assert text in texts
    plot_nonzero_distribution(silent, tmp_path / "b.png")
    with pytest.raises(DataError, match="no model to plot"):
        plot_nonzero_distribution({}, tmp_path / "c.png")


def test_check_plots_without_matplotlib_names_the_extra(monkeypatch):
    check_plots()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"moeify\[report\]"):
        check_plots()
