"""Charts as SVG that take their colours from the page they stand in, so that light and dark are one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .html import Markup

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 46
_SHADES = 6


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a chart."""

    x: float
    y: float
    text: str
    """What it is, for the pointer and for readers of the page aloud."""
    is_best: bool = True
    """On the Pareto front: filled."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points that belong together, drawn in this order."""

    name: str
    marks: tuple[Mark, ...]
    shape: str = "circle"
    """'circle', or 'diamond' for points that have a name of their own, which is written beside them; those are not joined."""


def chart(lines: Sequence[Line], *, x_label: str, y_label: str, level: float, level_name: str, title: str, lower: bool) -> Markup:
    """Quality against cost.

    Args:
        lines: at least one mark in all.
        x_label: cost, as shares; the axis begins at 0.
        y_label: quality.
        level: drawn as a dashed line across, such as the dense model's quality.
        level_name: its name.
        title: what a screen reader says in place of the picture.
        lower: whether less is better; what is far worse than the level and than most points is cut off, with an arrow in its place.

    Returns:
        An ``<svg>`` element; everything from outside is escaped.
    """
    marks = [mark for line in lines for mark in line.marks]
    low, high = _bounds([mark.y for mark in marks] + [level], level=level, lower=lower)
    right = max(1.0, *(mark.x for mark in marks)) * 1.01
    x_ticks, y_ticks = [x for x in _ticks(0.0, right) if x <= right], _ticks(low, high)
    low, high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * x / right, 1)

    def py(y: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - min(max(y, low), high)) / (high - low), 1)

    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    out += [f'<path class="grid" d="M{_LEFT} {py(y)}H{_WIDTH - _RIGHT}"/>' for y in y_ticks]
    out += [f'<text x="{_LEFT - 8}" y="{py(y) + 4}" text-anchor="end">{_number(y)}</text>' for y in y_ticks]
    # On a phone letters are half as large again: those at the ends must not leave the picture, or run into the other axis.
    anchors = ["start" if x == 0 else "end" if px(x) > _WIDTH - 2 * _RIGHT else "middle" for x in x_ticks]
    out += [
        f'<text x="{px(x)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}">{_number(100 * x)}\u2009%</text>'
        for x, anchor in zip(x_ticks, anchors, strict=True)
    ]
    out += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle" class="axis">{escape(x_label)}</text>',
        f'<text transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle" class="axis">'
        f"{escape(y_label)}</text>",
        f'<path class="level" d="M{_LEFT} {py(level)}H{_WIDTH - _RIGHT}"/>',
        f'<text x="{_LEFT + 6}" y="{py(level) - 6}" class="axis">{escape(level_name)}</text>',
    ]
    for i, line in enumerate(lines):
        colour = f"c{i % 6} d{i % 6}"
        if line.shape == "circle" and len(line.marks) > 1:
            path = "L".join(f"{px(mark.x)} {py(mark.y)}" for mark in line.marks)
            out.append(f'<path class="line {colour}" d="M{path}"/>')
        for mark in line.marks:
            beyond = 1 if mark.y > high else -1 if mark.y < low else 0
            out.append(_drawn(line, mark, px(mark.x), py(mark.y), colour, beyond=beyond))
    return Markup("".join([*out, "</svg>"]))


def _drawn(line: Line, mark: Mark, x: float, y: float, colour: str, *, beyond: int) -> str:
    """One mark; ``beyond`` 1 or -1: it is above or below the axis, and an arrow in its place."""
    said = f"<title>{escape(mark.text)}</title>"
    if beyond:
        return f'<path class="mark {colour}" d="M{x} {y + 2 * beyond}l-5 {9 * beyond}h10z">{said}</path>'
    if line.shape == "diamond":
        name = escape(mark.text.partition(":")[0])
        diamond = f'<path class="mark {colour}" d="M{x} {y - 7}l7 7l-7 7l-7 -7z">{said}</path>'
        return f'{diamond}<text x="{x}" y="{y - 12}" text-anchor="middle">{name}</text>'
    return f'<circle class="mark {colour}{"" if mark.is_best else " hollow"}" cx="{x}" cy="{y}" r="4.5">{said}</circle>'


def strip(histogram: Sequence[int], mean: float, *, bins: int = 50) -> Markup:
    """How tokens are spread over shares of a layer's neurons, as a strip: darker where there are more, a bar at the mean.

    Args:
        histogram: tokens by bin of equal width over [0, 1].
        mean: of the shares.
        bins: drawn; divides the histogram's.
    """
    step = len(histogram) // bins
    counts = [sum(histogram[i : i + step]) for i in range(0, len(histogram), step)]
    most = math.log1p(max(counts))
    shades: dict[int, list[int]] = {}
    for i, count in enumerate(counts):
        if count:
            shades.setdefault(math.ceil(_SHADES * math.log1p(count) / most), []).append(i)
    # One path a shade: a page has hundreds of strips, and must stay small.
    cells = "".join(
        f'<path fill-opacity="{0.12 + 0.88 * shade / _SHADES:.2f}" d="{"".join(f"M{i} 0h1v10h-1z" for i in places)}"/>'
        for shade, places in sorted(shades.items())
    )
    bar = f'<rect class="mean" x="{round(bins * mean, 1) - 0.3}" width="0.6" height="10"/>'
    return Markup(f'<svg class="strip" viewBox="0 0 {bins} 10" preserveAspectRatio="none" aria-hidden="true">{cells}{bar}</svg>')


def pareto(points: Sequence[tuple[float, float]], *, lower: bool) -> list[bool]:
    """For each (cost, quality), whether none is as cheap and better, or as good and cheaper.

    Args:
        points: finite numbers.
        lower: whether less quality is better.
    """

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        x, y = (a[0] - b[0], (a[1] - b[1]) * (1 if lower else -1))
        return x <= 0 and y <= 0 and (x < 0 or y < 0)

    return [not any(beats(other, point) for other in points) for point in points]


def _bounds(values: Sequence[float], *, level: float, lower: bool) -> tuple[float, float]:
    """Ends of the axis: what is far off would press everything else together."""
    away = sorted(abs(value - level) for value in values)
    reach = max(6 * away[len(away) // 2], 0.5 * abs(level), 1e-9)
    low, high = min(values), max(values)
    if lower:
        high = min(high, level + reach)
    else:
        low = max(low, level - reach)
    margin = 0.05 * max(high - low, 1e-3 * abs(level), 1e-9)
    return low - margin, high + margin


def _ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers, the first at or below ``low``, the last at or above ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212")
