"""A streamed conversion on two processes (gloo): the checkpoint of one, each process its share of the layers, errors told once."""

import multiprocessing
import random
import signal

import pytest
import ranks
import ranks_stream
import tiny

from moeify.errors import CheckpointError
from moeify.pipeline import stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    tiny.save_dense_tiny(folder / "dense")
    words = random.Random(0)
    (folder / "words.txt").write_text("".join(words.choice("abcdefghij klm") for _ in range(3000)))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return ranks_stream.convert(folder=folder, out="one", stream=True)


@pytest.fixture(scope="module")
def two(folder):
    jobs = [
        ("two", ranks_stream.fitted_by, {"folder": str(folder), "out": "two"}),
        ("second fails", ranks_stream.failing, {"folder": str(folder), "out": "failed", "rank": 1}),
        ("after it", ranks_stream.fitted_by, {"folder": str(folder), "out": "failed"}),
    ]
    return ranks.results(2, jobs, folder / "jobs")


def test_two_processes_give_the_checkpoint_of_one_and_each_fits_its_share(folder, one, two):
    assert two["two"]["record"] == one
    assert two["two"]["fitted"] == ["model.layers.0.mlp"]
    assert ranks.read(folder / "jobs", "two", 1)["fitted"] == ["model.layers.1.mlp"]
    assert ranks.read(folder / "jobs", "two", 1)["record"] == one
    for name in ("model.safetensors", "config.json", "moeify.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert not (folder / "two.work").exists()


def test_an_error_in_one_process_ends_the_others_and_is_said_once(folder, two):
    second = ranks.read(folder / "jobs", "second fails", 1)
    assert second == {"kind": "MoeifyError", "text": "nothing can be fitted here.", "is_echo": False}
    first = two["second fails"]
    assert (first["kind"], first["is_echo"]) == ("TrainingError", True)
    assert "nothing can be fitted here" in first["text"]
    # What the first one had fitted is kept.
    assert two["after it"]["fitted"] == []
    assert ranks.read(folder / "jobs", "after it", 1)["fitted"] == ["model.layers.1.mlp"]
    assert (folder / "failed" / "model.safetensors").read_bytes() == (folder / "two" / "model.safetensors").read_bytes()


def test_a_process_that_was_killed_where_it_wrote_is_continued(folder, one):
    context = multiprocessing.get_context("forkserver")
    for at, left in (("tokens.json", {"run.json", "inputs"}), ("tensors", {"run.json", "inputs", "tokens.json", "site0000.safetensors"})):
        child = context.Process(target=ranks_stream.killed, kwargs={"folder": str(folder), "out": "killed", "at": at})
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        names = {path.name for path in (folder / "killed.work").iterdir()}
        assert left <= names
        assert ("tokens.json" in names) == (at == "tensors")
        assert not (folder / "killed").exists()
    assert ranks_stream.convert(folder=folder, out="killed", stream=True) == one
    for name in ("model.safetensors", "config.json", "moeify.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "killed" / name).read_bytes()
    assert not list(folder.glob("killed.*"))


def test_a_damaged_number_of_tokens_is_one_line(folder, one, monkeypatch):
    def cut(*_, **__):
        (folder / "cut.work" / "tokens.json").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "calibrate_rules", cut)
    with pytest.raises(KeyboardInterrupt):
        ranks_stream.convert(folder=folder, out="cut", stream=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"tokens\.json' is damaged; delete '.*cut\.work' and run again"):
        ranks_stream.convert(folder=folder, out="cut", stream=True)
