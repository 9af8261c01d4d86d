"""The command line's verbs as functions: source checkpoint in, converted checkpoint or measurement out.

Letters: T tokens, D model width, E experts.

`convert_checkpoint` leaves its state in ``<out>.work``: the captured FFN inputs and one file per fitted layer, each written whole. A run
that was killed continues there and comes to the same result; a finished run removes it.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import _config
from ._progress import NO_PROGRESS, Progress
from .convert import ConvertConfig, SiteRecord, apply_site, plan_conversion
from .data import DataConfig, class_ids, image_batches, lm_batches, padded_text_batches, read_examples, read_texts, text_windows
from .errors import CheckpointError, ConfigError, DataError
from .evaluate import Curve, CurvePoint, DenseQuality, DenseReference, LayerRules, default_metric, model_cost, sweep
from .hf.card import model_card
from .hf.checkpoint import check_output, library_versions, load_model, read_calibration, save_checkpoint
from .hf.inputs import example_inputs
from .layers import moe_layers, set_mode
from .report import curve_markdown, layers_markdown, plot_curve
from .select import RULES, Rule, RuleConfig
from .select.calibrate import Calibrator, Scope
from .sites import find_ffn_sites, site_weights
from .sparsity import ActivationProfile, profile_activations
from .train.capture import FFNInputs, capture_ffn_inputs, fast_dtype
from .train.stages import FittedSite, RouterTrainConfig, fit_site

TARGETS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Active fractions whose knobs a checkpoint keeps; 1.0 needs none."""

_CHARS_PER_TOKEN = 4  # of English text; where tokens are shorter, the end of a piece is cut off
_SCORE_TOKENS = 2048  # held-out tokens whose scores calibrate the rules: 0.1 points of active fraction


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the routers are fitted and the rule is set."""

    target_active: float = 0.5
    """Active fraction that the rule is calibrated to on held-out tokens, in (0, 1]."""
    scope: Scope = "layer"
    """One knob for each layer, all at the target, or one knob for all, the target met on average."""
    max_tokens: int | None = 100_000
    """Most calibration tokens, rounded down to whole windows; none means all. A tenth of them, in blocks spread over the data, is
    held out."""
    window: int = 1024
    """Tokens per sequence."""
    router: RouterTrainConfig = field(default_factory=RouterTrainConfig)
    """How routers are fitted."""
    seed: int = 0
    """Seed of the routers' initial weights and of the order of tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.target_active <= 1:
            raise ConfigError(f"target_active must be in (0, 1], got {self.target_active}.")


