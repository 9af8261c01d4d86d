"""Experts on a GPU, forward and backward: checks tensors, cuts tiles, hands over to the Triton kernels; operators for autograd and tracers.

Letters: T tokens, D input width, O output width, F FFN width, E experts, N routed pairs.

`triton_ffn` is imported when its kernels are first needed, for importing triton takes longer than this package. Run in Triton's interpreter
and compiled for sm80, sm90 and sm100 by the tests; no GPU has timed it.
"""

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..errors import KernelError
from ..sites.int8 import dequantize
from ..sites.site import FFNWeights
from . import cpu, gpu_linear
from .gradients import empty_gradients, in_place_of
from .plan import DispatchPlan
from .tiles import UNION_TOKENS, FFNTiles, experts_per_group, ragged_tiles, union_tiles

DTYPES = gpu_linear.DTYPES
FUNCTIONS = (
    *("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "gelu_10"),
    "shifted_relu",
)
"""Activations, without the number of a shifted ReLU."""
MOST_PAIRS = 2**30 - 2**10
"""T times E. The plan on the device counts pairs in 32 bits, and looks up to T of them past the last."""

_FIELDS = (*cpu.MATRICES, *cpu.BIASES)
_Optional: TypeAlias = Tensor | None


def refusal(x_TD: Tensor, *, num_experts: int, activation: str) -> str | None:
    """Why the kernels cannot compute this; None if they can. Looks at no value: no host sync."""
    if (why_not := device_refusal(x_TD.device, dtype=x_TD.dtype, activation=activation)) is not None:
        return why_not
    if (why_not := too_many(x_TD.shape[0], num_experts=num_experts)) is not None:
        return why_not
    if cpu.wants_tangents():
        return "it has no forward-mode gradients"
    return None


def too_many(num_tokens: int, *, num_experts: int) -> str | None:
    """Why so many pairs cannot be counted; None if they can."""
    if num_tokens * num_experts > MOST_PAIRS:
        return f"it counts up to {MOST_PAIRS} pairs, these are {num_tokens} tokens x {num_experts} experts"
    return None


def device_refusal(device: torch.device, *, dtype: torch.dtype, activation: str) -> str | None:
    """Why the kernels cannot compute any FFN there for x of this dtype; None if they can."""
    if (missing := unavailable(device.type)) is not None:
        return missing
    if (old := gpu_linear._too_old(device)) is not None:
        return old
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, x_TD is {dtype}"
    if dtype is torch.bfloat16 and gpu_linear.is_interpreted():
        return "Triton's interpreter computes bfloat16 wrongly"
    if activation.partition(":")[0] not in FUNCTIONS:
        return f"it does not know the activation {activation!r}; known: {', '.join(FUNCTIONS)}"
    return None


def unavailable(kind: str) -> str | None:
    """Why there are no such kernels for a kind of device here; None if there are."""
    if (missing := gpu_linear.unavailable()) is not None:
        return missing
    if kind == "cuda" or (kind == "cpu" and gpu_linear.is_interpreted()):
        return None
    return f"it runs on a GPU (or in Triton's interpreter, TRITON_INTERPRET=1), x_TD is on {kind}"


def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Sum of the selected experts' outputs. Arguments and result as in `reference.moe_ffn`.

    Sums run in fp32, float32 is not rounded to TF32. Weights may have any strides: the Conv1D layout and down projections as nn.Linear
    stores them are read in place. Up to `UNION_TOKENS` tokens without gradients the same call gives the same bits; beyond, thick experts
    add to y in no fixed order unless `torch.use_deterministic_algorithms` is on. Differentiable once in every floating input,
    `DispatchPlan.probs_TE` included. Int8 weights are read as they are, but in training, and the down projection of thin experts
    beyond `UNION_TOKENS` tokens: those are dequantised at every call.

    Raises:
        KernelError: `refusal` says why.

    Cost: FLOPs and bytes of the selected experts: few tokens read the union of theirs once; many multiply the pairs alone, but for the
    down projection of thin experts, which is a dense product then.
    Host syncs: none without gradients. With gradients one, for the number of pairs, unless `DispatchPlan.most_pairs` says what it is at
    most (`TopK`), or a graph is traced or captured.
    Memory: T F numbers while it runs, as dense. Autograd keeps N F / E numbers (twice with a gate), T F where the pairs are not counted.
    """
    return _run(x_TD, weights, plan, activation=activation, recompute=False)


def moe_ffn_recomputing(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """As `moe_ffn`, but backward computes the hidden activations again: autograd keeps none, at the price of the first products' FLOPs."""
    return _run(x_TD, weights, plan, activation=activation, recompute=True)


def _run(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, recompute: bool) -> Tensor:
    if why_not := refusal(x_TD, num_experts=plan.num_experts, activation=activation):
        raise KernelError(f"impl 'triton': {why_not}.")
    if plan.mask_TE.dtype is not torch.bool or plan.mask_TE.dim() != 2:
        raise KernelError(f"impl 'triton': mask_TE must be 2-D bool, got {tuple(plan.mask_TE.shape)} {plan.mask_TE.dtype}.")
    weights = _with_plain_vectors(weights)
    tensors = [getattr(weights, name) for name in (*_FIELDS, *cpu.SCALES)]
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, plan.probs_TE, *tensors))
    if not wants_grad:
        if not cpu.is_recorded(x_TD):
            return _forward(x_TD, weights, plan.mask_TE, activation=activation)
        return cast(Tensor, _ffn_gpu(x_TD, *tensors, plan.mask_TE, activation))
    weights = weights.dequantized(x_TD.dtype)
    tensors = [getattr(weights, name) for name in _FIELDS]
    y_TO, _ = _ffn_train_gpu(x_TD, *tensors, plan.probs_TE, plan.mask_TE, activation, _pairs(plan), not recompute)
    return cast(Tensor, y_TO)


