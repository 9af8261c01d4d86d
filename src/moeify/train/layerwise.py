"""Fitting modules to known outputs one at a time: what `regress` and `project` share.

Letters: T tokens, F neurons.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .._config import lookup
from ..errors import ConfigError, DataError
from ..sparsity.losses import LOSSES, sparsity_loss
from .capture import fast_dtype
from .fit import held_out_tokens, minimise

CHUNK_TOKENS = 1024
"""Rows whose outputs are computed at once where there is no gradient."""

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x of some tokens -> their activations, which are penalised, and outputs."""
Watch = Callable[[int, float, float], None]
"""Told step, error and penalty of a batch."""


@dataclass(frozen=True, kw_only=True)
class LayerwiseConfig:
    """How each module is fitted to outputs that are known."""

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
    """Seed of the order of tokens, and of weights that are drawn."""

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


def fitting_rows(num_tokens: int, config: LayerwiseConfig, *, name: str) -> tuple[Tensor, Tensor]:
    """Indices of the tokens to fit to and of those that are held out.

    Raises:
        DataError: there is none to fit to, of the layer ``name``.
    """
    held_out_T = held_out_tokens(num_tokens, config.holdout_frac)
    rows, held_out = (~held_out_T).nonzero().flatten(), held_out_T.nonzero().flatten()
    if not len(rows):
        raise DataError(f"'{name}' saw {num_tokens} tokens, {len(rows)} of them to fit to; give more data.")
    return rows, held_out


def fit_outputs(
    leaves: Mapping[str, Tensor],
    forward: Forward,
    x_TD: Tensor,
    target_TD: Tensor,
    weight_T: Tensor,
    rows: Tensor,
    config: LayerwiseConfig,
    *,
    penalty_weight: Callable[[int], float] | None = None,
    watch: Watch | None = None,
) -> None:
    """Minimise the weighted squared error of ``forward`` by gradient descent on ``leaves``, in place.

    loss = mean over tokens of weight_t |y_t - y'_t|^2   [+ penalty_weight * penalty]

    Args:
        leaves: the tensors that ``forward`` computes with, each requiring a gradient.
        forward: activations and outputs of some tokens, in the dtype that it is given.
        x_TD: inputs of all tokens, bfloat16.
        target_TD: y', their outputs.
        weight_T: weight of each token.
        rows: those to fit to, from `fitting_rows`.
        config: optimizer, penalty, seed.
        penalty_weight: of the penalty at a step, counted from 0; None: always the config's.
        watch: told step, error and penalty of each batch; reading them synchronises.
    """
    rows = rows.to(x_TD.device)
    steps = count()

    def loss_of(batch: Tensor) -> Tensor:
        chosen, step = rows[batch.to(rows.device)], next(steps)
        a_TF, y_TD = _fast(forward, x_TD[chosen])
        error = (_squared_error(y_TD, target_TD[chosen]) * weight_T[chosen]).mean()
        penalty = sparsity_loss(a_TF, loss=config.sparsity_loss) if config.sparsity_weight else error.new_zeros(())
        if watch is not None:
            watch(step, error.item(), penalty.item())
        weight = config.sparsity_weight if penalty_weight is None else penalty_weight(step)
        return error + weight * penalty if weight else error

    minimise(
        leaves.values(),
        loss_of,
        len(rows),
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        lr=config.lr,
        generator=torch.Generator().manual_seed(config.seed),
    )


@torch.no_grad()
def measured_error(forward: Forward, x_TD: Tensor, target_TD: Tensor, weight_T: Tensor, rows: Tensor) -> tuple[float, float]:
    """Mean over some rows of the weighted squared error, and of the number of activations that are not zero."""
    rows, error, nonzeros = rows.to(x_TD.device), 0.0, 0
    for chosen in rows.split(CHUNK_TOKENS):
        a_TF, y_TD = _fast(forward, x_TD[chosen])
        error += (_squared_error(y_TD, target_TD[chosen]) * weight_T[chosen]).sum().item()
        nonzeros += int(a_TF.count_nonzero())
    return error / len(rows), nonzeros / len(rows)


def _fast(forward: Forward, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """``forward`` in bfloat16 where that is native."""
    low = fast_dtype(x_TD.device)
    with torch.autocast(x_TD.device.type, dtype=low, enabled=low is not torch.float32):
        return forward(x_TD.to(low))


def _squared_error(y_TD: Tensor, target_TD: Tensor) -> Tensor:
    return (y_TD.float() - target_TD.float()).square().sum(1)


def in_parallel(function: Callable[[int], Any], items: Iterable[int], *, workers: int) -> Iterator[Any]:
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
