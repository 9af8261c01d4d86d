"""Training-free methods side by side: one model, the same calibration tokens, the same windows; quality against a token's cost.

Each method skips a wanted share of what it acts on: of the input channels of all linear layers of the blocks, of those of the FFNs, or of
the FFNs' neurons or experts. A row says what was skipped on the evaluation text, and counts routers and whatever else runs:
``block_weights`` is the share of the blocks' linear weights that a token needs, ``flops`` and ``bytes`` are those of the whole model
(bytes: of decoding one token), each over the dense model's.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from bench.common import numbers, words
from bench.tiny import save_tiny
from moeify import CalibrationConfig, ConvertConfig, DataConfig, find_linear_sites, model_cost, model_weights, to_dense
from moeify._config import lookup
from moeify.channels import record_channels
from moeify.data import lm_batches, text_windows
from moeify.errors import ConfigError
from moeify.evaluate import DenseReference, measure_quality
from moeify.hf.checkpoint import load_model
from moeify.layers import moe_layers, record_active, set_rule
from moeify.pipeline import convert_model, thin_model
from moeify.routers import (
    GateRouterConfig,
    LowRankRouterConfig,
    MLPRouterConfig,
    NormRouterConfig,
    OracleRouterConfig,
    RandomRouterConfig,
    RouterConfig,
)
from moeify.select import RULES, DynKMax, Threshold, TopK
from moeify.sites import ROLES
from moeify.split import BalancedKMeans, ContiguousSplit, SplitConfig
from moeify.thin import ThinConfig

FFN = ("ffn_in", "ffn_hidden")


@dataclass(frozen=True, kw_only=True)
class Channels:
    """A method of `moeify thin`."""

    score: str
    allocate: str
    roles: tuple[str, ...] = ROLES


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A method of `moeify convert`."""

    router: RouterConfig
    expert_size: int = 1
    rule: type = Threshold
    split: SplitConfig = field(default_factory=ContiguousSplit)


METHODS: dict[str, Channels | Experts] = {
    "teal": Channels(score="magnitude", allocate="uniform"),
    "teal greedy": Channels(score="magnitude", allocate="greedy"),
    "wina": Channels(score="wina", allocate="uniform"),
    "wina greedy": Channels(score="wina", allocate="greedy"),
    "sensitivity": Channels(score="sensitivity", allocate="shared"),
    "ffn teal": Channels(score="magnitude", allocate="uniform", roles=FFN),
    "ffn wina": Channels(score="wina", allocate="uniform", roles=FFN),
    "ffn sensitivity": Channels(score="sensitivity", allocate="shared", roles=FFN),
    "cats": Experts(router=GateRouterConfig(scale="none")),
    "chess": Experts(router=GateRouterConfig(scale="up")),
    "low rank": Experts(router=LowRankRouterConfig(rank=128)),
    "top-k activation": Experts(router=OracleRouterConfig(of="activation"), rule=TopK),
    "d2dmoe": Experts(router=NormRouterConfig(width=128), expert_size=8, rule=DynKMax, split=BalancedKMeans()),
    "moefication": Experts(router=MLPRouterConfig(), expert_size=32, rule=TopK, split=BalancedKMeans()),
    "random": Experts(router=RandomRouterConfig(), expert_size=8, rule=TopK),
    "oracle": Experts(router=OracleRouterConfig(), expert_size=8, split=BalancedKMeans()),
}
"""A method joins by a line. Routers are fitted to the calibration tokens; nothing else is trained."""
_SMALL = ("teal", "sensitivity", "chess", "oracle")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument(
        "--model", metavar="MODEL", help="Hub id, folder or .gguf file of a dense language model; without it a tiny random one"
    )
    parser.add_argument("--calibration", default="builtin:pydoc", help="text to calibrate on")
    parser.add_argument("--calibration-tokens", type=int, default=100_000, help="of it; 2048 with --quick")
    parser.add_argument("--data", default="builtin:pydoc", help="text to measure on")
    parser.add_argument("--split", default="all", help="its part: all, or train, validation, test")
    parser.add_argument("--tokens", type=int, default=4096, help="of it, in windows of --window; 512 with --quick")
    parser.add_argument("--window", type=int, help="tokens a window; 1024, of the tiny model 64")
    parser.add_argument("--skip", type=numbers, default=(0.25, 0.4, 0.5), metavar="F,F", help="wanted shares; 0.25,0.4,0.5 by default")
    parser.add_argument("--methods", type=words, metavar="A,B", help=f"some of {', '.join(METHODS)}; all by default")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of quality against block weights")


