"""Numbers of several seeds in the words of claims and page."""

from collections.abc import Sequence
from statistics import fmean, stdev


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def signed(values: Sequence[float], *, digits: int = 4) -> str:
    """Mean and standard deviation over the seeds; of a single one no deviation is known."""
    return f"{fmean(values):+.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")


def unsigned(values: Sequence[float]) -> str:
    """The same of what is never negative."""
    return signed(values)[1:]


def in_percent(values: Sequence[float]) -> str:
    """The same in percent."""
    return f"{100 * fmean(values):.3g}" + (f" ± {100 * spread(values):.2g}" if len(values) > 1 else "") + " %"


def percent(share: float) -> str:
    """One share."""
    return f"{100 * share:.3g} %"


def each_in_percent(shares: Sequence[float | None]) -> str:
    """Shares from which on something is reached, in a list; None where it never is."""
    return ", ".join("never" if share is None else percent(share) for share in shares)
