"""What the command line writes while it works."""

import io

from tqdm import auto
from tqdm.std import tqdm

from moeify import _terminal, cli


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_start_after_two_seconds_are_sparse_and_have_the_time_left():
    stream, clock = io.StringIO(), Clock()
    with _terminal.Lines(stream, every_s=10, clock=clock).task("fit", total=100) as task:
        for _ in range(100):
            clock.now += 0.5
            task.advance(1)
    assert stream.getvalue().splitlines() == [
        "fit: 4/100, 48 s left",
        "fit: 24/100, 38 s left",
        "fit: 44/100, 28 s left",
        "fit: 64/100, 18 s left",
        "fit: 84/100, 8 s left",
        "fit: done in 50 s",
    ]


def test_lines_of_short_work_are_none():
    stream, clock = io.StringIO(), Clock()
    with _terminal.Lines(stream, clock=clock).task("fit", total=2) as task:
        clock.now = 1.9
        task.advance(2)
    assert stream.getvalue() == ""


def test_bars_nest_and_leave_the_terminal_as_it_was(capsys):
    bars = _terminal.Bars()
    with bars.task("outer", total=2) as outer:
        with bars.task("inner", total=3) as inner:
            inner.advance(3)
        outer.advance(2)
    with bars.task("again", total=1) as again:
        again.advance(1)
    err = capsys.readouterr().err
    assert all(label in err for label in ("outer", "inner", "again"))
    assert "eta" in err


def test_bars_of_other_libraries_are_hidden_where_nobody_watches(monkeypatch, capsys):
    assert list(auto.tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)  # to be given back
    cli._hide_bars()
    assert list(auto.tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
