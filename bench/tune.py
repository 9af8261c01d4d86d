"""``python -m bench.tune --json OUT``: tiles of the Triton kernels of experts, tried on the GPU that is here.

For each regime of `moeify.kernels.tiles.TUNED` fields are tried one after another, each from the best so far, on one shape and mask: all
combinations would take an hour to compile. The last line is what to write into that table. A candidate that does not fit the GPU is a row
that says so. ``--quick`` tries two, also on a CPU with TRITON_INTERPRET=1.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu
from bench.common import words
from moeify.errors import MoeifyError
from moeify.kernels import DispatchPlan, build_plan, gpu_ffn, moe_ffn
from moeify.kernels.tiles import TUNED
from moeify.sites import FFNWeights

TOKENS = {"1": 1, "16": 8, "512": 64, "ragged": 4096}
"""Tokens that stand for a regime."""
QUICK_TOKENS = {"1": 1, "16": 3, "512": 20, "ragged": 520}
CANDIDATES: dict[str, dict[str, Sequence[Any]]] = {
    "1": {"neurons": (4, 8, 16), "channels": (256, 512, 1024), "outputs": (64, 128, 256), "num_warps": (2, 4)},
    "16": {"neurons": (16, 32), "channels": (64, 128, 256), "outputs": (32, 64, 128), "num_stages": (3, 4)},
    "512": {"tokens": (32, 64), "neurons": (32, 64), "channels": (64, 128), "outputs": (64, 128), "num_stages": (3, 4)},
    "ragged": {"tokens": (64, 128), "outputs": (128, 256), "atomic_neurons": (64, 512), "num_warps": (4, 8), "num_stages": (3, 4)},
}
"""Values of each field, in the order in which they are tried. ``atomic_neurons`` is a border: of experts of 64, 64 means atomics."""

GAIN = 0.98
"""Share of the best time so far below which a change is kept."""


def tune(
    regimes: Sequence[str],
    *,
    shape: gpu.Shape,
    expert_size: int,
    dtype: torch.dtype,
    fraction: float,
    quick: bool,
    end: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """A row for each candidate, the best of each regime marked by a row of its own; `TUNED` stays as it was.

    Args:
        end: of `time.perf_counter`, from when on nothing further is tried. A regime that had not begun has no row.
    """
    kind = gpu.device()
    arch = gpu_ffn.architecture(torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
    layers = gpu.layers_of(shape, dtype=dtype, device=kind)
    num_experts = -(-shape.d_ff // expert_size)
    for regime in regimes:
        if time.perf_counter() > end:
            return
        T = (QUICK_TOKENS if quick else TOKENS)[regime]
        x_TD = torch.randn(T, shape.d_model, device=kind).to(dtype)
        plan = build_plan(gpu.random_mask(T, num_experts, fraction, device=kind))
        changes = [(field, value) for field, values in CANDIDATES[regime].items() for value in values]
        exact_TD = _output(x_TD, layers[0], plan, shape=shape, impl="masked")
        best: dict[str, Any] = {}
        best_us = default_us = math.inf
        for change in (None, *(changes[:1] if quick else changes)):
            if change is not None and time.perf_counter() > end:
                break
            tiles = best if change is None else best | dict([change])
            row = {"architecture": arch, "regime": regime, "tokens": T, "tiles": tiles}
            try:
                us = _time(tiles, (arch, regime), x_TD, layers, plan, exact_TD, shape=shape, kind=kind)
            except gpu.triton_errors() as error:
                yield {"what": "tiles", **row, "us": None, "error": str(error).partition("\n")[0][:120]}
                continue
            if change is None:
                best_us = default_us = us
            elif us < GAIN * best_us:  # less is noise
                best, best_us = tiles, us
            yield {"what": "tiles", **row, "us": us}
        yield {"what": "best", **row, "tiles": best, "us": best_us, "default_us": default_us}


@torch.no_grad()
def _output(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, shape: gpu.Shape, impl: str) -> Tensor:
    return moe_ffn(x_TD, weights, plan, activation=shape.activation, impl=impl).float()


@torch.no_grad()
def _time(
    tiles: Mapping[str, Any],
    key: tuple[str, str],
    x_TD: Tensor,
    layers: Sequence[FFNWeights],
    plan: DispatchPlan,
    exact_TD: Tensor,
    *,
    shape: gpu.Shape,
    kind: str,
) -> float:
    """Microseconds; a `RuntimeError` where the result is wrong."""
    before = TUNED.get(key)
    TUNED[key] = tiles
    try:
        error = (_output(x_TD, layers[0], plan, shape=shape, impl="triton") - exact_TD).norm() / exact_TD.norm()
        if not error <= gpu.tolerance(x_TD.dtype):  # a NaN is wrong, too
            raise RuntimeError(f"wrong result: relative error {error.item():.3g}")
        ours = {"ours": lambda i: moe_ffn(x_TD, layers[i], plan, activation=shape.activation, impl="triton")}
        graphs = len(x_TD) <= gpu.GRAPH_TOKENS
        return gpu.medians_us(ours, num_layers=len(layers), device=kind, graphs=graphs, rounds=7, seconds=0.3)["ours"]
    finally:
        if before is None:
            del TUNED[key]
        else:
            TUNED[key] = before


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here, one JSON object a line")
    parser.add_argument("--regimes", type=words, default=tuple(TOKENS), metavar="A,B", help=f"some of {', '.join(TOKENS)}; all by default")
    parser.add_argument("--shape", default="llama-8b", help=f"one of {', '.join(gpu.SHAPES)}")
    parser.add_argument("--expert-size", type=int, default=64, metavar="G", help="neurons of an expert")
    parser.add_argument("--fraction", type=float, default=0.25, metavar="F", help="of the experts that a token runs")
    parser.add_argument("--quick", action="store_true", help="two candidates and a tiny shape: does it run")
    options = parser.parse_args(argv)
    try:
        regimes = gpu.names_or_all(options.regimes, TOKENS, where="--regimes")
        (name,) = gpu.names_or_all((options.shape,), gpu.SHAPES, where="--shape")
        shape, size = (gpu.TINY, 16) if options.quick else (gpu.SHAPES[name], options.expert_size)
        dtype = torch.float16 if gpu.device() == "cpu" else torch.bfloat16
        rows = []
        for row in tune(regimes, shape=shape, expert_size=size, dtype=dtype, fraction=options.fraction, quick=options.quick):
            rows.append(row)
            print(json.dumps(row), flush=True)
    except MoeifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print({(row["architecture"], row["regime"]): row["tiles"] for row in rows if row["what"] == "best"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
