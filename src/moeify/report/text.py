"""Curves and costs as markdown."""

from collections.abc import Mapping, Sequence

from ..evaluate import Curve, CurvePoint

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
