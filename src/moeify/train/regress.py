"""Each FFN onto its own former outputs, one layer at a time: the cheap repair after an activation function has changed.

Letters: T tokens, D model width, F FFN width.

Trained end to end, a model whose activations were swapped first has to find its way back through all layers at once. Alone, every layer has
a regression with known inputs and outputs, those of the model as it was: no attention, no head, and no other layer in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _config
from .._config import lookup
from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, DataError
from ..sites import FFNSite, FFNWeights, ffn_hidden, find_ffn_sites, site_weights
from ..sites.formula import ACTIVATIONS
from ..sparsity.losses import LOSSES, sparsity_loss
from .capture import capture_ffn_inputs, fast_dtype
from .distill import token_weights
from .fit import cast_weights, held_out_tokens, minimise
from .work import fingerprint, open_work, read_tensors, weights_checksum, write_tensors

_CHUNK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class RegressConfig:
    """How each FFN is fitted to its former outputs."""

    epochs: int = 2
    """Passes over the captured tokens."""
    batch_tokens: int = 512
    """Tokens per optimizer step."""
    lr: float = 5e-3
    """Largest learning rate of AdamW; warms up and decays to zero within each layer's run."""
    sparsity_loss: str = "hoyer"
    """Penalty of a token's activations beside the error, 'hoyer' or 'l1'; see `EnforcementConfig.loss`. For functions with exact zeros."""
    sparsity_weight: float = 0.0
    """Its weight beside the relative error, at least 0; 0 leaves it out."""
    holdout_frac: float = 0.05
    """Share of the tokens, in blocks spread over the data, that the errors are measured on and nothing is fitted to."""
    workers: int = 1
    """Layers fitted at the same time, each by its share of torch's threads; on a CPU with more cores than a layer's products can use."""
    seed: int = 0
    """Seed of the order of tokens."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be finite and greater than 0, got {self.lr}.")
        if not 0 <= self.sparsity_weight < math.inf:
            raise ConfigError(f"sparsity_weight must be finite and at least 0, got {self.sparsity_weight}.")
        if not 0 < self.holdout_frac < 1:
            raise ConfigError(f"holdout_frac must be inside (0, 1), got {self.holdout_frac}.")
        lookup(LOSSES, self.sparsity_loss, where="sparsity_loss")


def regress_layers(
    model: nn.Module,
    teacher: nn.Module,
    sites: Sequence[FFNSite],
    batches: Sequence[Mapping[str, Tensor]],
    config: RegressConfig | None = None,
    *,
    work: Path,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, dict[str, float]]:
    """Fit each FFN of ``model`` to what the same FFN of ``teacher`` gives for the teacher's inputs, by gradient descent, in place.

    loss = mean over tokens of |y - y'|^2 / (|y'|^2 + mean |y'|^2 / 100)   [+ sparsity_weight * penalty]

    Args:
        model: the changed model; everything but the weights of ``sites`` stays.
        teacher: the model as it was, another object, dense.
        sites: FFNs of ``model`` with the functions that they now have, as `set_activation` returned them.
        batches: inputs of one forward each; the teacher runs once over them, its FFN inputs go to disk (2 D bytes a token and layer).
        config: None: the defaults.
        work: folder for inputs and finished layers; a call with the same arguments continues what it holds, to equal weights. The caller
            deletes it (`moeify.train.work.remove_work`).
        run: what else tells this run from another.
        progress: told every batch and layer.

    Returns:
        For each site its ``before`` and ``after``: the mean relative squared error (the loss without the penalty) on held-out tokens.

    Raises:
        ConfigError: ``teacher`` is ``model``; a site that the teacher has not, or of another shape; a penalty on a function without zeros.
        DataError: too few tokens.

    Cost: 16 T F D multiply-adds of a gated FFN for each epoch (11 of a plain one), in bfloat16 where that is native, and memory for one
        layer's inputs and outputs in bfloat16, its weights and their AdamW state, times ``workers``.
    """
    config = config or RegressConfig()
    if teacher is model:
        raise ConfigError("teacher and model are the same object; copy the model before its activations are changed.")
    teachers = _teachers(teacher, sites, batches)
    if config.sparsity_weight:
        for site in sites:
            if ACTIVATIONS[site.activation](torch.full((), -1.0)) != 0:
                raise ConfigError(f"'{site.name}' has the activation {site.activation}, without exact zeros; leave sparsity_weight at 0.")
    identity = {
        **(run or {}),
        "regress": _config.to_dict(replace(config, workers=1)),
        "sites": [_config.to_dict(site) for site in sites],
        "batches": fingerprint(batches),
        "weights": [weights_checksum(model), weights_checksum(teacher)],
    }
    open_work(work, identity)
    device = next(model.parameters()).device
    inputs = capture_ffn_inputs(teacher, teachers, batches, work / "inputs", compute=fast_dtype(device), progress=progress)

    def fit(i: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        path = work / f"regressed{i:04d}.safetensors"
        found = read_tensors(path)
        if found is None:
            site, before = sites[i], teachers[i]
            x_TD = inputs.read(before.name).to(device)
            found = _regress(x_TD, site_weights(teacher, before), before, site_weights(model, sites[i]), site, config)
            write_tensors(path, *found)
        return found

    errors = {}
    with progress.task("regress FFNs", total=len(sites)) as task:
        for site, (tensors, error) in zip(sites, _in_parallel(fit, range(len(sites)), workers=config.workers), strict=True):
            weights = site_weights(model, site)
            with torch.no_grad():
                for name, tensor in tensors.items():
                    getattr(weights, name).copy_(tensor)
            errors[site.name] = error
            task.advance(1)
    return errors


def _teachers(teacher: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Mapping[str, Tensor]]) -> list[FFNSite]:
    """The teacher's sites, in the order of ``sites``."""
    if not batches:
        raise DataError("no batch to regress on: the data gave no tokens.")
    # Of text a few tokens, of other inputs one example.
    short = {k: v[:1, :16] if v.dim() == 2 and not v.is_floating_point() else v[:1] for k, v in batches[0].items() if k != "labels"}
    device = next(teacher.parameters()).device
    found = {site.name: site for site in find_ffn_sites(teacher, {k: v.to(device) for k, v in short.items()})}
    for site in sites:
        old = found.get(site.name)
        if old is None or (old.d_model, old.d_ff, old.d_out, old.is_gated) != (site.d_model, site.d_ff, site.d_out, site.is_gated):
            raise ConfigError(f"the teacher has no FFN like '{site.name}'; is it the model from before the change?")
    return [found[site.name] for site in sites]


