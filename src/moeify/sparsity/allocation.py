"""Which layer skips how much of a budget: one share for all, one level for all, or what the blocks' outputs say.

An allocation is a function ``(Budget) -> shares``: what each layer skips of its own inputs, by name, or None where one level of comparable
scores decides that anew whenever levels are set. Costs are weights of the mean: parameters, bytes or measured time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ConfigError

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares at which `greedy` measures a layer's error; in between it is interpolated."""
MOST = 0.95
"""No layer skips more, so that none falls silent."""
_SHARPNESS = 128 * 1024 / 1e4  # of CFSP's sigmoid: its influences are sums over 128 sequences of 1024 tokens, divided by 1e4


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an allocation may ask."""

    skip_frac: float
    """Wanted share, in [0, 1): mean over layers, weighted by ``costs``."""
    costs: Mapping[str, float]
    """By layer, > 0."""
    blocks: Mapping[str, str]
    """Block of each layer."""
    error: Callable[[str, float], float]
    """(layer, share) -> squared error of its block's output where that layer alone skips the share; a forward of the block."""
    influence: Callable[[], Mapping[str, float]]
    """How far each block turns its input, in [0, 1]: mean angle between its input and its output over pi; a forward of all batches."""


Allocation = Callable[[Budget], dict[str, float] | None]


def shared(_budget: Budget) -> None:
    """One level for all layers: a channel is skipped where it costs least (`moeify.sparsity.channel.shared_level`)."""


def uniform(budget: Budget) -> dict[str, float]:
    """The same share in each layer."""
    return dict.fromkeys(budget.costs, budget.skip_frac)


def greedy(budget: Budget) -> dict[str, float]:
    """In each block, step by step, the layer is raised whose step costs least error of the block's output; all blocks reach the budget.

    A step saves as much in every layer, a fortieth of the mean cost: its share rises by 0.025 mean(cost) / cost.

    Layers are measured one at a time and their errors added: skipped inputs of different layers hardly correlate, so that ten measurements
    a layer do, where a search on measured combinations needs hundreds a block.

    Source: Liu et al. 2024, arXiv:2408.14690, algorithm 1 (TEAL), with that difference.
    """
    shares: dict[str, float] = {}
    for layers in _by_block(budget).values():
        curves = {name: [budget.error(name, share) for share in GRID] for name in layers} if budget.skip_frac else {}
        shares |= greedy_shares(curves or dict.fromkeys(layers, [0.0] * len(GRID)), budget.costs, skip_frac=budget.skip_frac)
    return shares


def greedy_shares(curves: Mapping[str, Sequence[float]], costs: Mapping[str, float], *, skip_frac: float) -> dict[str, float]:
    """Shares of one block's layers whose errors add up to little, their mean weighted by cost being ``skip_frac``.

    Args:
        curves: each layer's error at `GRID`.
        costs: of each layer, > 0.
        skip_frac: wanted share, at most `MOST`.
    """
    if skip_frac > MOST:
        raise ConfigError(f"allocate='greedy' lets no layer skip more than {MOST}, and skip_frac is {skip_frac}.")
    shares = dict.fromkeys(curves, 0.0)
    total = sum(costs[name] for name in curves)
    step = 0.025 * total / len(curves)
    left = skip_frac * total
    while left > 1e-9 * total:
        rises = {name: min(step, left) / costs[name] for name in curves}
        # a layer that would pass the most rises up to it
        able = {name: min(shares[name] + rise, MOST) for name, rise in rises.items() if shares[name] < MOST - 1e-12}
        best = min(able, key=lambda name: _at(curves[name], able[name]) - _at(curves[name], shares[name]))
        left -= (able[best] - shares[best]) * costs[best]
        shares[best] = able[best]
    return shares


def block_influence(budget: Budget) -> dict[str, float]:
    """Blocks that turn their input further keep more, the layers of one block the same.

    keep_b = s_b / mean(s) * (1 - skip_frac),   s_b = sigmoid(13.1 (I_b - mean(I)));   where a block would keep more than all, the
    deviations from the mean are shrunk until the largest is 1 / 1.05 of the way to all. Means are weighted by cost.

    Source: Wang et al. 2024, arXiv:2409.13199 (CFSP) and its released code, whose blocks cost the same.
    """
    layers = _by_block(budget)
    costs = {block: sum(budget.costs[name] for name in names) for block, names in layers.items()}
    influence = budget.influence()
    keeps = block_keeps(influence, costs, keep_frac=1 - budget.skip_frac)
    return {name: 1 - keeps[block] for block, names in layers.items() for name in names}


def block_keeps(influence: Mapping[str, float], costs: Mapping[str, float], *, keep_frac: float) -> dict[str, float]:
    """The formula of `block_influence`: what each block keeps, in (0, 1], the mean weighted by cost being ``keep_frac``."""
    middle = _mean(influence, costs)
    scores = {block: 1 / (1 + math.exp(-_SHARPNESS * (value - middle))) for block, value in influence.items()}
    middle = _mean(scores, costs)
    keeps = {block: score / middle * keep_frac for block, score in scores.items()}
    largest = max(keeps.values())
    if largest >= 1:
        shrink = (1 - keep_frac) / ((largest - keep_frac) * 1.05) if largest > keep_frac else 0.0
        keeps = {block: keep_frac + (keep - keep_frac) * shrink for block, keep in keeps.items()}
    return keeps


ALLOCATIONS: dict[str, Allocation] = {
    "shared": shared,
    "uniform": uniform,
    "greedy": greedy,
    "block_influence": block_influence,
}
"""Allocations by the name that configs store; a new one joins by a function and a line here."""


def _by_block(budget: Budget) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in budget.costs:
        layers.setdefault(budget.blocks[name], []).append(name)
    return layers


def _mean(values: Mapping[str, float], costs: Mapping[str, float]) -> float:
    return sum(costs[name] * value for name, value in values.items()) / sum(costs.values())


def _at(curve: Sequence[float], share: float) -> float:
    """The curve between the points of `GRID`; beyond them the last piece goes on."""
    pieces = list(zip(pairwise(GRID), pairwise(curve), strict=True))
    (low, high), (below, above) = next((p for p in pieces if share <= p[0][1]), pieces[-1])
    return below + (above - below) * (share - low) / (high - low)
