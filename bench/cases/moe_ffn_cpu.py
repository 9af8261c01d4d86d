"""One FFN as a mixture of experts against the dense FFN, on the CPU: how near a call comes to the 1 / f that the skipped weights promise.

Dense is what a model runs: `torch.nn.functional.linear` of the same dtype on weights as ``nn.Linear`` stores them; with ``--compiled`` also
under `torch.compile`. Ours begins at the selection mask (building the plan is part of it). ``router`` is router and rule alone, by the
native call that a model's layer makes where it can. ``layer`` is all of a converted layer, from its input: modules, router, rule, plan and
kernel; its own router selects the same fraction.

The sides take turns call by call, each on another of many layers, so that weights come from memory and not from the cache, and every call
has a new selection. Weights and inputs are random; so are the masks (every token draws its own, the worst case) unless ``--converted``
names a model whose own routers select on text. Random inputs leave half of a ReLU's neurons on; trained ones have fewer. With int8 weights
the dense side has the floating ones that they stand for; ``over_float`` is ours on those floating weights over ours on int8 ones,
``call_over_float`` the same of the library's calls alone, made ready before: without the Python that checks and chooses.

Letters: T tokens, D model width, F FFN width, E experts, L layers.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import DTYPES, p80_over_p20, whole_numbers, words
from moeify import DataConfig, load_model, moe_layers
from moeify._config import lookup
from moeify.errors import ConfigError
from moeify.kernels import build_plan, cpu, explain, moe_ffn
from moeify.layers import ActiveRecorder, MoEFFN, attach
from moeify.pipeline import calibration_batches
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig, build_router
from moeify.select import Threshold
from moeify.select.calibrate import Calibrator
from moeify.sites import ACTIVATIONS, FFNSite, FFNWeights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An FFN by the model that has it."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool = False
    biased: bool = False
    num_experts: int | None = None
    """E; None where ``--expert-size`` says it."""


SHAPES = {
    "gpt2": Shape(d_model=768, d_ff=3072, activation="gelu_tanh"),
    "smollm2": Shape(d_model=576, d_ff=1536, activation="silu", gated=True),
    "qwen3-0.6b": Shape(d_model=1024, d_ff=3072, activation="silu", gated=True),
    "llama-1b": Shape(d_model=2048, d_ff=8192, activation="silu", gated=True),
    "bert": Shape(d_model=768, d_ff=3072, activation="gelu", biased=True),
    "vit": Shape(d_model=768, d_ff=3072, activation="gelu"),
}
WEIGHTS: dict[str, Callable[[nn.Module], object]] = {"float": lambda layer: None, "int8": quantize}
"""What is done to a converted layer before it runs."""
NUM_TOKENS = (1, 8, 256, 1024)
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
QUICK = {"shapes": ("smollm2", "bert"), "tokens": (1, 65), "fractions": (0.25,)}
REGIMES = ((4, "decode", 20), (64, "small batch", 10), (float("inf"), "prefill", 3))
"""(tokens at most, name, passes over the layers)."""
ROW_S = 10.0  # no further pass over the layers after this: 12 calls of each side are a median, too
EXPERT_SIZES = (8,)
ROUTER_WIDTH = 128
MIN_LAYERS, COLD_BYTES, MAX_BYTES = 12, 256 << 20, 6_000_000_000
RECORDED_TOKENS = 4096
MOST_SCORED = 1024
NUM_INPUTS = 7  # of a layer that selects by itself: another selection each time that its turn comes

Masks = Callable[[int, float], Tensor]
"""(tokens, active fraction) -> a new mask_TE."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=words, metavar="A,B", help=f"some of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--weights", type=words, default=("float",), metavar="A,B", help="of the experts: float (as --dtypes), int8")
    parser.add_argument("--tokens", type=whole_numbers, metavar="T,T", help=f"{','.join(map(str, NUM_TOKENS))} by default")
    parser.add_argument("--expert-size", type=whole_numbers, metavar="G,G", help=f"neurons of an expert; {EXPERT_SIZES[0]} by default")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="a converted text model: its FFN's shape, masks of its own routers")
    parser.add_argument("--compiled", action="store_true", help="the dense FFN under torch.compile, too")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    weights: Sequence[str] = ("float",),
    tokens: Sequence[int] | None = None,
    expert_size: Sequence[int] | None = None,
    converted: Path | None = None,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows: median microseconds a call; ratio is dense over ours, of_bound that times f, spread the larger p80 / p20 of the two sides."""
    tokens = tokens or (QUICK["tokens"] if quick else NUM_TOKENS)
    if min(tokens) < 1:
        raise ConfigError(f"--tokens must be at least 1, got {min(tokens)}.")
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    changes = [lookup(WEIGHTS, name, where="--weights") for name in weights]
    if converted is not None:
        if shapes or expert_size:
            raise ConfigError("--converted has the shape of its model; leave --shapes and --expert-size out.")
        shape, masks, fraction = _recorded(converted, most=max(tokens))
        cases, kind, fractions = [(converted.name, shape)], "recorded", (fraction,)
    else:
        names = shapes or (QUICK["shapes"] if quick else tuple(SHAPES))
        named = {name: lookup(SHAPES, name, where="--shapes") for name in names}
        sizes, least = expert_size or EXPERT_SIZES, min(shape.d_ff for shape in named.values())
        if min(sizes) < 1 or max(sizes) > least:
            raise ConfigError(f"--expert-size must be between 1 and {least}, got {','.join(map(str, sizes))}.")
        cases = [(name, replace(shape, num_experts=-(-shape.d_ff // size))) for (name, shape), size in product(named.items(), sizes)]
        kind, masks, fractions = "random", None, QUICK["fractions"] if quick else FRACTIONS
    for (name, shape), (dtype_name, dtype), change in product(cases, types.items(), changes):
        layers = _layers(shape, dtype, change)
        stored = str(layers[0].ours.up_FD.dtype).removeprefix("torch.")
        same = {"shape": name, "dtype": dtype_name, "weights": stored, "expert_size": layers[0].moe.bounds[1], "layers": len(layers)}
        for T in tokens:
            sides = _sides(shape, layers, torch.randn(NUM_INPUTS, T, shape.d_model).to(dtype), compiled=compiled)
            regime, rounds = _regime(T)
            labels = same | {"regime": regime, "tokens": T, "masks": kind}
            for fraction in fractions:
                sides.prepare(fraction)
                wanted = fraction if masks is None else float("nan")
                yield labels | _measure(sides, masks or _random(shape), T, wanted, rounds=1 if quick else rounds)
        del layers, sides  # before the next ones are made


class _FFN(nn.Module):
    """An FFN as families write it."""

    def __init__(self, weights: FFNWeights, activation: str) -> None:
        super().__init__()
        self.up = _linear(weights.up_FD, weights.up_bias_F)
        self.gate = None if weights.gate_FD is None else _linear(weights.gate_FD, None)
        self.down = _linear(weights.down_FD.t(), weights.down_bias_D)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(h)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@dataclass(frozen=True)
class _Layer:
    """One FFN twice; what differs is how down lies in memory, and its type where ours is int8."""

    ffn: _FFN
    moe: MoEFFN
    ours: FFNWeights
    dense: tuple[Tensor | None, ...]
    """up_FD, gate_FD, down_DF, up_bias_F, down_bias_D."""
    floating: FFNWeights | None
    """What int8 weights stand for, stored by neuron as ours are."""


@dataclass(frozen=True)
class _Sides:
    """What is timed: name -> call of one layer with one mask."""

    calls: dict[str, Callable[[int, Tensor], object]]
    num_layers: int
    chosen: Callable[[Tensor], str]
    prepare: Callable[[float], None]
    """Makes the layers' own routers select this fraction."""


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
    medians = {name: statistics.median(times) for name, times in us.items()}
    ratio = medians["dense"] / medians["ours"]
    f = statistics.mean(active) if fraction != fraction else fraction  # nan: whatever was recorded
    row = {
        "f": f,
        **{f"{name}_us": value for name, value in medians.items() if name != "router"},
        "ratio": ratio,
        "of_bound": ratio * f,
        "layer_ratio": medians["dense"] / medians["layer"],
        "router_us": medians["router"],
        "router_share": medians["router"] / medians["dense"],
        "chosen": chosen.most_common(1)[0][0],
        "spread": max(p80_over_p20(us[name]) for name in ("dense", "ours")),
    }
    if "float" in medians:
        row["over_float"] = medians["float"] / medians["ours"]
    if "float_call" in medians:
        row["call_over_float"] = medians["float_call"] / medians["call"]
    if "compiled" in medians:
        row["compiled_over_ours"] = medians["compiled"] / medians["ours"]
    return row