def _with_plain_vectors(weights: FFNWeights) -> FFNWeights:
    """The same with contiguous biases and scales: kernels take any strides of matrices, and of vectors none."""
    plain = {}
    for name in (*cpu.BIASES, *cpu.SCALES):  # a loop that torch.compile can trace
        tensor = getattr(weights, name)
        if tensor is not None and not tensor.is_contiguous():
            plain[name] = tensor.contiguous()
    return replace(weights, **plain) if plain else weights


def _pairs(plan: DispatchPlan) -> int:
    """Room for pairs: their number, or what it is at most, where the host knows it or may wait for it, else as many as there can be."""
    all_pairs = plan.num_tokens * plan.num_experts
    is_traced = not plan.is_countable or cpu.is_recorded(plan.mask_TE)
    if not is_traced and ("num_pairs" in plan.__dict__ or "token_N" in plan.__dict__):
        return plan.num_pairs
    if plan.most_pairs is not None:
        return plan.most_pairs
    if is_traced or (plan.mask_TE.is_cuda and torch.cuda.is_current_stream_capturing()):
        return all_pairs
    return int(plan.mask_TE.sum())


def _forward(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str) -> Tensor:
    """Without gradients."""
    num_tokens, num_experts = mask_TE.shape
    if num_tokens <= UNION_TOKENS:
        tiles = union_tiles_for(x_TD, weights, num_experts=num_experts)
        return cast(Tensor, _kernels().union(x_TD, weights, mask_TE, activation=activation, tiles=tiles))
    return _ragged_forward(x_TD, weights, mask_TE, activation=activation, pairs=num_tokens * num_experts, keep=False)[0]


def union_tiles_for(x_TD: Tensor, weights: FFNWeights, *, num_experts: int) -> FFNTiles:
    """Tiles of few tokens on x's device."""
    return union_tiles(
        d_in=x_TD.shape[1],
        d_out=weights.down_FD.shape[1],
        num_neurons=weights.num_neurons,
        num_experts=num_experts,
        num_tokens=x_TD.shape[0],
        bytes_per_number=x_TD.element_size(),
        num_units=gpu_linear._num_units(x_TD.device),
        architecture=architecture(x_TD.device),
    )


