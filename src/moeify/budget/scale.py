"""The scale of a model's active fractions at which a clock, whose readings are noisy, says what was asked."""

import math
import statistics
from collections.abc import Callable

MOST_SCALES = 12
READINGS = 3
"""Of the clock, that say what a scale takes."""

_GROWTH = 1.25
_MOST_GROWTH = 4.0  # from one scale to the next: a line through one reading says nothing of what lies further off
_CLOSE = 1.02  # ends of a bracket with nothing to try in between


def find_scale(
    read: Callable[[float], float], target: float, *, base: float, least: float, most: float, tolerance: float
) -> tuple[float, float]:
    """The scale at which ``read`` says ``target``, or the nearest that was found, and the median of readings taken after it was chosen.

    Time grows with the scale. 1 is tried first, since that is where the time was predicted; next where the line from ``base`` at scale 0
    through the last reading meets the target. While that falls short on the same side, scales change by at least a factor, 1.25, whose
    exponent doubles each time; between two ends, where the line leads outside or came from the same side twice, their geometric mean.

    A reading is never the result: one near the target is read afresh, `READINGS` times, and their median counts. Nor is it an end for
    good: where the line from another reading leads beyond an end, where two ends meet, and before giving up, ends are read afresh.

    Args:
        read: a reading of the clock at a scale, > 0.
        target: what it should be, > 0.
        base: estimate of the time at scale 0, from which lines are drawn; a wrong one costs readings.
        least, most: beyond them nothing changes; least <= 1 <= most.
        tolerance: of the ratio to the target; within half of it the search ends.

    Cost: at most `MOST_SCALES` scales of one reading, or 1 + `READINGS` near the target and where ends are read afresh.
    """
    seen: dict[float, float] = {}
    sure: dict[float, float] = {}  # medians of fresh readings

    def reread(*scales: float) -> None:
        for one in scales:
            if one in seen and one not in sure:
                sure[one] = seen[one] = statistics.median(read(one) for _ in range(READINGS))

    def is_near(ratio: float, share: float = 1.0) -> bool:
        return abs(ratio / target - 1) <= share * tolerance

    def ends() -> tuple[float, float]:
        low = max((one for one, ratio in seen.items() if ratio < target), default=0.0)
        return low, min((one for one, ratio in seen.items() if ratio >= target), default=math.inf)

    scale, factor = 1.0, _CLOSE
    was_low: bool | None = None
    for _ in range(MOST_SCALES):
        seen[scale] = read(scale)
        if is_near(seen[scale]):
            reread(scale)
            if is_near(sure[scale], 0.5):
                break
        low, high = ends()
        wanted = _on_line(scale, seen[scale], target, base)
        if high <= low * _CLOSE or low >= most or high <= least:
            reread(low, high)
        elif wanted is not None and not low < wanted < high:
            reread(low if wanted <= low else high)
        low, high = ends()
        if low >= most or high <= least or (high <= low * _CLOSE and {low, high} <= sure.keys()):
            break
        is_low = seen[scale] < target
        wanted = _on_line(scale, seen[scale], target, base)
        if low > 0 and high < math.inf:
            inside = wanted is not None and low * _CLOSE < wanted < high / _CLOSE
            scale = wanted if wanted is not None and inside and is_low != was_low else math.sqrt(low * high)
            was_low = is_low
            continue
        if low > 0:
            scale = min(max(wanted or low * _GROWTH, low * factor), low * _MOST_GROWTH, most)
        else:
            scale = max(min(wanted or high / _GROWTH, high / factor), high / _MOST_GROWTH, least)
        factor = _GROWTH if factor == _CLOSE else factor**2
    if not any(map(is_near, sure.values())):
        reread(*ends())
    best = min(sure, key=lambda one: abs(sure[one] - target))
    return best, sure[best]


def _on_line(scale: float, ratio: float, target: float, base: float) -> float | None:
    """Where the line from ``base`` at 0 through a reading meets the target; None where it does not."""
    return scale * (target - base) / (ratio - base) if min(ratio, target) > base else None
