"""Router, rule and FFN of a layer as one operator that torch.compile, torch.export and every other tracer know.

Letters: T tokens, D model width, F FFN width, W router width, E experts.

Eager code without a tracer calls `cpu.Routed`, which takes its pointers once; this is the same at a higher price a call.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import KernelError
from ..sites.site import FFNWeights
from . import build_plan, cpu, cpu_always, moe_ffn

_Optional: TypeAlias = Tensor | None


def routed_ffn(x: Tensor, *, weights: FFNWeights, router: cpu.RouterWeights, activation: str, impl: str) -> tuple[Tensor, Tensor]:
    """y (..., O), and mask_TE: which experts ran. Computed as a layer in eager mode does, bit for bit, also where the crossover is.

    Args:
        x: (..., D), float32 or bfloat16, on the CPU.
        weights: of x's dtype, or int8; `cpu.routed_refusal` says what they must be.
        router: norm router and rule.
        activation: one of `cpu.ACTIVATIONS`.
        impl: "cpu", or "auto": many tokens that need nearly every expert then run as `moe_ffn` finds.

    Raises:
        KernelError: what `cpu.Routed` raises; or a gradient is wanted, which only the pieces give: router, rule and `moe_ffn`.
    """
    matrices = [getattr(weights, name) for name in (*cpu.MATRICES, *cpu.BIASES, *cpu.SCALES)]
    options = (list(router.always_on), activation, router.output, router.rule, float(router.knob), impl)
    y, mask_TE = _routed_ffn_cpu(x, *matrices, *router.tensors, *options)
    return y, mask_TE


@torch.library.custom_op("moeify::routed_ffn_cpu", mutates_args=(), device_types="cpu")
def _routed_ffn_cpu(
    x: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    gate_FD: _Optional,
    up_bias_F: _Optional,
    gate_bias_F: _Optional,
    down_bias_D: _Optional,
    up_scale_F: _Optional,
    gate_scale_F: _Optional,
    down_scale_D: _Optional,
    hidden_WD: Tensor,
    hidden_bias_W: Tensor,
    out_EW: Tensor,
    out_bias_E: Tensor,
    always_on: Sequence[int],
    activation: str,
    output: str,
    rule: str,
    knob: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D, up_scale_F, gate_scale_F, down_scale_D)
    router = cpu.RouterWeights(
        *(hidden_WD, hidden_bias_W, out_EW, out_bias_E), output=output, rule=rule, knob=knob, always_on=tuple(always_on)
    )
    routed = cpu.routed_once(weights, router, activation=activation, dtype=x.dtype)
    if impl == "cpu" or math.prod(x.shape[:-1]) <= cpu_always(x.dtype, is_int8=up_scale_F is not None):
        return routed(x)
    mask_TE = routed.select(x)
    y_TD = moe_ffn(x.reshape(-1, x.shape[-1]), weights, build_plan(mask_TE), activation=activation, impl=impl)
    return y_TD.reshape(*x.shape[:-1], y_TD.shape[1]), mask_TE


@_routed_ffn_cpu.register_fake
def _(x: Tensor, _up_FD: Tensor, down_FD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if any(isinstance(t, Tensor) and t.device != x.device for t in (_up_FD, down_FD, *rest)):
        raise KernelError(f"impl 'cpu': x is on {x.device}; weights and router must all be there.")
    out_EW = rest[9]
    y = x.new_empty(*x.shape[:-1], down_FD.shape[1])
    return y, x.new_empty(math.prod(x.shape[:-1]), out_EW.shape[0], dtype=torch.bool)


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise KernelError("moeify::routed_ffn_cpu has no gradient; run it under torch.no_grad(), or router, rule and moe_ffn one by one.")


_routed_ffn_cpu.register_autograd(lambda *_: None, setup_context=_refuse_gradients)
