"""The training loop: what Trainer computes, in any split into micro-batches, and errors that say where it went wrong."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from families.models import build
from tiny import tiny_llama
from torch import nn
from training import F32, Rows, emotions, text, tiny_classifier, trainer_losses, trainer_of, weights, without_dropout

from moeify.errors import ConfigError, DataError, TrainingError
from moeify.train import loop
from moeify.train.loop import TrainConfig, TrainRecord, sequences_read, train


def test_train_lowers_the_loss_and_leaves_eval_mode():
    model = tiny_llama()
    record = train(model, text(rows=4), TrainConfig(steps=12, lr=1e-2, warmup_steps=2, **F32))
    assert len(record.losses) == 12
    assert record.losses[-1] < 0.7 * record.losses[0]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_train_is_deterministic_in_its_seed_and_leaves_the_callers_random_numbers():
    runs = []
    for seed in (0, 0, 1):
        model = tiny_classifier(hidden_dropout_prob=0.2)
        torch.manual_seed(5)
        runs.append((train(model, emotions(), TrainConfig(steps=3, batch_sequences=11, seed=seed, **F32)).losses, weights(model)))
        following = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(following, torch.rand(1))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_train_trains_only_what_requires_a_gradient():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = weights(model)
    train(model, text(), TrainConfig(steps=2, **F32))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(before) - {"model.embed_tokens.weight"}


def test_train_when_the_model_has_gradients_already_trains_as_without():
    plain, used = tiny_llama(), tiny_llama()
    for model in (plain, used):
        model.model.embed_tokens.requires_grad_(False)
    used.model.embed_tokens.weight.grad = torch.full_like(used.model.embed_tokens.weight, 1e3)  # in the norm that is clipped
    used(**text(seed=1).tensors).loss.backward()
    config = TrainConfig(steps=2, lr=1e-2, clip=0.1, **F32)
    assert train(used, text(), config).losses == train(plain, text(), config).losses


def test_group_by_length_puts_like_lengths_into_a_step_in_a_random_order_and_every_sequence_once():
    lengths = [7, 1, 5, 3, 8, 2, 6, 4, 9, 0, 11]
    data = emotions(rows=11)
    data.lengths = lengths
    train(tiny_classifier(), data, TrainConfig(steps=8, batch_sequences=3, group_by_length=True, **F32))
    for epoch in (data.seen[:4], data.seen[4:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(11))
        assert sorted(sorted(lengths[row] for row in rows) for rows in epoch) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 11]]
        assert len(epoch[3]) == 2  # what is left comes last
    assert data.seen[:3] != data.seen[4:7]


def test_group_by_length_reads_what_sequences_read_says_and_goes_on_where_it_was(tmp_path, monkeypatch):
    lengths = [7, 1, 5, 3, 8, 2, 6, 4, 9, 0, 11]
    config = TrainConfig(steps=3, batch_sequences=3, group_by_length=True, save_every=1, **F32)
    runs = []
    for killed in (False, True):
        data, model = emotions(rows=11), tiny_classifier()
        data.lengths = lengths
        folder = tmp_path / str(killed)
        if killed:
            with monkeypatch.context() as patch:
                patch.setattr(loop, "save_state", _dies_at_step(2, loop.save_state))
                with pytest.raises(KeyboardInterrupt):
                    train(model, data, config, state=folder)
            model = tiny_classifier()
        runs.append(train(model, data, config, state=folder).losses)
        assert sorted({row for rows in data.seen for row in rows}) == sequences_read(11, config, lengths=lengths)
    assert runs[0] == runs[1]


def _dies_at_step(step, save):
    def saves(*args, **kwargs):
        save(*args, **kwargs)
        if kwargs["step"] == step:
            raise KeyboardInterrupt

    return saves


def test_group_by_length_of_sequences_of_one_length_changes_nothing():
    runs = [train(tiny_llama(), text(), TrainConfig(steps=3, group_by_length=is_grouped, **F32)).losses for is_grouped in (False, True)]
    assert runs[0] == runs[1]


def test_train_takes_every_sequence_once_an_epoch_in_another_order():
    data = text(rows=7)
    record = train(tiny_llama(), data, TrainConfig(steps=6, batch_sequences=3, micro_sequences=2, **F32))
    assert [len(rows) for rows in data.seen] == [2, 1, 2, 1, 1] * 2
    first, second = ([row for rows in part for row in rows] for part in (data.seen[:5], data.seen[5:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert record.epochs == TrainConfig(steps=6, batch_sequences=3).epochs(7) == 2


def test_sequences_that_a_training_reads_are_known_before_it_runs():
    for steps in (1, 2, 3, 5):
        data, config = text(rows=7), TrainConfig(steps=steps, batch_sequences=3, seed=4, **F32)
        train(tiny_llama(), data, config)
        assert sequences_read(7, config) == sorted({row for rows in data.seen for row in rows})


def test_train_counts_real_tokens():
    data = text(rows=8)
    record = train(tiny_llama(), data, TrainConfig(steps=2, batch_sequences=8, **F32))
    assert record.tokens == 2 * int(data.tensors["attention_mask"].sum())
    assert record.seconds > 0


@pytest.mark.parametrize("kind", ["causal", "masked", "classes"])
def test_train_when_split_into_micro_batches_takes_the_same_steps(kind):
    data = emotions() if kind == "classes" else text()
    model_of = {"causal": lambda: build("llama")[0], "masked": lambda: without_dropout(build("bert")[0]), "classes": tiny_classifier}[kind]
    whole, split = model_of(), model_of()
    options = {"steps": 4, "batch_sequences": 5, "lr": 1e-2, "clip": 0.1} | F32
    one = train(whole, data, TrainConfig(**options))
    two = train(split, data, TrainConfig(**options, micro_sequences=2))
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for name, p in whole.named_parameters():
        if "key.bias" not in name:  # its gradient is zero up to rounding, which Adam makes as large as any
            torch.testing.assert_close(split.get_parameter(name), p, rtol=1e-4, atol=1e-5)


def test_train_when_a_micro_batch_has_no_label_leaves_it_out():
    data = text(rows=4, padded=False)
    data.tensors["labels"][2:] = -100
    options = {"steps": 1, "batch_sequences": 4, "lr": 1e-2} | F32
    one = train(tiny_llama(), data, TrainConfig(**options)).losses
    assert train(tiny_llama(), data, TrainConfig(**options, micro_sequences=1)).losses == pytest.approx(one, rel=1e-6)
    data.tensors["labels"][:] = -100
    with pytest.raises(DataError, match=r"no label in the sequences of step 0; raise batch_sequences \(4\)"):
        train(tiny_llama(), data, TrainConfig(**options))


def test_train_when_gradients_are_checkpointed_gives_the_same_losses():
    one, two = (train(build("llama")[0], text(), TrainConfig(steps=3, lr=1e-2, gradient_checkpointing=c, **F32)) for c in (False, True))
    assert two.losses == pytest.approx(one.losses, rel=1e-6)


def test_train_in_bfloat16_keeps_the_weights_dtype_and_nearly_the_losses():
    models = tiny_llama(), tiny_llama()
    one, two = (
        train(model, text(), TrainConfig(steps=3, lr=1e-3, compute=compute)).losses
        for model, compute in zip(models, ("float32", "bfloat16"), strict=True)
    )
    assert one != two
    assert two == pytest.approx(one, rel=0.02)
    assert models[1].lm_head.weight.dtype is torch.float32


def test_train_in_float16_skips_a_step_that_overflows_and_its_place_in_the_schedule(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "_compute_dtype", lambda _config, _device: torch.float16)  # a CPU can, slowly
    grads = []

    def overflow(grad):
        grads.append(grad)
        return grad * (float("inf") if len(grads) == 2 else 1)

    model, plain = tiny_llama(), tiny_llama()
    seen = []
    model.register_forward_pre_hook(lambda m, _args: seen.append(m.lm_head.weight.detach().clone()) if m.training else None)
    model.lm_head.weight.register_hook(overflow)
    options = {"steps": 5, "lr": 1e-3, "warmup_steps": 3, "batch_sequences": 11, "save_every": 3} | F32
    record = train(model, text(), TrainConfig(**options), state=tmp_path)
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    monkeypatch.undo()
    wanted = train(plain, text(), TrainConfig(**options | {"steps": 4})).losses
    assert record.losses[0] == pytest.approx(wanted[0], rel=1e-2)
    # The first step's rate is 0, the second's is lost: the third takes the second's, a third of lr, which is Adam's first step.
    assert (seen[3] - seen[2]).abs().max().item() == pytest.approx(1e-3 / 3, rel=0.05)
    saved = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    assert saved["scaler"]["scale"] == 2.0**15
    assert saved["schedule"]["last_epoch"] == 4


def test_train_evaluates_in_eval_mode_every_so_often_and_at_the_end_without_a_trace():
    modes = []

    def evaluate(model):
        modes.append(model.training)
        torch.rand(3)
        return len(modes)

    config = TrainConfig(steps=5, batch_sequences=3, eval_every=2, **F32)
    plain = train(tiny_classifier(hidden_dropout_prob=0.2), emotions(), config)
    record = train(tiny_classifier(hidden_dropout_prob=0.2), emotions(), config, evaluate=evaluate)
    assert record.evals == ((2, 1.0), (4, 2.0), (5, 3.0))
    assert not any(modes)
    assert record.losses == plain.losses


def test_train_when_forwards_in_eval_mode_draw_random_numbers_trains_as_without():
    losses = []
    for draws in (False, True):
        model = tiny_llama()

        def noise(module, _args, output, draws=draws):
            if draws and not module.training:
                torch.rand(1)
            return output + 0.1 * torch.randn_like(output) if module.training else output

        model.model.layers[0].mlp.register_forward_hook(noise)
        losses.append(train(model, text(), TrainConfig(steps=2, **F32)).losses)
    assert losses[0] == losses[1]


def test_train_tells_parts_the_step_and_logs_their_values(caplog):
    class Counter:
        def __init__(self):
            self.steps = []

        def set_step(self, step):
            self.steps.append(step)

        def values(self):
            return {"twice": torch.tensor(2.0 * self.steps[-1])}

    part = Counter()
    with caplog.at_level(logging.INFO, logger="moeify.train.loop"):
        record = train(tiny_llama(), text(), TrainConfig(steps=5, log_every=2, **F32), parts=[part])
    assert part.steps == [0, 1, 2, 3, 4]
    assert record.parts == ({"step": 2, "twice": 2}, {"step": 4, "twice": 6}, {"step": 5, "twice": 8})
    assert "step 4 of 5: loss" in caplog.text


# ---- Trainer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("micro", [None, 2])
def test_train_and_trainer_give_a_causal_model_the_same_losses(schedule, micro, tmp_path):
    options = {"steps": 8, "batch_sequences": 4, "micro_sequences": micro, "lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.5, "clip": 0.2}
    config = TrainConfig(**options | {"schedule": schedule.partition("_")[0], "betas": (0.8, 0.9), "seed": 3} | F32)
    ours, theirs = build("llama")[0], build("llama")[0]
    wanted = trainer_losses(trainer_of(theirs, text(), config, tmp_path, lr_scheduler_type=schedule))
    assert train(ours, text(), config).losses == pytest.approx(wanted, rel=1e-6, abs=0)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [None, 2])
def test_train_and_trainer_give_a_classifier_with_dropout_the_same_losses(micro, tmp_path):
    options = {"steps": 7, "batch_sequences": 4, "micro_sequences": micro, "lr": 1e-2, "weight_decay": 0.5, "clip": 0.2}
    config = TrainConfig(**options, seed=3, **F32)
    ours, theirs = (tiny_classifier(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2) for _ in range(2))
    # BERT's heads take num_items_in_batch and ignore it; unless told, Trainer adds the means of micro-batches up.
    theirs.accepts_loss_kwargs = False
    wanted = trainer_losses(trainer_of(theirs, emotions(rows=12), config, tmp_path))
    assert train(ours, emotions(rows=12), config).losses == pytest.approx(wanted, rel=1e-6, abs=0)


# ---- what can go wrong


def test_train_that_diverges_names_the_first_layer_and_leaves_the_weights():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    before = weights(model)
    message = (
        r"the loss is nan at step 0: the activations of 'model.layers.1.mlp.up_proj' are the first .* Lower lr \(0.01\) or clip \(1.0\)\.$"
    )
    with pytest.raises(TrainingError, match=message):
        train(model, text(), TrainConfig(steps=3, lr=1e-2, **F32))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_train_when_only_a_gradient_is_not_finite_names_its_parameter():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match=r"gradient norm is nan at step 0: .* the gradient of 'model.layers.0.mlp.down_proj"):
        train(model, text(), TrainConfig(steps=3, **F32))


def test_train_out_of_memory_says_which_knob_lowers_it():
    model = tiny_llama()

    def fail(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.model.layers[0].register_full_backward_hook(fail)
    with pytest.raises(TrainingError, match=r"out of memory at step 0; lower micro_sequences \(4\), or set gradient_checkpointing"):
        train(model, text(), TrainConfig(steps=1, batch_sequences=4, **F32))


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), id="GPU"),
        pytest.param(RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"), id="CPU"),
        pytest.param(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), id="cuBLAS"),
        pytest.param(MemoryError(), id="Python"),
    ],
)
def test_train_out_of_memory_in_the_first_forward_of_all_says_which_knob_lowers_it(error):
    model = tiny_llama()

    def fail(*_args):
        raise error

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match="out of memory at step 0; take shorter sequences: a state"):
        train(model, text(), TrainConfig(steps=1, batch_sequences=1, gradient_checkpointing=True, **F32))


def test_train_when_a_forward_fails_otherwise_passes_the_error_on():
    model = tiny_llama()
    model.lm_head.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(model, text(), TrainConfig(steps=1, **F32))


def test_train_when_there_is_nothing_to_train_or_to_train_on_says_so():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        train(model, text(), TrainConfig(steps=1))
    with pytest.raises(DataError, match="no sequence"):
        train(tiny_llama(), text(rows=0), TrainConfig(steps=1))
    with pytest.raises(ConfigError, match="float16' needs a GPU"):
        train(tiny_llama(), text(), TrainConfig(steps=1, compute="float16"))


def test_train_when_trained_weights_are_bfloat16_warns_once_and_trains():
    model = tiny_llama(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16") as warned:
        record = train(model, text(), TrainConfig(steps=2, lr=1e-2, **F32))
    (message,) = (str(w.message) for w in warned)
    assert message == (
        "'model.embed_tokens.weight' is bfloat16, which rounds small steps away; load the model in float32 "
        "(compute='bfloat16' multiplies in it)."
    )
    assert len(record.losses) == 2
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    model.lm_head.weight.requires_grad_()
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0].float(),))
    train(model, text(), TrainConfig(steps=1, **F32))  # what is frozen may be of any type; a warning would be an error


def test_train_when_trained_weights_are_float16_refuses():
    model = tiny_llama(dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"'model.embed_tokens.weight' is float16, .* load the model in float32"):
        train(model, text(), TrainConfig(steps=1, **F32))
    for p in model.parameters():
        p.requires_grad_(False)
        p.data = p.data.float() if p is model.lm_head.weight else p.data
    model.lm_head.weight.requires_grad_()
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0].float(),))
    assert len(train(model, text(), TrainConfig(steps=1, **F32)).losses) == 1, "what is frozen may be of any type"


def test_train_when_there_is_no_loss_says_so():
    with pytest.raises(DataError, match="LlamaModel gives no loss for input_ids, attention_mask: it needs a head, and the data labels"):
        train(tiny_llama().model, Rows(**{k: v for k, v in text().tensors.items() if k != "labels"}), TrainConfig(steps=1, **F32))


def test_train_when_the_model_cannot_be_checkpointed_says_so():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ConfigError, match="Plain has no gradient checkpointing; lower micro_sequences"):
        train(Plain(), text(), TrainConfig(steps=1, gradient_checkpointing=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"micro_sequences": 0}, "micro_sequences must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"clip": -1.0}, "clip must be"),
        ({"min_lr_frac": 1.5}, "min_lr_frac"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_train_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"steps": 1} | options)


def test_train_config_decisive_is_all_that_changes_the_result():
    config = TrainConfig(steps=3, micro_sequences=1, gradient_checkpointing=True, eval_every=1, save_every=1, log_every=1)
    assert config.decisive() == TrainConfig(steps=3).decisive()
    for change in ({"steps": 4}, {"batch_sequences": 1}, {"lr": 0.5}, {"seed": 1}, {"compute": "float32"}):
        assert replace(config, **change).decisive() != config.decisive()


def test_train_record_is_plain_numbers():
    from moeify._config import from_dict, to_dict

    record = TrainRecord(losses=(1.5,), evals=((1, 2.0),), parts=({"step": 1.0},), tokens=3, epochs=0.5, seconds=0.25)
    assert from_dict(TrainRecord, to_dict(record)) == record
