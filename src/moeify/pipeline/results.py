"""What a recipe found, as one JSON object and two pictures; nothing is measured here."""

import importlib.util
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from .._config import from_dict, to_dict
from ..baselines.ztw import ExitPoint
from ..errors import DataError
from ..evaluate import CurvePoint
from ..hf.save import library_versions
from ..report import plot_nonzeros, plot_qualities, recipe_markdown
from .recipe import RecipeConfig
from .stages import write_json

SCHEMA = 1
"""Version of a recipe's result."""

_MOST_EXACT = 0.9  # of neurons: a pushed-down GELU underflows to 0 in 6 %, functions with exact zeros are 0 in half and more
_HEADLINE = ("start", "dense", "control", "sparsified", "moefication")


def recipe_result(recipe: RecipeConfig, seeds: Sequence[Mapping[str, Any]], *, seconds: Mapping[str, float], device: str) -> dict[str, Any]:
    """The result of a recipe from those of its seeds.

    Args:
        recipe: what was run.
        seeds: for each seed, in order, what `run_recipe` collected: "seed", "start", "dense", "control", "sparsified", "moefication",
            "points", "moefication_points", "ztw_points", "at_flops", "at_all_flops", "variants", "extra_evaluations", "train_tokens",
            "control_tokens", "main_s".
        seconds: training and conversion time by stage, all seeds together.
        device: where it ran.

    Returns:
        JSON values. Numbers are means over the seeds, None where a seed has none. Points are means over those that stand at the same place
        of their curves; where seeds have curves of different lengths (two targets may fall on the same point), they are the first seed's.
    """
    mean = mean_of([{key: value for key, value in seed.items() if key != "seed"} for seed in seeds])
    result = {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "metric": recipe.metric,
        **{key: mean.get(key) for key in _HEADLINE},
        "points": mean["points"],
        "moefication_points": mean["moefication_points"],
        "ztw_points": mean["ztw_points"],
        "at_flops": mean["at_flops"],
        "at_all_flops": mean["at_all_flops"],
        "variants": mean["variants"],
        "extra_evaluations": mean["extra_evaluations"],
        "seeds": [seed["seed"] for seed in seeds],
        "train_tokens": round(mean["train_tokens"]),
        "control_tokens": round(mean["control_tokens"]),
        "commit": source_commit(),
        "wall_s": sum(seconds.values()),
        "main_wall_s": mean["main_s"],
        "stage_wall_s": dict(seconds),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "config": _without_folders(to_dict(recipe)),
    }
    if len(seeds) > 1:
        result["spread"] = {key: _spread([seed.get(key) for seed in seeds]) for key in _HEADLINE}
        result["per_seed"] = [dict(seed) for seed in seeds]
    return result


def check_report() -> None:
    """Refuse, before hours of work, a report that could not draw its pictures.

    Raises:
        DataError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("a recipe's report needs matplotlib; pip install 'moeify[report]', or stop before it: --stage sweep.")


def write_result(result: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Write ``<recipe>.json``, its tables as ``<recipe>.md``, and its pictures, ``<recipe>_curves`` and ``<recipe>_nonzeros``, as .png and
    .svg.

    Returns:
        Paths of the files, by kind.

    Raises:
        OSError, DataError: a file cannot be written; the JSON file is the first.
    """
    name, metric = result["recipe"], result["metric"]
    files = {"result": out / f"{name}.json", "tables": out / f"{name}.md"}
    write_json(files["result"], result)
    pictures = "".join(f"\n![{kind}]({name}_{kind}.png)\n" for kind in ("curves", "nonzeros"))
    files["tables"].write_text(f"# {name}\n\n{recipe_markdown(result)}{pictures}", encoding="utf-8")
    curves = {variant: _points(found["points"]) for variant, found in result["variants"].items()}
    curves["MoEfication"] = _points(result["moefication_points"])
    early = [from_dict(ExitPoint, point) for point in result["ztw_points"]]
    levels = {"dense": result["dense"], "control": result["control"]}
    for kind in ("png", "svg"):
        files[f"curves_{kind}"] = out / f"{name}_curves.{kind}"
        plot_qualities(curves, files[f"curves_{kind}"], metric=metric, levels=levels, title=name, early=early)
        files[f"nonzeros_{kind}"] = out / f"{name}_nonzeros.{kind}"
        plot_nonzeros(_nonzeros(result["variants"]), files[f"nonzeros_{kind}"], title=name)
    return {kind: str(path) for kind, path in files.items()}


def mean_of(values: Sequence[Any]) -> Any:
    """The mean of JSON values of one shape: of numbers where they stand, None where one is missing; anything else, and lists of different
    lengths, as the first has it."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return first if all(value == first for value in values) else fmean(values)
    if all(isinstance(value, Mapping) for value in values):
        return {key: mean_of([value[key] for value in values if key in value]) for key in first}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [mean_of(items) for items in zip(*values, strict=True)]
    return first


def _spread(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None where the recipe has no such number."""
    present = [value for value in values if value is not None]
    return stdev(present) if len(present) > 1 else None


def _points(points: Sequence[Mapping[str, Any]]) -> list[CurvePoint]:
    return [from_dict(CurvePoint, point) for point in points]


def _nonzeros(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Means by layer for the picture: of exact non-zeros where a variant has many zeros, else of values that are not near zero."""
    counts = {}
    for name, found in variants.items():
        # GELU and SiLU underflow to zero now and then
        exact = sum(found["nonzeros"].values()) < _MOST_EXACT * sum(found["neurons"].values())
        counts[name if exact else f"{name} (|h| > {found['eps']:g})"] = list((found["nonzeros"] if exact else found["active"]).values())
    return counts


def source_commit() -> str | None:
    """The commit that the library is run from, with "+" where files differ from it; None outside of a git checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def _without_folders(value: Any) -> Any:
    """A recipe without the folders of this machine: a path is its last two parts."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return "/".join(Path(value).parts[-2:])
    return value
