"""One FFN as a mixture of experts against the dense FFN, on a GPU: the same output first, then how near a call comes to what it must move.

Sides: ``dense`` is `torch.nn.functional.linear` and the activation; ``compiled`` the same under `torch.compile` (``compiled_mode``: for
the targets max-autotune, for all rows with ``--autotune``); ``ours`` begins at the mask; ``layer`` at the input, with a router of width 128
and the threshold rule; ``grouped`` is torch's grouped_mm, ``loop`` a loop over experts, both for many tokens. Up to 512 tokens every side
is a CUDA graph over layers that together exceed the cache; ``step`` rows are forward and backward. ``floor_us`` is the larger of bytes over
the copy's bandwidth and FLOPs over the product's rate, both measured first; ``of_floor`` is that over ours, ``dense_floor_us`` and
``dense_of_floor`` the same of dense. Masks are random, the worst case, for tokens share few experts, or ``recorded`` (`bench.masks`: a
small model's, consecutive tokens). Rows with a ``model`` are `bench.gpu_models`'.

Tiles are tuned first, on llama-8b. The rows of the targets come next (neither where shapes, types or fractions are named), then the models,
then every shape, size of experts, number of tokens and fraction.

Before the clock runs, ours must be as near to float64 as twice plain PyTorch, and so must a step's gradients; a row that is not says
``is_right`` false and has no times. ``layer_is_right``: the layer ran what router and rule say, and its result is theirs. What no time is
left for (``--budget``) is named in the last row. ``--quick`` runs a tiny shape, on a CPU in Triton's interpreter.

Letters: T tokens, D model width, F FFN width, E experts, G expert size.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import gpu, gpu_models, masks
from bench import tune as tuning
from bench.common import numbers, whole_numbers, words
from moeify.errors import ConfigError
from moeify.kernels import build_plan, gpu_routed, grouped, moe_ffn, reference
from moeify.kernels.cpu import RouterWeights
from moeify.kernels.tiles import TUNED
from moeify.routers import NormRouterConfig, build_router
from moeify.sites import ACTIVATIONS, FFNSite, FFNWeights

NUM_TOKENS = (1, 8, 64, 512, 4096, 16384)
STEP_TOKENS = 8192
FRACTIONS = (1.0, 0.5, 0.25, 0.1)
QUICK = {"tokens": (1, 5, 520), "fractions": (0.5,)}
TARGETS = (
    *(("llama-8b", 1, f, 64, "random", False) for f in (0.5, 0.25, 1.0)),
    *(("llama-8b", 32, 0.25, 64, of, False) for of in ("recorded", "random")),
    *(
        ("llama-8b", 4096, f, G, "random", False)
        for f, G in ((0.25, 64), (0.5, 64), (0.25, 256), (0.25, 1792), (0.25, 16), (0.25, 32), (1.0, 64))
    ),
    ("llama-1b", STEP_TOKENS, 0.25, 256, "random", True),
    *(("vit-b", 256 * 197, f, 128, "random", False) for f in (1.0, 0.5, 0.25, 0.1)),
)
"""(shape, tokens, fraction, expert size, masks, is a step): what the kernels were made to reach."""
QUICK_TARGETS = (("tiny", 5, 0.5, 16, "recorded", False),)
TUNE_SHARE = 0.25
"""Of the budget: what tuning takes at most."""
AUTOTUNE_S = 90
"""Seconds that must be left for max-autotune to begin."""
LOOP_TOKENS = 4096
"""Tokens at which the loop over experts is timed, too: its launches alone take milliseconds."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--shapes", type=words, metavar="A,B", help=f"some of {', '.join(gpu.SHAPES)}; all by default")
    parser.add_argument("--dtypes", type=words, metavar="A,B", help=f"some of {', '.join(gpu.DTYPES)}; bfloat16 by default")
    parser.add_argument("--tokens", type=whole_numbers, metavar="T,T", help=f"{','.join(map(str, NUM_TOKENS))} by default")
    parser.add_argument("--fractions", type=numbers, metavar="F,F", help=f"{','.join(map(str, FRACTIONS))} by default")
    parser.add_argument(
        "--expert-size", type=whole_numbers, default=(64, 128), metavar="G,G", help="neurons of an expert; 64,128 by default"
    )
    parser.add_argument(
        "--budget", type=float, default=500.0, metavar="S", help="seconds after which no further row begins; 500 by default"
    )
    parser.add_argument("--no-models", action="store_true", help="leave generate and training steps of whole models out")
    parser.add_argument(
        "--tune", action="store_true", help="first try tiles, on llama-8b, and use the best: so by default, but of chosen rows"
    )
    parser.add_argument("--no-tune", action="store_true", help="keep the tiles of the table")
    parser.add_argument(
        "--autotune", action="store_true", help="compile every dense FFN with max-autotune (a minute each), not the targets' alone"
    )
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")


