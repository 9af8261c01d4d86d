"""The report of a checkpoint: one HTML page, and its parts as files."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _config
from .._cpu import cpu_name
from .._progress import NO_PROGRESS, Progress
from ..errors import CheckpointError, ConfigError, DataError
from ..evaluate import METRICS, AblationTable, Curve, CurvePoint, ablation
from ..hf.load import load_model, read_calibration, read_manifest
from ..hf.save import library_versions
from ..manifest import Manifest
from ..report import (
    Report,
    ablation_markdown,
    check_plots,
    cost_markdown,
    curve_markdown,
    has_plots,
    layers_markdown,
    plain_markdown,
    plot_curve,
    report_html,
)
from ..select import Rule
from .measure import KnobRecord, calibrated_steps, calibration_of, conversion_id, own_rule, rules_of, sweep_checkpoint
from .names import torch_device, torch_dtype
from .panels import CALIBRATED, PanelRequest, Panels, check_request, run_panels, write_panels
from .preset import FRACTIONS

REPORT_TARGETS = (0.25, 0.5, 0.75)
"""Active fractions at which a report shows executed experts, beside the calibrated rules."""
SWEEP_TARGETS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Active fractions of the curve that a report measures where there is none, beside the checkpoint's own point."""
_NEAR = 0.06
_DATA = ("data", "subset", "split", "column", "window", "max_tokens", "seed")


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """What a report reads of the calibration record."""

    router_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores of each FFN's router, by name."""
    skipped: dict[str, float] = field(default_factory=dict)
    """Share of its input channels that each linear layer skips of calibration data."""


