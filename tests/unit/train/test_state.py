"""A run that dies goes on to the very losses and weights of one that did not, dropout included."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn
from training import F32, Dies, DyingData, emotions, text, tiny_classifier, weights

from moeify.errors import CheckpointError, ConfigError, DivergedError, StoppedError, TrainingError
from moeify.train import loop
from moeify.train import state as states
from moeify.train.loop import TrainConfig, train

CONFIG = TrainConfig(steps=8, batch_sequences=3, micro_sequences=2, lr=1e-2, warmup_steps=2, save_every=2, clip=0.5, seed=3, **F32)


def model_of():
    """Dropout, tied weights, a buffer that training changes, and a weight that lies transposed in memory."""
    model = tiny_classifier(hidden_dropout_prob=0.2)
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().t().contiguous().t())
    model.bert.encoder.layer[1].intermediate.dense.weight = model.bert.encoder.layer[0].intermediate.dense.weight
    model.register_buffer("calls", torch.zeros(1))

    def count(module, _args):
        module.calls += module.training

    model.register_forward_pre_hook(count)
    return model


@pytest.fixture(scope="module")
def uninterrupted():
    model = model_of()
    return train(model, emotions(), CONFIG, evaluate=lambda m: float(m.calls)), weights(model), model.calls


def same_as(uninterrupted, record, model):
    wanted, tensors, calls = uninterrupted
    assert record.losses == wanted.losses
    assert (record.evals, record.tokens, record.epochs) == (wanted.evals, wanted.tokens, wanted.epochs)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())
    assert torch.equal(model.calls, calls)


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        pytest.param(6, ["step-00000002"], id="after a state"),
        pytest.param(8, ["step-00000004"], id="where an epoch begins"),
        pytest.param(2, [], id="before the first state"),
    ],
)
def test_train_when_it_died_goes_on_as_if_it_had_not(uninterrupted, tmp_path, at, kept):
    with pytest.raises(Dies):
        train(model_of(), DyingData(emotions(), at=at), CONFIG, state=tmp_path)
    assert [p.name for p in tmp_path.glob("step-*")] == kept
    model = model_of()
    if kept:
        with torch.no_grad():
            model.classifier.weight.fill_(7.0)  # what a state holds comes from the state
    torch.manual_seed(99)
    same_as(uninterrupted, train(model, emotions(), CONFIG, state=tmp_path, evaluate=lambda m: float(m.calls)), model)


def test_train_when_it_has_finished_gives_its_result_again_without_training(uninterrupted, tmp_path):
    train(model_of(), emotions(), CONFIG, state=tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-00000008"]
    model = model_of()
    record = train(model, DyingData(emotions(), at=1), CONFIG, state=tmp_path)
    assert record.losses == uninterrupted[0].losses
    assert all(torch.equal(p, uninterrupted[1][name]) for name, p in model.named_parameters())
    assert not model.training


def test_save_state_when_it_dies_half_way_leaves_the_last_state(uninterrupted, tmp_path, monkeypatch):
    saved = []

    def save_file(tensors, path):
        saved.append(path)
        real(tensors, path)
        if len(saved) == 4:  # the second state: weights and optimizer are there, the rest is not
            raise Dies

    real = states.save_file
    monkeypatch.setattr(states, "save_file", save_file)
    with pytest.raises(Dies):
        train(model_of(), emotions(), CONFIG, state=tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "step-00000004.new").is_dir()
    model = model_of()
    same_as(uninterrupted, train(model, emotions(), CONFIG, state=tmp_path, evaluate=lambda m: float(m.calls)), model)
    assert not list(tmp_path.glob("*.new"))


def test_save_state_when_the_disk_is_full_keeps_the_last_state_and_says_so(tmp_path, monkeypatch):
    def save_file(_tensors, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(states, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device; free space and run again, the last state is kept"):
        train(model_of(), emotions(), CONFIG, state=tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-00000002"]


def test_state_stores_tied_weights_once_and_nothing_pickled(tmp_path):
    train(model_of(), emotions(), TrainConfig(steps=1, **F32), state=tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    stored = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert sum("intermediate.dense.weight" in name for name in stored) == 1


def test_state_of_a_model_with_more_than_tensors_keeps_the_tensors(tmp_path):
    class Counting(nn.Identity):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = tiny_llama()
    model.model.extra = Counting()
    train(model, text(), TrainConfig(steps=1, **F32), state=tmp_path)
    assert load_file(tmp_path / "step-00000001" / "model.safetensors").keys() == dict(tiny_llama().named_parameters()).keys()


def test_train_when_it_diverges_keeps_the_last_good_state(tmp_path):
    data = text(rows=6)
    model = tiny_llama()
    calls = []

    def poison(module, _args, output):
        calls.extend([1] * module.training)
        return output * float("nan") if len(calls) > 4 else output

    model.model.layers[1].register_forward_hook(poison)
    config = TrainConfig(steps=6, batch_sequences=2, save_every=1, **F32)
    with pytest.raises(TrainingError, match=r"loss is nan at step 4: .*'model.layers.1' are the first") as raised:
        train(model, data, config, state=tmp_path)
    message = str(raised.value)
    assert "Lower lr (0.0001) or clip (1.0), which is another run: it needs a new state folder (another --out, or --overwrite)" in message
    assert message.endswith(f"'{tmp_path}' keeps the last good state as a record: with the same options it goes on to the same step.")
    with pytest.raises(CheckpointError, match=r"lr was 0\.0001, is 1e-05"):  # what the message says
        train(tiny_llama(), data, replace(config, lr=1e-5), state=tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert train(tiny_llama(), data, config, state=tmp_path).losses == train(tiny_llama(), data, config).losses


@pytest.mark.parametrize(("seconds", "kept"), [(0.01, [2, 4, 6, 8, 10]), (0.6, [2, 4, 10]), (5.0, [2, 10])])
def test_train_saves_less_often_where_saving_takes_long(tmp_path, monkeypatch, seconds, kept):
    clock, saved = [0.0], []

    class Clock:
        perf_counter = staticmethod(lambda: clock[0])

    def save(_folder, *, step, **_):
        saved.append(step)
        clock[0] += seconds

    monkeypatch.setattr(loop, "time", Clock)
    monkeypatch.setattr(loop, "save_state", save)
    config = replace(TrainConfig(steps=10, batch_sequences=2, save_frac=0.03, **F32), save_every=2)
    train(tiny_llama(), text(), config, state=tmp_path)
    assert saved == kept


def test_train_config_saves_20_times_where_nothing_is_said():
    long = TrainConfig(steps=400).saving()
    assert (long.save_every, long.save_frac) == (20, 0.03)
    assert TrainConfig(steps=400, save_every=7).saving() == TrainConfig(steps=400, save_every=7)
    assert long.decisive() == TrainConfig(steps=400).decisive()
    with pytest.raises(ConfigError, match=r"save_frac must be in \(0, 1\), got 1"):
        TrainConfig(steps=4, save_frac=1.0)


def test_train_when_the_state_is_of_another_run_says_what_differs_and_leaves_it(tmp_path):
    options = {"steps": 2, "batch_sequences": 4} | F32
    wanted = train(tiny_llama(), text(), TrainConfig(**options), state=tmp_path, run={"model": "a", "data": {"path": "x"}})
    for config, run, message in (
        (TrainConfig(**options | {"lr": 0.5}), {"model": "a", "data": {"path": "x"}}, r"train.lr was 0.0001, is 0.5"),
        (TrainConfig(**options), {"model": "a", "data": {"path": "y"}}, r'run.data.path was "x", is "y"'),
        (TrainConfig(**options), None, r"run.data was \{"),
    ):
        with pytest.raises(CheckpointError, match=f"is the state of another run .*{message}"):
            train(tiny_llama(), text(), config, state=tmp_path, run=run)
    with pytest.raises(CheckpointError, match="sequences was 11, is 10"):
        train(tiny_llama(), text(rows=10), TrainConfig(**options), state=tmp_path, run={"model": "a", "data": {"path": "x"}})
    # What fits into memory may change.
    again = TrainConfig(**options, micro_sequences=1, save_every=1)
    assert train(tiny_llama(), text(), again, state=tmp_path, run={"model": "a", "data": {"path": "x"}}) == wanted


def test_train_when_the_state_is_of_another_model_says_so(tmp_path):
    config = TrainConfig(steps=1, **F32)
    train(tiny_llama(), text(), config, state=tmp_path)
    with pytest.raises(CheckpointError, match=r"is of another model: 'model.layers.0.mlp.\w+.weight' differs"):
        train(tiny_llama(intermediate_size=40), text(), config, state=tmp_path)
    with pytest.raises(CheckpointError, match="is of another model: '"):
        train(tiny_classifier(), text(), config, state=tmp_path)


def test_train_when_other_parameters_are_trained_than_in_the_state_says_so(tmp_path):
    config = TrainConfig(steps=2, **F32)
    train(tiny_llama(), text(), config, state=tmp_path)
    frozen = tiny_llama()
    frozen.lm_head.requires_grad_(False)
    for model, factors in ((frozen, None), (tiny_llama(), {"re:.*mlp.*": 2.0})):
        with pytest.raises(CheckpointError, match="is of a run that trained other parameters, or at other rates; choose another state"):
            train(model, text(), config, state=tmp_path, lr_factors=factors)


def test_train_when_the_state_folder_is_of_somebody_else_leaves_it(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="is in the way and is not the state of a training run"):
        train(tiny_llama(), text(), TrainConfig(steps=1, **F32), state=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_train_when_the_state_is_damaged_says_so(tmp_path, name):
    config = TrainConfig(steps=1, **F32)
    train(tiny_llama(), text(), config, state=tmp_path)
    path = tmp_path / "step-00000001" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"is damaged: .*; delete it to train from the start"):
        train(tiny_llama(), text(), config, state=tmp_path)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from tiny import tiny_llama
from training import text
from moeify._config import from_dict
from moeify.train import state
from moeify.train.loop import TrainConfig, train
import json

torch.set_num_threads(1)
rename = Path.rename

def die(self, target):
    if Path(target).name == "step-00000004":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = die
train(tiny_llama(), text(), from_dict(TrainConfig, json.loads(sys.argv[3])), state=Path(sys.argv[1]))
"""