def run(
    *,
    quick: bool,
    model: str | None = None,
    calibration: str = "builtin:pydoc",
    calibration_tokens: int = 100_000,
    data: str = "builtin:pydoc",
    split: str = "all",
    tokens: int = 4096,
    window: int | None = None,
    skip: Sequence[float] = (0.25, 0.4, 0.5),
    methods: Sequence[str] | None = None,
    plot: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: the dense model, then one for each method and wanted share."""
    chosen = {name: lookup(METHODS, name, where="--methods") for name in methods or (_SMALL if quick else METHODS)}
    if wrong := [share for share in skip if not 0 < share < 1 or round(share / 0.05, 6) % 1]:
        raise ConfigError(f"--skip takes multiples of 0.05 in (0, 1), got {wrong[0]}.")
    calibration_tokens, tokens = (2048, 512) if quick else (calibration_tokens, tokens)
    window = window or (64 if model is None else 1024)
    with tempfile.TemporaryDirectory() as folder:
        net, tokenizer = load_model(model or save_tiny(Path(folder) / "dense"), dtype=torch.float32)
        few = {"window": min(window, 512), "max_tokens": calibration_tokens, "seed": 0}
        fitted = lm_batches(text_windows(DataConfig(data=calibration, split="train", **few), tokenizer), batch_size=4)
        windows = text_windows(DataConfig(data=data, split=split, window=window, max_tokens=tokens), tokenizer)
        batches = [{"input_ids": ids} for ids in windows.split(1)]
        reference = DenseReference(net, batches, metric="perplexity")
        ids = {"input_ids": windows[:1, :16]}
        linear_bytes = sum(4 * site.d_in * site.d_out for site in find_linear_sites(net, ids))  # loaded as fp32
        shared = {"model": model or "random Llama", "calibration_tokens": calibration_tokens, "tokens": windows.numel()}
        rows = [
            shared | {"method": "dense", "perplexity": reference.quality, "ratio": 1.0, "block_weights": 1.0, "flops": 1.0, "bytes": 1.0}
        ]
        yield rows[0]
        for name, method in chosen.items():
            if model is None and isinstance(method, Experts):
                method = replace(method, expert_size=min(method.expert_size, 4))  # of 48 neurons
            for row in _measured(net, method, fitted, batches, skip, reference=reference, linear_bytes=linear_bytes):
                rows.append(shared | {"method": name} | row)
                yield rows[-1]
    if plot is not None:
        _plot(rows, plot)


def _measured(
    net: nn.Module,
    method: Channels | Experts,
    fitted: Sequence[Mapping[str, Any]],
    batches: Sequence[Mapping[str, Any]],
    skip: Sequence[float],
    *,
    reference: DenseReference,
    linear_bytes: int,
) -> Iterator[dict[str, Any]]:
    """One row for each share; the model is dense again afterwards."""
    record: dict[str, Any] = {}
    seconds = 0.0
    for share in skip:
        start = time.perf_counter()
        if isinstance(method, Channels):
            config = ThinConfig(skip_frac=share, score=method.score, allocate=method.allocate, roles=method.roles)  # type: ignore[arg-type]
            thin_model(net, fitted, config=config)
            seconds = time.perf_counter() - start
        else:
            if not record:
                everything = method.rule.at(1 if method.rule is TopK else 0.0)  # the calibration sets it
                options = {"expert_size": method.expert_size, "router": method.router, "rule": everything, "split": method.split}
                target = CalibrationConfig(target_active=1 - share, max_tokens=None)
                with tempfile.TemporaryDirectory() as work:
                    record = convert_model(net, fitted, config=ConvertConfig(**options), calibration=target, work=Path(work) / "work")
                seconds = time.perf_counter() - start
            at = [round(t, 2) for t in record["targets"]].index(round(1 - share, 2))
            knobs = record["knobs"][method.rule.name]
            set_rule(net, {site: RULES[method.rule.name].at(values[at]) for site, values in knobs.items()})
        yield {"skip": share} | _quality(net, batches, reference, linear_bytes) | {"calibration_s": seconds}
        if isinstance(method, Channels):
            to_dense(net)
    to_dense(net)


@torch.no_grad()
def _quality(net: nn.Module, batches: Sequence[Mapping[str, Any]], reference: DenseReference, linear_bytes: int) -> dict[str, Any]:
    with record_active(net) as active, record_channels(net) as skipped:
        found = measure_quality(net, batches, metric="perplexity", reference=reference)
    kept = active.per_layer() | {name: 1 - share for name, share in skipped.per_layer().items()}
    cost, weights = model_cost(net, batches[0]), model_weights(net)
    dense_bytes = weights.read_bytes_per_token() - sum(size for _, size in weights.router.values())
    read = weights.read_bytes_per_token(kept)
    assert found.agreement is not None
    return {
        "reached": 1 - active.active_fraction() if moe_layers(net) else skipped.skipped_frac(),
        "perplexity": found.value,
        "ratio": found.value / reference.quality,
        "kl": found.agreement.kl,
        "top1": found.agreement.top1,
        "block_weights": 1 - (dense_bytes - read) / linear_bytes,
        "flops": cost.flops_fraction(kept),
        "bytes": read / dense_bytes,
    }


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name in dict.fromkeys(row["method"] for row in rows[1:]):
        points = sorted((row["block_weights"], row["ratio"]) for row in rows if row["method"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="weights of the blocks that a token needs / all", ylabel="perplexity / dense", ylim=(0.98, 2.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