def report_checkpoint(
    directory: str | Path,
    *,
    curve: Path | None = None,
    out: Path | None = None,
    request: PanelRequest | None = None,
    compare: Mapping[str, Path] | None = None,
    within: float | None = None,
    targets: Sequence[float] | None = None,
    latency: bool = True,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    commands: Sequence[str] = (),
    progress: Progress = NO_PROGRESS,
) -> dict[str, str]:
    """Write a report of what was measured: one HTML file that needs no other, and as files a markdown page and pictures.

    Args:
        directory: converted or thinned checkpoint.
        curve: ``curve.json`` of a sweep; None looks for one in the checkpoint's folder and beside it. Where there is none, one is measured
            on the request's data at `SWEEP_TARGETS`, into ``out``; points that it has are not measured again.
        out: folder for ``report.html``, ``report.md``, ``curve.png`` and ``curve.svg``; None means ``<directory>/report``. A request adds
            ``analysis.json`` and, by what it asks for, ``experts.png``, ``active.png``, ``tokens.html``, ``patches.png``.
        request: data, text or image to run the checkpoint on; nothing by default, and nothing is loaded then. With data and no text a
            model that reads texts shows what each token of `SAMPLE_TEXT` costs.
        compare: ``curve.json`` of other checkpoints by the name that the page gives them, of the same metric and batches: the page gets a
            table of all at equal cost, and at (nearly) equal quality, and ``compare.png``.
        within: what the latter may lose against this curve's dense model, in units of the metric; None: 0.01 where more is better, else 2 %
            of the dense model's.
        targets: stored active fractions (multiples of 0.05) and 1, to run the data at beside the checkpoint's own rules; None:
            `REPORT_TARGETS`.
        latency: time the points of a curve that is measured here.
        batch_size: sequences per forward.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        commands: what the page says that it was made by.
        progress: told every batch.

    Returns:
        Paths of the files, by kind.

    Raises:
        CheckpointError: no converted checkpoint, or ``out`` cannot be written. DataError: no curve, or not one. ConfigError: targets
            without data, or one that is not stored, or a loss without curves to compare. Of a request also what `check_request` and
            `run_panels` raise; all but the latter before the model is loaded.
    """
    directory, request = Path(directory), request or PanelRequest()
    if targets is not None and request.data is None:
        raise ConfigError("--targets are the active fractions to run --data at; name the data.")
    calibration = calibration_of(directory, ScoreRecord)
    out = out or directory / "report"
    sweeps = request.data is not None
    measured = _curve_of(directory, curve, *([] if sweeps else [out]), is_needed=not sweeps and (not request or bool(compare)))
    sweeps = sweeps and measured is None
    if sweeps and compare:
        raise DataError("--compare needs a curve of the checkpoint on the same batches; moeify sweep writes one, --curve names one.")
    others = _comparable(measured, compare or {})
    if within is not None and not others:
        raise ConfigError("--within is what curves to --compare may lose; name at least one.")
    settings: dict[str, Rule | Mapping[str, Rule]] = {}
    if request:
        check_plots()
        place, kind = torch_device(device), torch_dtype(dtype)
        check_request(directory, request)
        if request.data is not None:
            settings = _panel_settings(directory, REPORT_TARGETS if targets is None else targets)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder '{out}': {error.strerror}; choose another --out.") from error
    manifest = read_manifest(directory)
    drawn: dict[str, str] = {}
    sections, panels, table = "", Panels(), None
    if sweeps:
        assert request.data is not None
        options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device, "latency": latency, "progress": progress}
        measured = sweep_checkpoint(directory, data=request.data, targets=SWEEP_TARGETS, out=out / "curve.json", **options)
        drawn["curve"] = str(out / "curve.json")
    if request:
        model, processor = load_model(directory, dtype=kind, progress=progress)
        panels = run_panels(model.to(place), processor, request, settings, batch_size=batch_size, progress=progress)
        found, sections = write_panels(panels, out, title=directory.name, skips_channels=not manifest.sites)
        drawn |= found
    files, page = {"html": str(out / "report.html"), "page": str(out / "report.md")}, f"# {plain_markdown(directory.name)}\n\n"
    if measured is not None:
        if draws := has_plots():  # the HTML page draws its own
            files |= {"png": str(out / "curve.png"), "svg": str(out / "curve.svg")}
            plot_curve(measured, files["png"])
            plot_curve(measured, files["svg"])
        cost = f"## Cost\n\n{parts}\n" if (parts := cost_markdown(measured)) else ""
        page += f"{'![quality against cost](curve.png)' if draws else ''}\n\n{curve_markdown(measured)}\n{cost}"
    if measured is not None and others:
        table = _compared({directory.name: measured, **others}, within=within)
        page += "## Methods at equal cost\n\n"
        if has_plots():
            files["compare"] = str(out / "compare.png")
            plot_curve({directory.name: measured, **others}, files["compare"])
            page += "![methods at equal cost](compare.png)\n\n"
        page += f"{ablation_markdown(table)}\n"
    files, page = files | drawn, page + sections
    scores = {name: {key: f"{value:.4f}" for key, value in row.items()} for name, row in calibration.router_scores.items()}
    skipped = {name: {"skipped": f"{share:.4f}"} for name, share in calibration.skipped.items()}
    for title, rows in (("Routers", scores), ("Skipped channels", skipped)):
        page += f"## {title}\n\n{layers_markdown(rows)}" if rows else ""
    shown = Report(
        title=directory.name,
        subtitle=_what(manifest),
        skips_channels=not manifest.sites,
        curve=measured,
        others=others,
        table=table,
        presets=manifest.presets,
        suggested={} if manifest.presets or measured is None else _suggested(measured),
        experts=panels.experts,
        tokens=panels.tokens,
        text_costs=panels.text_costs,
        patches=Path(files["patches"]) if "patches" in files else None,
        layers={"Routers": calibration.router_scores, "Skipped channels": {n: {"skipped": v} for n, v in calibration.skipped.items()}},
        facts=_facts(directory, manifest, read_calibration(directory), measured, request=request, dtype=dtype, device=device),
        commands=[without_folders(command) for command in commands],
    )
    for path, text in ((Path(files["page"]), page), (Path(files["html"]), report_html(shown))):
        temporary = path.with_suffix(".new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return files


def without_folders(text: str) -> str:
    """A text whose absolute paths are names alone: a report is shown to others, and folders say whose machine it was."""
    return re.sub(r"(?<![\w:/.~])~?/(?:[^\s'\"/]+/)*", "", text)


def _what(manifest: Manifest) -> str:
    """A checkpoint in a line."""
    experts = sorted({record.num_experts for record in manifest.sites})
    parts = [f"{len(manifest.sites)} FFNs as mixtures of {' or '.join(map(str, experts))} experts"] if experts else []
    parts += [f"{len(manifest.channels)} linear layers that skip input channels"] if manifest.channels else []
    parts += [f"{len(manifest.projections)} projections replaced"] if manifest.projections else []
    return "; ".join([*parts, *(["int8 weights"] if manifest.has_int8 else [])])


def _comparable(measured: Curve | None, compare: Mapping[str, Path]) -> dict[str, Curve]:
    """Curves that may stand beside the one that was measured.

    Raises:
        DataError: one cannot be read, has no point, or is of another metric or other batches; says which.
    """
    curves = {name: Curve.read(path) for name, path in compare.items()}
    for name, curve in curves.items():
        assert measured is not None
        if not curve.points or not measured.points:
            raise DataError(f"'{compare[name]}' or the checkpoint's own curve has no point to compare; moeify sweep measures them.")
        if curve.metric != measured.metric:
            raise DataError(f"'{compare[name]}' is measured by {curve.metric}, the checkpoint's curve by {measured.metric}.")
        if curve.extra.get("fingerprint") != measured.extra.get("fingerprint"):
            raise DataError(f"'{compare[name]}' was not measured on the batches of the checkpoint's curve; sweep both on the same data.")
    return curves


def _compared(curves: Mapping[str, Curve], *, within: float | None) -> AblationTable:
    """Methods at equal cost; a curve of several rules has a row for each."""
    first = next(iter(curves.values()))
    lower = METRICS[first.metric].lower_is_better
    within = within if within is not None else 0.02 * first.dense.quality if lower else 0.01
    rows = {}
    for name, curve in curves.items():
        rules = dict.fromkeys(point.rule for point in curve.points)
        for rule in rules:
            rows[name if len(rules) == 1 else f"{name} {rule}"] = [point for point in curve.points if point.rule == rule]
    return ablation(rows, metric=first.metric, dense=first.dense.quality, within=within)


def _facts(
    directory: Path,
    manifest: Manifest,
    calibration: Mapping[str, Any],
    curve: Curve | None,
    *,
    request: PanelRequest,
    dtype: str,
    device: str,
) -> dict[str, str]:
    """What a reader needs to believe a report: words and numbers alone, as they are stored, files by their names alone."""
    facts = {"checkpoint": directory.name}
    facts |= {"MoE layers": str(len(manifest.sites))} if manifest.sites else {}
    facts |= {"layers that skip channels": str(len(manifest.channels))} if manifest.channels else {}
    facts |= {
        f"calibration: {key.replace('_', ' ')}": without_folders(str(value))
        for key, value in calibration.items()
        if isinstance(value, str | int | float)
    }
    if curve is not None:
        facts["curve: of"] = Path(curve.model).name
        facts |= _data_facts("curve", curve.extra)
        facts |= {f"version of {name}": str(version) for name, version in (curve.extra.get("versions") or {}).items()}
    if request.data is not None:
        what = "executed experts" if manifest.sites else "kept channels"
        facts |= _data_facts(what, _config.to_dict(request.data))
    if request:
        gpu = f" ({torch.cuda.get_device_name(torch_device(device))})" if torch_device(device).type == "cuda" else ""
        facts |= {"this page: dtype": dtype, "this page: device": f"{device}{gpu}"}
    facts |= {"this page: processor": cpu_name(), "this page: threads": str(torch.get_num_threads())}
    facts |= {"this page: system": platform.platform(terse=True)}
    return facts | {f"report by {name}": version for name, version in library_versions().items()}


def _data_facts(what: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """Which data was read, as far as it is said."""
    return {
        f"{what}: {key.replace('_', ' ')}": without_folders(str(stored[key]))
        for key in (*_DATA, "dtype", "device")
        if stored.get(key) is not None
    }


def _suggested(curve: Curve) -> dict[str, CurvePoint]:
    """Points near those that `moeify preset` makes unless told otherwise."""
    rule = (curve.extra.get("calibrated") or {}).get("rule")
    points = [point for point in curve.points if point.rule == rule]
    found = {}
    for name, share in FRACTIONS.items():
        away = [abs(point.active_fraction - share) for point in points]
        if away and min(away) <= _NEAR:
            found[name] = points[away.index(min(away))]
    return found


def _curve_of(directory: Path, curve: Path | None, *folders: Path, is_needed: bool) -> Curve | None:
    """The curve that is named, or the one in the folder, one of ``folders`` or, if it bears this checkpoint's name, beside it; None where
    there is none of this conversion and none is needed.

    Raises:
        DataError: the one that is named is of another conversion, or one is needed and there is none; says what is.
    """
    foreign = "was measured before this conversion, or on another checkpoint; moeify sweep or --data measures this one."
    if curve is not None:
        found = Curve.read(curve)
        if not _is_of(found, directory):
            raise DataError(f"'{curve}' {foreign}")
        return found
    inside, beside = directory / "curve.json", directory.parent / "curve.json"
    stale = []
    for path in dict.fromkeys((inside, *(folder / "curve.json" for folder in folders), beside)):
        if not path.exists():
            continue
        found = Curve.read(path)
        if path == beside and Path(found.model).name != directory.resolve().name:
            continue
        if _is_of(found, directory):
            return found
        stale.append(path)
    if is_needed:
        if stale:
            raise DataError(f"'{stale[0]}' {foreign}")
        raise DataError(
            f"no such file: '{inside}', nor a curve of this checkpoint beside it; moeify sweep or --data measures one, --curve names one."
        )
    return None


def _is_of(curve: Curve, directory: Path) -> bool:
    """Whether a curve is of the checkpoint as it is now, as far as it says."""
    return "conversion" not in curve.extra or curve.extra["conversion"] == conversion_id(directory)


def _panel_settings(directory: Path, targets: Sequence[float]) -> dict[str, Rule | Mapping[str, Rule]]:
    """The checkpoint's own rules, and its own kind of rule at the stored knobs of each target."""
    rule_type, names = own_rule(directory)
    calibration = calibration_of(directory, KnobRecord)
    settings: dict[str, Rule | Mapping[str, Rule]] = {CALIBRATED: {}}
    for target in targets:
        (step,) = calibrated_steps(rule_type, calibration, [target], names=names)
        settings[f"target {target:g}"] = rules_of(step, rule_type, names)
    return settings
