"""Switchable sparse-dense pre-training beside dense training and its ablations: the same model, data, seeds and tokens in every arm.

    dense           dense training, watched as SSD watches it
    ssd             SSD as ``ssd.toml`` has it
    one_switch      dense, then sparse to the end: as many sparse steps as SSD had
    random_experts  SSD's very phases, with random groups of neurons and random routers
    sparse_only     experts from the first step on; fewer FLOPs than SSD, so that there is a second one:
    sparse_longer   the same with more steps, until it has had SSD's FLOPs

Every arm is a run of `moeify pretrain` below ``--work``, where it is found again and a killed one goes on. Seconds of curves are not its
own, which depend on the machine's other work and are told as well: they are steps of a plain dense model and of SSD's final model, taken in
turn in one process, times the steps of each kind.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from bench.common import p80_over_p20, whole_numbers, words
from bench.paper.code import check_stages
from moeify import set_mode
from moeify._config import from_dict, to_dict
from moeify.controls import set_rule
from moeify.data import text_windows
from moeify.errors import ConfigError
from moeify.hf.folders import PRETRAINING_FILE
from moeify.hf.load import load_model
from moeify.hf.random import random_model
from moeify.layers import moe_layers
from moeify.pipeline.pretrain import pretrain
from moeify.pipeline.pretrain_data import source_id
from moeify.pipeline.pretrain_recipe import PretrainConfig, read_pretrain
from moeify.pipeline.pretrain_result import PretrainResult
from moeify.pipeline.stages import write_json
from moeify.select import TopK
from moeify.ssd import modes
from moeify.train.capture import fast_dtype

ARMS = ("dense", "ssd", "one_switch", "random_experts", "sparse_only", "sparse_longer")
"""In this order: the later ones take their phases from SSD's."""
RECIPE = Path(__file__).with_suffix(".toml")
"""Model, training and SSD's options."""
_SELECTED = (1, 2, 4, 8, 16, 32)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--data", help="text to train on: a folder or file with splits (default: builtin:pydoc)")
    parser.add_argument("--seeds", type=whole_numbers, default=(0, 1), help="of weights and order (default: 0,1; 0 with --quick)")
    parser.add_argument("--arms", type=words, default=ARMS, help=f"default: {','.join(ARMS)}")
    parser.add_argument("--steps", type=int, help="of each run (default: the recipe's 1000; 40 with --quick)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="options of the recipe")
    parser.add_argument("--work", type=Path, help="keeps the runs, so that none is done twice (default: thrown away)")
    parser.add_argument("--keep-runs", action="store_true", help="use runs in --work that other code of moeify made")
    parser.add_argument("--plot", type=Path, help="picture of the curves, .svg or .png")


def run(
    *,
    quick: bool,
    data: str | None = None,
    seeds: Sequence[int] = (0, 1),
    arms: Sequence[str] = ARMS,
    steps: int | None = None,
    settings: Sequence[str] = (),
    work: Path | None = None,
    keep_runs: bool = False,
    plot: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One row an arm and seed.

    Yields:
        "loss" of the final model in dense mode on validation (nats), "ratio" of it to that of dense training, "moe_ratio": the mixture's
        loss over "loss" by the experts that a token runs, "flops" of training (measurements included) and "gain" (dense training's over
        these), "sparse_share" of the steps, "curve" as [step, validation loss, FLOPs, seconds], and of what is watched "sparsity",
        "similarity", "captured" and "loss_gap" as [step, value] and "switches" as [step, new mode].

    Raises:
        ConfigError: an unknown arm, or one without the arms that it is compared with.
    """
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"--arms: no arm {arm!r}; known: {', '.join(ARMS)}.")
    if "ssd" not in arms and set(arms) - {"dense"}:
        raise ConfigError("--arms: the ablations take their phases from SSD's; add ssd.")
    seeds, steps = (seeds[:1], steps or 40) if quick else (seeds, steps)
    shrunk = _QUICK if quick else ()
    chosen = [f"data.data={data}"] if data else []
    chosen += [f"train.steps={steps}"] if steps else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        rows: list[dict[str, Any]] = []
        for seed in seeds:
            base = read_pretrain(RECIPE, settings=[*shrunk, *chosen, *settings, f"train.seed={seed}", f"ssd.seed={seed}"])
            _check_work(folder, base, keep=keep_runs)
            done: dict[str, PretrainResult] = {}
            for arm in (arm for arm in ARMS if arm in arms):
                done[arm] = _pretrained(_arm(arm, base, done.get("ssd")), folder / f"{arm}-{seed}")
            seconds = _step_seconds(folder / f"ssd-{seed}", base, repeats=2 if quick else 8) if "ssd" in done else {}
            for arm, result in done.items():
                rows.append(_row(arm, seed, result, folder / f"{arm}-{seed}", dense=done.get("dense"), seconds=seconds))
                yield rows[-1]
    if plot is not None:
        plot_rows(rows, plot)


_QUICK = (
    "model.architecture.n_embd=64",
    "model.architecture.n_inner=256",
    "model.architecture.n_head=2",
    "model.architecture.n_layer=2",
    "model.architecture.n_positions=64",
    "data.window=64",
    "data.max_tokens=100000",
    "validation.max_tokens=4096",
    "train.warmup_steps=2",
    "train.eval_every=10",
    "ssd.min_sparsity=0.4",  # so that there are phases to speak of
    "ssd.min_similarity=0.5",
    "ssd.probe_frac=0.05",
)


def _arm(arm: str, base: PretrainConfig, ssd: PretrainResult | None) -> PretrainConfig:
    """An arm's recipe."""
    assert base.ssd is not None
    if arm == "dense":
        return replace(base, name=arm, ssd=replace(base.ssd, min_sparsity=1.0, schedule="adaptive", switches=(), final_sparse_frac=0.0))
    if arm == "ssd":
        return replace(base, name=arm)
    assert ssd is not None
    steps = base.train.steps
    if not (phases := tuple(step / steps for step, _ in _switches(ssd))):
        raise ConfigError(
            "SSD has not switched once in so few steps, so there is nothing to compare; raise --steps, or lower ssd.min_sparsity."
        )
    if arm == "one_switch":
        return replace(base, name=arm, ssd=replace(base.ssd, schedule="fixed", switches=(ssd.flops["dense_steps"] / steps,)))
    if arm == "random_experts":
        return replace(base, name=arm, ssd=replace(base.ssd, schedule="fixed", experts="random", switches=phases))
    sparse_only = replace(base, name=arm, ssd=replace(base.ssd, schedule="fixed", switches=(0.0,)))
    if arm == "sparse_only":
        return sparse_only
    trained = ssd.flops["dense_flops"] + ssd.flops["sparse_flops"]  # what is measured on the way is left out
    return replace(sparse_only, train=replace(base.train, steps=round(trained / _flops_of_step(ssd, "sparse"))))


def _switches(result: PretrainResult) -> list[tuple[int, str]]:
    """(step, new mode) of each."""
    return [(d.step, d.after) for d in result.decisions if d.after != d.before]


def _row(
    arm: str, seed: int, result: PretrainResult, out: Path, *, dense: PretrainResult | None, seconds: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    model, tokenizer = load_model(out)
    windows_WS = text_windows(from_dict(PretrainConfig, result.config, where=str(out)).validation, tokenizer)
    flops = {mode: _flops_of_step(result, mode) for mode in ("dense", "sparse")}
    steps = modes(result.decisions, len(result.losses))
    loss, moe_loss = _losses_by_selected(model, windows_WS)
    timed = {f"{name}_step_s": value for name, (value, _) in seconds.items()}
    if seconds:
        timed |= {"step_gain": seconds["dense"][0] / seconds["sparse"][0], "spread": seconds["dense"][1]}
    probes = [probe.signals for probe in result.probes]
    return {
        "arm": arm,
        "seed": seed,
        "parameters": result.parameters,
        "tokens": result.tokens,
        "steps": len(result.losses),
        "sparse_share": steps.count("sparse") / len(steps),
        "loss": loss,
        **({} if dense is None else {"ratio": result.evaluation["dense"]["loss"] / dense.evaluation["dense"]["loss"]}),
        "moe_ratio": {k: value / loss for k, value in moe_loss.items()},
        "flops": result.flops["total_flops"],
        "gain": result.flops["gain"] if dense is None else dense.flops["all_dense_flops"] / result.flops["total_flops"],
        "seconds": result.seconds,
        **timed,
        "curve": [
            [step, value, sum(flops[mode] for mode in steps[:step]), sum(seconds[mode][0] for mode in steps[:step]) if seconds else None]
            for step, value in result.evals
        ],
        "sparsity": [[s.step, s.sparsity] for s in probes],
        "similarity": [[s.step, s.similarity] for s in probes if s.similarity is not None],
        "captured": [[s.step, s.captured] for s in probes if s.captured is not None],
        "loss_gap": [[s.step, s.loss_gap] for s in probes if s.loss_gap is not None],
        "switches": _switches(result),
        "data": result.data,
    }


def _check_work(folder: Path, base: PretrainConfig, *, keep: bool) -> None:
    """Refuse runs of other data, and without ``keep`` of other code: the runs' own names know neither.

    Raises:
        ConfigError: names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = json.loads(json.dumps({"data": source_id(base.data), "validation": source_id(base.validation)}))
    note = folder / "data.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != now:
        raise ConfigError(f"--work: the runs in '{folder}' are of other data; give another folder.")
    check_stages(folder, keep=keep, options=("--work", "--keep-runs"))
    write_json(note, now)


def _pretrained(recipe: PretrainConfig, out: Path) -> PretrainResult:
    """A run; one that is finished is read, a killed one goes on.

    Raises:
        ConfigError: there is another one.
    """
    if not (path := out / PRETRAINING_FILE).exists():
        return pretrain(recipe, out)
    found = from_dict(PretrainResult, json.loads(path.read_text(encoding="utf-8")), where=str(path))
    if _without_phases(found.config) != _without_phases(json.loads(json.dumps(to_dict(recipe)))):
        raise ConfigError(f"--work: '{out}' is of another recipe; give another folder.")
    return found


def _without_phases(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the lengths of phases, if it has none: dense training is the same whatever SSD's are."""
    if config["ssd"]["min_sparsity"] < 1:
        return dict(config)
    return {**config, "ssd": {key: value for key, value in config["ssd"].items() if key not in ("sparse_frac", "final_dense_frac")}}


def _flops_of_step(result: PretrainResult, mode: str) -> float:
    """Mean over the steps of that mode; of a dense one that of all-dense training."""
    if mode == "dense":
        return result.flops["all_dense_flops"] / len(result.losses)
    return result.flops["sparse_flops"] / max(1.0, result.flops["sparse_steps"])


def _step_seconds(out: Path, recipe: PretrainConfig, *, repeats: int) -> dict[str, tuple[float, float]]:
    """Median and spread of a training step's seconds: of a plain dense model of random weights, and of a finished run's in sparse mode.

    The two take turns. What the dense one costs does not depend on its weights; which experts the other runs does.
    """
    sparse, tokenizer = load_model(out)
    ids_BS = text_windows(recipe.data, tokenizer)[: recipe.train.batch_sequences]
    architecture = {**recipe.model.architecture, "vocab_size": sparse.config.vocab_size}
    dense = random_model(architecture, auto_class="AutoModelForCausalLM", seed=recipe.train.seed)
    set_mode(sparse, "moe")
    for layer in moe_layers(sparse).values():
        layer.is_taught = True
    sides = {"dense": dense, "sparse": sparse}
    optimizers = {mode: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for mode, model in sides.items()}
    compute = fast_dtype(ids_BS.device)
    times: dict[str, list[float]] = {mode: [] for mode in sides}
    for repeat in range(-1, repeats):  # one to warm up
        for mode in sorted(sides, reverse=bool(repeat % 2)):
            sides[mode].train()
            start = time.perf_counter()
            with torch.autocast(ids_BS.device.type, dtype=compute, enabled=compute is not torch.float32):
                loss = sides[mode](input_ids=ids_BS, labels=ids_BS).loss
            loss.backward()
            optimizers[mode].step()
            optimizers[mode].zero_grad(set_to_none=True)
            if repeat >= 0:
                times[mode].append(time.perf_counter() - start)
    return {mode: (statistics.median(values), p80_over_p20(values)) for mode, values in times.items()}


@torch.no_grad()
def _losses_by_selected(model: nn.Module, windows_WS: Tensor) -> tuple[float, dict[str, float]]:
    """Losses of the dense mode, and of the mixture by the number of experts that a token runs: the same windows, the same products."""
    compute = fast_dtype(windows_WS.device)

    def loss() -> float:
        losses = []
        for ids_BS in windows_WS.split(32):
            with torch.autocast(ids_BS.device.type, dtype=compute, enabled=compute is not torch.float32):
                losses.append(model(input_ids=ids_BS, labels=ids_BS).loss.item() * len(ids_BS))
        return sum(losses) / len(windows_WS)

    set_mode(model, "dense")
    dense = loss()
    set_mode(model, "moe")
    experts = next(iter(moe_layers(model).values())).num_experts
    found = {}
    for k in (k for k in _SELECTED if k <= experts):
        set_rule(model, TopK(k=k))
        found[str(k)] = loss()
    return dense, found


# ---- the picture

_COLORS = dict(zip(ARMS, ("black", "C0", "C1", "C3", "C2", "C4"), strict=True))


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against FLOPs and seconds, the mixture's loss by experts, and what was watched, with the switches marked.

    Args:
        rows: of this case.
        path: .svg or .png.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((flops, seconds, experts), (dense, ssd, captured)) = pyplot.subplots(2, 3, figsize=(17, 9))
    for row in rows:
        style = {"color": _COLORS[row["arm"]], "label": row["arm"], "linewidth": 1.2}
        steps = [point for point in row["curve"] if point[0] > 0]
        flops.plot([point[2] for point in steps], [point[1] for point in steps], **style)
        if steps and steps[0][3] is not None:
            seconds.plot([point[3] for point in steps], [point[1] for point in steps], **style)
        experts.plot([int(k) for k in row["moe_ratio"]], list(row["moe_ratio"].values()), marker="o", markersize=3, **style)
    flops.set(xlabel="training FLOPs", ylabel="validation loss of the dense mode (nats)")
    seconds.set(xlabel="seconds, from steps of both modes timed in turn", ylabel="validation loss of the dense mode (nats)")
    experts.set(xlabel="experts that a token runs", ylabel="loss of the mixture / of its own dense mode", xscale="log")
    for axes, arm in ((dense, "dense"), (ssd, "ssd")):
        for row in (row for row in rows if row["arm"] == arm):
            _draw_watched(axes, row)
        axes.set(title=arm, xlabel="step", ylim=(0, 1.02))
    for row in (row for row in rows if row["arm"] == "ssd"):
        captured.plot(*zip(*row["captured"], strict=True), color="C0", label="captured activation mass")
        captured.plot(*zip(*row["loss_gap"], strict=True), color="C3", label="sparse minus dense loss (nats)")
    captured.set(title="ssd, in sparse phases", xlabel="step")
    for axes in (flops, seconds, experts, dense, ssd, captured):
        axes.grid(alpha=0.3)
        by_label = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # of several seeds one
        if by_label:
            axes.legend(by_label.values(), by_label.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _draw_watched(axes: Any, row: Mapping[str, Any]) -> None:
    axes.plot(*zip(*row["sparsity"], strict=True), color="C0", label="silent neurons")
    if row["similarity"]:
        axes.plot(*zip(*row["similarity"], strict=True), color="C1", label="similarity with the measurement before")
    began = None
    for step, mode in [*row["switches"], (row["steps"], "dense")]:
        if mode == "sparse":
            began = step
        elif began is not None:
            axes.axvspan(began, step, color="C2", alpha=0.12)
            began = None
