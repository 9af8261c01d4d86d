"""Router, rule and FFN of one layer on a GPU as one call, for few tokens: four kernels, none of them torch's, and no host sync.

Letters: T tokens, D model width, F FFN width, W router width, E experts.

Two kernels select (`triton_router`), two compute (`triton_union`); from the mask on it is `gpu_ffn`. A captured CUDA graph holds for any
input of its shape. `triton_router` is imported when it is first needed. No GPU has timed it.
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import KernelError
from ..sites.site import FFNWeights
from . import cpu, gpu_ffn, gpu_linear
from .cpu import RouterWeights
from .tiles import router_tiles

RULES = ("threshold", "dynk_max", "dynk_mass", "topk", "norm_budget")
"""Selection rules of the kernels, by their names in `moeify.select.RULES`: all of them."""
MOST_TOKENS = 64
"""Tokens up to which eager layers make one call of it; of more, router and rule are one, and what computes the experts is looked for."""
MOST_EXPERTS = 1024
"""Experts that one program scores and sorts."""

_Optional: TypeAlias = Tensor | None


def is_for(x: Tensor, *, impl: str) -> bool:
    """Whether a layer of this ``impl`` would ask for the call: on a GPU, or by name in Triton's interpreter."""
    return (x.is_cuda and impl in ("auto", "triton")) or (x.is_cpu and impl == "triton")


def refusal(weights: FFNWeights, router: RouterWeights, *, activation: str, dtype: torch.dtype) -> str | None:
    """Why `Routed` cannot be made of these for x of this dtype; None if it can. Looks at no value: it may be asked while tracing."""
    device = weights.up_FD.device
    if (why_not := gpu_ffn.device_refusal(device, dtype=dtype, activation=activation)) is not None:
        return why_not
    if any(t is not None and t.device != device for t in (*vars(weights).values(), *router.tensors)):
        return f"weights and router must all be on {device}"
    if any(t.dim() != 2 for t in (weights.up_FD, weights.down_FD, router.hidden_WD, router.out_EW)):
        return "the matrices of weights and router must be 2-D"
    num_experts, (width, d_model) = router.out_EW.shape[0], router.hidden_WD.shape
    if (why_not := cpu._misfit(weights, num_experts=num_experts, dtype=dtype)) is not None:
        return why_not
    if num_experts > MOST_EXPERTS:
        return f"one program scores up to {MOST_EXPERTS} experts, these are {num_experts}"
    if any(t.dtype is not torch.float32 or not t.is_contiguous() for t in router.tensors):
        return "the router's tensors must be contiguous float32"
    if (router.out_EW.shape[1], d_model) != (width, weights.up_FD.shape[1]):
        return f"a router of width {width} for {d_model} inputs does not fit {tuple(weights.up_FD.shape)}"
    if router.hidden_bias_W.shape != (width,) or router.out_bias_E.shape != (num_experts,):
        return "the router's biases do not fit its matrices"
    if router.rule not in RULES or router.output not in cpu.OUTPUTS:
        return f"it does not know the rule {router.rule!r} with the output {router.output!r}; known: {', '.join((*RULES, *cpu.OUTPUTS))}"
    if any(not 0 <= e < num_experts for e in router.always_on):
        return f"always_on must name experts in [0, {num_experts}), got {router.always_on}"
    return None


