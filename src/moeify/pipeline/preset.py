"""Named operating points of a checkpoint: at wanted active fractions, or within a budget that `moeify.budget` spreads over layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..budget import AllocateConfig, Clock, allocate
from ..budget.price import Counted
from ..budget.search import Knobs
from ..channels import record_channels
from ..controls import record_active, set_mode, set_rule
from ..data import DataConfig, check_source
from ..errors import ConfigError, DataError
from ..evaluate import DenseReference, default_metric, measure_quality, model_cost, model_weights
from ..hf.folders import check_writable
from ..hf.load import load_model, read_calibration, read_manifest
from ..hf.presets import write_presets
from ..layers import moe_layers
from ..presets import Preset, check_name
from ..select import Rule, RuleConfig
from .inputs import evaluation_batches
from .names import torch_device, torch_dtype
from .timing import check_latency_tokens, timed_inputs

FRACTIONS = {"quality": 0.75, "balanced": 0.5, "fast": 0.25}
"""Active fractions of the presets that everybody has: quarters, as reports show. What each costs and keeps is measured, not promised."""

_CLOSE, _TRIALS = 0.005, 4  # of the active fraction on calibration data
_CACHE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A checkpoint and its data: half of the batches set knobs, the other half tells what came of it."""

    directory: Path
    model: Any
    calibration: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]
    inputs: Sequence[Mapping[str, Tensor]]
    """What is timed."""
    machine: str


