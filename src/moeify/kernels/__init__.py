"""One FFN of experts, computed for a dispatch plan; every implementation has the same signature and the same result up to rounding.

Letters: T tokens, D model width, F FFN width, E experts, G expert size, N routed (token, expert) pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._config import lookup
from ..errors import KernelError
from ..sites.formula import ACTIVATIONS
from ..sites.site import FFNWeights
from . import cpu, cpu_op, cpu_train, gather, gpu_ffn, grouped, masked, reference
from .plan import DispatchPlan as DispatchPlan
from .plan import build_plan as build_plan
from .tiles import UNION_TOKENS

IMPLS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.moe_ffn,
    "cpu": cpu_op.moe_ffn,
    "cpu_train": cpu_train.moe_ffn,
    "triton": gpu_ffn.moe_ffn,
    "triton_recompute": gpu_ffn.moe_ffn_recomputing,
    "gather": gather.moe_ffn,
    "masked": masked.moe_ffn,
    "grouped": grouped.moe_ffn,
}
"""Implementations by name; all have the signature ``(x_TD, weights, plan, *, activation) -> y_TD``."""

AUTO_ORDER = ("cpu", "cpu_train", "triton", "gather", "masked", "grouped")
"""What ``impl="auto"`` asks, in order; the first without an objection runs. The last one never objects."""

TEACHING = ("reference", "cpu_train", "triton", "triton_recompute", "masked", "grouped")
"""Implementations whose backward pass gives `DispatchPlan.probs_TE` its gradient."""


@dataclass(frozen=True)
class Candidate:
    """One implementation as `explain` reports it."""

    name: str
    """Key of `IMPLS`."""
    chosen: bool
    """Whether this one runs."""
    reason: str
    """Why it runs, or why not."""


def moe_ffn(
    x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str = "auto", training: bool = False
) -> Tensor:
    """Sum of the selected experts' outputs for each token, plus the output bias once.

    y[t] = down_bias + sum over selected neurons j of act(x[t] . up[j] + b[j]) * down[j]        (gated: act(gate) * up)

    Args:
        x_TD: floating, exactly 2-D, any strides. Under autocast, input and weights are cast to its dtype, as `F.linear` does.
        weights: canonical weights of x's dtype, or int8 ones with scales, on x's device; expert e owns neurons
            ``expert_bounds(F, E)[e : e + 2]``.
        plan: from `build_plan`; E is the plan's.
        activation: key of `moeify.sites.formula.ACTIVATIONS`.
        impl: key of `IMPLS`, or "auto": the first of `AUTO_ORDER` without an objection. A named one never falls back to another.
        training: whether the module trains: "auto" then leaves the compiled kernels out, so that a forward without gradients (reentrant
            checkpointing) gives the bits of its recomputation.

    Returns:
        y_TD, x's dtype (autocast's under autocast). A token without experts gets the output bias alone.

    Raises:
        ConfigError: unknown ``impl`` or ``activation``; names the nearest.
        KernelError: shapes, dtypes or devices do not fit together; names them.

    Cost: `explain` tells which one runs; see its module for FLOPs, memory and host syncs.
    """
    lookup(ACTIVATIONS, activation, where="activation")
    if not (training or torch.is_grad_enabled()) and (ffn := _settled(x_TD, weights, plan, activation=activation, impl=impl)) is not None:
        return cpu.call(ffn, x_TD, plan.mask_TE)
    x_TD, weights = _autocast(x_TD, weights)
    _check(x_TD, weights, plan)
    name = _auto(x_TD, weights, plan, activation=activation, training=training) if impl == "auto" else impl
    if plan.probs_TE is not None and name in IMPLS and name not in TEACHING:
        raise KernelError(f"impl {name!r} has no gradient for the router's probabilities; use one of {', '.join(TEACHING)}, or 'auto'.")
    return lookup(IMPLS, name, where="impl")(x_TD, weights, plan, activation=activation)


def _settled(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str) -> Any:
    """What `cpu.call` needs where nothing is left to check or to decide: the compiled kernels run whatever is selected, and have run with
    these weights before. Else None. One token of a small model takes 20 us; to ask everything again takes as long.
    """
    mask_TE = plan.mask_TE
    num_tokens, num_experts = mask_TE.shape
    if impl not in ("auto", "cpu") or not (x_TD.is_cpu and mask_TE.is_cpu):
        return None
    if cpu.is_recorded(x_TD) or cpu.wants_tangents() or torch.is_autocast_enabled("cpu"):
        return None
    ffn = cpu.described(weights, num_experts=num_experts, activation=activation, dtype=x_TD.dtype)
    if ffn is None or x_TD.shape != (num_tokens, ffn.d_in):
        return None
    always = impl == "cpu" or num_tokens <= cpu_always(x_TD.dtype, is_int8=weights.up_scale_F is not None)
    return ffn if always else None


def explain(
    x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str = "auto", training: bool = False
) -> list[Candidate]:
    """What `moe_ffn` would run for these tensors, and why not the others; runs nothing.

    Returns:
        One candidate per implementation, in the order in which "auto" asks; exactly one is chosen.

    Raises:
        As `moe_ffn`.
    """
    x_TD, weights = _autocast(x_TD, weights)
    _check(x_TD, weights, plan)
    objections = {name: _objection(name, x_TD, weights, plan, activation=activation, training=training) for name in AUTO_ORDER}
    if impl == "auto":
        chosen = _auto(x_TD, weights, plan, activation=activation, training=training)
        why = "first without an objection"
    else:
        lookup(IMPLS, impl, where="impl")
        chosen, why = impl, "asked for by name"
    rest = [name for name in IMPLS if name not in AUTO_ORDER]
    lookup(ACTIVATIONS, activation, where="activation")
    if chosen not in ("cpu", "triton") and weights.up_scale_F is not None:
        why += "; it dequantises the int8 weights at every call"
    return [
        Candidate(name, name == chosen, why if name == chosen else objections.get(name) or _unasked(name, impl))
        for name in (*AUTO_ORDER, *rest)
    ]


def impls_for(device: torch.device | str) -> tuple[str, ...]:
    """Names of those of `IMPLS` that can run on this device here, whatever the tensors' type; runs nothing."""
    kind = torch.device(device).type
    missing = {"cpu": "it runs on the CPU" if kind != "cpu" else cpu.unavailable(), "triton": gpu_ffn.unavailable(kind)}
    return tuple(name for name in IMPLS if missing.get(name.partition("_")[0]) is None)


