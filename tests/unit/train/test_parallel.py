"""Runs on 2 and 4 processes (gloo) against one: losses, switches, what a killed process leaves."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from pretraining import Counting, tiny_gpt

from moeify._dist import ALONE, Ranks
from moeify.errors import CheckpointError, ConfigError
from moeify.sites import expert_bounds
from moeify.train.expert_parallel import ExpertGroup
from moeify.train.loop import TrainConfig, train
from moeify.train.parallel import blocks_of, share

LOADS = ("ragged", "none for the last")
SPARSE = 14
"""Forwards of each of two processes in 7 steps: the last saved state, of step 6, is in the sparse phase."""


@pytest.fixture(scope="module")
def one():
    return ranks.pretrain()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    fsdp, ddp = str(folder / "of-fsdp"), str(folder / "of-ddp")
    jobs = [
        ("ddp", ranks.pretrain, {"kind": "auto"}),
        ("fsdp", ranks.pretrain, {"kind": "fsdp"}),
        ("fsdp stopped", ranks.pretrain, {"kind": "fsdp", "state": fsdp, "until": SPARSE}),
        ("ddp stopped", ranks.pretrain, {"kind": "ddp", "state": ddp, "until": SPARSE}),
        ("fsdp resumed", ranks.pretrain, {"kind": "fsdp", "state": f"{fsdp}-2", "source": fsdp}),
        ("ddp resumed", ranks.pretrain, {"kind": "ddp", "state": f"{ddp}-2", "source": ddp}),
        ("ddp half labelled", ranks.train_half_labelled, {"kind": "ddp"}),
        ("fsdp half labelled", ranks.train_half_labelled, {"kind": "fsdp"}),
        ("ddp diverges", ranks.diverge, {"kind": "ddp"}),
        ("fsdp diverges", ranks.diverge, {"kind": "fsdp"}),
        ("full disk", ranks.fill_a_disk, {"state": f"{fsdp}-full", "source": fsdp}),
        ("ddp shared", ranks.pretrain, {"kind": "ddp", "expert_parallel": 2, "gradient_checkpointing": True}),
        ("fsdp shared", ranks.pretrain, {"kind": "fsdp", "expert_parallel": 2}),
        ("by three", ranks.share_among_three, {}),
        *((f"experts {loads}", ranks.share_experts, {"size": 2, "loads": loads}) for loads in LOADS),
        ("experts in bfloat16", ranks.share_experts, {"size": 2, "dtype": "float32", "autocast": True}),
    ]
    return ranks.results(2, jobs, folder / "two")


@pytest.fixture(scope="module")
def four(folder, two):
    fsdp, ddp = str(folder / "of-fsdp"), str(folder / "of-ddp")
    jobs = [
        ("ddp", ranks.pretrain, {"kind": "ddp", "micro": 1}),
        ("fsdp of fsdp", ranks.pretrain, {"kind": "fsdp", "state": f"{fsdp}-4", "source": fsdp, "micro": 1}),
        ("fsdp of ddp", ranks.pretrain, {"kind": "fsdp", "state": f"{ddp}-4", "source": ddp}),
        ("ddp shared", ranks.pretrain, {"kind": "ddp", "micro": 1, "expert_parallel": 2}),
        *((f"experts {loads}", ranks.share_experts, {"size": 4, "loads": loads}) for loads in LOADS),
        ("experts by pairs", ranks.share_experts, {"size": 2, "num_experts": 4, "dtype": "float32"}),
    ]
    return ranks.results(4, jobs, folder / "four")


def assert_same_run(found, expected):
    assert found["identical"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for key in ("inertia", "captured", "similarity", "sparsity"):
        for mine, theirs in zip(found[key], expected[key], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    assert found["decisions"] == expected["decisions"]
    assert found["router_steps"] == expected["router_steps"] == [6, 6]  # none in dense phases
    assert [step for step, *_ in found["evals"]] == [12] and found["evals"][0][1] == pytest.approx(expected["evals"][0][1], abs=1e-5)
    assert found["masked"] == ["None"]  # the kernels read plain, whole weights
    assert found["tokens"] == expected["tokens"]
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-4)
    assert found["after"] == pytest.approx(expected["after"], abs=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_through_all_phases(two, one, kind):
    assert_same_run(two[kind], one)
    assert [(before, after) for _, before, after, _ in one["decisions"] if before != after] == [
        ("dense", "sparse"), ("sparse", "dense"),
    ]  # fmt: skip


def test_four_processes_train_as_one_where_a_step_is_not_a_multiple(four, one):
    assert_same_run(four["ddp"], one)


@pytest.mark.parametrize("kind", ["ddp shared", "fsdp shared"])
def test_processes_that_share_out_experts_train_as_one(two, one, kind):
    assert_same_run(two[kind], one)
    computed = 2 if kind == "ddp shared" else 1  # once more in backward, with checkpointing
    assert two[kind]["shared"] == 11 * 2 * computed  # forwards of 6 sparse steps, one of them of 4 sequences alone; layers
    assert two["ddp"]["shared"] == 0


def test_pairs_of_processes_share_out_experts(four, one):
    assert_same_run(four["ddp shared"], one)
    assert four["ddp shared"]["shared"] == 11 * 2


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("number", [2, 4])
def test_shared_experts_give_the_output_and_gradients_of_each_alone(folder, two, four, number, loads):
    name, of = ("two", two) if number == 2 else ("four", four)
    neurons = expert_bounds(17, 7)
    owned = expert_bounds(7, number)
    for rank in range(number):
        found = ranks.read(folder / name, f"experts {loads}", rank=rank)
        assert max(found["largest"].values()) < 1e-9, found["largest"]
        own = range(neurons[owned[rank]], neurons[owned[rank + 1]])
        idle = loads != "ragged" and rank == number - 1
        assert set(found["computed"]) <= set(own)  # its own experts and no others
        assert bool(found["computed"]) != idle
    assert min(of[f"experts {loads}"]["sizes"].values()) > 0.1


def test_shared_experts_of_pairs_in_float32(folder, four):
    for rank in range(4):
        assert max(ranks.read(folder / "four", "experts by pairs", rank=rank)["largest"].values()) < 1e-4  # of gradients up to 100


def test_shared_experts_under_autocast(two):
    found = two["experts in bfloat16"]
    assert max(found["largest"][name] / size for name, size in found["sizes"].items()) < 0.03  # 2^-8 a rounding, of few sums
    assert max(found["largest"].values()) > 1e-4


def test_processes_that_cannot_share_out_experts_are_an_error(two):
    assert two["by three"] == ["ConfigError", "expert_parallel 3 does not divide the 2 processes that train; set 1, or one that does."]
    with pytest.raises(ConfigError, match="expert_parallel 4 is more than the 3 experts"):
        ExpertGroup(handle=None, rank=0, size=4).bounds(3)
    with pytest.raises(ConfigError, match="does not divide the 1 processes"):
        train(tiny_gpt(), Counting(), TrainConfig(steps=1, expert_parallel=2))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_labels_weigh_the_same_wherever_they_are(two, kind):
    assert two[f"{kind} half labelled"] == pytest.approx(ranks.train_half_labelled(kind="none", micro=6), abs=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_divergence_is_one_line_in_all_processes(two, kind):
    name, text = two[f"{kind} diverges"]
    assert (name, text) == tuple(ranks.diverge(kind="none"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_go_on_to_the_same_bits(two, kind):
    assert two[f"{kind} stopped"] is None
    for key in ("losses", "decisions", "captured", "sums", "after"):
        assert two[f"{kind} resumed"][key] == two[kind][key]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_state_of_two_processes_is_gone_on_from_by_one_and_by_four(folder, two, four, one, kind):
    source = folder / f"of-{kind}"
    assert sorted(path.name for path in source.iterdir()) == ["run.json", "step-00000006"]
    files = sorted(path.relative_to(source / "step-00000006").as_posix() for path in (source / "step-00000006").rglob("*.*"))
    assert all(name.endswith((".json", ".safetensors")) for name in files)  # nothing pickled
    assert sum(name.startswith("shards/") for name in files) == (2 if kind == "fsdp" else 0)
    assert_same_run(four[f"fsdp of {kind}"], one)
    alone = ranks.pretrain(state=folder / f"of-{kind}-1", source=source)
    assert_same_run(alone, one)
    assert alone["losses"][:6] == two[kind]["losses"][:6]  # read, not computed again


def test_shards_without_one_of_their_files_are_refused(folder, two, tmp_path):
    shutil.copytree(folder / "of-fsdp", tmp_path / "state")
    next((tmp_path / "state" / "step-00000006" / "shards").glob("*-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="a file is missing"):
        ranks.pretrain(state=tmp_path / "state")


def test_a_process_that_cannot_write_ends_all_and_the_last_state_stays(two):
    kind, text, left = two["full disk"]
    assert kind == "CheckpointError" and "No space left" in text and "process 1" in text
    assert left == ["run.json", "step-00000006"]


def test_a_killed_process_ends_the_others_and_the_same_call_goes_on(folder, two, tmp_path):
    state, said = tmp_path / "state", tmp_path / "said"
    said.mkdir()
    processes = ranks.start(2, [("lost", ranks.lose_a_process, {"state": str(state)})], said)
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert processes[0].exitcode is not None, "the first process still waits"
    kind, text = ranks.read(said, "lost")
    assert kind == "TrainingError" and "process 0 of 2 lost another one at step 7" in text and "\n" not in text
    again = ranks.results(2, [("again", ranks.pretrain, {"kind": "fsdp", "state": str(state)})], said)["again"]
    assert again["losses"] == two["fsdp"]["losses"] and again["sums"] == two["fsdp"]["sums"]


RESTARTED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import ranks
from moeify._dist import Ranks
from moeify.train.parallel import distributed

with distributed(timeout_s=60):
    dies = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    found = ranks.pretrain(kind="fsdp", state=sys.argv[2] + "/state", data=ranks.KillsRank(1, at=14) if dies else None)
    if Ranks.present().is_first:
        print("FOUND", json.dumps(found["losses"]))
"""


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(two, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    tests = str(Path(ranks.__file__).parent)
    ran = subprocess.run([*command, str(script), tests, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (found,) = [line.removeprefix("FOUND ") for line in ran.stdout.splitlines() if line.startswith("FOUND ")]
    assert json.loads(found) == two["fsdp"]["losses"]
    assert "exitcode: -9" in ran.stderr


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
