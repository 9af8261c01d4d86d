"""Seeding touches the generators that are used, and puts them back."""

import contextlib
from functools import partial

import pytest
import torch
from tiny import convert_tiny, save_converted_tiny, save_dense_tiny, tiny_llama
from training import F32, text

from moeify import _random
from moeify.demo import small_relu_gpt
from moeify.hf.load import load_model
from moeify.hf.random import random_model
from moeify.pipeline import generate_text
from moeify.routers import NormRouterConfig
from moeify.sites import FFNSite, FFNWeights
from moeify.train.fit import RouterTrainConfig, fit_new_router
from moeify.train.loop import TrainConfig, train


@pytest.fixture
def others_seeded(monkeypatch):
    """Seeds that the generators of all GPUs were given: torch.manual_seed does that."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(7)
    assert seeds == [7]
    seeds.clear()
    return seeds


def test_seeded_draws_what_torch_draws_after_manual_seed_and_restores():
    torch.manual_seed(5)
    expected = torch.randn(4), torch.nn.init.normal_(torch.empty(3)), torch.randperm(9)
    torch.manual_seed(1)
    following = torch.rand(3)
    torch.manual_seed(1)
    with _random.seeded(5):
        found = torch.randn(4), torch.nn.init.normal_(torch.empty(3)), torch.randperm(9)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.rand(3), following)


def test_restored_goes_on_with_the_same_numbers_and_restores_after_an_error():
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    with _random.restored():
        assert torch.equal(torch.rand(3), first)
    with contextlib.suppress(KeyError), _random.restored():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("is_default", [False, True])
def test_seeded_on_a_gpu_seeds_that_one_alone_and_restores_it(monkeypatch, others_seeded, is_default):
    device, calls = torch.device("cuda:1"), []

    @contextlib.contextmanager
    def current(device):
        calls.append(("current", device))
        yield

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: calls.append(("get", device)) or "state")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(("set", device, state)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(("seed", seed)))
    monkeypatch.setattr(torch.cuda, "device", current)
    if is_default:
        monkeypatch.setattr(torch, "get_default_device", lambda: device)
    with contextlib.suppress(KeyError), _random.seeded(3, None if is_default else device):
        calls.append("inside")
        raise KeyError
    assert calls == [("get", device), ("current", device), ("seed", 3), "inside", ("set", device, "state")]
    assert others_seeded == []


def router_fit():
    weights = FFNWeights(up_FD=torch.randn(8, 4), down_FD=torch.randn(8, 4))
    site = FFNSite(name="a", up="a.up", down="a.down", activation="relu", d_model=4, d_ff=8, d_out=4)
    return partial(
        fit_new_router, NormRouterConfig(width=2), torch.randn(30, 4), torch.randn(4, 4), weights, site, 2, RouterTrainConfig(epochs=1)
    )


GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
WORK = {
    "load_model": lambda folder: partial(load_model, save_dense_tiny(folder)),
    "random_model": lambda _: partial(random_model, GPT2, auto_class="AutoModel", seed=1),
    "fit_new_router": lambda _: router_fit(),
    "train": lambda _: partial(train, tiny_llama(), text(), TrainConfig(steps=1, **F32)),
    "convert": lambda _: partial(convert_tiny, tiny_llama()),
    "demo": lambda _: partial(small_relu_gpt, seed=1),
    "generate_text": lambda folder: partial(generate_text, save_converted_tiny(folder), "a", max_new_tokens=1, temperature=1.0, seed=1),
}
"""Name -> what prepares a call that draws random numbers by a seed of its own."""


@pytest.mark.parametrize("name", WORK)
def test_work_on_a_cpu_leaves_all_of_the_callers_generators_alone(name, others_seeded, tmp_path):
    draw = WORK[name](tmp_path)
    others_seeded.clear()
    before = torch.get_rng_state()
    draw()
    assert others_seeded == []
    assert torch.equal(torch.get_rng_state(), before)
