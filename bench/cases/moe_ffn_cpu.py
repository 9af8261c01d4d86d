"""One FFN of experts of 8 neurons against the dense FFN, on the CPU: how near a call comes to the 1 / f that the skipped weights promise.

Dense is what a model runs: `torch.nn.functional.linear` of the same dtype on weights as ``nn.Linear`` stores them; with ``--compiled`` also
under `torch.compile`. Ours begins at the selection mask (building the plan is part of it); the router that makes the mask is timed apart.
The sides take turns call by call, each on another of many layers, so that weights come from memory and not from the cache, and every call
has a new selection. Weights and inputs are random; so are the masks (every token draws its own, the worst case) unless ``--converted``
names a model whose own routers select on text. Random inputs leave half of a ReLU's neurons on; trained ones have fewer.

Letters: T tokens, D model width, F FFN width, E experts, L layers.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify import DataConfig, load_model, moe_layers
from moeify._config import lookup
from moeify.errors import ConfigError
from moeify.kernels import build_plan, explain, moe_ffn
from moeify.layers import ActiveRecorder, MoEFFN
from moeify.pipeline import calibration_batches
from moeify.routers import NormRouter, NormRouterConfig
from moeify.select import Threshold
from moeify.sites import ACTIVATIONS, FFNWeights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An FFN by the model that has it."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool = False
    biased: bool = False
    num_experts: int | None = None
    """E; None means experts of 8 neurons."""


SHAPES = {
    "gpt2": Shape(d_model=768, d_ff=3072, activation="gelu_tanh"),
    "smollm2": Shape(d_model=576, d_ff=1536, activation="silu", gated=True),
    "qwen3-0.6b": Shape(d_model=1024, d_ff=3072, activation="silu", gated=True),
    "llama-1b": Shape(d_model=2048, d_ff=8192, activation="silu", gated=True),
    "bert": Shape(d_model=768, d_ff=3072, activation="gelu", biased=True),
    "vit": Shape(d_model=768, d_ff=3072, activation="gelu"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_TOKENS = (1, 8, 256, 1024)
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
QUICK = {"shapes": ("smollm2", "bert"), "tokens": (1, 65), "fractions": (0.25,)}
REGIMES = ((4, "decode", 20), (64, "small batch", 10), (float("inf"), "prefill", 3))
"""(tokens at most, name, passes over the layers)."""
ROW_S = 10.0  # no further pass over the layers after this: 12 calls of each side are a median, too
EXPERT_SIZE = 8
ROUTER_WIDTH = 128
MIN_LAYERS, COLD_BYTES, MAX_BYTES = 12, 256 << 20, 6_000_000_000
RECORDED_TOKENS = 4096

Masks = Callable[[int, float], Tensor]
"""(tokens, active fraction) -> a new mask_TE."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=_words, metavar="A,B", help=f"some of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=_words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--tokens", type=_numbers, metavar="T,T", help=f"{','.join(map(str, NUM_TOKENS))} by default")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="a converted text model: its FFN's shape, masks of its own routers")
    parser.add_argument("--compiled", action="store_true", help="the dense FFN under torch.compile, too")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    tokens: Sequence[int] | None = None,
    converted: Path | None = None,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows: median microseconds a call; ratio is dense over ours, of_bound that times f, spread the larger p80 / p20 of the two sides."""
    tokens = tokens or (QUICK["tokens"] if quick else NUM_TOKENS)
    fractions = QUICK["fractions"] if quick else FRACTIONS
    if min(tokens) < 1:
        raise ConfigError(f"--tokens must be at least 1, got {min(tokens)}.")
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    if converted is not None:
        if shapes:
            raise ConfigError("--converted has the shape of its model; leave --shapes out.")
        shape, masks = _recorded(converted, most=max(tokens))
        cases, kind, fractions = {converted.name: shape}, "recorded", (float("nan"),)
    else:
        names = shapes or (QUICK["shapes"] if quick else tuple(SHAPES))
        cases, kind, masks = {name: lookup(SHAPES, name, where="--shapes") for name in names}, "random", None
    for name, shape in cases.items():
        for dtype_name, dtype in types.items():
            layers = _layers(shape, dtype)
            for T in tokens:
                sides = _sides(shape, layers, torch.randn(T, shape.d_model).to(dtype), compiled=compiled)
                regime, rounds = _regime(T)
                labels = {"shape": name, "regime": regime, "dtype": dtype_name, "tokens": T, "masks": kind, "layers": len(layers)}
                for fraction in fractions:
                    yield labels | _measure(sides, masks or _random(shape), T, fraction, rounds=1 if quick else rounds)
            del layers, sides  # before the next ones are made


@dataclass(frozen=True)
class _Layer:
    """The same weights for both sides: what differs is how down lies in memory."""

    ours: FFNWeights
    down_DF: Tensor
    router: NormRouter


@dataclass(frozen=True)
class _Sides:
    """What is timed: name -> call of one layer with one mask."""

    calls: dict[str, Callable[[int, Tensor], Tensor]]
    num_layers: int
    chosen: Callable[[Tensor], str]


@torch.no_grad()
def _measure(sides: _Sides, masks: Masks, T: int, fraction: float, *, rounds: int) -> dict[str, Any]:
    us: dict[str, list[float]] = {name: [] for name in sides.calls}
    chosen: Counter[str] = Counter()
    active = []
    count = sides.num_layers
    start = time.perf_counter()
    for i in range(-2, rounds * count):  # the first two calls of each side are warm-up
        if i > 0 and i % count == 0 and time.perf_counter() - start > ROW_S:
            break
        mask_TE = masks(T, fraction)
        for k, (name, call) in enumerate(sides.calls.items()):
            layer = (i + k * count // len(sides.calls)) % count  # far from those that the others have just read
            before = time.perf_counter()
            call(layer, mask_TE)
            if i >= 0:
                us[name].append((time.perf_counter() - before) * 1e6)
        if i >= 0:
            chosen[sides.chosen(mask_TE)] += 1
            active.append(mask_TE.float().mean().item())
    f = statistics.mean(active) if fraction != fraction else fraction  # nan: whatever was recorded
    medians = {name: statistics.median(times) for name, times in us.items()}
    ratio = medians["dense"] / medians["ours"]
    row = {
        "f": f,
        **{f"{name}_us": value for name, value in medians.items() if name != "router"},
        "ratio": ratio,
        "of_bound": ratio * f,
        "router_us": medians["router"],
        "router_share": medians["router"] / medians["dense"],
        "chosen": chosen.most_common(1)[0][0],
        "spread": max(_p80_over_p20(us[name]) for name in ("dense", "ours")),
    }
    if "compiled" in medians:
        row["compiled_over_ours"] = medians["compiled"] / medians["ours"]
    return row


def _sides(shape: Shape, layers: Sequence[_Layer], x_TD: Tensor, *, compiled: bool) -> _Sides:
    activation = ACTIVATIONS[shape.activation]
    rule = Threshold(theta=1.0)

    def linears(up_FD: Tensor, gate_FD: Tensor | None, down_DF: Tensor, up_bias_F: Tensor | None, down_bias_D: Tensor | None) -> Tensor:
        up_TF = F.linear(x_TD, up_FD, up_bias_F)
        h_TF = activation(up_TF) if gate_FD is None else activation(F.linear(x_TD, gate_FD)) * up_TF
        return F.linear(h_TF, down_DF, down_bias_D)

    def dense_by(function: Callable[..., Tensor]) -> Callable[[int, Tensor], Tensor]:
        def dense(i: int, _: Tensor) -> Tensor:
            w = layers[i].ours
            return function(w.up_FD, w.gate_FD, layers[i].down_DF, w.up_bias_F, w.down_bias_D)

        return dense

    def ours(i: int, mask_TE: Tensor) -> Tensor:
        return moe_ffn(x_TD, layers[i].ours, build_plan(mask_TE), activation=shape.activation)

    def chosen(mask_TE: Tensor) -> str:
        candidates = explain(x_TD, layers[0].ours, build_plan(mask_TE), activation=shape.activation)
        return next(c.name for c in candidates if c.chosen)

    calls = {"dense": dense_by(linears), "ours": ours, "router": lambda i, _: rule(layers[i].router(x_TD))}
    if compiled:
        torch.compiler.reset()  # each shape is a compilation of its own, of which there is a limit
        calls["compiled"] = dense_by(torch.compile(linears, dynamic=False))
    _check(calls, _random(shape)(x_TD.shape[0], 0.5), x_TD, layers[0].ours, shape)
    return _Sides(calls, len(layers), chosen)


@torch.no_grad()
def _check(calls: dict[str, Callable[[int, Tensor], Tensor]], mask_TE: Tensor, x_TD: Tensor, weights: FFNWeights, shape: Shape) -> None:
    """Both sides compute the FFN that is meant, or their times say nothing."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[x_TD.dtype]
    for name, mask in (("ours", mask_TE), ("dense", torch.ones_like(mask_TE))):
        expected = moe_ffn(x_TD, weights, build_plan(mask), activation=shape.activation, impl="masked")
        torch.testing.assert_close(calls[name](0, mask), expected, atol=tolerance, rtol=tolerance, msg=lambda t, name=name: f"{name}: {t}")