def reads_rows(weight: Tensor) -> bool:
    """Whether kernels of this machine read each neuron's row of such a weight in one piece: then that is how it should lie in memory."""
    return weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and cpu.unavailable() is None


def _unasked(name: str, impl: str) -> str:
    if impl != "auto":
        return f"{impl!r} was asked for by name"
    if name == "triton_recompute":
        return "never chosen by 'auto': 'triton' that keeps less for backward, and computes more"
    return "a later candidate" if name in AUTO_ORDER else "never chosen by 'auto': the oracle, slow"


def _auto(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, training: bool) -> str:
    objections = ((name, _objection(name, x_TD, weights, plan, activation=activation, training=training)) for name in AUTO_ORDER)
    return next(name for name, why_not in objections if why_not is None)


# Measured crossovers (decision D5): `python -m bench.run grouped` on two cores, fp32, AVX-512, torch 2.13, uniform masks; shapes gpt2
# (768, 3072) and smollm2 (576, 1536, gated), of which each pair of numbers is.
#   time(masked) / time(gather), by active fraction, T=1:   E=128: 0.1: 3.0, 3.2   0.25: 1.2, 1.9   0.5: 0.7, 1.0   0.75: 0.65, 0.6
#                                                    T=4:   E=128: 0.1: 1.1, 1.6   0.25: 1.0, 0.8   0.5: 0.7, 0.6
#   so the union of the tokens' experts, 1 - (1 - f)^T for independent tokens, may be about a third. Several tokens of experts of 128
#   neurons and more are faster by `grouped` (0.7, 0.9 of gather at T=4, f=0.1, E=8).
GATHER_UNION_FRAC = 0.35
#   time(masked) / time(grouped):
#   thin (E=128):  T=16: 0.1: 0.8, 0.7    T=64: 0.1: 1.3, 0.9  0.25: 0.9, 0.6    T=256: 0.1: 2.5, 1.7  0.25: 1.6, 1.3  0.5: 1.0, 1.0
#                  T=1024: 0.1: 4.2, 2.8  0.25: 2.3, 1.4  0.5: 1.05, 1.0
#   middle (E=32, gpt2):  T=16: 0.1: 1.1  0.25: 0.9    T=64: 0.25: 1.2  0.5: 1.0  0.75: 0.85    T=256: 0.5: 1.3  0.75: 1.0
#                  T=1024: 0.5: 1.9  0.75: 1.15  1: 0.95
#   wide (E=8):    T=4, T=16: 0.25: 1.5, 1.0  0.5: 1.2, 0.7    T=64: 0.5: 1.4, 1.2  0.75: 1.1, 0.9    T=256: 0.5: 1.7, 1.4  0.75: 1.2, 1.0
MASKED_FROM = (
    (48, ((16, 0.0), (64, 0.1), (math.inf, 0.45))),
    (127, ((16, 0.2), (64, 0.5), (256, 0.75), (math.inf, 0.85))),
    (math.inf, ((16, 0.4), (64, 0.7), (math.inf, 0.85))),
)
"""(neurons of an expert at most, ((tokens at most, active fraction from which dense GEMMs win), ...))."""


