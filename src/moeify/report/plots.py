"""Curves as pictures; matplotlib is imported when one is drawn, and never opens a window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluate import METRICS, Curve, CurvePoint

FORMATS = (".png", ".svg", ".pdf")

_QUALITY = {
    "perplexity": "perplexity / dense (lower is better)",
    "pseudo_perplexity": "pseudo-perplexity / dense (lower is better)",
    "accuracy": "accuracy / dense",
    "cosine": "cosine to dense sentence vectors",
}


def plot_curve(curve: Curve | Mapping[str, Curve], path: str | Path, *, max_ratio: float = 2.0) -> None:
    """Quality ratio against FFN FLOPs and against all FLOPs, side by side, with the dense model and the calibrated points marked.

    Args:
        curve: one curve, or several by the name that the legend shows; a curve with several rules becomes one line per rule.
        path: .png, .svg or .pdf file.
        max_ratio: points of a perplexity curve above this are left out of the picture (the axis ends there); they stay in the table.

    Raises:
        DataError: unknown extension, no point, matplotlib missing, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"'{path}' has the extension '{path.suffix}'; a plot is one of {', '.join(FORMATS)}.")
    curves = {"": curve} if isinstance(curve, Curve) else dict(curve)
    if not any(one.points for one in curves.values()):
        raise DataError("the curve has no point to plot; moeify sweep measures them.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("plots need matplotlib; pip install 'moeify[report]'.") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, attribute, label in (
        (panels[0], "ffn_flops_fraction", "FFN FLOPs / dense (routers included)"),
        (panels[1], "flops_fraction", "all FLOPs / dense"),
    ):
        for name, one in curves.items():
            _draw(axes, one, attribute, name)
        axes.plot(1.0, 1.0, marker="s", linestyle="none", color="black", label="dense")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0.0)
    first = next(iter(curves.values()))
    panels[0].set_ylabel(_QUALITY.get(first.metric, f"{first.metric} / dense"))
    if first.metric in METRICS and METRICS[first.metric].lower_is_better:
        panels[0].set_ylim(bottom=min(0.98, *(p.quality_ratio for one in curves.values() for p in one.points)), top=_top(curves, max_ratio))
    panels[1].legend()
    figure.suptitle(", ".join(dict.fromkeys(one.model for one in curves.values())))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}.") from None


def _draw(axes: Any, curve: Curve, attribute: str, name: str) -> None:
    calibrated = curve.calibrated_point()
    for rule in dict.fromkeys(point.rule for point in curve.points):
        points = sorted((p for p in curve.points if p.rule == rule), key=lambda p: float(getattr(p, attribute)))
        (line,) = axes.plot(*_xy(points, attribute), marker="o", markersize=4, label=" ".join(filter(None, (name, rule))))
        if calibrated in points:
            axes.plot(
                *_xy([calibrated], attribute), marker="*", markersize=14, linestyle="none", color=line.get_color(), label="calibrated"
            )


def _xy(points: Sequence[CurvePoint | None], attribute: str) -> tuple[list[float], list[float]]:
    present = [point for point in points if point is not None]
    return [getattr(point, attribute) for point in present], [point.quality_ratio for point in present]


def _top(curves: Mapping[str, Curve], max_ratio: float) -> float:
    ratios = [point.quality_ratio for curve in curves.values() for point in curve.points]
    return max(1.02, min(max_ratio, max(ratios)) * 1.02)
