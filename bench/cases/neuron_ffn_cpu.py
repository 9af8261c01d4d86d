"""A gated FFN that skips single neurons (cats, chess: by the gate; topk: by h; predictor) against the dense one on the CPU, for few tokens.

Dense is ``linear(silu(linear(x, gate)) * linear(x, up), down)`` of the same dtype, without biases, on weights as ``nn.Linear`` stores them.
Ours is the compiled call alone, prepared as a model's layer prepares it; pieces is what runs without it: router and rule in PyTorch, a plan
and the experts' compiled kernel, on the same weights. The threshold is the quantile of the scores at which the wanted share is skipped.
Before the clock runs, ours must be as near to fp64 as twice plain PyTorch.

The sides take turns call by call, each on another of many layers, so that weights come from memory and not from the cache; inputs are
random, and each call has another. ``read`` is the bytes of ours over those of dense: of the gate all, of up and down what some token keeps
(topk: of gate and up all); of a prediction its fp32 matrices, and of gate, up and down what some token keeps. No
call can be faster than dense over that.

Letters: T tokens, D model width, F neurons, f fraction of neurons that a token keeps.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import sparse_linear_cpu as linear
from bench.cases.sparse_linear_cpu import NUM_INPUTS, Side
from bench.common import DTYPES, numbers, whole_numbers, words
from moeify._config import lookup
from moeify.errors import ConfigError
from moeify.kernels import build_plan, cpu, moe_ffn
from moeify.kernels.cpu_neurons import LowRankWeights, NeuronRouterWeights, RoutedNeurons
from moeify.routers import (
    GateRouter,
    GateRouterConfig,
    LowRankRouter,
    LowRankRouterConfig,
    OracleRouterConfig,
    Router,
    RouterConfig,
    build_router,
)
from moeify.select import Threshold
from moeify.sites import FFNSite, FFNWeights

SHAPES = {"smollm2": (576, 1536), "llama-1b": (2048, 8192)}
METHODS: dict[str, RouterConfig] = {
    "cats": GateRouterConfig(scale="none"),
    "predictor": LowRankRouterConfig(rank=128),
    "topk": OracleRouterConfig(of="activation"),
}
QUICK = {"shapes": ("smollm2",), "skip": (0.5,)}
SKIP = (0.0, 0.4, 0.5, 0.7)
MIN_LAYERS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=words, metavar="A,B", help=f"some of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument(
        "--methods", type=words, default=tuple(METHODS), metavar="A,B", help=f"some of {', '.join(METHODS)}; all by default"
    )
    parser.add_argument("--tokens", type=whole_numbers, default=(1,), metavar="T,T", help="tokens of a call; 1 by default")
    parser.add_argument("--skip", type=numbers, metavar="S,S", help=f"share of neurons skipped; {','.join(map(str, SKIP))} by default")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    methods: Sequence[str] = tuple(METHODS),
    tokens: Sequence[int] = (1,),
    skip: Sequence[float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: medians of microseconds a call; ratio is dense over ours, of_bound that times read, over_pieces pieces over ours."""
    if (missing := cpu.unavailable()) is not None:
        raise ConfigError(f"there is nothing to measure: {missing}.")
    skip = skip or (QUICK["skip"] if quick else SKIP)
    if wrong := [s for s in skip if not 0 <= s < 1]:
        raise ConfigError(f"--skip must be in [0, 1), got {wrong[0]}.")
    if min(tokens) < 1:
        raise ConfigError(f"--tokens must be at least 1, got {min(tokens)}.")
    sizes = {name: lookup(SHAPES, name, where="--shapes") for name in shapes or (QUICK["shapes"] if quick else tuple(SHAPES))}
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    configs = {name: lookup(METHODS, name, where="--methods") for name in methods}
    for (shape, (d_model, d_ff)), (dtype_name, dtype), (method, config) in product(sizes.items(), types.items(), configs.items()):
        with torch.no_grad():
            case = _Case(d_model, d_ff, dtype, config)
            for num_tokens, wanted in product(tokens, skip):
                same = {
                    "shape": shape,
                    "D": d_model,
                    "F": d_ff,
                    "dtype": dtype_name,
                    "method": method,
                    "tokens": num_tokens,
                    "isa": cpu.isa(),
                    "wanted_skip": wanted,
                }
                yield same | case.row(num_tokens, wanted, calls=1 if quick else linear.LEAST_CALLS)