def _in_parallel(function: Callable[[int], Any], items: Iterable[int], *, workers: int) -> Iterator[Any]:
    """Results in order, of threads that share torch's threads."""
    if workers == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    # The operators of one layer release Python's lock for the other.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's number is its own, but for that of MKL


def _regress(
    x_TD: Tensor, old: FFNWeights, old_site: FFNSite, new: FFNWeights, site: FFNSite, config: RegressConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The fitted tensors of one site by field name of `FFNWeights`, and its errors."""
    num_tokens, device = len(x_TD), x_TD.device
    held_out_T = held_out_tokens(num_tokens, config.holdout_frac)
    num_train = num_tokens - int(held_out_T.sum())
    if num_train < 1:
        raise DataError(f"'{site.name}' saw {num_tokens} tokens, {num_train} of them to fit to; give more data.")
    held_out_T = held_out_T.to(device)
    target_TD = _outputs(x_TD, old, old_site.activation)
    weight_T = token_weights(target_TD)
    # Down in the order of its Linear, for which its products are fastest.
    leaves = {
        f.name: (t.t().float().clone(memory_format=torch.contiguous_format) if f.name == "down_FD" else t.float().clone())
        .detach()
        .requires_grad_()
        for f in fields(new)
        if (t := getattr(new, f.name)) is not None
    }

    def weights() -> FFNWeights:
        return replace(new, **{name: leaf.t() if name == "down_FD" else leaf for name, leaf in leaves.items()})

    def error() -> float:
        y_TD = _outputs(x_TD[held_out_T], weights(), site.activation)
        return ((y_TD.float() - target_TD[held_out_T].float()).square().sum(1) * weight_T[held_out_T]).mean().item()

    rows_T = (~held_out_T).nonzero().flatten()
    low = fast_dtype(device)

    def loss_of(chosen: Tensor) -> Tensor:
        rows = rows_T[chosen.to(device)]
        with torch.autocast(device.type, dtype=low, enabled=low is not torch.float32):
            x = x_TD[rows] if low is not torch.float32 else x_TD[rows].float()
            a_TF, y_TD = _forward(x, weights(), site.activation)
        loss = ((y_TD.float() - target_TD[rows].float()).square().sum(1) * weight_T[rows]).mean()
        if config.sparsity_weight:
            loss = loss + config.sparsity_weight * sparsity_loss(a_TF, loss=config.sparsity_loss)
        return loss

    before = error()
    minimise(
        leaves.values(),
        loss_of,
        num_train,
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        lr=config.lr,
        generator=torch.Generator().manual_seed(config.seed),
    )
    fitted = {name: (leaf.t() if name == "down_FD" else leaf).detach().cpu().contiguous() for name, leaf in leaves.items()}
    return fitted, {"before": before, "after": error()}


def _forward(x_TD: Tensor, weights: FFNWeights, activation: str) -> tuple[Tensor, Tensor]:
    """act(z), of a gated FFN act(gate), and the output."""
    act = ACTIVATIONS[activation]
    up_TF = F.linear(x_TD, weights.up_FD, weights.up_bias_F)
    a_TF = act(up_TF if weights.gate_FD is None else F.linear(x_TD, weights.gate_FD, weights.gate_bias_F))
    h_TF = a_TF if weights.gate_FD is None else a_TF * up_TF
    return a_TF, F.linear(h_TF, weights.down_FD.t(), weights.down_bias_D)


@torch.no_grad()
def _outputs(x_TD: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """The FFN's outputs in bfloat16, a chunk of tokens at a time."""
    low = fast_dtype(x_TD.device)
    weights = cast_weights(weights, low)
    y_TD = torch.empty(len(x_TD), weights.down_FD.shape[1], dtype=torch.bfloat16, device=x_TD.device)
    for y, x in zip(y_TD.split(_CHUNK_TOKENS), x_TD.split(_CHUNK_TOKENS), strict=True):
        y.copy_(F.linear(ffn_hidden(x.to(low), weights, activation=activation), weights.down_FD.t(), weights.down_bias_D))
    return y_TD
