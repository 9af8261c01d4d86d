"""`moeify pretrain` on 2 and 4 processes (gloo) against one: what comes out, signals, kills, sparse phases that go wrong."""

import json
import signal

import pytest
import ranks
import ranks_pretrain
from pretraining import recipe_file
from safetensors.torch import load_file

from moeify.errors import ConfigError
from moeify.pipeline import pretrain, read_pretrain
from moeify.train import state

SPIKES = ("ssd.fallback_frac=0.1",)
FSDP = ("train.parallel=fsdp",)
SHARED = "train.expert_parallel=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    recipe_file(folder)
    return folder


def of(folder, name, *settings, **options):
    return {"folder": str(folder), "out": str(folder / name), "settings": settings, **options}


@pytest.fixture(scope="module")
def one(folder):
    """A run of one process."""
    return ranks_pretrain.pretrain(**of(folder, "one"))


@pytest.fixture(scope="module")
def one_fallen(folder):
    return ranks_pretrain.pretrain(**of(folder, "one-fallen", *SPIKES, at=13, does="nan", rank=0))


@pytest.fixture(scope="module")
def two(folder):
    bpe = 'model.tokenizer={train={kind="bpe", vocab_size=300}}'
    jobs = [
        ("ddp", ranks_pretrain.pretrain, of(folder, "ddp")),
        ("fsdp", ranks_pretrain.pretrain, of(folder, "fsdp", *FSDP)),
        ("fallen", ranks_pretrain.pretrain, of(folder, "fallen", *SPIKES, at=13, does="nan")),
        ("fallen shared", ranks_pretrain.pretrain, of(folder, "fallen-shared", *SPIKES, *FSDP, SHARED, at=13, does="nan")),
        ("stopped", ranks_pretrain.command, of(folder, "stopped", at=8, does="term")),
        ("stopped at the end", ranks_pretrain.command, of(folder, "stopped", at=19, does="term")),
        ("resumed", ranks_pretrain.pretrain, of(folder, "stopped")),
        ("again", ranks_pretrain.command, of(folder, "short", "train.steps=4", bpe, "log.tensorboard=true")),
        ("in the way", ranks_pretrain.command, of(folder, "short", "train.steps=4", bpe)),
        ("full", ranks_pretrain.command, of(folder, "full", at=3, does="full")),
        ("apart", ranks_pretrain.apart, {"folder": str(folder), "out": str(folder / "apart")}),
        ("none", ranks_pretrain.command, of(folder, "alone", "train.parallel=none")),
        ("errors", ranks_pretrain.errors_of_the_first, {}),
    ]
    return ranks.results(2, jobs, folder / "two")


def assert_same_run(found, expected):
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert [step for step, _ in found["evals"]] == [step for step, _ in expected["evals"]]
    assert [loss for _, loss in found["evals"]] == pytest.approx([loss for _, loss in expected["evals"]], abs=1e-5)
    for mode in ("dense", "moe"):
        assert found["evaluation"][mode]["loss"] == pytest.approx(expected["evaluation"][mode]["loss"], abs=1e-5)
    for key in ("decisions", "tokens", "parameters", "flops", "fallbacks"):
        assert found[key] == expected[key], key
    for mine, theirs in zip(found["probes"], expected["probes"], strict=True):
        assert mine == [None if value is None else pytest.approx(value, abs=1e-5) for value in theirs]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_the_checkpoint_of_one(folder, one, two, kind):
    assert_same_run(two[kind], one)
    assert [(before, after) for _, before, after, _ in one["decisions"] if before != after] == [("dense", "sparse"), ("sparse", "dense")]
    first, second = (load_file(folder / name / "model.safetensors") for name in ("one", kind))
    assert first.keys() == second.keys()
    assert all(first[name].allclose(second[name], atol=1e-3) for name in first)  # Adam: 3e-3 a step whatever the gradient
    assert sorted(path.name for path in (folder / kind).iterdir()) == sorted(path.name for path in (folder / "one").iterdir())
    card, config = (folder / kind / "README.md").read_text(), json.loads((folder / kind / "config.json").read_text())
    assert "A GPT2LMHeadModel that" in card and config["architectures"] == ["GPT2LMHeadModel"]
    assert ranks_pretrain.layers_of(folder / kind) == 2
    manifests = [json.loads((folder / name / "moeify.json").read_text()) for name in ("one", kind)]
    assert manifests[0] == manifests[1]
    record = json.loads((folder / kind / "pretrain.json").read_text())
    assert record["processes"] == two[kind]["processes"] == 2 and one["processes"] == 1
    assert ranks.read(folder / "two", kind, rank=1) == {**two[kind], "said": []}


