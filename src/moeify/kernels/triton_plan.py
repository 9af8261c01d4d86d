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
    t_tile, g_tile = min(128, triton.next_power_of_2(num_tokens)), min(32, triton.next_power_of_2(num_groups))
    chunks = triton.cdiv(num_tokens, t_tile)
    count_P1 = torch.empty(num_groups * chunks + 1, dtype=torch.int32, device=mask_TE.device)
    offset_G1 = torch.empty(num_groups + 1, dtype=torch.int32, device=mask_TE.device)
    token_C = torch.empty(room, dtype=torch.int32, device=mask_TE.device)
    pair_TG = torch.empty((num_tokens, num_groups), dtype=torch.int32, device=mask_TE.device)
    with torch.cuda.device_of(mask_TE):
        grid = (chunks * triton.cdiv(num_groups, g_tile),)
        sizes = (num_tokens, num_experts, num_groups, experts_per_group, chunks, *selected_TE.stride())
        count_pairs[grid](selected_TE, count_P1, *sizes, T_TILE=t_tile, G_TILE=g_tile)
        start_P1 = count_P1.cumsum(0, dtype=torch.int32)
        place_pairs[grid](selected_TE, start_P1, offset_G1, token_C, pair_TG, room, *sizes, T_TILE=t_tile, G_TILE=g_tile)
    width = min(num_neurons, experts_per_group * size + min(experts_per_group, larger))
    return Ragged(offset_G1, token_C, pair_TG, experts_per_group, width, size, larger)


@triton.jit
def count_pairs(
    mask_ptr,
    count_ptr,
    num_tokens,
    num_experts,
    num_groups,
    experts_per_group,
    chunks,
    mask_stride_t,
    mask_stride_e,
    T_TILE: tl.constexpr,
    G_TILE: tl.constexpr,
):
    """Tokens of one chunk for each of some groups, into the place after their own; a group's chunks are neighbours."""
    chunk = tl.program_id(0) % chunks
    g_G = (tl.program_id(0) // chunks) * G_TILE + tl.arange(0, G_TILE)
    t_T = chunk * T_TILE + tl.arange(0, T_TILE)
    selects_TG = _selects(
        mask_ptr, t_T, g_G, num_tokens, num_experts, num_groups, experts_per_group, mask_stride_t, mask_stride_e, T_TILE, G_TILE
    )
    tl.store(count_ptr + 1 + g_G * chunks + chunk, tl.sum(selects_TG, axis=0), mask=g_G < num_groups)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, 0)


@triton.jit
def place_pairs(
    mask_ptr,
    start_ptr,
    offset_ptr,
    token_ptr,
    pair_ptr,
    room,
    num_tokens,
    num_experts,
    num_groups,
    experts_per_group,
    chunks,
    mask_stride_t,
    mask_stride_e,
    T_TILE: tl.constexpr,
    G_TILE: tl.constexpr,
):
    """Tokens of some groups' pairs in one chunk, ascending, the pair of each token, and where the groups begin."""
    chunk = tl.program_id(0) % chunks
    g_G = (tl.program_id(0) // chunks) * G_TILE + tl.arange(0, G_TILE)
    t_T = chunk * T_TILE + tl.arange(0, T_TILE)
    there_G = g_G < num_groups
    selects_TG = _selects(
        mask_ptr, t_T, g_G, num_tokens, num_experts, num_groups, experts_per_group, mask_stride_t, mask_stride_e, T_TILE, G_TILE
    )
    first_G = tl.load(start_ptr + g_G * chunks + chunk, mask=there_G, other=0)
    pair_TG = first_G[None, :] + tl.cumsum(selects_TG, axis=0) - 1
    token_TG = t_T[:, None] + tl.zeros((T_TILE, G_TILE), tl.int32)
    tl.store(token_ptr + pair_TG, token_TG, mask=(selects_TG > 0) & (pair_TG < room))
    pair_TG_ptr = pair_ptr + (t_T.to(tl.int64) * num_groups)[:, None] + g_G[None, :]
    tl.store(pair_TG_ptr, tl.where(selects_TG > 0, pair_TG, -1), mask=(t_T < num_tokens)[:, None] & there_G[None, :])
    if chunk == 0:
        tl.store(offset_ptr + g_G, tl.minimum(first_G, room), mask=there_G)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr + num_groups, tl.minimum(tl.load(start_ptr + num_groups * chunks), room))


@triton.jit
def _selects(
    mask_ptr,
    t_T,
    g_G,
    num_tokens,
    num_experts,
    num_groups,
    experts_per_group,
    mask_stride_t,
    mask_stride_e,
    T_TILE: tl.constexpr,
    G_TILE: tl.constexpr,
):
    """1 where a token selects any expert of a group: rows of the mask are read in one piece."""
    found_TG = tl.zeros((T_TILE, G_TILE), tl.int32)
    there_TG = (t_T < num_tokens)[:, None] & (g_G < num_groups)[None, :]
    t_T_ptr = mask_ptr + t_T.to(tl.int64) * mask_stride_t
    for i in range(experts_per_group):
        e_G = g_G * experts_per_group + i
        e_TG_ptr = t_T_ptr[:, None] + (e_G.to(tl.int64) * mask_stride_e)[None, :]
        found_TG = tl.where(tl.load(e_TG_ptr, mask=there_TG & (e_G < num_experts)[None, :], other=0) != 0, 1, found_TG)
    return found_TG
