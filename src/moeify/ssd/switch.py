"""From dense to sparse training: neurons grouped anew, weights and optimizer moments permuted in place, routers from the groups' centres.

Letters: F FFN width, E experts.

The dense function does not change: neurons are only renumbered. The way back is a mode and nothing else.

Where processes hold parts of the weights, all call these functions together; one layer, and of what is permuted one tensor, is whole at a
time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._dist import ALONE, Ranks, gathered, put, whole
from ..errors import ConfigError
from ..layers import MoEFFN
from ..routers import LinearRouter
from ..sites import FFNSite, neuron_parameters
from ..split import ContiguousSplit, ExpertSplit, RandomSplit, balanced_kmeans, parameter_features
from .controller import SSDConfig


@dataclass(frozen=True, kw_only=True)
class SwitchRecord:
    """What a re-clustering did; JSON by `_config`."""

    step: int
    """Optimizer steps done."""
    warm_layers: int = 0
    """Layers in which the clustering that was started from the last one has the lower inertia."""
    inertia: tuple[float, ...] = ()
    """By layer, of the groups that were taken; empty for random ones."""


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Sequence[MoEFFN]) -> None:
    """Refuse an optimizer before training that could not follow a switch.

    Of its class one more is made, for a parameter of 4 x 3, and steps once: what it keeps then tells.

    Raises:
        ConfigError: it keeps something for a parameter that is neither of the parameter's shape nor one number, or its step needs a
            closure; or a router is not among its parameters.
    """
    inner = _unwrapped(optimizer)
    present = {id(p) for group in inner.param_groups for p in group["params"]}
    for layer in layers:
        if any(p.requires_grad and id(p) not in present for p in layer.router.parameters()):
            raise ConfigError(f"the router of '{layer.site.name}' is not in the optimizer; attach SSD before the optimizer is made.")
    for parameter, slot in inner.state.items():
        _check_slot(inner, parameter, slot)
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.ones(4, 3)
    try:
        trial = type(inner)([parameter], **inner.defaults)
    except (TypeError, ValueError):  # a constructor of its own kind: the first switch will see
        return
    try:
        trial.step()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{type(inner).__name__} cannot take a plain step ({error}); use AdamW or SGD.") from error
    _check_slot(inner, parameter, trial.state[parameter])


@torch.no_grad()
def permute_trained(model: nn.Module, site: FFNSite, order_F: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Renumber a site's neurons in weights, biases, gradients and the optimizer's moments, in place: new neuron i is old ``order_F[i]``.

    Parameters and moments keep identity, storage and strides (decision D8). Everything is checked before anything moves. One that is spread
    over processes is gathered, renumbered, and each process takes its part back.

    Raises:
        ConfigError: as `check_optimizer`.
        UnsupportedModelError: a projection is no plain layer.
    """
    state = {} if optimizer is None else _unwrapped(optimizer).state
    moved: list[tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]] = []
    for parameter, rows_of in neuron_parameters(model, site):
        slot = state.get(parameter, {})
        if optimizer is not None:
            _check_slot(_unwrapped(optimizer), parameter, slot)
        same = [parameter, parameter.grad, *slot.values()]
        moved += [(t, rows_of) for t in same if isinstance(t, Tensor) and t.shape == parameter.shape]
    for tensor, rows_of in moved:
        full = whole(tensor)
        for rows in rows_of(full):
            rows.copy_(rows.index_select(0, order_F.to(rows.device)))
        if full is not tensor:
            put(tensor, full)


def group_neurons(layer: MoEFFN, config: SSDConfig, *, seed: int, warm: bool) -> tuple[ExpertSplit, bool]:
    """New experts for one FFN, whose weights are whole here; nothing is changed.

    Args:
        layer: its neurons lie in the order of the experts they had.
        config: number of experts, and whether they are clusters.
        seed: of a fresh clustering, or of the random groups.
        warm: also start from the experts that there are, and take what has the lower inertia.

    Returns:
        The split, and whether it is the warm-started one.

    Source: the authors' clustering code (docs/ssd.md); the solver is `balanced_kmeans`.
    Cost: one clustering, two where ``warm``.
    """
    return group_features(parameter_features(layer.weights()), layer, config, seed=seed, warm=warm)