# -- convert -------------------------------------------------------------------------------------------------------------------------


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    data: DataConfig,
    config: ConvertConfig,
    calibration: CalibrationConfig,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Convert a checkpoint: read, split, fit routers, calibrate, save.

    Args:
        source: Hub id, folder or ``.gguf`` file; never written to.
        out: new folder for the converted checkpoint.
        data: calibration data.
        config: expert size, router, split, rule, policy.
        calibration: tokens, router training, target.
        dtype: of the model's weights, "float32", "bfloat16" or "float16".
        overwrite: replace an earlier conversion at ``out``.
        progress: told every stage.

    Returns:
        What ``moeify.json`` holds under "calibration".

    Raises:
        MoeifyError: see `errors`; whatever goes wrong, ``source`` and an existing ``out`` are untouched.
    """
    check_output(out, overwrite=overwrite)
    data = replace(data, window=calibration.window, max_tokens=calibration.max_tokens)
    model, processor = load_model(source, dtype=_torch_dtype(dtype))
    batches = calibration_batches(model, processor, data, progress=progress)
    work = out.with_name(out.name + ".work")
    record = convert_model(
        model, batches, config=config, calibration=calibration, work=work, run={"source": source, "dtype": dtype}, progress=progress
    )
    record |= {"data": data.data, "source": source, "versions": library_versions()}
    card = model_card(model, name=out.name, base_model=source, calibration=record)
    save_checkpoint(model, processor, out, calibration=record, card=card, overwrite=overwrite)
    _remove_work(work)
    return record


def convert_model(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    config: ConvertConfig,
    calibration: CalibrationConfig,
    work: Path,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Split, fit and calibrate a model in memory, in place; what `convert_checkpoint` does between loading and saving.

    Args:
        model: dense model.
        batches: calibration inputs; blocks of their tokens, spread over the data, are held out.
        config: expert size, router, split, rule, policy.
        calibration: router training and target.
        work: folder for captured inputs and fitted layers; a call with the same arguments continues what it holds.
        run: what else tells this run from another (the name of the source).
        progress: told every stage.

    Returns:
        How the rules were set and how good the routers are: JSON values for ``moeify.json``.

    Raises:
        MoeifyError: see `plan_conversion` and `capture_ffn_inputs`; the model is unchanged then.
    """
    from .hf.quantizer import adopt  # here, and not on top: it imports transformers' model code, which takes seconds

    sites = find_ffn_sites(model, batches[0] if not hasattr(model, "config") else example_inputs(model))
    plan = plan_conversion(model, sites, config)
    if changed := next((record.site.name for record, _ in plan if record.rule != config.rule), None):
        raise ConfigError(f"policy of '{changed}': one rule is calibrated for all layers; set_rule changes a layer's afterwards.")
    router = _config.to_dict(replace(calibration.router, seed=calibration.seed))
    identity = {"batches": _fingerprint(batches), "weights": _weights_checksum(model), "config": _config.to_dict(config), "router": router}
    _open_work(work, {**(run or {}), **identity})
    compute = fast_dtype(next(model.parameters()).device)
    inputs = capture_ffn_inputs(model, [record.site for record, _ in plan], batches, work / "inputs", compute=compute, progress=progress)
    fitted = _fit_sites(model, plan, inputs, calibration, work, progress)

    scores = {name: f.scores_TE for name, f in fitted.items()}
    neurons = {record.site.name: record.site.d_ff for record, _ in plan}
    calibrated = Calibrator(type(config.rule), scores, weights=neurons).solve(calibration.target_active, scope=calibration.scope)
    # One calibrator at a time: each holds the sorted scores of all layers.
    knobs = {n: knob_table(Calibrator(rule_type, scores, weights=neurons), scope=calibration.scope) for n, rule_type in RULES.items()}
    for site_record, _ in plan:
        name = site_record.site.name
        site_record = replace(site_record, rule=cast(RuleConfig, calibrated.rules[name]))
        apply_site(model, site_record, order_F=fitted[name].order_F, router_state=fitted[name].router_state)
    adopt(model)
    values = [rule.value for rule in calibrated.rules.values()]
    return {
        "rule": config.rule.name,
        "knob": config.rule.knob,
        "value": sum(values) / len(values),
        "scope": calibration.scope,
        "target_active": calibration.target_active,
        "active_fraction": calibrated.active_fraction,
        "router_scores": {name: f.captured for name, f in fitted.items()},
        "targets": list(TARGETS),
        "knobs": knobs,
        "most_experts": max(record.num_experts for record, _ in plan),
        "tokens": max(inputs.num_tokens(name) for name in inputs.widths),
        "seed": calibration.seed,
    }


def knob_table(calibrator: Calibrator, *, scope: Scope) -> dict[str, list[float]]:
    """The knob of every layer at each of `TARGETS`, by layer name: a checkpoint can be swept, or set to another budget, without data."""
    columns = [calibrator.solve(target, scope=scope).rules for target in TARGETS]
    return {name: [column[name].value for column in columns] for name in columns[0]}