def _layers(shape: Shape, dtype: torch.dtype) -> list[_Layer]:
    """Layers in memory of their own; at least 12, and together several times a cache, unless that would not fit into memory."""
    D, neurons = shape.d_model, shape.d_ff
    up_FD, gate_FD, down_FD = (torch.randn(neurons, D).mul_(n**-0.5).to(dtype) for n in (D, D, neurons))
    matrices, size = (3 if shape.gated else 2), up_FD.nbytes
    fit = MAX_BYTES // ((matrices + 1) * size)  # down is there twice
    count = max(1, min(max(MIN_LAYERS, -(-COLD_BYTES // (matrices * size))), fit))
    layers = []
    for _ in range(count):
        biases = {"up_bias_F": torch.randn(neurons).to(dtype), "down_bias_D": torch.randn(D).to(dtype)} if shape.biased else {}
        ours = FFNWeights(up_FD=up_FD.clone(), down_FD=down_FD.clone(), gate_FD=gate_FD.clone() if shape.gated else None, **biases)
        router = NormRouter(NormRouterConfig(width=ROUTER_WIDTH), d_model=D, num_experts=_num_experts(shape))
        layers.append(_Layer(ours, down_FD.t().contiguous(), router))
    return layers


def _num_experts(shape: Shape) -> int:
    return shape.num_experts or -(-shape.d_ff // EXPERT_SIZE)


def _random(shape: Shape) -> Masks:
    return lambda T, fraction: torch.rand(T, _num_experts(shape)) < fraction


class _Selections(ActiveRecorder):
    """Keeps the masks of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, list[Tensor]] = {}

    def add(self, layer: MoEFFN, mask_TE: Tensor, *, shape: Sequence[int]) -> None:
        self.masks.setdefault(layer.site.name, []).append(mask_TE)


def _recorded(directory: Path, *, most: int) -> tuple[Shape, Masks]:
    """The FFN of a converted model's first layer, and draws of consecutive tokens from what its layers of that shape selected on text."""
    model, processor = load_model(directory)
    layers = list(moe_layers(model).values())
    if not layers:
        raise ConfigError(f"'{directory}' is not a converted model; moeify convert makes one.")
    site, weights = layers[0].site, layers[0].weights()
    shape = Shape(
        d_model=site.d_model,
        d_ff=site.d_ff,
        activation=site.activation,
        gated=site.is_gated,
        biased=weights.down_bias_D is not None,
        num_experts=layers[0].num_experts,
    )
    same = [layer for layer in layers if (layer.site.d_ff, layer.num_experts) == (site.d_ff, layers[0].num_experts)]
    selections = _Selections()
    for layer in same:
        layer.recorder = selections
    data = DataConfig(data="builtin:pydoc", window=128, max_tokens=max(RECORDED_TOKENS, 2 * most))
    with torch.no_grad():
        for batch in calibration_batches(model, processor, data, batch_tokens=data.window):
            model(**batch)
    masks = [torch.cat(parts) for parts in selections.masks.values()]
    if len(masks[0]) < most:
        raise ConfigError(f"only {len(masks[0])} tokens were recorded; ask for fewer than {most} --tokens.")

    def draw(T: int, _: float) -> Tensor:
        mask_TE = masks[int(torch.randint(len(masks), ()))]
        first = int(torch.randint(len(mask_TE) - T + 1, ()))
        return mask_TE[first : first + T].clone()

    return shape, draw


def _regime(T: int) -> tuple[str, int]:
    return next((name, rounds) for most, name, rounds in REGIMES if most >= T)


def _p80_over_p20(times: Sequence[float]) -> float:
    ordered, last = sorted(times), len(times) - 1
    return ordered[round(0.8 * last)] / ordered[round(0.2 * last)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