def test_the_log_is_written_once(folder, two):
    assert two["ddp"]["said"]
    rows = [[json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()] for name in ("one", "ddp")]
    assert [(row["kind"], row["step"]) for row in rows[0]] == [(row["kind"], row["step"]) for row in rows[1]]


@pytest.mark.parametrize("kind", ["fallen", "fallen shared"])
def test_a_sparse_phase_that_goes_wrong_in_one_process_falls_back_in_all(folder, one_fallen, two, kind):
    assert [fallback[:3] for fallback in one_fallen["fallbacks"]] == [[10, 13, 15]]
    assert_same_run(two[kind], one_fallen)
    assert ranks.read(folder / "two", kind, rank=1)["losses"] == two[kind]["losses"]


def test_a_signal_to_one_process_saves_and_ends_all(folder, one, two):
    line = "stopped: SIGTERM: stopped after step {} of 20, which is saved; the same command goes on there."
    for name, step in (("stopped", 9), ("stopped at the end", 20)):
        assert two[name] == [143, line.format(step), False]
        assert ranks.read(folder / "two", name, rank=1) == [143, "", False]  # said once
    assert_same_run(two["resumed"], one)
    assert "goes on after step 20 of 20." in two["resumed"]["said"]


def test_output_and_errors_are_said_once(folder, two):
    other = {name: ranks.read(folder / "two", name, rank=1) for name in ("again", "in the way", "full")}
    assert two["again"][0] == other["again"][0] == 0
    assert two["again"][2] and not other["again"][2]
    assert two["in the way"][0] == 2 and "is not empty; --overwrite replaces it" in two["in the way"][1]
    assert two["full"][0] == 2 and "No space left on device" in two["full"][1]
    assert other["in the way"] == other["full"] == [2, "", False]
    assert two["none"][0] == 2 and "train.parallel = 'none' leaves processes alone" in two["none"][1]


def test_every_process_must_see_the_folder(folder, two):
    kind, text, is_echo = two["apart"]
    assert kind == "CheckpointError" and text.startswith("process 1 does not see") and not is_echo
    assert ranks.read(folder / "two", "apart", rank=1)[2]


def test_errors_of_the_first_process_keep_their_fields(folder, two):
    mine, theirs = two["errors"], ranks.read(folder / "two", "errors", rank=1)
    assert mine[0] == ["DivergedError", "the loss jumped", {"step": "7", "numbers": "{'loss': inf}"}]
    assert theirs[0] == ["DivergedError", "the loss jumped", {"step": "7", "numbers": "{'loss': inf}", "is_echo": "True"}]
    assert [mine[1][0], theirs[1][:2]] == ["KeyError", ["TrainingError", "the first process failed: KeyError: 'x'"]]


def test_a_killed_process_ends_the_others_and_another_number_goes_on(folder, one, tmp_path):
    for name, settings in (("lost", ()), ("lost-fsdp", FSDP)):
        said = tmp_path / name
        said.mkdir()
        processes = ranks.start(2, [("lost", ranks_pretrain.lose, of(folder, name, *settings, at=12))], said)
        for process in processes:
            process.join(60)
        assert processes[1].exitcode == -signal.SIGKILL
        assert processes[0].exitcode is not None, "the first process still waits"
        code, line, _ = ranks.read(said, "lost")
        assert code == 2 and line.startswith("error: process 0 of 2 lost another one at step 12 (")
        assert state.latest_step(folder / f"{name}.work" / "train") == 10
    jobs = [("more", ranks_pretrain.pretrain, of(folder, "lost", *FSDP))]
    assert_same_run(ranks.results(4, jobs, tmp_path / "four")["more"], one)
    assert_same_run(ranks_pretrain.pretrain(**of(folder, "lost-fsdp")), one)


def test_the_others_wait_for_long_work_as_long_as_it_takes(tmp_path):
    found = ranks.results(2, [("long", ranks_pretrain.long_work, {"seconds": 3.0})], tmp_path / "long", wait_s=1.0)
    assert found["long"] == ["done", "after"]
    assert ranks.read(tmp_path / "long", "long", rank=1) == [None, "after"]


def test_processes_that_cannot_work_together_are_refused(tmp_path, monkeypatch):
    module = __import__("moeify.pipeline.pretrain", fromlist=["torch_device"])
    monkeypatch.setattr(module, "torch_device", __import__("torch").device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--device cuda gives each its own"):
        pretrain(read_pretrain(recipe_file(tmp_path)), tmp_path / "out", device="cuda:1")
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="start them with torchrun"):
        pretrain(read_pretrain(recipe_file(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out.work").exists()
