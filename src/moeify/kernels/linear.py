"""One linear layer whose tokens skip input channels: what computes it, and why not the others.

Letters: T tokens, K input channels, N outputs.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .._config import lookup
from . import Candidate, cpu, cpu_linear, gpu_linear
from . import reads_rows as cpu_reads_rows
from .cpu_linear import LinearWeights


def masked(x: Tensor, layer: LinearWeights) -> Tensor:
    """The definition: ``y = (x * keep) W^T + b``, ``keep_tk = not |x_tk| < level_k``; dense cost, any device, differentiable.

    Set to zero by selection, not by product; int8 weights are dequantised at every call.
    """
    weight_KN, level_K, bias_N, scale_N = layer
    if level_K is not None:
        x = skip(x, level_K)
    if scale_N is not None:
        weight_KN = (weight_KN.float() * scale_N).to(x.dtype)
    return F.linear(x, weight_KN.t(), bias_N)


def keeps(x: Tensor, level_K: Tensor) -> Tensor:
    """Which channels of ``x`` (..., K) reach their level; what is no number does."""
    return ~(x.detach().abs().float() < level_K)


def skip(x: Tensor, level_K: Tensor) -> Tensor:
    """``x`` (..., K) with the channels that do not reach their level at zero; differentiable, any device."""
    if cpu_linear.can_mask(x, level_K):
        return cpu_linear.mask(x, level_K)
    return torch.where(keeps(x, level_K), x, 0)


COMPILED: dict[str, ModuleType] = {"cpu": cpu_linear, "triton": gpu_linear}
"""Implementations that read the kept channels' weights alone, each for one device: modules with ``DEVICE``, ``MOST_TOKENS``, ``refusal``,
``SparseLinear`` and ``sparse_linear``."""

IMPLS = {"cpu": cpu_linear.sparse_linear, "triton": gpu_linear.sparse_linear, "masked": masked}
"""Implementations by name, in the order in which "auto" asks; the first without an objection runs, and the last never objects."""


def compiled_for(x: Tensor, *, impl: str = "auto") -> ModuleType:
    """The one of `COMPILED` that is called ``impl``; for "auto", that of x's device."""
    return COMPILED[("triton" if x.is_cuda else "cpu") if impl == "auto" else impl]


def reads_rows(weight: Tensor) -> bool:
    """Whether kernels of this machine read an input channel's row of such a weight in one piece: then so it should lie in memory."""
    return cpu_reads_rows(weight) or gpu_linear.reads_rows(weight)


def sparse_linear(x: Tensor, layer: LinearWeights, *, impl: str = "auto", training: bool = False) -> Tensor:
    """``y = (x * keep) W^T + b``, ``keep_tk = not |x_tk| < level_k``.

    Args:
        x: (..., K), floating.
        layer: weights and levels, on x's device.
        impl: key of `IMPLS`, or "auto": the first without an objection. A named one never falls back to another.
        training: whether the module trains: "auto" then leaves the compiled kernels out, so that a forward without gradients gives the
            bits of its recomputation.

    Returns:
        y (..., N), x's dtype.

    Raises:
        ConfigError: unknown ``impl``; names the nearest.
        KernelError: a named implementation cannot compute this; says why.

    Cost: `explain_linear` tells which one runs. The compiled ones read the rows of the channels that some token keeps; "masked" is dense.
    """
    if impl == "auto":
        impl = next((name for name in COMPILED if _objection(name, x, layer, training=training) is None), "masked")
    return lookup(IMPLS, impl, where="impl")(x, layer)


def explain_linear(x: Tensor, layer: LinearWeights, *, impl: str = "auto", training: bool = False) -> list[Candidate]:
    """What `sparse_linear` would run for these tensors, and why not the others; runs nothing. Arguments and errors as there."""
    if impl != "auto":
        lookup(IMPLS, impl, where="impl")
        return [Candidate(name, name == impl, "asked for by name" if name == impl else f"{impl!r} was asked for by name") for name in IMPLS]
    objections = {name: _objection(name, x, layer, training=training) for name in COMPILED}
    chosen = next((name for name, objection in objections.items() if objection is None), "masked")
    return [
        Candidate(name, name == chosen, "first without an objection" if name == chosen else objections.get(name) or "a later candidate")
        for name in IMPLS
    ]


def _objection(name: str, x: Tensor, layer: LinearWeights, *, training: bool) -> str | None:
    kernel = COMPILED[name]
    return call_objection(x, layer, kernel, training=training) or kernel.refusal(layer, dtype=x.dtype)


def call_objection(x: Tensor, layer: tuple[Tensor | None, ...], kernel: ModuleType, *, training: bool, named: bool = False) -> str | None:
    """Why not to call compiled kernels for such an input, whatever they can read; None if nothing speaks against it. No host sync.

    Args:
        x: (..., K).
        layer: the tensors whose gradient may be wanted.
        kernel: one of `COMPILED`.
        training: whether the module trains.
        named: whether they were asked for by name: then for any number of tokens, while training, and wherever the layer is.
    """
    if not named:
        if x.device.type != kernel.DEVICE:
            return f"it runs on {'the CPU' if kernel is cpu_linear else 'a GPU'}, x is on {x.device}"
        most = kernel.MOST_TOKENS.get(x.dtype)
        if most is not None and x.numel() > most * x.shape[-1]:
            return f"it is made for decoding, up to {most} tokens of {x.dtype} at once, and these are {x.numel() // x.shape[-1]}"
        if training:
            return "while training, a forward without gradients (reentrant checkpointing) must give the bits of its recomputation"
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in layer)):
        return "it has no gradient"
    if cpu.wants_tangents() or cpu.is_transformed():
        return "it has no forward-mode gradients, and no transformations of torch.func"
    if torch.is_autocast_enabled(kernel.DEVICE):
        return "under autocast the dense layer casts"
    return None
