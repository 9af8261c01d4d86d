"""The state of a conversion: whose it is, and whether it has served."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from moeify.errors import CheckpointError
from moeify.pipeline.work import (
    finished_record,
    finished_training,
    open_training,
    open_work,
    read_fitted,
    remove_work,
    run_id,
    write_fitted,
)
from moeify.train.fit import FittedSite

RUN = {"source": "a", "weights": "0"}


@pytest.fixture
def folders(tmp_path):
    out, work = tmp_path / "moe", tmp_path / "moe.work"
    out.mkdir()
    record = {"schema": 1, "sites": [], "calibration": {"run": run_id(RUN), "value": 1.0}}
    (out / "moeify.json").write_text(json.dumps(record))
    open_work(work, RUN)
    return out, work


def test_finished_record_is_that_of_the_run_whose_state_lies_there(folders):
    out, work = folders
    assert finished_record(out, work) == {"run": run_id(RUN), "value": 1.0}
    (work / "run.json").unlink()  # the last moment of its deletion
    assert finished_record(out, work) is not None
    work.rmdir()
    assert finished_record(out, work) is None


@pytest.mark.parametrize("name", ["other run", "no output", "damaged output", "folder of somebody else"])
def test_finished_record_of_anything_else_is_none(folders, name):
    out, work = folders
    if name == "other run":
        open_work(work, {**RUN, "weights": "1"})
    elif name == "no output":
        (out / "moeify.json").unlink()
    elif name == "damaged output":
        (out / "moeify.json").write_text("{")
    else:
        (work / "run.json").rename(work / "thesis.txt")
    assert finished_record(out, work) is None


def test_open_work_keeps_the_state_of_the_same_run_only(folders):
    _, work = folders
    (work / "site0000.safetensors").write_bytes(b"fitted")
    open_work(work, dict(reversed(RUN.items())))
    assert (work / "site0000.safetensors").exists()
    open_work(work, {**RUN, "weights": "1"})
    assert [path.name for path in work.iterdir()] == ["run.json"]
    remove_work(work)
    assert not work.exists()


def test_write_fitted_then_read_fitted_is_the_same(tmp_path):
    site = FittedSite(order_F=torch.tensor([1, 0]), router_state={"w": torch.ones(2)}, scores_TE=torch.zeros(3, 2), captured={"a": 0.5})
    site = replace(site, always_on=(0, 1))
    write_fitted(tmp_path / "site.safetensors", site)
    found = read_fitted(tmp_path / "site.safetensors")
    assert (found.captured, found.always_on) == (site.captured, (0, 1))
    assert torch.equal(found.order_F, site.order_F)
    assert torch.equal(found.scores_TE, site.scores_TE)
    assert torch.equal(found.router_state["w"], site.router_state["w"])
    assert read_fitted(tmp_path / "other.safetensors") is None


def test_read_fitted_of_a_damaged_file_is_none_so_that_it_is_fitted_again(tmp_path):
    path = tmp_path / "site.safetensors"
    write_fitted(path, FittedSite(order_F=torch.tensor([0]), router_state={}, scores_TE=torch.zeros(1, 1)))
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        assert read_fitted(path) is None
    for tensors in ({"order_F": torch.zeros(1)}, {"order_F": torch.zeros(1), "scores_TE": torch.zeros(1, 1)}):
        save_file(tensors, path)  # a tensor, the metadata missing
        assert read_fitted(path) is None


def test_write_fitted_has_the_content_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "site.safetensors", []

    def sync(handle):
        synced.append((os.fstat(handle).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    write_fitted(path, FittedSite(order_F=torch.tensor([0]), router_state={}, scores_TE=torch.zeros(1, 1)))
    assert synced == [(path.stat().st_ino, False)]


def test_open_work_where_nothing_can_be_written_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write '.*work': Read-only file system; .*choose another --out"):
        open_work(tmp_path / "work", RUN)


def test_write_fitted_on_a_full_disk_says_that_nothing_is_lost(tmp_path, monkeypatch):
    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeify.train.work.save_file", full)
    site = FittedSite(order_F=torch.tensor([0]), router_state={}, scores_TE=torch.zeros(1, 1))
    with pytest.raises(CheckpointError, match=r"No space left.*what is fitted already is kept"):
        write_fitted(tmp_path / "site.safetensors", site)
    assert list(tmp_path.iterdir()) == []


# -- training ------------------------------------------------------------------------------------------------------------------------


def test_open_training_of_somebody_elses_folder_leaves_it_whatever_is_asked(tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is in the way and is not the state of a training run; move it"):
            open_training(tmp_path / "out.work", {"seed": 0}, overwrite=overwrite)
    assert (tmp_path / "out.work" / "thesis.tex").read_text() == "years of work"


def test_open_training_and_open_work_do_not_delete_each_others_state(tmp_path):
    open_training(tmp_path / "a", {"seed": 0}, overwrite=False)
    with pytest.raises(CheckpointError, match="state of a training run, which is not deleted"):
        open_work(tmp_path / "a", {"seed": 0})
    open_work(tmp_path / "b", {"seed": 0})
    with pytest.raises(CheckpointError, match="state of a conversion; --overwrite deletes it"):
        open_training(tmp_path / "b", {"seed": 0}, overwrite=False)
    open_training(tmp_path / "b", {"seed": 0}, overwrite=True)
    open_training(tmp_path / "b", {"seed": 0}, overwrite=False)


@pytest.mark.parametrize(
    ("record", "finished"),
    [
        pytest.param({"run": run_id({"seed": 0, "betas": [0.9, 0.99]})}, True, id="its own"),
        pytest.param({"run": run_id({"seed": 1, "betas": [0.9, 0.99]})}, False, id="of another run"),
        pytest.param(None, False, id="damaged"),
    ],
)
def test_finished_training_is_that_of_the_run_whose_state_is_left(tmp_path, record, finished):
    out, work = tmp_path / "out", tmp_path / "out.work"
    out.mkdir()
    assert finished_training(out, work) is None
    (out / "sparsify.json").write_text("{" if record is None else json.dumps(record))
    assert finished_training(out, work) is None, "no state"
    open_training(work, {"seed": 0, "betas": (0.9, 0.99)}, overwrite=False)
    assert finished_training(out, work) == (record if finished else None)
