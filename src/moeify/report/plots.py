"""Curves and analyses as pictures; matplotlib is imported when one is drawn, and never opens a window.

Letters: B batch, H and W rows and columns of an image, S position.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..baselines.ztw import ExitPoint
from ..errors import DataError
from ..evaluate import BINS, METRICS, Curve, CurvePoint, Distribution, ExecutedExperts, NonzeroActivations, TokenCosts

FORMATS = (".png", ".svg", ".pdf")

_FFN_FLOPS = "FFN FLOPs / dense (routers included)"
_TOKEN_FLOPS = "FLOPs of the sparse layers / dense"
_HEAT, _MARK = "YlGnBu", "tab:red"  # light where there is nothing; even steps of lightness, so that it reads in grey, too
_PANELS_ABREAST, _MOST_ROWS = 4, 36
_VALUES_A_BIN, _MERGED_BINS = 3, (1, 2, 4, 5, 10)
_ALL_FLOPS = "all FLOPs / dense"
_COSTS = {
    "ffn_flops_fraction": _FFN_FLOPS,
    "flops_fraction": _ALL_FLOPS,
    "bytes_fraction": "bytes that a decoded token reads / dense",
    "latency_fraction": "measured time / dense",
}
_QUALITY = {
    "perplexity": "perplexity / dense (lower is better)",
    "pseudo_perplexity": "pseudo-perplexity / dense (lower is better)",
    "accuracy": "accuracy / dense",
    "cosine": "cosine to dense sentence vectors",
}


def plot_curve(curve: Curve | Mapping[str, Curve], path: str | Path, *, max_ratio: float = 2.0) -> None:
    """Quality ratio against FFN FLOPs and all FLOPs, and where points have them bytes and time, side by side, with the dense model and the
    calibrated points marked.

    Args:
        curve: one curve, or several by the name that the legend shows; a curve with several rules becomes one line per rule.
        path: .png, .svg or .pdf file.
        max_ratio: points of a perplexity curve above this are left out of the picture (the axis ends there); they stay in the table.

    Raises:
        DataError: unknown extension, no point, matplotlib missing, or the file cannot be written.
    """
    curves = {"": curve} if isinstance(curve, Curve) else dict(curve)
    costs = {
        attribute: label
        for attribute, label in _COSTS.items()
        if any(getattr(point, attribute) is not None for one in curves.values() for point in one.points)
    }
    with _figure(path, size=(5 * max(2, len(costs)), 4)) as figure:
        if not any(one.points for one in curves.values()):
            raise DataError("the curve has no point to plot; moeify sweep measures them.")
        panels = figure.subplots(1, len(costs), sharey=True)
        for axes, (attribute, label) in zip(panels, costs.items(), strict=True):
            for name, one in curves.items():
                _draw(axes, one, attribute, name)
            axes.plot(1.0, 1.0, marker="s", linestyle="none", color="black", label="dense")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
            axes.set_xlim(left=0.0)
        first = next(iter(curves.values()))
        panels[0].set_ylabel(_QUALITY.get(first.metric, f"{first.metric} / dense"))
        if _is_lower_better(first.metric):
            ratios = [p.quality_ratio for one in curves.values() for p in one.points if _has_room(p.quality_ratio)]
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
    # Replaced projections count as FFNs: models with and without compare by all FLOPs.
    has_projections = any(point.projection_flops_fraction is not None for points in curves.values() for point in points)
    is_whole = bool(early) or has_projections
    attribute = "flops_fraction" if is_whole else "ffn_flops_fraction"

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
        axes.set_xlabel(_ALL_FLOPS if is_whole else _FFN_FLOPS)
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


def plot_executed_experts(
    experts: ExecutedExperts | Mapping[str, ExecutedExperts],
    path: str | Path,
    *,
    settings: Sequence[str] | None = None,
    title: str = "",
    what: str = "executed experts",
) -> None:
    """Heat-maps of how many experts tokens execute: a row for each layer, the first one on top, and the executed share along x.

    Colour is log(1 + density), so that rare tokens are seen beside frequent ones; a dot marks each layer's mean. There is a panel for each
    setting; of several models, a row of panels for each setting and a column for each model. Layers of few experts are drawn in fewer bins
    than they were counted in.

    Args:
        experts: of one model, or of several by the name that stands above their column.
        path: .png, .svg or .pdf file.
        settings: labels of the settings to draw, in this order; None: all that every model has.
        title: above the plot.
        what: is counted; stands at the axis.

    Raises:
        DataError: as `plot_curve`; also no model, a setting that a model lacks, or none in common.
    """
    models = {"": experts} if isinstance(experts, ExecutedExperts) else dict(experts)
    if not models:
        raise DataError("there is no model to plot.")
    chosen = list(settings) if settings is not None else [s for s in next(iter(models.values())).settings if _all_have(models, s)]
    if missing := [label for label in chosen if not _all_have(models, label)]:
        raise DataError(f"not every model ran with {missing[0]!r}; settings: {_labels(models)}.")
    if not chosen:
        raise DataError(f"there is no setting that every model ran with to plot; settings: {_labels(models)}.")
    panels = [(label, name) for label in chosen for name in models]
    columns = len(models) if len(models) > 1 else min(_PANELS_ABREAST, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(model.settings[label]) for model in models.values() for label in chosen)
    height = 1.1 + rows * (0.9 + 0.13 * max(8, min(most, _MOST_ROWS)))
    with _figure(path, size=(1.6 + 3.1 * columns, height)) as figure:
        axes_list = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        top = max(_log_density(d).max() for model in models.values() for label in chosen for d in model.settings[label].values())
        image = None
        for axes, (label, name) in zip(axes_list, panels, strict=False):
            found = models[name].settings[label]
            image = axes.imshow(
                [_log_density(one) for one in found.values()],
                aspect="auto",
                extent=(0.0, 1.0, len(found) - 0.5, -0.5),
                cmap=_HEAT,
                vmin=0.0,
                vmax=top,
                interpolation="nearest",
            )
            means = [one.mean for one in found.values()]
            axes.plot(
                means, range(len(found)), "o", markersize=3.5, color=_MARK, markeredgecolor="white", markeredgewidth=0.6, clip_on=False
            )
            axes.set_title(f"{name}, {label}" if name else label, fontsize=10)
            _layer_ticks(axes, len(found))
        for axes in axes_list[len(panels) :]:
            axes.set_visible(False)
        for axes in axes_list[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel(f"{what} / all")
            axes.tick_params(labelbottom=True)
        for axes in axes_list[::columns]:
            axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes_list, label="log(1 + density of tokens)", shrink=0.9)
        figure.suptitle(title)


def plot_active_by_layer(active: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str = "") -> None:
    """Heat-map of the active fraction: a row for each layer, the first one on top, and a column for each setting.

    Args:
        active: active fraction by setting and layer (`ExecutedExperts.active_fraction`); a layer that a setting lacks stays empty.
        path: .png, .svg or .pdf file.
        title: above the plot.

    Raises:
        DataError: as `plot_curve`; also no setting or no layer.
    """
    layers = list(dict.fromkeys(name for found in active.values() for name in found))
    if not layers:
        raise DataError("there is no active fraction to plot.")
    values = [[found.get(name, math.nan) for found in active.values()] for name in layers]
    with _figure(path, size=(2.2 + max(2.2, 0.62 * len(active)), 1.5 + 0.22 * max(6, min(len(layers), _MOST_ROWS)))) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap=_HEAT, vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_xticks(range(len(active)), list(active), rotation=45 if max(map(len, active)) > 4 else 0, rotation_mode="anchor")
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right" if max(map(len, active)) > 4 else "center")
        _layer_ticks(axes, len(layers))
        if len(layers) <= _MOST_ROWS:
            for row, column in ((r, c) for r in range(len(layers)) for c in range(len(active)) if not math.isnan(values[r][c])):
                value = values[row][column]
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.65 else "black")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="active fraction")
        axes.set_title(title)


def plot_patch_costs(costs: TokenCosts, pixels_BHW: Sequence[Any], path: str | Path, *, title: str = "") -> None:
    """Images beside what their patches cost in the MoE layers, one below the other, all on one scale; what comes before the patches (the
    class token) is a number above each.

    Args:
        costs: of images (`TokenCosts.grid` is not None).
        pixels_BHW: grey values of each image, rows by columns, on any scale; as many as ``costs`` has sequences.
        path: .png, .svg or .pdf file.
        title: above the plot.

    Raises:
        DataError: as `plot_curve`; also images of another number. ConfigError: the costs are not of patches.
    """
    patches_BHW, specials_BS = costs.patches_BHW.tolist(), costs.specials_BS.tolist()
    if len(patches_BHW) != len(pixels_BHW):
        raise DataError(f"{len(pixels_BHW)} images for the costs of {len(patches_BHW)}.")
    low, high = (float(pick(v for patches in patches_BHW for row in patches for v in row)) for pick in (min, max))
    with _figure(path, size=(7.4, 0.5 + 3.0 * len(pixels_BHW))) as figure:
        panels = figure.subplots(len(pixels_BHW), 2, squeeze=False)
        image = None
        for (left, right), pixels_HW, patches_HW, specials_S in zip(panels, pixels_BHW, patches_BHW, specials_BS, strict=True):
            size = (0, len(pixels_HW[0]), len(pixels_HW), 0)
            left.imshow(pixels_HW, cmap="gray", extent=size)
            image = right.imshow(patches_HW, cmap=_HEAT, vmin=low, vmax=high, extent=size, interpolation="nearest")
            left.set_title("image", fontsize=10)
            apart = f" (class token {', '.join(f'{s:.2f}' for s in specials_S)})" if specials_S else ""
            right.set_title(f"cost of patches{apart}", fontsize=10)
            for axes in (left, right):
                axes.set_xticks([])
                axes.set_yticks([])
        figure.colorbar(image, ax=panels, label=_TOKEN_FLOPS, shrink=0.9)
        figure.suptitle(title)


def plot_nonzero_distribution(models: NonzeroActivations | Mapping[str, NonzeroActivations], path: str | Path, *, title: str = "") -> None:
    """How many activations of a token are not zero, by layer: the distributions with their means and middle halves, and below them the
    relative deviation.

    Args:
        models: one, or several by the name that the legend shows.
        path: .png, .svg or .pdf file.
        title: above the plot.

    Raises:
        DataError: as `plot_curve`; also no model.
    """
    named = {"dense": models} if isinstance(models, NonzeroActivations) else dict(models)
    if not named:
        raise DataError("there is no model to plot.")
    most = max(len(model.layers) for model in named.values())
    with _figure(path, size=(min(18.0, 3.0 + 0.55 * most * max(1.0, len(named) / 2)), 5.6)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        width = 0.8 / len(named)
        for i, (name, model) in enumerate(named.items()):
            color, marker = f"C{i}", "os^Dv"[i % 5]  # told apart without colours, too
            places = [layer - 0.4 + width * (i + 0.5) for layer in range(len(model.layers))]
            for place, one in zip(places, model.layers.values(), strict=True):
                edges = [edge / BINS for edge in range(BINS + 1)]
                half = [0.48 * width * count / max(one.histogram) for count in one.histogram]
                left, right = ([place + side * h for h in [*half, half[-1]]] for side in (-1, 1))
                upper.fill_betweenx(edges, left, right, step="post", color=color, alpha=0.45, linewidth=0)
                upper.plot([place, place], [one.p25, one.p75], color=color, linewidth=1.5)
            upper.plot(
                places, [d.mean for d in model.layers.values()], marker, markersize=4, color=color, markeredgecolor="white", label=name
            )
            relative = [math.nan if d.relative_deviation is None else d.relative_deviation for d in model.layers.values()]
            lower.plot(range(len(relative)), relative, marker=marker, markersize=4, color=color)
        highest = max(max(i for i, count in enumerate(d.histogram) if count) for model in named.values() for d in model.layers.values())
        upper.set_ylim(0.0, min(1.0, 1.1 * (highest + 1) / BINS))
        upper.set_ylabel("non-zero activations\nof a token / FFN width")
        lower.set_ylabel("deviation / mean")
        lower.set_ylim(bottom=0.0)
        lower.set_xlabel("layer")
        lower.set_xticks(range(0, most, _step(most)))
        for axes in (upper, lower):
            axes.grid(alpha=0.3, axis="y")
        upper.legend(loc="upper right")
        figure.suptitle(title)


def check_plots() -> None:
    """Refuse before the work what no picture could be drawn of afterwards.

    Raises:
        DataError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DataError("plots need matplotlib; pip install 'moeify[report]'.") from None


