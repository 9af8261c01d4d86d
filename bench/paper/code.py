"""Which code made numbers: checksums that change with what modules do, not with how they are described."""

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import moeify
from moeify.errors import CheckpointError, ConfigError
from moeify.pipeline.stages import write_json

_LIBRARY = Path(moeify.__file__).parent
_SHOWN_ONLY = (
    "__init__.py",
    "_progress.py",
    "_terminal.py",
    "cli/*.py",
    "demo.py",
    "doctor.py",
    "errors.py",
    "hf/card.py",
    "pipeline/info.py",
    "pipeline/panels.py",
    "pipeline/results.py",
    "report/*.py",
)
"""Modules that talk and draw; any other one, also a new one, may decide numbers."""
_FILE = "library.json"


def checksum(paths: Iterable[Path], root: Path) -> str:
    """Of files by their place under ``root``; of Python modules without comments, docstrings, layout and the wording of errors."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = _meaning(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:12]


def library_code(folder: Path = _LIBRARY) -> str:
    """Checksum of the library's modules that can decide a number. Compiled kernels are not in it: they differ by rounding."""
    shown = {path for pattern in _SHOWN_ONLY for path in folder.glob(pattern)}
    return checksum((path for path in folder.rglob("*.py") if path not in shown), folder)


_OPTIONS = ("--out", "--keep-stages")


def check_stages(folder: Path, *, keep: bool = False, now: str | None = None, options: tuple[str, str] = _OPTIONS) -> tuple[str, ...]:
    """Refuse stages that other code of the library made: their own names know nothing of it.

    Args:
        folder: of all stages; the code is noted in its ``library.json``.
        keep: use them all the same, and note the present code beside theirs.
        now: the present code; None looks.
        options: of the command that asks, for its errors: the folder's, and the one that keeps stages.

    Returns:
        Codes that the stages are of, in the order in which they came; "unknown" of stages without a note.

    Raises:
        ConfigError: stages of other code. CheckpointError: the note cannot be read or written.
    """
    now, note = now or library_code(), folder / _FILE
    out, keeps = options
    try:
        if note.exists():
            codes = [str(code) for code in json.loads(note.read_text(encoding="utf-8"))["codes"]]
        else:
            codes = ["unknown"] if folder.exists() and any(folder.iterdir()) else []
        if now in codes:
            return tuple(codes)
        if codes and not keep:
            raise ConfigError(
                f"what is in '{folder}' was made by other code of moeify ({', '.join(codes)}; now {now}): choose another {out}, or"
                f" {keeps} where the change leaves its numbers alone."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, {"codes": [*codes, now]})
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"'{note}' cannot be read or written ({error}); choose another {out}.") from None
    return (*codes, now)


class _Plain(ast.NodeTransformer):
    """Leaves out what a program does not compute with."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_docstring = isinstance(node.value, ast.Constant)  # of a module, function or field
        return None if is_docstring else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node


def _meaning(source: str) -> str:
    return ast.dump(_Plain().visit(ast.parse(source)))
