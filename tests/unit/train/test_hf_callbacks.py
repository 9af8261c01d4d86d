"""The stages under transformers.Trainer: what our own loop computes, also accumulated, resumed, and in two processes."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import convert_tiny, tiny_inputs, tiny_llama
from training import F32, text, trainer_losses, trainer_of

from moeify.errors import ConfigError
from moeify.layers import moe_layers
from moeify.sites import find_ffn_sites
from moeify.sparsity import EnforcementConfig
from moeify.train.distill import Distillation, DistillConfig
from moeify.train.finetune import FinetuneConfig, Finetuning, RouterTraining
from moeify.train.hf_callbacks import DistillationCallback, FinetuneCallback, PartsCallback, RouterTrainingCallback, SparsifyCallback
from moeify.train.loop import TrainConfig, train
from moeify.train.sparsify import SparsifyConfig, sparsify

CONFIG = SparsifyConfig(
    anneal_frac=0.8, enforcement=EnforcementConfig(weight=0.05), distill=DistillConfig(temperature=2.0, ffn_weight=0.5, task_weight=0.5)
)
FINETUNE = FinetuneConfig(target_active=(0.3, 0.7), routers="both", router_lr_factor=1.0, router_tokens=16)
STEPS = TrainConfig(steps=6, batch_sequences=4, micro_sequences=1, lr=1e-2, log_every=1, **F32)


def silu(*, seed=0):
    model = tiny_llama(hidden_act="silu", seed=seed)
    return model, find_ffn_sites(model, tiny_inputs())


def whole_rows():
    """Every micro-batch has as many tokens, and labels, as any other."""
    return text(rows=8, vocab=200, padded=False)


@pytest.fixture(scope="module")
def ours():
    """The record and the model of our own loop."""
    model, sites = silu()
    return sparsify(model, sites, whole_rows(), CONFIG, STEPS, teacher=silu(seed=1)[0]), model


def same_weights(model, other):
    for name, p in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_sparsify_callback_trains_as_sparsify_does_and_logs_what_it_adds(ours, tmp_path):
    record, wanted = ours
    model, sites = silu()
    callback = SparsifyCallback(sites, CONFIG, teacher=silu(seed=1)[0])
    trainer = trainer_of(model, whole_rows(), STEPS, tmp_path, callbacks=[callback])
    assert trainer_losses(trainer) == pytest.approx(record.losses, rel=1e-5)
    same_weights(model, wanted)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, part in zip(logged, record.parts, strict=True):
        assert {name: entry[name] for name in part} == pytest.approx(part, rel=1e-4, abs=1e-5)
    assert model.config.hidden_act == "relu"
    assert [site.activation for site in callback.sites] == ["relu", "relu"]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_sparsify_callback_when_resumed_trains_as_if_it_had_not_died(ours, tmp_path):
    record, wanted = ours
    model, sites = silu()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(
        model, whole_rows(), STEPS, tmp_path, callbacks=[SparsifyCallback(sites, CONFIG, teacher=silu(seed=1)[0])], **options
    ).train()
    model, sites = silu()
    callback = SparsifyCallback(sites, CONFIG, teacher=silu(seed=1)[0])
    trainer = trainer_of(model, whole_rows(), STEPS, tmp_path, callbacks=[callback], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(record.losses, rel=1e-5)
    same_weights(model, wanted)


def test_distillation_callback_trains_as_distillation_does(tmp_path):
    config = DistillConfig(temperature=2.0, task_weight=0.3)
    model, other, teacher = tiny_llama(), tiny_llama(), tiny_llama(seed=1)
    with Distillation(model, teacher, config):
        record = train(model, text(vocab=200), STEPS)
    trainer = trainer_of(other, text(vocab=200), STEPS, tmp_path)
    trainer.add_callback(DistillationCallback(teacher, config))  # after on_init_end
    assert trainer_losses(trainer) == pytest.approx(record.losses, rel=1e-5)
    same_weights(other, model)


def test_parts_callback_tells_any_part_step_and_length(tmp_path):
    class Part:
        total_steps = None

        def __init__(self):
            self.steps, self.removed = [], False

        def set_step(self, step):
            self.steps.append((step, self.total_steps))

        def values(self):
            return {"twice": torch.tensor(2.0 * self.steps[-1][0])}

        def remove(self):
            self.removed = True

    part = Part()
    seen = []
    model = tiny_llama()
    callback = PartsCallback(lambda m, args: seen.append((m, args.max_steps)) or [part])
    trainer = trainer_of(model, text(), STEPS, tmp_path, callbacks=[callback])
    assert seen == [(model, 6)], "before anything is compiled"
    trainer.train()
    assert part.steps == [(step, 6) for step in range(7)]
    assert part.removed
    assert [entry["twice"] for entry in trainer.state.log_history if "twice" in entry] == [0, 2, 4, 6, 8, 10]


def test_callbacks_when_the_whole_model_is_compiled_refuse_what_would_be_wrong(tmp_path):
    model, sites = silu()
    for callback in (DistillationCallback(tiny_llama()), SparsifyCallback(sites)):
        with pytest.raises(ConfigError, match=r"torch_compile of the whole model cannot be combined with .* compile its layers instead"):
            trainer_of(model, text(), STEPS, tmp_path, callbacks=[callback], torch_compile=True)


@pytest.mark.slow
def test_sparsify_callback_when_the_model_is_compiled_trains_as_when_it_is_not(tmp_path):
    config = SparsifyConfig(enforcement=EnforcementConfig(weight=0.05, schedule="constant"))
    steps = replace(STEPS, steps=2, micro_sequences=4)
    model, sites = silu()
    wanted = sparsify(model, sites, whole_rows(), config, steps)
    other, sites = silu()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        trainer = trainer_of(other, whole_rows(), steps, tmp_path, callbacks=[SparsifyCallback(sites, config)], **options)
        assert trainer_losses(trainer) == pytest.approx(wanted.losses, rel=1e-5)


# ---- converted models


def test_finetune_callback_trains_as_our_loop_does(tmp_path):
    model, other = convert_tiny(tiny_llama()), convert_tiny(tiny_llama())
    with Finetuning(model, FINETUNE) as part:
        record = train(model, whole_rows(), STEPS, parts=[part])
    trainer = trainer_of(other, whole_rows(), STEPS, tmp_path, callbacks=[FinetuneCallback(FINETUNE)])
    assert trainer_losses(trainer) == pytest.approx(record.losses, rel=1e-5)
    same_weights(other, model)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, values in zip(logged, record.parts, strict=True):
        assert {name: entry[name] for name in values} == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert not any(layer.selector for layer in moe_layers(other).values())


def test_router_training_callback_trains_routers_alone_as_our_loop_does(tmp_path):
    model, other = convert_tiny(tiny_llama()), convert_tiny(tiny_llama())
    with RouterTraining(model) as part:
        record = train(model, whole_rows(), STEPS, parts=[part])
    trainer = trainer_of(other, whole_rows(), STEPS, tmp_path, callbacks=[RouterTrainingCallback()])
    assert trainer_losses(trainer) == pytest.approx(record.losses, rel=1e-5)
    same_weights(other, model)
    dense = convert_tiny(tiny_llama())
    assert all(torch.equal(p, dense.get_parameter(name)) == ("router" not in name) for name, p in other.named_parameters())


@pytest.mark.parametrize("callback", [FinetuneCallback, RouterTrainingCallback])
def test_callbacks_of_converted_models_when_compiled_are_refused(callback, tmp_path):
    with pytest.raises(ConfigError, match="torch_compile and the training of converted models"):
        trainer_of(convert_tiny(tiny_llama()), text(), STEPS, tmp_path, callbacks=[callback()], torch_compile=True)


def _sparsified():
    model, sites = silu()
    return model, SparsifyCallback(sites, CONFIG, teacher=silu(seed=1)[0])


STAGES = {
    "sparsify": _sparsified,
    "finetune": lambda: (convert_tiny(tiny_llama()), FinetuneCallback(FINETUNE)),
    "routers": lambda: (convert_tiny(tiny_llama()), RouterTrainingCallback()),
}
SCRIPT = """
import json, os, sys
sys.path.insert(0, os.environ["MOEIFY_TESTS"])
import torch
torch.set_num_threads(1)
from pathlib import Path
from training import trainer_losses, trainer_of
from unit.train.test_hf_callbacks import STAGES, STEPS, whole_rows
from dataclasses import replace

