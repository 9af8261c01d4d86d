"""A model larger than the memory that converts it: peak resident memory of ``moeify convert --stream`` in a process of its own.

The checkpoint is a random Llama in several files, written tensor by tensor. Resident memory is what Linux counts in ``/proc/PID/status``:
`VmHWM`, the most of it at any moment, has files that are mapped (shared libraries) in it beside the process' own pages, and the 0.5 GB that
torch and transformers take for themselves.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify.errors import ConfigError
from moeify.hf.load import read_manifest
from moeify.hf.shards import TensorWriter
from moeify.hf.skeleton import skeleton
from moeify.hf.tokenizer import byte_tokenizer

COMMAND = (sys.executable, "-c", "from moeify.cli import main; main()", "convert")
LIMIT_MB = 1024
_POLL_S = 0.01
_FIELDS = ("VmHWM", "RssAnon", "RssFile")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--layers", type=int, help="blocks of 61 MB in fp32; 28 by default (2 GB with the embeddings)")
    parser.add_argument("--tokens", type=int, help="calibration tokens; 4096 by default")
    parser.add_argument("--expert-size", type=int, default=8, help="neurons per expert")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the checkpoint and the result")
    parser.add_argument("--in-memory", action="store_true", help="a second row: the same conversion in memory")


def run(
    *,
    quick: bool,
    layers: int | None = None,
    tokens: int | None = None,
    expert_size: int = 8,
    dtype: str = "float32",
    in_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row, two with ``in_memory``; ``--quick`` converts a model of 0.3 MB a block."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("resident memory is read from /proc, which only Linux has.")
    layers, tokens = layers or (4 if quick else 28), tokens or (1024 if quick else 4096)
    width = 64 if quick else 1024
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        size = write_llama(dense, width=width, layers=layers, vocab=500 if quick else 32000, dtype=getattr(torch, dtype))
        for mode in ("--stream", "--no-stream") if in_memory else ("--stream",):
            options = {
                "--data": "builtin:pydoc",
                "--max-tokens": tokens,
                "--window": 64 if quick else 512,
                "--dtype": dtype,
                "--router-epochs": 1,
                "--expert-size": expert_size,
            }
            out = Path(folder) / mode.strip("-")
            start = time.perf_counter()
            peaks = _peaks([*COMMAND, str(dense), mode, "--out", str(out), *(str(x) for pair in options.items() for x in pair)], folder)
            seconds = time.perf_counter() - start
            yield {
                "mode": mode.strip("-"),
                "dtype": dtype,
                "layers": layers,
                "tokens": tokens,
                "expert_size": expert_size,
                "experts": read_manifest(out).sites[0].num_experts,  # of what was written
                "checkpoint_mb": size / 1e6,
                "peak_mb": peaks["VmHWM"] / 1024,
                "peak_own_mb": peaks["RssAnon"] / 1024,
                "peak_files_mb": peaks["RssFile"] / 1024,
                "limit_mb": LIMIT_MB,
                "is_within": peaks["VmHWM"] < 1024 * LIMIT_MB,
                "seconds": seconds,
            }


def write_llama(folder: Path, *, width: int, layers: int, vocab: int, dtype: torch.dtype = torch.float32, files: int = 4) -> int:
    """A random Llama in about so many files, F = 4 D, with a tokenizer of bytes; returns the bytes of its weights. One tensor is in memory
    at a time."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=256,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    byte_tokenizer(context=1024).save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in skeleton(LlamaForCausalLM, config, dtype=dtype).named_parameters()}
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    with TensorWriter(folder, {name: (shape, dtype) for name, shape in shapes.items()}, shard_bytes=-(-size // files)) as writer:
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) / width**0.5 if len(shape) > 1 else torch.ones(shape)
            writer.write(name, tensor.to(dtype))
    return size


def _peaks(command: list[str], folder: str) -> dict[str, int]:
    """The largest value of each of `_FIELDS` while a command runs, in KB."""
    log, peaks = Path(folder) / "log", dict.fromkeys(_FIELDS, 0)
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]))
        time.sleep(_POLL_S)
    if child.returncode:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ConfigError(f"moeify convert: {last.removeprefix('error: ')}")
    return peaks