# When the compiled kernels run: any number of tokens has an active fraction up to which they do, 1.0 where they do whatever the fraction.
# What would run instead is `masked`: dense GEMMs on weights kept by neuron, which take 1.02-1.15 times as long as F.linear on weights as
# Linear keeps them, and 1.2-1.4 times with the mask. time(masked) / time(cpu), AVX-512-BF16, two cores, experts of 8, random masks, gpt2
# and smollm2 (time(F.linear) / time(cpu) in brackets):
#   bf16  T=8:   0.9: 2.0, 2.0  1: 2.7, 1.9 (1.8, 1.6)   T=64:   0.9: 1.4, 1.6  1: 1.35, 1.4 (1.2, 1.2)
#         T=256: 0.9: 1.3, 1.2  1: 1.05, 1.07 (1.0, 1.0)   T=1024: 0.9: 1.8, 1.05  1: 1.1, 1.0 (1.06, 0.96)
#   fp32  1.9-3.3 at 0.9 and 1, from 8 to 1024 tokens. torch's fp32 GEMMs are AVX2 on this processor, so that need not hold on one where
#         they are not: of many tokens, above 0.9 dense is left to torch.
CPU_UNTIL: dict[torch.dtype, tuple[tuple[float, float], ...]] = {
    torch.float32: ((64, 1.0), (math.inf, 0.9)),
    torch.bfloat16: ((math.inf, 1.0),),
}
"""By dtype: (tokens at most, active fraction up to which the compiled kernels run), by rising number of tokens."""

# fp32 by vectors of 4 without fused multiply-add (an old x86; aarch64 has that, and was not measured), against torch held to AVX2, gpt2,
# one thread; time(F.linear) / time(cpu):   T=8: 0.5: 1.4  0.9: 0.9     T=64: 0.5: 0.93  0.9: 0.5     T=1024: 0.5: 0.66
CPU_UNTIL_PORTABLE = ((4, 1.0), (8, 0.8), (64, 0.4), (math.inf, 0.3))


