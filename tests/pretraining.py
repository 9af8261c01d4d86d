"""Tiny GPTs and data for tests of sparse-dense pre-training."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moeify.sites import find_ffn_sites


def tiny_gpt(*, seed=0, inner=50, act="relu"):
    """Two layers, D = 32, F = 50: 8 experts of 6 or 7 neurons; biases, (in, out) weights, no dropout."""
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=inner, activation_function=act,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def sites_of(model):
    return find_ffn_sites(model, {"input_ids": torch.arange(16)[None]})


class Counting:
    """Counting modulo a prime from different starts: quickly learned."""

    def __len__(self):
        return 40

    def batch(self, rows, *, generator):
        ids = (torch.tensor(rows)[:, None] * 5 + torch.arange(16) * 7) % 61
        return {"input_ids": ids, "labels": ids}


PROBE = [Counting().batch(rows, generator=None) for rows in ((36, 37), (38, 39))]
