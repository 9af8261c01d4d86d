"""Stages are run once, found again by what they were made from, continued after a kill, and never deleted."""

import errno
import json
import os
import shutil
import threading

import pytest

from moeify import _files as module_files
from moeify._files import locked
from moeify._progress import NO_PROGRESS
from moeify.errors import CheckpointError, ConfigError
from moeify.pipeline import stages as module
from moeify.pipeline.stages import Stages, StageTakenError, differences, key_of, write_json


class Listener:
    """Remembers the labels of tasks."""

    def __init__(self):
        self.labels = []

    def task(self, label, *, total):
        self.labels.append(label)
        return NO_PROGRESS.task(label, total=total)


def open_stages(root, *, owner="r", said=None, progress=NO_PROGRESS, total=9, wait=True):
    with NO_PROGRESS.task("", total=total) as overall:
        say = (said if said is not None else []).append
        return Stages(root, owner=owner, total=total, progress=progress, overall=overall, say=say, wait=wait)


def add(path, progress):
    """Counts its runs in a file."""
    runs = int((path / "runs").read_text()) if (path / "runs").exists() else 0
    (path / "runs").write_text(str(runs + 1))
    return {"answer": 42}


def test_a_finished_stage_is_not_run_again_also_under_another_name(tmp_path):
    first = open_stages(tmp_path).run("seed0/a", {"x": 1}, add)
    stages = open_stages(tmp_path)
    assert stages.run("seed0/a", {"x": 1}, add) == first
    assert stages.run("seed1/b", {"x": 1}, add) == first
    assert (first.folder / "runs").read_text() == "1"
    assert first.result == {"answer": 42}
    assert not (tmp_path / "seed1").exists()


def test_write_json_waits_for_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "sync", lambda path: seen.append((path.read_text(), (tmp_path / "a").exists())))
    write_json(tmp_path / "a", {"x": 1})
    assert seen == [('{\n "x": 1\n}\n', False)]
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1}


