"""Set a rule's knob so that a wanted fraction of the experts runs on held-out tokens.

Letters: T tokens, E experts.

A rule says of each (token, expert) pair at which knob it switches (`Rule.critical`). Sorted once per layer, the active fraction at any
knob is a binary search: exact on the given scores, and one sort per layer whatever the number of targets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule
from .topk import TopK

Scope = Literal["layer", "global"]

_FP32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Rules that reach a target, and what they reach."""

    rules: dict[str, Rule]
    """Rule of each layer; what `moeify.set_rule` takes."""
    active_fraction: float
    """Reached on the given scores: mean over layers, weighted."""
    per_layer: dict[str, float]
    """Reached by each layer."""

    @property
    def rule(self) -> Rule | None:
        """The one rule of all layers; None where they differ."""
        first, *rest = self.rules.values()
        return first if all(rule == first for rule in rest) else None


class Calibrator:
    """The sorted switch points of every layer; answers any number of targets."""

    def __init__(
        self,
        rule_type: type[Rule],
        scores: Mapping[str, Tensor | Iterable[Tensor]],
        *,
        weights: Mapping[str, float] | None = None,
        always_on: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """See `calibrate`."""
        if not scores:
            raise ConfigError("calibration needs the scores of at least one layer.")
        for what, named in (("weights", weights), ("always_on", always_on)):
            for name in named or ():
                if name not in scores:
                    raise ConfigError(f"{what} names the layer {name!r}, which has no scores.")
        self.rule_type = rule_type
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in scores}
        self.layers = {
            name: _Switches(
                rule_type, [value] if isinstance(value, Tensor) else value, always_on=(always_on or {}).get(name, ()), name=name
            )
            for name, value in scores.items()
        }

    def active(self, knobs: Mapping[str, float]) -> float:
        """Weighted mean over layers of the active fraction at each layer's knob."""
        total = sum(self.weights.values())
        return sum(self.weights[name] * layer.active(knobs[name]) for name, layer in self.layers.items()) / total

    def solve(self, target_active: float, *, scope: Scope = "layer") -> Calibrated:
        """The knobs for one target; arguments as in `calibrate`."""
        if not 0 < target_active <= 1:
            raise ConfigError(f"target_active must be in (0, 1], got {target_active}.")
        if scope == "layer":
            knobs = {name: layer.nearest(target_active) for name, layer in self.layers.items()}
        elif scope == "global":
            knobs = self._mixed_k(target_active) if self.rule_type is TopK else self._one_knob(target_active)
        else:
            raise ConfigError(f"scope must be 'layer' or 'global', got {scope!r}.")
        rules = {name: self.rule_type.at(knob) for name, knob in knobs.items()}
        return Calibrated(
            rules=rules,
            active_fraction=self.active(knobs),
            per_layer={name: layer.active(knobs[name]) for name, layer in self.layers.items()},
        )

    def _one_knob(self, target: float) -> dict[str, float]:
        """Bisection of the knob that all layers share."""

        def knobs(common: float) -> dict[str, float]:
            low, high = self.rule_type.bounds
            return dict.fromkeys(self.layers, min(max(common, low), high))

        fewest, most = (0.0, 1.0) if self.rule_type.grows else (max(layer.largest for layer in self.layers.values()), 0.0)
        if self.rule_type.bounds[1] == 1 and not self.rule_type.grows:
            fewest = 1.0
        if self.active(knobs(most)) <= target:
            return knobs(most)
        if self.active(knobs(fewest)) >= target:
            return knobs(fewest)
        for _ in range(100):
            middle = (fewest + most) / 2
            if middle in (fewest, most):
                break
            if self.active(knobs(middle)) >= target:
                most = middle
            else:
                fewest = middle
        best = min((most, fewest), key=lambda common: abs(self.active(knobs(common)) - target))
        return knobs(self._centre(best))

    def _centre(self, common: float) -> float:
        """The middle of the interval around ``common`` in which no pair switches, so that rounding in the rule cannot matter."""
        gaps = [layer.gap(common) for layer in self.layers.values()]
        low, high = max(gap[0] for gap in gaps), min(gap[1] for gap in gaps)
        return (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else common

    def _mixed_k(self, target: float) -> dict[str, float]:
        """Whole k, one larger in some layers: the nearest reachable total. Extra experts are spread evenly over the layers."""
        most = max(layer.num_experts for layer in self.layers.values())
        k = max((k for k in range(1, most + 1) if self.active(dict.fromkeys(self.layers, k)) <= target), default=1)
        knobs: dict[str, float] = {name: float(min(k, layer.num_experts)) for name, layer in self.layers.items()}
        names = list(self.layers)
        # golden-ratio order: any prefix of it is spread over the depth
        for name in sorted(names, key=lambda n: (names.index(n) * 0.6180339887498949) % 1):
            raised = knobs | {name: min(knobs[name] + 1, float(self.layers[name].num_experts))}
            if abs(self.active(raised) - target) < abs(self.active(knobs) - target):
                knobs = raised
        return knobs


def calibrate(
    rule_type: type[Rule],
    scores: Mapping[str, Tensor | Iterable[Tensor]],
    *,
    target_active: float,
    scope: Scope = "layer",
    weights: Mapping[str, float] | None = None,
    always_on: Mapping[str, Sequence[int]] | None = None,
) -> Calibrated:
    """Knobs at which the wanted fraction of (token, expert) pairs runs on the given scores.

    Args:
        rule_type: which rule.
        scores: held-out scores_TE of each layer, or an iterable of chunks of them; padding tokens already left out.
        target_active: wanted active fraction, in (0, 1].
        scope: "layer": every layer reaches the target by its own knob. "global": one knob for all, the weighted mean reaches the target;
            layers whose scores are more concentrated run fewer experts. For `TopK`, whose knob is whole, some layers get one expert more.
        weights: what a layer counts in the mean, its number of neurons; 1 by default.
        always_on: experts of a layer that run for every token whatever their score; they count as active.

    Returns:
        The rules, and the fraction that they reach: the nearest reachable one (scores tie, k is whole, one expert per token always runs).

    Raises:
        ConfigError: target out of range, no scores, or a layer named that has none.

    Cost: one sort of T*E values per layer, 4 bytes kept for each. `Calibrator` keeps them for further targets, which are nearly free.
    """
    return Calibrator(rule_type, scores, weights=weights, always_on=always_on).solve(target_active, scope=scope)


class _Switches:
    """One layer's switch points, sorted; pairs that always run are only counted."""

    def __init__(self, rule_type: type[Rule], chunks: Iterable[Tensor], *, always_on: Sequence[int], name: str) -> None:
        self.grows, self.bounds, self.is_whole = rule_type.grows, rule_type.bounds, rule_type is TopK
        switches, self.total, self.num_experts = [], 0, 0
        for scores_TE in chunks:
            critical_TE = rule_type.critical(scores_TE)
            self.total += critical_TE.numel()
            self.num_experts = critical_TE.shape[1]
            if always_on:
                critical_TE[:, list(always_on)] = -math.inf if self.grows else math.inf
            flat = critical_TE.flatten()
            switches.append(flat[flat.isfinite()].cpu())
        if not self.total:
            raise ConfigError(f"layer {name!r} has no scores to calibrate on.")
        # numpy's vectorised sort: 10x faster than torch's on fp32
        self.sorted: Any = np.sort(torch.cat(switches).numpy())
        self.always = self.total - len(self.sorted)

    @property
    def largest(self) -> float:
        """A knob above every switch point."""
        return math.nextafter(float(self.sorted[-1]), math.inf) if len(self.sorted) else 1.0

    def active(self, knob: float) -> float:
        """Fraction of pairs that run at ``knob``."""
        if self.grows and knob >= self.bounds[1]:
            return 1.0  # rounding of a sum must not decide at the end of the range
        below = self._index(knob)
        return (self.always + (below if self.grows else len(self.sorted) - below)) / self.total

    def _index(self, knob: float) -> int:
        """Number of switch points below ``knob``."""
        # a key of another dtype would make numpy convert, and copy, the whole array
        key = np.float32(min(knob, _FP32_MAX))
        return int(self.sorted.searchsorted(np.nextafter(key, np.float32(math.inf)) if key < knob else key))

    def nearest(self, target: float) -> float:
        """The knob whose active fraction is nearest to ``target``."""
        if self.is_whole:
            return float(min(range(1, self.num_experts + 1), key=lambda k: abs(self.active(k) - target)))
        everything = self.bounds[1] if self.grows else self.bounds[0]
        count = round(target * self.total) - self.always
        if count >= len(self.sorted) or not len(self.sorted):
            return everything
        index = max(count if self.grows else len(self.sorted) - count, 0)
        inside = float(self.sorted[min(index, len(self.sorted) - 1)])
        options = [self._between(inside, "left"), self._between(inside, "right"), everything]
        return min(options, key=lambda knob: abs(self.active(knob) - target))

    def _between(self, switch: float, side: str) -> float:
        """The middle of the interval at one side of a switch point."""
        at = int(self.sorted.searchsorted(np.float32(switch), side=side))
        low = float(self.sorted[at - 1]) if at else self.bounds[0]
        high = float(self.sorted[at]) if at < len(self.sorted) else min(self.bounds[1], 2 * self.largest)
        return min(max((low + high) / 2, self.bounds[0]), self.bounds[1])

    def gap(self, knob: float) -> tuple[float, float]:
        """Neighbouring switch points: low < knob <= high where the rule shrinks (searchsorted's left side), the same where it grows."""
        at = self._index(knob)
        return (float(self.sorted[at - 1]) if at else -math.inf, float(self.sorted[at]) if at < len(self.sorted) else math.inf)
