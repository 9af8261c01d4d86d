"""What a dense FFN computes, written once: the activation table and the two formulas.

Letters: T tokens, D model width, F FFN width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .site import FFNWeights


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "gelu_10": _gelu_10,
}
"""Elementwise functions that discovery recognises, by the name that sites and manifests store. All are near zero for negative input."""


def ffn_hidden(x_TD: Tensor, weights: FFNWeights, *, activation: str) -> Tensor:
    """The neurons' activations, the input of the down projection.

    h = act(x up^T + b_up), or gated act(x gate^T + b_gate) * (x up^T + b_up)

    Args:
        x_TD: FFN input.
        weights: canonical weights, same dtype and device as ``x_TD``.
        activation: key of `ACTIVATIONS`.

    Returns:
        h_TF.
    """
    act = ACTIVATIONS[activation]
    up_TF = F.linear(x_TD, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        return act(up_TF)
    return act(F.linear(x_TD, weights.gate_FD, weights.gate_bias_F)) * up_TF


def ffn_dense(x_TD: Tensor, weights: FFNWeights, *, activation: str) -> Tensor:
    """The whole FFN: ``ffn_hidden`` times the down projection, plus its bias. Arguments as in `ffn_hidden`; returns y_TD."""
    return F.linear(ffn_hidden(x_TD, weights, activation=activation), weights.down_FD.t(), weights.down_bias_D)
