"""The verbs that measure a checkpoint: sweep, profile; and what its calibration record has for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..budget.price import Clock
from ..channels import sparse_inputs
from ..controls import set_mode
from ..data import DataConfig, check_source
from ..errors import CheckpointError, ConfigError
from ..evaluate import (
    Curve,
    CurvePoint,
    DenseQuality,
    DenseReference,
    LayerRules,
    default_metric,
    model_cost,
    sweep,
)
from ..hf.folders import MANIFEST_FILE, check_writable
from ..hf.inputs import example_inputs
from ..hf.load import load_model, read_calibration, read_manifest
from ..hf.save import library_versions
from ..layers import moe_layers
from ..manifest import manifest_of
from ..select import RULES, Rule
from ..sites import find_ffn_sites
from ..sparsity import ActivationProfile, profile_activations
from .inputs import calibration_batches, evaluation_batches
from .names import torch_device, torch_dtype
from .timing import check_latency_tokens, timed_inputs
from .work import fingerprint, run_id, weights_checksum

_Steps = list[float | LayerRules]
_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class KnobRecord:
    """What a sweep reads of the calibration record."""

    scope: str
    """One knob for each layer, or one for all."""
    targets: tuple[float, ...]
    """Active fractions whose knobs are stored."""
    knobs: dict[str, dict[str, tuple[float, ...]]]
    """Knob at each target by name of the rule and of the FFN."""
    most_experts: int
    """Experts of the FFN that has the most."""

    def __post_init__(self) -> None:
        for rule, table in self.knobs.items():
            for name, values in table.items():
                if len(values) != len(self.targets):
                    raise ConfigError(f"knobs[{rule!r}][{name!r}] has {len(values)} values for {len(self.targets)} targets.")


def sweep_checkpoint(
    directory: str | Path,
    *,
    data: DataConfig,
    rule: str | None = None,
    values: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    latency: bool = False,
    latency_tokens: int | None = None,
    out: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Curve:
    """Quality against cost of a converted or thinned checkpoint, all points on the same tokens.

    Args:
        directory: converted or thinned checkpoint; of a thinned one the knob multiplies the levels of its channels, and the active
            fraction is the share of channels kept.
        data: evaluation data; windows of text, or labelled examples for a model with a classification head.
        rule: selection rule; None takes the checkpoint's own, as its ``config.json`` has it.
        values: knobs, each for all layers; None takes the checkpoint's own calibrated point and the knobs that its calibration tokens gave
            for active fractions 0.1 to 1.0 in steps of 0.05. Where every layer has a knob of its own, a point's ``value`` is their mean.
            The checkpoint's own point stands under its own rule, whatever ``rule`` is.
        targets: instead of ``values``, only these of the stored active fractions (multiples of 0.05), and the checkpoint's own point.
        batch_size: sequences per forward.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        latency: time each point, too, in turns with the dense model.
        latency_tokens: of each timed forward; None: one of a model that generates, else one sequence.
        out: ``curve.json``, written after every point. Points that it holds of the same weights, routers, rules, data and versions are not
            measured again unless they lack a time that is wanted, and those of other values or rules stay in it.
        progress: told every batch.

    Returns:
        What ``out`` holds at the end: kept points first, then those asked for.

    Raises:
        ConfigError: unknown rule, or a value out of its range.
        CheckpointError: no converted checkpoint, its calibration record lacks something or is of another model, its layers have rules of
            different kinds, or ``out`` cannot be written.
        DataError: ``out`` exists and is no curve; see also `moeify.data`. All but errors of later documents are raised before the model is
            loaded.
    """
    directory = Path(directory)
    if values is not None and targets is not None:
        raise ConfigError("give --values or --targets, not both.")
    calibration = calibration_of(directory, KnobRecord)
    own_type, names = own_rule(directory)
    rule_type = _config.lookup(RULES, rule, where="--rule") if rule is not None else own_type
    steps = _checked(values, rule_type) if values is not None else calibrated_steps(rule_type, calibration, targets, names=names)
    check_latency_tokens(latency_tokens)
    earlier = Curve.read(out) if out is not None and out.exists() else None
    if out is not None:
        check_writable(out.parent, out)
    place = torch_device(device)
    check_source(data)
    model, processor = load_model(directory, dtype=torch_dtype(dtype), progress=progress)
    model.to(place)
    batches = evaluation_batches(model, processor, data, batch_size=batch_size, progress=progress)
    runs = [(rule_type, steps)]
    own = _layer_rules({name: layer.rule for name, layer in (moe_layers(model) or sparse_inputs(model)).items()})
    if values is None and (rule_type is not own_type or all(rules_of(step, own_type, own.rules) != own.rules for step in steps)):
        runs.append((own_type, [own]))
    metric = default_metric(model, batches[0])
    reference = DenseReference(model, batches, metric=metric, progress=progress)
    cost = model_cost(model, batches[0])
    extra = {
        **{key: value for key, value in _config.to_dict(data).items() if value is not None},
        "fingerprint": fingerprint(batches),
        "dtype": dtype,
        "device": place.type,
        "versions": library_versions(),
        # Of what the points depend on beside the data; a mean knob does not tell the rules of all layers.
        "checkpoint": run_id(_identity(model, calibration)),
        "conversion": conversion_id(directory),
        "scope": calibration.scope if values is None else "global",
        "calibrated": {"rule": own_type.name, "value": own.value},
        "cost": cost.lines(),
    }
    dense = DenseQuality(quality=reference.quality, flops_per_token=cost.dense_flops_per_token)
    curve = Curve(model=str(directory), metric=metric, dense=dense, extra=extra)
    clock = _clock(model, batches, tokens=latency_tokens, dtype=dtype) if latency else None
    return _measure_curve(curve, earlier, model, batches, runs, out=out, cost=cost, reference=reference, clock=clock, progress=progress)


def _clock(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, tokens: int | None, dtype: str) -> Callable[[], tuple[float, str]]:
    """What times the model with the rules that it has, against the dense one, and says where."""
    place = next(model.parameters()).device
    inputs, machine = timed_inputs(
        model, [{key: value.to(place) for key, value in batch.items()} for batch in batches], tokens=tokens, dtype=dtype
    )
    clock = Clock(model, inputs)
    return lambda: (clock()[0], machine)


def _measure_curve(
    curve: Curve,
    earlier: Curve | None,
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    runs: Sequence[tuple[type[Rule], _Steps]],
    *,
    out: Path | None,
    **options: Any,
) -> Curve:
    """``curve`` with the points that ``earlier`` has of the same run, and those of ``runs``; written after every point."""
    done = earlier.points if earlier is not None and earlier.is_same_run(curve) else ()
    if options.get("clock") is not None:
        done = tuple(point for point in done if point.latency_fraction is not None)
    curve = replace(curve, points=done)

    def on_point(point: CurvePoint) -> None:
        nonlocal curve
        curve = replace(curve, points=(*curve.points, point))
        if out is not None:
            curve.write(out)

    points: list[CurvePoint] = []
    for rule_type, steps in runs:
        left = [point for point in done if point not in points]
        points += sweep(model, batches, rule_type, steps, quality=curve.metric, done=left, on_point=on_point, **options)
    curve = replace(curve, points=(*(point for point in done if point not in points), *points))
    if out is not None:
        curve.write(out)
    return curve


def profile_checkpoint(
    source: str, *, data: DataConfig, eps: float = 1e-3, dtype: str = "float32", device: str = "cpu", progress: Progress = NO_PROGRESS
) -> dict[str, ActivationProfile]:
    """Activation statistics of every FFN of a dense (or converted, run dense) checkpoint, by site name.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        data: what the model reads.
        eps: a neuron counts as near zero on a token where |h| <= eps.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        progress: told every batch.

    Raises:
        MoeifyError: see `load_model`, `find_ffn_sites`, `calibration_batches` and `profile_activations`.
    """
    place = torch_device(device)
    ActivationProfile(1, eps=eps)  # refuses a bad eps before anything is loaded
    check_source(data)
    model, processor = load_model(source, dtype=torch_dtype(dtype), progress=progress)
    model.to(place)
    set_mode(model, "dense")  # a converted FFN runs its routed experts otherwise
    sites = [layer.site for layer in moe_layers(model).values()] or find_ffn_sites(model, example_inputs(model))
    batches = calibration_batches(model, processor, data, progress=progress)
    return profile_activations(model, sites, batches, eps=eps, progress=progress)


def rules_at(directory: str | Path, active_frac: float, *, option: str) -> Mapping[str, Rule]:
    """The rules that a checkpoint's calibration stored for an active fraction (of a thinned one: share of channels kept), by layer.

    Raises:
        ConfigError: no rules are stored for it; names ``option``.
        CheckpointError: no calibration record, or layers with rules of different kinds.
    """
    directory = Path(directory)
    rule_type, names = own_rule(directory)
    calibration = calibration_of(directory, KnobRecord)
    if active_frac != 1 and round(active_frac, 4) not in {round(target, 4) for target in calibration.targets}:
        stored = ", ".join(f"{target:g}" for target in calibration.targets)
        raise ConfigError(f"{option}: no rules are stored for the active fraction {active_frac:g}; stored: {stored} and 1.")
    (step,) = calibrated_steps(rule_type, calibration, [active_frac], names=names)
    return rules_of(step, rule_type, names)


def calibration_of(directory: Path, record_type: type[_Record]) -> _Record:
    """What the caller needs of `read_calibration`, checked."""
    calibration = read_calibration(directory)
    known = {f.name: calibration[f.name] for f in fields(record_type) if f.name in calibration}  # type: ignore[arg-type]
    try:
        return _config.from_dict(record_type, known, where=f"'{directory / MANIFEST_FILE}': calibration")
    except ConfigError as error:
        raise CheckpointError(f"{str(error).removesuffix('.')}; convert the model again.") from error


def _identity(model: nn.Module, calibration: KnobRecord) -> dict[str, Any]:
    """All of a model that decides what a point measures."""
    levels = {name: executor.level_K for name, executor in sparse_inputs(model).items()}
    weights = {"weights": weights_checksum(model), **({"levels": fingerprint([levels])} if levels else {})}
    return {**weights, **replace(manifest_of(model), presets=()).to_dict(), **_config.to_dict(calibration)}


def conversion_id(directory: Path) -> str:
    """A checksum of what a checkpoint's JSON files say of its layers, rules and calibration, presets apart: of its conversion, and known
    without its weights."""
    return run_id({"manifest": replace(read_manifest(directory), presets=()).to_dict(), "calibration": read_calibration(directory)})


def own_rule(directory: Path) -> tuple[type[Rule], set[str]]:
    """The kind of rule that all layers of the checkpoint have, and their names: MoE layers, or without any those that skip channels."""
    manifest = read_manifest(directory)
    rules = {record.site.name: type(record.rule) for record in manifest.sites or manifest.channels}
    if len(set(rules.values())) != 1:
        found = ", ".join(sorted({f"'{rule.name}'" for rule in rules.values()})) or "none"
        raise CheckpointError(
            f"the layers of '{directory}' have rules of different kinds ({found}); give all one with set_rule to sweep it."
        )
    return next(iter(rules.values())), set(rules)


def _checked(values: Sequence[float], rule_type: type[Rule]) -> _Steps:
    """The same, or a `ConfigError` for one out of the knob's range."""
    for value in values:
        rule_type.at(value)
    return [*values]


