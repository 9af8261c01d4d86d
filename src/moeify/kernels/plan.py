"""The dispatch plan: which token goes to which expert, as one ragged CSR index.

Letters: T tokens, E experts, F neurons, N routed (token, expert) pairs.

Every kernel consumes the same plan (decision D3); dynamic k is never padded to a fixed K.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Routed pairs in expert-major order; within an expert, tokens ascend.

    Expert e runs the tokens ``token_N[offsets_E1[e] : offsets_E1[e + 1]]``. The index is made when it is first asked for: kernels that read
    the mask itself never pay for it.
    """

    mask_TE: Tensor
    """bool; the selection that the plan was made from."""
    probs_TE: Tensor | None = None
    """In training, how a gradient reaches whoever selected: each selected expert's output is multiplied by 1 + p - stopgrad(p), which is 1
    and has the gradient <d loss / d y, y_e> for p. At unselected pairs any finite number, whose gradient is 0."""
    is_full: bool = False
    """Whether the host knows that every pair runs, without looking at the mask."""
    most_pairs: int | None = None
    """Pairs that there are at most, as far as the host knows without looking at the mask: so much room they get without being counted."""

    @cached_property
    def token_N(self) -> Tensor:
        """int64, in [0, T): token of each routed pair. The host waits for their number."""
        return self.mask_TE.t().nonzero()[:, 1].contiguous()

    @cached_property
    def offsets_E1(self) -> Tensor:
        """int32, non-decreasing from 0 to N; stays on the device."""
        counts_E = self.mask_TE.sum(0, dtype=torch.int32)
        return torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0, dtype=torch.int32)])

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.mask_TE.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.mask_TE.shape[1]

    @property
    def is_countable(self) -> bool:
        """Whether the number of pairs can be known: the mask is no stand-in (a graph being traced, FakeTensor, the meta device)."""
        return not torch.compiler.is_compiling() and type(self.mask_TE) is Tensor and not self.mask_TE.is_meta

    @cached_property
    def num_pairs(self) -> int:
        """N; known on the host."""
        if self.is_full:
            return self.num_tokens * self.num_experts
        if self.mask_TE.device.type == "cpu" and "token_N" not in self.__dict__:
            return int(self.mask_TE.sum())
        return self.token_N.shape[0]

    @property
    def active_fraction(self) -> float:
        """N / (T E), in [0, 1]; 0 without tokens. Every expert counts the same, whatever its size."""
        return self.num_pairs / max(self.num_tokens * self.num_experts, 1)

    def expert_N(self) -> Tensor:
        """int64, non-decreasing, in [0, E): expert of each routed pair. No host sync."""
        experts_E = torch.arange(self.num_experts, device=self.token_N.device)
        return experts_E.repeat_interleave(self.offsets_E1.diff(), output_size=self.num_pairs)


def build_plan(mask_TE: Tensor, probs_TE: Tensor | None = None, *, is_full: bool = False, most_pairs: int | None = None) -> DispatchPlan:
    """CSR plan of a selection mask.

    Args:
        mask_TE: bool; any number of True per row and column, T may be 0.
        probs_TE: floating, see `DispatchPlan`; None where nothing is to learn from the selection.
        is_full: whether the mask is known to be all True (not checked: a check would synchronise the device).
        most_pairs: how many are True at most, where a rule says so (not checked either).

    Returns:
        The plan, on the mask's device.

    Raises:
        ValueError: not a 2-D bool tensor, no expert, or ``probs_TE`` of another shape; names the shape and dtype it got.

    Cost: none before its index is read; then two passes over the T*E mask, 30 us for 256 x 128 on two cores.
    """
    if mask_TE.dim() != 2 or mask_TE.dtype is not torch.bool:
        raise ValueError(f"mask_TE must be a 2-D bool tensor, got {tuple(mask_TE.shape)} {mask_TE.dtype}.")
    if mask_TE.shape[1] == 0:
        raise ValueError(f"mask_TE must have at least one expert, got shape {tuple(mask_TE.shape)}.")
    if probs_TE is not None and (probs_TE.shape != mask_TE.shape or not probs_TE.is_floating_point()):
        raise ValueError(f"probs_TE must be floating, {tuple(mask_TE.shape)}, got {tuple(probs_TE.shape)} {probs_TE.dtype}.")
    return DispatchPlan(mask_TE, probs_TE, is_full, most_pairs)


def straight_through(probs: Tensor) -> Tensor:
    """1 + p - stopgrad(p): ones, with the gradient of p."""
    return (probs - probs.detach()) + 1  # in this order: the difference is exactly 0


def neuron_mask(mask_TE: Tensor, num_neurons: int) -> Tensor:
    """mask_TF: each expert's column repeated for its neurons; the first ``F % E`` experts have one neuron more. No host sync."""
    num_tokens, num_experts = mask_TE.shape
    size, larger = num_neurons // num_experts, num_neurons % num_experts  # divmod knows no symbolic sizes
    if not larger:
        return mask_TE.unsqueeze(2).expand(num_tokens, num_experts, size).reshape(num_tokens, num_neurons)
    sizes_E = torch.full((num_experts,), size, device=mask_TE.device)
    sizes_E[:larger] += 1
    return mask_TE.repeat_interleave(sizes_E, dim=1, output_size=num_neurons)