def ragged_tiles_for(x_TD: Tensor, weights: FFNWeights, *, num_experts: int, by_expert: bool = False) -> FFNTiles:
    """Tiles of many tokens on x's device.

    Args:
        by_expert: no two experts in one group, as the gradient of a router's probabilities needs it.
    """
    return ragged_tiles(
        num_neurons=weights.num_neurons,
        num_experts=num_experts,
        num_tokens=x_TD.shape[0],
        bytes_per_number=x_TD.element_size(),
        by_expert=by_expert,
        architecture=architecture(x_TD.device),
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """Name of the GPU's generation in the tables of `tiles`: "sm90"; another vendor's as its driver has it; "none" without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "none"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


def _ragged_forward(
    x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str, pairs: int, keep: bool, by_expert: bool = False
) -> tuple[Tensor, _Optional]:
    """y, and (1 or 2, C, W) numbers for backward where ``keep``; many tokens, or any number of them in training."""
    (num_tokens, num_experts), num_outputs = mask_TE.shape, weights.down_FD.shape[1]
    if not num_tokens or not pairs:
        return _bias_alone(x_TD, weights), None
    kernels, tiles = _kernels(), ragged_tiles_for(x_TD, weights, num_experts=num_experts, by_expert=by_expert)
    ragged = kernels.order_pairs(mask_TE, num_neurons=weights.num_neurons, experts_per_group=tiles.experts_per_group, room=pairs)
    by_token = _by_token(tiles)
    h, kept = kernels.hidden(x_TD, weights, mask_TE, ragged, activation=activation, tiles=tiles, by_token=by_token, keep=keep)
    bias_D, scale_D = weights.down_bias_D, weights.down_scale_D
    if by_token:
        down_FD = weights.down_FD if scale_D is None else dequantize(weights.down_FD, scale_D, dtype=x_TD.dtype)
        return (h @ down_FD if bias_D is None else torch.addmm(bias_D, h, down_FD)), kept
    sums_TO = torch.zeros((num_tokens, num_outputs), dtype=torch.float32, device=x_TD.device)
    kernels.add_up(sums_TO, ragged, [(h, weights.down_FD)], num_tokens=num_tokens, num_experts=num_experts, tiles=tiles)
    if scale_D is not None:
        sums_TO *= scale_D
    if bias_D is not None:
        sums_TO += bias_D
    return sums_TO if x_TD.dtype is torch.float32 else sums_TO.to(x_TD.dtype), kept


def _by_token(tiles: FFNTiles) -> bool:
    """Whether h lies in the order of the tokens, for a dense product: no atomics, hence the same bits again."""
    return not tiles.is_atomic or torch.are_deterministic_algorithms_enabled()


def _bias_alone(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    y_TO = x_TD.new_zeros((x_TD.shape[0], weights.down_FD.shape[1]))
    return y_TO if weights.down_bias_D is None else y_TO.add_(weights.down_bias_D)


@torch.library.custom_op("moeify::ffn_gpu", mutates_args=())
def _ffn_gpu(
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
    return _forward(x_TD, weights, mask_TE, activation=activation)


@_ffn_gpu.register_fake
def _(x_TD: Tensor, _up_FD: Tensor, down_FD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], down_FD.shape[1])


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise KernelError("moeify::ffn_gpu has no gradient; call moe_ffn while the inputs require grad, or run it under torch.no_grad().")


_ffn_gpu.register_autograd(lambda *_: None, setup_context=_refuse_gradients)


@torch.library.custom_op("moeify::ffn_train_gpu", mutates_args=())
def _ffn_train_gpu(
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
    pairs: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and what backward needs: activations before the nonlinearity, flat; nothing unless ``keep``."""
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D)
    by_expert = probs_TE is not None
    y_TO, kept = _ragged_forward(x_TD, weights, mask_TE, activation=activation, pairs=pairs, keep=keep, by_expert=by_expert)
    room = _kept_elements(weights, mask_TE, pairs=pairs, by_expert=by_expert) if keep else 0
    return y_TO, x_TD.new_zeros(room) if kept is None else kept.view(-1)


@_ffn_train_gpu.register_fake
def _(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate_FD, up_bias_F, gate_bias_F, down_bias_D, probs_TE, mask_TE, _, pairs, keep = rest
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D)
    room = _kept_elements(weights, mask_TE, pairs=pairs, by_expert=probs_TE is not None) if keep else 0
    return x_TD.new_empty(x_TD.shape[0], down_FD.shape[1]), x_TD.new_empty(room)


