"""Projections with int8 weights: what a converted FFN's `nn.Linear` or `Conv1D` becomes, in place.

Letters: R neurons of a projection (F; 2F where gate and up are fused), D width of a neuron's row, F FFN width.

Each neuron's row has one scale: w = scale * q, q in [-127, 127]. Both projections keep a row per neuron, the down projection, too, although
its dense shape is the other way round: that is what a kernel reads and what one scale can serve. The leading 1 of the weight's shape fits
no dense layer, so that no loader that knows nothing of scales takes the integers for weights.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """An FFN's first projection: y = x (scale * q)^T + bias.

    Never constructed: `to_int8` changes the class of the module that is there, so that its name, its hooks and all references to it stay.
    """

    weight: nn.Parameter
    """int8 (1, R, D)."""
    weight_scale: nn.Parameter
    """fp32 (R,), whatever the model's dtype."""
    bias: nn.Parameter | None
    """(R,), or (D,) of a down projection; of the model's dtype."""
    dense_class: type[nn.Module]
    """What the module was."""

    def forward(self, x: Tensor) -> Tensor:
        """Arguments and result of the dense layer; the weights are dequantised at every call."""
        return F.linear(x, self.rows(x.dtype), self.bias)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The rows (R, D) that the integers stand for."""
        return dequantize_rows(self.weight[0], self.weight_scale, dtype=dtype)

    def extra_repr(self) -> str:
        _, neurons, width = self.weight.shape
        return f"{neurons=}, {width=}, bias={self.bias is not None}, was={self.dense_class.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        # A change of dtype is for floating tensors only. Seen as integers, the scales are moved with the model and never rounded.
        scale = self.weight_scale.requires_grad_(False)
        scale.data = scale.data.view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            self.weight_scale.data = self.weight_scale.data.view(torch.float32)
        return self


class Int8DownLinear(Int8Linear):
    """An FFN's down projection: y = h (scale * q) + bias."""

    def forward(self, h: Tensor) -> Tensor:
        """Arguments and result of the dense layer; the weights are dequantised at every call."""
        return F.linear(h, self.rows(h.dtype).t(), self.bias)


def quantize_rows(rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row.

    scale[r] = max_d |rows[r, d]| / 127,   q[r, d] = round(rows[r, d] / scale[r])    (half to even; a zero row has scale 0 and q = 0)

    Args:
        rows_RD: floating, finite (not checked), any strides; also on the meta device.

    Returns:
        q_RD int8 in [-127, 127], contiguous, and scale_R fp32. |scale * q - rows| <= scale / 2 up to rounding.
    """
    rows_RD = rows_RD.detach().float()
    scale_R = rows_RD.abs().amax(1) / 127
    q_RD = (rows_RD / torch.where(scale_R > 0, scale_R, 1)[:, None]).round_().clamp_(-127, 127)
    return q_RD.to(torch.int8, memory_format=torch.contiguous_format), scale_R


def dequantize_rows(q_RD: Tensor, scale_R: Tensor, *, dtype: torch.dtype) -> Tensor:
    """rows = scale * q, computed in fp32 and rounded to ``dtype``; differentiable in the scales."""
    return (q_RD.float() * scale_R[:, None]).to(dtype)


def to_int8(linear: nn.Module, rows_RD: Tensor, *, cls: type[Int8Linear]) -> None:
    """Change a plain projection into one with int8 weights, in place; its bias stays. On the meta device, into the skeleton of one.

    Args:
        linear: `nn.Linear`, `Conv1D` or a subclass that computes the same.
        rows_RD: its weight with a row per neuron.
        cls: `Int8Linear` or `Int8DownLinear`.
    """
    q_RD, scale_R = quantize_rows(rows_RD)
    module = cast(Any, linear)
    module.dense_class = type(linear)
    module.__class__ = cls
    module.weight = nn.Parameter(q_RD[None], requires_grad=False)
    module.weight_scale = nn.Parameter(scale_R, requires_grad=False)


def to_float(int8: Int8Linear, *, dtype: torch.dtype) -> None:
    """The dense layer that `to_int8` was given, in place; its weights are those that the integers stand for, not those from before."""
    rows_RD = int8.rows(dtype)
    module = cast(Any, int8)
    # A Linear keeps (out, in), a Conv1D (in, out).
    by_neuron = isinstance(int8, Int8DownLinear) == (module.dense_class.__name__ == "Conv1D")
    module.__class__ = module.dense_class
    del module.dense_class, module.weight_scale
    module.weight = nn.Parameter((rows_RD if by_neuron else rows_RD.t()).contiguous())
