"""Commands that train: sparsify, pretrain and whole recipes."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _config, _terminal
from ..data import AugmentConfig, DataConfig
from ..errors import ConfigError
from ..pipeline import STAGES, TASKS
from ..pipeline.builtin import recipe_names
from ..sparsity import EnforcementConfig
from ..train.distill import DistillConfig
from ..train.loop import TrainConfig
from ..train.sparsify import SparsifyConfig
from ._app import command
from .options import Attention, Device, DType, Model, Patterns, Seed, read_object, read_projections, takes, takes_projections


def _built_in(*, training: bool) -> str:
    names = [name for name in recipe_names() if name.startswith("pretrain/") == training]
    return ", ".join(name.removeprefix("pretrain/") for name in names) or "none here"


@command(resumes=lambda _values: True)
@takes("data", DataConfig, skip=("seed", "split", "max_tokens"))
@takes("config", SparsifyConfig, skip=("enforcement", "distill", "policy"))
@takes(
    "enforcement",
    EnforcementConfig,
    skip=("layer_weights", "eps"),
    schedule="weight_schedule",
    warmup_frac="weight_warmup_frac",
)
@takes("distillation", DistillConfig, **{field: f"distill_{field}" for field in _config.field_docs(DistillConfig)})
@takes("train", TrainConfig, skip=("batch_sequences", "save_every", "save_frac", "betas", "seed", "expert_parallel"))
@takes("augment", AugmentConfig)
@takes_projections
def sparsify(
    model: Model,
    *,
    data: DataConfig,
    config: SparsifyConfig,
    enforcement: EnforcementConfig,
    distillation: DistillConfig,
    train: TrainConfig,
    augment: AugmentConfig,
    distilling: dict[str, Any],
    out: Annotated[Path, typer.Option(help="New folder for the trained checkpoint.")],
    attention: Attention = None,
    patterns: Patterns = None,
    data_split: Annotated[str, typer.Option(help=_config.field_docs(DataConfig)["split"])] = "train",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most training tokens, rounded down to whole windows.")] = None,
    validation: Annotated[str | None, typer.Option(help="What to measure on, as --data; by default --data itself.")] = None,
    validation_split: Annotated[str, typer.Option(help="Part of it to measure on.")] = "validation",
    validation_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to measure on.")] = 100_000,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(TASKS), help="What to train for; by default what the model's head is for. Another gives it a new head."
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an optimizer step, rounded down to whole windows; for windows of text.")
    ] = None,
    batch_sequences: Annotated[
        int | None, typer.Option(min=1, help=f"Instead: sequences of an optimizer step; {TrainConfig.batch_sequences} by default.")
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between saved states, which a killed run continues from; by default a twentieth of the run, or more."
        ),
    ] = None,
    layer_weights: Annotated[
        str | None, typer.Option(help="JSON object, or the path of one. " + _config.field_docs(EnforcementConfig)["layer_weights"])
    ] = None,
    activation_policy: Annotated[
        str | None, typer.Option(help="JSON object, or the path of one. " + " ".join(_config.field_docs(SparsifyConfig)["policy"].split()))
    ] = None,
    distill: Annotated[bool, typer.Option("--distill", help="Learn from the model as it was, too.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard: loss, penalties and evaluations by step; needs moeify[train].")
    ] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result, and the state of another run to it.")] = False,
    seed: Seed = None,
) -> Any:
    """Train a dense model so that most of its activations are zero; convert then makes more of it."""
    from ..pipeline import sparsify_checkpoint

    if batch_tokens is not None and batch_sequences is not None:
        raise ConfigError("give --batch-tokens or --batch-sequences, not both.")
    if not distill and distillation != DistillConfig():
        raise ConfigError("options that begin with --distill- need --distill.")
    data = dataclasses.replace(data, split=data_split, max_tokens=max_tokens, seed=seed)
    enforcement = dataclasses.replace(enforcement, layer_weights=read_object(layer_weights, option="--layer-weights"))
    return sparsify_checkpoint(
        model,
        out,
        data=data,
        config=dataclasses.replace(
            config,
            policy=read_object(activation_policy, option="--activation-policy"),
            enforcement=enforcement,
            distill=distillation if distill else None,
        ),
        train=dataclasses.replace(
            train, batch_sequences=batch_sequences or TrainConfig.batch_sequences, save_every=save_every, seed=seed or 0
        ),
        task=task,
        validation=dataclasses.replace(data, data=validation or data.data, split=validation_split, max_tokens=validation_tokens, seed=None),
        augment=augment,
        batch_tokens=batch_tokens,
        projections=read_projections(attention, patterns, distilling, seed=seed or 0),
        tensorboard=tensorboard,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        progress=_terminal.make_progress(),
    )


def _pretrain_text(result: Mapping[str, Any]) -> Any:
    """What came out, without what was noted at every step."""
    flops = result["flops"]
    shown = {key: result[key] for key in ("name", "task", "parameters", "tokens", "epochs", "seconds", "evaluation")}
    steps = {key: flops[key] for key in ("dense_steps", "sparse_steps", "total_flops", "all_dense_flops", "gain")}
    return {**shown, "training": {**steps, "fallbacks": len(result["fallbacks"])}}


@command(resumes=lambda _values: True, text=_pretrain_text)
def pretrain(
    recipe: Annotated[Path, typer.Argument(help=f"TOML file, or one of {_built_in(training=True)}.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the checkpoint; a killed run continues there. By default the recipe's name.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change an option of the recipe, such as train.steps=500; may be repeated."),
    ] = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result, and the state of another run to it.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that processes under torchrun wait for one that does not answer.")] = 1800.0,
) -> Any:
    """Train a model from random weights, dense or by switchable sparse-dense pre-training. SIGTERM and Ctrl-C finish the step and save.
    Under torchrun on several processes."""
    from ..pipeline import pretrain as run_pretrain
    from ..pipeline import read_pretrain
    from ..train.parallel import started_rank

    chosen = read_pretrain(recipe, settings=set_ or ())
    result = run_pretrain(
        chosen,
        out or Path(chosen.name),
        device=device,
        overwrite=overwrite,
        timeout_s=timeout,
        progress=_terminal.make_progress(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return _config.to_dict(result) if started_rank() == 0 else None


def _recipe_text(result: Mapping[str, Any]) -> Any:
    """The tables of a finished recipe; of some stages, what they found, without what they noted at every step or in every layer."""
    if "files" not in result:
        shown = ("quality", "points")
        return {
            stage: {key: value for key, value in found.items() if key in shown or isinstance(value, (str, int, float))}
            for stage, found in result.items()
        }
    from ..report import recipe_markdown

    return "\n".join([recipe_markdown(result), *(f"{kind}: {path}" for kind, path in result["files"].items())])


@command(resumes=lambda _values: True, text=_recipe_text)
def pipeline(
    recipe: Annotated[Path, typer.Argument(help=f"TOML file, or one of {_built_in(training=False)}.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the recipe's stages and result; what it holds of them is used and continued.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change an option of the recipe, such as model.source=PATH; may be repeated."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help=f"Stop after this stage: {', '.join(STAGES)}."),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Shrink every stage to seconds: does it run, not what does it give.")] = False,
    device: Device = "cpu",
) -> Any:
    """Carry out a recipe: train, make sparse, convert, tune and measure a model and its baselines."""
    from ..pipeline import read_recipe, run_recipe

    chosen = read_recipe(recipe, settings=set_ or (), smoke=smoke)
    return run_recipe(
        chosen,
        out,
        stage=stage,
        device=device,
        progress=_terminal.make_progress(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
