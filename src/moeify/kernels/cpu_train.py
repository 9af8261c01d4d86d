"""The compiled CPU kernels of training (csrc/train.h): forward and backward over the selected pairs, as operators for autograd and tracers.

Letters: T tokens, D model width, O output width, F FFN width, E experts, N routed pairs.

A pass over the pairs is memory bound in PyTorch: gathered rows, products and their sums are written and read again. Here tokens are read
where they are, and what is written is y, the gradients, and of every pair its expert's activations.
"""

import ctypes
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..errors import KernelError
from ..sites.site import FFNWeights, expert_bounds
from . import cpu
from .gradients import empty_gradients, in_place_of
from .plan import DispatchPlan

_Optional: TypeAlias = Tensor | None
_FIELDS = (*cpu.MATRICES, *cpu.BIASES)


class _Train(ctypes.Structure):
    """``moeify_train`` of csrc/moeify.h."""

    _fields_ = [("ffn", cpu._FFN), *((name, ctypes.c_int64) for name in ("up_column", "gate_column", "down_column"))]


class _Gradients(ctypes.Structure):
    """``moeify_gradients`` of csrc/moeify.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "up", "gate", "down")),
        *((name, ctypes.c_int64) for name in ("x_stride", "up_stride", "gate_stride", "down_stride")),
        *((name, ctypes.c_int64) for name in ("up_column", "gate_column", "down_column")),
        *((name, ctypes.c_void_p) for name in ("up_bias", "gate_bias", "probs")),
    ]


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Sum of the selected experts' outputs. Arguments and result as in `reference.moe_ffn`.

    Sums run in fp32, in an order that depends on nothing but the mask: the same bits for any number of threads, forward and backward.
    Weights may lie by neuron or by column (nn.Linear, Conv1D); others are copied at every call. Differentiable once in every floating
    input, `DispatchPlan.probs_TE` included.

    Raises:
        KernelError: `cpu.refusal` says why.

    Cost: FLOPs of the selected pairs; one pass over the weights to pack them, which few tokens do not pay. Autograd keeps x and, where a
    gradient is wanted, the N * F / E activations before the nonlinearity (twice with a gate); T * F while a graph is traced, whose sizes
    know no counts. Packed weights and, in backward, 2 N * F / E activations (3 with a gate) lie in a workspace that is kept for the next
    call. Int8 weights are dequantised at every call.
    """
    if why_not := cpu.refusal(x_TD, activation=activation):
        raise KernelError(f"impl 'cpu_train': {why_not}.")
    weights = weights.dequantized(x_TD.dtype)
    tensors = [getattr(weights, name) for name in _FIELDS]
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, *tensors, plan.probs_TE))
    kept = _kept_elements(weights, plan) if wants_grad else 0
    y_TD, _ = _ffn_train_cpu(x_TD, *tensors, plan.probs_TE, plan.mask_TE, activation, kept)
    return cast(Tensor, y_TD)


def _kept_elements(weights: FFNWeights, plan: DispatchPlan) -> int:
    """What backward needs of forward: an activation for each pair and neuron, two with a gate."""
    projections = 1 if weights.gate_FD is None else 2
    if not plan.is_countable or cpu.is_recorded(plan.mask_TE):
        return projections * plan.num_tokens * weights.num_neurons
    counts_E = plan.mask_TE.sum(0)
    bounds_E = torch.tensor(expert_bounds(weights.num_neurons, plan.num_experts))
    return projections * int((counts_E * bounds_E.diff()).sum())


@torch.library.custom_op("moeify::ffn_train_cpu", mutates_args=(), device_types="cpu")
def _ffn_train_cpu(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    gate_FD: _Optional,
    up_bias_F: _Optional,
    gate_bias_F: _Optional,
    down_bias_D: _Optional,
    probs_TE: _Optional,
    mask_TE: Tensor,
    activation: str,
    kept: int,
) -> tuple[Tensor, Tensor]:
    """Y, and ``kept`` elements for `_backward_cpu`."""
    weights = _readable(FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D))
    x_TD, mask_TE = _rows(x_TD), mask_TE.contiguous()
    train = _describe(x_TD, weights, mask_TE, activation=activation)
    y_TD, kept_K = x_TD.new_empty(x_TD.shape[0], down_FD.shape[1]), x_TD.new_empty(kept)
    status = cpu._library().moeify_train_forward(
        *(ctypes.byref(train), cpu._pointer(x_TD), x_TD.stride(0), cpu._pointer(mask_TE), x_TD.shape[0]),
        *(cpu._pointer(y_TD), y_TD.shape[1], cpu._pointer(kept_K) if kept else None, kept, cpu._isa(), torch.get_num_threads()),
    )
    _check_status(status)
    return y_TD, kept_K


@_ffn_train_cpu.register_fake
def _(x_TD: Tensor, _up_FD: Tensor, down_FD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape[0], down_FD.shape[1]), x_TD.new_empty(rest[-1])


