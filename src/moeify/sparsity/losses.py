"""What a token's activations cost: the penalties that make them sparse, and how their weight grows.

Letters: T tokens (any leading dimensions), F FFN width.

Every penalty is a function of two sums over a token's neurons, s = sum |a_i| and q = sum a_i^2. Its value and its two partial derivatives
are written down in one function of T numbers; all that touches T * F numbers is shared (here, and in `enforce` without autograd).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._config import lookup
from ..errors import ConfigError

Penalty = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(s_T, q_T, eps) -> value_T, d value / d s, d value / d q; finite for s = q = 0."""


def _square_hoyer(s_T: Tensor, q_T: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s^2 / (q + eps)"""
    ratio_T = s_T / (q_T + eps)
    return s_T * ratio_T, 2 * ratio_T, -ratio_T.square()


def _l1(s_T: Tensor, _q_T: Tensor, _eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s"""
    return s_T, torch.ones_like(s_T), torch.zeros_like(s_T)


LOSSES: dict[str, Penalty] = {"hoyer": _square_hoyer, "l1": _l1}
"""Penalties by the name that configs store; a new one joins by a function and a line here."""

Schedule = Literal["constant", "linear", "warmup"]
EPS = 1e-8


def sparsity_loss(a_TF: Tensor, *, loss: str = "hoyer", mask_T: Tensor | None = None, eps: float = EPS) -> Tensor:
    """Mean penalty of the real tokens; differentiable.

    - hoyer: H(a) = (sum_i |a_i|)^2 / (sum_i a_i^2 + eps), in [0, number of non-zeros of a], scale-free where sum a^2 >> eps; 0 for a row of
      zeros. A fresh ReLU layer has about 0.64 times its non-zeros.
    - l1: sum_i |a_i|, in [0, inf): a sum over neurons, no mean.

    The mean is over tokens, never over neurons: a wider FFN has a larger loss.

    Args:
        a_TF: activations (..., F); sums run in fp32 at least.
        loss: key of `LOSSES`.
        mask_T: True at real tokens, of the leading shape; None: all are.
        eps: > 0. Rows with sum a^2 below it fade out: the Hoyer gradient of a row grows like 1 / |a| down to there, and its value and
            gradient are 0 for a row of zeros.

    Returns:
        Scalar; 0 where no token is real.

    Source: Szatkowski et al. 2024, arXiv:2310.04361v4, eq. 1 and 2 (eps is 1e-15, and padding counts, in their code).
    """
    a_TF = a_TF.to(torch.promote_types(a_TF.dtype, torch.float32))
    value_T, _, _ = lookup(LOSSES, loss, where="loss")(a_TF.abs().sum(-1), a_TF.square().sum(-1), eps)
    if mask_T is None:
        return value_T.mean()
    mask_T = mask_T.bool()
    return torch.where(mask_T, value_T, 0).sum() / mask_T.sum().clamp_min(1)


def displace(z_TF: Tensor, *, delta: float) -> Tensor:
    """Pre-activations above ``delta``: u = max(z, delta) - delta, >= 0; fp32 at least.

    What GELU and SiLU are penalised on: where z <= delta (say -10) they are zero up to rounding, so u = 0 means a silent neuron, and unlike
    act(z) it has a gradient that pushes there. With delta = 0 it is ReLU.

    Source: Szatkowski et al. 2024, arXiv:2310.04361v4, eq. 5; delta = -10 in their code.
    """
    return torch.relu(z_TF.to(torch.promote_types(z_TF.dtype, torch.float32)) - delta)


def scheduled_weight(weight: float, *, schedule: Schedule, step: int, total_steps: int, warmup_frac: float = 0.5) -> float:
    """Weight of the sparsity loss at a training step.

    constant: weight.   linear: weight * step / (total_steps - 1).   warmup: weight * min(1, step / floor(warmup_frac * (total_steps - 1)))

    Args:
        weight: final weight, >= 0.
        schedule: one of the three.
        step: optimizer steps done, in [0, total_steps); later ones count as the last.
        total_steps: length of the run, at least 1.
        warmup_frac: share of the run over which ``warmup`` grows, in (0, 1].

    Source: the D2DMoE code's ``linear`` and ``linear_warmup`` (half of the run).
    """
    last = max(total_steps - 1, 0)
    ramp = {"constant": 0, "linear": last, "warmup": int(warmup_frac * last)}
    if schedule not in ramp:
        raise ConfigError(f"schedule must be one of {', '.join(map(repr, ramp))}, got {schedule!r}.")
    return weight * (min(1.0, step / ramp[schedule]) if ramp[schedule] else 1.0)
