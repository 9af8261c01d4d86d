"""A budget spread over layers by `moeify.budget.allocate` against the same knob, and the same active fraction, in all of them.

Several calibration sets, windows of the data's that share none, each give their own rules; all are measured on the same windows that no set
has. A last row for each budget holds the margin (KL of the better uniform way minus ours, mean over sets) against its spread over the sets.
With ``--latency`` the rules are found for a share of the dense model's time and then timed anew, with a clock that the search had not:
"asked", "reached" (median of 5 readings, each of several runs in turns with the dense model) and whether that is "within" 5 %.

Without ``--converted`` the model is that of `moeify demo`, pre-trained here in minutes; with ``--quick`` a random one, whose numbers say
nothing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bench.common import numbers
from bench.tiny import convert_tiny
from moeify import DataConfig, load_model, model_cost, record_active, set_rule
from moeify.budget import AllocateConfig, Allocation, Clock, allocate
from moeify.budget.search import LATENCY_TOLERANCE
from moeify.demo import run_demo
from moeify.errors import ConfigError
from moeify.evaluate import DenseReference, default_metric, measure_quality
from moeify.layers import moe_layers
from moeify.pipeline import calibration_batches
from moeify.select import Rule

_READINGS = 5  # of a clock of the case's own
_COMPARED = (("kl", "loss"), ("calibrated", "reached"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--converted", type=Path, metavar="DIR", help="a converted model; without it that of moeify demo is made")
    parser.add_argument("--data", default="builtin:pydoc", help="text to calibrate and to measure on; builtin:pydoc by default")
    parser.add_argument("--unit", default="flops", help="flops, ffn_flops or bytes")
    parser.add_argument("--budgets", type=numbers, metavar="F,F", help="shares of the dense model's; by default three between least and 1")
    parser.add_argument("--sets", type=int, help="calibration sets; 3, with --quick 2")
    parser.add_argument("--set-tokens", type=int, help="tokens of each; 4096, with --quick 256")
    parser.add_argument("--passes", type=int, default=3, help="see AllocateConfig")
    parser.add_argument("--latency", type=numbers, default=(), metavar="F,F", help="shares of the dense model's time; none by default")
    parser.add_argument("--latency-tokens", type=int, default=64, help="of each of the two forwards that are timed; 64 by default")


def run(
    *,
    quick: bool,
    converted: Path | None = None,
    data: str = "builtin:pydoc",
    unit: str = "flops",
    budgets: Sequence[float] | None = None,
    sets: int | None = None,
    set_tokens: int | None = None,
    passes: int = 3,
    latency: Sequence[float] = (),
    latency_tokens: int = 64,
) -> Iterator[dict[str, Any]]:
    """Rows: one per budget and set, one per budget with the margin over sets, one per share of time."""
    sets, set_tokens = (sets or (2 if quick else 3)), (set_tokens or (256 if quick else 4096))
    if unit == "latency" or sets < 1:
        raise ConfigError("--unit is flops, ffn_flops or bytes (--latency has rows of its own), and --sets at least 1.")
    with tempfile.TemporaryDirectory(prefix="moeify-") as folder:
        if converted is None:
            converted = convert_tiny(Path(folder))[1] if quick else Path(run_demo(Path(folder) / "demo")["checkpoint"])
        model, processor = load_model(converted)
    window = min(128, 64 if quick else 128)
    batch_tokens = min(512, set_tokens)
    config = DataConfig(data=data, split="validation", window=window, max_tokens=2 * sets * set_tokens)
    batches = calibration_batches(model, processor, config, batch_tokens=batch_tokens)
    per_set = set_tokens // batch_tokens
    if len(batches) < 2 * sets * per_set:
        raise ConfigError(
            f"'{data}' has {len(batches) * batch_tokens} tokens; {sets} sets of {set_tokens} and as many to measure on need more."
        )
    # Every second batch is for measuring; of the others every set takes its turn, so that each is spread over the whole text.
    calibration, held_out = batches[0::2], batches[1::2]
    parts = [calibration[i::sets][:per_set] for i in range(sets)]
    measure = _Measure(model, held_out)
    same = {"model": converted.name if converted.name != "moe" else converted.parent.name, "layers": len(moe_layers(model)), "unit": unit}
    found: dict[float, list[dict[str, Any]]] = {}
    for index, part in enumerate(parts):
        curves = None
        for budget in budgets or _three(model, part, unit):
            start = time.perf_counter()
            ours = allocate(model, part, AllocateConfig(unit=unit, fraction=budget, passes=passes), curves=curves)
            seconds, curves = time.perf_counter() - start, ours.curves
            row = {"case": "budget/set", **same, "budget": budget, "set": index, "seconds": round(seconds, 1), **_compared(ours, measure)}
            found.setdefault(budget, []).append(row)
            yield row
    for budget, rows in found.items():
        yield {"case": "budget/margin", **same, "budget": budget, **_margin(rows)}
    for share in latency:
        yield {"case": "budget/latency", **same, **_timed(model, parts[0], share, tokens=latency_tokens, passes=passes)}


class _Measure:
    """Quality and cost on held-out windows."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        self.metric = default_metric(model, batches[0])
        self.reference = DenseReference(model, batches, metric=self.metric)
        self.cost = model_cost(model, batches[0])

    def __call__(self, rules: Mapping[str, Rule]) -> dict[str, float]:
        with set_rule(self.model, rules), record_active(self.model) as active:
            found = measure_quality(self.model, self.batches, metric=self.metric, reference=self.reference)
        assert found.agreement is not None
        loss = found.agreement.kl if found.agreement.kl is not None else 1 - found.value
        return {"kl": loss, self.metric: found.value, "flops_fraction": self.cost.flops_fraction(active.per_layer())}