def calibration_batches(
    model: nn.Module, processor: Any, data: DataConfig, *, progress: Progress = NO_PROGRESS, batch_tokens: int = 2048
) -> list[dict[str, Tensor]]:
    """Batches of the kind that the model reads: windows of text for decoders, padded texts for encoders, images for vision models.

    An encoder sees a document longer than its input in consecutive pieces. Images come without labels, and count as many tokens as they
    have patches (one, where the config does not tell).

    Raises:
        DataError: the model has no tokenizer or processor, its positions are fewer than the window, or the data is not of its kind.
    """
    main_input = getattr(model, "main_input_name", "input_ids")
    if processor is None:
        raise DataError(f"{type(model).__name__} came without a tokenizer or processor; put its files beside the weights.")
    if main_input == "pixel_values":
        size = max(1, batch_tokens // 256)
        unlabelled = (replace(example, label=0) for example in read_examples(data))  # whatever the classes are, nothing is fitted to them
        images = ({"pixel_values": b["pixel_values"]} for b in image_batches(unlabelled, processor, batch_size=size))
        return _take_tokens(images, data.max_tokens, tokens_per_image=_tokens_per_image(model.config))
    if main_input != "input_ids":
        raise DataError(
            f"{type(model).__name__} reads {main_input!r}; only text and images are read so far. Call convert_model with your own batches."
        )
    if _is_decoder(model):
        _check_window(model, data.window)
        windows_WS = text_windows(data, processor, progress=progress)
        return lm_batches(windows_WS, batch_size=max(1, batch_tokens // data.window))
    limit = min(
        data.window, getattr(model.config, "max_position_embeddings", data.window), getattr(processor, "model_max_length", data.window), 512
    )
    pieces = _text_pieces(read_texts(data), num_chars=_CHARS_PER_TOKEN * int(limit))
    texts = padded_text_batches(pieces, processor, max_length=int(limit), batch_size=max(1, batch_tokens // int(limit)))
    batches = _take_tokens(texts, data.max_tokens)
    if getattr(model.config, "is_encoder_decoder", False):
        return [{**b, "decoder_input_ids": b["input_ids"], "decoder_attention_mask": b["attention_mask"]} for b in batches]
    return batches


# -- measure -------------------------------------------------------------------------------------------------------------------------


def sweep_checkpoint(
    directory: str | Path,
    *,
    data: DataConfig,
    rule: str | None = None,
    values: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    batch_size: int = 1,
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
    steps: list[float | LayerRules]
    if values is not None:
        steps = [*values]
        for value in values:
            rule_type.at(value)
    else:
        steps = _calibrated_steps(rule_type, calibration, targets, where=str(directory))
    earlier = Curve.read(out) if out is not None and out.exists() else None
    model, processor = load_model(directory)
    batches = evaluation_batches(model, processor, data, batch_size=batch_size, progress=progress)
    metric = default_metric(model, batches[0])
    own = LayerRules(value=calibration["value"], rules={name: layer.rule for name, layer in moe_layers(model).items()})
    runs: list[tuple[type[Rule], list[float | LayerRules]]] = [(rule_type, steps)]
    if values is None and (rule_type is not own_type or all(_rules_of(s, own_type, own.rules) != own.rules for s in steps)):
        runs.append((own_type, [own]))
    reference = DenseReference(model, batches, metric=metric, progress=progress)
    cost = model_cost(model, batches[0])
    extra = {
        **{key: value for key, value in _config.to_dict(data).items() if value is not None},
        "fingerprint": _fingerprint(batches),
        "scope": calibration["scope"] if values is None else "global",
        "calibrated": {"rule": calibration["rule"], "value": calibration["value"]},
        "versions": library_versions(),
    }
    dense = DenseQuality(quality=reference.quality, flops_per_token=cost.dense_flops_per_token)
    curve = Curve(model=str(directory), metric=metric, dense=dense, extra=extra)
    done = earlier.points if earlier is not None and earlier.is_same_run(curve) else ()
    curve = replace(curve, points=done)

    def on_point(point: CurvePoint) -> None:
        nonlocal curve
        curve = replace(curve, points=(*curve.points, point))
        if out is not None:
            curve.write(out)

    options: dict[str, Any] = {"quality": metric, "cost": cost, "reference": reference, "on_point": on_point, "progress": progress}
    points: list[CurvePoint] = []
    for run_type, run_steps in runs:
        left = [point for point in done if point not in points]
        points += sweep(model, batches, run_type, run_steps, done=left, **options)
    curve = replace(curve, points=(*(point for point in done if point not in points), *points))
    if out is not None:
        curve.write(out)
    return curve


def profile_checkpoint(source: str, *, data: DataConfig, progress: Progress = NO_PROGRESS) -> dict[str, ActivationProfile]:
    """Activation statistics of every FFN of a dense (or converted, run dense) checkpoint, by site name."""
    model, processor = load_model(source)
    set_mode(model, "dense")  # a converted FFN runs its routed experts otherwise
    sites = [layer.site for layer in moe_layers(model).values()] or find_ffn_sites(model, example_inputs(model))
    batches = calibration_batches(model, processor, data, progress=progress)
    return profile_activations(model, sites, batches, progress=progress)


def generate_text(directory: str | Path, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
    """Continue ``prompt``; greedy at temperature 0.

    Raises:
        ConfigError: the model does not generate text, or the temperature is negative.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}.")
    model, tokenizer = load_model(directory)
    if tokenizer is None or not model.can_generate():
        raise ConfigError(f"{type(model).__name__} at '{directory}' does not generate text.")
    tokens = tokenizer(prompt, return_tensors="pt")
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
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
    page = f"# {directory.name}\n\n![quality against cost](curve.png)\n\n{curve_markdown(measured)}\n## Routers\n\n{layers_markdown(rows)}"
    temporary = files["page"].with_suffix(".new")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(files["page"])
    return {kind: str(path) for kind, path in files.items()}


# -- pieces --------------------------------------------------------------------------------------------------------------------------


def evaluation_batches(
    model: nn.Module, processor: Any, data: DataConfig, *, batch_size: int, progress: Progress = NO_PROGRESS
) -> list[dict[str, Tensor]]:
    """Batches to measure quality on: with labels where the model's head predicts classes, else as for calibration."""
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        examples = list(read_examples(data))
        known = {label: int(i) for label, i in (getattr(model.config, "label2id", None) or {}).items()}
        ids = class_ids([e.label for e in examples], known=known if any(isinstance(e.label, str) for e in examples) else None)
        if getattr(model, "main_input_name", "") == "pixel_values":
            return list(image_batches(examples, processor, batch_size=batch_size, class_ids=ids))
        length = int(min(getattr(model.config, "max_position_embeddings", 512), 512))
        labels = [ids[e.label] for e in examples]
        return list(
            padded_text_batches([e.text or "" for e in examples], processor, max_length=length, batch_size=batch_size, labels=labels)
        )
    return calibration_batches(model, processor, data, progress=progress, batch_tokens=batch_size * data.window)


def _fit_sites(
    model: nn.Module,
    plan: Sequence[tuple[SiteRecord, ConvertConfig]],
    inputs: FFNInputs,
    calibration: CalibrationConfig,
    work: Path,
    progress: Progress,
) -> dict[str, FittedSite]:
    """Fit every site, or read what an earlier run fitted."""
    fitted = {}
    train = replace(calibration.router, seed=calibration.seed)
    with progress.task("split and fit routers", total=len(plan)) as task:
        for i, (record, options) in enumerate(plan):
            path = work / f"site{i:04d}.safetensors"
            site = _read_fitted(path)
            if site is None:
                site = fit_site(site_weights(model, record.site), inputs.read(record.site.name), record, options, train)
                # Evenly spaced rows: consecutive tokens resemble each other.
                rows = torch.linspace(0, len(site.scores_TE) - 1, min(_SCORE_TOKENS, len(site.scores_TE))).long()
                site = replace(site, scores_TE=site.scores_TE[rows].contiguous())
                _write_fitted(path, site)
            fitted[record.site.name] = site
            task.advance(1)
    return fitted


def _write_fitted(path: Path, site: FittedSite) -> None:
    tensors = {"order_F": site.order_F, "scores_TE": site.scores_TE, **{f"router.{k}": v for k, v in site.router_state.items()}}
    temporary = path.with_suffix(".new")
    try:
        save_file(tensors, temporary, metadata={"captured": json.dumps(site.captured)})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write '{path}': {error}; free space and run again, what is fitted already is kept.") from error
    temporary.replace(path)


def _read_fitted(path: Path) -> FittedSite | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        captured = json.loads(file.metadata()["captured"])
    router = {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}
    return FittedSite(order_F=tensors["order_F"], router_state=router, scores_TE=tensors["scores_TE"], captured=captured)


def _open_work(work: Path, run: Mapping[str, Any]) -> None:
    """Use what an earlier run of the same conversion left; anything else there is started anew."""
    path, text = work / "run.json", json.dumps(run, sort_keys=True)
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_suffix(".new")
    if work.exists():
        if not work.is_dir() or (not path.exists() and any(p != temporary for p in work.iterdir())):
            raise CheckpointError(f"'{work}' is in the way and is not the state of a conversion; move it or choose another --out.")
        _remove_work(work)
    work.mkdir(parents=True)
    temporary.write_text(text)
    temporary.replace(path)


def _remove_work(work: Path) -> None:
    """Delete the state of a conversion, run.json last: whatever remains if this is killed is still known to be ours."""
    for child in work.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != "run.json":
            child.unlink()
    shutil.rmtree(work)


def _calibration_of(directory: Path, *keys: str) -> dict[str, Any]:
    """`read_calibration`, with everything that the caller needs."""
    calibration = read_calibration(directory)
    if missing := [repr(key) for key in keys if key not in calibration]:
        raise CheckpointError(f"the calibration record of '{directory}' lacks {', '.join(missing)}; convert the model again.")
    return calibration


def _calibrated_steps(
    rule_type: type[Rule], calibration: Mapping[str, Any], targets: Sequence[float] | None, *, where: str
) -> list[float | LayerRules]:
    """The stored knobs at ``targets``, or at 0.1, 0.15, ... 0.95 and the knob that runs every expert; one step where all are equal."""
    if rule_type.name not in calibration["knobs"]:
        raise CheckpointError(f"the calibration record of '{where}' has no knobs of the rule '{rule_type.name}'; convert the model again.")
    table: Mapping[str, Sequence[float]] = calibration["knobs"][rule_type.name]
    stored = {round(target, 4): i for i, target in enumerate(calibration["targets"])}
    steps: list[float | LayerRules] = []
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


def _check_window(model: nn.Module, window: int) -> None:
    """Refuse windows with more tokens than the model has positions; a config that gives no number has no limit."""
    config: Any = model.config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        limit = getattr(config, name, None)
        if limit is None and (text := getattr(config, "text_config", None)) is not None:
            limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            if window > limit:
                raise DataError(
                    f"--window {window} is more than the {limit} positions of {type(model).__name__} ({name}); give at most {limit}."
                )
            return


def _text_pieces(texts: Iterable[str], *, num_chars: int) -> Iterator[str]:
    """Each text in consecutive pieces of at most ``num_chars``, cut at white space where there is some; blank ones are left out."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + num_chars
            if stop < len(text):
                space = max(text.rfind(c, start + 1, stop + 1) for c in " \n\t")
                stop = space if space > 0 else stop
            if (piece := text[start:stop]).strip():
                yield piece
            start = stop


def _tokens_per_image(config: Any) -> int:
    """Patches of an image; 1 where the config has no such sizes."""
    config = getattr(config, "vision_config", None) or config
    patches = 1
    for side in (0, 1):
        image, patch = (_side(getattr(config, name, None), side) for name in ("image_size", "patch_size"))
        patches *= max(1, image // patch) if image and patch else 1
    return patches


def _side(size: Any, side: int) -> int:
    """Height (0) or width (1) of a size that is a number, a pair or a dictionary; 0 if it is neither."""
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, (list, tuple)):
        size = size[side] if len(size) == 2 else None
    return size if isinstance(size, int) else 0


def _take_tokens(batches: Iterable[dict[str, Tensor]], max_tokens: int | None, *, tokens_per_image: int = 1) -> list[dict[str, Tensor]]:
    """Batches up to the one that reaches ``max_tokens``."""
    taken, tokens = [], 0
    for batch in batches:
        taken.append(batch)
        mask = batch.get("attention_mask")
        tokens += int(mask.sum()) if mask is not None else batch["pixel_values"].shape[0] * tokens_per_image
        if max_tokens is not None and tokens >= max_tokens:
            break
    return taken


def _fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            digest.update(key.encode() + str(tuple(batch[key].shape)).encode() + batch[key].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights_checksum(model: nn.Module) -> str:
    """What tells that a source of the same name holds other weights now."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _torch_dtype(name: str) -> torch.dtype:
    return _config.lookup({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}, name, where="--dtype")


def _is_decoder(model: nn.Module) -> bool:
    config = model.config
    return not getattr(config, "is_encoder_decoder", False) and (
        bool(getattr(config, "is_decoder", False)) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    )
