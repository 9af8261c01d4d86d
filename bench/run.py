"""``python -m bench.run CASE --json OUT [--quick]``: run one case, print its rows, write them as JSON lines with the environment."""

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import cases


def case_names() -> list[str]:
    """Names of the modules in ``bench/cases``."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def environment() -> dict[str, Any]:
    """What a number depends on: commit, device, threads, versions, date."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain") != "",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_model(),
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
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("case", metavar="CASE", help=f"one of {', '.join(case_names())}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here, one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats: does it run, not how fast")
    args = parser.parse_args(argv)
    if args.case not in case_names():
        near = difflib.get_close_matches(args.case, case_names(), n=1)
        print(
            f"error: no case {args.case!r}; {'did you mean ' + repr(near[0]) + '?' if near else 'known: ' + ', '.join(case_names())}",
            file=sys.stderr,
        )
        return 2
    case = importlib.import_module(f"{cases.__name__}.{args.case}")
    rows = []
    console = Console()
    with console.status(args.case):
        for row in case.run(quick=args.quick):
            rows.append(row)
            console.print(" ".join(f"[dim]{key}[/dim] {_cell(value)}" for key, value in row.items()), highlight=False, soft_wrap=True)
    console.print(_table(args.case, rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"case": args.case, "quick": args.quick} | environment()
        args.json.write_text("".join(json.dumps(about | row) + "\n" for row in rows), encoding="utf-8")
    return 0


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no git"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip().splitlines()[-1:]}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )


if __name__ == "__main__":
    sys.exit(main())
