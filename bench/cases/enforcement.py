"""What the sparsity penalty costs a training step: forward, backward and AdamW with `enforce_sparsity` against the same without.

Two models of the same random weights take the same batch in turn, now one first, now the other, so that both meet the same machine.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.common import p80_over_p20
from moeify import EnforcementConfig, enforce_sparsity, find_ffn_sites

_LAYERS, _WIDTH, _VOCABULARY = 4, 256, 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, in sequences of 128; 128 with --quick")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each side; 2 with --quick")


def run(*, quick: bool, tokens: int = 1024, steps: int = 40) -> Iterator[dict[str, Any]]:
    """One row for each model."""
    tokens, steps = (128, 2) if quick else (tokens, steps)
    ids_BS = torch.randint(0, _VOCABULARY, (max(1, tokens // 128), 128), generator=torch.Generator().manual_seed(0))
    for name, build in _MODELS.items():
        plain, enforced = build(), build()
        enforced.load_state_dict(plain.state_dict())
        sites = find_ffn_sites(enforced, {"input_ids": ids_BS[:1, :16]})
        # No schedule: its first weights are 0.
        with enforce_sparsity(enforced, sites, EnforcementConfig(schedule="constant")) as enforcement:
            sides = {"plain": _stepper(plain, ids_BS), "enforced": _stepper(enforced, ids_BS)}
            times: dict[str, list[float]] = {side: [] for side in sides}
            for step in range(-2, steps):  # two to warm up
                for side in sorted(sides, reverse=bool(step % 2)):
                    start = time.perf_counter()
                    sides[side]()
                    if step >= 0:
                        times[side].append(time.perf_counter() - start)
            penalty = enforcement.value().item()  # NaN had the hooks never run
        pairs = [e / p - 1 for e, p in zip(times["enforced"], times["plain"], strict=True)]
        yield {
            "model": name,
            "tokens": ids_BS.numel(),
            "dtype": "float32",
            "penalised": "preactivations" if name == "gpt2 gelu" else "activations",
            "penalty": penalty,
            "plain_us": median(times["plain"]) * 1e6,
            "enforced_us": median(times["enforced"]) * 1e6,
            "cost": median(pairs),
            "spread": p80_over_p20(times["plain"]),
        }


def _stepper(model: nn.Module, ids_BS: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpt2(activation: str) -> nn.Module:
    sizes = {"n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": 4, "n_positions": 128, "vocab_size": _VOCABULARY}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, activation_function=activation, bos_token_id=None, eos_token_id=None))


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=4,
            hidden_act="relu",
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2 relu": lambda: _gpt2("relu"),
    "llama relu": _llama,
    "gpt2 gelu": lambda: _gpt2("gelu_new"),
}