def _kept_elements(weights: FFNWeights, mask_TE: Tensor, *, pairs: int, by_expert: bool) -> int:
    """Projections times C times W."""
    (num_tokens, num_experts), F = mask_TE.shape, weights.num_neurons
    group = 1 if by_expert else experts_per_group(F, num_experts)
    width = min(F, group * (F // num_experts) + min(group, F % num_experts))
    room = torch.sym_max(1, torch.sym_min(pairs, num_tokens * -(-num_experts // group)))
    return cast(int, (1 if weights.gate_FD is None else 2) * room * width)


@torch.library.custom_op("moeify::ffn_train_gpu_backward", mutates_args=())
def _backward_gpu(
    grad_TO: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    gate_FD: _Optional,
    up_bias_F: _Optional,
    gate_bias_F: _Optional,
    down_bias_D: _Optional,
    probs_TE: _Optional,
    mask_TE: Tensor,
    kept: Tensor,
    activation: str,
    pairs: int,
    keep: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of the inputs from x_TD to probs_TE that are wanted, in order."""
    weights = FFNWeights(up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D)
    inputs = (x_TD, up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, down_bias_D, probs_TE)
    x, up, down, gate, up_bias, gate_bias, down_bias, probs = found = empty_gradients(inputs, wanted)
    if down_bias is not None:
        torch.sum(grad_TO, 0, out=down_bias)
    num_tokens, num_experts = mask_TE.shape
    if not num_tokens or not pairs:
        for tensor in (x, up, down, gate, up_bias, gate_bias, probs):
            if tensor is not None:
                tensor.zero_()
        return [t for t in found if t is not None]
    kernels, by_expert = _kernels(), probs_TE is not None
    tiles = ragged_tiles_for(x_TD, weights, num_experts=num_experts, by_expert=by_expert)
    by_token = _by_token(tiles)
    ragged = kernels.order_pairs(mask_TE, num_neurons=weights.num_neurons, experts_per_group=tiles.experts_per_group, room=pairs)
    same = {"activation": activation, "tiles": tiles}
    if not keep:
        kept = kernels.hidden(x_TD, weights, mask_TE, ragged, by_token=False, keep=True, **same)[1]
    grad_TO = grad_TO.to(x_TD.dtype)
    h, grad_up, grad_gate, energy_C = kernels.hidden_gradients(
        grad_TO, weights, mask_TE, ragged, kept, by_token=by_token, wants_energy=probs is not None, **same
    )
    for rows, source, grad_FD, grad_bias in ((grad_up, x_TD, up, up_bias), (grad_gate, x_TD, gate, gate_bias), (h, grad_TO, down, None)):
        if grad_FD is not None or grad_bias is not None:
            where = {"grad_FD": grad_FD, "grad_bias_F": grad_bias}
            kernels.weight_gradients(rows, source, ragged, num_experts=num_experts, tiles=tiles, by_token=by_token, **where)
    if x is not None:
        products = [(grad_up, up_FD)] if gate_FD is None else [(grad_up, up_FD), (grad_gate, gate_FD)]
        if by_token:
            torch.mm(*products[0], out=x)
            if gate_FD is not None:
                x.addmm_(*products[1])
        else:
            sums_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
            kernels.add_up(sums_TD, ragged, products, num_tokens=num_tokens, num_experts=num_experts, tiles=tiles)
            x.copy_(sums_TD)
    if probs is not None:
        probs.copy_(torch.where(mask_TE, energy_C[ragged.pair_TG.clamp(min=0).long()], 0))
    return [t for t in found if t is not None]


@_backward_gpu.register_fake
def _(_grad_TO: Tensor, *rest: Any) -> list[Tensor]:
    return [t for t in empty_gradients(rest[:8], rest[-1]) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.pairs, ctx.keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_TO: _Optional, _: _Optional) -> tuple[_Optional, ...]:
    if grad_TO is None:
        return (None,) * 12
    *inputs, mask_TE, kept = ctx.saved_tensors
    wanted = [want and t is not None for want, t in zip(ctx.needs_input_grad, inputs, strict=False)]
    found = _backward_gpu(grad_TO, *inputs, mask_TE, kept, ctx.activation, ctx.pairs, ctx.keep, wanted)
    return (*in_place_of(inputs, wanted, found), None, None, None, None)


_ffn_train_gpu.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_ffn

    return triton_ffn
