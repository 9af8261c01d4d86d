"""Curves of loss against cost, one a layer, and the cheapest way to stay within a budget of all of them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

FINE = 64
"""Pieces into which a curve of few measured points is cut before its hull is taken."""


class Point(NamedTuple):
    """One setting of a layer."""

    fraction: float
    """Of its neurons or channels that run, in [0, 1]."""
    cost: float
    """In the unit of the budget."""
    loss: float
    """What the model loses with the layer there."""


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of loss over cost, from the cheapest point to the least loss; dearer points that lose no less are left out."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if best and point.loss >= best[-1].loss:
            continue
        while len(best) > 1 and _slope(best[-2], best[-1]) >= _slope(best[-2], point):
            best.pop()
        best.append(point)
    return best


def spread(curves: Mapping[str, Sequence[Point]], budget: float) -> dict[str, float]:
    """The fraction of every layer that together lose least within a budget.

    min sum_l loss_l(c_l)   subject to   sum_l c_l <= budget

    on the curves' convex hulls, where it is exact: from full cost downwards, the piece of whichever hull gives up least loss for each unit
    of cost that it saves goes first (the order in which a Lagrangian multiplier would take them), the last one in part.

    Args:
        curves: of each layer, at least one point; costs in one unit.
        budget: of all layers. Below the sum of the cheapest points these are the answer.

    Returns:
        Fraction of each layer, on the straight line between two points of its hull.
    """
    hulls = {name: hull(points) for name, points in curves.items()}
    chosen = {name: points[-1] for name, points in hulls.items()}
    excess = sum(point.cost for point in chosen.values()) - budget
    pieces = [(-_slope(low, high), i, name, low) for name, points in hulls.items() for i, (low, high) in enumerate(_pairs(points))]
    # Steeper pieces of one hull are at its cheap end, so its own come in order; equal ones of one hull from the dear end on.
    for _, _, name, low in sorted(pieces, key=lambda piece: (piece[0], -piece[1])):
        if excess <= 0:
            break
        now = chosen[name]
        share = min(1.0, excess / (now.cost - low.cost)) if now.cost > low.cost else 1.0
        excess -= share * (now.cost - low.cost)
        chosen[name] = Point(*(b + share * (a - b) for a, b in zip(low, now, strict=True)))
    return {name: point.fraction for name, point in chosen.items()}


def through(measured: Mapping[float, float], cost: Callable[[float], float]) -> list[Point]:
    """A fine curve through a layer's measured losses: the root of the loss is a straight line between neighbouring fractions.

    A divergence from the dense model is quadratic in what the layer leaves out, so its root is the nearly straight one. Losses are made
    monotone first: more that runs never counts as worse.

    Args:
        measured: loss >= 0 by fraction.
        cost: of a fraction.
    """
    fractions = sorted(measured)
    roots = [math.sqrt(max(0.0, measured[f])) for f in fractions]
    for i in range(len(roots) - 2, -1, -1):
        roots[i] = max(roots[i], roots[i + 1])
    return [Point(f, cost(f), line(fractions, roots, f) ** 2) for f in _between(fractions[0], fractions[-1])]


def around(middle: float, changes: Mapping[float, float], cost: Callable[[float], float]) -> list[Point]:
    """A fine curve through a working point: the parabola of the measured changes of loss where there are two, else the line.

    Args:
        middle: the layer's fraction now, where the change is 0.
        changes: change of loss by other fraction, one or two of them.
        cost: of a fraction.
    """
    known = {middle: 0.0, **changes}
    fractions = _between(min(known), max(known))
    return [Point(f, cost(f), _lagrange(known, f)) for f in fractions]


def line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on the straight lines that join the points, xs ascending; the nearest end's beyond them."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_right(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def _lagrange(known: Mapping[float, float], x: float) -> float:
    return sum(y * math.prod((x - other) / (at - other) for other in known if other != at) for at, y in known.items())


def _between(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / FINE for i in range(FINE + 1)] if high > low else [low]


def _slope(low: Point, high: Point) -> float:
    """Loss over cost; -inf where the dearer point costs no more."""
    return (high.loss - low.loss) / (high.cost - low.cost) if high.cost > low.cost else -math.inf


def _pairs(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    return list(zip(points, points[1:], strict=False))
