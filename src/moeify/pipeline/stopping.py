"""Signals that end training between two steps instead of within one."""

import signal
import threading
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
def stopping() -> Iterator[Stop]:
    """SIGTERM and SIGINT are remembered, once; a second one acts at once, as it does outside. In other threads nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def remember(number: int, _frame: Any) -> None:
        stop.signum = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
