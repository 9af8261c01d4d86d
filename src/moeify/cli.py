"""The command line: options from the configs' docstrings, one call of the pipeline a command, one line for an error.

Nothing is decided here. Results go to stdout, everything else (progress, warnings, errors) to stderr.
"""

import dataclasses
import inspect
import json
import os
import re
import shlex
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from . import _config
from ._terminal import make_progress, show
from .convert import ConvertConfig
from .data import AugmentConfig, DataConfig
from .errors import ConfigError, MoeifyError, StoppedError, is_out_of_memory
from .export import OnnxConfig
from .pipeline import METHODS, STAGES, TASKS, CalibrationConfig, ChannelMethod, NeuronConfig, ProjectionsConfig
from .routers import ROUTERS, GateRouterConfig, LowRankRouterConfig, NormRouterConfig
from .select import RULES, RuleConfig
from .serving import ServeConfig
from .sparsity import EnforcementConfig
from .split import SPLITS
from .thin import ThinConfig
from .train.distill import DistillConfig
from .train.fit import RouterTrainConfig
from .train.loop import TrainConfig
from .train.sparsify import SparsifyConfig

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130
_MEMORY_OPTIONS = ("micro_sequences", "batch_size", "window", "max_tokens", "max_new_tokens")

_RECIPE_MEMORY = ("train.micro_sequences=1", "train.gradient_checkpointing=true", "sweep.batch_size=1")  # nothing done is lost by them

app = typer.Typer(
    name="moeify",
    help="Turn dense Transformers into dynamic-k mixtures of experts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a dense model.")]
Converted = Annotated[Path, typer.Argument(help="Folder that `moeify convert` or `moeify thin` wrote.")]
DType = Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="Type of the weights.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Where the model runs.")]
LatencyTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of each timed forward; by default 1, a decoding step, of a model that generates, else a sequence."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Seed of everything random, document order included; without it, 0 and the source's order."),
]


