"""The sparse training step against the dense one: the FFN alone, forward and backward, and a whole step of a small GPT.

``part`` ffn: one ReLU FFN with biases, from its input to all gradients; the routed sides begin at a given random selection, and also give
the router's probabilities their gradient. ``part`` step: forward, loss, backward and fused AdamW of a GPT-2 of 4 layers with a vocabulary
of 256 bytes, which is all that a small model leaves beside its blocks; larger vocabularies add the same to both sides. The sparse side is
the model as SSD trains it: router, selection, kernel. Sides take turns call by call.

``float32`` and ``bfloat16`` (autocast; parameters stay float32) are rows of their own; what a machine trains in is the faster of the two
(`moeify.train.capture.fast_dtype`), so ``dense_ms`` of one row may be compared with ``ours_ms`` of the other.

Letters: T tokens, D model width, F FFN width, E experts.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import DTYPES, words
from moeify._config import lookup
from moeify.convert import apply_site
from moeify.evaluate import measure_ms
from moeify.kernels import build_plan, explain, moe_ffn
from moeify.layers import MoEFFN
from moeify.manifest import SiteRecord
from moeify.routers import LinearRouter, LinearRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites
from moeify.sites.site import FFNWeights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its batch."""

    d_model: int
    d_ff: int
    num_layers: int
    num_experts: int
    selected: int
    batch: int
    window: int


FULL = Shape(d_model=512, d_ff=2048, num_layers=4, num_experts=32, selected=8, batch=16, window=256)
QUICK = Shape(d_model=64, d_ff=256, num_layers=2, num_experts=8, selected=2, batch=4, window=32)
VOCABULARY = 256
PARTS = ("ffn", "step")
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-2}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--parts", type=words, default=PARTS, metavar="A,B", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")


def run(*, quick: bool, parts: Sequence[str] = PARTS, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[dict[str, Any]]:
    """Rows: median milliseconds of each side, and ratios: dense over the other, above 1 where dense is slower."""
    shape, rounds = (QUICK, 3) if quick else (FULL, 15)
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    sides = {"ffn": _ffn_sides, "step": _step_sides}
    for part in parts:
        make = lookup(sides, part, where="--parts")
        for name, dtype in types.items():
            torch.manual_seed(0)
            chosen, candidates = make(shape, dtype)
            spread = measure_ms(candidates, rounds=rounds, warmup=2)
            row: dict[str, Any] = {
                "part": part,
                "dtype": name,
                "d_model": shape.d_model,
                "d_ff": shape.d_ff,
                "tokens": shape.batch * shape.window,
            }
            row |= {
                "layers": 1 if part == "ffn" else shape.num_layers,
                "experts": shape.num_experts,
                "selected": shape.selected,
                "chosen": chosen,
            }
            row |= {f"{side}_ms": spread[side].median_ms for side in candidates}
            row |= {f"dense_over_{side}": spread["dense"].median_ms / spread[side].median_ms for side in candidates if side != "dense"}
            yield row | {"spread": max(s.p80_ms / s.p20_ms for s in spread.values())}


Sides = tuple[str, dict[str, Callable[[], object]]]


def _ffn_sides(shape: Shape, dtype: torch.dtype) -> Sides:
    """Weights and x are of the dtype; layouts are those that each side has in a model: nn.Linear's, and by neuron."""
    T, D, width = shape.batch * shape.window, shape.d_model, shape.d_ff
    x_TD, upstream_TD = torch.randn(T, D).to(dtype).requires_grad_(), torch.randn(T, D).to(dtype)
    up_FD, down_DF = torch.randn(width, D) / D**0.5, torch.randn(D, width) / width**0.5
    dense = [t.to(dtype).requires_grad_() for t in (up_FD, down_DF, torch.randn(width), torch.randn(D))]
    routed = [t.detach().clone().requires_grad_() for t in (dense[0], dense[1].t().contiguous(), dense[2], dense[3])]
    mask_TE = torch.zeros(T, shape.num_experts, dtype=torch.bool).scatter_(1, _choice(T, shape), True)
    probs_TE = torch.rand(T, shape.num_experts, requires_grad=True)
    weights = FFNWeights(routed[0], routed[1], None, routed[2], None, routed[3])

    def gradients(y_TD: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (y_TD, *torch.autograd.grad(y_TD, [x_TD, *leaves], upstream_TD))

    def run_dense() -> tuple[Tensor, ...]:
        return gradients(F.linear(F.relu(F.linear(x_TD, dense[0], dense[2])), dense[1], dense[3]), dense)

    def run_routed(impl: str) -> tuple[Tensor, ...]:
        y_TD = moe_ffn(x_TD, weights, build_plan(mask_TE, probs_TE), activation="relu", impl=impl, training=True)
        return gradients(y_TD, [*routed, probs_TE])

    names = {"grouped": "grouped", "ours": "auto"}
    for got, expected in zip(run_routed("auto"), run_routed("grouped"), strict=True):
        # By the norm: where an activation is zero but for a rounding, ReLU's derivative may be 0 in one and 1 in the other.
        error = (got - expected).float().norm() / expected.float().norm()
        assert error < TOLERANCE[dtype], f"{error:.2e} away from 'grouped'"
    plan = build_plan(mask_TE, probs_TE)
    (chosen,) = [c.name for c in explain(x_TD, weights, plan, activation="relu", training=True) if c.chosen]
    return chosen, {"dense": run_dense, **{side: lambda impl=impl: run_routed(impl) for side, impl in names.items()}}  # type: ignore[misc]


def _choice(T: int, shape: Shape) -> Tensor:
    return torch.rand(T, shape.num_experts).topk(shape.selected).indices


def _step_sides(shape: Shape, dtype: torch.dtype) -> Sides:
    """A model of each side, with its own optimizer."""
    ids = torch.randint(VOCABULARY, (shape.batch, shape.window))
    models = {"dense": _gpt(shape), "grouped": _gpt(shape), "ours": _gpt(shape)}
    layers: list[MoEFFN] = []
    for side in ("grouped", "ours"):
        layers = _make_sparse(models[side], shape, ids, impl="auto" if side == "ours" else "grouped")
    x_TD = torch.randn(ids.numel(), shape.d_model, dtype=dtype)
    plan = build_plan(torch.zeros(ids.numel(), shape.num_experts, dtype=torch.bool).scatter_(1, _choice(ids.numel(), shape), True))
    with _autocast(dtype):
        (chosen,) = [c.name for c in explain(x_TD, layers[0].weights(), plan, activation="relu", training=True) if c.chosen]
    return chosen, {side: _step(model, ids, dtype) for side, model in models.items()}


def _gpt(shape: Shape) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.window,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=max(1, shape.d_model // 64),
        n_inner=shape.d_ff,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def _make_sparse(model: nn.Module, shape: Shape, ids: Tensor, *, impl: str) -> list[MoEFFN]:
    """As SSD's sparse phase has it."""
    found = []
    for site in find_ffn_sites(model, {"input_ids": ids[:1]}):
        record = SiteRecord(site=site, num_experts=shape.num_experts, router=LinearRouterConfig(), rule=TopK(k=shape.selected))
        layer = apply_site(model, record, order_F=None)
        assert isinstance(layer.router, LinearRouter)
        layer.router.set_centres(layer.weights(), layer.bounds)
        layer.is_taught, layer.mode, layer.impl = True, "moe", impl
        found.append(layer)
    return found


def _step(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    return step


def _autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype=dtype)
