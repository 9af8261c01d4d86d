"""Commands that look at a dense model's activations and make another checkpoint of it: profile, thin, convert, quantize."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .. import _config, _terminal
from ..convert import ConvertConfig
from ..data import DataConfig
from ..errors import ConfigError
from ..pipeline import METHODS, CalibrationConfig, ChannelMethod, NeuronConfig
from ..routers import ROUTERS, GateRouterConfig, LowRankRouterConfig, NormRouterConfig
from ..select import RULES, RuleConfig
from ..split import SPLITS
from ..thin import ThinConfig
from ..train.fit import RouterTrainConfig
from ._app import command
from .options import (
    Attention,
    Converted,
    Device,
    DType,
    Model,
    Patterns,
    Seed,
    options_text,
    read_object,
    read_projections,
    takes,
    takes_projections,
)


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
    from ..pipeline import profile_checkpoint

    data = dataclasses.replace(data, seed=seed)
    profiles = profile_checkpoint(model, data=data, eps=eps, dtype=dtype, device=device, progress=_terminal.make_progress())
    return {name: profile.summary() for name, profile in profiles.items()}


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
    from ..pipeline import thin_checkpoint

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
                f"--method {method} skips neurons of FFNs, the same share in each: leave out {options_text(given)}, which "
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
        progress=_terminal.make_progress(),
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
    from ..pipeline import convert_checkpoint
    from ..train.parallel import started_rank

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
        policy=read_object(policy, option="--policy"),
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
        projections=read_projections(attention, patterns, distilling, seed=seed or 0),
        overwrite=overwrite,
        stream=stream,
        progress=_terminal.make_progress(),
    )
    return result if started_rank() == 0 else None


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
    from ..pipeline import quantize_checkpoint

    return quantize_checkpoint(directory, out, dtype=dtype, overwrite=overwrite, progress=_terminal.make_progress())