# The same with int8 weights, where `masked` dequantises them at every call; time(masked) / time(cpu):
#   fp32  1.3 and more with every expert on, at any number of tokens.
#   bf16  T=8:   1: 7.7, 5.4                  T=64:   0.75: 2.4, 1.9   1: 2.7, 1.8
#         T=256: 0.75: 1.3, 1.3   1: 1.3, 1.1   T=1024: 0.5: 1.6, 1.7   0.75: 0.93, 1.05   1: 1.1, 0.86
CPU_UNTIL_INT8: dict[torch.dtype, tuple[tuple[float, float], ...]] = {
    torch.float32: ((math.inf, 1.0),),
    torch.bfloat16: ((256, 1.0), (math.inf, 0.7)),
}
"""`CPU_UNTIL` for int8 weights; the dtype is x's."""


# bf16 where there is AMX, which torch's dense GEMMs then use: estimates from instruction counts (csrc/amx.h), on the careful side; none was
# measured. Up to 64 tokens the compiled kernels are those of AVX-512-BF16, with a sixteenth of the tiles' arithmetic: they keep up while
# both sides wait for the weights, some 8 tokens. Above, every thread packs all weights for its share of the tokens: by token and expert of
# 8 gated neurons of width 1024 that is 1280 / (tokens a thread) cycles, where dense takes 80 (2/3 of both without a gate).
# time(dense) / time(cpu) at 512 tokens a thread, gated and plain:  0.5: 1.45, 1.05   0.25: 2.1, 1.5   0.1: 3, 2.
# int8 weights have no tiles: what `masked` then loses is the dequantising alone.
CPU_UNTIL_AMX = ((8, 1.0), (16, 0.6), (64, 0.15))
CPU_UNTIL_AMX_A_THREAD = ((63, 0.0), (255, 0.2), (math.inf, 0.4))
"""More than 64 tokens; (tokens a thread at most, active fraction)."""
CPU_UNTIL_AMX_INT8 = ((64, 1.0), (256, 0.3), (math.inf, 0.15))


# The same of a training step, forward and backward, by the kernels of training; time(masked) / time(cpu_train), AVX-512-BF16, one thread,
# experts of 64 and of 16 neurons, random masks, D = 512, F = 2048:
#   fp32  T=4: 0.7-0.9 at any fraction            T=32:  0.1: 1.5, 1.6  0.5: 1.1, 1.0  0.75: 1.07, 0.97  0.9: 0.95, 0.85
#         T=256: 0.5: 1.9, 1.7  0.9: 1.26, 1.1  1: 1.07, 0.93    T=2048: 0.1: 9.4, 7.4  0.5: 2.2, 1.9  0.9: 1.4, 1.1  1: 1.1, 1.0
#   bf16  T=4: 0.5-1.1 at any fraction            T=32:  0.1: 1.25, 1.3  0.5: 1.0, 0.97  0.75: 0.94, 0.77
#         T=256: 0.5: 1.6, 1.45  0.9: 1.1, 0.98  1: 1.03, 0.85   T=2048: 0.1: 6.1, 5.3  0.5: 2.0, 1.7  0.9: 1.3, 1.03  1: 1.0, 0.88
#   time(grouped) / time(cpu_train): 1.1 to 6.7, nowhere below 1.
TRAIN_UNTIL = ((8, 0.0), (64, 0.5), (math.inf, 0.9))
"""(tokens at most, active fraction up to which the kernels of training run)."""


def cpu_always(dtype: torch.dtype, *, is_int8: bool) -> float:
    """Number of tokens up to which "auto" runs the compiled kernels whatever the active fraction, which then need not be known; may be inf.

    Args:
        dtype: of x, one of `cpu.DTYPES`.
        is_int8: whether the weights are int8.
    """
    always = 0.0
    for tokens, fraction in _cpu_until(dtype, is_int8=is_int8):
        if fraction < 1:
            break
        always = tokens
    return always


def _cpu_until(dtype: torch.dtype, *, is_int8: bool) -> tuple[tuple[float, float], ...]:
    """The rows that hold here: (tokens at most, active fraction)."""
    if dtype is torch.float32 and not is_int8 and cpu.isa() == "portable":
        return CPU_UNTIL_PORTABLE
    if dtype is not torch.bfloat16 or "amx_bf16" not in cpu.isas():  # torch uses what the processor has, whatever we are told to use
        return (CPU_UNTIL_INT8 if is_int8 else CPU_UNTIL)[dtype]
    if is_int8:
        return CPU_UNTIL_AMX_INT8
    threads = torch.get_num_threads()
    return (*CPU_UNTIL_AMX, *((tokens * threads, fraction) for tokens, fraction in CPU_UNTIL_AMX_A_THREAD))


