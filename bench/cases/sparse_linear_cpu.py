"""One linear layer that skips input channels against the dense one, on the CPU: how near a call comes to the 1 / f that skipping promises.

Dense is `torch.nn.functional.linear` of the same dtype, without bias, on weights as ``nn.Linear`` stores them (``ordinary``) and on weights
whose memory is ordered by input channel, as ours are (``by_input``); ratio is the faster of the two over ours. Ours is the compiled kernel
alone, prepared as a model's layer prepares it. Before the clock runs, ours must be as near to fp64 as twice plain PyTorch.

The sides take turns call by call, each on another of many layers, so that weights come from memory and not from the cache; inputs are
random, and each call has another. With ``--gated`` the three layers of a gated FFN (K, N, K) as one native call against three of ours with
PyTorch's activation between.

Letters: T tokens, K input channels, N outputs, f fraction of channels that a token keeps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.common import DTYPES, numbers, p80_over_p20, whole_numbers, words
from moeify._config import lookup
from moeify.errors import ConfigError
from moeify.kernels import cpu
from moeify.kernels.cpu_linear import LinearWeights, SparseGated, SparseLinear
from moeify.kernels.linear import masked
from moeify.sites.int8 import quantize_rows

SHAPES = {
    "llama-1b up": (2048, 8192),
    "llama-1b down": (8192, 2048),
    "smollm2 q": (576, 576),
    "smollm2 k": (576, 192),
    "smollm2 up": (576, 1536),
    "smollm2 down": (1536, 576),
}
QUICK = {"shapes": ("smollm2 k",), "fractions": (0.5,)}
FRACTIONS = (1.0, 0.75, 0.6, 0.5, 0.25)
WEIGHTS = ("float", "int8")
COLD_BYTES, MIN_LAYERS, NUM_INPUTS = 256 << 20, 4, 7
ROW_S, LEAST_CALLS = 4.0, 24  # of each side

Side = Callable[[int, Tensor], Tensor]
"""(layer, x) -> y"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=words, metavar="A,B", help=f"some of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--weights", type=words, default=("float",), metavar="A,B", help="float (as --dtypes), int8")
    parser.add_argument("--tokens", type=whole_numbers, default=(1,), metavar="T,T", help="tokens of a call; 1 by default")
    parser.add_argument("--fractions", type=numbers, metavar="F,F", help=f"kept; {','.join(map(str, FRACTIONS))} by default")
    parser.add_argument("--gated", action="store_true", help="gated FFNs, fused against layer by layer")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    weights: Sequence[str] = ("float",),
    tokens: Sequence[int] = (1,),
    fractions: Sequence[float] | None = None,
    gated: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows: medians of microseconds a call; ratio is dense over ours, of_bound that times f, spread the larger p80 / p20."""
    if (missing := cpu.unavailable()) is not None:
        raise ConfigError(f"there is nothing to measure: {missing}.")
    fractions = fractions or (QUICK["fractions"] if quick else FRACTIONS)
    sizes, types, kinds = chosen(shapes or (QUICK["shapes"] if quick else tuple(SHAPES)), dtypes, weights, tokens, fractions, known=DTYPES)
    for (name, (K, N)), (dtype_name, dtype), kind in product(sizes.items(), types.items(), kinds):
        for T, fraction in product(tokens, fractions):
            same = {
                "shape": name,
                "K": K,
                "N": N,
                "dtype": dtype_name,
                "weights": kind,
                "tokens": T,
                "isa": cpu.isa(),
                "wanted_f": fraction,
            }
            make = _gated if gated else _plain
            with torch.no_grad():
                yield same | make(K, N, T, dtype, fraction, is_int8=kind == "int8", calls=1 if quick else LEAST_CALLS)


def chosen(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    weights: Sequence[str],
    tokens: Sequence[int],
    fractions: Sequence[float],
    *,
    known: Mapping[str, torch.dtype],
) -> tuple[dict[str, tuple[int, int]], dict[str, torch.dtype], list[str]]:
    """(K, N) by shape, dtypes by name and kinds of weights that the options name.

    Raises:
        ConfigError: one is unknown or out of range.
    """
    if wrong := [f for f in fractions if not 0 < f <= 1]:
        raise ConfigError(f"--fractions must be in (0, 1], got {wrong[0]}.")
    if min(tokens) < 1:
        raise ConfigError(f"--tokens must be at least 1, got {min(tokens)}.")
    sizes = {name: lookup(SHAPES, name, where="--shapes") for name in shapes}
    types = {name: lookup(known, name, where="--dtypes") for name in dtypes}
    return sizes, types, [lookup(dict(zip(WEIGHTS, WEIGHTS, strict=True)), name, where="--weights") for name in weights]


def _layers(K: int, N: int, dtype: torch.dtype, *, level: float, is_int8: bool) -> list[LinearWeights]:
    """As many as do not fit a cache."""
    weight_NK = torch.randn(N, K).mul_(K**-0.5).to(dtype)
    q_NK, scale_N = quantize_rows(weight_NK) if is_int8 else (weight_NK, None)
    count = max(MIN_LAYERS, -(-COLD_BYTES // q_NK.nbytes))
    return [LinearWeights(q_NK.t().contiguous(), torch.full((K,), level), None, scale_N) for _ in range(count)]


def _level(fraction: float) -> float:
    """Of which a share ``fraction`` of standard normal numbers reaches the absolute value."""
    return float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - fraction / 2))) if fraction < 1 else 0.0


def _plain(K: int, N: int, T: int, dtype: torch.dtype, fraction: float, *, is_int8: bool, calls: int) -> dict[str, Any]:
    layers = _layers(K, N, dtype, level=_level(fraction), is_int8=is_int8)
    dense_KN = layers[0].weight_KN if layers[0].scale_N is None else (layers[0].weight_KN.float() * layers[0].scale_N).to(dtype)
    ordinary = [dense_KN.t().contiguous() for _ in layers]
    by_input = [dense_KN.clone().t() for _ in layers]
    native = [SparseLinear(layer, dtype=dtype) for layer in layers]
    sides: dict[str, Side] = {
        "ordinary": lambda i, x: F.linear(x, ordinary[i]),
        "by_input": lambda i, x: F.linear(x, by_input[i]),
        "ours": lambda i, x: native[i](x),
    }
    x_STK = torch.randn(NUM_INPUTS, T, K).to(dtype)
    for x in x_STK:
        _check(native[0](x), masked(x, layers[0]), _in_fp64(x, layers[0]))
    times = _take_turns(sides, x_STK, layers=len(layers), calls=calls)
    return _row(times, baseline=("ordinary", "by_input"), x=x_STK, level=float(layers[0].level_K[0])) | {"layers": len(layers)}


def _gated(K: int, N: int, T: int, dtype: torch.dtype, fraction: float, *, is_int8: bool, calls: int) -> dict[str, Any]:
    level = _level(fraction)
    first = _layers(K, N, dtype, level=level, is_int8=is_int8)
    second = _layers(N, K, dtype, level=level / 4, is_int8=is_int8)
    triples = list(zip(first[0::2], first[1::2], second, strict=False))
    three = [tuple(SparseLinear(layer, dtype=dtype) for layer in layers) for layers in triples]
    one = [SparseGated(*layers, activation="silu", dtype=dtype) for layers in triples]

    def by_three(i: int, x: Tensor) -> Tensor:
        gate, up, down = three[i]
        return down(F.silu(gate(x)) * up(x))

    x_STK = torch.randn(NUM_INPUTS, T, K).to(dtype)
    for x in x_STK:
        torch.testing.assert_close(one[0](x), by_three(0, x), rtol=0.1, atol=0.05)
    times = _take_turns({"three": by_three, "ours": lambda i, x: one[i](x)}, x_STK, layers=len(triples), calls=calls)
    return _row(times, baseline=("three",), x=x_STK, level=level) | {"layers": len(triples)}


def _in_fp64(x: Tensor, layer: LinearWeights) -> Tensor:
    weight_KN = layer.weight_KN.double() * (1 if layer.scale_N is None else layer.scale_N.double())
    return torch.where(x.abs().float() >= layer.level_K, x, 0).double() @ weight_KN


def _check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The rule of docs/numerics.md: at most twice plain PyTorch's error, and one rounding."""
    error, allowed = ((y.double() - exact).abs().max().item() for y in (ours, plain))
    if not error <= 2 * allowed + torch.finfo(ours.dtype).eps * exact.abs().max().item():
        raise ConfigError(f"the kernel is wrong: its error is {error:.3g}, plain PyTorch's {allowed:.3g}; nothing was timed.")


def _take_turns(sides: dict[str, Side], x_STK: Tensor, *, layers: int, calls: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    inputs = list(x_STK)
    for side in sides.values():
        for i in range(3 if calls > 1 else 1):  # what is made once
            side(i % layers, inputs[0])
    start, i = time.perf_counter(), 0
    names = list(sides)
    while i < calls or (calls > 1 and time.perf_counter() - start < ROW_S):
        for turn in range(len(names)):
            name = names[(i + turn) % len(names)]
            call = partial(sides[name], i % layers, inputs[i % len(inputs)])
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        i += 1
    return times


def _row(times: dict[str, list[float]], *, baseline: Sequence[str], x: Tensor, level: float) -> dict[str, Any]:
    medians = {f"{name}_us": statistics.median(found) * 1e6 for name, found in times.items()}
    best = min(baseline, key=lambda name: medians[f"{name}_us"])
    ratio = medians[f"{best}_us"] / medians["ours_us"]
    kept = (x.abs().float() >= level).float().mean().item()
    return medians | {
        "f": kept,
        "ratio": ratio,
        "of_bound": ratio * kept,
        "spread": max(p80_over_p20(times[name]) for name in (best, "ours")),
        "calls": len(times["ours"]),
    }
