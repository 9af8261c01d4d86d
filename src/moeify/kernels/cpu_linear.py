"""The compiled kernels of linear layers whose tokens skip input channels: checks tensors, hands over pointers (see `cpu`).

Letters: T tokens, K input channels, N outputs, F neurons.
"""

import ctypes
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import KernelError
from . import cpu

DEVICE = "cpu"
# One thread, half of the channels kept by each token, time(F.linear on the same layout) / time(kernel), SmolLM2's up and (2048, 8192):
#   fp32  T=4: 2.2, 2.5   T=16: 1.9, 2.6   T=64: 1.4, 1.8     bf16  T=4: 2.1, 3.0   T=8: 1.4, 2.4   T=16: 0.93, 1.5   T=32: 0.62, 0.89
MOST_TOKENS = {torch.float32: 64, torch.bfloat16: 16}
"""Tokens up to which "auto" runs the kernels, by x's dtype; more keep nearly every channel between them, and dense GEMMs win."""


class LinearWeights(NamedTuple):
    """A linear layer as the kernels read it: ``y = (x * keep) W^T + b``, ``keep_tk = |x_tk| >= level_k``."""

    weight_KN: Tensor
    """A row per input channel, contiguous; of x's dtype, or int8 with scales."""
    level_K: Tensor | None
    """fp32; None keeps everything but zeros."""
    bias_N: Tensor | None = None
    """Of x's dtype."""
    scale_N: Tensor | None = None
    """fp32, with int8 weights: W = scale_N * q."""


class _Linear(ctypes.Structure):
    """``moeify_linear`` of csrc/moeify.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("level", "bias", "scale")),
        *((name, ctypes.c_int64) for name in ("d_in", "d_out")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype")),
    ]


class _Gated(ctypes.Structure):
    """``moeify_gated`` of csrc/moeify.h."""

    _fields_ = [*((name, _Linear) for name in ("gate", "up", "down")), ("activation", ctypes.c_int32)]


def has_rows(weight_KN: Tensor) -> bool:
    """Whether each input channel's row is contiguous, so that the kernels can read it in place."""
    return cpu._is_rows(weight_KN)


