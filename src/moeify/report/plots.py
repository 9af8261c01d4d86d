"""Curves as pictures; matplotlib is imported when one is drawn, and never opens a window."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..baselines.ztw import ExitPoint
from ..errors import DataError
from ..evaluate import METRICS, Curve, CurvePoint

FORMATS = (".png", ".svg", ".pdf")

_FFN_FLOPS = "FFN FLOPs / dense (routers included)"
_ALL_FLOPS = "all FLOPs / dense"
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
    curves = {"": curve} if isinstance(curve, Curve) else dict(curve)
    with _figure(path, size=(10, 4)) as figure:
        if not any(one.points for one in curves.values()):
            raise DataError("the curve has no point to plot; moeify sweep measures them.")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, attribute, label in (
            (panels[0], "ffn_flops_fraction", _FFN_FLOPS),
            (panels[1], "flops_fraction", _ALL_FLOPS),
        ):
            for name, one in curves.items():
                _draw(axes, one, attribute, name)
            axes.plot(1.0, 1.0, marker="s", linestyle="none", color="black", label="dense")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
            axes.set_xlim(left=0.0)
        first = next(iter(curves.values()))
        panels[0].set_ylabel(_QUALITY.get(first.metric, f"{first.metric} / dense"))
        if _is_lower_better(first.metric):
            ratios = (p.quality_ratio for one in curves.values() for p in one.points)
            panels[0].set_ylim(bottom=min(0.98, *ratios), top=_top(curves, max_ratio))
        panels[1].legend()
        figure.suptitle(", ".join(dict.fromkeys(one.model for one in curves.values())))


def plot_qualities(
    curves: Mapping[str, Sequence[CurvePoint]],
    path: str | Path,
    *,
    metric: str,
    levels: Mapping[str, float],
    title: str = "",
    early: Sequence[ExitPoint] = (),
) -> None:
    """Quality itself against FFN FLOPs, of several models in one plot, with dense models as horizontal lines.

    With points of early exit all curves stand over the FLOPs of the whole model: what leaves early saves more than FFNs.

    Args:
        curves: points by the name that the legend shows; models without a point are left out.
        path: .png, .svg or .pdf file.
        metric: of the qualities; what the axis says. Where less is better the axis ends at twice the first level, else it begins at half
            of it.
        levels: qualities of dense models by name, at least one; the first decides the axis.
        title: above the plot.
        early: points of `moeify.baselines.ztw`.

    Raises:
        DataError: as `plot_curve`.
    """
    attribute = "flops_fraction" if early else "ffn_flops_fraction"

    def flops(point: CurvePoint | ExitPoint) -> float:
        return float(getattr(point, attribute))

    with _figure(path, size=(7, 5)) as figure:
        everything: dict[str, Sequence[CurvePoint | ExitPoint]] = {**curves, "ZTW": early}
        present = {name: sorted(points, key=flops) for name, points in everything.items() if points}
        if not present:
            raise DataError("there is no point to plot; the sweep of a recipe measures them.")
        axes = figure.subplots()
        for name, points in present.items():
            axes.plot([flops(p) for p in points], [p.quality for p in points], marker="o", markersize=4, label=name)
        for (name, level), style in zip(levels.items(), ("--", ":", "-.", (0, (1, 3))), strict=False):
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{name}: {level:.4g}")
        qualities = [p.quality for points in present.values() for p in points] + list(levels.values())
        first = next(iter(levels.values()))
        if _is_lower_better(metric):
            axes.set_ylim(0.98 * min(qualities), 1.02 * min(max(qualities), 2 * first))
        else:
            axes.set_ylim(max(0.98 * min(qualities), 0.5 * first), 1.02 * max(qualities))
        axes.set_xlim(left=0.0)
        axes.set_xlabel(_ALL_FLOPS if early else _FFN_FLOPS)
        axes.set_ylabel(metric + (" (lower is better)" if _is_lower_better(metric) else ""))
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_title(title)


def plot_nonzeros(counts: Mapping[str, Sequence[float]], path: str | Path, *, title: str = "") -> None:
    """The mean number of non-zero activations of a token in each FFN, a line for each model.

    Args:
        counts: by the name that the legend shows, numbers in the order of the layers; at least one model and layer.
        path: .png, .svg or .pdf file.
        title: above the plot.

    Raises:
        DataError: as `plot_curve`.
    """
    with _figure(path, size=(7, 4)) as figure:
        if not any(counts.values()):
            raise DataError("there is no layer to plot.")
        axes = figure.subplots()
        for name, numbers in counts.items():
            axes.plot(range(len(numbers)), numbers, marker="o", markersize=4, label=name)
        axes.set_ylim(bottom=0.0)
        axes.set_xticks(range(max(map(len, counts.values()))))
        axes.set_xlabel("layer")
        axes.set_ylabel("mean non-zeros of a token")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_title(title)


@contextmanager
def _figure(path: str | Path, *, size: tuple[float, float]) -> Iterator[Any]:
    """An empty figure, written to ``path`` at the end."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"'{path}' has the extension '{path.suffix}'; a plot is one of {', '.join(FORMATS)}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("plots need matplotlib; pip install 'moeify[report]'.") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}.") from None


def _is_lower_better(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].lower_is_better


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
