"""What the command line writes: progress on stderr, results on stdout."""

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ._progress import Progress, Task

_WIDEST = 140
_LONG_CELL = 40  # of sentences: a table of those is no table


def make_progress() -> Progress:
    """Bars with an ETA where somebody watches, a line now and then where not."""
    return Bars() if sys.stderr.isatty() else Lines(sys.stderr)


def show(result: Any, *, as_json: bool) -> None:
    """Print a result: JSON for machines, tables and lines for people."""
    if as_json:
        print(json.dumps(result, default=_plain))
    elif isinstance(result, str):
        print(result)
    else:
        print("\n".join(_lines(result if isinstance(result, Mapping) else {"curve": result}, width=width())))


def width() -> int:
    """Columns of a line: the terminal's, or those that COLUMNS names; a result that goes into a file has some more than most terminals."""
    return min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)


class Bars:
    """Progress bars with an ETA on a terminal; nested tasks are shown below each other."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "eta", TimeRemainingColumn())
        self._bars = RichProgress(*columns, console=Console(stderr=True))
        self._open = 0

    @contextmanager
    def task(self, label: str, *, total: int) -> Iterator[Task]:
        """One bar."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        bar = self._bars.add_task(label, total=total)
        try:
            yield _Advance(lambda steps: self._bars.advance(bar, steps))
        finally:
            self._open -= 1
            if self._open == 0:
                self._bars.stop()


class Lines:
    """A line after two seconds, then one every ten: a log stays readable. Work of under two seconds says nothing."""

    def __init__(self, stream: TextIO, *, first_s: float = 2.0, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._first_s = first_s
        self._every_s = every_s
        self._clock = clock

    @contextmanager
    def task(self, label: str, *, total: int) -> Iterator[Task]:
        """Lines of one task."""
        start = self._clock()
        done, due = 0, start + self._first_s

        def advance(steps: int) -> None:
            nonlocal done, due
            done += steps
            now = self._clock()
            if now >= due and done > 0 and (total == 0 or done < total):
                due = now + self._every_s
                left = f"{done}/{total}, {(now - start) * (total - done) / done:.0f} s left" if total else f"{done} so far"
                print(f"{label}: {left}", file=self._stream, flush=True)

        yield _Advance(advance)
        if self._clock() - start >= self._first_s:
            print(f"{label}: done in {self._clock() - start:.0f} s", file=self._stream, flush=True)


class _Advance:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance


def _plain(value: Any) -> Any:
    """JSON value of what `json` does not know: a curve."""
    return value.to_json()


def _lines(value: Mapping[str, Any], indent: str = "", *, width: int) -> Iterator[str]:
    rows = list(value.values())
    if len(rows) > 1 and all(isinstance(row, Mapping) for row in rows) and len({tuple(row) for row in rows}) == 1:
        # the same things measured in many layers
        yield from _table([{"": name, **_flat(row)} for name, row in value.items()], indent, width=width)
        return
    for key, item in value.items():
        if _is_bulk(item):
            continue
        if hasattr(item, "to_json"):
            from .report import curve_lines

            yield from (indent + line for line in curve_lines(item))
        elif isinstance(item, Mapping) and item:
            yield f"{indent}{key}:"
            yield from _lines(item, indent + "  ", width=width)
        elif isinstance(item, list) and item and all(isinstance(row, Mapping) for row in item):
            yield f"{indent}{key}:"
            yield from _table(item, indent + "  ", width=width)
        else:
            yield from _wrapped(f"{key}: {_cell(item)}", indent, width=width)


def _wrapped(text: str, indent: str, *, width: int) -> list[str]:
    """A line of text, broken between words where it is longer."""
    if len(indent) + len(text) <= width:
        return [indent + text]
    hanging = indent + "  "
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _is_bulk(value: Any) -> bool:
    """Long rows of numbers, for machines only: --json has them."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_bulk(item) for item in value.values())
    return isinstance(value, list) and len(value) > 12 and not any(isinstance(item, Mapping) for item in value)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers as one cell each: "mean 12, p50 11, p95 20"."""
    return {k: ", ".join(f"{n} {_cell(x)}" for n, x in v.items()) if isinstance(v, Mapping) else v for k, v in row.items()}


def _table(rows: Sequence[Mapping[str, Any]], indent: str, *, width: int) -> Iterator[str]:
    """Rows in columns; where that is wider than the screen, as several tables of the same rows, or with sentences one line a value."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    fits = len(indent) + sum(widths) + 2 * (len(widths) - 1) <= width
    if not fits and (max(widths) > _LONG_CELL or len(columns) == 1):
        for row in cells[1:]:
            yield from _wrapped(row[0], indent, width=width)
            for name, cell in zip(columns[1:], row[1:], strict=True):
                yield from _wrapped(f"{name}: {cell}", f"{indent}  ", width=width)
        return
    parts, used = [[0]], 0
    for i in range(1, len(columns)):
        used += 2 + widths[i]
        if len(indent) + widths[0] + used > width and len(parts[-1]) > 1:
            parts.append([0])
            used = 2 + widths[i]
        parts[-1].append(i)
    for part in parts:
        for line in cells:
            yield indent + "  ".join(line[i].ljust(widths[i]) for i in part).rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value)) or "none"
    return str(value)