def test_train_after_sigkill_while_it_saves_goes_on_to_the_same_losses(tmp_path, request):
    from moeify._config import to_dict

    tests = str(request.config.rootpath / "tests")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), tests, json.dumps(to_dict(CONFIG))], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        continued = train(tiny_llama(), text(), CONFIG, state=tmp_path)
        assert continued.losses == train(tiny_llama(), text(), CONFIG).losses
    finally:
        torch.set_num_threads(threads)


def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_from_there(uninterrupted, tmp_path):
    told = []
    with pytest.raises(StoppedError, match="stopped after step 5 of 8") as caught:
        train(model_of(), emotions(), CONFIG, state=tmp_path, watch=told.append, stop=lambda: len(told) == 5, evaluate=lambda _: 0.0)
    assert caught.value.step == states.latest_step(tmp_path) == 5
    assert [report.step for report in told] == [1, 2, 3, 4, 5]
    assert [report.loss for report in told] == list(uninterrupted[0].losses[:5])
    assert [report.lr for report in told[:3]] == pytest.approx([0, 5e-3, 1e-2])
    model = model_of()
    record = train(model, emotions(), CONFIG, state=tmp_path, evaluate=lambda m: float(m.calls))
    same_as(uninterrupted, record, model)


def test_what_watches_may_end_a_run_before_its_state_is_saved(tmp_path):
    def bad(report):
        if report.step == 4:
            raise DivergedError("bad", step=report.step, numbers={"loss": report.loss})

    with pytest.raises(DivergedError):
        train(model_of(), emotions(), CONFIG, state=tmp_path, watch=bad)
    assert states.latest_step(tmp_path) == 2
    assert states.latest_step(tmp_path / "nowhere") == 0
