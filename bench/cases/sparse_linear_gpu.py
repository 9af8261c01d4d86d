"""One linear layer that skips input channels against the dense one, on a GPU: how near a call comes to the 1 / f that skipping promises.

As `sparse_linear_cpu`: dense is the faster of `torch.nn.functional.linear` on weights as ``nn.Linear`` stores them (``ordinary``) and on
weights ordered by input channel (``by_input``), ours is the Triton kernel alone, and before the clock runs it must be as near to fp64 as
twice plain PyTorch.

What starts a kernel from Python takes longer than most of these kernels, so each side's calls of many layers (more bytes than any cache
holds, each layer with another input than the one before) are one CUDA graph; graphs take turns, CUDA events time them.

Letters: T tokens, K input channels, N outputs, f fraction of channels that a token keeps.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import sparse_linear_cpu as on_cpu
from bench.cases.sparse_linear_cpu import NUM_INPUTS, SHAPES, Side
from bench.common import DTYPES as COMMON_DTYPES
from bench.common import numbers, whole_numbers, words
from moeify.errors import ConfigError
from moeify.kernels import gpu_linear
from moeify.kernels.cpu_linear import LinearWeights
from moeify.kernels.gpu_linear import SparseLinear
from moeify.kernels.linear import masked

DEVICE = "cuda"
DTYPES = {**COMMON_DTYPES, "float16": torch.float16}
FRACTIONS = (1.0, 0.5, 0.25)
QUICK = {"shapes": ("smollm2 k",), "fractions": (0.5,)}
ROUNDS = 50


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=words, metavar="A,B", help=f"some of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=words, default=("bfloat16", "float16"), metavar="A,B", help=f"some of {', '.join(DTYPES)}")
    parser.add_argument("--weights", type=words, default=("float",), metavar="A,B", help="float (as --dtypes), int8")
    parser.add_argument("--tokens", type=whole_numbers, default=(1, 4, 16), metavar="T,T", help="tokens of a call; 1,4,16 by default")
    parser.add_argument("--fractions", type=numbers, metavar="F,F", help=f"kept; {','.join(map(str, FRACTIONS))} by default")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    weights: Sequence[str] = ("float",),
    tokens: Sequence[int] = (1, 4, 16),
    fractions: Sequence[float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: medians of microseconds a call; ratio is dense over ours, of_bound that times f, read what the tokens keep between them."""
    fractions = fractions or (QUICK["fractions"] if quick else FRACTIONS)
    shapes = shapes or (QUICK["shapes"] if quick else tuple(SHAPES))
    sizes, types, kinds = on_cpu.chosen(shapes, dtypes, weights, tokens, fractions, known=DTYPES)
    if (missing := _missing()) is not None:
        raise ConfigError(f"there is nothing to measure: {missing}.")
    for (name, (K, N)), (dtype_name, dtype), kind, T, f in product(sizes.items(), types.items(), kinds, tokens, fractions):
        same = {"shape": name, "K": K, "N": N, "dtype": dtype_name, "weights": kind, "tokens": T, "wanted_f": f}
        with torch.no_grad():
            yield same | _measure(K, N, T, dtype, f, is_int8=kind == "int8", rounds=2 if quick else ROUNDS)


def _missing() -> str | None:
    return gpu_linear.unavailable() if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def _measure(K: int, N: int, T: int, dtype: torch.dtype, fraction: float, *, is_int8: bool, rounds: int) -> dict[str, Any]:
    level = on_cpu._level(fraction)
    layers = [
        LinearWeights(*(None if t is None else t.to(DEVICE) for t in layer))
        for layer in on_cpu._layers(K, N, dtype, level=level, is_int8=is_int8)
    ]
    dense_KN = layers[0].weight_KN if layers[0].scale_N is None else (layers[0].weight_KN.float() * layers[0].scale_N).to(dtype)
    ordinary = [dense_KN.t().contiguous() for _ in layers]
    by_input = [dense_KN.clone().t() for _ in layers]
    native = [SparseLinear(layer, dtype=dtype) for layer in layers]
    x_STK = torch.randn(NUM_INPUTS, T, K).to(dtype).to(DEVICE)
    for x in x_STK:
        on_cpu._check(native[0](x), masked(x, layers[0]), on_cpu._in_fp64(x, layers[0]))
    sides: dict[str, Side] = {
        "ordinary": lambda i, x: F.linear(x, ordinary[i]),
        "by_input": lambda i, x: F.linear(x, by_input[i]),
        "ours": lambda i, x: native[i](x),
    }
    times = _take_turns(sides, x_STK, num_layers=len(layers), rounds=rounds)
    read = (x_STK.abs().float() >= level).any(1).float().mean().item()
    return on_cpu._row(times, baseline=("ordinary", "by_input"), x=x_STK, level=level) | {"read": read, "layers": len(layers)}


def _take_turns(sides: Mapping[str, Side], x_STK: Tensor, *, num_layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each side, once a round."""
    graphs = {name: _captured(side, x_STK, num_layers=num_layers) for name, side in sides.items()}
    names = list(graphs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for turn in range(len(names)):
            name = names[(i + turn) % len(names)]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / num_layers)
    return times


def _captured(side: Side, x_STK: Tensor, *, num_layers: int) -> torch.cuda.CUDAGraph:
    """One call of every layer, each on the next input."""

    def all_layers() -> None:
        for i in range(num_layers):
            side(i, x_STK[i % len(x_STK)])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_layers()  # what is made once, outside of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_layers()
    return graph
