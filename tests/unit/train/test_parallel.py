"""Runs on 2 and 4 processes (gloo) against one: losses, switches, what a killed process leaves."""

import pytest
import ranks
from pretraining import Counting, tiny_gpt

from moeify._dist import ALONE, Ranks
from moeify.errors import ConfigError
from moeify.train.loop import TrainConfig, train
from moeify.train.parallel import blocks_of, share


@pytest.fixture(scope="module")
def one():
    return ranks.pretrain()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    jobs = [
        ("ddp", ranks.pretrain, {"kind": "auto"}),
        ("fsdp", ranks.pretrain, {"kind": "fsdp"}),
    ]
    return ranks.results(2, jobs, folder / "two")


def assert_same_run(found, expected):
    assert found["identical"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for key in ("inertia", "captured", "similarity", "sparsity"):
        for mine, theirs in zip(found[key], expected[key], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    assert found["decisions"] == expected["decisions"]
    assert found["router_steps"] == expected["router_steps"] == [6, 6]  # none in dense phases
    assert [step for step, *_ in found["evals"]] == [12] and found["evals"][0][1] == pytest.approx(expected["evals"][0][1], abs=1e-5)
    assert found["tokens"] == expected["tokens"]
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-4)
    assert found["after"] == pytest.approx(expected["after"], abs=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_through_all_phases(two, one, kind):
    assert_same_run(two[kind], one)
    assert [(before, after) for _, before, after, _ in one["decisions"] if before != after] == [
        ("dense", "sparse"), ("sparse", "dense"),
    ]  # fmt: skip


def test_share_gives_every_process_as_many_forwards():
    found = [share([7, 8, 9, 5, 6], 2, Ranks(rank, 3)) for rank in range(3)]
    assert found == [[[7, 5]], [[8, 6]], [[9]]]
    assert [share([7], 2, Ranks(rank, 3)) for rank in range(3)] == [[[7]], [[]], [[]]]
    assert share([7, 8, 9], None, ALONE) == [[7, 8, 9]]


def test_blocks_are_the_children_of_the_outermost_lists():
    model = tiny_gpt()
    assert blocks_of(model) == list(model.transformer.h)


def test_processes_that_are_not_there_are_an_error(monkeypatch):
    with pytest.raises(ConfigError, match="needs several processes"):
        train(tiny_gpt(), Counting(), TrainConfig(steps=1, parallel="fsdp"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="have not joined"):
        train(tiny_gpt(), Counting(), TrainConfig(steps=1))
