"""What figures read off finished stages: curves of quality against cost, and where tokens spend it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from moeify._config import from_dict
from moeify._progress import NO_PROGRESS, Progress
from moeify.evaluate import CurvePoint
from moeify.hf.load import read_manifest
from moeify.pipeline.recipe import VALIDATION, ZTW, RecipeConfig
from moeify.pipeline.run_recipe import run_stages
from moeify.pipeline.stages import Stage

from .accounting import authors_flops_fractions
from .recipes import Curve, experiment, pretraining, started_from


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a call of the suite was asked for."""

    inputs: Mapping[str, Path]
    """Paths by name, of those that are there."""
    out: Path
    """Folder of the figures; stages are below it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, order of data and conversion."""
    smoke: bool = False
    """Every stage in seconds: does it run, not what it gives."""
    large: bool = False
    """The GPT is of GPT-2's size, for a GPU."""
    device: str = "cpu"
    """Where models run."""
    library: tuple[str, ...] = ()
    """Codes of the library that its stages are of, from `check_stages`."""
    wait: bool = True
    """For stages that other processes work on; if not, they are left to these (`StageTakenError`)."""
    progress: Progress = NO_PROGRESS
    """Told of every stage."""
    say: Callable[[str], None] = lambda _line: None
    """Told in a line what runs again and why."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One seed of an experiment."""

    seed: int
    """Which."""
    stages: Mapping[str, Stage]
    """By name, as `run_stages` has them."""
    recipe: RecipeConfig
    """With the model that it started from."""

    @property
    def seconds(self) -> float:
        """Of all its stages, each counted once; what other figures had run before is in it, too."""
        return sum({stage.key: stage.seconds for stage in self.stages.values()}.values())


def run_experiment(model: str, curves: Sequence[Curve], run: Run, *, stage: str, ztw: bool = False) -> list[Finished]:
    """Pre-train, train, convert and sweep for every seed; what is on disk is used.

    Args:
        model: "gpt", "bert" or "vit".
        curves: what to make.
        run: how.
        stage: the last stage.
        ztw: early exit, too.
    """
    recipe = experiment(model, curves, run.inputs, smoke=run.smoke, large=run.large, ztw=ztw)
    finished = []
    for seed in run.seeds:
        done = pretrain(model, run, seed=seed)
        started = started_from(recipe, done["dense"].folder / "model", seed=seed)
        folder = run.out / "stages" / recipe.name
        (stages,) = run_stages(started, folder, stage=stage, device=run.device, progress=run.progress, say=run.say, wait=run.wait)
        before = {f"pretrain.{name}": found for name, found in done.items()}
        finished.append(Finished(seed=seed, stages={**before, **stages}, recipe=started))
    return finished


def pretrain(model: str, run: Run, *, seed: int) -> dict[str, Stage]:
    """The stages of the model that everything starts from."""
    recipe = replace(pretraining(model, run.inputs, smoke=run.smoke, large=run.large), seeds=(seed,))
    folder = run.out / "stages" / recipe.name
    (stages,) = run_stages(recipe, folder, stage="dense", device=run.device, progress=run.progress, say=run.say, wait=run.wait)
    return stages


