"""Training-free methods side by side: one model, the same calibration tokens, the same windows; quality against a token's cost.

Each method skips a wanted share of what it acts on: of the input channels of all linear layers of the blocks, of those of the FFNs, or of
the FFNs' neurons or experts. A row says what was skipped on the evaluation text, and counts routers and whatever else runs:
``block_weights`` is the share of the blocks' linear weights that a token needs, ``flops`` and ``bytes`` are those of the whole model
(bytes: of decoding one token), each over the dense model's. ``speed`` is measured: tokens per second of Hugging Face `generate` over those
of the dense model, which takes turns with it. ``zeroshot`` is the mean accuracy over the files of ``--zeroshot``.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from bench.cases.generate_cpu import Side, take_turns
from bench.common import numbers, words
from bench.pruning import Pruned, prune
from bench.tiny import save_tiny
from bench.zeroshot import accuracies, read_questions
from moeify import CalibrationConfig, ConvertConfig, DataConfig, find_ffn_sites, find_linear_sites, model_cost, model_weights, to_dense
from moeify._config import lookup
from moeify.channels import record_channels
from moeify.controls import record_active, set_rule
from moeify.data import lm_batches, text_windows
from moeify.errors import ConfigError
from moeify.evaluate import DenseReference, measure_quality
from moeify.hf.load import load_model
from moeify.layers import moe_layers
from moeify.pipeline import NeuronConfig, convert_model, thin_model
from moeify.routers import (
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


@dataclass(frozen=True, kw_only=True)
class Static:
    """Neurons that leave for all tokens (`bench.pruning`)."""

    score: str


def _neurons(name: str) -> Experts:
    method = NeuronConfig(method=name, skip_frac=0.0).chosen()
    return Experts(router=method.router, rule=method.rule)


Method = Channels | Experts | Static
METHODS: dict[str, Method] = {
    "teal": Channels(score="magnitude", allocate="uniform"),
    "teal greedy": Channels(score="magnitude", allocate="greedy"),
    "wina": Channels(score="wina", allocate="uniform"),
    "wina greedy": Channels(score="wina", allocate="greedy"),
    "sensitivity": Channels(score="sensitivity", allocate="shared"),
    "ffn teal": Channels(score="magnitude", allocate="uniform", roles=FFN),
    "ffn wina": Channels(score="wina", allocate="uniform", roles=FFN),
    "ffn sensitivity": Channels(score="sensitivity", allocate="shared", roles=FFN),
    "cats": _neurons("cats"),
    "chess": _neurons("chess"),
    "low rank": _neurons("predictor"),
    "top-k activation": _neurons("topk"),
    "d2dmoe": Experts(router=NormRouterConfig(width=128), expert_size=8, rule=DynKMax, split=BalancedKMeans()),
    "moefication": Experts(router=MLPRouterConfig(), expert_size=32, rule=TopK, split=BalancedKMeans()),
    "cfsp": Static(score="activation"),
    "cfsp, weights": Static(score="weights"),
    "random": Experts(router=RandomRouterConfig(), expert_size=8, rule=TopK),
    "oracle": Experts(router=OracleRouterConfig(), expert_size=8, split=BalancedKMeans()),
}
"""A method joins by a line. Routers are fitted to the calibration tokens; nothing else is trained."""
_SMALL = ("teal", "sensitivity", "chess", "cfsp", "oracle")
_PROMPT_TOKENS, _NEW_TOKENS = 32, 24
_LEAST, _WORST = 1e-3, 20.0  # of a picture: what is lost below is lost in the noise, and a ratio above is no model any more
_COLUMNS = {
    "skip": "wanted",
    "reached": "skipped",
    "block_weights": "block weights",
    "bytes": "bytes a token",
    "flops": "FLOPs",
    "speed": "tokens/s",
    "ratio": "perplexity",
    "kl": "KL",
    "top1": "same top-1",
    "zeroshot": "zero-shot",
}


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
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of `generate` for each row; 0: none, 1 with --quick")
    parser.add_argument("--zeroshot", type=Path, metavar="DIR", help="folder of multiple-choice questions (.parquet)")
    parser.add_argument("--questions", type=int, default=50, help="of each file")
    parser.add_argument("--zeroshot-skip", type=numbers, metavar="F,F", help="shares at which questions are asked; all by default")
    parser.add_argument("--done", type=Path, metavar="FILE", help="rows of an earlier call, which are not measured again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of quality against block weights, and against speed")
    parser.add_argument("--table", type=Path, metavar="FILE", help="all rows as a markdown table")


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
    rounds: int = 3,
    zeroshot: Path | None = None,
    questions: int = 50,
    zeroshot_skip: Sequence[float] | None = None,
    done: Path | None = None,
    plot: Path | None = None,
    table: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: the dense model, then one for each method and wanted share."""
    chosen = {name: lookup(METHODS, name, where="--methods") for name in methods or (_SMALL if quick else METHODS)}
    if wrong := [share for share in skip if not 0 < share < 1 or round(share / 0.05, 6) % 1]:
        raise ConfigError(f"--skip takes multiples of 0.05 in (0, 1), got {wrong[0]}.")
    calibration_tokens, tokens, rounds = (2048, 512, min(rounds, 1)) if quick else (calibration_tokens, tokens, rounds)
    window = window or (64 if model is None else 1024)
    tasks = {} if zeroshot is None else read_questions(zeroshot, most=questions)
    shared: dict[str, Any] = {"model": model or "random Llama", "calibration": calibration, "calibration_tokens": calibration_tokens}
    shared |= {"data": data, "split": split, "tokens": tokens, "window": window, "questions": len(tasks) * questions, "rounds": rounds}
    shared |= {"threads": torch.get_num_threads()}
    known = _earlier(done, shared)
    with tempfile.TemporaryDirectory() as folder:
        net, tokenizer = load_model(model or save_tiny(Path(folder) / "dense"), dtype=torch.float32)
    few = {"window": min(window, 512), "max_tokens": calibration_tokens, "seed": 0}
    windows = text_windows(DataConfig(data=data, split=split, window=window, max_tokens=tokens), tokenizer)
    bench = _Bench(
        net,
        fitted=lm_batches(text_windows(DataConfig(data=calibration, split="train", **few), tokenizer), batch_size=4),
        windows=windows,
        rounds=rounds,
        ask=lambda: accuracies(net, tokenizer, tasks),
        asked_at=() if not tasks else tuple(skip) if zeroshot_skip is None else tuple(zeroshot_skip),
    )
    rows = [known.get(("dense", 0.0)) or shared | {"method": "dense"} | bench.dense()]
    yield rows[0]
    for name, method in chosen.items():
        if model is None and isinstance(method, Experts):
            method = replace(method, expert_size=min(method.expert_size, 4))  # of 48 neurons
        old = {share: known[name, share] for share in skip if (name, share) in known}
        yield from old.values()
        rows += old.values()
        for row in bench.measured(method, [share for share in skip if share not in old]):
            rows.append(shared | {"method": name} | row)
            yield rows[-1]
    if plot is not None:
        _plot(rows, plot)
    if table is not None:
        table.write_text(markdown(rows), encoding="utf-8")


