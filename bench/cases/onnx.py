"""A model of SmolLM2's shape as ONNX files in onnxruntime: dense against dynamic k, one token and a prompt.

Both files are of the same weights, run in turn in one process with the same number of threads. Routers are random: each layer's rule is set
on its own scores of the timed tokens, so that the wanted fraction of the experts runs. Rows say which way the experts ran (`OnnxConfig`).

Letters: S sequence.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.cases.generate_cpu import SMOLLM2, TINY
from bench.common import numbers, p80_over_p20, whole_numbers
from moeify import ConvertConfig, convert, example_inputs, find_ffn_sites, moe_layers, record_active, set_mode
from moeify.export import OnnxConfig, to_onnx
from moeify.select import Threshold
from moeify.split import ContiguousSplit

LAYERS = 4  # of 30: the tracer takes a second for each


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--sizes", type=whole_numbers, default=(8, 64), metavar="G,G", help="neurons of an expert; 8,64 by default")
    parser.add_argument("--fractions", type=numbers, default=(0.5, 0.25), metavar="F,F", help="active fractions; 0.5,0.25 by default")
    parser.add_argument("--tokens", type=whole_numbers, default=(1, 128), metavar="S,S", help="of a forward; 1,128 by default")
    parser.add_argument("--rounds", type=int, help="timed forwards of each side; 30, with --quick 2")


def run(
    *,
    quick: bool,
    sizes: Sequence[int] = (8, 64),
    fractions: Sequence[float] = (0.5, 0.25),
    tokens: Sequence[int] = (1, 128),
    rounds: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per expert size, active fraction and number of tokens; medians over the rounds.

    Args:
        quick: a tiny model, one size and fraction.
        sizes: G.
        fractions: wanted active fractions.
        tokens: S.
        rounds: timed forwards.
    """
    rounds = rounds or (2 if quick else 30)
    if quick:
        sizes, fractions, tokens = sizes[:1], fractions[:1], tokens[:1]
    torch.manual_seed(0)
    shape = (TINY if quick else SMOLLM2) | {"num_hidden_layers": 1 if quick else LAYERS}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    sites = find_ffn_sites(model, example_inputs(model))
    for size in sizes:
        converted = AutoModelForCausalLM.from_config(model.config).eval()
        converted.load_state_dict(model.state_dict())
        convert(converted, ConvertConfig(expert_size=size, split=ContiguousSplit()), sites=sites)
        with tempfile.TemporaryDirectory(prefix="moeify-") as folder:
            set_mode(converted, "dense")
            to_onnx(converted, Path(folder, "dense.onnx"))
            set_mode(converted, "moe")
            for wanted in fractions:
                for length in tokens:
                    ids = torch.randint(0, shape["vocab_size"], (1, length))
                    active = _set_fraction(converted, ids, wanted)
                    report = to_onnx(converted, Path(folder, "moe.onnx"), config=OnnxConfig())
                    way = "shared" if length <= OnnxConfig().few_tokens else next(iter(report.ffns.values()))
                    dense, ours = _times([Path(folder, f"{name}.onnx") for name in ("dense", "moe")], ids, rounds=rounds)
                    yield {
                        "case": "onnx",
                        "layers": shape["num_hidden_layers"],
                        "expert_size": size,
                        "tokens": length,
                        "active_fraction": active,
                        "way": way,
                        "dense_ms": statistics.median(dense),
                        "ours_ms": statistics.median(ours),
                        "speedup": statistics.median(dense) / statistics.median(ours),
                        "spread": max(p80_over_p20(dense), p80_over_p20(ours)),
                        "max_error": report.max_error,
                    }


@torch.no_grad()
def _set_fraction(model: torch.nn.Module, ids: torch.Tensor, wanted: float) -> float:
    """Thresholds at which the wanted fraction of each layer's scores is above, layer by layer; the fraction that runs."""
    for moe in moe_layers(model).values():
        scores: list[torch.Tensor] = []
        hook = moe.router.register_forward_hook(lambda _m, _a, out, kept=scores: kept.append(out))
        model(ids)
        hook.remove()
        moe.rule = Threshold(theta=float(torch.quantile(scores[0].flatten()[:1_000_000], 1 - wanted)))
    with record_active(model) as stats:
        model(ids)
    return stats.active_fraction()


def _times(paths: Sequence[Path], ids: torch.Tensor, *, rounds: int) -> list[list[float]]:
    """Milliseconds of each file's forwards, taken in turns after two of warm-up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = [onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in paths]
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    times: list[list[float]] = [[] for _ in paths]
    for i in range(-2, rounds):
        for session, found in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(["logits"], feed)
            if i >= 0:
                found.append(1000 * (time.perf_counter() - start))
    return times