def measured_curves(curves: Sequence[Curve], finished: Sequence[Finished]) -> dict[str, Any]:
    """Quality against cost of every curve, as JSON values.

    Args:
        curves: what was asked for.
        finished: its seeds.

    Returns:
        "y": what the quality is, "loss" in nats or "accuracy"; "dense": of the model trained without anything, by seed; "ffn_share":
        dense FFN FLOPs over all; "curves": by name "label", "trained" (quality before conversion, by seed) and "points", for each seed
        a list of {"active", "ffn", "all", "authors_ffn", "authors_all", "y"}; fractions of the dense model that was not changed, of "ffn"
        those of the FFNs and replaced projections that were converted. Early exit, which executes no experts, has no "active" and no
        fractions of the FFNs, and "all" for both ways to count.
    """
    metric = finished[0].recipe.metric
    shown = _loss if metric == "perplexity" else float
    first = finished[0].stages[_sweep(curves[0].name)]
    dense_flops = _dense_flops(first)
    result: dict[str, Any] = {
        "y": "loss" if metric == "perplexity" else metric,
        "dense": [shown(one.stages["dense.quality"].result["quality"][VALIDATION]) for one in finished],
        "start": [shown(one.stages["start"].result["quality"][VALIDATION]) for one in finished],
        "ffn_share": _ffn_share(first),
        "curves": {},
    }
    for curve in curves:
        points = []
        for one in finished:
            sweep, converted = one.stages[_sweep(curve.name)], one.stages[f"convert.{curve.name}"]
            rows = [from_dict(CurvePoint, point) for point in sweep.result["points"]]
            scale = _dense_flops(sweep) / dense_flops
            authors = _authors(sweep, converted, scale)
            points.append([{**_row(point, shown, scale), **authors(point)} for point in sorted(rows, key=lambda p: p.flops_fraction)])
        trained = [shown(one.stages[f"sparsify.{curve.name}.quality"].result["quality"][VALIDATION]) for one in finished]
        result["curves"][curve.name] = {"label": curve.label, "trained": trained, "points": points}
    if (name := _sweep(ZTW)) in finished[0].stages:
        exits = [[_exit_row(point, shown) for point in one.stages[name].result["points"]] for one in finished]
        result["curves"][ZTW] = {"label": "ZTW", "trained": result["dense"], "points": exits}
    return result


def series(data: Mapping[str, Any], name: str, axis: str) -> list[list[tuple[float, float]]]:
    """A curve of `measured_curves` as points (cost, quality) by seed."""
    return [[(point[axis], point["y"]) for point in points] for points in data["curves"][name]["points"]]


def is_measured(data: Mapping[str, Any], axis: str) -> bool:
    """Whether every point of every curve has this cost; files from before it was stored have none."""
    return all(axis in point for curve in data["curves"].values() for points in curve["points"] for point in points)


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Between two distributions, in [0, 1]: the mean share by which tokens differ if those of both are put in order and paired (the earth
    mover's distance), to a bin's width."""
    sums = [[below / layer["tokens"] for below in accumulate(layer["histogram"])] for layer in (one, other)]
    return fmean(abs(a - b) for a, b in zip(*sums, strict=True))


def _sweep(name: str) -> str:
    return f"sweep.{name}.{VALIDATION}"


def _exit_row(point: Mapping[str, Any], shown: Callable[[float], float]) -> dict[str, float]:
    cost = point["flops_fraction"]
    return {"theta": point["theta"], "all": cost, "authors_all": cost, "y": shown(point["quality"])}


def _row(point: CurvePoint, shown: Callable[[float], float], scale: float) -> dict[str, float]:
    return {
        "active": point.active_fraction,
        "ffn": point.ffn_flops_fraction,
        "all": scale * point.flops_fraction,
        "y": shown(point.quality),
    }


def _authors(sweep: Stage, converted: Stage, scale: float) -> Callable[[CurvePoint], dict[str, float]]:
    manifest = read_manifest(converted.folder / "moe")
    sites, experts = [record.site for record in manifest.sites], [record.num_experts for record in manifest.sites]
    replaced = {name for record in manifest.projections for name in record.mlps}
    cost, dense_flops = _curve(sweep)["cost"], _dense_flops(sweep)

    def of(point: CurvePoint) -> dict[str, float]:
        ffn, whole = authors_flops_fractions(point, cost, sites, experts, dense_flops=dense_flops, replaced=replaced)
        return {"authors_ffn": ffn, "authors_all": scale * whole}

    return of


def _ffn_share(sweep: Stage) -> float:
    return float(_curve(sweep)["cost"]["ffn_dense"]) / _dense_flops(sweep)


def _dense_flops(sweep: Stage) -> float:
    """FLOPs a token of the model that was swept, run dense; replaced projections cost about what the layers did, not exactly."""
    return float(_curve(sweep)["dense"]["flops_per_token"])


def _curve(sweep: Stage) -> dict[str, Any]:
    curve: dict[str, Any] = json.loads((sweep.folder / "curve.json").read_text(encoding="utf-8"))
    return curve


def _loss(perplexity: float) -> float:
    return math.log(perplexity)
