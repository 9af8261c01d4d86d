"""The compiled CPU kernels as an operator that autograd and torch.compile know: `cpu` forward, the gradients of `grouped` or `masked`.

Letters: T tokens, D model width, F FFN width, E experts.
"""

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..errors import KernelError
from ..sites.site import FFNWeights
from . import cpu, grouped, masked
from .plan import DispatchPlan, build_plan

_FIELDS = (*cpu.MATRICES, *cpu.BIASES, *cpu.SCALES)
_Optional: TypeAlias = Tensor | None


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Sum of the selected experts' outputs. Arguments and result as in `reference.moe_ffn`.

    Sums run in fp32 (int8 weights with bf16 x: exact sums of 16-bit integers, docs/numerics.md). The same input, number of threads and
    instruction set give the same bits. Weights whose rows are not contiguous are copied at every call (`moeify.sites.store_by_neuron`
    avoids that). The backward pass is that of `grouped`; int8 weights get no gradient.

    Raises:
        KernelError: `cpu.refusal` says why.

    Cost: FLOPs and bytes of the selected experts. Up to 64 tokens every weight row is read once; more are worked on in blocks of up to 512.
    A workspace of some MB is kept for the next call.
    """
    if why_not := cpu.refusal(x_TD, activation=activation):
        raise KernelError(f"impl 'cpu': {why_not}.")
    tensors = [getattr(weights, name) for name in _FIELDS]
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, *tensors))
    if wants_grad or cpu.is_recorded(x_TD):
        return cast(Tensor, _ffn_cpu(x_TD, *tensors, plan.mask_TE, activation))
    # The operator costs 20 us more than the call itself, which a token of a small model takes as a whole.
    return cpu.run(x_TD, weights, plan.mask_TE, activation=activation)


@torch.library.custom_op("moeify::ffn_cpu", mutates_args=(), device_types="cpu")
def _ffn_cpu(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    gate_FD: _Optional,
    up_bias_F: _Optional,
    gate_bias_F: _Optional,
    down_bias_D: _Optional,
    up_scale_F: _Optional,
    gate_scale_F: _Optional,
    down_scale_D: _Optional,
    mask_TE: Tensor,
    activation: str,
) -> Tensor:
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D, up_scale_F, gate_scale_F, down_scale_D)
    return cpu.run(x_TD, weights, mask_TE, activation=activation)


@_ffn_cpu.register_fake
def _(x_TD: Tensor, _up_FD: Tensor, down_FD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], down_FD.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[_Optional, ...]:
    *tensors, mask_TE = ctx.saved_tensors
    leaves = [None if t is None else t.detach().requires_grad_(want) for t, want in zip(tensors, ctx.needs_input_grad, strict=False)]
    # A graph is being traced where the tensors are stand-ins; then nothing may depend on the counts: dense gradients, masked.
    impl = grouped if type(grad_TD) is Tensor else masked
    with torch.enable_grad():
        weights = FFNWeights(**dict(zip(_FIELDS, leaves[1:], strict=True)))  # type: ignore[arg-type]
        out_TD = impl.moe_ffn(cast(Tensor, leaves[0]), weights, build_plan(mask_TE), activation=ctx.activation)
    needed = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out_TD, needed, grad_TD, allow_unused=True, materialize_grads=True))
    return (*(next(found) if t is not None and t.requires_grad else None for t in leaves), None, None)


_ffn_cpu.register_autograd(_backward, setup_context=_setup_context)
