"""Tokens per second of Hugging Face `generate`, greedy, with its cache: a dense model against one whose linear layers skip input channels.

Dense is an ordinary model of the same weights and torch's own kernels. The sparse one skips the wanted share of the input channels of every
linear layer of its blocks, by one level a layer: a quantile of what the layer reads in a dense run, set again on what it reads in the
sparse one. Rows say what was recorded while decoding. The model is random, of SmolLM2-135M's shape: what a token costs does not depend on
what it says. Sides take turns in one process, as in `generate_cpu`, whose clock this is.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.cases.generate_cpu import SMOLLM2, TINY, TOLERANCE, Side, compared, take_turns
from bench.common import DTYPES, numbers, whole_numbers, words
from moeify import find_linear_sites, record_channels, set_mode
from moeify._config import lookup
from moeify.channels import SparseInput, attach_channels, sparse_inputs
from moeify.errors import ConfigError

ROUNDS_OF_LEVELS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--skip", type=numbers, default=(0.0, 0.4, 0.5), metavar="F,F", help="skipped shares; 0,0.4,0.5 by default")
    parser.add_argument("--batches", type=whole_numbers, default=(1,), metavar="B,B", help="sequences at once; 1 by default")
    parser.add_argument("--prompt-tokens", type=int, help="before decoding begins; 128, with --quick 8")
    parser.add_argument("--new-tokens", type=int, help="decoded from there; 64, with --quick 8")
    parser.add_argument("--rounds", type=int, help="timed calls of each side; 5, with --quick 1")


def run(
    *,
    quick: bool,
    dtypes: Sequence[str] = tuple(DTYPES),
    skip: Sequence[float] = (0.0, 0.4, 0.5),
    batches: Sequence[int] = (1,),
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: one per dtype, batch size and share; microseconds a token step, medians over the rounds; ratio is dense over ours."""
    prompt_tokens, new_tokens, rounds = (
        (short if quick else full) if given is None else given
        for given, full, short in ((prompt_tokens, 128, 8), (new_tokens, 64, 8), (rounds, 5, 1))
    )
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    if wrong := [share for share in skip if not 0 <= share < 1]:
        raise ConfigError(f"--skip must be in [0, 1), got {wrong[0]}.")
    for option, value, least in (
        ("--batches", min(batches), 1),
        ("--prompt-tokens", prompt_tokens, 2),
        ("--new-tokens", new_tokens, 2),
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, got {value}.")
    shape = TINY if quick else SMOLLM2
    for name, dtype in types.items():
        dense, ours = _pair(shape, dtype)
        for batch in batches:
            ids_BS = torch.randint(shape["vocab_size"], (batch, prompt_tokens), generator=torch.Generator().manual_seed(1))
            _check_same(dense, ours, ids_BS)
            levels = {share: _levels(ours, ids_BS, share) for share in skip}
            sides = {"dense": Side(dense)} | {f"ours {share}": _Sparse(ours, levels[share]) for share in skip}
            times = take_turns(sides, ids_BS, new_tokens=new_tokens, rounds=rounds)
            step = {side: [t.step_s for t in found] for side, found in times.items()}
            first = {side: statistics.median(t.first_s for t in found) * 1e3 for side, found in times.items()}
            for share in skip:
                side = f"ours {share}"
                row = {"dtype": name, "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "wanted_skip": share}
                row |= {"skipped": _recorded(sides[side], ids_BS, new_tokens)} | compared(step, side)
                yield row | {"dense_ttft_ms": first["dense"], "ours_ttft_ms": first[side]}
        del dense, ours, sides  # before the next ones are made


class _Sparse(Side):
    """A model with these levels."""

    def __init__(self, model: Any, levels: dict[str, float]) -> None:
        super().__init__(model)
        object.__setattr__(self, "levels", levels)

    @torch.no_grad()
    def prepare(self, ids_BS: Tensor) -> None:
        """Set the levels; what a layer makes once is not part of a token."""
        _set_levels(self.model, self.levels)  # type: ignore[attr-defined]
        self.model(ids_BS[:, :1])


def _pair(shape: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ours = copy.deepcopy(dense)
    for site in find_linear_sites(ours, {"input_ids": torch.arange(8)[None]}):
        attach_channels(ours, SparseInput(site, first_dense=1))
    return dense, ours


def _set_levels(model: nn.Module, levels: dict[str, float]) -> None:
    for name, executor in sparse_inputs(model).items():
        executor.level_K.fill_(levels[name])


@torch.no_grad()
def _levels(model: nn.Module, ids_BS: Tensor, share: float) -> dict[str, float]:
    """Level of each layer that ``share`` of what it reads stays below."""
    levels = dict.fromkeys(sparse_inputs(model), 0.0)
    for _ in range(ROUNDS_OF_LEVELS if share else 0):
        read: dict[str, float] = {}

        def note(_module: nn.Module, args: tuple[Tensor, ...], name: str, read: dict[str, float] = read) -> None:
            sizes = args[0].detach().abs().float().flatten().sort().values
            read[name] = float(sizes[round(share * (len(sizes) - 1))])

        _set_levels(model, levels)
        hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name=name)) for name in levels]
        try:
            model(ids_BS)
        finally:
            for hook in hooks:
                hook.remove()
        levels = read
    return levels


def _recorded(side: Side, ids_BS: Tensor, new_tokens: int) -> float:
    side.prepare(ids_BS)
    with record_channels(side.model) as recorder:
        side(ids_BS, new_tokens)
    return recorder.skipped_frac()


@torch.no_grad()
def _check_same(dense: Any, ours: Any, ids_BS: Tensor) -> None:
    _set_levels(ours, dict.fromkeys(sparse_inputs(ours), 0.0))
    set_mode(ours, "moe")
    for tokens in (1, 8):  # by the kernel, and what a prompt of some tokens runs
        a, b = (model(ids_BS[:1, :tokens]).logits.float() for model in (dense, ours))
        error = ((a - b).abs().max() / a.abs().max()).item()
        if not error <= TOLERANCE[dense.dtype]:
            raise ConfigError(f"with every channel kept the models differ by {error:.2g} of the largest logit; nothing was timed.")
