"""Router and selection rule of few tokens as two kernels: the hidden layer's sums, then scores and rule of a token in one program.

Letters: T tokens, D model width, W router width, E experts, S splits of the model width; as suffixes within kernels, tiles of them.

A third kernel would be needed to spread the scores of one token over the GPU; a single program reads the E W numbers in about the time
that starting that kernel takes. One kernel for everything needs a barrier across programs, which Triton's interpreter cannot run: it
runs programs one after another. Rules on sorted scores sort (score, expert) as one whole number each, so that of equal scores the lowest
expert comes first, as `moeify.select` has it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import RouterTiles


def hidden_sums(x_TD: Tensor, hidden_WD: Tensor, tiles: RouterTiles) -> Tensor:
    """sums_STW in fp32: of each split of D, x hidden^T; x has any strides, the weight is contiguous fp32."""
    (num_tokens, D), W = x_TD.shape, hidden_WD.shape[0]
    splits = triton.cdiv(D, tiles.channels_per_split)
    sums_STW = x_TD.new_empty((splits, num_tokens, W), dtype=torch.float32)
    with torch.cuda.device_of(x_TD):
        sum_hidden[(triton.cdiv(W, tiles.rows), splits, triton.cdiv(num_tokens, tiles.tokens))](
            *(x_TD, hidden_WD, sums_STW, num_tokens, D, W, tiles.channels_per_split, *x_TD.stride()),
            T_TILE=tiles.tokens,
            W_TILE=tiles.rows,
            K_TILE=tiles.channels,
            num_warps=tiles.num_warps,
        )
    return sums_STW


def hidden_of_many(x_TD: Tensor, hidden_WD: Tensor) -> Tensor:
    """sums_1TW in fp32, by matrix instructions of x's type: each weight is cut into three such numbers, in bfloat16 without a rest."""
    (num_tokens, D), W = x_TD.shape, hidden_WD.shape[0]
    sums_1TW = x_TD.new_empty((1, num_tokens, W), dtype=torch.float32)
    tile = min(MANY["W_TILE"], max(16, triton.next_power_of_2(W)))
    with torch.cuda.device_of(x_TD):
        sum_hidden_of_many[(triton.cdiv(num_tokens, MANY["T_TILE"]), triton.cdiv(W, tile))](
            *(x_TD, hidden_WD, sums_1TW, num_tokens, D, W, *x_TD.stride()), **MANY | {"W_TILE": tile}, num_warps=8
        )
    return sums_1TW


MANY = {"T_TILE": 128, "W_TILE": 128, "K_TILE": 32}
"""Tiles of `hidden_of_many`."""


