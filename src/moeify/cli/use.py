"""Commands that look at what there is, and that use it: doctor, info, generate, serve, export, demo."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _config, _terminal
from ..data import DataConfig
from ..errors import ConfigError
from ..export import OnnxConfig
from ..serving import ServeConfig
from ._app import command
from .options import Converted, Device, DType, Seed, data_or_none, takes


def _doctor_text(result: Mapping[str, Any], all_: bool) -> Any:
    from ..doctor import doctor_text

    return result if all_ else doctor_text(result)


@command(text=_doctor_text)
def doctor(
    *,
    all_: Annotated[
        bool, typer.Option("--all", help="Versions, speed, every kernel with the reason it runs or does not, compilers, caches.")
    ] = False,
) -> Any:
    """Say what runs here, what is missing and how to get it."""
    from ..doctor import doctor as examine

    return examine()


def _info_text(result: Mapping[str, Any]) -> Any:
    from ..pipeline.info import info_text

    return info_text(result)


@command(text=_info_text)
def info(directory: Annotated[Path, typer.Argument(help="Folder of any checkpoint: dense, converted, thinned, int8, pre-trained.")]) -> Any:
    """Say what a checkpoint is without loading its weights: sizes, what was converted and how, presets, what it was made of."""
    from ..pipeline.info import checkpoint_info

    return checkpoint_info(directory)


def _generated_text(result: Mapping[str, Any]) -> Any:
    """The text; what it took goes beside it."""
    print(result["took"], file=sys.stderr)
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
    """Continue a prompt with a converted or thinned model, and say how fast and with what share of it."""
    from ..pipeline import speculate_text, timed_text

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0, "preset": preset}
    options |= {"dtype": dtype, "device": device}
    if draft is None:
        if (draft_tokens, draft_confidence) != (8, 0.0):
            raise ConfigError("--draft-tokens and --draft-confidence are of a draft; name it with --draft, or leave them out.")
        written = timed_text(directory, prompt, **options)
        return {**_config.to_dict(written), "tokens_per_s": written.tokens_per_s, "took": written.line()}
    found = speculate_text(directory, prompt, draft=draft, draft_tokens=draft_tokens, confidence=draft_confidence, **options)
    return {**_config.to_dict(found), "tokens_per_s": found.tokens_per_s, "took": found.line()}


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
    from ..serving.app import serve as run_server

    config = dataclasses.replace(config, presets=tuple(preset or ()))
    run_server(directory, config, device=device, dtype=dtype, say=lambda line: print(line, file=sys.stderr, flush=True))


@command()
@takes("data", DataConfig, skip=("seed",), optional=("data",), build=data_or_none, split="data_split")
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
    from ..pipeline import export_checkpoint

    return export_checkpoint(
        directory,
        out,
        to=to,
        k=k,
        shared=shared,
        data=data,
        onnx=onnx,
        dtype=dtype,
        overwrite=overwrite,
        progress=_terminal.make_progress(),
    )


@command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="New folder for everything that the demo makes.")] = Path("demo-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder of an earlier demo.")] = False,
    seed: Seed = None,
) -> Any:
    """Pre-train a small model, convert it, sweep, save, load it elsewhere and generate: a few minutes on two cores."""
    from ..demo import run_demo

    return run_demo(out, seed=seed or 0, overwrite=overwrite, progress=_terminal.make_progress())