def has_plots() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def _figure(path: str | Path, *, size: tuple[float, float]) -> Iterator[Any]:
    """An empty figure, written to ``path`` at the end."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"'{path}' has the extension '{path.suffix}'; a plot is one of {', '.join(FORMATS)}.")
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a folder or model may have dollar signs in its name
        if not (said := text.get_text()).replace("\n", "").isprintable():  # fonts have no sign for it
            text.set_text("".join(sign if sign.isprintable() or sign == "\n" else " " for sign in said))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}.") from None


def _all_have(models: Mapping[str, ExecutedExperts], label: str) -> bool:
    return all(label in model.settings for model in models.values())


def _labels(models: Mapping[str, ExecutedExperts]) -> str:
    return "; ".join(", ".join(model.settings) for model in models.values())


def _log_density(found: Distribution) -> Any:
    """log(1 + density) of each bin; the density's integral over [0, 1] is 1.

    Bins are merged until each holds some of the shares that E experts can make: bins with one of them beside bins with two are stripes.
    """
    import numpy as np

    merge = next((merge for merge in _MERGED_BINS if found.num_values * merge >= _VALUES_A_BIN * BINS), _MERGED_BINS[-1])
    merged = np.asarray(found.histogram).reshape(-1, merge).sum(1).repeat(merge) / merge
    return np.log1p(merged * (BINS / found.tokens))


def _layer_ticks(axes: Any, count: int) -> None:
    axes.set_yticks(range(0, count, _step(count)))


def _step(count: int) -> int:
    """Between numbered layers, so that about a dozen are."""
    return max(1, -(-count // 12))


def _is_lower_better(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].lower_is_better


def _draw(axes: Any, curve: Curve, attribute: str, name: str) -> None:
    calibrated = curve.calibrated_point()
    for rule in dict.fromkeys(point.rule for point in curve.points):
        points = [p for p in curve.points if p.rule == rule and _has_room(getattr(p, attribute)) and _has_room(p.quality_ratio)]
        points.sort(key=lambda p: float(getattr(p, attribute)))
        (line,) = axes.plot(*_xy(points, attribute), marker="o", markersize=4, label=" ".join(filter(None, (name, rule))))
        if calibrated in points:
            axes.plot(
                *_xy([calibrated], attribute), marker="*", markersize=14, linestyle="none", color=line.get_color(), label="calibrated"
            )


def _xy(points: Sequence[CurvePoint | None], attribute: str) -> tuple[list[float], list[float]]:
    present = [point for point in points if point is not None]
    return [getattr(point, attribute) for point in present], [point.quality_ratio for point in present]


def _top(curves: Mapping[str, Curve], max_ratio: float) -> float:
    ratios = [point.quality_ratio for curve in curves.values() for point in curve.points if _has_room(point.quality_ratio)]
    return max(1.02, min(max_ratio, max(ratios, default=1.0)) * 1.02)


def _has_room(value: float | None) -> bool:
    """Whether a picture can show a number: a curve may come from anybody, and its model may have broken down."""
    return value is not None and abs(value) < 1e100
