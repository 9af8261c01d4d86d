"""Curves, costs and the results of recipes as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluate import METRICS, Curve, CurvePoint, on_line

_HEADER = ("rule", "knob", "active", "FFN FLOPs", "all FLOPs", "{metric}", "ratio", "KL")
_PARTS = {
    "experts": "experts",
    "routers": "router",
    "FFNs not converted": "ffn_unconverted",
    "attention: projections": "attention_proj",
    "attention: scores": "attention_scores",
    "head": "head",
    "other": "other",
}


def curve_markdown(curve: Curve) -> str:
    """The curve as a markdown table, one line per point, cheapest first, the dense model last; the calibrated point in bold."""
    header = _header(curve)
    lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    lines += [_markdown_row([f"**{cell}**" if marked and cell else cell for cell in cells]) for cells, marked in _rows(curve)]
    return "\n".join(lines) + "\n"


def cost_markdown(curve: Curve) -> str:
    """FLOPs per token by part, dense and at the calibrated point, as a markdown table in millions; empty for a curve without cost."""
    point = curve.calibrated_point()
    columns = {"dense": curve.cost_by_part()} | ({} if point is None else {"calibrated": curve.cost_by_part(point)})
    if not columns["dense"]:
        return ""
    lines = [_markdown_row(["MFLOPs per token", *columns]), _markdown_row(["---", *["---:"] * len(columns)])]
    lines += [_markdown_row([label, *(f"{parts[key] / 1e6:.3f}" for parts in columns.values())]) for label, key in _PARTS.items()]
    return "\n".join([*lines, _markdown_row(["all", *(f"{sum(parts.values()) / 1e6:.3f}" for parts in columns.values())])]) + "\n"


def layers_markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """One line per layer and one column per key of its row, as a markdown table; empty text for no rows."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [_markdown_row(["layer", *keys]), _markdown_row(["---", *["---:"] * len(keys)])]
    return "\n".join([*lines, *(_markdown_row([f"`{name}`", *(row.get(key, "") for key in keys)]) for name, row in rows.items())]) + "\n"


def recipe_markdown(result: Mapping[str, Any]) -> str:
    """What a recipe found, as tables: the models before conversion, the points of the main variant and the baseline, all at equal cost.

    Args:
        result: what `pipeline.results.recipe_result` made.
    """
    metric, variants = str(result["metric"]), result["variants"]
    lower = METRICS[metric].lower_is_better
    control = float(result["control"])

    def against(quality: float | None) -> list[str]:
        if quality is None:
            return ["", ""]
        return [f"{quality:.4g}", f"{quality / control:.4f}" if lower else f"{100 * (quality - control):+.2f}"]

    main = next(name for name, found in variants.items() if found["main"])
    models = {key: result[key] for key in ("start", "dense", "control")}
    models |= {f"{name} (main)" if name == main else name: found["quality"] for name, found in variants.items()}
    curves = {main: result["points"], "MoEfication": result["moefication_points"]}
    shares = list(next(iter(result["at_flops"].values())))
    named = [(name if name in variants else "MoEfication", at) for name, at in result["at_flops"].items()]
    over = "/ control" if lower else "points over control"
    tables = [
        [["before conversion", metric, over], *([name, *against(value)] for name, value in models.items())],
        [
            ["converted", "rule", "knob", "active", "FFN FLOPs", metric, over],
            *([name, *_cells(point)[:4], *against(point.quality)] for name, points in curves.items() for point in map(_point, points)),
        ],
        [
            [f"{metric} at FFN FLOPs of", *(f"{100 * float(share):.0f} %" for share in shares)],
            *([name, *(against(at[share])[0] for share in shares)] for name, at in named),
        ],
    ]
    if result["moefication"] is not None:
        tables[0].append(["MoEfication", *against(result["moefication"])])
    if early := result["ztw_points"]:
        tables.append(
            [
                ["early exit", "theta", "all FLOPs", metric, over, "left by head"],
                *(["ZTW", *_exit_cells(point), *against(point["quality"]), _exits(point["exits"])] for point in early),
            ]
        )
        lines = {name: [(p["flops_fraction"], p["quality"]) for p in points] for name, points in {**curves, "ZTW": early}.items()}
        tables.append(
            [
                [f"{metric} at all FLOPs of", *(f"{100 * float(share):.0f} %" for share in shares)],
                *([name, *(against(on_line(line, float(share)))[0] for share in shares)] for name, line in lines.items() if line),
            ]
        )
    seeds, tokens = result["seeds"], result["train_tokens"]
    mean = f"mean of the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    head = (
        f"{result['recipe']}: {metric} on validation, {mean}; {tokens} training tokens, {result['wall_s']:.0f} s of training and conversion"
    )
    return "\n".join([f"{head}.\n", *map(_aligned, tables)])


def _exit_cells(point: Mapping[str, Any]) -> list[str]:
    return [f"{point['theta']:.4g}", f"{100 * point['flops_fraction']:.1f} %"]


def _exits(shares: Sequence[float]) -> str:
    """Of each head, and of none, in percent."""
    return " ".join(f"{100 * share:.0f}" for share in shares)


def _point(values: Mapping[str, Any]) -> CurvePoint:
    return CurvePoint(**values)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that is one in a terminal, too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        _markdown_row([cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))])
        for row in rows
    ]
    rule = _markdown_row(["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _header(curve: Curve) -> list[str]:
    return [name.format(metric=curve.metric) for name in _HEADER]


def _rows(curve: Curve) -> list[tuple[list[str], bool]]:
    """(cells, whether it is the calibrated point)."""
    calibrated = curve.calibrated_point()
    rows = [(_cells(point), point == calibrated) for point in sorted(curve.points, key=lambda p: p.ffn_flops_fraction)]
    return [*rows, (["dense", "", "100.0 %", "100.0 %", "100.0 %", f"{curve.dense.quality:.4g}", "1.0000", ""], False)]


def _cells(point: CurvePoint) -> list[str]:
    return [
        point.rule,
        f"{point.value:.4g}",
        *(f"{100 * share:.1f} %" for share in (point.active_fraction, point.ffn_flops_fraction, point.flops_fraction)),
        f"{point.quality:.4g}",
        f"{point.quality_ratio:.4f}",
        "" if point.kl is None else f"{point.kl:.4f}",
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
