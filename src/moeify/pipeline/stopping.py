"""Signals that end training between two steps instead of within one."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a signal has asked for the end, and which."""

    def __init__(self) -> None:
        self.signum = 0
        """Which; 0 for none."""

    def __call__(self) -> bool:
        """Whether training is to save and end."""
        return self.signum != 0


@contextmanager
def stopping(*, repeats_s: float = 0.0) -> Iterator[Stop]:
    """SIGTERM and SIGINT are remembered, once; a second one acts at once, as it does outside. In other threads nothing changes.

    Args:
        repeats_s: what comes so soon after the first signal is the same one: a terminal or a scheduler tells every process, and torchrun,
            which is told as well, passes it on.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    asked_at = 0.0

    def remember(number: int, _frame: Any) -> None:
        nonlocal asked_at
        is_second = stop.signum != 0
        if is_second and time.monotonic() - asked_at < repeats_s:
            return
        if not is_second:
            stop.signum, asked_at = number, time.monotonic()
        if is_second or repeats_s == 0:
            for each, handler in before.items():
                signal.signal(each, handler)
        if is_second:
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
