"""Curves, costs, analyses and the results of recipes as markdown."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..evaluate import METRICS, AblationTable, Curve, CurvePoint, ExecutedExperts, NonzeroActivations, TokenCosts, on_line

_MARKUP = re.compile(r"([\\`*_\[\]<>&|~])")
_PLAIN = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
_CODE = re.compile(r"[\w.:/\[\] -]+")
_HEADER = ("rule", "knob", "active", "FFN FLOPs", "all FLOPs", "bytes", "time", "{metric}", "ratio", "KL")
_SHARES = ("active_fraction", "ffn_flops_fraction", "flops_fraction", "bytes_fraction", "latency_fraction")
_SHORT = {"FFN FLOPs": "FFN", "all FLOPs": "FLOPs"}
PARTS = {
    "experts": "experts",
    "routers": "router",
    "FFNs not converted": "ffn_unconverted",
    "replaced projections": "projections",
    "attention: projections": "attention_proj",
    "attention: scores": "attention_scores",
    "head": "head",
    "other": "other",
}
"""Parts of a model's cost as tables name them, with their keys in `moeify.evaluate.Curve.cost_by_part`."""


def curve_markdown(curve: Curve) -> str:
    """The curve as a markdown table, one line per point, cheapest first, the dense model last; the calibrated point in bold."""
    header, rows = _curve_table(curve)
    rows = [([plain_markdown(cells[0]), *cells[1:]], marked) for cells, marked in rows]  # a rule's name is whatever the file says
    lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    lines += [_markdown_row([f"**{cell}**" if marked and cell else cell for cell in cells]) for cells, marked in rows]
    return "\n".join(lines) + "\n"


