"""How many steps the distillation of attention projections takes from either start to the same loss.

Each layer is distilled twice with the same data, seed and schedule: from random weights, and from its largest directions. The loss to reach
is the random start's own at its end; the steps are those after which the mean of `_WINDOW` batches is no higher.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bench.common import numbers, whole_numbers
from moeify import DataConfig, example_inputs, find_linear_sites
from moeify.errors import ConfigError
from moeify.hf.load import load_model
from moeify.pipeline.inputs import calibration_batches
from moeify.sites import linear_weight, projection_width
from moeify.train.project import ProjectConfig, capture_layers, project_linear

_WINDOW = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--model", help="folder, .gguf file or Hub id; without one, a random GPT-2, which shows that the case runs")
    parser.add_argument("--data", help="text that the layers read")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="attention projections, evenly spread over all of them; 0: all")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=numbers, default=(2e-3,), help="learning rates, each a row of its own")
    parser.add_argument("--weights", type=numbers, default=(0.0, 3e-4), help="of the penalty")
    parser.add_argument("--seeds", type=whole_numbers, default=(0, 1, 2))


def run(
    *,
    quick: bool,
    model: str | None = None,
    data: str | None = None,
    tokens: int = 40_000,
    window: int = 128,
    layers: int = 4,
    epochs: int = 6,
    lr: Sequence[float] = (2e-3,),
    weights: Sequence[float] = (0.0, 3e-4),
    seeds: Sequence[int] = (0, 1, 2),
) -> Iterator[dict[str, Any]]:
    """One row for each layer, learning rate, weight of the penalty and seed."""
    if (model is None) != (data is None):
        raise ConfigError("--model and --data belong together.")
    if model is None or data is None:
        loaded: nn.Module = _random_gpt2()
        batches = [{"input_ids": torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    else:
        loaded, processor = load_model(model, dtype=torch.float32)
        batches = calibration_batches(loaded, processor, DataConfig(data=data, window=window, max_tokens=tokens))
    if quick:
        layers, epochs, weights, seeds = 2, 2, (0.0,), (0,)
    sites = [site for site in find_linear_sites(loaded, example_inputs(loaded)) if site.role in ("attn_in", "attn_out")]
    count = min(layers or len(sites), len(sites))
    chosen = [sites[i] for i in sorted({round(i * (len(sites) - 1) / max(1, count - 1)) for i in range(count)})]
    with tempfile.TemporaryDirectory() as folder:
        inputs, source = capture_layers(loaded, {site.name: site.d_in for site in chosen}, batches, Path(folder))
        for site in chosen:
            linear = loaded.get_submodule(site.name)
            weight_NK, bias_N = linear_weight(linear).detach().float(), cast(Tensor | None, getattr(linear, "bias", None))
            layer = weight_NK, weight_NK.new_zeros(len(weight_NK)) if bias_N is None else bias_N  # MLPs have biases in any case
            width = projection_width(site.d_in, site.d_out)
            for rate in lr:
                for weight in weights:
                    for seed in seeds:
                        config = ProjectConfig(epochs=epochs, lr=rate, sparsity_weight=weight, seed=seed)
                        yield {
                            "layer": site.name,
                            "d_in": site.d_in,
                            "d_out": site.d_out,
                            "width": width,
                            "lr": rate,
                            "sparsity_weight": weight,
                            "seed": seed,
                            **_compare(inputs.read(source[site.name]), layer, config, width=width, name=site.name),
                        }


def _compare(x_TK: Tensor, layer: tuple[Tensor, Tensor], config: ProjectConfig, *, width: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}
    for init in ("random", "svd"):
        losses: list[float] = []

        def watch(_step: int, error: float, penalty: float, losses: list[float] = losses) -> None:
            losses.append(error + config.sparsity_weight * penalty)

        _, errors = project_linear(x_TK, *layer, ProjectConfig(**{**vars(config), "init": init}), width=width, name=name, watch=watch)
        curves[init] = _running_mean(losses)
        found |= {f"{init}_{key}": value for key, value in errors.items()}
    last = curves["random"][-1]
    reached = next((step for step, loss in enumerate(curves["svd"]) if loss <= last), None)
    steps = len(losses)
    # The window of a loss ends at its batch, whose loss is that before the step; of the first window all are counted.
    taken = None if reached is None else reached + steps - len(curves["random"])
    found |= {"steps": steps, "svd_steps": taken, "steps_ratio": None if taken is None else taken / steps}
    return found | {"random_loss": last, "svd_loss": curves["svd"][-1]}


def _running_mean(values: Sequence[float]) -> list[float]:
    """Of `_WINDOW` values, or of all where there are fewer."""
    window = min(_WINDOW, len(values))
    sums = torch.tensor(values, dtype=torch.float64).unfold(0, window, 1).mean(1)
    return [float(value) for value in sums]


def _random_gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