def group_features(features_FK: Tensor, layer: MoEFFN, config: SSDConfig, *, seed: int, warm: bool) -> tuple[ExpertSplit, bool]:
    """`group_neurons` of a layer's features."""
    if config.experts == "random":
        return RandomSplit(seed=seed)(features_FK, num_experts=layer.num_experts), False
    fresh = balanced_kmeans(features_FK, num_experts=layer.num_experts, seed=seed).split
    if not warm:
        return fresh, False
    present = ContiguousSplit()(features_FK, num_experts=layer.num_experts)
    kept = balanced_kmeans(features_FK, num_experts=layer.num_experts, warm_start=present).split
    is_warm = cast(float, kept.inertia) <= cast(float, fresh.inertia)
    return (kept if is_warm else fresh), is_warm


def group_layers(
    layers: Sequence[MoEFFN], config: SSDConfig, *, seed: int, warm: bool, ranks: Ranks = ALONE
) -> list[tuple[ExpertSplit, bool]]:
    """`group_neurons` of every layer: process r groups layers r, r + n, ..., and tells the others.

    Each layer has the seed that it has with one process: so the experts are the same.

    Cost: ceil(layers / n) clusterings, two where ``warm``, and 8 F bytes sent a layer. Memory: the features of as many layers.
    """
    mine: dict[int, tuple[ExpertSplit, bool]] = {}
    features: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        with gathered(layer.leaves()):
            if i % ranks.size == ranks.rank:
                features[i] = parameter_features(layer.weights())
    for i, features_FK in features.items():
        mine[i] = group_features(features_FK, layers[i], config, seed=seed + i, warm=warm)
    found = []
    for i, layer in enumerate(layers):
        split, is_warm = mine.get(i, (None, False))
        order_F = torch.empty(layer.site.d_ff, dtype=torch.int64) if split is None else split.order_F
        inertia = math.nan if split is None or split.inertia is None else split.inertia
        order_F = ranks.broadcast(order_F, source=i % ranks.size)
        told = ranks.broadcast(torch.tensor([inertia, is_warm], dtype=torch.float64), source=i % ranks.size).tolist()
        known = None if math.isnan(told[0]) else told[0]
        found.append((ExpertSplit(order_F=order_F, num_experts=layer.num_experts, inertia=known), bool(told[1])))
    return found


@torch.no_grad()
def reset_router(layer: MoEFFN, config: SSDConfig, optimizer: torch.optim.Optimizer | None, *, seed: int) -> None:
    """The router of new experts: their centres, or random directions; what the optimizer remembers of the old one is dropped."""
    router = cast(LinearRouter, layer.router)
    spread = router.out.weight
    with gathered([*layer.leaves(), router.out]):
        if config.experts == "random":
            router.set_random(layer.weights(), generator=torch.Generator().manual_seed(seed))
        else:
            router.set_centres(layer.weights(), layer.bounds)
        full = router.out.weight
    if full is not spread:
        put(spread, full)
    for parameter in router.parameters():
        parameter.grad = None
        if optimizer is not None:
            _unwrapped(optimizer).state.pop(parameter, None)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """accelerate wraps optimizers."""
    return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))


def _check_slot(optimizer: torch.optim.Optimizer, parameter: Tensor, slot: Mapping[str, Any]) -> None:
    for key, value in slot.items():
        is_scalar = value is None or isinstance(value, int | float | str) or (isinstance(value, Tensor) and value.numel() == 1)
        if not is_scalar and not (isinstance(value, Tensor) and value.shape == parameter.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"{type(optimizer).__name__} keeps '{key}' ({shape}) for a weight of {tuple(parameter.shape)}: neurons cannot be permuted "
                "in it exactly; use AdamW or SGD, whose state has the weight's shape."
            )
