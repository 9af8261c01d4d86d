"""Whole models on a GPU, built from a config with random weights: a decoded token and a training step, dense and converted.

What a token costs does not depend on what it says; routers are random, and `TopK` gives each token its share of the experts exactly.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

from moeify.controls import set_impl
from moeify.convert import apply_site
from moeify.layers import moe_layers
from moeify.manifest import SiteRecord
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Llama, its prompt and its training batch."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocabulary: int
    prompt: int
    new_tokens: int
    rounds: int
    batch: int
    window: int


FULL = Model(
    d_model=2048, d_ff=8192, num_layers=8, num_heads=32, vocabulary=32000, prompt=16, new_tokens=64, rounds=4, batch=4, window=2048
)
QUICK = Model(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocabulary=64, prompt=2, new_tokens=2, rounds=1, batch=1, window=4)
NUM_EXPERTS = 32
"""Of the training step: 8 of 32 run."""


def rows(
    *, quick: bool, kind: str, dtype: torch.dtype, peaks: tuple[float, float], end: float, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows of `generate` at batch 1 and of training steps; milliseconds, the roofline from measured ceilings beside each.

    ``error``: of the logits against the same experts by plain PyTorch, relative; a row in which it is large has no times.

    Args:
        end: of `time.perf_counter`: of what would begin later the names go to ``left_out``.
    """
    size = QUICK if quick else FULL
    compiled = kind == "cuda"
    cases = (
        ("generate", (0.5,) if quick else (0.5, 0.25), size.d_ff // (16 if quick else 64)),
        ("step", (0.25,), 4 if quick else NUM_EXPERTS),
    )
    for what, fractions, experts in cases:
        if time.perf_counter() > end:
            left_out.append(f"model {what}")
            continue
        dense = _dense(size, dtype=dtype, kind=kind)
        measure = _generate_ms if what == "generate" else _step_ms
        dense_ms = measure(dense, size, compiled=compiled)
        for fraction in fractions:
            if time.perf_counter() > end:
                left_out.append(f"model {what} {fraction}")
                continue
            k = max(1, round(fraction * experts))
            ours = _converted(copy.deepcopy(dense), size, num_experts=experts, k=k)
            error = _logits_error(ours, size)
            is_right = error < LARGEST_ERROR
            ours_ms = measure(ours, size, compiled=compiled) if is_right else math.nan
            floor_ms = _floor_ms(dense, size, k / experts, dtype=dtype, peaks=peaks, is_step=what == "step")
            labels = {"what": what, "model": f"llama {size.num_layers} x {size.d_model}/{size.d_ff}", "experts": experts, "f": k / experts}
            labels |= {"tokens": size.batch * size.window if what == "step" else 1, "compiled": compiled and what == "generate"}
            yield labels | {
                "dense_ms": dense_ms,
                "ours_ms": ours_ms,
                "ratio": dense_ms / ours_ms,
                "floor_ms": floor_ms,
                "bound_by": "flops" if what == "step" else "bytes",
                "of_floor": floor_ms / ours_ms,
                "error": error,
                "is_right": is_right,
            }
            del ours


def _dense(size: Model, *, dtype: torch.dtype, kind: str) -> Any:
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=max(1, size.num_heads // 4),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(kind):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _converted(model: Any, size: Model, *, num_experts: int, k: int) -> Any:
    """Executors with random routers on every FFN, in place, by the kernels of this file's device."""
    ids = _ids(model, size, batch=1, length=8)
    for site in find_ffn_sites(model, {"input_ids": ids}):
        moe = apply_site(model, SiteRecord(site=site, num_experts=num_experts, router=NormRouterConfig(), rule=TopK(k=k)), order_F=None)
        moe.impl = "auto" if ids.is_cuda else "triton"
    return model


LARGEST_ERROR = 0.1
"""Of logits: in types of 2 bytes another rounding lets the next layer run other experts."""


@torch.no_grad()
def _logits_error(model: Any, size: Model) -> float:
    """Relative, of our kernels against `masked`, of a prompt."""
    ids, impl = _ids(model, size, batch=1, length=min(size.window, 64)), next(iter(moe_layers(model).values())).impl
    found = model(ids).logits.float()
    set_impl(model, "masked")
    exact = model(ids).logits.float()
    set_impl(model, impl)
    return float((found - exact).norm() / exact.norm())


def _ids(model: nn.Module, size: Model, *, batch: int, length: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.randint(size.vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def _generate_ms(model: Any, size: Model, *, compiled: bool) -> float:
    """A token of greedy `generate` with a static cache, its prompt shared out; steps are compiled whole, as CUDA graphs."""
    torch.compiler.reset()
    options: dict[str, Any] = {"max_new_tokens": size.new_tokens, "do_sample": False, "cache_implementation": "static"}
    options |= {"compile_config": CompileConfig(fullgraph=True, mode="reduce-overhead")} if compiled else {"disable_compile": True}
    ids = _ids(model, size, batch=1, length=size.prompt)
    return _median_ms(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), size=size) / size.new_tokens


def _step_ms(model: Any, size: Model, *, compiled: bool) -> float:
    """Forward, loss, backward and AdamW, not compiled."""
    model.train()
    ids = _ids(model, size, batch=size.batch, length=size.window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=ids.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    try:
        return _median_ms(step, size=size)
    finally:
        model.zero_grad()
        model.eval()


def _median_ms(call: Callable[[], object], *, size: Model) -> float:
    times = []
    for i in range(-2 if size.rounds > 1 else 0, size.rounds):  # two calls to warm up, and to compile
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _floor_ms(dense: Any, size: Model, f: float, *, dtype: torch.dtype, peaks: tuple[float, float], is_step: bool) -> float:
    """The least time of ours: weights but the embedding read once, or six FLOPs a weight and token; a share f of the FFNs'."""
    all_weights = sum(p.numel() for p in dense.parameters()) - dense.get_input_embeddings().weight.numel()
    ffn = 3 * size.d_model * size.d_ff * size.num_layers
    weights = all_weights - (1 - f) * ffn
    if is_step:
        return float(6 * weights * size.batch * size.window / peaks[1] * 1e3)
    return float(weights * dtype.itemsize / peaks[0] * 1e3)
