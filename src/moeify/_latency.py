"""Clocks: medians of interleaved runs, so that what slows the machine slows every side alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call."""

    median_ms: float
    """Half of the calls were faster."""
    p20_ms: float
    """A fifth of the calls were faster."""
    p80_ms: float
    """Four fifths of the calls were faster."""


def measure_ms(
    fns: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3, sync: Callable[[], None] | None = None
) -> dict[str, Latency]:
    """Time of each callable: ``rounds`` rounds, each of which calls all of them once.

    Args:
        fns: what to time, by name.
        rounds: timed calls of each, >= 1.
        warmup: untimed calls of each before.
        sync: waits for the device (`torch.cuda.synchronize`) before each reading of the clock; None on the CPU.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    wait = sync or _nothing
    times: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(warmup + rounds):
        for name, fn in fns.items():
            wait()
            start = time.perf_counter()
            fn()
            wait()
            if i >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(ms) for name, ms in times.items()}


def _summary(ms: list[float]) -> Latency:
    ordered = sorted(ms)
    last = len(ordered) - 1
    return Latency(median_ms=statistics.median(ordered), p20_ms=ordered[round(0.2 * last)], p80_ms=ordered[round(0.8 * last)])


def _nothing() -> None:
    return None
