"""The training loop: it learns, follows its schedule, and says when it diverges."""

import itertools
import math

import pytest
import torch
from tiny import tiny_llama

from moeify.errors import ConfigError
from moeify.train.loop import TrainConfig, _warmup_cosine, train_lm


def batches():
    return itertools.repeat({"input_ids": torch.arange(24).reshape(2, 12) * 7 % 257})


def test_train_lm_lowers_the_loss_and_leaves_eval_mode():
    model = tiny_llama()
    losses = train_lm(model, batches(), TrainConfig(steps=12, lr=1e-2, warmup_steps=2))
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_train_lm_is_deterministic():
    runs = []
    for _ in range(2):
        model = tiny_llama()
        runs.append((train_lm(model, batches(), TrainConfig(steps=3)), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_train_lm_trains_only_what_requires_a_gradient():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_lm(model, batches(), TrainConfig(steps=2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"model.embed_tokens.weight"}


def test_train_lm_that_diverges_stops_and_says_so():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0; lower the learning rate \(0.001\)"):
        train_lm(model, batches(), TrainConfig(steps=3))


def test_schedule_warms_up_and_decays_to_a_tenth():
    config = TrainConfig(steps=120, warmup_steps=20)
    assert _warmup_cosine(0, config) == 1 / 20
    assert _warmup_cosine(19, config) == _warmup_cosine(20, config) == 1
    assert math.isclose(_warmup_cosine(70, config), 0.55)
    assert math.isclose(_warmup_cosine(120, config), 0.1)


def test_train_config_refuses_no_steps():
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        TrainConfig(steps=0)