def _three(model: nn.Module, batches: Sequence[Mapping[str, Any]], unit: str) -> list[float]:
    """Budgets at which a quarter, two and three fifths of what layers decide are left, on a grid of hundredths."""
    cost = model_cost(model, batches[0])
    total = {"flops": cost.flops_fraction, "ffn_flops": cost.ffn_flops_fraction}.get(unit, cost.flops_fraction)
    return [round(total(0.0) + share * (total(1.0) - total(0.0)), 2) for share in (0.25, 0.4, 0.6)]


def _compared(ours: Allocation, measure: _Measure) -> dict[str, Any]:
    ways = {name: way.rules for name, way in ours.compared.items()} | {"ours": ours.rules}
    on_set = {name: way.loss for name, way in ours.compared.items()} | {"ours": ours.loss}
    held_out = {name: measure(rules) for name, rules in ways.items()}
    return {
        "reached": ours.reached,
        "active": ours.active,
        "dense_quality": measure.reference.quality,
        **{f"set_kl_{name}": loss for name, loss in on_set.items()},
        **{f"{key}_{name}": value for name, values in held_out.items() for key, value in values.items()},
    }


def _margin(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ours against each uniform way on held-out windows: mean over sets of the difference of KL, and its standard deviation over them."""
    found: dict[str, Any] = {"sets": len(rows), "kl_ours": statistics.fmean(row["kl_ours"] for row in rows)}
    for name in ("fraction", "knob"):
        if any(f"kl_{name}" not in row for row in rows):
            continue
        margins = [row[f"kl_{name}"] - row["kl_ours"] for row in rows]
        found |= {
            f"kl_{name}": statistics.fmean(row[f"kl_{name}"] for row in rows),
            f"margin_{name}": statistics.fmean(margins),
            f"least_margin_{name}": min(margins),
            f"noise_{name}": statistics.stdev(margins) if len(margins) > 1 else None,
        }
    return found


def _timed(model: nn.Module, batches: Sequence[Mapping[str, Any]], share: float, *, tokens: int, passes: int) -> dict[str, Any]:
    ids = [batch["input_ids"][:1, :tokens] for batch in batches[:2]]
    inputs = [{"input_ids": one} for one in ids] * (2 if len(ids) == 1 else 1)
    try:
        ours = allocate(model, batches, AllocateConfig(unit="latency", fraction=share, passes=passes), inputs=inputs)
    except ConfigError as error:  # this machine, or this model, cannot be so fast: that is a result
        return {"asked": share, "tokens": tokens, "within": False, "refused": str(error)}
    with set_rule(model, ours.rules):
        clock = Clock(model, inputs)
        ratios = [clock()[0] for _ in range(_READINGS)]
    ratio = statistics.median(ratios)
    return {
        "asked": share,
        "calibrated": ours.reached,
        "reached": ratio,
        "readings": ratios,
        "off": ratio / share - 1,
        "within": abs(ratio / share - 1) <= LATENCY_TOLERANCE,
        "spread": max(ratios) - min(ratios),
        "kl": ours.loss,
        **{f"{key}_{name}": getattr(way, field) for name, way in ours.compared.items() for key, field in _COMPARED},
        "tokens": tokens,
        "active_fraction": ours.active_fraction,
    }
