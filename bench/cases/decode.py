"""Tokens per second of greedy decoding at batch size 1, dense against moe mode of one converted checkpoint, beside the roofline.

The roofline takes the FLOPs and the weight bytes of one token, and the fp32 peaks that `moeify doctor` measures in the same process; the
caches of keys and values, and everything but matrix products, come on top. A call includes the prefill of the prompt.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.tiny import convert_tiny
from moeify import load_model, measure_ms, model_cost, model_weights, record_active, roofline_s, set_mode
from moeify.doctor import doctor


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--converted", type=Path, metavar="DIR", help="a converted language model; without it a tiny random one")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that a call adds")


def run(*, quick: bool, converted: Path | None = None, new_tokens: int = 32) -> Iterator[dict[str, Any]]:
    """Rows: one per mode, with milliseconds per token (median, p20, p80) and what the arithmetic and the memory alone would take."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(converted or convert_tiny(Path(folder))[1])
    prompt = {"input_ids": torch.arange(8)[None]}
    with record_active(model) as stats:
        _decode(model, prompt, mode="moe", new_tokens=new_tokens)
    active = {"dense": 1.0, "moe": stats.active_fraction()}
    speed = doctor()["speed"]
    cost = model_cost(model, prompt).at_context(8 + new_tokens // 2)
    weights = model_weights(model)
    routers = sum(size for _, size in weights.router.values())
    calls = {mode: partial(_decode, model, prompt, mode=mode, new_tokens=new_tokens) for mode in active}
    times = measure_ms(calls, rounds=2 if quick else 10, warmup=1)
    for mode, fraction in active.items():
        flops = cost.dense_flops_per_token if mode == "dense" else cost.flops_per_token(fraction)
        num_bytes = weights.read_bytes_per_token(fraction) - (routers if mode == "dense" else 0)
        least_s = roofline_s(
            flops=flops, num_bytes=num_bytes, peak_flops_per_s=speed["matmul_flops_per_s"], peak_bytes_per_s=speed["copy_bytes_per_s"]
        )
        yield {
            "model": str(converted or "random Llama"),
            "mode": mode,
            "active_fraction": fraction,
            "ms_per_token": times[mode].median_ms / new_tokens,
            "p20_ms": times[mode].p20_ms / new_tokens,
            "p80_ms": times[mode].p80_ms / new_tokens,
            "tokens_per_s": new_tokens / times[mode].median_ms * 1e3,
            "mflops_per_token": flops / 1e6,
            "read_mb_per_token": num_bytes / 1e6,
            "roofline_ms": least_s * 1e3,
            "dense_over_this": times["dense"].median_ms / times[mode].median_ms,
        }


def _decode(model: Any, prompt: dict[str, torch.Tensor], *, mode: str, new_tokens: int) -> None:
    assert isinstance(model, nn.Module)
    set_mode(model, mode)
    model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
