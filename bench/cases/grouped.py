"""The kernels against a plain loop over experts and against the dense FFN, from the mask to the output.

The loop is what one writes first, and what transformers' eager experts do: for each expert find its tokens in the mask, gather, compute,
add back. Every other candidate pays for its plan. "cpu", where it was compiled, has weights kept by neuron, as converted models have; the
others, "auto" among them, have them as ``nn.Linear`` stores them, so that "auto" is what runs without a compiler. Masks: "uniform" draws
every pair alone; "skewed" gives expert e a popularity ~ 1 / (e + 1) in random order, which is nearer to a trained router. All in fp32.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify.evaluate import measure_ms
from moeify.kernels import build_plan, cpu, explain, moe_ffn
from moeify.sites.formula import ffn_dense, ffn_hidden
from moeify.sites.site import FFNWeights, expert_bounds

SHAPES = {"gpt2": (768, 3072, "relu", False), "smollm2": (576, 1536, "silu", True)}
NUM_EXPERTS = (8, 32, 128, 192)
NUM_TOKENS = (1, 4, 16, 64, 256, 1024)
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


def run(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows: milliseconds of each candidate (median, and p80 / p20 of auto), and ratios: above 1, the kernel is faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for shape, (D, neurons, activation, gated) in SHAPES.items():
            weights = _weights(D, neurons, gated=gated)
            for T in (16, 256) if quick else NUM_TOKENS:
                x_TD = torch.randn(T, D)
                for E in (8, 128) if quick else NUM_EXPERTS:
                    for fraction in (0.25,) if quick else FRACTIONS:
                        kinds = ("uniform", "skewed") if T == 256 and fraction == 0.25 else ("uniform",)
                        for kind in kinds:
                            mask_TE = _mask(T, E, fraction, kind=kind)
                            labels = {"shape": shape, "T": T, "E": E, "fraction": fraction, "mask": kind}
                            yield labels | _measure(x_TD, weights, mask_TE, activation=activation, repeats=5 if quick else 15)


def loop_over_experts(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str) -> Tensor:
    """The plain loop, from the mask."""
    bounds = expert_bounds(weights.num_neurons, mask_TE.shape[1])
    y_TD = torch.zeros_like(x_TD)
    for e in range(mask_TE.shape[1]):
        token_n = mask_TE[:, e].nonzero()[:, 0]
        if token_n.numel():
            s = slice(bounds[e], bounds[e + 1])
            expert = FFNWeights(weights.up_FD[s], weights.down_FD[s], None if weights.gate_FD is None else weights.gate_FD[s])
            y_TD.index_add_(0, token_n, ffn_hidden(x_TD[token_n], expert, activation=activation) @ expert.down_FD)
    return y_TD


def _measure(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str, repeats: int) -> dict[str, Any]:
    def kernel(impl: str) -> Tensor:
        return moe_ffn(x_TD, weights, build_plan(mask_TE), activation=activation, impl=impl)

    candidates = {
        "loop": lambda: loop_over_experts(x_TD, weights, mask_TE, activation=activation),
        "dense": lambda: ffn_dense(x_TD, weights, activation=activation),
        "auto": lambda: kernel("auto"),
        "grouped": lambda: kernel("grouped"),
        "masked": lambda: kernel("masked"),
    }
    if x_TD.shape[0] <= 16:
        candidates["gather"] = lambda: kernel("gather")
    if cpu.unavailable() is None:
        by_neuron = replace(weights, down_FD=weights.down_FD.contiguous())
        candidates["cpu"] = lambda: moe_ffn(x_TD, by_neuron, build_plan(mask_TE), activation=activation, impl="cpu")
    expected = loop_over_experts(x_TD, weights, mask_TE, activation=activation)
    for name, candidate in candidates.items():
        if name != "dense":
            torch.testing.assert_close(candidate(), expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    spread = measure_ms(candidates, rounds=repeats, warmup=2)
    (chosen,) = [c.name for c in explain(x_TD, weights, build_plan(mask_TE), activation=activation) if c.chosen]
    best = min(spread[name].median_ms for name in candidates if name not in ("loop", "dense", "auto", "cpu"))
    compiled = {f"{name}_over_cpu": spread[name].median_ms / spread["cpu"].median_ms for name in ("loop", "dense") if "cpu" in candidates}
    return {
        "chosen": chosen,
        **{f"{name}_ms": spread[name].median_ms for name in candidates},
        "auto_p80_over_p20": spread["auto"].p80_ms / spread["auto"].p20_ms,
        "loop_over_grouped": spread["loop"].median_ms / spread["grouped"].median_ms,
        "loop_over_auto": spread["loop"].median_ms / spread["auto"].median_ms,
        "dense_over_auto": spread["dense"].median_ms / spread["auto"].median_ms,
        "auto_over_best": spread["auto"].median_ms / best,
        **compiled,
    }


def _weights(D: int, neurons: int, *, gated: bool) -> FFNWeights:
    """As nn.Linear stores them: down is a transposed view."""
    up, gate, down = torch.randn(neurons, D) / D**0.5, torch.randn(neurons, D) / D**0.5, torch.randn(D, neurons) / neurons**0.5
    return FFNWeights(up, down.t(), gate if gated else None)


def _mask(T: int, E: int, fraction: float, *, kind: str) -> Tensor:
    if kind == "uniform":
        return torch.rand(T, E) < fraction
    popularity_E = F.normalize(1 / torch.arange(1.0, E + 1), p=1, dim=0)[torch.randperm(E)]
    low, high = 0.0, 1e4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * popularity_E).clamp(max=1).mean() < fraction else (low, middle)
    return torch.rand(T, E) < (high * popularity_E).clamp(max=1)
