"""A recipe from its first training step to its result file; every stage is kept, and none is done twice.

dense        the starting model measured, and trained without enforcement
sparsify     every variant trained
convert      every variant converted
finetune     every converted variant trained further
routers      their routers fitted, and rules calibrated, anew
control      the dense model trained for as many tokens as the main variant took in all of these
moefication  the same model in ReLU, trained for as many, converted by MoEfication
ztw          heads for early exit trained on the dense model, which stays as it is
sweep        quality against cost of every converted model
report       one JSON file and two pictures
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from .._config import did_you_mean
from .._progress import NO_PROGRESS, Progress
from ..data import DataConfig, check_source
from ..errors import ConfigError
from .content import content_of
from .names import torch_device
from .recipe import RecipeConfig
from .results import check_report, recipe_result, write_result
from .seed_run import SeedRun, evaluation_data
from .stages import Stage, Stages, StageTakenError

STAGES = ("dense", "sparsify", "convert", "finetune", "routers", "control", "moefication", "ztw", "sweep", "report")
"""In the order in which they run, each for all seeds and variants before the next."""


def run_recipe(
    recipe: RecipeConfig,
    out: Path,
    *,
    stage: str | None = None,
    device: str = "cpu",
    progress: Progress = NO_PROGRESS,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: what to do, from `read_recipe`.
        out: folder for all that it makes. What lies there of the same recipe is used where it would come out the same, and continued where
            it was killed; nothing there is deleted.
        stage: the last of `STAGES` to run; None runs all.
        device: "cpu", "cuda" or "cuda:1".
        progress: told of every stage, and what every stage tells.
        say: told in a line which stages are run again and why.

    Returns:
        What ``<out>/<name>.json`` holds, and the paths of all "files"; with ``stage``, the finished stages' results by name.

    Raises:
        MoeifyError: whatever a stage refuses; what was finished before stays.
    """
    last = _known_stage(stage)
    runs = _run_seeds(recipe, out, last=last, device=device, progress=progress, say=say)
    if last != "report":
        return {found.label: dict(found.result) for run in runs for found in run.done.values()}
    seconds = {found.label: found.seconds for run in runs for name, found in run.done.items() if name in run.timed}
    result = recipe_result(recipe, [run.found() for run in runs], seconds=seconds, device=torch_device(device).type)
    files = write_result(result, out)
    return {**result, "files": files}


def run_stages(
    recipe: RecipeConfig,
    out: Path,
    *,
    stage: str | None = None,
    device: str = "cpu",
    progress: Progress = NO_PROGRESS,
    say: Callable[[str], None] = lambda _line: None,
    wait: bool = True,
) -> list[dict[str, Stage]]:
    """Carry out a recipe's stages without its report, for whoever reads what they wrote: checkpoints, curves.

    Args:
        recipe, out, device, progress, say: as `run_recipe`.
        stage: the last of `STAGES` to run; None means the last before the report.
        wait: for stages that other processes work on in the same folder. If not, they are left to them, with what needs them.

    Returns:
        For each seed its finished stages, by name: "sparsify.relu", "sweep.relu.validation".

    Raises:
        MoeifyError: as `run_recipe`. StageTakenError: all that could be done is done, and something was left to other processes.
    """
    last = _known_stage(stage or STAGES[-2])
    runs = _run_seeds(recipe, out, last=last, device=device, progress=progress, say=say, wait=wait)
    return [dict(run.done) for run in runs]


def _known_stage(stage: str | None) -> str:
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage!r} is unknown{did_you_mean(stage, STAGES)}")
    return stage or STAGES[-1]


def _run_seeds(
    recipe: RecipeConfig, out: Path, *, last: str, device: str, progress: Progress, say: Callable[[str], None], wait: bool = True
) -> "list[SeedRun]":
    """Every stage up to ``last``, each for all seeds before the next."""
    torch_device(device)
    if last == "report":
        check_report()
    for data in (recipe.data, *evaluation_data(recipe).values()):
        _check_data(data, content_of(data.data))
    if _share_data(recipe.data, recipe.validation):
        say("[validation] has data that [data] trains on; give them different splits.")
    total = _count_stages(recipe, last)
    taken: StageTakenError | None = None
    with progress.task(f"{recipe.name}: stages", total=total) as overall:
        stages = Stages(out, owner=recipe.name, total=total, progress=progress, overall=overall, say=say, wait=wait)
        runs = [SeedRun(recipe, stages, seed=seed, device=device) for seed in recipe.seeds]
        for name in STAGES[: STAGES.index(last) + 1]:
            for run in runs:
                try:
                    getattr(run, name, _nothing)()
                except StageTakenError as error:  # later stages may not need it
                    taken = error
    if taken is not None:
        raise taken
    return runs


@lru_cache(maxsize=256)
def _check_data(data: DataConfig, _content: str | None) -> None:
    """`check_source`, once in a process: it reads a part of the data."""
    check_source(data)


def _nothing() -> None:
    """The report of all seeds is made at the end."""


def _share_data(one: DataConfig, other: DataConfig) -> bool:
    """Whether two configs name the same source and splits that overlap."""
    return (one.data, one.subset) == (other.data, other.subset) and (one.split == other.split or "all" in (one.split, other.split))


def _count_stages(recipe: RecipeConfig, last: str) -> int:
    tuned = [variant for variant in recipe.variant if variant.finetune]
    baseline = recipe.moefication is not None
    counts = {
        "dense": 3,
        "sparsify": 2 * len(recipe.variant),
        "convert": len(recipe.variant),
        "finetune": len(tuned) if recipe.finetune is not None else 0,
        "routers": len(tuned) if recipe.finetune is not None or recipe.routers is not None else 0,
        "control": 2,
        "moefication": 3 * baseline,
        "ztw": int(recipe.ztw is not None),
        "sweep": (len(recipe.variant) + baseline + (recipe.ztw is not None)) * len(evaluation_data(recipe)),
        "report": 0,
    }
    return len(recipe.seeds) * sum(counts[name] for name in STAGES[: STAGES.index(last) + 1])
