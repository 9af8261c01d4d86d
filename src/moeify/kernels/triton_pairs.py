"""Experts of many tokens, forward: the products of a group gather its tokens while they load.

Letters: T tokens, O output width, F FFN width, E experts, W neurons of a group, C room for pairs; as suffixes within kernels, tiles: T of
tokens, N of neurons, K of what is summed over, O of outputs, R of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sites.site import FFNWeights
from .tiles import FFNTiles
from .triton_neurons import activated, expert_of, first_neuron, named, pre_activations, run_of, strides
from .triton_plan import Ragged


def hidden(
    x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, ragged: Ragged, *, activation: str, tiles: FFNTiles, by_token: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Activations of the pairs, and what backward needs of them; weights may be int8.

    Returns:
        h: (C, W), or where ``by_token`` (T, F) with zeros for what is not selected; x's dtype.
        kept: (1 or 2, C, W), up and gate before the nonlinearity, where ``keep``.
    """
    num_tokens, F = x_TD.shape[0], weights.num_neurons
    h = x_TD.new_zeros((num_tokens, F)) if by_token else x_TD.new_empty((ragged.room, ragged.width))
    kept = x_TD.new_empty((1 if weights.gate_FD is None else 2, ragged.room, ragged.width)) if keep else None
    selected_TE = mask_TE.view(torch.uint8)
    row_tiles = triton.cdiv(num_tokens, tiles.tokens)
    n_tiles = triton.cdiv(ragged.width, tiles.neurons)
    with torch.cuda.device_of(x_TD):
        hidden_of_pairs[(ragged.num_groups * n_tiles * row_tiles,)](
            *(x_TD, weights.up_FD, weights.gate_FD, weights.up_bias_F, weights.gate_bias_F, weights.up_scale_F, weights.gate_scale_F),
            *(selected_TE, ragged.offset_G1, ragged.token_C, h, kept),
            *(x_TD.shape[1], mask_TE.shape[1], ragged.experts_per_group, row_tiles, n_tiles),
            *(h.stride(0), ragged.width, ragged.room * ragged.width),
            *(*x_TD.stride(), *weights.up_FD.stride(), *strides(weights.gate_FD), *selected_TE.stride()),
            **named(activation),
            BY_TOKEN=by_token,
            T_TILE=tiles.tokens,
            N_TILE=tiles.neurons,
            K_TILE=tiles.channels,
            **ragged.experts,
            RUN=run_of(ragged.size, ragged.larger, tiles.neurons),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return h, kept


def add_up(
    sums_TO: Tensor, ragged: Ragged, products: list[tuple[Tensor, Tensor]], *, num_tokens: int, num_experts: int, tiles: FFNTiles
) -> None:
    """Add the pairs' products to their tokens, in fp32 and in no fixed order.

    Args:
        sums_TO: float32, contiguous.
        products: one or two of (rows (C, W), weight (F, O)); the weight of a single one may be int8, and is not scaled.
    """
    (a, w), (b, v) = products[0], products[1] if len(products) > 1 else (None, None)
    O = sums_TO.shape[1]  # noqa: E741
    row_tiles, o_tiles = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(O, tiles.outputs)
    with torch.cuda.device_of(sums_TO):
        add_products[(ragged.num_groups * row_tiles * o_tiles,)](
            *(a, w, b, v, ragged.offset_G1, ragged.token_C, sums_TO),
            *(O, num_experts, ragged.experts_per_group, row_tiles, o_tiles),
            *(ragged.width, *w.stride(), *strides(v)),
            R_TILE=tiles.tokens,
            K_TILE=tiles.depth if b is None else max(16, tiles.depth // 2),  # four operands in the memory of two
            O_TILE=tiles.outputs,
            **ragged.experts,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


@triton.jit
def hidden_of_pairs(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    up_scale_ptr,
    gate_scale_ptr,
    mask_ptr,
    offset_ptr,
    token_ptr,
    h_ptr,
    kept_ptr,
    width,
    num_experts,
    experts_per_group,
    row_tiles,
    n_tiles,
    h_stride,
    kept_stride,
    kept_gate,
    x_stride_t,
    x_stride_d,
    up_stride_f,
    up_stride_d,
    gate_stride_f,
    gate_stride_d,
    mask_stride_t,
    mask_stride_e,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """Activations of a tile of one group's pairs and neurons; zeros for a group's experts that a token does not select."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    group = tile // n_tiles
    first_expert = group * experts_per_group
    group_start = first_neuron(first_expert, SIZE, LARGER)
    last_neuron = first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER)
    last_row = tl.load(offset_ptr + group + 1)
    first_row = tl.load(offset_ptr + group) + row_tile * T_TILE
    if first_row >= last_row:
        return
    row_T = first_row + tl.arange(0, T_TILE)
    there_T = row_T < last_row
    t_T = tl.load(token_ptr + row_T, mask=there_T, other=0).to(tl.int64)
    n_N = group_start + (tile % n_tiles) * N_TILE + tl.arange(0, N_TILE)
    there_N = n_N < last_neuron
    wide_N = n_N.to(tl.int64)
    there_TN = there_T[:, None] & there_N[None, :]
    mask_TN_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (expert_of(n_N, SIZE, LARGER).to(tl.int64) * mask_stride_e)[None, :]
    keep_TN = tl.load(mask_TN_ptr, mask=there_TN, other=0) != 0
    read_N = tl.max_constancy(tl.max(keep_TN.to(tl.int32), axis=0) > 0, [RUN])
    up_TN, gate_TN = pre_activations(
        *(x_ptr, up_ptr, gate_ptr, t_T, there_T, wide_N, read_N, width, x_stride_t, x_stride_d),
        *(up_stride_f, up_stride_d, gate_stride_f, gate_stride_d, T_TILE, N_TILE, K_TILE),
    )
    h_TN, up_TN, gate_TN = activated(
        up_TN, gate_TN, gate_ptr, up_bias_ptr, gate_bias_ptr, up_scale_ptr, gate_scale_ptr, n_N, there_N, ACTIVATION, THRESHOLD
    )
    wide_T = row_T.to(tl.int64)
    if BY_TOKEN:
        h_TN_ptr = h_ptr + (t_T * h_stride)[:, None] + wide_N[None, :]
    else:
        h_TN_ptr = h_ptr + (wide_T * h_stride)[:, None] + (n_N - group_start)[None, :]
    tl.store(h_TN_ptr, tl.where(keep_TN, h_TN, 0.0).to(h_ptr.dtype.element_ty), mask=there_TN)
    if kept_ptr is not None:
        kept_TN_ptr = kept_ptr + (wide_T * kept_stride)[:, None] + (n_N - group_start)[None, :]
        tl.store(kept_TN_ptr, up_TN.to(kept_ptr.dtype.element_ty), mask=there_TN)
        if gate_ptr is not None:
            tl.store(kept_TN_ptr + kept_gate, gate_TN.to(kept_ptr.dtype.element_ty), mask=there_TN)


@triton.jit
def add_products(
    a_ptr,
    w_ptr,
    b_ptr,
    v_ptr,
    offset_ptr,
    token_ptr,
    sums_ptr,
    num_outputs,
    num_experts,
    experts_per_group,
    row_tiles,
    o_tiles,
    row_stride,
    w_stride_f,
    w_stride_o,
    v_stride_f,
    v_stride_o,
    R_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    O_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
):
    """A tile of one group's pairs and of outputs: ``a w``, or ``a w + b v``, added to the tokens' sums."""
    o_O = (tl.program_id(0) % o_tiles) * O_TILE + tl.arange(0, O_TILE)  # first outputs: they share rows
    tile = tl.program_id(0) // o_tiles
    group = tile // row_tiles
    first_expert = group * experts_per_group
    group_start = first_neuron(first_expert, SIZE, LARGER)
    neurons = first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER) - group_start
    last_row = tl.load(offset_ptr + group + 1)
    first_row = tl.load(offset_ptr + group) + (tile % row_tiles) * R_TILE
    if first_row >= last_row:
        return
    row_R = first_row + tl.arange(0, R_TILE)
    there_R = row_R < last_row
    there_O = o_O < num_outputs
    t_R = tl.load(token_ptr + row_R, mask=there_R, other=0).to(tl.int64)
    wide_R = row_R.to(tl.int64)
    wide_O = o_O.to(tl.int64)
    sums_RO = tl.zeros((R_TILE, O_TILE), tl.float32)
    for start in range(0, neurons, K_TILE):
        k_K = start + tl.arange(0, K_TILE)
        there_K = k_K < neurons
        j_K = (group_start + k_K).to(tl.int64)
        at_RK = (wide_R * row_stride)[:, None] + k_K[None, :]
        there_RK = there_R[:, None] & there_K[None, :]
        there_KO = there_K[:, None] & there_O[None, :]
        a_RK = tl.load(a_ptr + at_RK, mask=there_RK, other=0)
        w_KO = tl.load(w_ptr + (j_K * w_stride_f)[:, None] + (wide_O * w_stride_o)[None, :], mask=there_KO, other=0)
        sums_RO = tl.dot(a_RK, w_KO.to(a_RK.dtype), sums_RO, input_precision="ieee")
        if b_ptr is not None:
            b_RK = tl.load(b_ptr + at_RK, mask=there_RK, other=0)
            v_KO = tl.load(v_ptr + (j_K * v_stride_f)[:, None] + (wide_O * v_stride_o)[None, :], mask=there_KO, other=0)
            sums_RO = tl.dot(b_RK, v_KO, sums_RO, input_precision="ieee")
    out_RO_ptr = sums_ptr + (t_R * num_outputs)[:, None] + wide_O[None, :]
    tl.atomic_add(out_RO_ptr, sums_RO, mask=there_R[:, None] & there_O[None, :], sem="relaxed")
