"""Commands that measure a checkpoint, some of which then set its knobs: sweep, preset, budget, eval, report."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _terminal
from ..data import DataConfig
from ..errors import ConfigError
from ..select import RULES
from ._app import command
from .options import (
    BatchSize,
    Converted,
    Device,
    DType,
    LatencyTokens,
    Seed,
    data_or_none,
    read_named_numbers,
    read_named_paths,
    read_numbers,
    takes,
)


@command(resumes=lambda values: values["out"] is not None)
@takes("data", DataConfig, skip=("seed",), split="data_split")
def sweep(
    directory: Converted,
    *,
    data: DataConfig,
    rule: Annotated[str | None, typer.Option(help=f"Selection rule: {', '.join(RULES)}; by default the checkpoint's own.")] = None,
    values: Annotated[str | None, typer.Option(help="Knob values, a,b,c; by default those that give active fractions 0.1 to 1.0.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Instead of values: active fractions, a,b,c, multiples of 0.05; the calibrated point is measured, too."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time each point, too, in turns with the dense model.")] = False,
    latency_tokens: LatencyTokens = None,
    batch_size: BatchSize = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Where to write curve.json.")] = None,
    seed: Seed = None,
) -> Any:
    """Measure quality against cost at several knob values of one converted model."""
    from ..pipeline import sweep_checkpoint

    numbers = None if values is None else read_numbers(values, option="--values")
    fractions = None if targets is None else read_numbers(targets, option="--targets")
    data = dataclasses.replace(data, seed=seed)
    return sweep_checkpoint(
        directory,
        data=data,
        rule=rule,
        values=numbers,
        targets=fractions,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        latency=latency,
        latency_tokens=latency_tokens,
        out=out,
        progress=_terminal.make_progress(),
    )


@command()
@takes("data", DataConfig, skip=("seed",), split="data_split")
def preset(
    directory: Converted,
    *,
    data: DataConfig,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FRACTION", help="A preset and its active fraction; by default quality=0.75, balanced=0.5, fast=0.25."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time each, too, in turns with the dense model.")] = True,
    latency_tokens: LatencyTokens = None,
    batch_size: BatchSize = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Calibrate named operating points on half of the data, measure them on the other half, and store them in the checkpoint."""
    from ..pipeline import preset_checkpoint

    return preset_checkpoint(
        directory,
        data=dataclasses.replace(data, seed=seed),
        fractions=None if at is None else read_named_numbers(at, option="--at"),
        latency=latency,
        latency_tokens=latency_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=_terminal.make_progress(),
    )