class _Case:
    """Layers of one shape, dtype and method: as many as do not fit a cache, dense and ours."""

    def __init__(self, d_model: int, d_ff: int, dtype: torch.dtype, config: RouterConfig) -> None:
        self._dtype = dtype
        site = FFNSite(
            name="mlp", up="mlp.up", down="mlp.down", gate="mlp.gate", activation="silu", d_model=d_model, d_ff=d_ff, d_out=d_model
        )
        up_FD, gate_FD = ((torch.randn(d_ff, d_model) * d_model**-0.5).to(dtype) for _ in range(2))
        down_FD = (torch.randn(d_ff, d_model) * d_ff**-0.5).to(dtype)
        count = max(MIN_LAYERS, -(-linear.COLD_BYTES // (3 * up_FD.nbytes)))
        self.layers = [FFNWeights(up_FD.clone(), down_FD.clone(), gate_FD.clone()) for _ in range(count)]
        self.dense = [(gate_FD.clone(), up_FD.clone(), down_FD.t().contiguous()) for _ in range(count)]
        routers = [build_router(config, site=site, num_experts=d_ff) for _ in range(count)]
        for router in routers:
            for parameter, first in zip(router.parameters(), routers[0].parameters(), strict=True):
                if router is routers[0]:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.copy_(first)
        self.routers: list[Router] = routers

    def scores(self, i: int, x_TD: Tensor) -> Tensor:
        return self.routers[i](x_TD, self.layers[i])  # type: ignore[no-any-return]

    def row(self, num_tokens: int, wanted: float, *, calls: int) -> dict[str, Any]:
        d_model = self.layers[0].up_FD.shape[1]
        x_STD = torch.randn(NUM_INPUTS, num_tokens, d_model).to(self._dtype)
        level = self.scores(0, x_STD.reshape(-1, d_model)).float().flatten().quantile(wanted).item() if wanted else 0.0
        rule = Threshold(theta=level)
        ours = [
            RoutedNeurons(layer, _native(router, rule), activation="silu") for layer, router in zip(self.layers, self.routers, strict=True)
        ]

        def pieces(i: int, x_TD: Tensor) -> Tensor:
            return moe_ffn(x_TD, self.layers[i], build_plan(rule(self.scores(i, x_TD))), activation="silu")

        sides: dict[str, Side] = {"dense": self._run_dense, "pieces": pieces, "ours": lambda i, x_TD: ours[i](x_TD)[0]}
        masks = []
        for x_TD in x_STD:
            y_TD, mask_TF = ours[0](x_TD)
            masks.append(mask_TF)
            linear._check(y_TD, self._masked(x_TD, mask_TF, self._dtype), self._masked(x_TD, mask_TF, torch.float64))
        times = linear._take_turns(sides, x_STD, layers=len(ours), calls=calls)
        kept = torch.stack(masks).float().mean().item()
        union = torch.stack([mask_TF.any(0) for mask_TF in masks]).float().mean().item()
        read = self._read(union)
        row = linear._row(times, baseline=("dense",), x=x_STD, level=0.0)
        return row | {
            "f": kept,
            "read": read,
            "of_bound": row["ratio"] * read,
            "over_pieces": row["pieces_us"] / row["ours_us"],
            "layers": len(ours),
        }

    def _read(self, union: float) -> float:
        if isinstance(self.routers[0], GateRouter):
            return (1 + 2 * union) / 3
        if not isinstance(self.routers[0], LowRankRouter):
            return (2 + union) / 3
        predicted = sum(p.nbytes for p in self.routers[0].parameters())
        return union + predicted / sum(t.nbytes for t in self.dense[0])

    def _run_dense(self, i: int, x_TD: Tensor) -> Tensor:
        gate_FD, up_FD, down_DF = self.dense[i]
        return F.linear(F.silu(F.linear(x_TD, gate_FD)) * F.linear(x_TD, up_FD), down_DF)

    def _masked(self, x_TD: Tensor, mask_TF: Tensor, dtype: torch.dtype) -> Tensor:
        gate_FD, up_FD, down_DF = (t.to(dtype) for t in self.dense[0])
        x_TD = x_TD.to(dtype)
        return F.linear((F.silu(F.linear(x_TD, gate_FD)) * F.linear(x_TD, up_FD)).masked_fill(~mask_TF, 0), down_DF)


def _native(router: Router, rule: Threshold) -> NeuronRouterWeights:
    low_rank = None
    if isinstance(router, LowRankRouter):
        assert router.gate is not None
        gate = (router.gate.weight, router.gate.bias, router.gate_std_F)
        low_rank = LowRankWeights(router.project.weight, router.up.weight, router.up.bias, router.up_std_F, *gate)
    scale_F = router.scale_F if isinstance(router, GateRouter | LowRankRouter) else None
    return NeuronRouterWeights(scale_F=scale_F, rule=rule.name, knob=rule.theta, low_rank=low_rank)
