"""The figures as pictures, from what their JSON files hold; no window is opened."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moeify.errors import DataError

from .claims import values_at
from .measure import series
from .wording import spread

AXES = {
    "all": "FLOPs / dense model",
    "ffn": "FFN FLOPs / dense (routers included)",
    "authors_all": "FLOPs / dense model, as the authors count",
    "authors_ffn": "FFN FLOPs / dense, as the authors count",
}
"""What the horizontal axes say."""
_STEPS = 80
_MARKERS = "os^Dv<>P"


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
        figure.set_layout_engine("none")  # found once, the layout is the next file's, too


def draw_curves(
    data: Mapping[str, Any], paths: Sequence[Path], *, title: str, axes: Sequence[str] = ("all", "ffn"), abreast: int = 2
) -> None:
    """Mean quality over the seeds against each cost, with their standard deviation as a band and every measured point as a dot."""
    lines = -(-len(axes) // abreast)
    with drawing(paths, size=(5.0 * min(abreast, len(axes)) + 2.4, 0.6 + 3.9 * lines), title=title) as figure:
        panels = figure.subplots(lines, min(abreast, len(axes)), sharey=True, squeeze=False).flatten()
        for panel, axis in zip(panels, axes, strict=True):
            for i, (name, curve) in enumerate(data["curves"].items()):
                if all(axis in point for points in curve["points"] for point in points):
                    draw_series(panel, series(data, name, axis), label=curve["label"], style=i)
            dense = fmean(data["dense"])
            panel.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense: {dense:.4g}")
            if data["y"] == "accuracy":  # what claims call no significant drop
                panel.axhline(dense - 0.01, color="black", linestyle=":", linewidth=1, label="1 point below")
            panel.set_xlabel(AXES[axis])
            panel.set_xlim(0.0, 1.05 * max(1.0, _dearest(data, axis)))
            panel.grid(alpha=0.3)
        panels[0].set_ylim(*_limits(data))
        for panel in panels[::abreast]:
            panel.set_ylabel("loss (nats)" if data["y"] == "loss" else data["y"])
        # of the panel which has every curve: early exit is in no panel of FFNs; outside, where it hides nothing
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")


def _dearest(data: Mapping[str, Any], axis: str) -> float:
    found = (point.get(axis, 0.0) for curve in data["curves"].values() for points in curve["points"] for point in points)
    return min(1.5, max(found, default=1.0))


def draw_series(panel: Any, points: Sequence[Sequence[tuple[float, float]]], *, label: str, style: int = 0) -> None:
    """One line with its band and dots, told apart from others by marker as well as by colour."""
    color, marker = f"C{style % 10}", _MARKERS[style % len(_MARKERS)]
    low = max(min(x for x, _ in seed) for seed in points)
    high = min(max(x for x, _ in seed) for seed in points)
    dots = [point for seed in points for point in seed]
    panel.plot(*zip(*dots, strict=True), marker, markersize=3.5, alpha=0.6, color=color)
    # the points' own places, too: a line through a few others would pass by them
    inner = sorted({x for x, _ in dots if low <= x <= high} | set(np.linspace(low, high, _STEPS).tolist()))
    places = [x for x in inner if values_at(points, x) is not None]
    values = [values_at(points, x) or [] for x in places]
    mean, sd = np.array([fmean(v) for v in values]), np.array([spread(v) for v in values])
    panel.plot(places, mean, color=color, marker=marker, markersize=3.5, markevery=[0] if places else None, label=label)
    panel.fill_between(places, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)


def draw_histograms(
    rows: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], paths: Sequence[Path], *, title: str, xlabel: str, abreast: int = 3
) -> None:
    """A heat map for each key: one row a layer, the first on top, the density of tokens over [0, 1] as log(1 + density), in one scale of
    colours; a dot marks a layer's mean.

    Args:
        rows: by panel, by layer, of every seed a distribution as JSON (`moeify.evaluate.Distribution`); at least one panel and layer.
        paths: files to write.
        title: above the panels.
        xlabel: what the bins are of.
        abreast: panels in a row.
    """
    lines = -(-len(rows) // abreast)
    height = 0.9 + lines * (0.9 + 0.22 * max(4, *map(len, rows.values())))
    with drawing(paths, size=(3.1 * min(abreast, len(rows)) + 1.2, height), title=title) as figure:
        panels = figure.subplots(lines, min(abreast, len(rows)), squeeze=False, sharex=True).flatten()
        densities = {name: np.array([_density(seeds) for seeds in layers.values()]) for name, layers in rows.items()}
        top = max(float(density.max()) for density in densities.values())
        image = None
        for panel, (name, layers) in zip(panels, rows.items(), strict=False):
            count = len(layers)
            options = {"aspect": "auto", "extent": (0.0, 1.0, count - 0.5, -0.5), "cmap": "YlGnBu", "interpolation": "nearest"}
            image = panel.imshow(densities[name], vmin=0.0, vmax=top, **options)
            means = [fmean(seed["mean"] for seed in seeds) for seeds in layers.values()]
            panel.plot(
                means, range(count), "o", markersize=3.5, color="tab:red", markeredgecolor="white", markeredgewidth=0.6, clip_on=False
            )
            panel.set_title(name, fontsize="small")
            panel.set_yticks(range(count), [str(layer + 1) for layer in range(count)])
        for panel in panels[len(rows) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(rows) - abreast) : len(rows)]:
            panel.set_xlabel(xlabel)
            panel.tick_params(labelbottom=True)
        for panel in panels[::abreast]:
            panel.set_ylabel("layer")
        figure.colorbar(image, ax=list(panels), label="log(1 + density of tokens)")


def _density(seeds: Sequence[Mapping[str, Any]]) -> Any:
    """log(1 + density) of each bin, tokens of all seeds together; bins are merged (`bins_merged`)."""
    counts = np.sum([seed["histogram"] for seed in seeds], axis=0, dtype=float)
    bins = len(counts)
    merge = bins_merged(bins, seeds[0]["num_values"])
    merged = counts.reshape(-1, merge).sum(1).repeat(merge) / merge
    return np.log1p(merged * bins / counts.sum())


def bins_merged(bins: int, num_values: int) -> int:
    """How many bins become one, ten at most, for each to hold three or more of the shares that the experts of a layer can make: bins with
    one of them beside bins with two would be stripes."""
    return next((merge for merge in (1, 2, 4, 5, 10) if num_values * merge >= 3 * bins), 10)


def draw_ratios(data: Mapping[str, Any], paths: Sequence[Path], *, title: str) -> None:
    """The cost ratio against the executed share, a line for each router width."""
    with drawing(paths, size=(5.5, 4.4), title=title) as figure:
        panel = figure.subplots()
        for width, ratios in data["ratios"].items():
            panel.plot(data["fractions"], ratios, label=f"router {width} wide")
        panel.axhline(1.0, color="black", linestyle="--", linewidth=1, label="dense FFN")
        panel.set_xlim(0.0, 1.0)
        panel.set_ylim(bottom=0.0)
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
