"""A converted tiny GPT-2: two layers, ten experts of four neurons, oracle router."""

import pytest
import torch
import transformers as hf

from moeify.layers import MoEFFN, attach
from moeify.routers import OracleRouterConfig, RandomRouterConfig, build_router
from moeify.select import TopK
from moeify.sites import find_ffn_sites

EXPERTS = 10


def convert_tiny(model, inputs, *, router=None):
    for site in find_ffn_sites(model, inputs):
        module = build_router(router or OracleRouterConfig(), site=site, num_experts=EXPERTS)
        attach(model, MoEFFN(site, num_experts=EXPERTS, router=module, rule=TopK(k=5)))
    return model


@pytest.fixture
def windows():
    return torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpt(windows):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=4, n_inner=40, activation_function="relu", initializer_range=0.2
    )
    return convert_tiny(hf.GPT2LMHeadModel(config).eval(), {"input_ids": windows[:1]})


@pytest.fixture
def random_gpt(windows):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=4, n_inner=40, initializer_range=0.2)
    return convert_tiny(hf.GPT2LMHeadModel(config).eval(), {"input_ids": windows[:1]}, router=RandomRouterConfig())


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.2,
    )
    return convert_tiny(hf.BertForSequenceClassification(config).eval(), text_batch())


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return convert_tiny(hf.BertModel(config).eval(), text_batch())


def text_batch():
    """Two texts of six and three tokens."""
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    }


@pytest.fixture
def padded_batch():
    return text_batch()
