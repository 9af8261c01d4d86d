"""What a dense FFN computes, written once: the activation table and the two formulas.

Letters: T tokens, D model width, F FFN width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .site import FFNWeights


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def _shifted_relu(x: Tensor, *, threshold: float) -> Tensor:
    return F.relu(x - threshold)


_SHIFTED = "shifted_relu:"


class _Activations(dict[str, Callable[[Tensor], Tensor]]):
    """The table, and every ``shifted_relu:t``: relu(z - t) for any number t."""

    def __missing__(self, name: str) -> Callable[[Tensor], Tensor]:
        if not _is_shifted(name):
            raise KeyError(name)
        return partial(_shifted_relu, threshold=float(name.removeprefix(_SHIFTED)))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and _is_shifted(name))


def _is_shifted(name: str) -> bool:
    try:
        return name.startswith(_SHIFTED) and math.isfinite(float(name.removeprefix(_SHIFTED)))
    except ValueError:
        return False


def shift_of(name: str) -> float | None:
    """t of ``shifted_relu:t``; None of any other name."""
    return float(name.removeprefix(_SHIFTED)) if _is_shifted(name) else None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = _Activations(
    {
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
)
"""Elementwise functions that discovery recognises, by the name that sites and manifests store. All are near zero for negative input.
``shifted_relu:t`` (the module `ShiftedReLU`) belongs to it for every number t."""


class ShiftedReLU(nn.Module):
    """relu(z - t): silent up to the threshold t.

    Source: Mirzadeh et al. 2024, arXiv:2310.04564, section 5.3.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, z: Tensor) -> Tensor:
        """The function, elementwise."""
        return _shifted_relu(z, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"{self.threshold}"

    @property
    def activation(self) -> str:
        """Its name in `ACTIVATIONS`."""
        return f"{_SHIFTED}{self.threshold!r}"


def activation_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all functions that a model's FFNs may compute: the table, and the shifted ReLUs that stand in the model."""
    # One that was annealed is the `end` of a module that does not register it.
    found = (getattr(module, "end", module) for module in model.modules())
    return (*ACTIVATIONS, *dict.fromkeys(m.activation for m in found if isinstance(m, ShiftedReLU)))


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
