"""The application: how a function becomes a command, and what a command does about Ctrl-C and missing memory."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from .._terminal import show
from ..errors import MoeifyError, is_out_of_memory
from ._help import Command, Group
from .options import signed

_MEMORY_OPTIONS = ("micro_sequences", "batch_size", "window", "max_tokens", "max_new_tokens")
_RECIPE_MEMORY = ("train.micro_sequences=1", "train.gradient_checkpointing=true", "sweep.batch_size=1")  # nothing done is lost by them

app = typer.Typer(
    name="moeify",
    help="Turn dense Transformers into dynamic-k mixtures of experts.",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"moeify {version('moeify')}")
        except PackageNotFoundError:
            print("moeify, from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")] = False,
) -> None:
    """Turn dense Transformers into dynamic-k mixtures of experts."""


def command(
    *, resumes: Callable[[Mapping[str, Any]], bool] = lambda _values: False, text: Callable[..., Any] = lambda result: result
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function that returns a JSON-like result, or None to print nothing, to the command line, with ``--json`` and ``--debug``.

    Args:
        resumes: whether the command, interrupted with these values of its options, continues when run again.
        text: of a result, what people see of it without ``--json``; further parameters are those options' values.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def run_command(*, json_: bool, debug: bool, **values: Any) -> None:
            try:
                result = function(**values)
            except KeyboardInterrupt as error:
                way_out = "; the same command again continues where it stopped." if resumes(values) else "."
                raise Interrupted(f"interrupted{way_out}") from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MoeifyError(_out_of_memory(error, options=values)) from error
            if result is not None:
                options = {name: values[name] for name in [*inspect.signature(text).parameters][1:]}
                show(result if json_ else text(result, **options), as_json=json_)

        as_json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value.")]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        kind = inspect.Parameter.KEYWORD_ONLY
        flags = [
            inspect.Parameter("json_", kind, default=False, annotation=as_json),
            inspect.Parameter("debug", kind, default=False, annotation=debug),
        ]
        app.command(cls=Command)(signed(run_command, like=function, add=flags))
        return function

    return add


def _out_of_memory(error: Exception, *, options: Mapping[str, Any]) -> str:
    """One line with the size that was asked for, and those of the command's options that need less of it."""
    size = re.search(r"tried to allocate ([\d.]+ [A-Za-z]+)", str(error), flags=re.IGNORECASE)
    less = [f"a smaller --{name.replace('_', '-')}" for name in _MEMORY_OPTIONS if name in options]
    less += ["--gradient-checkpointing"] * (options.get("gradient_checkpointing") is False)
    less += ["--dtype bfloat16"] * (options.get("dtype") == "float32" and "micro_sequences" not in options)  # not to train
    less += [f"--set {setting}" for setting in _RECIPE_MEMORY] * ("recipe" in options)
    way_out = f"try {' or '.join(less)}" if less else "free some, or use a machine with more"
    return f"out of memory{f' (an allocation of {size[1]})' if size else ''}; {way_out}."


class Interrupted(Exception):  # noqa: N818 - Ctrl-C, in a form that typer passes on in every version
    """Ctrl-C, with what is to be said of it."""
