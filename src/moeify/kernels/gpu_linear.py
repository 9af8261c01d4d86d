"""Linear layers whose tokens skip input channels, on a GPU: checks tensors, cuts tiles, hands over to the Triton kernels.

Letters: T tokens, K input channels, N outputs.

`triton_linear` is imported when its kernels are first needed, for importing triton takes longer than this package. Compiled for sm80 and
sm90 and run in Triton's interpreter by the tests; no GPU has timed it.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import KernelError
from . import cpu
from .cpu_linear import LinearWeights, misfit
from .tiles import LinearTiles, linear_tiles

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS = dict.fromkeys(DTYPES, 16)
"""Tokens up to which "auto" runs the kernels, by x's dtype: one tile. More keep nearly every channel between them."""
OLDEST_GPU = (8, 0)
"""Compute capability of NVIDIA's oldest GPUs that Triton supports."""


def refusal(layer: LinearWeights, *, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot read this layer in place for x of this dtype; None if they can. Looks at no value."""
    device = layer.weight_KN.device
    if (missing := unavailable()) is not None:
        return missing
    if any(t is not None and t.device != device for t in layer):
        return f"the layer's tensors are on several devices: {', '.join(sorted({str(t.device) for t in layer if t is not None}))}"
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        return f"it runs on a GPU (or in Triton's interpreter, TRITON_INTERPRET=1), the layer is on {device}"
    if (old := _too_old(device)) is not None:
        return old
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, x is {dtype}"
    if dtype is torch.bfloat16 and is_interpreted():
        return "Triton's interpreter computes bfloat16 wrongly"
    return misfit(layer, dtype=dtype)


def reads_rows(weight: Tensor) -> bool:
    """Whether the kernels read each input channel's row of such a weight in one piece: then that is how it should lie in memory.

    On its GPU, or on the CPU of a machine that has one: models are loaded there and moved, which keeps the order.
    """
    return weight.dtype in DTYPES and (weight.is_cuda or (weight.is_cpu and torch.cuda.is_available())) and unavailable() is None


def unavailable() -> str | None:
    """Why there are no Triton kernels here, whatever the device; None if there are."""
    return None if _is_installed() else "triton is not installed (pip install triton; PyTorch for CUDA on Linux brings it)"


def is_interpreted() -> bool:
    """Whether kernels run on the host: triton reads the same variable when `triton_linear` is imported, once."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    return None if found >= OLDEST_GPU else "it needs compute capability {}.{}, this GPU has {}.{}".format(*OLDEST_GPU, *found)


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes longer than the rest of this package.
_constants: tuple[Any, ...] = (unavailable, is_interpreted, _too_old)
for _constant in _constants:
    _constant._dynamo_marked_constant = True


class SparseLinear:
    """One linear layer as two kernels without autograd.

    Holds the tensors that it was made from. Values written into them are seen; whoever puts another tensor in a parameter's place makes
    another one.

    Raises:
        KernelError: a tensor is not as the kernels read it in place; names it.
    """

    def __init__(self, layer: LinearWeights, *, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or layer.weight_KN.dtype
        if why_not := refusal(layer, dtype=self.dtype):
            raise KernelError(f"impl 'triton': {why_not}.")
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """y (..., N); the same input and GPU give the same bits. No host sync.

        Args:
            x: (..., K), any strides, of the layer's device and of the dtype and width it was made for; any number of tokens, but made for
                few.
        """
        shape, weight_KN = x.shape, self._layer.weight_KN
        d_in, d_out = weight_KN.shape
        if x.dtype is not self.dtype or shape[-1:] != (d_in,) or x.device != weight_KN.device:
            raise KernelError(
                f"impl 'triton': x is {tuple(shape)} {x.dtype} on {x.device}, expected (..., {d_in}) {self.dtype} on {weight_KN.device}."
            )
        x_TK = x.reshape(-1, d_in)
        y_TN = cast(Tensor, _kernels().run(x_TK, self._layer, self._tiles(x_TK.shape[0])))
        return y_TN.view(*shape[:-1], d_out)

    def _tiles(self, num_tokens: int) -> LinearTiles:
        weight_KN = self._layer.weight_KN
        units = _num_units(weight_KN.device)
        return linear_tiles(*weight_KN.shape, num_tokens=num_tokens, weight_bytes=weight_KN.element_size(), num_units=units)


def sparse_linear(x: Tensor, layer: LinearWeights) -> Tensor:
    """One call for tensors that nobody has prepared; an operator where a tracer must see one. No gradient.

    Args:
        x: (..., K), on the layer's device.
        layer: as `refusal` wants it.

    Raises:
        KernelError: `refusal` says why; or a gradient is wanted.
    """
    if cpu.is_recorded(x):
        return cast(Tensor, _sparse_linear_gpu(x, *layer))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *layer)):
        raise KernelError(_NO_GRADIENT)
    return SparseLinear(layer, dtype=x.dtype)(x)


@torch.library.custom_op("moeify::sparse_linear_gpu", mutates_args=())
def _sparse_linear_gpu(x: Tensor, weight_KN: Tensor, level_K: Tensor | None, bias_N: Tensor | None, scale_N: Tensor | None) -> Tensor:
    return SparseLinear(LinearWeights(weight_KN, level_K, bias_N, scale_N), dtype=x.dtype)(x)


@_sparse_linear_gpu.register_fake
def _(x: Tensor, weight_KN: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_KN.shape[1]))


_NO_GRADIENT = "impl 'triton': the sparse linear layer has no gradient; run it under torch.no_grad(), or with impl='auto'."


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise KernelError(_NO_GRADIENT)


_sparse_linear_gpu.register_autograd(lambda *_: None, setup_context=_refuse_gradients)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_linear

    return triton_linear


@functools.cache
def _num_units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
