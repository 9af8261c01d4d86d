"""The plan of many tokens, made on the device: (token, group) pairs in the order of the groups, for as many pairs as there may be.

Letters: T tokens, F FFN width, E experts, G groups of neighbouring experts, W neurons of a group, C room for pairs. A group is one expert,
or several thin ones that are computed together.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Ragged(NamedTuple):
    """Pairs of tokens and groups, by group; within a group tokens ascend. On the device, but for the sizes."""

    offset_G1: Tensor
    """int32, from 0 to the number of pairs, at most C."""
    token_C: Tensor
    """int32; token of each pair, of what is no pair anything."""
    pair_TG: Tensor
    """int32; pair of each token and group, or -1."""
    experts_per_group: int
    width: int
    """W: neurons of the largest group."""
    size: int
    larger: int
    """F = E size + larger; the first ``larger`` experts have one neuron more."""

    @property
    def experts(self) -> dict[str, int]:
        """Their sizes, as kernels take them."""
        return {"SIZE": self.size, "LARGER": self.larger}

    @property
    def num_groups(self) -> int:
        """G."""
        return self.pair_TG.shape[1]

    @property
    def room(self) -> int:
        """C."""
        return self.token_C.shape[0]


def order_pairs(mask_TE: Tensor, *, num_neurons: int, experts_per_group: int, room: int) -> Ragged:
    """The pairs of a mask in two kernels and one sum.

    Args:
        mask_TE: at least one token.
        experts_per_group: neighbours that are computed together, for a token that selects any of them.
        room: C, at least the number of selected pairs; T E always is.

    Memory: 4 bytes for each of T G and of C.
    """
    num_tokens, num_experts = mask_TE.shape
    num_groups = triton.cdiv(num_experts, experts_per_group)
    size, larger = divmod(num_neurons, num_experts)
    room = max(1, min(room, num_tokens * num_groups))
    selected_TE = mask_TE.view(torch.uint8)
    count_G1 = torch.zeros(num_groups + 1, dtype=torch.int32, device=mask_TE.device)
    token_C = torch.empty(room, dtype=torch.int32, device=mask_TE.device)
    pair_TG = torch.empty((num_tokens, num_groups), dtype=torch.int32, device=mask_TE.device)
    tile = min(1024, triton.next_power_of_2(num_tokens))
    with torch.cuda.device_of(mask_TE):
        sizes = (num_tokens, num_experts, num_groups, experts_per_group, room, *selected_TE.stride())
        count_pairs[(num_groups,)](selected_TE, count_G1, *sizes, T_TILE=tile)
        offset_G1 = count_G1.cumsum(0, dtype=torch.int32).clamp_(max=room)
        place_pairs[(num_groups,)](selected_TE, offset_G1, token_C, pair_TG, *sizes, T_TILE=tile)
    width = min(num_neurons, experts_per_group * size + min(experts_per_group, larger))
    return Ragged(offset_G1, token_C, pair_TG, experts_per_group, width, size, larger)


@triton.jit
def count_pairs(
    mask_ptr, count_ptr, num_tokens, num_experts, num_groups, experts_per_group, room, mask_stride_t, mask_stride_e, T_TILE: tl.constexpr
):
    """Tokens of one group, into the place after its own."""
    group = tl.program_id(0)
    count = tl.zeros((T_TILE,), tl.int32)
    for start in range(0, num_tokens, T_TILE):
        t_T = start + tl.arange(0, T_TILE)
        count += _selects(mask_ptr, t_T, t_T < num_tokens, group, num_experts, experts_per_group, mask_stride_t, mask_stride_e, T_TILE)
    tl.store(count_ptr + group + 1, tl.sum(count, axis=0))


@triton.jit
def place_pairs(
    mask_ptr,
    offset_ptr,
    token_ptr,
    pair_ptr,
    num_tokens,
    num_experts,
    num_groups,
    experts_per_group,
    room,
    mask_stride_t,
    mask_stride_e,
    T_TILE: tl.constexpr,
):
    """Tokens of one group's pairs, ascending, and the pair of each token."""
    group = tl.program_id(0)
    first = tl.load(offset_ptr + group)
    for start in range(0, num_tokens, T_TILE):
        t_T = start + tl.arange(0, T_TILE)
        there_T = t_T < num_tokens
        selects_T = _selects(mask_ptr, t_T, there_T, group, num_experts, experts_per_group, mask_stride_t, mask_stride_e, T_TILE)
        pair_T = first + tl.cumsum(selects_T, axis=0) - 1
        tl.store(token_ptr + pair_T, t_T, mask=(selects_T > 0) & (pair_T < room))
        tl.store(pair_ptr + t_T.to(tl.int64) * num_groups + group, tl.where(selects_T > 0, pair_T, -1), mask=there_T)
        first += tl.sum(selects_T, axis=0)


@triton.jit
def _selects(mask_ptr, t_T, there_T, group, num_experts, experts_per_group, mask_stride_t, mask_stride_e, T_TILE: tl.constexpr):
    """1 where a token selects any expert of the group."""
    found_T = tl.zeros((T_TILE,), tl.int32)
    last = tl.minimum((group + 1) * experts_per_group, num_experts)
    for expert in range(group * experts_per_group, last):
        at_T_ptr = mask_ptr + t_T.to(tl.int64) * mask_stride_t + expert * mask_stride_e
        found_T = tl.where(tl.load(at_T_ptr, mask=there_T, other=0) != 0, 1, found_T)
    return found_T