def test_a_killed_stage_continues_in_its_folder_under_another_name(tmp_path):
    def killed(path, progress):
        add(path, progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_stages(tmp_path).run("seed0/a", {"x": 1}, killed)
    said = []
    stage = open_stages(tmp_path, said=said).run("seed0/b", {"x": 1}, add)
    assert (stage.folder / "runs").read_text() == "2"
    assert said == ["seed0/b: continues where it stopped."]


def test_changed_inputs_run_again_say_why_and_keep_the_earlier_stage(tmp_path):
    said = []
    old = open_stages(tmp_path).run("seed0/a", {"train": {"lr": 0.1, "steps": 5}}, add)
    new = open_stages(tmp_path, said=said).run("seed0/a", {"train": {"lr": 0.2, "steps": 5}}, add)
    assert old.folder != new.folder
    assert said == [f"seed0/a: runs again (train.lr 0.1 -> 0.2); its earlier state stays in '{old.folder}'."]
    said.clear()
    assert open_stages(tmp_path, said=said).run("seed0/a", {"train": {"lr": 0.1, "steps": 5}}, add) == old
    assert said == []
    assert [(stage.folder / "runs").read_text() for stage in (old, new)] == ["1", "1"]


def test_a_stage_is_compared_with_what_ran_last(tmp_path):
    folders = {lr: open_stages(tmp_path).run("seed0/a", {"lr": lr}, add).folder for lr in (1, 2)}
    for last, new in ((1, 3), (2, 4)):
        for lr, folder in folders.items():
            os.utime(folder / "inputs.json", ns=(0, 10**9 * (2 if lr == last else 1)))
        said = []
        changed = open_stages(tmp_path, said=said).run("seed0/a", {"lr": new}, add)
        assert said == [f"seed0/a: runs again (lr {last} -> {new}); its earlier state stays in '{folders[last]}'."]
        shutil.rmtree(changed.folder)


def test_a_stage_whose_name_begins_another_is_not_its_earlier_state(tmp_path):
    said = []
    open_stages(tmp_path).run("seed0/sparsify.relu-hoyer", {"x": 1}, add)
    open_stages(tmp_path, said=said).run("seed0/sparsify.relu", {"x": 2}, add)
    assert said == []


def test_a_killed_stage_gets_its_folder_back_and_its_time_is_summed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def killed(path, progress):
        add(path, progress)
        with progress.task("train", total=3) as task:
            now[0] += 7
            task.advance(1)  # written: the clock beats every five seconds
            now[0] += 3
            task.advance(1)
        raise KeyboardInterrupt

    def finished(path, progress):
        now[0] += 2
        return add(path, progress)

    said = []
    with pytest.raises(KeyboardInterrupt):
        open_stages(tmp_path).run("seed0/a", {"x": 1}, killed)
    stage = open_stages(tmp_path, said=said).run("seed0/a", {"x": 1}, finished)
    assert (stage.folder / "runs").read_text() == "2"
    assert said == ["seed0/a: continues where it stopped."]
    assert stage.seconds == 9
    assert open_stages(tmp_path).run("seed0/a", {"x": 1}, finished).seconds == 9


def test_the_scratch_of_a_stage_stays_until_it_is_recorded(tmp_path, monkeypatch):
    def work(path, progress):
        (path / "scratch").mkdir(exist_ok=True)
        return add(path, progress)

    def killed(path, value):
        if path.name == "record.json":
            raise KeyboardInterrupt
        write_json(path, value)

    stages = open_stages(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.run("seed0/a", {}, work)
    assert [path.name for path in tmp_path.glob("seed0/*/scratch")] == ["scratch"]
    stage = open_stages(tmp_path).run("seed0/a", {}, work)
    assert not (stage.folder / "scratch").exists()
    (stage.folder / "scratch").mkdir()  # killed while it was deleted
    assert open_stages(tmp_path).run("seed0/a", {}, work) == stage
    assert not (stage.folder / "scratch").exists()


def test_tasks_of_a_stage_are_shown_under_its_number_and_name(tmp_path):
    listener = Listener()

    def work(path, progress):
        with progress.task("train", total=1) as task:
            task.advance(1)
        return {}

    stages = open_stages(tmp_path, progress=listener, total=7)
    for name in ("a", "b"):
        stages.run(f"seed0/{name}", {"x": name}, work)
    assert listener.labels == ["[1/7 seed0/a] train", "[2/7 seed0/b] train"]


def test_the_folder_of_another_recipe_or_of_something_else_is_refused(tmp_path):
    open_stages(tmp_path / "a", owner="mine").run("seed0/a", {}, add)
    with pytest.raises(ConfigError, match="holds the recipe 'mine', not 'yours'; choose another --out"):
        open_stages(tmp_path / "a", owner="yours")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").touch()
    with pytest.raises(ConfigError, match="was not written by moeify pipeline"):
        open_stages(tmp_path / "b")
    with pytest.raises(ConfigError, match="was not written by moeify pipeline"):
        open_stages(tmp_path / "b/file")
    with pytest.raises(CheckpointError, match="cannot write"):
        open_stages(tmp_path / "b/file/c")


def test_a_damaged_record_names_its_file(tmp_path):
    stage = open_stages(tmp_path).run("seed0/a", {}, add)
    (stage.folder / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"record\.json' cannot be read.*delete its folder"):
        open_stages(tmp_path).run("seed0/a", {}, add)


def test_differences_names_what_changed():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "gone": 1}
    assert differences(old, json.loads(json.dumps(old))) == []
    assert differences(old, {"a": {"b": 2, "c": [1, 3]}, "d": "x", "new": 5}) == [
        "a.b 1 -> 2",
        "a.c [1, 2] -> [1, 3]",
        "gone 1 -> null",
        "new null -> 5",
    ]
    assert differences({"a": "x" * 100}, {"a": 1}) == ['a "' + "x" * 56 + "... -> 1"]


def test_a_stage_that_another_process_works_on_is_left_or_waited_for(tmp_path):
    lock = tmp_path / f"{key_of({'x': 1})}.lock"
    open_stages(tmp_path)
    with locked(lock):
        with pytest.raises(StageTakenError, match="seed0/a: another process works on it"):
            open_stages(tmp_path, wait=False).run("seed0/a", {"x": 1}, add)
        assert open_stages(tmp_path, wait=False).run("seed0/b", {"x": 2}, add).result == {"answer": 42}, "others are free"
    assert not list(tmp_path.glob("seed0/a-*"))

    entered, go_on = threading.Event(), threading.Event()

    def slow(path, progress):
        entered.set()
        assert go_on.wait(10)
        return add(path, progress)

    class Said(list):
        def append(self, line):
            super().append(line)
            go_on.set()

    said = Said()
    other = threading.Thread(target=lambda: open_stages(tmp_path).run("seed0/a", {"x": 1}, slow))
    other.start()
    assert entered.wait(10)
    stage = open_stages(tmp_path, said=said).run("seed0/a", {"x": 1}, add)
    other.join()
    assert said == ["seed0/a: another process works on it; waits."]
    assert (stage.folder / "runs").read_text() == "1", "what the other one made is taken"
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_ends_with_who_holds_it_and_a_file_that_was_left_keeps_nobody_out(tmp_path):
    path = tmp_path / "lock"
    path.touch()  # of a process that was killed
    with locked(path, wait=False), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    assert not path.exists()


def test_a_lock_that_was_waited_for_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    path, held = tmp_path / "lock", []
    real = module_files.fcntl.flock

    def deleted_meanwhile(handle, how):
        real(handle, how)
        if not held:  # whoever had it has deleted the file
            held.append(path.unlink())

    monkeypatch.setattr(module_files.fcntl, "flock", deleted_meanwhile)
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    assert held == [None]


def test_a_disk_without_locks_keeps_nobody_out_but_is_said_to_those_who_share(tmp_path, monkeypatch):
    def none(_handle, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module_files.fcntl, "flock", none)
    assert open_stages(tmp_path).run("seed0/a", {"x": 1}, add).result == {"answer": 42}
    with pytest.raises(CheckpointError, match=r"cannot lock '.*\.lock': No locks available; choose another --out"):
        open_stages(tmp_path, wait=False).run("seed0/b", {"x": 2}, add)
