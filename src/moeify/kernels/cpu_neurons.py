"""The compiled kernels of FFNs that skip single neurons, for few tokens: checks tensors, hands over pointers (see `cpu`).

Letters: T tokens, D model width, F FFN width, R rank.

What a neuron is worth is read off the FFN's own gate, or off the neuron itself, which are then not computed again, or predicted from a
low-rank image of the input; the rule decides, and of what is left (up and down; down; gate, up and down) only the kept neurons' rows are
read.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError
from ..sites.site import FFNWeights
from . import cpu

MOST_TOKENS = 16
"""Tokens up to which a layer runs the kernels. At half of the neurons, four tokens keep nearly all of them between them; what more tokens
gain is one native call in place of a router in PyTorch, a rule, a plan and the experts' kernel, neuron by neuron."""


@dataclass(frozen=True)
class LowRankWeights:
    """What `moeify.routers.LowRankRouter` predicts from; all fp32. Without a gate the last three are None."""

    project_RD: Tensor
    up_FR: Tensor
    up_bias_F: Tensor
    up_std_F: Tensor
    gate_FR: Tensor | None = None
    gate_bias_F: Tensor | None = None
    gate_std_F: Tensor | None = None


@dataclass(frozen=True)
class NeuronRouterWeights:
    """A router over experts of one neuron each, and its rule: scores = abs(act(gate)) * scale_F, or abs(h), or predicted."""

    scale_F: Tensor | None
    """fp32; None: the scores are abs(h)."""
    rule: str
    """One of `cpu.RULES`."""
    knob: float
    """Of the rule."""
    low_rank: LowRankWeights | None = None
    """None: the gate's own values are the scores, or the neurons'."""
    always_on: tuple[int, ...] = ()
    """Neurons that run for every token."""


class _Neurons(ctypes.Structure):
    """``moeify_neurons`` of csrc/moeify.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("scale", "project", "up", "up_bias", "up_std", "gate", "gate_bias", "gate_std", "always_on")
        ),
        ("rank", ctypes.c_int64),
        ("rule", ctypes.c_int32),
        ("knob", ctypes.c_float),
    ]


def neurons_refusal(weights: FFNWeights, router: NeuronRouterWeights, *, activation: str, dtype: torch.dtype) -> str | None:
    """Why `RoutedNeurons` cannot be made of these for x of this dtype; None if it can. Looks at no value."""
    num_neurons = weights.num_neurons
    low_rank = router.low_rank
    tensors = [t for t in (router.scale_F, *(() if low_rank is None else vars(low_rank).values())) if t is not None]
    if any(t.device.type != "cpu" for t in tensors):
        return "weights and router must all be on the CPU"
    if why_not := cpu._ffn_refusal(weights, num_experts=num_neurons, activation=activation, dtype=dtype):
        return why_not
    if any(t.dtype is not torch.float32 or not t.is_contiguous() for t in tensors):
        return "the router's tensors must be contiguous float32"
    if low_rank is None and router.scale_F is not None and weights.gate_FD is None:
        return "the FFN has no gate to read the scores off"
    rank = 0 if low_rank is None else low_rank.project_RD.shape[0]
    if _shapes(router) != _expected_shapes(router, num_neurons, weights.up_FD.shape[1], rank, is_gated=weights.gate_FD is not None):
        return f"the router's tensors do not fit {num_neurons} neurons of {weights.up_FD.shape[1]} inputs"
    if router.rule not in cpu.RULES:
        return f"it does not know the rule {router.rule!r}; known: {', '.join(cpu.RULES)}"
    if any(not 0 <= j < num_neurons for j in router.always_on):
        return f"always_on must name neurons in [0, {num_neurons}), got {router.always_on}"
    return None


def _shapes(router: NeuronRouterWeights) -> list[tuple[int, ...] | None]:
    low_rank = () if router.low_rank is None else vars(router.low_rank).values()
    return [None if t is None else tuple(t.shape) for t in (router.scale_F, *low_rank)]


def _expected_shapes(
    router: NeuronRouterWeights, num_neurons: int, d_model: int, rank: int, *, is_gated: bool
) -> list[tuple[int, ...] | None]:
    expected: list[tuple[int, ...] | None] = [None if router.scale_F is None and router.low_rank is None else (num_neurons,)]
    if router.low_rank is not None:
        first: list[tuple[int, ...] | None] = [(num_neurons, rank), (num_neurons,), (num_neurons,)]
        expected += [(max(rank, 1), d_model), *first, *(first if is_gated else [None] * 3)]
    return expected


class RoutedNeurons:
    """Router, rule and FFN of one layer whose experts are single neurons, as one native call without autograd; its pointers are taken once.

    Sums run in fp32, and so do gate and activation between them: scores differ from those of a bf16 router, which rounds both, by that
    rounding. A neuron that a token does not keep adds nothing to it, whatever its weights are.

    Holds the tensors that it was made from. Values written into them are seen; whoever puts another tensor in a parameter's place makes
    another one.

    Raises:
        KernelError: a tensor is not as the library reads it in place; names it.

    Cost: bytes of what the scores are read off (the gate; gate and up; the prediction's matrices), and of the rows of the other projections
    that some token keeps, each once for every 16 tokens.
    """

    def __init__(self, weights: FFNWeights, router: NeuronRouterWeights, *, activation: str, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or weights.up_FD.dtype
        if why_not := neurons_refusal(weights, router, activation=activation, dtype=dtype):
            raise KernelError(f"impl 'cpu': {why_not}.")
        self._num_neurons, self._d_out, self._dtype = weights.num_neurons, weights.down_FD.shape[1], dtype
        self._always_on = torch.zeros(self._num_neurons, dtype=torch.bool, device="cpu")
        self._always_on[list(router.always_on)] = True
        self._keep: object = (weights, router)
        self._ffn = cpu._describe(weights, num_experts=self._num_neurons, activation=activation, dtype=dtype)
        low_rank = (None,) * 7 if router.low_rank is None else tuple(vars(router.low_rank).values())
        self._router = _Neurons(
            *(cpu._pointer(t) for t in (router.scale_F, *low_rank)),
            self._always_on.data_ptr() if router.always_on else None,
            0 if router.low_rank is None else router.low_rank.project_RD.shape[0],
            cpu.RULES.index(router.rule),
            router.knob,
        )
        self._pointers = (ctypes.byref(self._ffn), ctypes.byref(self._router))
        self._isa, self._call = cpu._isa(), cpu._library().moeify_neurons_run

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., O), and mask_TF: which neurons ran.

        Args:
            x: (..., D), on the CPU, of the weights' dtype and width (checked: native code takes them for granted); any number of tokens,
                but made for few.
        """
        shape, d_in = x.shape, self._ffn.d_in
        if x.dtype is not self._dtype or shape[-1:] != (d_in,) or not x.is_cpu:
            raise KernelError(f"impl 'cpu': x is {tuple(shape)} {x.dtype} on {x.device}, expected (..., {d_in}) {self._dtype} on cpu.")
        x = x.contiguous()
        y = x.new_empty((*shape[:-1], self._d_out))
        num_tokens = x.numel() // d_in
        mask_TF = x.new_empty(num_tokens, self._num_neurons, dtype=torch.bool)
        status = self._call(
            *self._pointers,
            *(x.data_ptr(), d_in, num_tokens, mask_TF.data_ptr()),
            *(y.data_ptr(), self._d_out, self._isa, torch.get_num_threads()),
        )
        if status:
            cpu._check_status(status)
        return y, mask_TF
