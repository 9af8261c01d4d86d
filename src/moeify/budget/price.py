"""What a model costs at given active fractions, as a share of the dense one, and what of it each layer decides.

Letters: T tokens, D width of a layer's input.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._latency import measure_ms
from ..channels import SparseInput, kept, sparse_inputs
from ..controls import set_mode, with_modes
from ..convert import to_dense
from ..cost import CostBreakdown, WeightCost
from ..layers import MoEFFN, moe_layers
from ..select import Rule
from ..sites.probe import eval_mode
from .curves import line

UNITS = ("flops", "ffn_flops", "bytes", "latency")
"""What a budget may count: FLOPs of the whole model or of its FFNs, bytes of weights that decoding one token reads, or time."""

Batch = Mapping[str, Tensor]
Executor = MoEFFN | SparseInput

TIMED = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Fractions at which each layer's time is taken; in between it is interpolated."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Cost of a model as a constant and one function for each layer; shares of the dense model's cost."""

    base: float
    """What no layer decides."""
    of: Mapping[str, Callable[[float], float]]
    """Layer -> cost at an active fraction."""

    def total(self, fractions: Mapping[str, float]) -> float:
        """Of the whole model."""
        return self.base + sum(self.of[name](fraction) for name, fraction in fractions.items())


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The costs that are counted and not measured, by active fractions of all layers."""

    flops: CostBreakdown
    """From `moeify.model_cost`."""
    weights: WeightCost
    """From `moeify.model_weights`."""

    def fractions(self, active: Mapping[str, float]) -> dict[str, float]:
        """Of the dense model by unit, all but "latency"; "ffn_flops" only where the model has FFNs."""
        found = {"flops": self.flops.flops_fraction(active)}
        if self.flops.ffns:
            found["ffn_flops"] = self.flops.ffn_flops_fraction(active)
        return found | {"bytes": self.weights.read_bytes_fraction(active)}

    def prices(self, unit: str, names: Sequence[str]) -> Prices:
        """What each layer costs in a unit: these are linear in the active fraction."""
        everything = dict.fromkeys(names, 1.0)
        most = self.fractions(everything)[unit]
        weights = {name: most - self.fractions({**everything, name: 0.0})[unit] for name in names}
        return Prices(base=most - sum(weights.values()), of={name: partial(_product, weight) for name, weight in weights.items()})


@torch.no_grad()
def timed_prices(
    model: nn.Module,
    rules: Callable[[Mapping[str, float]], Mapping[str, Rule]],
    inputs: Sequence[Batch],
    *,
    dense_ms: float,
    all_on_ms: float,
    rounds: int,
) -> Prices:
    """What each layer costs in time: the layer alone, on what it reads of ``inputs``, at `TIMED`; all fractions take turns.

    Args:
        model: converted or thinned.
        rules: rules of layers at active fractions.
        inputs: what a run of the model reads; all of them are one run.
        dense_ms: time of the dense model's run, the unit.
        all_on_ms: time of the model's run with everything running.
        rounds: timed calls of each.
    """
    layers: dict[str, Executor] = {**sparse_inputs(model), **moe_layers(model)}
    read = layer_inputs(model, inputs)
    of: dict[str, Callable[[float], float]] = {}
    base = all_on_ms / dense_ms
    with eval_mode(model), kept(with_modes(model), "mode"), kept(layers.values(), "rule"):
        set_mode(model, "moe")
        for name, layer in layers.items():
            if name not in read:
                continue
            calls = {str(fraction): partial(_at_rule, model, layer, rules({name: fraction})[name], read[name]) for fraction in TIMED}
            times = measure_ms(calls, rounds=rounds, sync=_sync(model))
            ms = [times[str(fraction)].median_ms / dense_ms for fraction in TIMED]
            for i in range(1, len(ms)):
                ms[i] = max(ms[i], ms[i - 1])  # what runs more takes no less; the clock may say otherwise
            of[name] = partial(line, TIMED, ms)
            base -= ms[-1]
    return Prices(base=base, of=of)


class Clock:
    """Times a model with its present rules against the dense one: both take turns, so that what slows the machine slows both."""

    def __init__(self, model: nn.Module, inputs: Sequence[Batch], *, dense: nn.Module | None = None, rounds: int = 9) -> None:
        self.model, self.inputs, self.rounds = model, [_fed(batch) for batch in inputs], rounds
        if dense is None:
            dense = copy.deepcopy(model)
            to_dense(dense)
        self.dense = dense
        """An ordinary dense model: the converted one's dense mode reads weights that lie by neuron."""

    def __call__(self) -> tuple[float, float]:
        """(model's time / dense time, the dense time in ms): medians of the rounds' own ratios and times."""
        ratios, times = [], []
        with torch.no_grad(), eval_mode(self.model), eval_mode(self.dense), kept(with_modes(self.model), "mode"):
            set_mode(self.model, "moe")
            for i in range(self.rounds + 2):
                sides = (self.model, self.dense) if i % 2 else (self.dense, self.model)
                ms = {id(side): self._run(side) for side in sides}
                if i >= 2:  # the first ones warm caches up
                    ratios.append(ms[id(self.model)] / ms[id(self.dense)])
                    times.append(ms[id(self.dense)])
        return statistics.median(ratios), statistics.median(times)

    def _run(self, model: nn.Module) -> float:
        wait = _sync(model) or _nothing
        wait()
        start = time.perf_counter()
        for batch in self.inputs:
            model(**batch)
        wait()
        return (time.perf_counter() - start) * 1e3


@torch.no_grad()
def layer_inputs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """What every converted FFN, and every layer that skips channels, reads of the batches while the model runs dense, by name."""
    found: dict[str, list[Tensor]] = {}
    with hooked(model, lambda name, x: found.setdefault(name, []).append(x)), dense_run(model):
        for batch in batches:
            model(**_fed(batch))
    return found


@contextmanager
def dense_run(model: nn.Module) -> Iterator[None]:
    """Eval and dense mode within the block."""
    with torch.no_grad(), eval_mode(model), kept(with_modes(model), "mode"):
        set_mode(model, "dense")
        yield


@contextmanager
def hooked(model: nn.Module, tell: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call ``tell(layer, x)`` with every layer's input within the block."""
    handles = []
    for name, layer in ({**sparse_inputs(model), **moe_layers(model)}).items():
        path = layer.site.first[0] if isinstance(layer, MoEFFN) else name
        hook = partial(_hook, partial(tell, name))
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(tell: Callable[[Tensor], object], _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tell(args[0] if args else next(iter(kwargs.values())))


def _at_rule(model: nn.Module, layer: Executor, rule: Rule, inputs: Sequence[Tensor]) -> None:
    """One layer alone, as the model would run it."""
    layer.rule = rule
    paths = (*layer.site.first, layer.site.down) if isinstance(layer, MoEFFN) else (layer.site.name,)
    modules = [model.get_submodule(path) for path in paths]
    for x in inputs:
        y = x
        for module in modules[:-1]:
            y = module(x)
        modules[-1](y)


def _fed(batch: Batch) -> dict[str, Tensor]:
    """Keyword arguments of the model."""
    return {key: value for key, value in batch.items() if key != "labels"}


def _product(weight: float, fraction: float) -> float:
    return weight * fraction


def _sync(model: nn.Module) -> Callable[[], None] | None:
    return torch.cuda.synchronize if next(model.parameters()).device.type == "cuda" else None


def _nothing() -> None:
    return None