def _earlier(path: Path | None, shared: Mapping[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    """Rows of a file by method and wanted share.

    Raises:
        ConfigError: they were measured otherwise, or the file holds something else. A last line that was cut short is left out.
    """
    if path is None:
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ConfigError(f"--done: '{path}' does not hold rows of this case: {error}.") from error
    for row in rows:
        if wrong := next((key for key, value in shared.items() if row.get(key) != value), None):
            raise ConfigError(f"--done: '{path}' was measured with {wrong} {row.get(wrong)!r}, and this is {shared[wrong]!r}.")
    return {(row["method"], row.get("skip", 0.0)): row for row in rows}


class _Bench:
    """A dense model, and everything that each method is measured with."""

    def __init__(
        self,
        net: Any,
        *,
        fitted: Sequence[Mapping[str, Any]],
        windows: Tensor,
        rounds: int,
        ask: Callable[[], dict[str, float]],
        asked_at: Sequence[float],
    ) -> None:
        self.net, self.fitted, self.rounds, self.ask, self.asked_at = net, fitted, rounds, ask, asked_at
        self.batches = [{"input_ids": ids} for ids in windows.split(1)]
        self.reference = DenseReference(net, self.batches, metric="perplexity")
        ids = {"input_ids": windows[:1, :16]}
        self.ffn_sites = find_ffn_sites(net, ids)
        self.linear_bytes = sum(4 * site.d_in * site.d_out for site in find_linear_sites(net, ids))  # loaded as fp32
        self.dense_bytes = model_weights(net).read_bytes_per_token()
        self.dense_flops = model_cost(net, self.batches[0]).dense_flops_per_token
        self.timed = copy.deepcopy(net) if rounds else None
        self.prompt = windows[:1, :_PROMPT_TOKENS]

    def dense(self) -> dict[str, Any]:
        """The row that all others are compared with."""
        row = {"skip": 0.0, "perplexity": self.reference.quality} | dict.fromkeys(("ratio", "block_weights", "flops", "bytes"), 1.0)
        return row | ({"speed": 1.0} if self.rounds else {}) | self._asked(0.0, always=True)

    def measured(self, method: Method, skip: Sequence[float]) -> Iterator[dict[str, Any]]:
        """One row for each share; the model is dense again afterwards."""
        record: dict[str, Any] = {}
        seconds = 0.0
        for share in skip:
            start = time.perf_counter()
            pruned: Pruned | None = None
            if isinstance(method, Channels):
                config = ThinConfig(skip_frac=share, score=method.score, allocate=method.allocate, roles=method.roles)  # type: ignore[arg-type]
                thin_model(self.net, self.fitted, config=config)
            elif isinstance(method, Static):
                pruned = prune(self.net, self.ffn_sites, self.fitted, keep_frac=1 - share, score=method.score)  # type: ignore[arg-type]
            elif not record:
                record = self._convert(method, skip)
            if isinstance(method, Experts):
                at = [round(t, 2) for t in record["targets"]].index(round(1 - share, 2))
                knobs = record["knobs"][method.rule.name]
                set_rule(self.net, {site: RULES[method.rule.name].at(values[at]) for site, values in knobs.items()})
            if share == skip[0] or not isinstance(method, Experts):
                seconds = time.perf_counter() - start
            yield {"skip": share} | self._quality(pruned) | self._speed() | self._asked(share) | {"calibration_s": seconds}
            if isinstance(method, Channels):
                to_dense(self.net)
            if pruned is not None:
                pruned.undo()
        to_dense(self.net)

    def _convert(self, method: Experts, skip: Sequence[float]) -> dict[str, Any]:
        everything = method.rule.at(1 if method.rule is TopK else 0.0)  # the calibration sets it
        options = {"expert_size": method.expert_size, "router": method.router, "rule": everything, "split": method.split}
        target = CalibrationConfig(target_active=1 - skip[0], max_tokens=None)
        with tempfile.TemporaryDirectory() as work:
            return convert_model(self.net, self.fitted, config=ConvertConfig(**options), calibration=target, work=Path(work) / "work")

    @torch.no_grad()
    def _quality(self, pruned: Pruned | None) -> dict[str, Any]:
        with record_active(self.net) as active, record_channels(self.net) as skipped:
            found = measure_quality(self.net, self.batches, metric="perplexity", reference=self.reference)
        kept = active.per_layer() | {name: 1 - share for name, share in skipped.per_layer().items()}
        cost, weights = model_cost(self.net, self.batches[0]), model_weights(self.net)
        read = weights.read_bytes_per_token(kept)
        assert found.agreement is not None
        if pruned is not None:
            reached = 1 - pruned.neurons[0] / pruned.neurons[1]
        else:
            reached = 1 - active.active_fraction() if moe_layers(self.net) else skipped.skipped_frac()
        return {
            "reached": reached,
            "perplexity": found.value,
            "ratio": found.value / self.reference.quality,
            "kl": found.agreement.kl,
            "top1": found.agreement.top1,
            "block_weights": 1 - (self.dense_bytes - read) / self.linear_bytes,
            "flops": cost.flops_per_token(kept) / self.dense_flops,
            "bytes": read / self.dense_bytes,
        }

    def _speed(self) -> dict[str, Any]:
        if not self.rounds:
            return {}
        sides = {"dense": Side(self.timed), "ours": Side(self.net)}
        times = take_turns(sides, self.prompt, new_tokens=_NEW_TOKENS, rounds=self.rounds)
        steps = {name: statistics.median(t.step_s for t in found) for name, found in times.items()}
        return {"speed": steps["dense"] / steps["ours"]}

    def _asked(self, share: float, *, always: bool = False) -> dict[str, Any]:
        if not self.asked_at or not (always or share in self.asked_at):
            return {}
        found = self.ask()
        return {"zeroshot": statistics.mean(found.values()), "tasks": found}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; shares of the dense model in percent."""
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    lines = ["| method | " + " | ".join(_COLUMNS[name] for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += (f"| {row['method']} | " + " | ".join(_cell(name, row.get(name)) for name in columns) + " |" for row in rows)
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("ratio", "kl"):
        return f"{value:.3f}"
    return f"{value:.2f}x" if name == "speed" else f"{value:.0%}" if name != "zeroshot" else f"{value:.1%}"


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"block_weights": "weights of the blocks that a token needs / all", "speed": "tokens per second / dense"}
    labels = {name: label for name, label in labels.items() if any(name in row for row in rows[1:])}
    figure, panels = pyplot.subplots(1, len(labels), figsize=(7 * len(labels), 5), squeeze=False)
    for axes, (column, label) in zip(panels[0], labels.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in rows[1:])):
            chosen = [row for row in rows if row["method"] == name and column in row and row["ratio"] < _WORST]
            points = [(row[column], max(row["ratio"] - 1, _LEAST)) for row in chosen]
            if not points:
                continue
            color, line = f"C{i % 10}", ("-", "--", ":")[i // 10]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=color, linestyle=line)
        axes.set(xlabel=label, ylabel="perplexity / dense - 1", yscale="log")
        axes.grid(alpha=0.3)
    panels[0, -1].legend(fontsize=7, handlelength=3.5, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
