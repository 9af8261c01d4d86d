"""The verbs that read a checkpoint: sweep, profile, generate, report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..data import DataConfig
from ..errors import CheckpointError, ConfigError
from ..evaluate import Curve, CurvePoint, DenseQuality, DenseReference, LayerRules, default_metric, model_cost, sweep
from ..hf.checkpoint import library_versions, load_model, read_calibration
from ..hf.inputs import example_inputs
from ..layers import moe_layers, set_mode
from ..report import cost_markdown, curve_markdown, layers_markdown, plot_curve
from ..select import RULES, Rule
from ..sites import find_ffn_sites
from ..sparsity import ActivationProfile, profile_activations
from .inputs import calibration_batches, evaluation_batches
from .names import torch_device, torch_dtype
from .work import fingerprint

_Steps = list[float | LayerRules]


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
    out: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Curve:
    """Quality against cost of a converted checkpoint, all points on the same tokens.

    Args:
        directory: converted checkpoint.
        data: evaluation data; windows of text, or labelled examples for a model with a classification head.
        rule: selection rule; None takes the one that the checkpoint was calibrated with.
        values: knobs, each for all layers; None takes the checkpoint's own calibrated point and the knobs that its calibration tokens gave
            for active fractions 0.1 to 1.0 in steps of 0.05. Where every layer has a knob of its own, a point's ``value`` is their mean.
            The checkpoint's own point stands under its own rule, whatever ``rule`` is.
        targets: instead of ``values``, only these of the stored active fractions (multiples of 0.05).
        batch_size: sequences per forward.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        out: ``curve.json``, written after every point. Points that it holds of the same model, data and versions are not measured again,
            and those of other values or rules stay in it.
        progress: told every batch.

    Returns:
        What ``out`` holds at the end: kept points first, then those asked for.

    Raises:
        ConfigError: unknown rule, or a value out of its range.
        CheckpointError: no converted checkpoint, or its calibration record lacks something.
        DataError: ``out`` exists and is no curve; see also `moeify.data`. All but errors of the data are raised before the model is loaded.
    """
    directory = Path(directory)
    if values is not None and targets is not None:
        raise ConfigError("give --values or --targets, not both.")
    calibration = _calibration_of(directory, "rule", "value", "scope", "targets", "knobs", "most_experts")
    own_type = _config.lookup(RULES, calibration["rule"], where=f"calibration of '{directory}'")
    rule_type = _config.lookup(RULES, rule, where="--rule") if rule is not None else own_type
    steps = _checked(values, rule_type) if values is not None else _calibrated_steps(rule_type, calibration, targets, where=str(directory))
    earlier = Curve.read(out) if out is not None and out.exists() else None
    place = torch_device(device)
    model, processor = load_model(directory, dtype=torch_dtype(dtype), progress=progress)
    model.to(place)
    batches = evaluation_batches(model, processor, data, batch_size=batch_size, progress=progress)
    runs = [(rule_type, steps)]
    if values is None:
        own = LayerRules(value=calibration["value"], rules={name: layer.rule for name, layer in moe_layers(model).items()})
        if rule_type is not own_type or all(_rules_of(step, own_type, own.rules) != own.rules for step in steps):
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
        "scope": calibration["scope"] if values is None else "global",
        "calibrated": {"rule": calibration["rule"], "value": calibration["value"]},
        "cost": cost.lines(),
    }
    dense = DenseQuality(quality=reference.quality, flops_per_token=cost.dense_flops_per_token)
    curve = Curve(model=str(directory), metric=metric, dense=dense, extra=extra)
    return _measure_curve(curve, earlier, model, batches, runs, out=out, cost=cost, reference=reference, progress=progress)


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
    source: str, *, data: DataConfig, dtype: str = "float32", device: str = "cpu", progress: Progress = NO_PROGRESS
) -> dict[str, ActivationProfile]:
    """Activation statistics of every FFN of a dense (or converted, run dense) checkpoint, by site name.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        data: what the model reads.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        progress: told every batch.

    Raises:
        MoeifyError: see `load_model`, `find_ffn_sites`, `calibration_batches` and `profile_activations`.
    """
    place = torch_device(device)
    model, processor = load_model(source, dtype=torch_dtype(dtype), progress=progress)
    model.to(place)
    set_mode(model, "dense")  # a converted FFN runs its routed experts otherwise
    sites = [layer.site for layer in moe_layers(model).values()] or find_ffn_sites(model, example_inputs(model))
    batches = calibration_batches(model, processor, data, progress=progress)
    return profile_activations(model, sites, batches, progress=progress)


def generate_text(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> str:
    """Continue ``prompt``; greedy at temperature 0. ``dtype`` and ``device`` as in `sweep_checkpoint`.

    Raises:
        ConfigError: the model does not generate text, or the temperature is negative.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}.")
    place = torch_device(device)
    model, tokenizer = load_model(directory, dtype=torch_dtype(dtype))
    model.to(place)
    if tokenizer is None or not model.can_generate():
        raise ConfigError(f"{type(model).__name__} at '{directory}' does not generate text.")
    tokens = tokenizer(prompt, return_tensors="pt")
    inputs = {key: tokens[key].to(place) for key in ("input_ids", "attention_mask") if key in tokens}
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one token to continue.")
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature}
        if temperature
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # 0 is an id, too
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **options)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def report_checkpoint(directory: str | Path, *, curve: Path | None = None, out: Path | None = None) -> dict[str, str]:
    """Write a report of what was measured: a markdown page, and the curve as a picture.

    Args:
        directory: converted checkpoint.
        curve: ``curve.json`` of a sweep; None looks for one in the checkpoint's folder and beside it.
        out: folder for ``report.md``, ``curve.png`` and ``curve.svg``; None means ``<directory>/report``.

    Returns:
        Paths of the files, by kind.

    Raises:
        CheckpointError: no converted checkpoint. DataError: no curve, or not one.
    """
    directory = Path(directory)
    calibration = _calibration_of(directory, "router_scores")
    choices = [curve] if curve is not None else [directory / "curve.json", directory.parent / "curve.json"]
    found = next((path for path in choices if path.exists()), choices[0])
    measured = Curve.read(found)
    out = out or directory / "report"
    out.mkdir(parents=True, exist_ok=True)
    files = {"page": out / "report.md", "png": out / "curve.png", "svg": out / "curve.svg"}
    plot_curve(measured, files["png"])
    plot_curve(measured, files["svg"])
    rows = {name: {key: f"{value:.4f}" for key, value in scores.items()} for name, scores in calibration["router_scores"].items()}
    cost = f"## Cost\n\n{parts}\n" if (parts := cost_markdown(measured)) else ""
    page = f"# {directory.name}\n\n![quality against cost](curve.png)\n\n{curve_markdown(measured)}\n"
    page += f"{cost}## Routers\n\n{layers_markdown(rows)}"
    temporary = files["page"].with_suffix(".new")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(files["page"])
    return {kind: str(path) for kind, path in files.items()}