class Routed:
    """Router, rule and FFN of one layer as one call without autograd.

    Holds the tensors that it was made from. Values written into them are seen; whoever puts another tensor in a parameter's place makes
    another `Routed`.

    Raises:
        KernelError: `refusal` says why.
    """

    def __init__(self, weights: FFNWeights, router: RouterWeights, *, activation: str, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or weights.up_FD.dtype
        if why_not := refusal(weights, router, activation=activation, dtype=self.dtype):
            raise KernelError(f"impl 'triton': {why_not}.")
        self._weights, self._router, self._activation = weights, router, activation

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., O), and mask_TE: which experts ran. No host sync.

        Args:
            x: (..., D), any strides, of the weights' device and width and of the dtype it was made for; any number of tokens, but made for
                few.

        Raises:
            KernelError: x is another tensor than that, or has more pairs than `gpu_ffn.MOST_PAIRS`.
        """
        mask_TE = self.select(x)
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD = gpu_ffn._forward(x_TD, self._weights, mask_TE, activation=self._activation)
        return y_TD.view(*x.shape[:-1], y_TD.shape[1]), mask_TE

    def select(self, x: Tensor) -> Tensor:
        """mask_TE alone: which experts would run. Arguments as of the call."""
        device, d_model = self._weights.up_FD.device, self._router.hidden_WD.shape[1]
        if x.dtype is not self.dtype or x.shape[-1:] != (d_model,) or x.device != device:
            raise KernelError(
                f"impl 'triton': x is {tuple(x.shape)} {x.dtype} on {x.device}, expected (..., {d_model}) {self.dtype} on {device}."
            )
        if (why_not := gpu_ffn.too_many(math.prod(x.shape[:-1]), num_experts=self._router.out_EW.shape[0])) is not None:
            raise KernelError(f"impl 'triton': {why_not}.")
        return select(x.reshape(-1, d_model), self._router)


def select(x_TD: Tensor, router: RouterWeights) -> Tensor:
    """mask_TE: scores in fp32 as `moeify.routers.NormRouter` has them, then the rule; pairs within a rounding of it may differ.

    Args:
        x_TD: on the router's device; above `MOST_TOKENS` tokens the products are of many tokens, and the rule a kernel of its own.
        router: as `refusal` wants it.
    """
    (num_tokens, d_model), (width, num_experts) = x_TD.shape, (router.hidden_WD.shape[0], router.out_EW.shape[0])
    if not num_tokens:
        return x_TD.new_empty((0, num_experts), dtype=torch.bool)
    options = {"is_exp": router.output == "exp", "rule": router.rule, "knob": float(router.knob), "always_on": router.always_on}
    if num_tokens > MOST_TOKENS:
        z_TE = F.linear(F.relu(_hidden_of_many(x_TD, router.hidden_WD) + router.hidden_bias_W), router.out_EW, router.out_bias_E)
        return cast(Tensor, _kernels().choose(z_TE[None], None, None, None, **options))
    tiles = router_tiles(d_model=d_model, width=width, num_tokens=num_tokens, num_units=gpu_linear._num_units(x_TD.device))
    sums_STW = _kernels().hidden_sums(x_TD, router.hidden_WD, tiles)
    return cast(Tensor, _kernels().choose(sums_STW, router.hidden_bias_W, router.out_EW, router.out_bias_E, **options))


def _hidden_of_many(x_TD: Tensor, hidden_WD: Tensor) -> Tensor:
    """x hidden^T in fp32 (T, W). Of bfloat16 by matrix instructions, 15 times as fast as fp32's: three such numbers hold any weight."""
    if x_TD.dtype is torch.bfloat16:
        return cast(Tensor, _kernels().hidden_of_many(x_TD, hidden_WD)[0])
    return F.linear(x_TD.float(), hidden_WD)


def routed_ffn(x: Tensor, *, weights: FFNWeights, router: RouterWeights, activation: str) -> tuple[Tensor, Tensor]:
    """`Routed` as an operator that torch.compile, torch.export and every other tracer know.

    Raises:
        KernelError: `refusal` says why; or a gradient is wanted, which only the pieces give: router, rule and `moe_ffn`.
    """
    matrices = [getattr(weights, name) for name in (*cpu.MATRICES, *cpu.BIASES, *cpu.SCALES)]
    options = (list(router.always_on), activation, router.output, router.rule, float(router.knob))
    y, mask_TE = _routed_ffn_gpu(x, *matrices, *router.tensors, *options)
    return y, mask_TE


@torch.library.custom_op("moeify::routed_ffn_gpu", mutates_args=())
def _routed_ffn_gpu(
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
) -> tuple[Tensor, Tensor]:
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D, up_scale_F, gate_scale_F, down_scale_D)
    router = RouterWeights(*(hidden_WD, hidden_bias_W, out_EW, out_bias_E), output=output, rule=rule, knob=knob, always_on=tuple(always_on))
    return Routed(weights, router, activation=activation, dtype=x.dtype)(x)


@_routed_ffn_gpu.register_fake
def _(x: Tensor, up_FD: Tensor, down_FD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if any(isinstance(t, Tensor) and t.device != x.device for t in (up_FD, down_FD, *rest)):
        raise KernelError(f"impl 'triton': x is on {x.device}; weights and router must all be there.")
    y = x.new_empty(*x.shape[:-1], down_FD.shape[1])
    return y, x.new_empty(math.prod(x.shape[:-1]), rest[9].shape[0], dtype=torch.bool)


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise KernelError("moeify::routed_ffn_gpu has no gradient; run it under torch.no_grad(), or router, rule and moe_ffn one by one.")


_routed_ffn_gpu.register_autograd(lambda *_: None, setup_context=_refuse_gradients)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_router

    return triton_router