@torch.no_grad()
def _sides(shape: Shape, layers: Sequence[_Layer], inputs_NTD: Tensor, *, compiled: bool) -> _Sides:
    activation = ACTIVATIONS[shape.activation]
    x_TD, turn = inputs_NTD[0], cycle(inputs_NTD)
    scores = {str(i): layer.moe.scores(inputs_NTD.flatten(0, 1)[:MOST_SCORED]) for i, layer in enumerate(layers)}
    calibrator = Calibrator(Threshold, scores)

    def linears(up_FD: Tensor, gate_FD: Tensor | None, down_DF: Tensor, up_bias_F: Tensor | None, down_bias_D: Tensor | None) -> Tensor:
        up_TF = F.linear(x_TD, up_FD, up_bias_F)
        h_TF = activation(up_TF) if gate_FD is None else activation(F.linear(x_TD, gate_FD)) * up_TF
        return F.linear(h_TF, down_DF, down_bias_D)

    def dense_by(function: Callable[..., Tensor]) -> Callable[[int, Tensor], Tensor]:
        return lambda i, _: function(*layers[i].dense)

    def ours_on(weights: Sequence[FFNWeights]) -> Callable[[int, Tensor], Tensor]:
        return lambda i, mask_TE: moe_ffn(x_TD, weights[i], build_plan(mask_TE), activation=shape.activation)

    def calls_on(weights: Sequence[FFNWeights]) -> Callable[[int, Tensor], Tensor]:
        options: Any = {"activation": shape.activation}
        for one in weights:
            cpu.run(x_TD, one, torch.zeros(x_TD.shape[0], shape.num_experts or 1, dtype=torch.bool), **options)
        ready = [cpu.described(one, num_experts=shape.num_experts or 1, dtype=x_TD.dtype, **options) for one in weights]
        return lambda i, mask_TE: cpu.call(ready[i], x_TD, mask_TE)

    def chosen(mask_TE: Tensor) -> str:
        candidates = explain(x_TD, layers[0].ours, build_plan(mask_TE), activation=shape.activation)
        return next(c.name for c in candidates if c.chosen)

    @torch.no_grad()
    def prepare(fraction: float) -> None:
        for layer, rule in zip(layers, calibrator.solve(fraction).rules.values(), strict=True):
            layer.moe.rule = rule
            layer.ffn(x_TD)  # what a layer makes once for a rule is not part of a call

    calls: dict[str, Callable[[int, Tensor], object]] = {
        "dense": dense_by(linears),
        "ours": ours_on([layer.ours for layer in layers]),
        "router": lambda i, _: _select(layers[i].moe, next(turn)),
        "layer": lambda i, _: layers[i].ffn(next(turn)),
    }
    if floating := [layer.floating for layer in layers if layer.floating is not None]:
        calls["float"] = ours_on(floating)
        if cpu.unavailable() is None:
            calls |= {"call": calls_on([layer.ours for layer in layers]), "float_call": calls_on(floating)}
    if compiled:
        torch.compiler.reset()  # each shape is a compilation of its own, of which there is a limit
        calls["compiled"] = dense_by(torch.compile(linears, dynamic=False))
    _check(calls, _random(shape)(x_TD.shape[0], 0.5), x_TD, layers[0].ours, shape)
    return _Sides(calls, len(layers), chosen, prepare)


