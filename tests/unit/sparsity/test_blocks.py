"""Blocks run alone: what they give is what they gave in the model, and nothing stays behind."""

import math

import pytest
import torch
from tiny import tiny_inputs, tiny_llama
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from moeify.errors import UnsupportedModelError
from moeify.sparsity.blocks import BlockCalls, block_influence


def gpt2():
    config = GPT2Config(vocab_size=257, n_embd=16, n_head=2, n_layer=2, n_positions=32)
    return GPT2LMHeadModel(config).eval(), ["transformer.h.0", "transformer.h.1"]


def bert():
    config = BertConfig(vocab_size=257, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24)
    return BertModel(config).eval(), ["encoder.layer.0", "encoder.layer.1"]


MODELS = {"llama": lambda: (tiny_llama(), ["model.layers.0", "model.layers.1"]), "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_a_block_that_did_not_change_has_no_error_and_one_that_did_has_its_squared_distance(family, compute):
    model, names = MODELS[family]()
    model.train()
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[0, :2] = 0
    calls = BlockCalls(model, names, {**tiny_inputs(), "attention_mask": padded}, compute=compute)
    for _ in range(2):  # a cache that grew would not fit the mask
        assert [calls.error(name) for name in names] == [0.0, 0.0]
    block = model.get_submodule(names[1])
    hook = block.register_forward_hook(lambda _m, _a, out: out + 0.5 if isinstance(out, torch.Tensor) else (out[0] + 0.5, *out[1:]))
    width = model.config.hidden_size
    assert calls.error(names[1]) == pytest.approx(18 * width * 0.25, rel=0.02)
    assert calls.error(names[0]) == 0.0
    hook.remove()
    assert model.training
    assert getattr(model.config, "use_cache", True)
    assert not any(module._forward_hooks for module in model.modules())


def test_influence_is_the_mean_angle_between_input_and_output():
    class Turn(nn.Module):
        def __init__(self, angle):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(angle))

        def forward(self, hidden_states, scale=1.0):
            c, s = self.weight.cos(), self.weight.sin()
            return hidden_states @ torch.stack([torch.stack([c, s]), torch.stack([-s, c])]) * 3

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = Turn(0.25 * math.pi), Turn(math.pi), nn.Linear(2, 5)

        def forward(self, x):
            return self.third(self.second(self.first(x), scale=2.0))

    model, batches = Model(), [{"x": torch.randn(2, 3, 2)}, {"x": torch.randn(1, 5, 2)}]
    found = block_influence(model, ["first", "second", "first"], batches)
    assert found == {"first": pytest.approx(0.25, abs=1e-4), "second": pytest.approx(1.0, abs=1e-3)}
    with pytest.raises(UnsupportedModelError, match="'third' is not run as one module from hidden states to hidden states"):
        block_influence(model, ["first", "third"], batches)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_influence_is_the_mean_over_all_tokens_of_all_batches():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, hidden_states):
            return -hidden_states if len(hidden_states) == 1 else hidden_states * 2

    found = block_influence(nn.Sequential(Block()), ["0"], [{"input": torch.randn(2, 3, 4)}, {"input": torch.randn(1, 2, 4)}])
    assert found["0"] == pytest.approx(2 / 8, abs=1e-3)  # two tokens of eight are turned around


def test_a_few_positions_of_a_few_sequences_are_enough():
    model = tiny_llama()
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    ids = torch.zeros(5, 300, dtype=torch.long)
    BlockCalls(model, ["model.layers.0"], {"input_ids": ids, "attention_mask": ids + 1, "labels": ids}).error("model.layers.0")
    hook.remove()
    assert seen == [(2, 128, 32)] * 2


def test_a_block_that_writes_into_its_input_is_measured_on_what_entered_it():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            x += self.linear(x)
            return x

    model = nn.Sequential(InPlace(), InPlace())
    wrapped = nn.Module()
    wrapped.add_module("blocks", model)
    wrapped.forward = lambda x: model(x.clone())
    calls = BlockCalls(wrapped, ["blocks.0", "blocks.1"], {"x": torch.randn(4, 3)})
    assert [calls.error(name) for name in ("blocks.0", "blocks.1") * 2] == [0.0] * 4