def _calibration_of(directory: Path, *keys: str) -> dict[str, Any]:
    """`read_calibration`, with everything that the caller needs."""
    calibration = read_calibration(directory)
    if missing := [repr(key) for key in keys if key not in calibration]:
        raise CheckpointError(f"the calibration record of '{directory}' lacks {', '.join(missing)}; convert the model again.")
    return calibration


def _checked(values: Sequence[float], rule_type: type[Rule]) -> _Steps:
    """The same, or a `ConfigError` for one out of the knob's range."""
    for value in values:
        rule_type.at(value)
    return [*values]


def _calibrated_steps(rule_type: type[Rule], calibration: Mapping[str, Any], targets: Sequence[float] | None, *, where: str) -> _Steps:
    """The stored knobs at ``targets``, or at 0.1, 0.15, ... 0.95 and the knob that runs every expert; one step where all are equal."""
    if rule_type.name not in calibration["knobs"]:
        raise CheckpointError(f"the calibration record of '{where}' has no knobs of the rule '{rule_type.name}'; convert the model again.")
    table: Mapping[str, Sequence[float]] = calibration["knobs"][rule_type.name]
    stored = {round(target, 4): i for i, target in enumerate(calibration["targets"])}
    steps: _Steps = []
    for target in [t for t in stored if t >= 0.1] + [1.0] if targets is None else targets:
        if target == 1:
            everything = _all_experts(rule_type, calibration)
            rules = {name: rule_type.at(everything) for name in table}
            # the same as a target below 1 where that needs all experts, too
            steps = [step for step in steps if _rules_of(step, rule_type, table) != rules]
            steps.append(everything)
            continue
        if round(target, 4) not in stored:
            raise ConfigError(f"--targets: no knobs are stored for the active fraction {target:g}; stored: {calibration['targets']} and 1.")
        knobs = {name: values[stored[round(target, 4)]] for name, values in table.items()}
        step = LayerRules(value=sum(knobs.values()) / len(knobs), rules={name: rule_type.at(knob) for name, knob in knobs.items()})
        if all(_rules_of(earlier, rule_type, table) != step.rules for earlier in steps):
            steps.append(step)
    return steps


def _all_experts(rule_type: type[Rule], calibration: Mapping[str, Any]) -> float:
    end = rule_type.bounds[1 if rule_type.grows else 0]
    return end if end < float("inf") else float(calibration["most_experts"])


def _rules_of(step: float | LayerRules, rule_type: type[Rule], names: Iterable[str]) -> Mapping[str, Rule]:
    """Rule of each layer; a plain knob is that of all of them."""
    return step.rules if isinstance(step, LayerRules) else {name: rule_type.at(step) for name in names}
