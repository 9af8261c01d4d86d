"""Switchable sparse-dense pre-training beside dense training and its ablations: the same model, data, seeds and tokens in every arm.

    dense           dense training, watched as SSD watches it
    ssd             SSD as ``ssd.toml`` has it
    one_switch      dense, then sparse to the end: as many sparse steps as SSD had
    random_experts  SSD's very phases, with random groups of neurons and random routers
    sparse_only     experts from the first step on; fewer FLOPs than SSD, so that there is a second one:
    sparse_longer   the same with more steps, until it has had SSD's FLOPs

Every arm is a run of `moeify pretrain` below ``--work``, where it is found again and a killed one goes on. Times come from steps of the
final model in both modes, taken in turn in one process; a run's own seconds are told as well, and depend on the machine's other work.
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
from moeify import set_mode
from moeify._config import from_dict, to_dict
from moeify.data import text_windows
from moeify.errors import ConfigError
from moeify.hf.checkpoint import PRETRAINING_FILE, load_model
from moeify.layers import moe_layers, set_rule
from moeify.pipeline.pretrain import pretrain
from moeify.pipeline.pretrain_recipe import PretrainConfig, read_pretrain
from moeify.pipeline.pretrain_result import PretrainResult
from moeify.select import TopK
from moeify.ssd import modes
from moeify.train.capture import fast_dtype

ARMS = ("dense", "ssd", "one_switch", "random_experts", "sparse_only", "sparse_longer")
"""In this order: the later ones take their phases from SSD's."""
RECIPE = Path(__file__).with_suffix(".toml")
"""Model, training and SSD's options."""
_SELECTED = (1, 2, 4, 8, 16, 32)
_VALIDATION_SEQUENCES = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--data", help="text to train on: a folder or file with splits (default: builtin:pydoc)")
    parser.add_argument("--seeds", type=whole_numbers, default=(0, 1), help="of weights and order (default: 0,1; 0 with --quick)")
    parser.add_argument("--arms", type=words, default=ARMS, help=f"default: {','.join(ARMS)}")
    parser.add_argument("--steps", type=int, help="of each run (default: the recipe's 1000; 40 with --quick)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="options of the recipe")
    parser.add_argument("--work", type=Path, help="keeps the runs, so that none is done twice (default: thrown away)")
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
    plot: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One row an arm and seed.

    Yields:
        "loss" of the final model in dense mode on validation (nats), "moe_loss" by the experts that a token runs, "flops" of training and
        "gain" (dense training's over these), "sparse_share" of the steps, "ratio" of loss to that of dense training, "curve" as [step,
        validation loss, FLOPs, modelled seconds], and of what is watched "sparsity" and "similarity" as [step, value] and "switches" as
        [step, new mode].

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
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for seed in seeds:
            base = read_pretrain(RECIPE, settings=[*shrunk, *chosen, *settings, f"train.seed={seed}", f"ssd.seed={seed}"])
            done: dict[str, PretrainResult] = {}
            for arm in (arm for arm in ARMS if arm in arms):
                out = folder / f"{arm}-{seed}"
                done[arm] = _pretrained(_arm(arm, base, done.get("ssd")), out)
                rows.append(_row(arm, seed, done[arm], out, dense=done.get("dense"), quick=quick))
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


def _row(arm: str, seed: int, result: PretrainResult, out: Path, *, dense: PretrainResult | None, quick: bool) -> dict[str, Any]:
    model, tokenizer = load_model(out)
    recipe = from_dict(PretrainConfig, result.config, where=str(out))
    windows = text_windows(recipe.validation, tokenizer)[:_VALIDATION_SEQUENCES]
    seconds = _step_seconds(model, windows[: recipe.train.batch_sequences], repeats=2 if quick else 8)
    flops = {"dense": _flops_of_step(result, "dense"), "sparse": _flops_of_step(result, "sparse")}
    steps = modes(result.decisions, len(result.losses))
    loss = result.evaluation["dense"]["loss"]
    probes = [probe.signals for probe in result.probes]
    return {
        "arm": arm,
        "seed": seed,
        "parameters": result.parameters,
        "tokens": result.tokens,
        "steps": len(result.losses),
        "sparse_share": steps.count("sparse") / len(steps),
        "loss": loss,
        **({} if dense is None else {"ratio": loss / dense.evaluation["dense"]["loss"]}),
        "moe_loss": _losses_by_selected(model, windows),
        "flops": result.flops["total_flops"],
        "gain": result.flops["gain"] if dense is None else dense.flops["all_dense_flops"] / result.flops["total_flops"],
        "seconds": result.seconds,
        "dense_step_s": seconds["dense"][0],
        "sparse_step_s": seconds["sparse"][0],
        "step_gain": seconds["dense"][0] / seconds["sparse"][0],
        "spread": seconds["dense"][1],
        "curve": [
            [step, value, sum(flops[mode] for mode in steps[:step]), sum(seconds[mode][0] for mode in steps[:step])]
            for step, value in result.evals
        ],
        "sparsity": [[s.step, s.sparsity] for s in probes],
        "similarity": [[s.step, s.similarity] for s in probes if s.similarity is not None],
        "captured": [[s.step, s.captured] for s in probes if s.captured is not None],
        "loss_gap": [[s.step, s.loss_gap] for s in probes if s.loss_gap is not None],
        "switches": _switches(result),
        "data": result.data,
    }


def _pretrained(recipe: PretrainConfig, out: Path) -> PretrainResult:
    """A run; one that is finished is read, a killed one goes on.

    Raises:
        ConfigError: there is another one.
    """
    if not (path := out / PRETRAINING_FILE).exists():
        return pretrain(recipe, out)
    found = from_dict(PretrainResult, json.loads(path.read_text(encoding="utf-8")), where=str(path))
    if found.config != json.loads(json.dumps(to_dict(recipe))):
        raise ConfigError(f"--work: '{out}' is of another recipe; give another folder.")
    return found


def _flops_of_step(result: PretrainResult, mode: str) -> float:
    """Mean over the steps of that mode; of a dense one that of all-dense training."""
    if mode == "dense":
        return result.flops["all_dense_flops"] / len(result.losses)
    return result.flops["sparse_flops"] / max(1.0, result.flops["sparse_steps"])


def _step_seconds(model: nn.Module, ids_BS: Tensor, *, repeats: int) -> dict[str, tuple[float, float]]:
    """Median and spread of a training step's seconds in each mode, in turn; the model is trained by it."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    compute = fast_dtype(ids_BS.device)
    for layer in moe_layers(model).values():
        layer.is_taught = True
    model.train()
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for repeat in range(-1, repeats):  # one to warm up
        for mode in sorted(times, reverse=bool(repeat % 2)):
            set_mode(model, "dense" if mode == "dense" else "moe")
            start = time.perf_counter()
            with torch.autocast(ids_BS.device.type, dtype=compute, enabled=compute is not torch.float32):
                loss = model(input_ids=ids_BS, labels=ids_BS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if repeat >= 0:
                times[mode].append(time.perf_counter() - start)
    for layer in moe_layers(model).values():
        layer.is_taught = False
    model.load_state_dict(before)
    model.eval()
    return {mode: (statistics.median(values), p80_over_p20(values)) for mode, values in times.items()}


@torch.no_grad()
def _losses_by_selected(model: nn.Module, windows_WS: Tensor) -> dict[str, float]:
    """Loss of the mixture by the number of experts that a token runs; with all of them it is the dense model's."""
    set_mode(model, "moe")
    experts = next(iter(moe_layers(model).values())).num_experts
    found = {}
    for k in (k for k in _SELECTED if k <= experts):
        set_rule(model, TopK(k=k))
        losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in windows_WS.split(32)]
        found[str(k)] = sum(losses) / len(windows_WS)
    return found


# ---- the picture

_COLORS = dict(zip(ARMS, ("black", "C0", "C1", "C3", "C2", "C4"), strict=True))


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against FLOPs and against modelled time, the mixture's loss by experts, and what was watched, with the switches marked.

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
        seconds.plot([point[3] for point in steps], [point[1] for point in steps], **style)
        experts.plot([int(k) for k in row["moe_loss"]], list(row["moe_loss"].values()), marker="o", markersize=3, **style)
        experts.axhline(row["loss"], color=style["color"], linewidth=0.6, linestyle=":")
    flops.set(xlabel="training FLOPs", ylabel="validation loss of the dense mode (nats)")
    seconds.set(xlabel="seconds, from steps of both modes timed in turn", ylabel="validation loss of the dense mode (nats)")
    experts.set(xlabel="experts that a token runs", ylabel="validation loss (nats)", xscale="log")
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
