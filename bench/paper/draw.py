"""The figures as pictures, from what their JSON files hold; no window is opened."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moeify.errors import DataError

from .claims import spread, values_at
from .measure import series

AXES = {
    "all": "FLOPs / dense model",
    "ffn": "FFN FLOPs / dense (routers included)",
    "authors_all": "FLOPs / dense model, as the authors count",
    "authors_ffn": "FFN FLOPs / dense, as the authors count",
}
"""What the horizontal axes say."""
_STEPS = 80


@contextmanager
def drawing(paths: Sequence[Path], *, size: tuple[float, float], title: str) -> Iterator[Any]:
    """An empty figure, written to every path at the end.

    Raises:
        DataError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("figures need matplotlib; pip install 'moeify[report]'.") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    yield figure
    for path in paths:
        # without a date and random names, the same numbers give the same file
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with rc_context({"svg.hashsalt": title}):
            figure.savefig(path, dpi=120, metadata=metadata)


def draw_curves(data: Mapping[str, Any], paths: Sequence[Path], *, title: str, axes: Sequence[str] = ("all", "ffn")) -> None:
    """Mean quality over the seeds against each cost, with their standard deviation as a band and every measured point as a dot."""
    with drawing(paths, size=(5.5 * len(axes), 4.4), title=title) as figure:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            for name, curve in data["curves"].items():
                if all(axis in point for points in curve["points"] for point in points):
                    draw_series(panel, series(data, name, axis), label=curve["label"])
            dense = fmean(data["dense"])
            panel.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense: {dense:.4g}")
            panel.set_xlabel(AXES[axis])
            panel.set_xlim(left=0.0)
            panel.grid(alpha=0.3)
        limits = _limits(data)
        panels[0].set_ylim(*limits)
        panels[0].set_ylabel("loss (nats)" if data["y"] == "loss" else data["y"])
        panels[0].legend(fontsize="small")  # which has every curve: early exit is in no panel of FFNs


def draw_series(panel: Any, points: Sequence[Sequence[tuple[float, float]]], *, label: str) -> None:
    """One line with its band and dots."""
    low = max(min(x for x, _ in seed) for seed in points)
    high = min(max(x for x, _ in seed) for seed in points)
    dots = [point for seed in points for point in seed]
    drawn = panel.scatter(*zip(*dots, strict=True), s=8, alpha=0.6)
    color = drawn.get_facecolor()[0][:3]
    places = [x for x in np.linspace(low, high, _STEPS).tolist() if values_at(points, x) is not None]
    values = [values_at(points, x) or [] for x in places]
    mean, sd = np.array([fmean(v) for v in values]), np.array([spread(v) for v in values])
    panel.plot(places, mean, color=color, label=label)
    panel.fill_between(places, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)


def draw_histograms(rows: Mapping[str, Mapping[str, Sequence[float]]], paths: Sequence[Path], *, title: str, xlabel: str) -> None:
    """A heat map for each key: one row a layer, the density of tokens over [0, 1] as log(1 + density), in one scale of colours.

    Args:
        rows: by panel, by layer, the counts of the bins; at least one panel and layer.
        paths: files to write.
        title: above the panels.
        xlabel: what the bins are of.
    """
    with drawing(paths, size=(3.4 * len(rows) + 1, 0.5 * max(map(len, rows.values())) + 1.8), title=title) as figure:
        panels = figure.subplots(1, len(rows), squeeze=False)[0]
        image = None
        for panel, (name, layers) in zip(panels, rows.items(), strict=True):
            counts = np.array([list(histogram) for histogram in layers.values()], dtype=float)
            density = counts * counts.shape[1] / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
            options = {"aspect": "auto", "origin": "lower", "extent": (0, 1, -0.5, len(layers) - 0.5)}
            image = panel.imshow(np.log1p(density), vmin=0.0, vmax=np.log1p(counts.shape[1]), **options)
            panel.set_title(name, fontsize="small")
            panel.set_yticks(range(len(layers)))
            panel.set_xlabel(xlabel)
        panels[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(panels), label="log(1 + density)")


def draw_ratios(data: Mapping[str, Any], paths: Sequence[Path], *, title: str) -> None:
    """The cost ratio against the executed share, a line for each router width."""
    with drawing(paths, size=(5.5, 4.4), title=title) as figure:
        panel = figure.subplots()
        for width, ratios in data["ratios"].items():
            panel.plot(data["fractions"], ratios, label=f"router {width} wide")
        panel.axhline(1.0, color="black", linestyle="--", linewidth=1, label="dense FFN")
        panel.set_xlabel("executed share of the experts, k / E")
        panel.set_ylabel("cost / dense FFN")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")


def _limits(data: Mapping[str, Any]) -> tuple[float, float]:
    """The axis of the quality: all that is better than dense, and of what is worse as much as tells curves apart."""
    values = [point["y"] for curve in data["curves"].values() for points in curve["points"] for point in points] + list(data["dense"])
    dense, low, high = fmean(data["dense"]), min(values), max(values)
    if data["y"] == "loss":
        low, high = low, min(high, dense + 1.0)
    else:
        low = max(low, 0.5 * dense)
    margin = 0.03 * (high - low) or 0.01
    return low - margin, high + margin