@command()
@takes("data", DataConfig, skip=("seed",), split="data_split")
def budget(
    directory: Converted,
    *,
    data: DataConfig,
    flops: Annotated[float | None, typer.Option(help="Share of the dense model's FLOPs, in (0, 1].")] = None,
    ffn_flops: Annotated[float | None, typer.Option(help="Share of the dense FFNs' FLOPs, in (0, 1].")] = None,
    bytes_: Annotated[
        float | None, typer.Option("--bytes", help="Share of the bytes of weights that decoding a token reads, in (0, 1].")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Share of the dense model's time, measured here, in (0, 1].")] = None,
    name: Annotated[str | None, typer.Option("--preset", help="Name of the preset to write; by default such as flops-0.6.")] = None,
    passes: Annotated[int, typer.Option(min=0, help="How often layers are measured again, all at the working point.")] = 4,
    latency_tokens: LatencyTokens = None,
    batch_size: BatchSize = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Spread a budget over layers by what each costs the model, and store the rules as a preset; give one of the four budgets."""
    from ..budget import AllocateConfig
    from ..pipeline import budget_checkpoint

    asked = {"flops": flops, "ffn_flops": ffn_flops, "bytes": bytes_, "latency": latency}
    given = {unit: fraction for unit, fraction in asked.items() if fraction is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of --flops, --ffn-flops, --bytes and --latency, got {len(given)}.")
    ((unit, fraction),) = given.items()
    return budget_checkpoint(
        directory,
        data=dataclasses.replace(data, seed=seed),
        config=AllocateConfig(unit=unit, fraction=fraction, passes=passes),
        preset=name or f"{unit.replace('_', '-')}-{fraction:g}",
        latency_tokens=latency_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=_terminal.make_progress(),
    )


def _evaluation_text(record: Mapping[str, Any]) -> str:
    """A table, tasks down and modes across, and the cost below: without the checksums and versions."""
    import io

    from rich.console import Console
    from rich.table import Table

    modes = list(record["results"])
    table = Table("task", "metric", *modes, "examples")
    for name, found in record["results"][modes[0]].items():
        for metric in (key for key in found if key != "examples"):
            cells = [f"{record['results'][mode][name][metric]:.4g}" for mode in modes]
            table.add_row(name, metric, *cells, str(found["examples"]))
    text = io.StringIO()
    Console(file=text, width=min(100, _terminal.width())).print(table)
    cost = ", ".join(f"{key} {value:.4g}" for key, value in record["cost"].items() if value is not None)
    return text.getvalue() + (f"of dense, while evaluating: {cost}" if cost else "a dense model: nothing is skipped")


@command(text=_evaluation_text)
def eval(
    directory: Annotated[Path, typer.Argument(help="Folder of a converted, thinned or dense language model with its tokenizer.")],
    *,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAMES|FILES|FOLDER", help="Tasks, a,b,c: names of lm-eval's own, .yaml files, .jsonl or .parquet questions."),
    ],
    preset: Annotated[str | None, typer.Option(help="Preset of the checkpoint; by default its own rules.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Evaluate the dense mode beside it.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Most examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward; above 1 padding counts in the active fraction.")] = 1,
    trust_tasks: Annotated[
        bool,
        typer.Option(
            "--trust-tasks", help="Let task files run Python code (functions, scripts, data sets) and any template; read them first."
        ),
    ] = False,
    dtype: DType = "float32",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> Any:
    """Evaluate a model with lm-evaluation-harness, offline, with what it cost beside the results."""
    from ..pipeline.harness import evaluate_checkpoint

    return evaluate_checkpoint(
        directory,
        tasks=tasks.split(","),
        preset=preset,
        dense=dense,
        limit=limit,
        batch_size=batch_size,
        trust_tasks=trust_tasks,
        dtype=dtype,
        device=device,
        out=out,
        progress=_terminal.make_progress(),
    )


_REPORT_DATA = {"max_tokens": 4096}  # seven points of a curve and four settings: minutes for a small model on two cores


@command()
@takes(
    "data",
    DataConfig,
    skip=("seed",),
    optional=("data",),
    defaults=_REPORT_DATA,
    build=functools.partial(data_or_none, **_REPORT_DATA),
    split="data_split",
)
def report(
    directory: Converted,
    *,
    data: DataConfig | None,
    curve: Annotated[
        Path | None, typer.Option(help="curve.json of a sweep; by default the one in or beside the folder, else one is measured on --data.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text: what each of its tokens costs, as tokens.html; with --data by default a sample.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image file: what each of its patches costs, as patches.png.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another checkpoint's curve of the same data, NAME=curve.json: a table at equal cost.")
    ] = None,
    within: Annotated[
        float | None, typer.Option(min=0, help="With --compare: loss against dense that is accepted, in units of the metric.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="With --data: active fractions, a,b,c, multiples of 0.05; by default 0.25,0.5,0.75.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time the points of a curve that is measured here.")] = True,
    batch_size: BatchSize = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and pictures; by default DIR/report.")] = None,
    seed: Seed = None,
) -> Any:
    """Write one HTML page: quality against cost, presets, routers; with --data also what is missing is measured, and what runs where."""
    from ..pipeline import PanelRequest, report_checkpoint

    fractions = None if targets is None else read_numbers(targets, option="--targets")
    request = PanelRequest(data=data and dataclasses.replace(data, seed=seed), text=text, image=image)
    options: dict[str, Any] = {
        "latency": latency,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "progress": _terminal.make_progress(),
    }
    curves = read_named_paths(compare or [], option="--compare", taken=directory.name)
    options["commands"] = [shlex.join(["moeify", *sys.argv[1:]])]
    return report_checkpoint(directory, curve=curve, out=out, request=request, compare=curves, within=within, targets=fractions, **options)
