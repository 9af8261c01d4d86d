"""Rows, console lines and other listeners of pre-training."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeify.errors import CheckpointError, ConfigError
from moeify.pipeline import pretrain_log as log
from moeify.train import TrainConfig


def test_rows_of_steps_that_are_done_again_are_dropped_and_half_a_line_too(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = log.JsonLines(path, start=0)
    for step in range(1, 8):
        lines.write("decision", step - 1, {})
        lines.write("step", step, {"loss": float("nan") if step == 2 else 1.0})
    lines.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    log.JsonLines(path, start=4).close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["kind"] == "decision"] == [0, 1, 2, 3]  # of step 4 it comes after the state
    assert rows[3]["loss"] is None


def test_the_console_has_speed_mode_and_the_time_left():
    now, said = [100.0], []
    console = log.Console(said.append, steps=100, clock=lambda: now[0])
    console.begin(20, 2000)
    for step in range(21, 61):
        now[0] += 1.0
        console.step(step, loss=2.0, lr=1e-3, tokens=100 * step, mode="sparse" if step > 50 else "dense")
    assert said[0] == "step 23/100: loss 2.0000, lr 0.001, 100 tokens/s, dense, 77 s left"
    assert [line.split("/")[0] for line in said] == ["step 23", "step 33", "step 43", "step 53"]
    assert "sparse" in said[-1]


@pytest.mark.parametrize(("seconds", "text"), [(45.2, "45 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_durations(seconds, text):
    assert log.duration(seconds) == text


def test_weights_and_biases_is_told_where_it_is_asked_for(tmp_path, monkeypatch):
    if not log.importlib.util.find_spec("wandb"):
        with pytest.raises(ConfigError, match="wandb is not installed"):
            log.check_wandb()
    told = []
    run = SimpleNamespace(
        log=told.append, finish=lambda: told.append("end"), define_metric=lambda name, step_metric: told.append(step_metric)
    )
    fake = SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(log, "check_wandb", lambda: None)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in (*folders, folders[0]):
        folder.mkdir(exist_ok=True)
        sink = log.WandB("project", name="out", folder=folder, config={"a": 1})
        sink.scalars(3, {"loss": 1.0})
        sink.close()
    first, second, again = told[::4]
    assert first == {"project": "project", "name": "out", "id": first["id"], "resume": "allow", "config": {"a": 1}}
    assert again == first
    assert second["id"] != first["id"]
    assert told[1:4] == ["step", {"loss": 1.0, "step": 3}, "end"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_is_said_once_and_everybody_is_closed(tmp_path):
    lines = log.JsonLines(tmp_path / "log.jsonl", start=0)
    lines._file.close()
    lines._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  # close() of it is what is tested
    closed = []
    failing = SimpleNamespace(close=lambda: (closed.append("first"), (_ for _ in ()).throw(OSError(28, "No space left on device"))))
    other = SimpleNamespace(close=lambda: closed.append("second"))
    told = log.RunLog(TrainConfig(steps=2), None, lines, [failing, other], start=0, tokens=[1, 1], per_epoch=2, say=print)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        lines.write("step", 1, {"loss": 1.0})
    told.close()
    assert closed == ["first", "second"]


@pytest.mark.skipif(not log.has_tensorboard(), reason="tensorboard is not installed")
def test_tensorboard_gets_scalars(tmp_path):
    board = log.TensorBoard(tmp_path, start=0)
    board.scalars(1, {"loss": 2.0})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


def test_tensorboard_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(log, "has_tensorboard", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'moeify\[train\]'"):
        log.check_tensorboard()
