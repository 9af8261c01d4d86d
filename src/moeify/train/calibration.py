"""Rules that reach their budget: the knobs of a converted model, set on its routers' scores, and the record of them.

Letters: T tokens, E experts.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..controls import set_rule
from ..errors import UnsupportedModelError
from ..layers import moe_layers
from ..select import RULES, Rule, RuleConfig
from ..select.calibrate import Calibrator, Scope
from .capture import capture_ffn_inputs, fast_dtype
from .fit import score_router, some_rows
from .selection import SelectionConfig, SelectionTraining

TARGETS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Active fractions whose knobs a checkpoint keeps; 1.0 needs none."""

SCORE_TOKENS = 2048
"""Tokens whose scores calibrate the rules: 0.1 points of active fraction."""


def recalibrate(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    target_active: float,
    rule: type[Rule] | None = None,
    scope: Scope = "layer",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Set the rules of a converted model anew, after its experts or routers have changed; in place.

    Scores are those of the model as it runs: every layer reads what the layers before it give at ``target_active``. So the budget is right
    there; the table's other entries are as good as its inputs are alike at other budgets.

    Args:
        model: converted model.
        batches: inputs, a few thousand tokens; more are read, and evenly spaced ones of them scored.
        target_active: active fraction that the rules are set to, in (0, 1].
        rule: kind of rule; None: the model's present kind.
        scope: see `moeify.select.calibrate.calibrate`.
        progress: told every batch.

    Returns:
        What ``moeify.json`` holds of rules and routers: see `calibrate_rules`.

    Raises:
        UnsupportedModelError: the model is dense.
        ConfigError: target out of range.
        DataError: no batch, or a layer that saw no token.

    Cost: one forward a batch, two bytes for each of its tokens, layers and channels on disk until the end.
    """
    layers = moe_layers(model)
    if not layers:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
    kind = rule or type(next(iter(layers.values())).rule)
    sites = [layer.site for layer in layers.values()]
    device = next(model.parameters()).device
    scores, captured = {}, {}
    selection = SelectionConfig(target_active=(target_active, target_active), routers="frozen")
    with tempfile.TemporaryDirectory(prefix="moeify-") as folder:
        with SelectionTraining(model, selection):
            inputs = capture_ffn_inputs(model, sites, batches, Path(folder), compute=fast_dtype(device), progress=progress)
        for name, layer in layers.items():
            x_TD = spread(inputs.read(name)).to(device)
            weights = layer.weights().dequantized(torch.float32)
            scores_TE, captured[name] = score_router(
                layer.router, x_TD, weights, activation=layer.site.activation, num_experts=layer.num_experts
            )
            scores[name] = scores_TE.cpu()
    return set_calibrated_rules(model, kind, scores, router_scores=captured, target_active=target_active, scope=scope)


def set_calibrated_rules(
    model: nn.Module,
    kind: type[Rule],
    scores: Mapping[str, Tensor],
    *,
    router_scores: Mapping[str, Mapping[str, float]],
    target_active: float,
    scope: Scope,
) -> dict[str, Any]:
    """`calibrate_rules` for the layers of a converted model, which get the rules; returns the record."""
    layers = moe_layers(model)
    rules, record = calibrate_rules(
        kind,
        scores,
        neurons={name: layer.site.d_ff for name, layer in layers.items()},
        always_on={name: layer.always_on for name, layer in layers.items()},
        router_scores=router_scores,
        target_active=target_active,
        scope=scope,
    )
    set_rule(model, rules)
    return record


def calibrate_rules(
    kind: type[Rule],
    scores: Mapping[str, Tensor],
    *,
    neurons: Mapping[str, int],
    always_on: Mapping[str, Sequence[int]],
    router_scores: Mapping[str, Mapping[str, float]],
    target_active: float,
    scope: Scope,
) -> tuple[dict[str, RuleConfig], dict[str, Any]]:
    """The rule of each layer at a budget, and what to record of how it was set.

    Args:
        kind: rule to set.
        scores: scores_TE of each layer, of tokens that stand for all.
        neurons: F of each layer, its weight in the mean.
        always_on: experts of each layer that run for every token.
        router_scores: how good each router is (`score_router`), for the record.
        target_active: active fraction, in (0, 1].
        scope: one knob for each layer, or for all.

    Returns:
        The rules, and JSON values: the rule, the fraction reached, and a table of every rule's knobs at `TARGETS`.
    """
    options: dict[str, Any] = {"weights": {name: float(count) for name, count in neurons.items()}, "always_on": always_on}
    calibrated = Calibrator(kind, scores, **options).solve(target_active, scope=scope)
    record = {
        "rule": kind.name,
        "knob": kind.knob,
        "value": fmean(rule.value for rule in calibrated.rules.values()),
        "scope": scope,
        "target_active": target_active,
        "active_fraction": calibrated.active_fraction,
        "router_scores": {name: dict(shares) for name, shares in router_scores.items()},
        "targets": list(TARGETS),
        # One calibrator at a time: each holds the sorted scores of all layers.
        "knobs": {name: knob_table(Calibrator(one, scores, **options), scope=scope) for name, one in RULES.items()},
        "most_experts": max(scores_TE.shape[1] for scores_TE in scores.values()),
    }
    return {name: cast(RuleConfig, rule) for name, rule in calibrated.rules.items()}, record


def knob_table(calibrator: Calibrator, *, scope: Scope) -> dict[str, list[float]]:
    """The knob of every layer at each of `TARGETS`, by layer name: a checkpoint can be swept, or set to another budget, without data."""
    columns = [calibrator.solve(target, scope=scope).rules for target in TARGETS]
    return {name: [column[name].value for column in columns] for name in columns[0]}


def spread(rows_TK: Tensor, *, most: int = SCORE_TOKENS) -> Tensor:
    """At most so many rows, evenly spaced: consecutive tokens resemble each other."""
    return some_rows(rows_TK, most=most).contiguous()
