"""``python -m bench.run CASE --json OUT [--quick]``: run one case, print its rows, write them as JSON lines with the environment.

A case is a module of ``bench/cases`` with ``run(*, quick, **options)``; its own options are those that its ``add_options(parser)`` adds.
"""

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from moeify._cpu import cpu_name
from moeify.errors import MoeifyError

from . import cases


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def case_names() -> list[str]:
    """Names of the modules in ``bench/cases``."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def environment() -> dict[str, Any]:
    """What a number depends on: commit, device, threads, versions, date."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain", "--", ":(top,exclude)bench/results") != "",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    common = _Parser(add_help=False)
    common.add_argument("case", metavar="CASE", nargs="?", help=f"one of {', '.join(case_names())}")
    common.add_argument("--json", type=Path, metavar="OUT", help="write the rows here, one JSON object a line")
    common.add_argument("--quick", action="store_true", help="few shapes and repeats: does it run, not how fast")
    parser = _Parser(prog="python -m bench.run", description=(__doc__ or "").partition("\n")[0], parents=[common])
    name = common.parse_known_args(argv)[0].case  # first the case alone: it knows the rest of its options
    if name not in case_names():
        if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
            parser.print_help()
            return 0
        near = difflib.get_close_matches(name or "", case_names(), n=1)
        return _fail(f"no case {name!r}; {'did you mean ' + repr(near[0]) + '?' if near else 'known: ' + ', '.join(case_names())}")
    case = importlib.import_module(f"{cases.__name__}.{name}")
    if hasattr(case, "add_options"):
        case.add_options(parser)
    options = vars(parser.parse_args(argv))
    name, out = options.pop("case"), options.pop("json")
    disable_progress_bar()  # ours tells of the rows
    try:
        with _writer(out, {"case": name, "quick": options["quick"]} | environment()) as write:
            _print_rows(case, name, options, write)
    except MoeifyError as error:
        return _fail(str(error))
    return 0


@contextmanager
def _writer(out: Path | None, about: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Writes rows as they come, beside ``out``; that is replaced when all are there, and an interrupted run leaves what it had measured."""
    if out is None:
        yield lambda _row: None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        yield lambda row: (file.write(json.dumps({**about, **row}) + "\n"), file.flush())
    part.replace(out)


def _print_rows(case: Any, name: str, options: Mapping[str, Any], write: Callable[[Mapping[str, Any]], object]) -> None:
    """Run the case, writing and printing each row as it comes and printing all of them at the end."""
    rows = []
    console = Console(width=None if sys.stdout.isatty() else 400)  # a pipe has no width; a table takes no more than it needs
    with console.status(name):
        for row in case.run(**options):
            write(row)
            rows.append({key: value for key, value in row.items() if not _is_curve(value)})
            row = rows[-1]
            console.print(" ".join(f"[dim]{key}[/dim] {_cell(value)}" for key, value in row.items()), highlight=False, soft_wrap=True)
    shared = {key for key in rows[0] if len(rows) > 1 and all(key in row and row[key] == rows[0][key] for row in rows)} if rows else set()
    console.print(*(f"{key} {_cell(value)}" for key, value in rows[0].items() if key in shared), sep=", ", highlight=False, soft_wrap=True)
    console.print(_table(name, [{key: value for key, value in row.items() if key not in shared} for row in rows]))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    return table


def _is_curve(value: Any) -> bool:
    """Whether it is for pictures: a list of points stays in the file."""
    return isinstance(value, (list, tuple)) and all(isinstance(point, (list, tuple)) for point in value)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no git"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip().splitlines()[-1:]}"


if __name__ == "__main__":
    sys.exit(main())
