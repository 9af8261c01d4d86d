"""Options that commands share: their types, those made of a config's fields, and how texts given to them are read."""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import _config
from ..data import DataConfig
from ..errors import ConfigError
from ..pipeline import ProjectionsConfig

Model = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a dense model.")]
Converted = Annotated[Path, typer.Argument(help="Folder that `moeify convert` or `moeify thin` wrote.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per forward.")]
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


def signed(
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
    parameter: str,
    config: type,
    *,
    skip: Sequence[str] = (),
    optional: Sequence[str] = (),
    defaults: Any = types.MappingProxyType({}),
    build: Any = None,
    **names: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a command's ``parameter`` by one option per field of ``config``, helped by the field's docstring.

    Args:
        parameter: keyword of the command that receives the config.
        config: config dataclass whose fields are scalars.
        skip: fields that keep their default.
        optional: required fields that may be left out; they are None then, and it is for ``build`` to take that.
        defaults: by field, where they are not the config's own.
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
            default = defaults.get(field.name, field.default)
            if default is dataclasses.MISSING:
                default = None if field.name in optional else inspect.Parameter.empty
            hint: Any = annotation if default is not None else annotation | None
            options.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]))
        return signed(command, like=function, drop=(parameter,), add=options)

    return decorate


def data_or_none(fields: Mapping[str, Any], /, **changed: Any) -> DataConfig | None:
    """The data, or None where none is named and so nothing is said of it; ``changed`` are defaults that are not the config's own."""
    if fields["data"] is not None:
        return _config.from_dict(DataConfig, fields)
    defaults = {f.name: f.default for f in dataclasses.fields(DataConfig)} | changed
    if given := [name for name, value in fields.items() if name != "data" and value != defaults[name]]:
        raise ConfigError(f"{options_text([f'data_{name}' if name == 'split' else name for name in given])} without --data; name the data.")
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


def read_projections(
    attention: str | None, patterns: Sequence[str] | None, options: dict[str, Any], *, seed: int
) -> ProjectionsConfig | None:
    """The config of the layers to replace; None where none is named."""
    if attention is None and not patterns:
        defaults = {f.name: f.default for f in dataclasses.fields(ProjectionsConfig)}
        if changed := next((name for name, value in options.items() if value != defaults[name]), None):
            raise ConfigError(f"--projection-{changed.replace('_', '-')} needs --attention or --projections.")
        return None
    named = tuple(role.strip() for role in attention.split(",")) if attention is not None else ()
    chosen = {**options, "attention": named, "patterns": tuple(patterns or ()), "seed": seed}
    return _config.from_dict(ProjectionsConfig, chosen, where="--attention" if patterns is None else "")


def read_named_paths(texts: Sequence[str], *, option: str, taken: str) -> dict[str, Path]:
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


def read_named_numbers(texts: Sequence[str], *, option: str) -> dict[str, float]:
    """NAME=NUMBER each, or several of them separated by commas."""
    found: dict[str, float] = {}
    for text in (part for given in texts for part in given.split(",")):
        name, equals, number = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"{option} takes NAME=NUMBER, got {text!r}.")
        if name in found:
            raise ConfigError(f"{option}: the name {name!r} is there twice.")
        (found[name],) = read_numbers(number, option=option)
    return found


def read_numbers(text: str, *, option: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}.") from error


def options_text(names: Sequence[str]) -> str:
    """Keywords as the options that set them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def read_object(text: str | None, *, option: str) -> dict[str, Any]:
    """A JSON object, or that in the file of this name; empty for None."""
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