def _objection(name: str, x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, training: bool) -> str | None:
    """Why "auto" should not run this implementation here; None if it should. No host sync."""
    if plan.probs_TE is not None and name not in TEACHING:
        return "it has no gradient for the router's probabilities"
    if cpu.is_transformed():
        return None if name == "masked" else "torch.func does not look into operators with a backward of their own, nor into a plan's index"
    if name == "cpu_train":
        return _training_objection(x_TD, weights, plan, activation=activation, training=training)
    if name == "triton":
        return _triton_objection(x_TD, plan, activation=activation)
    if name == "cpu":
        if (why_not := cpu.refusal(x_TD, activation=activation)) is not None:
            return why_not
        if not cpu.has_rows(weights):
            return "the weights' rows are not contiguous, and would be copied at every call (moeify.sites.store_by_neuron)"
        if training:
            return (
                "while training, a forward without gradients (reentrant checkpointing) must give the bits of its recomputation by another"
            )
        if torch.is_grad_enabled() and x_TD.requires_grad:
            return "the backward pass is that of 'grouped'"
        if not plan.is_countable:
            return None
        rows = _cpu_until(x_TD.dtype, is_int8=weights.up_scale_F is not None)
        until = next(fraction for tokens, fraction in rows if plan.num_tokens <= tokens)
        if until < 1 and plan.active_fraction > until:  # counting the pairs of one token costs a tenth of its FFN
            return f"active fraction {plan.active_fraction:.2f} is above the crossover {until} for {plan.num_tokens} tokens in {x_TD.dtype}"
        return None
    if not plan.is_countable:
        return None if name == "masked" else "the host reads the plan, which has no values while a graph is traced"
    num_tokens, active = plan.num_tokens, plan.active_fraction
    expert_size = weights.num_neurons // plan.num_experts
    if name == "gather":
        if x_TD.is_cuda:
            return "copying weights does not pay on a GPU, and the host would wait for their number"
        if (union := 1 - (1 - active) ** num_tokens) > GATHER_UNION_FRAC:
            return f"the tokens need about {union:.0%} of the experts; copying over {GATHER_UNION_FRAC:.0%} costs more than it saves"
        if num_tokens > 1 and expert_size > MASKED_FROM[1][0]:
            return f"experts of {expert_size} neurons run faster one by one for several tokens"
    if name == "masked":
        by_tokens = next(rows for size, rows in MASKED_FROM if expert_size <= size)
        crossover = next(fraction for tokens, fraction in by_tokens if num_tokens <= tokens)
        if active < crossover:
            return f"active fraction {active:.2f} is below the crossover {crossover}: {num_tokens} tokens, experts of {expert_size} neurons"
    return None


def _training_objection(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, training: bool) -> str | None:
    if (why_not := cpu.refusal(x_TD, activation=activation)) is not None:
        return why_not
    inputs = (x_TD, plan.probs_TE, *vars(weights).values())
    if not training and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return "no gradient is wanted"
    if x_TD.dtype is torch.bfloat16 and cpu.has_amx():
        return "it does not use AMX, as torch's products of bfloat16 do on this processor"
    if not plan.is_countable:
        return None
    rows = CPU_UNTIL_PORTABLE if cpu.isa() == "portable" else TRAIN_UNTIL
    until = next(fraction for tokens, fraction in rows if plan.num_tokens <= tokens)
    if plan.active_fraction > until:
        return f"active fraction {plan.active_fraction:.2f} is above the crossover {until} for {plan.num_tokens} tokens"
    return None


TRITON_UNTIL = 0.9
"""Active fraction up to which the Triton kernels take many tokens, where it is known without waiting for the device. An estimate: a dense
product reaches more of a GPU's peak than one of gathered tokens."""


