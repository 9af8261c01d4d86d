"""Which input channels of a linear layer matter to its output: scores, and the levels below which a channel is skipped.

Letters: T tokens, R sampled tokens, K input channels, N outputs.

For y = x W^T every score has one form,

    score_tk = |x_tk| * weight_k,      kept where score_tk >= level,

so that a kernel compares |x_tk| with ``level / weight_k``, a stored number for each channel: no sort, and column k of W is not read where
x_tk is skipped. Methods differ in ``weight_k``. Tokens keep more or fewer channels; `moeify.select.TopK` on the scores gives each as many,
and is worse for the same mean (docs/log).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .._config import lookup
from ..errors import ConfigError, DataError

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ChannelStats:
    """What enters one linear layer on calibration data."""

    rows_RK: Tensor
    """A sample of its inputs, one row a token; any float dtype."""
    slope_K: Tensor | None = None
    """Root mean square of ``g W[:, k]``, g = d loss / d y: of the loss's derivative by x_k through this layer; over all tokens, or those
    that skip the channel (`profile_channels`)."""


ChannelWeight = Callable[[Tensor, ChannelStats], Tensor]
"""(W_NK, stats) -> weight_K >= 0, fp32."""


def _ones(W_NK: Tensor, _stats: ChannelStats) -> Tensor:
    """1"""
    return torch.ones(W_NK.shape[1], device=W_NK.device)


def _column_norm(W_NK: Tensor, _stats: ChannelStats) -> Tensor:
    """||W[:, k]||: what dropping channel k costs the output, where columns are orthogonal or their signs random."""
    return cast(Tensor, torch.linalg.vector_norm(W_NK, dim=0, dtype=torch.float32))


def _slope(W_NK: Tensor, stats: ChannelStats) -> Tensor:
    """slope_k: what dropping channel k costs the loss, to second order (x_k^2 slope_k^2 / 2, the Fisher matrix for the Hessian)."""
    if stats.slope_K is None:
        raise ConfigError("score 'sensitivity' needs gradients of the loss, which this calibration did not take (slopes=True).")
    return stats.slope_K.float()


SCORES: dict[str, ChannelWeight] = {
    "magnitude": _ones,  # TEAL: Liu et al. 2024, arXiv:2408.14690
    "wina": _column_norm,  # Chen et al. 2025, arXiv:2505.19427; no transform of the weights
    "sensitivity": _slope,
}
"""Weights of channels by the name that configs store; a new one joins by a function and a line here."""


def channel_weights(score: str, W_NK: Tensor, stats: ChannelStats) -> Tensor:
    """``weight_K`` of a score, fp32.

    Args:
        score: key of `SCORES`.
        W_NK: the layer's weight.
        stats: its calibration.

    Raises:
        ConfigError: unknown score, or statistics that it needs and that were not taken.
        DataError: every channel's weight is 0, or one is not finite.
    """
    weight_K = lookup(SCORES, score, where="score")(W_NK, stats)
    if not bool(weight_K.isfinite().all()):
        raise DataError(f"the {score} weights of channels hold NaN or infinity; weights or calibration data are damaged.")
    if not bool(weight_K.any()):
        raise DataError(
            f"the {score} weights of all channels are 0: calibration saw nothing that matters here; give other data, or use another score."
        )
    return weight_K


def channel_scores(x_TK: Tensor, weight_K: Tensor) -> Tensor:
    """``|x| * weight``, fp32."""
    return x_TK.abs().float() * weight_K


def channel_levels(level: float, weight_K: Tensor) -> Tensor:
    """level_K = level / weight_K: channel k is kept where |x_k| >= level_k. A channel of weight 0 is never kept, unless the level is 0."""
    if level <= 0:
        return torch.zeros_like(weight_K)
    return torch.where(weight_K > 0, level / weight_K, math.inf)


class ScoreSample:
    """Sorted scores of one layer: answers which share of (token, channel) pairs lies below any level."""

    def __init__(self, scores_RK: Tensor) -> None:
        """Raises DataError where there is no score, or all are 0."""
        scores = scores_RK.detach().flatten().float()
        # numpy sorts a million floats on a processor's vector unit in the time that torch needs for a tenth of them
        self._sorted = torch.from_numpy(np.sort(scores.numpy())) if scores.is_cpu else scores.sort().values
        if not self._sorted.numel() or not bool(self._sorted[-1] > 0):
            raise DataError("calibration saw only zeros at this layer; give other data, or leave such inputs out (roles).")

    def below(self, level: float) -> float:
        """Share of the scores below ``level``, in [0, 1]: what it skips."""
        return int(torch.searchsorted(self._sorted, level)) / self._sorted.numel()

    def level(self, skip_frac: float) -> float:
        """The lowest score that is kept where a share ``skip_frac`` is skipped; 0 for 0, else above 0: zeros are skipped first, at no cost.

        Raises:
            ConfigError: ``skip_frac`` outside [0, 1).
        """
        if not 0 <= skip_frac < 1:
            raise ConfigError(f"skip_frac must be in [0, 1), got {skip_frac}.")
        index = round(skip_frac * self._sorted.numel())
        return max(float(self._sorted[min(index, self._sorted.numel() - 1)]), _TINY) if index else 0.0

    @property
    def largest(self) -> float:
        """The largest score."""
        return float(self._sorted[-1])


def shared_level(samples: Mapping[str, ScoreSample], costs: Mapping[str, float], *, skip_frac: float) -> float:
    """One level for all layers at which the cost-weighted mean of what they skip is ``skip_frac``.

    With scores in units of the loss over cost (`SCORES`' sensitivity over the square root of a column's cost), one level is the best
    allocation: a channel is skipped wherever that costs less of the loss for each number saved than it would elsewhere.

    Args:
        samples: scores by layer.
        costs: what a layer counts, > 0: its parameters, bytes or measured time.
        skip_frac: wanted share, in [0, 1).

    Raises:
        ConfigError: no layer, a cost that is missing or not positive, or ``skip_frac`` out of range.

    Cost: some 60 binary searches a layer.
    """
    if not samples:
        raise ConfigError("there is no layer to share a level.")
    if not 0 <= skip_frac < 1:
        raise ConfigError(f"skip_frac must be in [0, 1), got {skip_frac}.")
    if bad := next((name for name in samples if not costs.get(name, 0) > 0), None):
        raise ConfigError(f"the cost of '{bad}' must be greater than 0, got {costs.get(bad)}.")
    if skip_frac == 0:
        return 0.0
    total = sum(costs[name] for name in samples)
    low, high = 0.0, max(sample.largest for sample in samples.values())
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if sum(costs[name] * sample.below(middle) for name, sample in samples.items()) / total < skip_frac:
            low = middle
        else:
            high = middle
    return high
