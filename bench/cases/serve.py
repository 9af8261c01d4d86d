"""Load on `moeify serve` over loopback: some clients, each with one request at a time; a dense checkpoint against presets of a sparse one,
alone and mixed.

The side "mixed" asks for the presets in turns, so that clients who are served together have different ones.

Every side gets the same prompts, greedy, and takes turns with the others, round by round, so that all see the same machine. The servers are
processes of their own that stay up; one that nobody asks costs nothing. A request is lost if it has no answer, or another than 200.

Latency is from sending a request to having its whole answer, of a client that waits for it; tokens/s are all clients' together, while the
side's rounds last. ``--modes packed`` is continuous batching. Quick: a random model made here, and servers in this process.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import words
from bench.tiny import save_tiny
from moeify import ConvertConfig, convert, example_inputs, find_ffn_sites, load_model, set_presets
from moeify.errors import ConfigError, MoeifyError
from moeify.hf.load import read_manifest
from moeify.presets import Preset
from moeify.routers import NormRouterConfig
from moeify.select import TopK

_START_S, _ANSWER_S = 300, 300
_WORDS = ("river", "engine", "winter", "letter", "garden", "signal", "market", "island")


@dataclass
class _Side:
    """One column of the comparison, and what its requests gave."""

    name: str
    url: str
    models: Sequence[str]
    """What its requests name, in turns."""
    latencies_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    lost: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this case."""
    parser.add_argument("--dense", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--converted", type=Path, help="folder of the converted or thinned one; without both, random ones are made")
    parser.add_argument("--presets", type=words, help="a,b: presets to ask for; by default the checkpoint's own rules and all presets")
    parser.add_argument("--modes", type=words, default=("one-at-a-time", "packed"), help="one-at-a-time,packed")
    parser.add_argument("--requests", type=int, default=200, help="of each side")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")


def run(
    *,
    quick: bool,
    dense: Path | None,
    converted: Path | None,
    presets: Sequence[str] | None,
    modes: Sequence[str],
    requests: int,
    clients: int,
    rounds: int,
    new_tokens: int,
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """One row a side and mode."""
    if unknown := set(modes) - {"one-at-a-time", "packed"}:
        raise ConfigError(f"--modes: {min(unknown)!r} is neither one-at-a-time nor packed.")
    if (dense is None) != (converted is None):
        raise ConfigError("give --dense and --converted, or neither.")
    if min(requests, clients, rounds, new_tokens) < 1:
        raise ConfigError("--requests, --clients, --rounds and --new-tokens are at least 1.")
    if quick:
        requests, rounds, new_tokens = min(requests, 8), min(rounds, 2), min(new_tokens, 8)
    with tempfile.TemporaryDirectory() as folder:
        if dense is None or converted is None:
            dense, converted = _make(Path(folder))
        asked = presets or ("default", *(preset.name for preset in read_manifest(converted).presets))
        for mode in modes:
            options = ["--dtype", dtype, "--temperature", "0", *(["--continuous-batching"] if mode == "packed" else [])]
            start = _in_process if quick else _process
            with start(dense, options) as dense_url, start(converted, options) as sparse_url:
                names = [f"{converted.resolve().name}@{preset}" for preset in asked]
                sides = [_Side("dense", dense_url, [dense.resolve().name])]
                sides += [_Side(preset, sparse_url, [name]) for preset, name in zip(asked, names, strict=True)]
                sides += [_Side("mixed", sparse_url, names)] * (len(names) > 1)
                _load(sides, requests=requests, clients=clients, rounds=rounds, new_tokens=new_tokens)
            base = _speed(sides[0])
            for side in sides:
                times = sorted(side.latencies_s) or [float("nan")]
                yield {
                    "mode": mode,
                    "side": side.name,
                    "requests": requests,
                    "clients": clients,
                    "lost": side.lost,
                    "p50_s": statistics.median(times),
                    "p95_s": times[min(len(times) - 1, round(0.95 * len(times)))],
                    "tokens": side.tokens,
                    "tokens_per_s": _speed(side),
                    "speedup": _speed(side) / base if base else float("nan"),
                }


def _speed(side: _Side) -> float:
    return side.tokens / side.seconds if side.seconds else 0.0


def _load(sides: Sequence[_Side], *, requests: int, clients: int, rounds: int, new_tokens: int) -> None:
    with ThreadPoolExecutor(max_workers=clients) as pool:
        for side in sides:
            _ask(side, 0, new_tokens)  # what only the first request pays: caches, laid out weights
            side.latencies_s, side.tokens, side.lost = [], 0, 0
        for turn in range(rounds):
            numbers = range(turn * requests // rounds, (turn + 1) * requests // rounds)
            for i in range(len(sides)):
                side = sides[(i + turn) % len(sides)]
                start = time.perf_counter()
                list(pool.map(lambda n, side=side: _ask(side, n, new_tokens), numbers))
                side.seconds += time.perf_counter() - start


def _ask(side: _Side, number: int, new_tokens: int) -> None:
    prompt = " ".join(_WORDS[(number * 7 + i * i) % len(_WORDS)] for i in range(8 + number % 5))
    model = side.models[number % len(side.models)]
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}).encode()
    request = urllib.request.Request(f"{side.url}/completions", data=body, headers={"content-type": "application/json"})
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
    except (OSError, ValueError, KeyError):  # HTTPError is an OSError
        side.lost += 1
        return
    side.latencies_s.append(time.perf_counter() - start)
    side.tokens += tokens


@contextlib.contextmanager
def _process(folder: Path, options: Sequence[str]) -> Iterator[str]:
    """A server of its own; yields its address."""
    command = [sys.executable, "-m", "moeify", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as server:
        assert server.stderr is not None
        watch = threading.Timer(_START_S, server.kill)
        watch.start()
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if line.startswith("serving "):
                    break
            else:
                raise MoeifyError(f"the server of '{folder}' did not start: {' '.join(''.join(said[-3:]).split())}")
            watch.cancel()
            drain = threading.Thread(target=server.stderr.read, daemon=True)  # a full pipe would stop the server
            drain.start()
            yield said[-1].split()[3].rstrip(";")
        finally:
            watch.cancel()
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


@contextlib.contextmanager
def _in_process(folder: Path, options: Sequence[str]) -> Iterator[str]:
    """A server on a thread of this process: quick to start, no measure of anything."""
    import uvicorn

    from moeify.serving import ServeConfig
    from moeify.serving.app import build

    served = build(folder, ServeConfig(temperature=0, continuous_batching="--continuous-batching" in options))
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + _START_S
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(60)
        served.stop()


def _make(folder: Path) -> tuple[Path, Path]:
    """A random Llama, and its conversion with one preset."""
    dense, converted = Path(save_tiny(folder / "dense")), folder / "moe"
    model, tokenizer = load_model(dense)
    with torch.no_grad():
        convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4)), sites=find_ffn_sites(model, example_inputs(model)))
    rules = {name: TopK(k=2) for name, _ in model.named_modules() if name.endswith(".mlp")}
    set_presets(model, [Preset(name="fast", rules=rules, active_fraction=1 / 3)])
    model.save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    return dense, converted