def _triton_objection(x_TD: Tensor, plan: DispatchPlan, *, activation: str) -> str | None:
    if not x_TD.is_cuda:
        return f"it runs on a GPU, x_TD is on {x_TD.device}"
    if (why_not := gpu_ffn.refusal(x_TD, num_experts=plan.num_experts, activation=activation)) is not None:
        return why_not
    if plan.is_full:
        return "every expert runs: dense products are faster"
    is_known = plan.is_countable and not {"num_pairs", "token_N"}.isdisjoint(vars(plan))  # to count them would be a host sync
    if is_known and plan.num_tokens > UNION_TOKENS and plan.active_fraction > TRITON_UNTIL:
        return f"active fraction {plan.active_fraction:.2f} is above the crossover {TRITON_UNTIL} for {plan.num_tokens} tokens"
    return None


def _autocast(x_TD: Tensor, weights: FFNWeights) -> tuple[Tensor, FFNWeights]:
    # Here and not by `torch.library.register_autocast`, which casts to one dtype that is fixed when it is called; autocast's is the user's.
    device = x_TD.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x_TD.dtype is torch.float64:
        return x_TD, weights
    dtype = torch.get_autocast_dtype(device)
    fields = cpu.BIASES if weights.up_scale_F is not None else (*cpu.MATRICES, *cpu.BIASES)
    cast = {name: tensor.to(dtype) for name, tensor in vars(weights).items() if tensor is not None and name in fields}
    return x_TD.to(dtype), replace(weights, **cast)


def _check(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan) -> None:
    """Everything that must hold before any implementation runs."""
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise KernelError(f"x_TD must be a 2-D floating tensor, got {tuple(x_TD.shape)} {x_TD.dtype}; flatten batch and sequence first.")
    if x_TD.shape[0] != plan.num_tokens:
        raise KernelError(f"x_TD has {x_TD.shape[0]} tokens, the plan has {plan.num_tokens}.")
    num_neurons, d_out = weights.down_FD.shape
    if plan.num_experts > num_neurons:
        raise KernelError(f"the plan has {plan.num_experts} experts, the FFN only {num_neurons} neurons.")
    expected = (
        ("up_FD", weights.up_FD, (num_neurons, x_TD.shape[1])),
        ("down_FD", weights.down_FD, (num_neurons, d_out)),
        ("gate_FD", weights.gate_FD, (num_neurons, x_TD.shape[1])),
        ("up_bias_F", weights.up_bias_F, (num_neurons,)),
        ("gate_bias_F", weights.gate_bias_F, (num_neurons,)),
        ("down_bias_D", weights.down_bias_D, (d_out,)),
        ("up_scale_F", weights.up_scale_F, (num_neurons,)),
        ("gate_scale_F", weights.gate_scale_F, (num_neurons,)),
        ("down_scale_D", weights.down_scale_D, (d_out,)),
    )
    is_int8 = weights.up_FD.dtype is torch.int8
    for matrix, scale in zip(cpu.MATRICES, ("up_scale_F", "down_scale_D", "gate_scale_F"), strict=True):
        if (is_int8 and getattr(weights, matrix) is not None) != (getattr(weights, scale) is not None):
            raise KernelError(f"{matrix} and {scale} do not fit: int8 weights come with a scale for each matrix, others with none.")
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise KernelError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")
        dtype = torch.float32 if name in cpu.SCALES else torch.int8 if is_int8 and name in cpu.MATRICES else x_TD.dtype
        if tensor.dtype != dtype or tensor.device != x_TD.device:
            agree = "they must agree" if dtype is x_TD.dtype else f"it must be {dtype} there"
            raise KernelError(f"{name} is {tensor.dtype} on {tensor.device}, x_TD is {x_TD.dtype} on {x_TD.device}; {agree}.")
    if plan.mask_TE.device != x_TD.device:
        raise KernelError(f"the plan is on {plan.mask_TE.device}, x_TD on {x_TD.device}.")