def choose(
    sums_STW: Tensor,
    hidden_bias_W: Tensor | None,
    out_EW: Tensor | None,
    out_bias_E: Tensor | None,
    *,
    is_exp: bool,
    rule: str,
    knob: float,
    always_on: tuple[int, ...],
) -> Tensor:
    """mask_TE of scores exp(z / 2) or abs(z), z = out relu(sum of the splits + hidden_bias) + out_bias; without out, sums_1TE are z."""
    splits, num_tokens, width = sums_STW.shape
    num_experts = width if out_EW is None else out_EW.shape[0]
    mask_TE = sums_STW.new_empty((num_tokens, num_experts), dtype=torch.bool)
    experts = max(16, triton.next_power_of_2(num_experts))
    widths = triton.next_power_of_2(width)
    with torch.cuda.device_of(sums_STW):
        choose_experts[(num_tokens,)](
            *(sums_STW, hidden_bias_W, out_EW, out_bias_E, mask_TE.view(torch.uint8)),
            *(num_tokens, width, num_experts, splits, knob),
            IS_EXP=is_exp,
            RULE=rule,
            ALWAYS=always_on or None,
            E_ALL=experts,
            S_ALL=triton.next_power_of_2(splits),
            W_ALL=widths,
            W_TILE=min(widths, max(1, 8192 // experts), 32),
            num_warps=8 if experts >= 128 else 4,
        )
    return mask_TE


@triton.jit
def sum_hidden(
    x_ptr,
    hidden_ptr,
    sums_ptr,
    num_tokens,
    num_channels,
    width,
    channels_per_split,
    x_stride_t,
    x_stride_d,
    T_TILE: tl.constexpr,
    W_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    """One split's sums for a tile of the hidden layer and of tokens, in fp32."""
    w_W = tl.program_id(0) * W_TILE + tl.arange(0, W_TILE)
    split = tl.program_id(1)
    t_T = (tl.program_id(2) * T_TILE + tl.arange(0, T_TILE)).to(tl.int64)
    there_W, there_T = w_W < width, t_T < num_tokens
    first = split * channels_per_split
    last = tl.minimum(first + channels_per_split, num_channels)
    wide_W = w_W.to(tl.int64)
    if T_TILE == 1:
        sums_WK = tl.zeros((W_TILE, K_TILE), tl.float32)
        for start in range(first, last, K_TILE):
            k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
            there_K = k_K < last
            x_K = tl.load(x_ptr + tl.program_id(2).to(tl.int64) * x_stride_t + k_K * x_stride_d, mask=there_K, other=0).to(tl.float32)
            hidden_WK_ptr = hidden_ptr + (wide_W * num_channels)[:, None] + k_K[None, :]
            sums_WK += tl.load(hidden_WK_ptr, mask=there_W[:, None] & there_K[None, :], other=0) * x_K[None, :]
        sums_TW = tl.sum(sums_WK, axis=1)[None, :]
    else:
        sums_TW = tl.zeros((T_TILE, W_TILE), tl.float32)
        for start in range(first, last, K_TILE):
            k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
            there_K = k_K < last
            x_TK_ptr = x_ptr + (t_T * x_stride_t)[:, None] + (k_K * x_stride_d)[None, :]
            x_TK = tl.load(x_TK_ptr, mask=there_T[:, None] & there_K[None, :], other=0).to(tl.float32)
            hidden_KW_ptr = hidden_ptr + k_K[:, None] + (wide_W * num_channels)[None, :]
            hidden_KW = tl.load(hidden_KW_ptr, mask=there_K[:, None] & there_W[None, :], other=0)
            sums_TW = tl.dot(x_TK, hidden_KW, sums_TW, input_precision="ieee")
    out_TW_ptr = sums_ptr + ((split * num_tokens + t_T) * width)[:, None] + w_W[None, :]
    tl.store(out_TW_ptr, sums_TW, mask=there_T[:, None] & there_W[None, :])


@triton.jit
def sum_hidden_of_many(
    x_ptr,
    hidden_ptr,
    sums_ptr,
    num_tokens,
    num_channels,
    width,
    x_stride_t,
    x_stride_d,
    T_TILE: tl.constexpr,
    W_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    """A tile of tokens and of the hidden layer: three products, of what is left of the weights each time."""
    t_T = (tl.program_id(0) * T_TILE + tl.arange(0, T_TILE)).to(tl.int64)
    w_W = tl.program_id(1) * W_TILE + tl.arange(0, W_TILE)
    there_T, there_W = t_T < num_tokens, w_W < width
    sums_TW = tl.zeros((T_TILE, W_TILE), tl.float32)
    for start in range(0, num_channels, K_TILE):
        k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
        there_K = k_K < num_channels
        x_TK_ptr = x_ptr + (t_T * x_stride_t)[:, None] + (k_K * x_stride_d)[None, :]
        x_TK = tl.load(x_TK_ptr, mask=there_T[:, None] & there_K[None, :], other=0)
        rest_KW_ptr = hidden_ptr + k_K[:, None] + (w_W.to(tl.int64) * num_channels)[None, :]
        rest_KW = tl.load(rest_KW_ptr, mask=there_K[:, None] & there_W[None, :], other=0)
        for _ in tl.static_range(3):
            part_KW = rest_KW.to(x_TK.dtype)
            sums_TW = tl.dot(x_TK, part_KW, sums_TW)
            rest_KW -= part_KW.to(tl.float32)
    tl.store(sums_ptr + (t_T * width)[:, None] + w_W[None, :], sums_TW, mask=there_T[:, None] & there_W[None, :])


@triton.jit
def choose_experts(
    sums_ptr,
    hidden_bias_ptr,
    out_ptr,
    out_bias_ptr,
    mask_ptr,
    num_tokens,
    width,
    num_experts,
    splits,
    knob,
    IS_EXP: tl.constexpr,
    RULE: tl.constexpr,
    ALWAYS: tl.constexpr,
    E_ALL: tl.constexpr,
    S_ALL: tl.constexpr,
    W_ALL: tl.constexpr,
    W_TILE: tl.constexpr,
):
    """Scores and rule of one token."""
    t = tl.program_id(0).to(tl.int64)
    e_E = tl.arange(0, E_ALL)
    s_S = tl.arange(0, S_ALL)
    there_E = e_E < num_experts
    if out_ptr is None:
        z_E = tl.load(sums_ptr + t * num_experts + e_E, mask=there_E, other=0)
    else:
        z_E = tl.load(out_bias_ptr + e_E, mask=there_E, other=0)
    for i in tl.static_range(0 if out_ptr is None else W_ALL // W_TILE):  # unrolled: loads of all steps are on their way at once
        w_W = i * W_TILE + tl.arange(0, W_TILE)
        there_W = w_W < width
        in_SW_ptr = sums_ptr + ((s_S * num_tokens + t) * width)[:, None] + w_W[None, :]
        h_SW = tl.load(in_SW_ptr, mask=(s_S < splits)[:, None] & there_W[None, :], other=0)
        h_W = tl.sum(h_SW, axis=0) + tl.load(hidden_bias_ptr + w_W, mask=there_W, other=0)
        h_W = tl.where(h_W < 0, 0.0, h_W)  # not a maximum: what is no number stays
        out_EW = tl.load(out_ptr + e_E[:, None] * width + w_W[None, :], mask=there_E[:, None] & there_W[None, :], other=0)
        z_E += tl.sum(out_EW * h_W[None, :], axis=1)
    if IS_EXP:
        score_E = tl.exp(tl.where(z_E < -40, -40.0, tl.where(z_E > 40, 40.0, z_E)) / 2)
    else:
        score_E = tl.abs(z_E)
    is_nan_E = there_E & (score_E != score_E)
    any_nan = tl.max(is_nan_E.to(tl.int32), axis=0) > 0
    most = tl.max(tl.where(there_E & (score_E == score_E), score_E, 0.0), axis=0)
    if RULE == "threshold" or RULE == "dynk_max":
        at_E = e_E
        level = tl.minimum(most, knob) if RULE == "threshold" else tl.minimum(knob * most, most)
        keep_E = (score_E >= level) | any_nan
        if RULE == "dynk_max":
            keep_E |= knob == 0
    else:
        if RULE != "topk":
            score_E = tl.where(most == 0, 1.0, score_E)  # all are equal
        bits_E = tl.where(is_nan_E, 0x7FFFFFFF, score_E.to(tl.int32, bitcast=True)).to(tl.int64)  # of numbers >= 0 they sort as those
        key_E = tl.where(there_E, (bits_E << 32) | (E_ALL - 1 - e_E).to(tl.int64), -1)
        key_E = tl.sort(key_E, descending=True)
        at_E = tl.where(there_E, E_ALL - 1 - (key_E & 0xFFFFFFFF).to(tl.int32), E_ALL)
        if RULE == "topk":
            keep_E = e_E < knob
        else:
            sorted_E = tl.where(there_E, (key_E >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
            if RULE == "dynk_mass":
                sum_E = tl.cumsum(sorted_E, axis=0)
                critical_E = (sum_E - sorted_E) / tl.sum(sorted_E, axis=0)
            else:
                tl.static_assert(RULE == "norm_budget", "no such rule")
                square_E = sorted_E / most * (sorted_E / most)  # over the largest: squares of small scores must not underflow
                sum_E = tl.cumsum(square_E, axis=0)
                before_E = tl.sqrt(tl.where(sum_E > square_E, sum_E - square_E, 0.0))
                critical_E = (before_E + tl.sqrt(sum_E)) / (2 * tl.sqrt(tl.sum(square_E, axis=0)))
            keep_E = (critical_E < knob) | (e_E == 0) | (knob >= 1) | any_nan
    if ALWAYS is not None:
        for i in tl.static_range(len(ALWAYS)):
            keep_E |= at_E == ALWAYS[i]
    tl.store(mask_ptr + t * num_experts + at_E, keep_E.to(tl.uint8), mask=there_E)