def run(
    *,
    quick: bool,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    expert_size: Sequence[int] = (64, 128),
    budget: float = 500.0,
    no_models: bool = False,
    tune: bool = False,
    no_tune: bool = False,
    autotune: bool = False,
    no_compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows: medians of microseconds a call; ratio is dense over ours, of_bound that times f."""
    begin = time.perf_counter()
    end = begin + budget
    is_chosen = bool(shapes or dtypes or fractions)
    kind = gpu.device()
    known = {**gpu.SHAPES, "tiny": gpu.TINY}
    named = gpu.names_or_all(shapes or (("tiny",) if quick else tuple(gpu.SHAPES)), known, where="--shapes")
    types = gpu.names_or_all(dtypes or (("float16",) if kind == "cpu" else ("bfloat16",)), gpu.DTYPES, where="--dtypes")
    tokens = tokens or (QUICK["tokens"] if quick else NUM_TOKENS)
    fractions = fractions or (QUICK["fractions"] if quick else FRACTIONS)
    sizes = (16,) if quick else expert_size
    if min(tokens) < 1 or min(sizes) < 1 or not all(0 < f <= 1 for f in fractions):
        raise ConfigError("--tokens and --expert-size must be at least 1, --fractions in (0, 1].")
    peaks = gpu.ceilings(kind, dtype=gpu.DTYPES[types[0]])
    yield {"what": "ceilings", "copy_bytes_per_s": peaks[0], "product_flops_per_s": peaks[1]}
    if tune or not (no_tune or quick or is_chosen):
        yield from _tuned(quick=quick, end=begin + budget * TUNE_SHARE)
    left_out = []
    benches: dict[tuple[str, str], _Bench] = {}
    rows: list[tuple[str, str, int, float, int, str, bool]] = []
    if not is_chosen:
        rows += [(shape, types[0], *rest) for shape, *rest in (QUICK_TARGETS if quick else TARGETS)]
    num_targets = len(rows)
    for name, dtype_name in product(named, types):
        rows += [(name, dtype_name, T, f, G, "random", False) for T, G, f in product(tokens, sizes, fractions)]
        recorded_f = [f for f in fractions if f in masks.FRACTIONS]
        rows += [
            (name, dtype_name, T, f, G, "recorded", False) for T, G, f in product(tokens, sizes, recorded_f) if 1 < T <= 4096 and not quick
        ]
        rows += [
            (name, dtype_name, STEP_TOKENS if not quick else QUICK["tokens"][1], f, G, "random", True)
            for G, f in product(sizes, fractions)
            if f < 1
        ]
    for number, (name, dtype_name, T, f, G, of, is_step) in enumerate(rows):
        if number == num_targets and not no_models:
            yield from _models(quick=quick, kind=kind, dtype=gpu.DTYPES[types[0]], peaks=peaks, end=end, left_out=left_out)
        labels = {
            "shape": name,
            "dtype": dtype_name,
            "expert_size": G,
            "tokens": T,
            "wanted_f": f,
            "masks": of,
            "target": number < num_targets,
        }
        if time.perf_counter() > end:
            left_out.append(f"{name} {T} {f} {G}{' step' if is_step else ''}{' recorded' if of == 'recorded' else ''}")
            continue
        if (name, dtype_name) not in benches:
            benches[name, dtype_name] = _Bench(known[name], gpu.DTYPES[dtype_name], kind=kind, peaks=peaks, quick=quick)
        bench = benches[name, dtype_name]
        is_thorough = (autotune or number < num_targets) and end - time.perf_counter() > AUTOTUNE_S
        mode = None if no_compiled or quick else "max-autotune-no-cudagraphs" if is_thorough else "default"
        try:
            found = bench.step(T, f, G, mode=mode) if is_step else bench.forward(T, f, G, mode=mode, of=of)
            yield {"what": "step" if is_step else "ffn", **labels, **found}
        except gpu.triton_errors() as error:
            yield {"what": "error", **labels, "error": str(error).splitlines()[0][:200]}
    yield {"what": "left out", "rows": "; ".join(left_out)}


def _models(
    *, quick: bool, kind: str, dtype: torch.dtype, peaks: tuple[float, float], end: float, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows of whole models, which take some two minutes on a GPU."""
    if time.perf_counter() > end:
        left_out.append("models")
        return
    try:
        sizes = {"dtype": torch.float32 if kind == "cpu" else dtype, "peaks": peaks}
        yield from gpu_models.rows(quick=quick, kind=kind, end=end, left_out=left_out, **sizes)
    except gpu.triton_errors() as error:
        yield {"what": "error", "shape": "model", "error": str(error).splitlines()[0][:200]}


def _tuned(*, quick: bool, end: float) -> Iterator[dict[str, Any]]:
    """Rows of the best tiles, which later rows use."""
    kind, shape, size = gpu.device(), gpu.TINY if quick else gpu.SHAPES["llama-8b"], 16 if quick else 64
    dtype = torch.float16 if kind == "cpu" else torch.bfloat16
    for row in tuning.tune(tuple(tuning.TOKENS), shape=shape, expert_size=size, dtype=dtype, fraction=0.25, quick=quick, end=end):
        if row["what"] == "best":
            TUNED[row["architecture"], row["regime"]] = row["tiles"]
            yield row


class _Bench:
    """One shape's layers, and what is timed on them."""

    def __init__(self, shape: gpu.Shape, dtype: torch.dtype, *, kind: str, peaks: tuple[float, float], quick: bool) -> None:
        self.shape, self.dtype, self.kind, self.peaks, self.quick = shape, dtype, kind, peaks, quick
        self.layers = gpu.layers_of(shape, dtype=dtype, device=kind)
        self.down_DF = [w.down_FD.t() for w in self.layers]
        self.compiled_us: dict[int, tuple[float, str]] = {}
        self.rounds, self.seconds = (2, 0.0) if quick else (25, 0.6)

    def dense(self, x_TD: Tensor, i: int) -> Tensor:
        """One layer as families write it."""
        w, act = self.layers[i], ACTIVATIONS[self.shape.activation]
        up_TF = F.linear(x_TD, w.up_FD, w.up_bias_F)
        h_TF = act(up_TF) if w.gate_FD is None else act(F.linear(x_TD, w.gate_FD)) * up_TF
        return F.linear(h_TF, self.down_DF[i], w.down_bias_D)

    @torch.no_grad()
    def forward(self, T: int, fraction: float, G: int, *, mode: str | None, of: str) -> dict[str, Any]:
        """One row without gradients."""
        shape, act = self.shape, self.shape.activation
        E = -(-shape.d_ff // G)
        x_TD = torch.randn(T, shape.d_model, device=self.kind).to(self.dtype)
        drawn = gpu.random_mask if of == "random" else masks.recorded
        mask_TE = drawn(T, E, fraction, device=self.kind)
        f, union = gpu.count_of(mask_TE)
        plan = build_plan(mask_TE)
        checked = self._checked(x_TD, plan, act)
        if not checked["is_right"]:
            return checked
        layer, layer_is_right = self._layer(x_TD, E, fraction)
        plain: dict[str, gpu.Call] = {
            "dense": lambda i: self.dense(x_TD, i),
            "ours": lambda i: moe_ffn(x_TD, self.layers[i], build_plan(mask_TE), activation=act, impl="triton"),
            "layer": layer,
        }
        graphs = T <= gpu.GRAPH_TOKENS
        options = {"num_layers": len(self.layers), "device": self.kind, "rounds": self.rounds, "seconds": self.seconds}
        us = gpu.medians_us(plain, graphs=graphs, **options)
        if mode is not None:
            if T not in self.compiled_us:  # neither masks nor experts change it, and to compile takes seconds
                self.compiled_us[T] = gpu.medians_us({"": self._compiled(x_TD, mode)}, graphs=graphs, **options)[""], mode
            us["compiled"], checked["compiled_mode"] = self.compiled_us[T]
        rivals: dict[str, gpu.Call] = {}
        if T > gpu.GRAPH_TOKENS and fraction < 1:
            if grouped.grouped_mm_refusal(x_TD, self.layers[0], plan) is None and self.kind == "cuda":
                rivals["grouped"] = lambda i: grouped.moe_ffn(x_TD, self.layers[i], build_plan(mask_TE), activation=act)
            if T == LOOP_TOKENS:
                rivals["loop"] = lambda i: reference.moe_ffn(x_TD, self.layers[i], build_plan(mask_TE), activation=act)
        if rivals:
            us |= gpu.medians_us(rivals, graphs=False, **options | {"rounds": 5})
        return {"f": f, "union": union, **checked, "layer_is_right": layer_is_right} | self._ratios(us, f) | self._floors(us, T, f, union)

    def step(self, T: int, fraction: float, G: int, *, mode: str | None) -> dict[str, Any]:
        """One row of forward and backward, all gradients."""
        shape, act = self.shape, self.shape.activation
        E = -(-shape.d_ff // G)
        x_TD = torch.randn(T, shape.d_model, device=self.kind).to(self.dtype).requires_grad_()
        grad_TD = torch.randn_like(x_TD)
        mask_TE = gpu.random_mask(T, E, fraction, device=self.kind)
        f, union = gpu.count_of(mask_TE)
        checked = self._checked_step(x_TD.detach(), grad_TD, mask_TE, act)
        if not checked["is_right"]:
            return checked
        leaves = [t.requires_grad_() for w in self.layers for t in vars(w).values() if t is not None]

        def both(forward: Callable[[int], Tensor]) -> gpu.Call:
            def call(i: int) -> None:
                own = [t for t in vars(self.layers[i]).values() if t is not None]
                torch.autograd.grad(forward(i), [x_TD, *own], grad_TD)

            return call

        sides: dict[str, gpu.Call] = {
            "dense": both(lambda i: self.dense(x_TD, i)),
            "ours": both(lambda i: moe_ffn(x_TD, self.layers[i], build_plan(mask_TE), activation=act, impl="triton")),
        }
        if not self.quick:
            sides["recompute"] = both(lambda i: moe_ffn(x_TD, self.layers[i], build_plan(mask_TE), activation=act, impl="triton_recompute"))
        try:
            self.down_DF = [w.down_FD.t() for w in self.layers]
            if mode is not None:
                sides["compiled"], checked["compiled_mode"] = both(self._compiled(x_TD, mode)), mode
            options = {"num_layers": len(self.layers), "device": self.kind, "rounds": min(self.rounds, 8), "seconds": self.seconds}
            us = gpu.medians_us(sides, graphs=False, **options)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
            self.down_DF = [w.down_FD.t() for w in self.layers]
        return {"f": f, "union": union, **checked} | self._ratios(us, f) | self._floors(us, T, f, union, passes=3)

    def _checked(self, x_TD: Tensor, plan: Any, act: str) -> dict[str, Any]:
        weights: FFNWeights = self.layers[0]
        ours, plain = gpu.relative_errors(x_TD, weights, plan, activation=act)
        # that was the first tokens, few enough for float64; all of them are compared with plain PyTorch
        y_TD = moe_ffn(x_TD, weights, plan, activation=act, impl="triton").float()
        exact = moe_ffn(x_TD, weights, plan, activation=act, impl="masked").float()
        whole = ((y_TD - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        eps = torch.finfo(self.dtype).eps
        return {"error": ours, "plain_error": plain, "is_right": ours <= 2 * plain + eps and whole <= 4 * (plain + eps)}

    def _checked_step(self, x_TD: Tensor, grad_TD: Tensor, mask_TE: Tensor, act: str) -> dict[str, Any]:
        """The gradient that is furthest from float64, of the first tokens; and of all tokens x's, beside plain PyTorch's."""
        eps = torch.finfo(self.dtype).eps
        errors = gpu.gradient_errors(x_TD, self.layers[0], build_plan(mask_TE), grad_TD, activation=act)
        worst = max(errors, key=lambda name: errors[name][0] - 2 * errors[name][1])
        ours, plain = errors[worst]

        def of_all(impl: str) -> Tensor:
            x = x_TD.detach().requires_grad_()
            y_TD = moe_ffn(x, self.layers[0], build_plan(mask_TE), activation=act, impl=impl)
            return torch.autograd.grad(y_TD, x, grad_TD)[0].float()

        found, exact = of_all("triton"), of_all("masked")
        whole = ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        is_right = ours <= 2 * plain + eps and whole <= 4 * (errors["x_TD"][1] + eps)
        return {"error": ours, "plain_error": plain, "worst": worst, "is_right": is_right}

    def _layer(self, x_TD: Tensor, E: int, fraction: float) -> tuple[gpu.Call, bool]:
        """Router, rule and experts from the input, the rule's threshold selects the fraction; and whether they ran what was selected."""
        shape = self.shape
        gate = "gate" if shape.gated else None
        sizes = {"d_model": shape.d_model, "d_ff": shape.d_ff, "d_out": shape.d_model}
        site = FFNSite(name="", up="up", down="down", gate=gate, activation=shape.activation, **sizes)
        router = build_router(NormRouterConfig(width=128), site=site, num_experts=E).to(self.kind)
        if fraction == 1:  # a rule that runs all needs no router
            full = build_plan(torch.ones(len(x_TD), E, dtype=torch.bool, device=self.kind), is_full=True)
            return (lambda i: moe_ffn(x_TD, self.layers[i], full, activation=shape.activation)), True
        scores_TE = router(x_TD)
        scores = scores_TE.flatten()
        theta = scores.kthvalue(max(1, round((1 - fraction) * len(scores)))).values.item()
        parts = (router.hidden.weight, router.hidden.bias, router.out.weight, router.out.bias)
        tensors = [tensor.detach() for tensor in parts]
        weights = RouterWeights(*tensors, output="exp", rule="threshold", knob=theta)
        routed = [gpu_routed.Routed(layer, weights, activation=shape.activation, dtype=self.dtype) for layer in self.layers]

        def run(i: int) -> Tensor:
            if len(x_TD) <= gpu_routed.MOST_TOKENS:
                return routed[i](x_TD)[0]
            return moe_ffn(x_TD, self.layers[i], build_plan(routed[i].select(x_TD)), activation=shape.activation, impl="triton")

        mask_TE = routed[0].select(x_TD)
        differs = (mask_TE != (scores_TE >= theta)) & ((scores_TE / theta - 1).abs() > 1e-4)  # nearer, a rounding may decide
        exact_TD = moe_ffn(x_TD, self.layers[0], build_plan(mask_TE), activation=shape.activation, impl="masked").float()
        error = (run(0).float() - exact_TD).norm() / exact_TD.norm().clamp_min(1e-30)
        return run, not differs.any().item() and error.item() <= gpu.tolerance(self.dtype)

    def _compiled(self, x_TD: Tensor, mode: str) -> gpu.Call:
        torch.compiler.reset()  # each shape is a compilation of its own, of which there is a limit
        act = ACTIVATIONS[self.shape.activation]

        def ffn(x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:
            u = F.linear(x, up, up_bias)
            return F.linear(act(u) if gate is None else act(F.linear(x, gate)) * u, down, down_bias)

        compiled = torch.compile(ffn, dynamic=False, mode=mode)
        ws = self.layers
        return lambda i: compiled(x_TD, ws[i].up_FD, ws[i].gate_FD, self.down_DF[i], ws[i].up_bias_F, ws[i].down_bias_D)

    def _ratios(self, us: dict[str, float], f: float) -> dict[str, Any]:
        best = min(us[name] for name in ("dense", "compiled") if name in us)
        row = {f"{name}_us": value for name, value in us.items()} | {"ratio": best / us["ours"], "of_bound": best / us["ours"] * f}
        return row | ({"layer_ratio": best / us["layer"]} if "layer" in us else {})

    def _floors(self, us: dict[str, float], T: int, f: float, union: float, *, passes: int = 1) -> dict[str, Any]:
        """The rooflines of ours and of dense, and what share of it each reaches."""
        floor_us, bound_by = self._floor(T, f, union, passes=passes)
        dense_us, _ = self._floor(T, 1.0, 1.0, passes=passes)
        best = min(us[name] for name in ("dense", "compiled") if name in us)
        found = {"floor_us": floor_us, "bound_by": bound_by, "of_floor": floor_us / us["ours"]}
        return found | {"dense_floor_us": dense_us, "dense_of_floor": dense_us / best}

    def _floor(self, T: int, f: float, union: float, *, passes: int) -> tuple[float, str]:
        """The least microseconds: weights of the union, x and y once a pass; FLOPs of the pairs."""
        shape, matrices = self.shape, 3 if self.shape.gated else 2
        size = self.dtype.itemsize
        bytes_us = passes * (matrices * shape.d_model * shape.d_ff * union + 2 * T * shape.d_model) * size / self.peaks[0] * 1e6
        flops_us = passes * 2 * matrices * T * shape.d_model * shape.d_ff * f / self.peaks[1] * 1e6
        return (bytes_us, "bytes") if bytes_us > flops_us else (flops_us, "flops")
