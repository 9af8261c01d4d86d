"""From a dense checkpoint to a converted one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..channels import all_channels
from ..convert import ConvertConfig, apply_site, plan_conversion, tried_projections
from ..data import DataConfig, check_source
from ..errors import ConfigError, UnsupportedModelError
from ..hf.card import model_card
from ..hf.folders import check_apart, check_output, recover
from ..hf.inputs import example_inputs
from ..hf.load import load_model
from ..hf.save import library_versions, save_checkpoint
from ..layers import moe_layers
from ..manifest import SiteRecord
from ..quantize import quantize
from ..select.calibrate import Scope
from ..sites import find_ffn_sites, site_weights
from ..train.calibration import calibrate_rules, spread
from ..train.capture import FFNInputs, capture_ffn_inputs, fast_dtype
from ..train.fit import FittedSite, RouterTrainConfig, fit_site
from ..train.parallel import num_started
from .heldout import card_rows, int8_rows, measure_converted, replaced_rows
from .inputs import calibration_batches, hold_out
from .names import torch_device, torch_dtype
from .project import ProjectionsConfig, distil_and_replace, projection_records
from .work import DISTILLATION, fingerprint, finished_record, open_work, read_fitted, remove_work, run_id, weights_checksum, write_fitted

_Plans = Sequence[tuple[SiteRecord, ConvertConfig]]


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the routers are fitted and the rule is set."""

    target_active: float = 0.5
    """Active fraction that the rule is calibrated to on held-out tokens, in (0, 1]."""
    scope: Scope = "layer"
    """One knob for each layer, all at the target, or one knob for all, the target met on average."""
    max_tokens: int | None = 100_000
    """Most calibration tokens, rounded down to whole windows; none means all. One window of 50 is kept to measure the result, and a tenth
    of the others, in blocks spread over the data, to calibrate the rule."""
    window: int = 1024
    """Tokens per sequence."""
    router: RouterTrainConfig = field(default_factory=RouterTrainConfig)
    """How routers are fitted."""
    seed: int = 0
    """Seed of the routers' initial weights and of the order of tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.target_active <= 1:
            raise ConfigError(f"target_active must be in (0, 1], got {self.target_active}.")


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    data: DataConfig,
    config: ConvertConfig,
    calibration: CalibrationConfig,
    dtype: str = "float32",
    device: str = "cpu",
    weights: str = "float",
    projections: ProjectionsConfig | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    stream: bool | None = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Convert a checkpoint: read, split, fit routers, calibrate, measure, save.

    Args:
        source: Hub id, folder or ``.gguf`` file; never written to.
        out: new folder for the converted checkpoint. A run that was killed continues; also one that was killed when ``out`` was complete.
        data: calibration data.
        config: expert size, router, split, rule, policy.
        calibration: tokens, router training, target.
        dtype: of the model's weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1": where the model runs; routers are fitted on the CPU, a layer at a time.
        weights: of the experts, "float" (as ``dtype`` says) or "int8": after everything else, and measured before and after.
        projections: linear layers to replace by MLPs first, distilled on the calibration data, and then converted like the FFNs; None
            replaces none. Such a checkpoint has no dense equal: it loads with moeify only.
        notes: JSON values that the result is to begin with.
        overwrite: replace an earlier conversion at ``out``.
        stream: hold one block of the model in memory at a time (`convert_streamed`); None: where the weights do not fit
            (`is_too_large`), and under torchrun.
        progress: told every stage.

    Returns:
        What ``moeify.json`` holds under "calibration"; of it, "measured" is what `measure_converted` found on windows kept for it. With
        int8 weights, "measured_float" is what it found before them; with ``projections``, "projections" has their config, and what
        `distil_and_replace` returns, "measured" against the source among it: the dense mode of the result is the replaced model.

    Raises:
        MoeifyError: see `errors`; whatever goes wrong, ``source`` and an existing ``out`` are untouched.
    """
    if weights not in ("float", "int8"):
        raise ConfigError(f"--weights must be float or int8, got {weights!r}.")
    if stream is None:
        from .stream import is_too_large

        stream = num_started() > 1 or is_too_large(source, dtype=dtype)
    if stream:
        from .stream import convert_streamed

        if weights != "float" or projections is not None:
            raise ConfigError(
                "a model that is read one block at a time keeps floating weights and its linear layers; leave --weights and "
                "--attention out, or add --no-stream."
            )
        given: dict[str, Any] = {"data": data, "config": config, "calibration": calibration, "dtype": dtype, "device": device}
        return convert_streamed(source, out, **given, notes=notes, overwrite=overwrite, progress=progress)
    check_apart(out, source)
    work = out.with_name(out.name + ".work")
    recover(out)
    finished = finished_record(out, work)
    if finished is None:
        check_output(out, overwrite=overwrite)
    data = replace(data, window=calibration.window, max_tokens=calibration.max_tokens)
    place = torch_device(device)
    check_source(data)
    model, processor = load_model(source, dtype=torch_dtype(dtype), progress=progress)
    if moe_layers(model):
        raise UnsupportedModelError(f"'{source}' is converted already; give the dense checkpoint that it was made from.")
    model.to(place)
    batches, held_out = hold_out(model, calibration_batches(model, processor, data, progress=progress))
    run: dict[str, Any] = {"source": source, "dtype": dtype, "device": place.type, "held_out": fingerprint(held_out)}
    if projections is not None:
        run["projections"] = _config.to_dict(replace(projections, workers=1))
        records = projection_records(model, projections)
        with tried_projections(model, records):  # what is wrong with the conversion shows before minutes of distillation
            _plan(model, batches, config)
    identity = _run_of(model, batches, config, calibration, run)
    if finished is not None:
        same_weights = finished.get("weights", "float") == weights
        if same_weights and is_of(finished, run_id(identity), calibration):
            remove_work(work)
            return finished
        check_output(out, overwrite=overwrite)
    options: dict[str, Any] = {"config": config, "calibration": calibration, "run": run, "progress": progress}
    if projections is None:
        record = convert_model(model, batches, work=work, **options)
    else:
        open_work(work, identity)
        replaced = distil_and_replace(model, records, batches, projections, work=work / DISTILLATION, held_out=held_out, progress=progress)
        # The run is that of the dense source: whoever looks for a finished one has not distilled yet.
        record = {**convert_model(model, batches, work=work / "conversion", **options), "run": run_id(identity)}
        record["projections"] = {"config": run["projections"], **replaced}
    measured = measure_converted(model, held_out, progress=progress)
    record = {**(notes or {}), **record, "data": data.data, "source": source, "versions": library_versions(), "measured": measured}
    if weights == "int8":
        record |= {"weights": "int8", "int8_errors": quantize(model), "measured_float": measured}
        record["measured"] = measure_converted(model, held_out, progress=progress)
    card = card_of(model, record, name=out.name)
    save_checkpoint(model, processor, out, calibration=record, card=card, overwrite=overwrite, progress=progress)
    remove_work(work)
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
    """Split, fit and calibrate a model in memory, in place; what `convert_checkpoint` does between loading and measuring.

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
    from ..hf.quantizer import adopt  # here, and not on top: it imports transformers' model code, which takes seconds

    plan = _plan(model, batches, config)
    identity = _run_of(model, batches, config, calibration, run or {})
    open_work(work, identity)
    compute = fast_dtype(next(model.parameters()).device)
    inputs = capture_ffn_inputs(model, [record.site for record, _ in plan], batches, work / "inputs", compute=compute, progress=progress)
    fitted = _fit_sites(model, plan, inputs, calibration, work, progress)
    rules, record = calibrate_rules(
        type(config.rule),
        {name: site.scores_TE for name, site in fitted.items()},
        neurons={site_record.site.name: site_record.site.d_ff for site_record, _ in plan},
        always_on={name: site.always_on for name, site in fitted.items()},
        router_scores={name: site.captured for name, site in fitted.items()},
        target_active=calibration.target_active,
        scope=calibration.scope,
    )
    for site_record, _ in plan:
        name = site_record.site.name
        site_record = replace(site_record, rule=rules[name], always_on=fitted[name].always_on)
        apply_site(model, site_record, order_F=fitted[name].order_F, router_state=fitted[name].router_state)
    adopt(model)
    tokens = max(inputs.num_tokens(name) for name in inputs.widths)
    return {**record, "tokens": tokens, "seed": calibration.seed, "run": run_id(identity)}


def _plan(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], config: ConvertConfig) -> _Plans:
    """What is converted, and how; refuses what cannot be."""
    with all_channels(model):
        sites = find_ffn_sites(model, batches[0] if not hasattr(model, "config") else example_inputs(model))
    plan = plan_conversion(model, sites, config)
    if changed := next((record.site.name for record, _ in plan if record.rule != config.rule), None):
        raise ConfigError(f"policy of '{changed}': one rule is calibrated for all layers; set_rule changes a layer's afterwards.")
    return plan


def card_of(model: nn.Module, record: Mapping[str, Any], *, name: str) -> str:
    """The model card of a converted model with its calibration record."""
    shown = {key: value for key, value in record.items() if key not in ("run", "weights", "measured", "measured_float")}
    replaced = replaced_rows(record.get("projections", {}).get("measured"))
    results = {**replaced, **card_rows(record["measured"]), **int8_rows(record)}
    return model_card(model, name=name, base_model=record["source"], calibration=shown, results=results)


def _fit_sites(
    model: nn.Module, plan: _Plans, inputs: FFNInputs, calibration: CalibrationConfig, work: Path, progress: Progress
) -> dict[str, FittedSite]:
    """Fit every site, or read what an earlier run fitted."""
    fitted = {}
    train = replace(calibration.router, seed=calibration.seed)
    with progress.task("split and fit routers", total=len(plan)) as task:
        for i, (record, options) in enumerate(plan):
            name, path = record.site.name, work / f"site{i:04d}.safetensors"
            site = read_fitted(path)
            if site is None:
                site = fit_site(site_weights(model, record.site), inputs.read(name), record, options, train)
                site = replace(site, scores_TE=spread(site.scores_TE))
                write_fitted(path, site)
            fitted[name] = site
            task.advance(1)
    return fitted


def _run_of(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: ConvertConfig,
    calibration: CalibrationConfig,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides what is captured and fitted."""
    router = _config.to_dict(replace(calibration.router, seed=calibration.seed))
    weights = weights_checksum(model)
    return {**run, "batches": fingerprint(batches), "weights": weights, "config": _config.to_dict(config), "router": router}


def is_of(record: Mapping[str, Any], run: str, calibration: CalibrationConfig) -> bool:
    """Whether a finished conversion is what this run would make."""
    asked = {"run": run, "target_active": calibration.target_active, "scope": calibration.scope, "seed": calibration.seed}
    return all(record.get(key) == value for key, value in asked.items())
