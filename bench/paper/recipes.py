"""The experiments of the figures as recipes: a base from a TOML file, with the curves that a figure asks for as its variants.

Every figure of a model starts from one pre-trained model a seed, and all share one folder of stages, which are found by what they are made
from: a variant that two figures draw is trained, converted and measured once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from moeify._config import to_dict
from moeify.errors import ConfigError
from moeify.pipeline.content import data_id, model_id
from moeify.pipeline.recipe import ModelConfig, RecipeConfig, read_recipe

from .code import checksum

HERE = Path(__file__).parent
NEEDS = {"gpt": (), "bert": ("minilm", "emotion"), "vit": ("fashion",)}
"""Inputs of each model."""
WEIGHTS = {"relu": 0.0, "relu_hoyer_low": 3e-4, "relu_hoyer": 1e-3, "relu_hoyer_high": 3e-3}
"""Of square-Hoyer in the trainings of figure 12; those of gpt.toml, which a test holds beside them."""
_DATA = {"gpt": "novels", "bert": "emotion", "vit": "fashion"}
_DECISIVE = ("accounting.py", "figures.py", "measure.py", "recipes.py", "*.toml")  # what decides numbers: not drawing, claims and page

_TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 6,
    "pad_token_id": 0,
}
_TINY = {
    "gpt": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64},
    "bert": _TINY_BERT,
    "vit": {"patch_size": 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


_LARGE = {
    "gpt_pretrain": (
        *(f"model.architecture.{size}" for size in ("n_embd=768", "n_layer=12", "n_head=12", "n_inner=3072", "n_positions=256")),
        *("data.window=256", "validation.window=256", "data.max_tokens=20_000_000", "validation.max_tokens=131_072"),
        *("train.steps=4000", "train.batch_sequences=64", "train.lr=6e-4", "train.warmup_steps=200"),
    ),
    "gpt": (
        *("data.window=256", "validation.window=256", "data.max_tokens=20_000_000", "validation.max_tokens=131_072"),
        *("train.steps=1000", "train.batch_sequences=64", "train.lr=2e-4", "train.warmup_steps=100"),
    ),
}
"""Settings of a GPT of 85 M parameters, for a GPU. Not yet run on one."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a figure: a way to train, and a way to convert."""

    name: str
    """Of the variant; letters, digits, '_' and '-'."""
    label: str
    """What the legend says."""
    training: str
    """Variant of the TOML file whose training it has."""
    moefication: bool = False
    """Converted as [moefication] says, not as [convert]."""
    convert: Mapping[str, Any] = field(default_factory=dict)
    """Further options to change of that conversion."""


def pretraining(model: str, inputs: Mapping[str, Path], *, smoke: bool = False, large: bool = False) -> RecipeConfig:
    """The recipe whose dense model is what the model's figures start from."""
    recipe = _read(f"{model}_pretrain", _data_settings(model, inputs), smoke=smoke, large=large)
    if model == "bert":
        if "minilm" in inputs:
            recipe = replace(recipe, model=ModelConfig(source=str(inputs["minilm"])))
        elif smoke:
            recipe = replace(recipe, model=ModelConfig(architecture=_TINY_BERT, tokenizer="bytes"))
    if smoke and recipe.model.architecture:
        recipe = replace(recipe, model=replace(recipe.model, architecture={**recipe.model.architecture, **_TINY[model]}))
    return recipe


def experiment(
    model: str, curves: Sequence[Curve], inputs: Mapping[str, Path], *, smoke: bool = False, large: bool = False, ztw: bool = False
) -> RecipeConfig:
    """The recipe of a figure: its curves as variants of the model's base, whose ``model`` is still to be put in; with early exit or not."""
    base = _read(model, _data_settings(model, inputs), smoke=smoke, large=large)
    trainings = {variant.name: variant for variant in base.variant}
    variants = []
    for curve in curves:
        if curve.training not in trainings:
            raise ConfigError(f"{model}.toml has no variant {curve.training!r}; it has {', '.join(trainings)}.")
        convert = dict(curve.convert)
        if curve.moefication:
            assert base.moefication is not None
            convert = {**convert, "config": {**to_dict(base.moefication.config), **convert.get("config", {})}}
        variants.append(replace(trainings[curve.training], name=curve.name, main=not variants, convert=convert))
    return replace(base, variant=tuple(variants), moefication=None, ztw=base.ztw if ztw else None)


def started_from(recipe: RecipeConfig, folder: Path, *, seed: int) -> RecipeConfig:
    """The recipe for one seed, starting from a pre-trained model."""
    return replace(recipe, model=replace(recipe.model, source=str(folder)), seeds=(seed,))


def identity(recipe: RecipeConfig) -> dict[str, Any]:
    """What decides a recipe's numbers as JSON: of files on this machine their content, not their place."""
    return {
        **to_dict(recipe),
        "seeds": None,  # a figure's own
        "model": model_id(recipe),
        "data": data_id(recipe.data),
        "validation": data_id(recipe.validation),
    }


@cache
def code_version(folder: Path = HERE) -> str:
    """A checksum of the files of this folder that decide numbers."""
    return checksum((path for pattern in _DECISIVE for path in folder.glob(pattern)), folder)


@cache
def drawing_version() -> str:
    """A checksum of what draws."""
    return checksum([HERE / "draw.py"], HERE)


def _read(name: str, settings: Sequence[str], *, smoke: bool, large: bool) -> RecipeConfig:
    return read_recipe(HERE / f"{name}.toml", settings=[*settings, *(_LARGE.get(name, ()) if large else ())], smoke=smoke)


def _data_settings(model: str, inputs: Mapping[str, Path]) -> list[str]:
    path = inputs.get(_DATA[model])
    return [] if path is None else [f"{table}.data={_quoted(path)}" for table in ("data", "validation")]


def _quoted(path: Path) -> str:
    """A TOML string."""
    text = str(path.resolve())
    return f"'{text}'" if "'" not in text else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
