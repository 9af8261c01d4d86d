"""What a conversion costs by the command line: seconds and peak resident memory of a `moeify convert` in a process of its own.

The system says the largest memory that the process had (``ru_maxrss``), mapped files in it, as a user would see it; it counts from the
start of the process, and so never says less than this process has, about 0.4 GB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.tiny import save_tiny
from moeify.errors import ConfigError

COMMAND = (sys.executable, "-c", "from moeify.cli import main; main()", "convert")
RSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Bytes in which ``ru_maxrss`` counts."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--source", metavar="MODEL", help="Hub id, folder or .gguf file of a dense model; without it a tiny random one")
    parser.add_argument("--data", default="builtin:pydoc", help="calibration text, as for moeify convert")
    parser.add_argument("--tokens", type=int, default=100_000, help="calibration tokens; 2048 with --quick")
    parser.add_argument("--window", type=int, help="tokens per sequence; 1024 by default, 64 of the tiny model")


def run(
    *, quick: bool, source: str | None = None, data: str = "builtin:pydoc", tokens: int = 100_000, window: int | None = None
) -> Iterator[dict[str, Any]]:
    """One row; all options of the conversion but these are `moeify convert`'s own defaults."""
    tokens = 2048 if quick else tokens
    window = window or (64 if source is None else 1024)
    with tempfile.TemporaryDirectory() as folder:
        model = source or save_tiny(Path(folder) / "dense")
        options = {"--data": data, "--max-tokens": tokens, "--window": window, "--out": Path(folder) / "moe"}
        log = Path(folder) / "log"
        start = time.perf_counter()
        with log.open("wb") as file:
            child = subprocess.Popen([*COMMAND, model, *(str(x) for pair in options.items() for x in pair)], stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            lines = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {child.returncode}"]
            raise ConfigError(f"moeify convert: {lines[-1].removeprefix('error: ')}")
    yield {
        "source": source or "random Llama",
        "data": data,
        "tokens": tokens,
        "window": window,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * RSS_BYTES / 1e6,
    }