def _signed(
    function: Callable[..., Any], *, like: Callable[..., Any], drop: Sequence[str] = (), add: Sequence[inspect.Parameter] = ()
) -> Callable[..., Any]:
    """``function`` under the name and signature of ``like``, some parameters exchanged: what typer reads."""
    own = [p for p in inspect.signature(like).parameters.values() if p.name not in drop]
    # All by keyword, as typer calls: so required options may stand first, whatever config they come from.
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *add)]
    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    function.__name__, function.__doc__ = like.__name__, like.__doc__
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _option_type(hint: Any) -> tuple[type, Callable[[Any], Any] | None, str | None]:
    """The type of an option, its parser where "none" is a value, and what help shows as its value; a flag has none."""
    if hint is bool:
        return bool, None, None
    if typing.get_origin(hint) is Literal:
        return str, None, "|".join(typing.get_args(hint))  # from_dict names the choices if it is none of them
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, None, hint.__name__.upper()
    (plain,) = (option for option in typing.get_args(hint) if option is not type(None))

    def parse(text: Any) -> Any:
        if str(text).lower() == "none":
            return None
        try:
            return plain(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is neither {plain.__name__} nor none.") from error

    return plain, parse, plain.__name__.upper()


def takes(
    parameter: str, config: type, *, skip: Sequence[str] = (), optional: Sequence[str] = (), build: Any = None, **names: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a command's ``parameter`` by one option per field of ``config``, helped by the field's docstring.

    Args:
        parameter: keyword of the command that receives the config.
        config: config dataclass whose fields are scalars.
        skip: fields that keep their default.
        optional: required fields that may be left out; they are None then, and it is for ``build`` to take that.
        build: makes of the dictionary of fields what the command receives; None: the config.
        names: option name of a field where it is not the field's own.
    """
    docs, hints = _config.field_docs(config), typing.get_type_hints(config)
    fields = {names.get(f.name, f.name): f for f in dataclasses.fields(config) if f.name not in skip}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def command(**values: Any) -> Any:
            chosen = {field.name: values.pop(option) for option, field in fields.items()}
            return function(**values, **{parameter: _config.from_dict(config, chosen) if build is None else build(chosen)})

        options = []
        for option, field in fields.items():
            help_text = " ".join(docs[field.name].split())
            annotation, parser, metavar = _option_type(hints[field.name])
            info = typer.Option("--" + option.replace("_", "-"), help=help_text, parser=parser, metavar=metavar)
            default = field.default
            if default is dataclasses.MISSING:
                default = None if field.name in optional else inspect.Parameter.empty
            hint: Any = annotation if default is not None else annotation | None
            options.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]))
        return _signed(command, like=function, drop=(parameter,), add=options)

    return decorate


def _data_or_none(fields: Mapping[str, Any]) -> DataConfig | None:
    """The data, or None where none is named and so nothing is said of it."""
    if fields["data"] is not None:
        return _config.from_dict(DataConfig, fields)
    defaults = {f.name: f.default for f in dataclasses.fields(DataConfig)}
    if given := [name for name, value in fields.items() if name != "data" and value != defaults[name]]:
        raise ConfigError(
            f"{_options_text([f'data_{name}' if name == 'split' else name for name in given])} without --data; name the data."
        )
    return None


Attention = Annotated[
    str | None, typer.Option(metavar="q,k,v,o", help="Attention projections to replace by MLPs of equal cost first; any of the four.")
]
Patterns = Annotated[
    list[str] | None,
    typer.Option("--projections", metavar="NAME|re:PATTERN", help="Further linear layers to replace, by module path; may be given again."),
]
"""Of commands that replace linear layers."""

takes_projections = takes(
    "distilling",
    ProjectionsConfig,
    skip=("attention", "patterns", "seed"),
    build=dict,
    **{name: f"projection_{name}" for name in _config.field_docs(ProjectionsConfig)},
)
"""How they are distilled: "projection" in front of the options' names."""


def _projections(attention: str | None, patterns: Sequence[str] | None, options: dict[str, Any], *, seed: int) -> ProjectionsConfig | None:
    """The config of the layers to replace; None where none is named."""
    if attention is None and not patterns:
        defaults = {f.name: f.default for f in dataclasses.fields(ProjectionsConfig)}
        if changed := next((name for name, value in options.items() if value != defaults[name]), None):
            raise ConfigError(f"--projection-{changed.replace('_', '-')} needs --attention or --projections.")
        return None
    named = tuple(role.strip() for role in attention.split(",")) if attention is not None else ()
    chosen = {**options, "attention": named, "patterns": tuple(patterns or ()), "seed": seed}
    return _config.from_dict(ProjectionsConfig, chosen, where="--attention" if patterns is None else "")


def command(
    *, resumes: Callable[[Mapping[str, Any]], bool] = lambda _values: False, text: Callable[[Any], Any] = lambda result: result
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function that returns a JSON-like result, or None to print nothing, to the command line, with ``--json`` and ``--debug``.

    Args:
        resumes: whether the command, interrupted with these values of its options, continues when run again.
        text: of a result, what people see of it without ``--json``.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def run_command(*, json_: bool, debug: bool, **values: Any) -> None:
            try:
                result = function(**values)
            except KeyboardInterrupt as error:
                way_out = "; the same command again continues where it stopped." if resumes(values) else "."
                raise _Interrupted(f"interrupted{way_out}") from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MoeifyError(_out_of_memory(error, options=values)) from error
            if result is not None:
                show(result if json_ else text(result), as_json=json_)

        as_json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value.")]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        kind = inspect.Parameter.KEYWORD_ONLY
        flags = [
            inspect.Parameter("json_", kind, default=False, annotation=as_json),
            inspect.Parameter("debug", kind, default=False, annotation=debug),
        ]
        app.command()(_signed(run_command, like=function, add=flags))
        return function

    return add


def _recipe_text(result: Mapping[str, Any]) -> Any:
    """The tables of a finished recipe; of some stages, what they found, without what they noted at every step or in every layer."""
    if "files" not in result:
        shown = ("quality", "points")
        return {
            stage: {key: value for key, value in found.items() if key in shown or isinstance(value, (str, int, float))}
            for stage, found in result.items()
        }
    from .report import recipe_markdown

    return "\n".join([recipe_markdown(result), *(f"{kind}: {path}" for kind, path in result["files"].items())])


@command()
@takes("data", DataConfig, skip=("seed",), split="data_split")
def profile(
    model: Model,
    *,
    data: DataConfig,
    eps: Annotated[float, typer.Option(help="A neuron is near zero on a token where its absolute activation is at most this.")] = 1e-3,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Measure how sparse the activations of every FFN are."""
    from .pipeline import profile_checkpoint

    data = dataclasses.replace(data, seed=seed)
    profiles = profile_checkpoint(model, data=data, eps=eps, dtype=dtype, device=device, progress=make_progress())
    return {name: profile.summary() for name, profile in profiles.items()}


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
@takes("train", TrainConfig, skip=("batch_sequences", "save_every", "betas", "seed", "expert_parallel"))
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
        typer.Option(min=1, help="Steps between saved states, which a killed run continues from; by default a twentieth of the run."),
    ] = None,
    layer_weights: Annotated[
        str | None, typer.Option(help="JSON object, or the path of one. " + _config.field_docs(EnforcementConfig)["layer_weights"])
    ] = None,
    activation_policy: Annotated[
        str | None, typer.Option(help="JSON object, or the path of one. " + " ".join(_config.field_docs(SparsifyConfig)["policy"].split()))
    ] = None,
    distill: Annotated[bool, typer.Option("--distill", help="Learn from the model as it was, too.")] = False,
    dtype: DType = "float32",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result, and the state of another run to it.")] = False,
    seed: Seed = None,
) -> Any:
    """Train a dense model so that most of its activations are zero; convert then makes more of it."""
    from .pipeline import sparsify_checkpoint

    if batch_tokens is not None and batch_sequences is not None:
        raise ConfigError("give --batch-tokens or --batch-sequences, not both.")
    if not distill and distillation != DistillConfig():
        raise ConfigError("options that begin with --distill- need --distill.")
    data = dataclasses.replace(data, split=data_split, max_tokens=max_tokens, seed=seed)
    enforcement = dataclasses.replace(enforcement, layer_weights=_json_object(layer_weights, option="--layer-weights"))
    return sparsify_checkpoint(
        model,
        out,
        data=data,
        config=dataclasses.replace(
            config,
            policy=_json_object(activation_policy, option="--activation-policy"),
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
        projections=_projections(attention, patterns, distilling, seed=seed or 0),
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        progress=make_progress(),
    )


@command(resumes=lambda _values: True)
@takes("data", DataConfig, skip=("seed",), split="data_split")
@takes("calibration", CalibrationConfig, skip=("max_tokens", "window", "router", "seed"))
@takes("training", RouterTrainConfig, skip=("seed",), epochs="router_epochs", batch_tokens="router_batch_tokens", lr="router_lr")
@takes_projections
def convert(
    model: Model,
    *,
    data: DataConfig,
    calibration: CalibrationConfig,
    training: RouterTrainConfig,
    distilling: dict[str, Any],
    out: Annotated[Path, typer.Option(help="New folder for the converted checkpoint.")],
    attention: Attention = None,
    patterns: Patterns = None,
    expert_size: Annotated[int, typer.Option(help=_config.field_docs(ConvertConfig)["expert_size"])] = ConvertConfig.expert_size,
    projection_expert_size: Annotated[
        int, typer.Option(help=_config.field_docs(ConvertConfig)["projection_expert_size"])
    ] = ConvertConfig.projection_expert_size,
    projection_router_width: Annotated[int, typer.Option(help="Hidden width of the norm routers of replaced projections.")] = 16,
    router: Annotated[str, typer.Option(help=f"Router: {', '.join(ROUTERS)}.")] = "norm",
    router_width: Annotated[int | None, typer.Option(help="Hidden width of the norm router.")] = None,
    router_output: Annotated[
        str | None, typer.Option(metavar="exp|abs", help="Of the norm router. " + _config.field_docs(NormRouterConfig)["output"])
    ] = None,
    router_scale: Annotated[
        str | None, typer.Option(metavar="none|up|output", help="Of the gate router. " + _config.field_docs(GateRouterConfig)["scale"])
    ] = None,
    router_rank: Annotated[
        int | None, typer.Option(help="Of the lowrank router. " + _config.field_docs(LowRankRouterConfig)["rank"])
    ] = None,
    split: Annotated[str, typer.Option(help=f"How neurons are grouped into experts: {', '.join(SPLITS)}.")] = "coactivation",
    rule: Annotated[str, typer.Option(help=f"Selection rule to calibrate: {', '.join(RULES)}.")] = "threshold",
    always_on: Annotated[int, typer.Option(help=_config.field_docs(ConvertConfig)["always_on"])] = ConvertConfig.always_on,
    policy: Annotated[str | None, typer.Option(help="Exceptions by FFN name: JSON, or the path of a JSON file.")] = None,
    weights: Annotated[
        str, typer.Option(metavar="float|int8", help="Type of the experts' weights; int8 loads with moeify only, not as a dense model.")
    ] = "float",
    dtype: DType = "float32",
    device: Device = "cpu",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Hold one layer of the model in memory at a time; by default where the weights do not fit, and under torchrun.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in the output folder.")] = False,
    seed: Seed = None,
) -> Any:
    """Turn a dense model into a dynamic-k mixture of experts."""
    from .pipeline import convert_checkpoint
    from .train.parallel import started_rank

    options = {"width": router_width, "output": router_output, "scale": router_scale, "rank": router_rank}
    given = {name: value for name, value in options.items() if value is not None}
    config = ConvertConfig(
        expert_size=expert_size,
        projection_expert_size=projection_expert_size,
        projection_router=NormRouterConfig(width=projection_router_width),
        router=_config.from_dict(_config.lookup(ROUTERS, router, where="--router")[0], given, where=f"--router {router}"),
        split=_config.lookup(SPLITS, split, where="--split")(),
        rule=cast(RuleConfig, _config.lookup(RULES, rule, where="--rule").all_on()),
        always_on=always_on,
        policy=_json_object(policy, option="--policy"),
        seed=seed or 0,
    )
    data = dataclasses.replace(data, seed=seed)
    calibration = dataclasses.replace(calibration, router=training, max_tokens=data.max_tokens, window=data.window, seed=seed or 0)
    result = convert_checkpoint(
        model,
        out,
        data=data,
        config=config,
        calibration=calibration,
        dtype=dtype,
        device=device,
        weights=weights,
        projections=_projections(attention, patterns, distilling, seed=seed or 0),
        overwrite=overwrite,
        stream=stream,
        progress=make_progress(),
    )
    return result if started_rank() == 0 else None


_CHANNELS = [name for name, method in METHODS.items() if isinstance(method, ChannelMethod)]
_NEURONS = [name for name in METHODS if name not in _CHANNELS]
_THIN_DOCS = {name: " ".join(doc.split()) for name, doc in _config.field_docs(ThinConfig).items()}


@command(resumes=lambda values: values["method"] in _NEURONS)
@takes("data", DataConfig, skip=("seed",), split="data_split")
@takes("options", ThinConfig, skip=("skip_frac", "score", "allocate", "roles", "seed"), build=dict)
def thin(
    model: Model,
    *,
    data: DataConfig,
    options: dict[str, Any],
    out: Annotated[Path, typer.Option(help="New folder: the dense checkpoint, with what decides beside the weights.")],
    target: Annotated[
        float,
        typer.Option(
            help=f"Wanted share that is skipped, in [0, 1): of input channels, the mean over layers by their parameters; with "
            f"{', '.join(_NEURONS)} of the neurons of each FFN."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS),
            help=f"What is skipped, and how: input channels of linear layers ({', '.join(_CHANNELS)}; teal and magnitude are the same), or "
            f"neurons of FFNs ({', '.join(_NEURONS)}; cats and chess need a gate).",
        ),
    ] = next(iter(METHODS)),
    allocate: Annotated[
        str | None,
        typer.Option(help=f"Of channels. {_THIN_DOCS['allocate']} By default 'shared' with 'sensitivity', else 'uniform'."),
    ] = None,
    roles: Annotated[str | None, typer.Option(metavar="A,B", help=f"Of channels; by default all. {_THIN_DOCS['roles']}")] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")] = False,
    seed: Seed = None,
) -> Any:
    """Let a dense model skip the input channels, or the neurons, that matter little to a token; nothing is trained."""
    from .pipeline import thin_checkpoint

    chosen = _config.lookup(METHODS, method, where="--method")
    config: ThinConfig | NeuronConfig
    if isinstance(chosen, ChannelMethod):
        options |= {"skip_frac": target, "score": chosen.score, "allocate": allocate or chosen.allocate, "seed": seed or 0}
        config = _config.from_dict(ThinConfig, {**options, **({} if roles is None else {"roles": roles.split(",")})})
    else:
        defaults = {"allocate": None, "roles": None} | {f.name: f.default for f in dataclasses.fields(ThinConfig) if f.name in options}
        given = [name for name, value in {**options, "allocate": allocate, "roles": roles}.items() if value != defaults[name]]
        if given:
            raise ConfigError(
                f"--method {method} skips neurons of FFNs, the same share in each: leave out {_options_text(given)}, which "
                f"{'is' if len(given) == 1 else 'are'} for channels ({', '.join(_CHANNELS)})."
            )
        config = NeuronConfig(method=method, skip_frac=target, seed=seed or 0)
    return thin_checkpoint(
        model,
        out,
        data=dataclasses.replace(data, seed=seed),
        config=config,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        progress=make_progress(),
    )


@command()
def quantize(
    directory: Converted,
    *,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint with int8 weights.")],
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of all other weights; auto keeps the checkpoint's.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in the output folder.")] = False,
) -> Any:
    """Give the experts of a converted model, or the layers of a thinned one, int8 weights; the result loads with moeify only."""
    from .pipeline import quantize_checkpoint

    return quantize_checkpoint(directory, out, dtype=dtype, overwrite=overwrite, progress=make_progress())


@command()
@takes("data", DataConfig, skip=("seed",), optional=("data",), build=_data_or_none, split="data_split")
@takes("onnx", OnnxConfig, skip=("batch_size",))
def export(
    directory: Converted,
    *,
    to: Annotated[str, typer.Option(metavar="onnx|dense|qwen2-moe|mixtral", help="What to write.")],
    out: Annotated[Path, typer.Option(help="New folder for it.")],
    data: DataConfig | None,
    onnx: OnnxConfig,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Of qwen2-moe and mixtral: experts per token; by default that of the rule topk.")
    ] = None,
    shared: Annotated[
        int | None, typer.Option(min=1, help="Of qwen2-moe: experts among them that always run; by default what holds most on the data.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the weights; auto keeps the checkpoint's.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in the output folder.")] = False,
) -> Any:
    """Write a converted model for those who have no moeify: ONNX with dynamic k, dense, or a fixed-k mixture that other engines run."""
    from .pipeline import export_checkpoint

    return export_checkpoint(
        directory, out, to=to, k=k, shared=shared, data=data, onnx=onnx, dtype=dtype, overwrite=overwrite, progress=make_progress()
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
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward.")] = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Where to write curve.json.")] = None,
    seed: Seed = None,
) -> Any:
    """Measure quality against cost at several knob values of one converted model."""
    from .pipeline import sweep_checkpoint

    numbers = None if values is None else _numbers(values, option="--values")
    fractions = None if targets is None else _numbers(targets, option="--targets")
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
        out=out,
        progress=make_progress(),
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
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward.")] = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Calibrate named operating points on half of the data, measure them on the other half, and store them in the checkpoint."""
    from .pipeline import preset_checkpoint

    return preset_checkpoint(
        directory,
        data=dataclasses.replace(data, seed=seed),
        fractions=None if at is None else _named_numbers(at, option="--at"),
        latency=latency,
        latency_tokens=latency_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=make_progress(),
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
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward.")] = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Spread a budget over layers by what each costs the model, and store the rules as a preset; give one of the four budgets."""
    from .budget import AllocateConfig
    from .pipeline import budget_checkpoint

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
        progress=make_progress(),
    )


@command(resumes=lambda _values: True, text=_recipe_text)
def pipeline(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see docs/recipes.md.")],
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
    from .pipeline import read_recipe, run_recipe

    chosen = read_recipe(recipe, settings=set_ or (), smoke=smoke)
    return run_recipe(
        chosen, out, stage=stage, device=device, progress=make_progress(), say=lambda line: print(line, file=sys.stderr, flush=True)
    )


def _pretrain_text(result: Mapping[str, Any]) -> Any:
    """What came out, without what was noted at every step."""
    flops = result["flops"]
    shown = {key: result[key] for key in ("name", "task", "parameters", "tokens", "epochs", "seconds", "evaluation")}
    steps = {key: flops[key] for key in ("dense_steps", "sparse_steps", "total_flops", "all_dense_flops", "gain")}
    return {**shown, "training": {**steps, "fallbacks": len(result["fallbacks"])}}


@command(resumes=lambda _values: True, text=_pretrain_text)
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see docs/pretraining.md.")],
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
    from .pipeline import pretrain as run_pretrain
    from .pipeline import read_pretrain
    from .train.parallel import started_rank

    chosen = read_pretrain(recipe, settings=set_ or ())
    result = run_pretrain(
        chosen,
        out or Path(chosen.name),
        device=device,
        overwrite=overwrite,
        timeout_s=timeout,
        progress=make_progress(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return _config.to_dict(result) if started_rank() == 0 else None


def _generated_text(result: Any) -> Any:
    """The text; what is to be said of its draft goes beside it."""
    if not isinstance(result, Mapping) or "draft" not in result:
        return result
    print(result["draft"], file=sys.stderr)
    return result["text"]


@command(text=_generated_text)
def generate(
    directory: Converted,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 always takes the likeliest token.")] = 0.0,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="FRACTION|RULE=KNOB|PRESET",
            help="Let the model draft for itself at this lower budget and verify at its own: the same text in fewer of its steps.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(help="With --draft: most tokens drafted before they are verified; fewer where fewer are accepted.")
    ] = 8,
    draft_confidence: Annotated[float, typer.Option(help="With --draft: it ends at a token less probable than this; 0: never.")] = 0.0,
    preset: Annotated[str | None, typer.Option(help="Run with the rules of this preset of the checkpoint.")] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    seed: Seed = None,
) -> Any:
    """Continue a prompt with a converted model."""
    from .pipeline import generate_text, speculate_text

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0, "preset": preset}
    options |= {"dtype": dtype, "device": device}
    if draft is None:
        if (draft_tokens, draft_confidence) != (8, 0.0):
            raise ConfigError("--draft-tokens and --draft-confidence are of a draft; name it with --draft, or leave them out.")
        return generate_text(directory, prompt, **options)
    found = speculate_text(directory, prompt, draft=draft, draft_tokens=draft_tokens, confidence=draft_confidence, **options)
    return {**_config.to_dict(found), "tokens_per_s": found.tokens_per_s, "draft": found.line()}


@command()
@takes("data", DataConfig, skip=("seed",), optional=("data",), build=_data_or_none, split="data_split")
def report(
    directory: Converted,
    *,
    data: DataConfig | None,
    curve: Annotated[Path | None, typer.Option(help="curve.json of a sweep; by default the one in or beside the folder.")] = None,
    text: Annotated[str | None, typer.Option(help="A text: what each of its tokens costs, as tokens.html.")] = None,
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
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward.")] = 1,
    dtype: DType = "float32",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and pictures; by default DIR/report.")] = None,
    seed: Seed = None,
) -> Any:
    """Write one HTML page: curve, presets, costs and the routers' quality; with --data, --text or --image also which experts run."""
    from .pipeline import PanelRequest, report_checkpoint

    fractions = None if targets is None else _numbers(targets, option="--targets")
    request = PanelRequest(data=data and dataclasses.replace(data, seed=seed), text=text, image=image)
    options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device, "progress": make_progress()}
    curves = _named_paths(compare or [], option="--compare", taken=directory.name)
    options["commands"] = [shlex.join(["moeify", *sys.argv[1:]])]
    return report_checkpoint(directory, curve=curve, out=out, request=request, compare=curves, within=within, targets=fractions, **options)


@command()
@takes("config", ServeConfig, skip=("presets",))
def serve(
    directory: Annotated[Path, typer.Argument(help="Folder of a converted, thinned or dense language model with its tokenizer.")],
    *,
    config: ServeConfig,
    preset: Annotated[list[str] | None, typer.Option(help=" ".join(_config.field_docs(ServeConfig)["presets"].split()))] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the weights; auto keeps the checkpoint's.")
    ] = "auto",
    device: Device = "cpu",
) -> Any:
    """Serve a model with an OpenAI-compatible API; requests name a preset as NAME@PRESET or in the field moeify_preset."""
    from .serving.app import serve as run_server

    config = dataclasses.replace(config, presets=tuple(preset or ()))
    run_server(directory, config, device=device, dtype=dtype, say=lambda line: print(line, file=sys.stderr, flush=True))


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
    Console(file=text, width=100).print(table)
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
    from .pipeline.harness import evaluate_checkpoint

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
        progress=make_progress(),
    )


@command()
def doctor() -> Any:
    """Show versions, processor, kernels (chosen or refused, and why), extras and caches."""
    from .doctor import doctor as examine

    return examine()


@command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="New folder for everything that the demo makes.")] = Path("demo-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder of an earlier demo.")] = False,
    seed: Seed = None,
) -> Any:
    """Pre-train a small model, convert it, sweep, save, load it elsewhere and generate: a few minutes on two cores."""
    from .demo import run_demo

    return run_demo(out, seed=seed or 0, overwrite=overwrite, progress=make_progress())


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and never raises: bad input exits with 2, a bug with 1, Ctrl-C with 130, and
    training that saved at SIGTERM with 143."""
    # Typer brought its own click in with 0.2x and depended on it before; in both, BadParameter < UsageError < ClickException.
    click_exception: Any = typer.BadParameter.__mro__[2]
    try:
        # Not standalone, or typer would print usage errors its own way, over several lines.
        return app(args=list(arguments) or ["--help"], prog_name="moeify", standalone_mode=False) or 0
    except click_exception as error:
        return _fail(error.format_message(), BAD_INPUT)
    except StoppedError as error:
        return 128 + error.signum if error.is_echo else _fail(str(error), 128 + error.signum, kind="stopped")
    except _Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except (MoeifyError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return BAD_INPUT if getattr(error, "is_echo", False) else _fail(str(error), BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - the outermost border: whatever comes here is a bug, said in a line and never hidden
        if "--debug" in arguments:
            traceback.print_exc()
        hint = "" if "--debug" in arguments else "; run again with --debug for the traceback"
        message = f"{type(error).__name__}: {error}".removesuffix(".")
        return _fail(f"{message}{hint}.", BUG, kind="internal error")


def main() -> None:
    """Entry point of the ``moeify`` command."""
    # The libraries below talk at length on stderr; what matters reaches the user as an error or in the result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    sys.exit(run(sys.argv[1:]))


class _Interrupted(Exception):  # noqa: N818 - Ctrl-C, in a form that typer passes on in every version
    pass


def _named_paths(texts: Sequence[str], *, option: str, taken: str) -> dict[str, Path]:
    """NAME=PATH each."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{option} takes NAME=PATH, got {text!r}.")
        if name in (taken, *found):
            raise ConfigError(f"{option}: the name {name!r} is there twice; give each curve its own.")
        found[name] = Path(path)
    return found