folder = Path(sys.argv[1])
half = replace(STEPS, batch_sequences=2, micro_sequences=1)  # of each process
losses = {}
for stage, make in STAGES.items():
    torch.manual_seed(0)
    model, callback = make()
    trainer = trainer_of(model, whole_rows(), half, folder / stage, callbacks=[callback], ddp_backend="gloo")
    assert trainer.accelerator.num_processes == 2
    losses[stage] = trainer_losses(trainer)
if trainer.is_world_process_zero():
    (folder / "losses.json").write_text(json.dumps(losses))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads may abort while the interpreter tears down, after everything is done
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory, request):
    """Losses of every stage in two processes; starting them takes longer than they do."""
    folder = tmp_path_factory.mktemp("launched")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    tests = request.config.rootpath / "tests"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), str(folder)]
    environment = os.environ | {"MOEIFY_TESTS": str(tests), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_callbacks_when_accelerate_launches_two_processes_train_as_one_does(stage, ours, launched):
    if stage == "sparsify":
        wanted = ours[0].losses
    else:
        model = convert_tiny(tiny_llama())
        with Finetuning(model, FINETUNE) if stage == "finetune" else RouterTraining(model) as part:
            wanted = train(model, whole_rows(), STEPS, parts=[part]).losses
    assert launched[stage] == pytest.approx(wanted, rel=1e-5)
