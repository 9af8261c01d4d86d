"""What cases on a GPU share: clocks, ceilings, layers on the device. On a CPU with Triton's interpreter they run, and say nothing of speed.

Letters: T tokens, D model width, F FFN width, E experts.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.errors import ConfigError
from moeify.kernels import DispatchPlan, build_plan, gpu_ffn, masked, moe_ffn
from moeify.sites import FFNWeights

Call = Callable[[int], object]
"""One call of one layer."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An FFN by the model that has it."""

    d_model: int
    d_ff: int
    activation: str = "silu"
    gated: bool = True
    biased: bool = False


SHAPES = {
    "llama-8b": Shape(d_model=4096, d_ff=14336),
    "llama-1b": Shape(d_model=2048, d_ff=8192),
    "qwen3-8b": Shape(d_model=4096, d_ff=12288),
    "gpt2": Shape(d_model=768, d_ff=3072, activation="gelu_tanh", gated=False, biased=True),
    "vit-b": Shape(d_model=768, d_ff=3072, activation="gelu", gated=False, biased=True),
}
TINY = Shape(d_model=32, d_ff=64)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLD_BYTES = 200 << 20
"""Weights of all layers that take turns: several times the second-level cache (60 MB on an H200)."""
GRAPH_TOKENS = 512
"""Tokens up to which calls are timed as CUDA graphs: what starts a kernel from Python takes longer than many of them."""


def device() -> str:
    """Where kernels run here.

    Raises:
        ConfigError: nowhere.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if (missing := gpu_ffn.unavailable(kind)) is not None:
        raise ConfigError(f"there is nothing to measure: {missing.replace('x_TD', 'this machine')}.")
    return kind


def triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where tiles do not fit the GPU."""
    from triton.errors import TritonError

    return (TritonError, RuntimeError)


def layers_of(shape: Shape, *, dtype: torch.dtype, device: str) -> list[FFNWeights]:
    """Random layers as nn.Linear stores them, each in memory of its own; together more than a cache holds."""
    D, F = shape.d_model, shape.d_ff
    per_layer = (3 if shape.gated else 2) * D * F * dtype.itemsize
    count = 2 if device == "cpu" else max(2, -(-COLD_BYTES // per_layer))

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

    def bias(size: int) -> Tensor | None:
        return torch.randn(size, device=device).to(dtype) if shape.biased else None

    return [FFNWeights(matrix(F, D), matrix(D, F).t(), matrix(F, D) if shape.gated else None, bias(F), None, bias(D)) for _ in range(count)]


def random_mask(T: int, E: int, fraction: float, *, device: str) -> Tensor:
    """Every token draws its own experts, the same number, at least one: the worst case for whoever shares them."""
    return torch.rand(T, E, device=device).argsort(dim=1) < max(1, round(fraction * E))


def medians_us(sides: Mapping[str, Call], *, num_layers: int, device: str, graphs: bool, rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of one layer by each side; sides take turns, each call on another layer; at least 3 rounds.

    Args:
        graphs: whether a side's calls of all layers are one CUDA graph.
        rounds: at most.
        seconds: after which no further round begins.
    """
    runs = {}
    for name, side in sides.items():

        def all_layers(side: Call = side) -> None:
            for i in range(num_layers):
                side(i)

        all_layers()
        runs[name] = _captured(all_layers) if graphs and device == "cuda" else all_layers
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            times[name].append(_seconds(run, device) / num_layers)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made once, outside of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ceilings(device: str, *, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), FLOP/s of a large product; of random numbers, for zeros run faster."""
    side, numbers = (8192, 1 << 30) if device == "cuda" else (128, 1 << 16)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(numbers, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    options = {"num_layers": 1, "device": device, "graphs": False, "rounds": 10, "seconds": 2.0}
    us = medians_us({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, **options)
    return 2 * numbers / us["copy"] * 1e6, 2 * side**3 / us["product"] * 1e6


def tolerance(dtype: torch.dtype) -> float:
    """Relative error, in norm, between two right results of this type; sums in fp32 make more of its rounding than storing in 2 bytes."""
    return (32 if dtype is torch.float32 else 2) * torch.finfo(dtype).eps


def relative_errors(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> tuple[float, float]:
    """|y - exact| / |exact| of ours and of plain PyTorch in the same dtype; exact is float64. Of up to 64 tokens."""
    x_TD, plan = x_TD[:64], build_plan(plan.mask_TE[:64])
    exact = masked.moe_ffn(x_TD.double(), _in_fp64(weights), plan, activation=activation)
    ours = moe_ffn(x_TD, weights, plan, activation=activation, impl="triton")
    plain = masked.moe_ffn(x_TD, weights, plan, activation=activation)
    size = exact.norm().clamp_min(1e-30)
    return tuple(((y.double() - exact).norm() / size).item() for y in (ours, plain))  # type: ignore[return-value]


def gradient_errors(
    x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, grad_TD: Tensor, *, activation: str
) -> dict[str, tuple[float, float]]:
    """By input, |g - exact| / |exact| of ours and of plain PyTorch in the same dtype; exact is float64. Of up to 64 tokens."""
    x_TD, grad_TD, plan = x_TD[:64], grad_TD[:64], build_plan(plan.mask_TE[:64])

    def gradients(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {"x_TD": x_TD} | {name: t for name, t in vars(weights).items() if t is not None}
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        own = FFNWeights(**{name: leaves.get(name) for name in vars(weights)})
        y_TD = moe_ffn(leaves["x_TD"], own, plan, activation=activation, impl=impl)
        return dict(zip(leaves, torch.autograd.grad(y_TD, list(leaves.values()), grad_TD.to(dtype)), strict=True))

    exact = gradients("masked", torch.float64)
    found = [gradients(impl, x_TD.dtype) for impl in ("triton", "masked")]
    errors = {}
    for name, g in exact.items():
        ours, plain = (((other[name].double() - g).norm() / g.norm().clamp_min(1e-30)).item() for other in found)
        errors[name] = ours, plain
    return errors


def _in_fp64(weights: FFNWeights) -> FFNWeights:
    return FFNWeights(**{name: None if t is None else t.double() for name, t in vars(weights).items()})


def count_of(mask_TE: Tensor) -> tuple[float, float]:
    """Share of pairs that run, and of experts that any token runs."""
    return mask_TE.float().mean().item(), mask_TE.any(0).float().mean().item()


def names_or_all(wanted: Sequence[str] | None, known: Mapping[str, object], *, where: str) -> tuple[str, ...]:
    """What an option named, checked; everything where it named nothing."""
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"{where}: unknown {name!r}; known: {', '.join(known)}.")
    return tuple(wanted or known)
