"""Projections with int8 weights: what a converted FFN's `nn.Linear` or `Conv1D` becomes, in place.

Letters: O outputs of a projection, I its inputs, R neurons (F; 2F where gate and up are fused), D width of a neuron's row, F FFN width.

Each output of a projection has one scale: w = scale * q, q in [-127, 127]. An output of the first projections is a neuron, one of the down
projection is not: a scale for each of its neurons, which one expert could read alone, costs 3 % of SmolLM2-135M's perplexity, where one for
each output costs nothing (docs/numerics.md). The integers lie by neuron in both, although the down projection's dense shape is the other
way round: that is what a kernel reads. The leading 1 of the weight's shape fits no dense layer, so that no loader that knows nothing of
scales takes the integers for weights.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """An FFN's first projection: y = x w^T + bias,   w[r] = scale[r] * q[r].

    Never constructed: `to_int8` changes the class of the module that is there, so that its name, its hooks and all references to it stay.
    """

    weight: nn.Parameter
    """int8 (1, R, D)."""
    weight_scale: nn.Parameter
    """fp32 (R,), or (D,) of a down projection; whatever the model's dtype."""
    bias: nn.Parameter | None
    """(R,), or (D,) of a down projection; of the model's dtype."""
    dense_class: type[nn.Module]
    """What the module was."""

    def forward(self, x: Tensor) -> Tensor:
        """Arguments and result of the dense layer; the weights are dequantised at every call."""
        return F.linear(x, self.rows(x.dtype), self.bias)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The rows (R, D) that the integers stand for."""
        return dequantize(self.weight[0], self.weight_scale[:, None], dtype=dtype)

    def extra_repr(self) -> str:
        _, rows, width = self.weight.shape
        return f"{rows=}, {width=}, bias={self.bias is not None}, was={self.dense_class.__name__}"

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
    """An FFN's down projection: y = h w + bias,   w[:, d] = scale[d] * q[:, d]."""

    def forward(self, h: Tensor) -> Tensor:
        """Arguments and result of the dense layer; the weights are dequantised at every call."""
        return F.linear(h, self.rows(h.dtype).t(), self.bias)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The rows (F, D) that the integers stand for."""
        return dequantize(self.weight[0], self.weight_scale, dtype=dtype)


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row, which is one output of a projection.

    scale[o] = max_i |w[o, i]| / 127,   q[o, i] = round(w[o, i] / scale[o])    (half to even; a zero row has scale 0 and q = 0)

    Args:
        weight_OI: floating, finite (not checked), any strides; also on the meta device.

    Returns:
        q_OI int8 in [-127, 127], contiguous, and scale_O fp32. |scale * q - w| <= scale / 2 up to rounding.
    """
    weight_OI = weight_OI.detach().float()
    scale_O = weight_OI.abs().amax(1) / 127
    q_OI = (weight_OI / torch.where(scale_O > 0, scale_O, 1)[:, None]).round_().clamp_(-127, 127)
    return q_OI.to(torch.int8, memory_format=torch.contiguous_format), scale_O


def dequantize(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """w = scale * q, scale broadcast over q; computed in fp32 and rounded to ``dtype``; differentiable in the scales."""
    return (q.float() * scale).to(dtype)


def to_int8(linear: nn.Module, weight_OI: Tensor, *, cls: type[Int8Linear]) -> None:
    """Change a plain projection into one with int8 weights, in place; its bias stays. On the meta device, into the skeleton of one.

    Args:
        linear: `nn.Linear`, `Conv1D` or a subclass that computes the same.
        weight_OI: its weight with a row per output.
        cls: `Int8Linear` or `Int8DownLinear`.
    """
    q_OI, scale_O = quantize_rows(weight_OI)
    q_RD = q_OI.t().contiguous() if issubclass(cls, Int8DownLinear) else q_OI
    module = cast(Any, linear)
    module.dense_class = type(linear)
    module.__class__ = cls
    module.weight = nn.Parameter(q_RD[None], requires_grad=False)
    module.weight_scale = nn.Parameter(scale_O, requires_grad=False)


def to_float(int8: Int8Linear, *, dtype: torch.dtype) -> None:
    """The dense layer that `to_int8` was given, in place; its weights are those that the integers stand for, not those from before."""
    rows_RD = int8.rows(dtype)
    module = cast(Any, int8)
    # A Linear keeps (out, in), a Conv1D (in, out).
    by_neuron = isinstance(int8, Int8DownLinear) == (module.dense_class.__name__ == "Conv1D")
    module.__class__ = module.dense_class
    del module.dense_class, module.weight_scale
    module.weight = nn.Parameter((rows_RD if by_neuron else rows_RD.t()).contiguous())
