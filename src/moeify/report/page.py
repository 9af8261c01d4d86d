"""One HTML file that says what a checkpoint costs and keeps: nothing is fetched, and everything from outside is escaped.

The page is `page.html.j2`; colours, light and dark, are its own. Below are the numbers of it, as text.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..evaluate import METRICS, AblationTable, Curve, CurvePoint, ExecutedExperts, TokenCosts
from ..presets import Preset
from .html import tokens_html
from .text import PARTS, token_shares

AXES = {
    "flops_fraction": "FLOPs of the whole model",
    "ffn_flops_fraction": "FLOPs of the FFNs, routers included",
    "bytes_fraction": "bytes of weights that a decoded token reads",
    "latency_fraction": "measured time",
    "active_fraction": "active fraction",
}
_SWITCH = {
    "flops_fraction": "FLOPs",
    "ffn_flops_fraction": "FLOPs of the FFNs",
    "bytes_fraction": "bytes a token",
    "latency_fraction": "time",
}
"""Costs of a curve's points, all shares of the dense model's; the first is shown first, and what no point has is not shown."""
_SHARES = ("active_fraction", "ffn_flops_fraction", "flops_fraction", "bytes_fraction", "latency_fraction")
_LARGEST = 1e100
MOST_BYTES = 2 << 20
"""A page is refused beyond this: pictures are the only thing that could make it so large."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows; what is empty or None is left out."""

    title: str
    """Name of the checkpoint."""
    subtitle: str = ""
    """What it is, in a line."""
    skips_channels: bool = False
    """Whether input channels are skipped and not experts: what an active fraction is of."""
    curve: Curve | None = None
    """Its points."""
    others: Mapping[str, Curve] = field(default_factory=dict)
    """Other checkpoints' curves of the same metric and batches, by name."""
    table: AblationTable | None = None
    """All of them at equal cost."""
    presets: Sequence[Preset] = ()
    """The checkpoint's named operating points."""
    suggested: Mapping[str, CurvePoint] = field(default_factory=dict)
    """Of a checkpoint without presets: points of the curve that are near those which `moeify preset` would make, by name."""
    experts: ExecutedExperts | None = None
    """Which experts ran, by setting and layer; of a model that skips channels which of these were kept, by part of each block."""
    tokens: Sequence[str] | None = None
    """A text, one piece for each position."""
    text_costs: TokenCosts | None = None
    """Of its tokens."""
    patches: Path | None = None
    """Picture of an image's patches by cost."""
    layers: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Further numbers by title, layer and name, such as routers' scores."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, data, machine."""
    commands: Sequence[str] = ()
    """How the page and its numbers were made."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    cells: Sequence[Any]
    is_own: bool = False


@dataclass(frozen=True, kw_only=True)
class _Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[_Row]
    texts: Sequence[str] = ()
    """Columns of words."""
    pictures: Sequence[str] = ()
    folded: str = ""
    """What opens it; empty: it is open."""

    def without_empty(self) -> "_Table":
        """The same without columns that nothing stands in."""
        kept = [i for i in range(len(self.header)) if i == 0 or any(row.cells[i] != "" for row in self.rows)]
        rows = [replace(row, cells=[row.cells[i] for i in kept]) for row in self.rows]
        return replace(self, header=[self.header[i] for i in kept], rows=rows)


@dataclass(frozen=True, kw_only=True)
class _Section:
    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[_Table] = ()
    tokens: Any = None
    scale: Any = None
    picture: str | None = None
    alt: str = ""
    code: str = ""


def report_html(report: Report) -> str:
    """The page, as one file's text.

    Raises:
        DataError: Jinja2 is missing, a text of another length than its costs, or a page of more than `MOST_BYTES`.
        CheckpointError: the picture of an image cannot be read.
    """
    try:
        import jinja2
    except ImportError:
        raise DataError("the page needs Jinja2; pip install 'moeify[report]'.") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    page = {
        "title": report.title,
        "subtitle": report.subtitle,
        "tiles": _tiles(report),
        "axes": _axes(report),
        "sections": [section for section in _sections(report) if section is not None],
        "footer": "Made by moeify. Nothing on this page is fetched from elsewhere; shares are of the dense model's cost.",
    }
    text = template.render(page=page)
    if (size := len(text.encode())) > MOST_BYTES:
        raise DataError(f"the page would have {size / 2**20:.1f} MB, more than 2; give a shorter --text or a smaller --image.")
    return text


# ---- what a reader wants first


def _tiles(report: Report) -> list[tuple[str, str]]:
    curve = report.curve
    point = None if curve is None else curve.calibrated_point()
    if curve is None or point is None:
        return []
    ran = "of the input channels are read" if report.skips_channels else "of the neurons run"
    tiles = [
        (_percent(point.active_fraction), f"{ran}, at the checkpoint's own rules"),
        (_percent(point.flops_fraction), "of the dense FLOPs"),
        (f"{point.quality:.4g}", f"{_words(curve.metric)}; dense {curve.dense.quality:.4g}"),
    ]
    if fastest := min((p for p in report.presets if p.latency_fraction), key=lambda p: p.latency_fraction or 1.0, default=None):
        tiles.append((f"{1 / (fastest.latency_fraction or 1.0):.2f}\u00d7", f"the dense speed with preset {fastest.name}, measured"))
    elif point.latency_fraction:
        tiles.append((f"{1 / point.latency_fraction:.2f}\u00d7", "the dense speed, measured"))
    return tiles


def _axes(report: Report) -> list[dict[str, Any]]:
    from .chart import Line, Mark, chart, pareto

    curve = report.curve
    if curve is None or not curve.points or abs(curve.dense.quality) >= _LARGEST:
        return []
    lower, found = METRICS[curve.metric].lower_is_better, []
    own = curve.calibrated_point()
    for attribute, name in AXES.items():
        lines = []
        for label, one in {report.title: curve, **report.others}.items():
            for rule in dict.fromkeys(point.rule for point in one.points):
                points = [p for p in one.points if p.rule == rule and _is_drawn(p, attribute)]
                points.sort(key=lambda p: float(getattr(p, attribute)))
                best = pareto([(getattr(p, attribute), p.quality) for p in points], lower=lower)
                marks = tuple(
                    Mark(x=getattr(p, attribute), y=p.quality, text=_said(p, curve, is_own=p == own), is_best=good)
                    for p, good in zip(points, best, strict=True)
                )
                if marks:
                    lines.append(Line(name=f"{label}, {rule}", marks=marks))
        if not lines:
            continue
        if named := _preset_marks(report, curve, attribute):
            label = "presets" if report.presets else "near what moeify preset makes"
            lines.append(Line(name=label, marks=tuple(Mark(x=x, y=y, text=text) for x, y, text in named), shape="diamond"))
        title = f"{_words(curve.metric)} against {name}; the table below has the numbers"
        svg = chart(
            lines,
            x_label=f"{name}, share of dense",
            y_label=_words(curve.metric),
            level=curve.dense.quality,
            level_name="dense",
            title=title,
            lower=lower,
        )
        better = "Less" if lower else "More"
        caption = f"{better} is better. Filled: no other point of its line is cheaper and as good."
        if attribute == "latency_fraction" and (places := dict.fromkeys(p.machine for p in curve.points if p.machine)):
            caption += f" Timed on {'; '.join(places)}."
        found.append(
            {
                "name": name,
                "short": _SWITCH.get(attribute, name),
                "svg": svg,
                "caption": caption,
                "legend": [(line.name, line.shape) for line in lines],
            }
        )
    return found


def _preset_marks(report: Report, curve: Curve, attribute: str) -> list[tuple[float, float, str]]:
    """Cost, height and name. A preset that was measured on other batches stands as far from this dense model as from its own."""
    marks: list[tuple[float, float, str]] = []
    metric, dense = curve.metric, curve.dense.quality
    for preset in report.presets:
        x, quality = getattr(preset, attribute), preset.quality
        if preset.metric != metric or quality is None or not math.isfinite(quality) or x is None:
            continue
        text, own = f"{preset.name}: {_words(metric)} {quality:.4g} at {_percent(x)}", preset.dense_quality
        if own is not None and math.isfinite(own) and own > 0 and not math.isclose(own, dense, rel_tol=1e-6):
            text += f", measured where dense has {own:.4g}"
            quality = quality * dense / own if METRICS[metric].lower_is_better else quality + dense - own
        marks.append((x, quality, text))
    for name, point in report.suggested.items():
        if _is_drawn(point, attribute):
            x = getattr(point, attribute)
            marks.append((x, point.quality, f"{name}: {_words(metric)} {point.quality:.4g} at {_percent(x)}"))
    return marks


def _is_drawn(point: CurvePoint, attribute: str) -> bool:
    """Whether a point has this cost, and a picture has room for both numbers: a file may say anything finite."""
    x = getattr(point, attribute)
    return bool(x is not None and abs(x) < _LARGEST and abs(point.quality) < _LARGEST)


def _said(point: CurvePoint, curve: Curve, *, is_own: bool) -> str:
    own = ", the checkpoint's own" if is_own else ""
    timed = "" if point.latency_fraction is None else f", {_percent(point.latency_fraction)} of the time"
    return (
        f"{point.rule} {point.value:.4g}{own}: {_words(curve.metric)} {point.quality:.4g}, {_percent(point.flops_fraction)} of all FLOPs,"
        f" {_percent(point.ffn_flops_fraction)} of the FFNs', {_percent(point.active_fraction)} active{timed}"
    )


# ---- sections


def _sections(report: Report) -> list[_Section | None]:
    return [
        _points(report.curve),
        _presets(report.presets),
        _compared(report.table),
        _parts(report.curve),
        _experts(report.experts, skips_channels=report.skips_channels),
        _text(report.tokens, report.text_costs, skips_channels=report.skips_channels),
        _image(report.patches),
        *(_numbers(title, rows) for title, rows in report.layers.items()),
        _environment(report),
    ]


def _points(curve: Curve | None) -> _Section | None:
    if curve is None or not curve.points:
        return None
    own = curve.calibrated_point()
    header = ["rule", "knob", "active", "FFN FLOPs", "all FLOPs", "bytes a token", "time", _words(curve.metric), "over dense", "KL, nats"]
    rows = [
        _Row(
            cells=[
                point.rule,
                f"{point.value:.4g}",
                *(_percent(getattr(point, name)) for name in _SHARES),
                f"{point.quality:.4g}",
                f"{point.quality_ratio:.4f}",
                "" if point.kl is None else f"{point.kl:.4f}",
            ],
            is_own=point == own,
        )
        for point in sorted(curve.points, key=lambda p: p.flops_fraction)
    ]
    dense = ["100.0 %" if any(getattr(point, name) is not None for point in curve.points) else "" for name in _SHARES]
    rows.append(_Row(cells=["dense", "", *dense, f"{curve.dense.quality:.4g}", "1.0000", ""]))
    caption = "Every measured point; in bold the checkpoint's own rules. Shares are of the dense model."
    return _Section(id="points", title="The points", tables=[_Table(caption=caption, header=header, rows=rows).without_empty()])


def _presets(presets: Sequence[Preset]) -> _Section | None:
    if not presets:
        return None
    header = ["preset", "active", "all FLOPs", "bytes a token", "quality", "dense", "time over dense", "measured on"]
    rows = [
        _Row(
            cells=[
                preset.name,
                _percent(preset.active_fraction),
                _percent(preset.flops_fraction),
                _percent(preset.bytes_fraction),
                "" if preset.quality is None else f"{preset.quality:.4g} {_words(preset.metric or '')}",
                "" if preset.dense_quality is None else f"{preset.dense_quality:.4g}",
                "" if preset.latency_fraction is None else f"{preset.latency_fraction:.3f}",
                preset.machine or "",
            ]
        )
        for preset in presets
    ]
    table = _Table(caption="Named operating points: moeify.set_rule(model, NAME).", header=header, rows=rows, texts=["measured on"])
    return _Section(id="presets", title="Presets", tables=[table.without_empty()])


def _compared(table: AblationTable | None) -> _Section | None:
    if table is None:
        return None
    lower = METRICS[table.metric].lower_is_better
    what = AXES[table.cost]
    limit = f"{'at most' if lower else 'at least'} {table.dense + (table.within if lower else -table.within):.4g}"
    header = ["method", *(f"at {100 * share:g} %" for share in table.fractions), f"cost for {limit}"]
    rows = [_Row(cells=[row.name, *("" if q is None else f"{q:.4g}" for q in row.quality), _percent(row.cheapest)]) for row in table.rows]
    caption = f"{_words(table.metric).capitalize()} at shares of the {what}, and the smallest share that is good enough."
    return _Section(id="compared", title="Methods at equal cost", tables=[_Table(caption=caption, header=header, rows=rows)])


def _parts(curve: Curve | None) -> _Section | None:
    if curve is None or not (dense := curve.cost_by_part()):
        return None
    point = curve.calibrated_point()
    own = None if point is None else curve.cost_by_part(point)
    shown = {label: key for label, key in PARTS.items() if key in dense}
    header = ["part", "dense", *([] if own is None else ["calibrated"])]
    columns = [dense] if own is None else [dense, own]
    if any(one["experts"] for one in columns):
        shown = {label: key for label, key in shown.items() if any(one[key] for one in columns)}
    else:  # nothing was converted; what skips channels is an FFN as it was
        shown = {label.partition(" not")[0]: key for label, key in shown.items() if any(one[key] for one in columns)}
    rows = [_Row(cells=[label, *(f"{one[key] / 1e6:.3f}" for one in columns)]) for label, key in shown.items()]
    rows.append(_Row(cells=["all", *(f"{sum(one.values()) / 1e6:.3f}" for one in (dense, own) if one is not None)], is_own=True))
    table = _Table(caption="Millions of FLOPs a token; a multiplication and an addition are two.", header=header, rows=rows)
    return _Section(id="parts", title="Where the FLOPs are", tables=[table])


def _experts(experts: ExecutedExperts | None, *, skips_channels: bool) -> _Section | None:
    if experts is None:
        return None
    from .chart import strip

    tables = []
    for label, layers in experts.settings.items():
        rows = [
            _Row(
                cells=[
                    name,
                    strip(found.histogram, found.mean),
                    *(_percent(value) for value in (found.mean, found.p5, found.p50, found.p95)),
                ]
            )
            for name, found in layers.items()
        ]
        share = "kept" if skips_channels else "executed"
        header = ["layer", f"tokens by {share} share, 0 to 100 %", "mean", "5 % of tokens below", "median", "95 % below"]
        tables.append(_Table(caption=f"Setting: {label}", header=header, rows=rows, pictures=header[1:2]))
    of = "input channels that they keep, weighed by parameters" if skips_channels else "neurons that they execute"
    text = f"A strip has all tokens of a layer by the share of its {of}, darker where there are more; the bar is the mean."
    title = "Kept channels by layer" if skips_channels else "Executed experts by layer"
    return _Section(id="experts", title=title, texts=[text], tables=tables)


def _text(tokens: Sequence[str] | None, costs: TokenCosts | None, *, skips_channels: bool) -> _Section | None:
    if tokens is None or costs is None:
        return None
    painted, scale = tokens_html(tokens, costs)
    of = "linear layers that skip channels, a share of the dense ones'" if skips_channels else "MoE layers, a share of the dense FFNs'"
    text = f"Each token by the FLOPs of its {of}; the numbers are in the tables below."
    shares = [(i, share) for i, share in enumerate(token_shares(tokens, costs)) if not math.isnan(share)]
    header = ["position", "token", "cost over dense"]
    rows = [_Row(cells=[str(i), json.dumps(tokens[i], ensure_ascii=False), f"{share:.3f}"]) for i, share in shares]
    dearest = [row for row, _ in sorted(zip(rows, shares, strict=True), key=lambda found: -found[1][1])[:10]]
    tables = [
        _Table(caption="The dearest tokens.", header=header, rows=dearest, texts=["token"]),
        _Table(caption="Every token.", header=header, rows=rows, texts=["token"], folded=f"All {len(rows)} tokens with their costs"),
    ]
    return _Section(id="text", title="What each token of a text costs", texts=[text], tokens=painted, scale=scale, tables=tables)


def _image(picture: Path | None) -> _Section | None:
    if picture is None:
        return None
    try:
        data = base64.b64encode(picture.read_bytes()).decode()
    except OSError as error:
        raise CheckpointError(f"cannot read '{picture}': {error.strerror}.") from error
    alt = "The image as the model got it, and beside it its patches coloured by the FLOPs of their sparse layers"
    return _Section(id="image", title="What each patch of an image costs", picture=data, alt=alt)


def _numbers(title: str, rows: Mapping[str, Mapping[str, float]]) -> _Section | None:
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [_Row(cells=[layer, *(f"{row[name]:.4f}" if name in row else "" for name in names)]) for layer, row in rows.items()]
    table = _Table(caption=f"{title} by layer.", header=["layer", *(name.replace("_", " ") for name in names)], rows=cells)
    return _Section(id=title.lower().replace(" ", "-"), title=title, tables=[table])


def _environment(report: Report) -> _Section | None:
    if not report.facts and not report.commands:
        return None
    rows = [_Row(cells=[name, value]) for name, value in report.facts.items()]
    tables = [_Table(caption="What the numbers were measured with.", header=["what", "value"], rows=rows, texts=["value"])] if rows else []
    return _Section(id="environment", title="Environment and commands", tables=tables, code="\n".join(report.commands))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _words(metric: str) -> str:
    return metric.replace("_", " ")
