"""What a pre-training run leaves as numbers."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layers import moe_layers
from ..ssd import Decision, Fallback, Probe, SwitchRecord
from ..train.calibration import TARGETS


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """What a run did and what came out; JSON by `_config`, as ``pretrain.json`` holds it."""

    name: str
    """Of the recipe."""
    task: str
    """What the model was trained for."""
    parameters: int
    """Of the model, routers included."""
    tokens: int
    """Of text that was trained on, repetitions counted."""
    epochs: float
    """Passes over the data."""
    seconds: float
    """Time in the training loop, evaluation included, of all processes that took part."""
    losses: tuple[float, ...]
    """Of every step, in nats."""
    evals: tuple[tuple[int, float], ...]
    """(steps done, validation loss of the dense model)."""
    evaluation: dict[str, dict[str, float]]
    """Of the final model on validation: "dense", and with SSD "moe"; each ``loss``, ``perplexity``, and of "moe" ``active_fraction``."""
    flops: dict[str, float]
    """`TrainingFlops` of what was done."""
    estimate: dict[str, float]
    """The same as expected before the first step, with ``tokens_per_step`` and ``epochs``."""
    decisions: tuple[Decision, ...] = ()
    """Of SSD's controller."""
    probes: tuple[Probe, ...] = ()
    """Of SSD's monitor."""
    switches: tuple[SwitchRecord, ...] = ()
    """Groupings of neurons."""
    fallbacks: tuple[Fallback, ...] = ()
    """Sparse phases that went wrong."""
    data: str
    """Source of the training data."""
    device: str
    """Where it ran."""
    processes: int = 1
    """That trained it together; where a run went on with another number, the last."""
    config: dict[str, Any]
    """The recipe with all defaults."""
    versions: dict[str, str]
    """Of libraries."""
    run: str
    """Of everything that decides the outcome."""


def topk_calibration(model: nn.Module, *, source: str, data: str, tokens: int) -> dict[str, Any]:
    """What sweeps and reports read of a converted checkpoint, for top-k: its knob is a share of the experts, and needs no data.

    Args:
        model: with SSD's experts.
        source: name of the recipe.
        data: source of the training data.
        tokens: that it was trained on.
    """
    layers = moe_layers(model)
    knobs = {name: [float(max(1, round(target * layer.num_experts))) for target in TARGETS] for name, layer in layers.items()}
    return {
        "source": source,
        "data": data,
        "tokens": tokens,
        "rule": "topk",
        "value": float(next(iter(layers.values())).rule.value),
        "scope": "global",
        "targets": list(TARGETS),
        "knobs": {"topk": knobs},
        "most_experts": max(layer.num_experts for layer in layers.values()),
        "measured": None,
    }
