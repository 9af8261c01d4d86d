"""The command line: options from the configs' docstrings, one call of the pipeline a command, one line for an error.

Nothing is decided here. Results go to stdout, everything else (progress, warnings, errors) to stderr. `_app` makes commands of functions,
`options` are what several take; the commands are in `convert`, `train`, `measure` and `use`.
"""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from ..errors import MoeifyError, StoppedError
from . import convert, measure, train, use  # noqa: F401 - importing them adds their commands
from ._app import Interrupted, app
from .options import takes as takes

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130


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
    except SystemExit as error:  # what typer ends --show-completion and the shell's questions with
        return error.code if isinstance(error.code, int) else BUG * (error.code is not None)
    except StoppedError as error:
        return 128 + error.signum if error.is_echo else _fail(str(error), 128 + error.signum, kind="stopped")
    except Interrupted as error:
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
        _hide_bars()
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    sys.exit(run(sys.argv[1:]))


def _hide_bars() -> None:
    """No bar of tqdm's in what is no terminal: transformers reads GGUF files with one. Its environment variable would be read too early."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def _fail(message: str, code: int, *, kind: str = "error") -> int:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)
    return code