def preset_checkpoint(
    directory: str | Path,
    *,
    data: DataConfig,
    fractions: Mapping[str, float] | None = None,
    latency: bool = True,
    latency_tokens: int | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Calibrate and measure presets of a converted or thinned checkpoint and write them into it; its own rules stay.

    Knobs are set so that the wanted fraction runs on every second batch of the data, with one knob for all layers where the checkpoint
    was converted so, else one a layer; quality and cost are measured on the other batches.

    Args:
        directory: converted or thinned checkpoint; ``config.json`` and ``README.md`` are rewritten.
        data: as for `sweep_checkpoint`, two batches at least.
        fractions: active fraction by name; None: `FRACTIONS`.
        latency: time them, too, in turns with the dense model.
        latency_tokens: of each timed forward; None: one of a model that generates, else one sequence.
        batch_size: sequences per forward.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        progress: told every batch.

    Returns:
        The presets that were made, JSON values by name.

    Raises:
        ConfigError: a name or a fraction that cannot be. CheckpointError, DataError: as `sweep_checkpoint`, or too little data. All but
            errors of later documents are raised before the model is loaded.
    """
    wanted = dict(FRACTIONS if fractions is None else fractions)
    for name, fraction in wanted.items():
        check_name(name)
        if not 0 < fraction <= 1:
            raise ConfigError(f"the active fraction of preset {name!r} must be in (0, 1], got {fraction}.")
    loaded = _load(directory, data, latency_tokens=latency_tokens, batch_size=batch_size, dtype=dtype, device=device, progress=progress)
    is_global = read_calibration(loaded.directory).get("scope") == "global"
    measure, knobs = _Measure(loaded, latency=latency, progress=progress), Knobs(loaded.model, loaded.calibration)
    made = []
    for name, fraction in wanted.items():
        rules = _rules_at(loaded, knobs, fraction, is_global=is_global)
        made.append(measure(name, rules, asked={"active_fraction": fraction}))
    write_presets(loaded.directory, made)
    return {preset.name: _config.to_dict(preset) for preset in made}


def budget_checkpoint(
    directory: str | Path,
    *,
    data: DataConfig,
    config: AllocateConfig,
    preset: str,
    latency_tokens: int | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Spread a budget over the layers of a checkpoint (`moeify.budget.allocate`) and write the rules into it as a preset.

    Args:
        directory: converted or thinned checkpoint; ``config.json`` and ``README.md`` are rewritten.
        data: every second batch decides, the others tell the preset's quality.
        config: the budget.
        preset: its name.
        latency_tokens, batch_size, dtype, device, progress: as in `preset_checkpoint`.

    Returns:
        ``preset``: what was written; ``allocation``: what the search found on its own batches, rules left out: the cost reached, the loss
        and those of the uniform ways, active fraction by layer.

    Raises:
        MoeifyError: as `preset_checkpoint` and `allocate`.
    """
    check_name(preset)
    loaded = _load(directory, data, latency_tokens=latency_tokens, batch_size=batch_size, dtype=dtype, device=device, progress=progress)
    found = allocate(loaded.model, loaded.calibration, config, inputs=loaded.inputs, progress=progress)
    measure = _Measure(loaded, latency=config.unit == "latency", progress=progress)
    made = measure(preset, found.rules, asked={config.unit: config.fraction})
    write_presets(loaded.directory, [made])
    compared = {name: {"loss": way.loss, "reached": way.reached} for name, way in found.compared.items()}
    return {
        "preset": _config.to_dict(made),
        "allocation": {"reached": found.reached, "loss": found.loss, "compared": compared, "active": found.active, "costs": found.costs},
    }


def _load(
    directory: str | Path,
    data: DataConfig,
    *,
    latency_tokens: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    progress: Progress,
) -> _Loaded:
    directory = Path(directory)
    check_latency_tokens(latency_tokens)
    read_manifest(directory)
    check_writable(directory, directory / "config.json")
    place = torch_device(device)
    check_source(data)
    model, processor = load_model(directory, dtype=torch_dtype(dtype), progress=progress)
    model.to(place)
    batches = evaluation_batches(model, processor, data, batch_size=batch_size, progress=progress)
    if len(batches) < 2:
        raise DataError(
            f"'{data.data}' gave one batch; presets need two, one to set knobs on and one to measure: give more data, or smaller --window."
        )
    batches = [{key: value.to(place) for key, value in batch.items()} for batch in batches]
    inputs, machine = timed_inputs(model, batches, tokens=latency_tokens, dtype=dtype)
    return _Loaded(directory=directory, model=model, calibration=batches[::2], held_out=batches[1::2], inputs=inputs, machine=machine)


def _rules_at(loaded: _Loaded, knobs: Knobs, fraction: float, *, is_global: bool) -> Mapping[str, Rule]:
    """Rules with which the fraction runs on the calibration batches, each layer reading what the sparse layers before it give."""
    asked, best = fraction, None
    for _ in range(_TRIALS):
        shared = knobs.one_knob(asked) if is_global else None
        rules = shared or knobs.rules(dict.fromkeys(knobs.layers, asked))
        with set_rule(loaded.model, rules):
            reached = _active(loaded.model, loaded.calibration)
        if best is None or abs(reached - fraction) < abs(best[1] - fraction):
            best = rules, reached
        if abs(reached - fraction) <= _CLOSE:
            break
        asked = min(max(asked + fraction - reached, 0.01), 1.0)
    assert best is not None
    return best[0]


@torch.no_grad()
def _active(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    set_mode(model, "moe")
    with record_active(model) as executed, record_channels(model) as skipped:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    return executed.active_fraction() if moe_layers(model) else 1 - skipped.skipped_frac()


class _Measure:
    """Turns rules into a preset, on held-out batches."""

    def __init__(self, loaded: _Loaded, *, latency: bool, progress: Progress) -> None:
        self.loaded, self.progress = loaded, progress
        model, batches = loaded.model, loaded.held_out
        self.metric = default_metric(model, batches[0])
        self.reference = DenseReference(model, batches, metric=self.metric, cache_bytes=_CACHE_BYTES, progress=progress)
        self.counted = Counted(flops=model_cost(model, batches[0]), weights=model_weights(model))
        self.clock = Clock(model, loaded.inputs) if latency else None

    def __call__(self, name: str, rules: Mapping[str, Rule], *, asked: dict[str, float]) -> Preset:
        model = self.loaded.model
        set_mode(model, "moe")
        with set_rule(model, rules):
            with record_active(model) as executed, record_channels(model) as skipped:
                found = measure_quality(model, self.loaded.held_out, metric=self.metric, reference=self.reference, progress=self.progress)
            ratio = None if self.clock is None else self.clock()[0]
        active = {name: 1 - share for name, share in skipped.per_layer().items()} | executed.per_layer()
        costs = self.counted.fractions(active)
        return Preset(
            name=name,
            rules={layer: cast(RuleConfig, rule) for layer, rule in rules.items()},
            active_fraction=executed.active_fraction() if moe_layers(model) else 1 - skipped.skipped_frac(),
            asked=asked,
            metric=self.metric,
            quality=found.value,
            dense_quality=self.reference.quality,
            kl=None if found.agreement is None else found.agreement.kl,
            ffn_flops_fraction=costs.get("ffn_flops"),
            flops_fraction=costs["flops"],
            bytes_fraction=costs["bytes"],
            latency_fraction=ratio,
            machine=None if ratio is None else self.loaded.machine,
        )