@torch.library.custom_op("moeify::ffn_train_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_cpu(
    grad_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    gate_FD: _Optional,
    up_bias_F: _Optional,
    gate_bias_F: _Optional,
    down_bias_D: _Optional,
    probs_TE: _Optional,
    mask_TE: Tensor,
    kept_K: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of the inputs from x_TD to probs_TE that are wanted, in order."""
    inputs = (x_TD, up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D, probs_TE)
    found = empty_gradients(inputs, wanted)
    x_grad, up, down, gate, up_bias, gate_bias, down_bias, probs = found
    if down_bias is not None:
        torch.sum(grad_TD, 0, out=down_bias)
    if probs is not None:
        probs.zero_()
    if not x_TD.shape[0]:
        for matrix in (up, down, gate, up_bias, gate_bias):
            if matrix is not None:
                matrix.zero_()
        return [t for t in found if t is not None]
    weights = _readable(FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D))
    x_TD, grad_TD, mask_TE = _rows(x_TD), _rows(grad_TD), mask_TE.contiguous()
    train = _describe(x_TD, weights, mask_TE, activation=activation)
    if grad_TD.dtype is not x_TD.dtype or grad_TD.shape != (x_TD.shape[0], down_FD.shape[1]):
        raise KernelError(f"impl 'cpu_train': the gradient is {tuple(grad_TD.shape)} {grad_TD.dtype}, which does not fit x and weights.")
    matrices = (up, gate, down)
    out = _Gradients(
        *(cpu._pointer(t) for t in (x_grad, *matrices)),
        *(0 if t is None else t.stride(0) for t in (x_grad, *matrices)),
        *(0 if t is None else t.stride(1) for t in matrices),
        *(cpu._pointer(t) for t in (up_bias, gate_bias, probs)),
    )
    # Without a pair nothing was kept; the library wants an address all the same.
    kept_pointer = cpu._pointer(kept_K) if kept_K.numel() else cpu._pointer(mask_TE)
    status = cpu._library().moeify_train_backward(
        *(ctypes.byref(train), cpu._pointer(x_TD), x_TD.stride(0), cpu._pointer(mask_TE), x_TD.shape[0]),
        *(kept_pointer, kept_K.numel(), cpu._pointer(grad_TD), grad_TD.stride(0), ctypes.byref(out), cpu._isa(), torch.get_num_threads()),
    )
    _check_status(status)
    return [t for t in found if t is not None]


@_backward_cpu.register_fake
def _(_grad_TD: Tensor, *rest: Any) -> list[Tensor]:
    return [t for t in empty_gradients(rest[:8], rest[-1]) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_TD: _Optional, _: _Optional) -> tuple[_Optional, ...]:
    if grad_TD is None:
        return (None,) * 11
    *inputs, mask_TE, kept_K = ctx.saved_tensors
    wanted = [want and t is not None for want, t in zip(ctx.needs_input_grad, inputs, strict=False)]
    found = _backward_cpu(grad_TD, *inputs, mask_TE, kept_K, ctx.activation, wanted)
    return (*in_place_of(inputs, wanted, found), None, None, None)


_ffn_train_cpu.register_autograd(_backward, setup_context=_setup_context)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if cpu._is_rows(tensor) else tensor.contiguous()


def _readable(weights: FFNWeights) -> FFNWeights:
    """The weights, with copies of those that lie neither by neuron nor by column."""
    fields = {name: t for name in _FIELDS if (t := getattr(weights, name)) is not None}
    return FFNWeights(**{n: t if t.dim() == 2 and (cpu._is_rows(t) or cpu._is_rows(t.t())) else t.contiguous() for n, t in fields.items()})


def _describe(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str) -> _Train:
    """The library's record; everything that native code takes for granted is checked here.

    Raises:
        KernelError: the tensors do not fit together.
    """
    num_experts = mask_TE.shape[1]
    if mask_TE.dtype is not torch.bool or not mask_TE.is_cpu:
        raise KernelError(f"impl 'cpu_train': mask_TE is {mask_TE.dtype} on {mask_TE.device}; expected bool on cpu.")
    tensors = [t for t in vars(weights).values() if t is not None]
    if any(not t.is_cpu for t in tensors) or any(t.dim() != 2 for _, t in cpu._present(weights, cpu.MATRICES)):
        raise KernelError("impl 'cpu_train': the weights must be on the CPU, their matrices 2-D.")
    if x_TD.shape != (mask_TE.shape[0], weights.up_FD.shape[1]):
        raise KernelError(f"impl 'cpu_train': x_TD is {tuple(x_TD.shape)}, expected {(mask_TE.shape[0], weights.up_FD.shape[1])}.")
    if why_not := cpu._misfit(weights, num_experts=num_experts, dtype=x_TD.dtype):
        raise KernelError(f"impl 'cpu_train': {why_not}.")
    ffn = cpu._describe(weights, num_experts=num_experts, activation=activation, dtype=x_TD.dtype)
    return _Train(ffn, *(0 if t is None else t.stride(1) for t in (weights.up_FD, weights.gate_FD, weights.down_FD)))


def _check_status(status: int) -> None:
    if status:
        raise KernelError(f"impl 'cpu_train': {cpu._STATUS.get(status, f'status {status}')}.")