def calibrated_steps(rule_type: type[Rule], calibration: KnobRecord, targets: Sequence[float] | None, *, names: set[str]) -> _Steps:
    """The stored knobs at ``targets``, or at 0.1, 0.15, ... 0.95 and the knob that runs every expert; one step where all are equal."""
    table = calibration.knobs.get(rule_type.name, {})
    if set(table) != names:
        raise CheckpointError(f"{MANIFEST_FILE} has no knobs of the rule '{rule_type.name}' for the layers of the model; convert it again.")
    stored = {round(target, 4): i for i, target in enumerate(calibration.targets)}
    steps: _Steps = []
    for target in [t for t in stored if t >= 0.1] + [1.0] if targets is None else targets:
        if target == 1:
            everything = _all_experts(rule_type, calibration)
            rules = {name: rule_type.at(everything) for name in table}
            # the same as a target below 1 where that needs all experts, too
            steps = [step for step in steps if rules_of(step, rule_type, table) != rules]
            steps.append(everything)
            continue
        if round(target, 4) not in stored:
            raise ConfigError(f"--targets: no knobs are stored for the active fraction {target:g}; stored: {[*calibration.targets]} and 1.")
        step = _layer_rules({name: rule_type.at(values[stored[round(target, 4)]]) for name, values in table.items()})
        if all(rules_of(earlier, rule_type, table) != step.rules for earlier in steps):
            steps.append(step)
    return steps


def _layer_rules(rules: Mapping[str, Rule]) -> LayerRules:
    return LayerRules(value=fmean(rule.value for rule in rules.values()), rules=rules)


def _all_experts(rule_type: type[Rule], calibration: KnobRecord) -> float:
    end = rule_type.bounds[1 if rule_type.grows else 0]
    return end if end < float("inf") else float(calibration.most_experts)


def rules_of(step: float | LayerRules, rule_type: type[Rule], names: Iterable[str]) -> Mapping[str, Rule]:
    """Rule of each layer; a plain knob is that of all of them."""
    return step.rules if isinstance(step, LayerRules) else {name: rule_type.at(step) for name in names}