def curve_lines(curve: Curve) -> list[str]:
    """The same for a terminal: numbers aligned to the right, at most 80 wide with names of rules and metrics of today; the calibrated point
    has a star."""
    header, rows = _curve_table(curve)
    shown = [name != "ratio" for name in header]  # which quality and the last line tell
    table = [[_SHORT.get(name, name) for name in header]]
    table += [[cell.replace(" %", "%") for cell in [f"{cells[0]}*" if marked else cells[0], *cells[1:]]] for cells, marked in rows]
    table = [[cell for cell, is_shown in zip(row, shown, strict=True) if is_shown] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
    return [*lines, *(["* the checkpoint's own rules; shares are of the dense model"] if any(marked for _, marked in rows) else [])]


def cost_markdown(curve: Curve) -> str:
    """FLOPs per token by part, dense and at the calibrated point, as a markdown table in millions; empty for a curve without cost."""
    point = curve.calibrated_point()
    columns = {"dense": curve.cost_by_part()} | ({} if point is None else {"calibrated": curve.cost_by_part(point)})
    if not columns["dense"]:
        return ""
    lines = [_markdown_row(["MFLOPs per token", *columns]), _markdown_row(["---", *["---:"] * len(columns)])]
    shown = {label: key for label, key in PARTS.items() if key in columns["dense"]}  # "projections" only where there are some
    lines += [_markdown_row([label, *(f"{parts[key] / 1e6:.3f}" for parts in columns.values())]) for label, key in shown.items()]
    return "\n".join([*lines, _markdown_row(["all", *(f"{sum(parts.values()) / 1e6:.3f}" for parts in columns.values())])]) + "\n"


def layers_markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """One line per layer and one column per key of its row, as a markdown table; empty text for no rows."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [_markdown_row(["layer", *map(plain_markdown, keys)]), _markdown_row(["---", *["---:"] * len(keys)])]
    return "\n".join([*lines, *(_markdown_row([_code(name), *(row.get(key, "") for key in keys)]) for name, row in rows.items())]) + "\n"


def ablation_markdown(table: AblationTable) -> str:
    """Methods at equal cost as a markdown table: quality at each fraction, the smallest fraction that is good enough, and that over the
    first row's; empty cells where nothing was measured."""
    lower = METRICS[table.metric].lower_is_better
    whole = "all FLOPs" if table.cost == "flops_fraction" else "FFN FLOPs"
    first = next(iter(table.rows)).name
    ratios = table.cost_ratios(first)
    limit = f"{whole} for {'<=' if lower else '>='} {table.dense + (table.within if lower else -table.within):.4g}"
    header = [f"{table.metric} at {whole} of", *(f"{100 * share:g} %" for share in table.fractions), limit, f"/ {plain_markdown(first)}"]
    rows = [
        [
            plain_markdown(row.name),
            *("" if quality is None else f"{quality:.4g}" for quality in row.quality),
            "" if row.cheapest is None else f"{100 * row.cheapest:.1f} %",
            "" if (ratio := ratios[row.name]) is None else f"{ratio:.2f}",
        ]
        for row in table.rows
    ]
    return _aligned([header, *rows])


def experts_markdown(experts: ExecutedExperts) -> str:
    """Executed share of the neurons by layer and setting, mean and standard deviation over tokens, as a markdown table."""
    layers = dict.fromkeys(name for found in experts.settings.values() for name in found)
    rows = {
        name: {label: f"{found[name].mean:.3f} ± {found[name].deviation:.3f}" for label, found in experts.settings.items() if name in found}
        for name in layers
    }
    return layers_markdown(rows)


def nonzeros_markdown(models: Mapping[str, NonzeroActivations]) -> str:
    """Non-zero activations of a token by layer, for each model by name: mean and standard deviation in neurons, and the latter over the
    former, as a markdown table."""
    rows: dict[str, dict[str, str]] = {}
    for label, model in models.items():
        for name, found in model.layers.items():
            width, relative = found.num_neurons, found.relative_deviation
            cells = {"mean": f"{width * found.mean:.1f}", "deviation": f"{width * found.deviation:.1f}"}
            cells["deviation / mean"] = "" if relative is None else f"{relative:.3f}"
            rows.setdefault(name, {}).update({f"{label}: {key}": cell for key, cell in cells.items()})
    return layers_markdown(rows)


def costliest_markdown(tokens: Sequence[str], costs: TokenCosts, *, count: int = 8) -> str:
    """The costliest and the cheapest tokens of a text, as a markdown table.

    Args:
        tokens: the text of each position.
        costs: of one sequence of as many positions.
        count: most rows.

    Raises:
        DataError: another number of tokens.
    """
    shares = dict(enumerate(token_shares(tokens, costs)))
    order = sorted((i for i, share in shares.items() if not math.isnan(share)), key=lambda i: -shares[i])

    def cells(i: int) -> list[str]:
        return [str(i), plain_markdown(json.dumps(tokens[i], ensure_ascii=False)), f"{shares[i]:.3f}"]

    header = ["position", "costliest", "cost / dense", "position", "cheapest", "cost / dense"]
    pairs = list(zip(order, reversed(order), strict=True))[:count]
    return (
        "\n".join(
            [_markdown_row(header), _markdown_row(["---:", "---", "---:"] * 2), *(_markdown_row(cells(a) + cells(b)) for a, b in pairs)]
        )
        + "\n"
    )


def token_shares(tokens: Sequence[str], costs: TokenCosts) -> list[float]:
    """FLOPs of the MoE layers / dense of each position of the one sequence that ``costs`` has.

    Raises:
        DataError: ``costs`` has several sequences, or another number of positions.
    """
    if tuple(costs.fraction_BS.shape) != (1, len(tokens)):
        raise DataError(f"{len(tokens)} tokens for the costs of {tuple(costs.fraction_BS.shape)} positions.")
    return [float(share) for share in costs.fraction_BS[0]]


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
    whole = {name: found.get("points", []) for name, found in variants.items()} | curves | {"ZTW": early}
    if early or any(point.get("projection_flops_fraction") is not None for points in whole.values() for point in points):
        # FFN FLOPs do not compare these: replaced projections are a part of them, and early exit has none.
        lines = {name: [(p["flops_fraction"], p["quality"]) for p in points] for name, points in whole.items()}
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


def _curve_table(curve: Curve) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Header, and of each row its cells and whether it is the calibrated point; without bytes and time where no point has them."""
    calibrated = curve.calibrated_point()
    rows = [(_cells(point), point == calibrated) for point in sorted(curve.points, key=lambda p: p.ffn_flops_fraction)]
    rows.append((["dense", "", *["100.0 %"] * len(_SHARES), f"{curve.dense.quality:.4g}", "1.0000", ""], False))
    has = {"bytes": "bytes_fraction", "time": "latency_fraction"}
    kept = [name not in has or any(getattr(point, has[name]) is not None for point in curve.points) for name in _HEADER]
    header = [name.format(metric=curve.metric) for name, is_kept in zip(_HEADER, kept, strict=True) if is_kept]
    return header, [([cell for cell, is_kept in zip(cells, kept, strict=True) if is_kept], marked) for cells, marked in rows]


def _cells(point: CurvePoint) -> list[str]:
    return [
        point.rule,
        f"{point.value:.4g}",
        *("" if (share := getattr(point, name)) is None else f"{100 * share:.1f} %" for name in _SHARES),
        f"{point.quality:.4g}",
        f"{point.quality_ratio:.4f}",
        "" if point.kl is None else f"{point.kl:.4f}",
    ]


def plain_markdown(text: str) -> str:
    """Text from outside for a heading or a table's cell: nothing in it is markup, ends the cell or breaks the line."""
    return text if _PLAIN.fullmatch(text) else _MARKUP.sub(r"\\\1", " ".join(text.splitlines()))


def _code(name: str) -> str:
    """A layer's name, as code where nothing in it could end that or the cell."""
    return f"`{name}`" if _CODE.fullmatch(name) else plain_markdown(name)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
