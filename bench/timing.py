"""A clock that compares: all candidates in turn, again and again, so that a busy moment hits every one of them."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Seconds of one candidate's runs."""

    median: float
    p20: float
    p80: float


def interleave(fns: Mapping[str, Callable[[], object]], *, repeats: int = 20, warmup: int = 2) -> dict[str, Spread]:
    """Run every function ``repeats`` times, one after another in each round.

    Args:
        fns: what to time, by name.
        repeats: rounds that count.
        warmup: rounds that do not.

    Returns:
        Median and 20th and 80th percentile of the wall-clock seconds of each. The device is synchronised before every reading.
    """
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(warmup + repeats):
        for name, fn in fns.items():
            _synchronise()
            start = time.perf_counter()
            fn()
            _synchronise()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: _spread(values) for name, values in seconds.items()}


def _spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.2, 0.8)]
    return Spread(*at)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