def _named_numbers(texts: Sequence[str], *, option: str) -> dict[str, float]:
    """NAME=NUMBER each, or several of them separated by commas."""
    found: dict[str, float] = {}
    for text in (part for given in texts for part in given.split(",")):
        name, equals, number = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"{option} takes NAME=NUMBER, got {text!r}.")
        if name in found:
            raise ConfigError(f"{option}: the name {name!r} is there twice.")
        (found[name],) = _numbers(number, option=option)
    return found


def _numbers(text: str, *, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}.") from error


def _options_text(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _json_object(text: str | None, *, option: str) -> dict[str, Any]:
    if text is None:
        return {}
    source = Path(text)
    try:
        value = json.loads(source.read_text() if not text.lstrip().startswith("{") and source.is_file() else text)
    except ValueError as error:
        raise ConfigError(f"{option} must be a JSON object or the path of one, got {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON object, got {text!r}.")
    return value


def _out_of_memory(error: Exception, *, options: Mapping[str, Any]) -> str:
    """One line with the size that was asked for, and those of the command's options that need less of it."""
    size = re.search(r"tried to allocate ([\d.]+ [A-Za-z]+)", str(error), flags=re.IGNORECASE)
    less = [f"a smaller --{name.replace('_', '-')}" for name in _MEMORY_OPTIONS if name in options]
    less += ["--gradient-checkpointing"] * (options.get("gradient_checkpointing") is False)
    less += ["--dtype bfloat16"] * (options.get("dtype") == "float32" and "micro_sequences" not in options)  # not to train
    less += [f"--set {setting}" for setting in _RECIPE_MEMORY] * ("recipe" in options)
    way_out = f"try {' or '.join(less)}" if less else "free some, or use a machine with more"
    return f"out of memory{f' (an allocation of {size[1]})' if size else ''}; {way_out}."


def _fail(message: str, code: int, *, kind: str = "error") -> int:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)
    return code