def refusal(layer: LinearWeights, *, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot read this layer in place for x of this dtype; None if they can. Looks at no value."""
    if (missing := cpu.unavailable()) is not None:
        return missing
    if any(t is not None and t.device.type != "cpu" for t in layer):
        return f"it runs on the CPU, the layer is on {layer.weight_KN.device}"
    if dtype not in cpu.DTYPES:
        return f"it takes float32 and bfloat16, x is {dtype}"
    return misfit(layer, dtype=dtype)


def misfit(layer: LinearWeights, *, dtype: torch.dtype) -> str | None:
    """What is not as kernels of any device read it in place: shape, dtype or strides of a tensor; None if nothing."""
    weight_KN, level_K, bias_N, scale_N = layer
    if weight_KN.dim() != 2 or 0 in weight_KN.shape:
        return f"the weight must be a matrix with something in it, got {tuple(weight_KN.shape)}"
    if (weight_KN.dtype, scale_N is not None) not in ((dtype, False), (torch.int8, True)):
        return f"the weight must be {dtype} as x is, or int8 with scales, got {weight_KN.dtype}"
    if not has_rows(weight_KN):
        return "the weights of an input channel are not contiguous (moeify.sites.store_by_input)"
    d_in, d_out = weight_KN.shape
    for name, tensor, kind, size in (
        ("levels", level_K, torch.float32, d_in),
        ("bias", bias_N, dtype, d_out),
        ("scales", scale_N, torch.float32, d_out),
    ):
        if tensor is not None and (tensor.dtype is not kind or tensor.shape != (size,) or not tensor.is_contiguous()):
            return f"the {name} must be {size} contiguous {kind}, got {tuple(tensor.shape)} {tensor.dtype}"
    return None


class SparseLinear:
    """One linear layer as a native call without autograd; its pointers are taken once.

    Holds the tensors that it was made from. Values written into them are seen; whoever puts another tensor in a parameter's place makes
    another one.

    Raises:
        KernelError: a tensor is not as the library reads it in place; names it.
    """

    def __init__(self, layer: LinearWeights, *, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or layer.weight_KN.dtype
        self._keep: object = layer
        self._prepare(_describe(layer, self.dtype), "moeify_linear_run")
        self.d_in, self.d_out = layer.weight_KN.shape

    def _prepare(self, structure: ctypes.Structure, name: str) -> None:
        self._structure, self._pointer = structure, ctypes.byref(structure)
        self._call, self._isa = getattr(cpu._library(), name), cpu._isa()

    def __call__(self, x: Tensor) -> Tensor:
        """y (..., N).

        Args:
            x: (..., K), on the CPU, of the weights' dtype and width (checked: native code takes them for granted); any number of tokens,
                but made for few.
        """
        shape, d_in, d_out = x.shape, self.d_in, self.d_out
        if x.dtype is not self.dtype or shape[-1:] != (d_in,) or not x.is_cpu:
            raise KernelError(f"impl 'cpu': x is {tuple(shape)} {x.dtype} on {x.device}, expected (..., {d_in}) {self.dtype} on cpu.")
        x = x.contiguous()
        y = x.new_empty((*shape[:-1], d_out))
        num_tokens = x.numel() // d_in
        status = self._call(self._pointer, x.data_ptr(), d_in, num_tokens, y.data_ptr(), d_out, self._isa, torch.get_num_threads())
        if status:
            cpu._check_status(status)
        return y


class SparseGated(SparseLinear):
    """The three layers of a gated FFN as one native call: ``down(act(gate(x)) * up(x))``, each with its own levels.

    What is between the layers is summed in fp32 and rounded to x's dtype once.

    Raises:
        KernelError: as `SparseLinear`; or the layers do not fit together.
    """

    def __init__(self, gate: LinearWeights, up: LinearWeights, down: LinearWeights, *, activation: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._keep = (gate, up, down)
        if why_not := gated_refusal(gate, up, down, activation=activation, dtype=dtype):
            raise KernelError(f"impl 'cpu': {why_not}.")
        layers = (_describe(layer, dtype) for layer in (gate, up, down))
        self._prepare(_Gated(*layers, cpu.ACTIVATIONS.index(activation)), "moeify_gated_run")
        self.d_in, self.d_out = up.weight_KN.shape[0], down.weight_KN.shape[1]


def gated_refusal(gate: LinearWeights, up: LinearWeights, down: LinearWeights, *, activation: str, dtype: torch.dtype) -> str | None:
    """Why `SparseGated` cannot be made of these; None if it can. Looks at no value."""
    for layer in (gate, up, down):
        if why_not := refusal(layer, dtype=dtype):
            return why_not
    if activation not in cpu.ACTIVATIONS:
        return f"it does not know the activation {activation!r}; known: {', '.join(cpu.ACTIVATIONS)}"
    shapes = [tuple(layer.weight_KN.shape) for layer in (gate, up, down)]
    if shapes[0] != shapes[1] or shapes[1][1] != shapes[2][0] or len({layer.weight_KN.dtype for layer in (gate, up, down)}) > 1:
        return f"gate, up and down do not fit together: {shapes}"
    return None


def can_mask(x: Tensor, level_K: Tensor) -> bool:
    """Whether `mask` may be called: memory on the CPU, a type that the library knows, nobody who wants gradients or operators."""
    return (
        x.is_cpu
        and level_K.is_cpu
        and x.dtype in cpu.DTYPES
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not cpu.is_recorded(x)
        and not cpu.wants_tangents()
        and cpu.unavailable() is None
    )


def mask(x: Tensor, level_K: Tensor) -> Tensor:
    """x (..., K) where not |x_k| < level_k, elsewhere 0: one pass, where PyTorch's comparison and selection take thirty times as long.

    Args:
        x: as `can_mask` wants it.
        level_K: fp32.
    """
    if level_K.shape != x.shape[-1:] or level_K.dtype is not torch.float32:
        raise KernelError(f"impl 'cpu': the levels must be {x.shape[-1]} {torch.float32}, got {tuple(level_K.shape)} {level_K.dtype}.")
    x, level_K = x.detach().contiguous(), level_K.contiguous()
    y = torch.empty_like(x)
    num_channels = x.shape[-1]
    rows = (x.numel() // num_channels, num_channels)
    threads = torch.get_num_threads()
    run = cpu._library().moeify_mask_run
    if status := run(x.data_ptr(), level_K.data_ptr(), *rows, cpu.DTYPES[x.dtype], y.data_ptr(), cpu._isa(), threads):
        cpu._check_status(status)
    return y


def sparse_linear(x: Tensor, layer: LinearWeights) -> Tensor:
    """One call for tensors that nobody has prepared; an operator where a tracer must see one. No gradient.

    Args:
        x: (..., K), on the CPU.
        layer: as `refusal` wants it.

    Raises:
        KernelError: `refusal` says why; or a gradient is wanted.
    """
    if cpu.is_recorded(x):
        return cast(Tensor, _sparse_linear_cpu(x, *layer))
    tensors = [t for t in (x, *layer) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise KernelError(_NO_GRADIENT)
    return SparseLinear(layer, dtype=x.dtype)(x)


@torch.library.custom_op("moeify::sparse_linear_cpu", mutates_args=(), device_types="cpu")
def _sparse_linear_cpu(x: Tensor, weight_KN: Tensor, level_K: Tensor | None, bias_N: Tensor | None, scale_N: Tensor | None) -> Tensor:
    return SparseLinear(LinearWeights(weight_KN, level_K, bias_N, scale_N), dtype=x.dtype)(x)


@_sparse_linear_cpu.register_fake
def _(x: Tensor, weight_KN: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_KN.shape[1]))


_NO_GRADIENT = "impl 'cpu': the sparse linear layer has no gradient; run it under torch.no_grad(), or with impl='auto'."


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise KernelError(_NO_GRADIENT)


_sparse_linear_cpu.register_autograd(lambda *_: None, setup_context=_refuse_gradients)


def _describe(layer: LinearWeights, dtype: torch.dtype) -> _Linear:
    """The library's record of a layer; borrows the tensors' memory."""
    if why_not := refusal(layer, dtype=dtype):
        raise KernelError(f"impl 'cpu': {why_not}.")
    if any(isinstance(t, FakeTensor) for t in layer):
        raise KernelError("impl 'cpu': a FakeTensor has no memory.")
    weight_KN, level_K, bias_N, scale_N = layer
    return _Linear(
        *(cpu._pointer(weight_KN), weight_KN.stride(0) if weight_KN.shape[0] > 1 else weight_KN.shape[1]),
        *(cpu._pointer(t) for t in (level_K, bias_N, scale_N)),
        *weight_KN.shape,
        *(cpu.DTYPES[dtype], cpu._INT8 if weight_KN.dtype is torch.int8 else cpu.DTYPES[dtype]),
    )