def _select(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """What a layer does to know the experts: router and rule, by the native call that it has made for itself or in PyTorch."""
    native = moe._native
    return moe.select(x_TD) if native is None or native.routed is None else native.routed.select(x_TD)


@torch.no_grad()
def _check(calls: dict[str, Callable[[int, Tensor], Any]], mask_TE: Tensor, x_TD: Tensor, weights: FFNWeights, shape: Shape) -> None:
    """Both sides compute the FFN that is meant, or their times say nothing."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[x_TD.dtype]
    for name, mask in (("ours", mask_TE), ("dense", torch.ones_like(mask_TE))):
        expected = moe_ffn(x_TD, weights, build_plan(mask), activation=shape.activation, impl="masked")
        torch.testing.assert_close(calls[name](0, mask), expected, atol=tolerance, rtol=tolerance, msg=lambda t, name=name: f"{name}: {t}")


def _layers(shape: Shape, dtype: torch.dtype, change: Callable[[nn.Module], object]) -> list[_Layer]:
    """Layers in memory of their own; at least 12, and together several times a cache, unless that would not fit into memory."""
    D, neurons, num_experts = shape.d_model, shape.d_ff, shape.num_experts
    assert num_experts is not None
    up_FD, gate_FD, down_FD = (torch.randn(neurons, D).mul_(n**-0.5).to(dtype) for n in (D, D, neurons))
    matrices, size = (3 if shape.gated else 2), up_FD.nbytes
    copies = 2 if change is WEIGHTS["float"] else 3  # dense, ours, and what ours stands for
    fit = MAX_BYTES // (copies * matrices * size)
    count = max(1, min(max(MIN_LAYERS, -(-COLD_BYTES // (matrices * size))), fit))
    site = FFNSite(
        name="",
        up="up",
        down="down",
        gate="gate" if shape.gated else None,
        activation=shape.activation,
        d_model=D,
        d_ff=neurons,
        d_out=D,
    )
    layers = []
    for _ in range(count):
        biases = {"up_bias_F": torch.randn(neurons).to(dtype), "down_bias_D": torch.randn(D).to(dtype)} if shape.biased else {}
        weights = FFNWeights(up_FD=up_FD.clone(), down_FD=down_FD.clone(), gate_FD=gate_FD.clone() if shape.gated else None, **biases)
        ffn = _FFN(weights, shape.activation).eval()
        router = build_router(NormRouterConfig(width=ROUTER_WIDTH), site=site, num_experts=num_experts)
        attach(ffn, moe := MoEFFN(site, num_experts=num_experts, router=router, rule=Threshold(theta=0.0)))
        change(ffn)
        ours = moe.weights()
        d = ours.dequantized(dtype)
        dense = (d.up_FD, d.gate_FD, d.down_FD.t().contiguous(), d.up_bias_F, d.down_bias_D)
        layers.append(_Layer(ffn, moe, ours, dense, None if d is ours else replace(d, down_FD=d.down_FD.contiguous())))
    return layers


def _random(shape: Shape) -> Masks:
    return lambda T, fraction: torch.rand(T, shape.num_experts or 1) < fraction


class _Selections(ActiveRecorder):
    """Keeps the masks of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, list[Tensor]] = {}

    def add(self, layer: MoEFFN, mask_TE: Tensor, *, shape: Sequence[int]) -> None:
        self.masks.setdefault(layer.site.name, []).append(mask_TE)


def _recorded(directory: Path, *, most: int) -> tuple[Shape, Masks, float]:
    """A converted model's first FFN; draws of consecutive tokens from what its layers of that shape selected on text; their fraction."""
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

    return shape, draw, torch.cat(masks).float().mean().item()


def _regime(T: int) -> tuple[str, int]:
    return next((name, rounds) for most, name, rounds in REGIMES if most >= T)
