"""Experts of few tokens: neurons stay in their order, and what no token selects is not read.

Letters: T tokens, D input width, O output width, F FFN width, E experts; as suffixes within kernels, tiles: T of tokens, N of neurons, K of
what is summed over, O of outputs.

Two kernels. The first zeroes the counters of the second, whose last split for a tile of outputs adds up all of them, in order: so there is
no third. Which one is last differs from call to call, its result does not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sites.site import FFNWeights
from .tiles import FFNTiles
from .triton_neurons import activated, expert_of, named, pre_activations, run_of, strides


def union(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str, tiles: FFNTiles) -> Tensor:
    """y (T, O) in x's dtype; weights may be int8. Two kernels, workspace (T, F) in x's dtype and (splits, T, O) in fp32."""
    (num_tokens, width), (F, O) = x_TD.shape, weights.down_FD.shape  # noqa: E741
    y_TO = x_TD.new_empty((num_tokens, O))
    if not num_tokens:
        return y_TO
    selected_TE = mask_TE.view(torch.uint8)
    size, larger = divmod(F, mask_TE.shape[1])
    experts = {"SIZE": size, "LARGER": larger}
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    h_TF = x_TD.new_empty((num_tokens, F))
    token_tiles, o_tiles = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(O, tiles.outputs)
    splits = triton.cdiv(F, tiles.neurons_per_split)
    sums_STO = x_TD.new_empty((splits, num_tokens, O), dtype=torch.float32)
    done = x_TD.new_empty(token_tiles * o_tiles, dtype=torch.int32)
    with torch.cuda.device_of(x_TD):
        first = hidden_of_one if tiles.tokens == 1 else hidden_of_few
        first[(triton.cdiv(F, tiles.neurons) * token_tiles,)](
            *(x_TD, weights.up_FD, weights.gate_FD, weights.up_bias_F, weights.gate_bias_F, weights.up_scale_F, weights.gate_scale_F),
            *(selected_TE, h_TF, done, num_tokens, width, F, token_tiles, done.numel()),
            *(*x_TD.stride(), *weights.up_FD.stride(), *strides(weights.gate_FD), *selected_TE.stride()),
            **named(activation),
            T_TILE=tiles.tokens,
            N_TILE=tiles.neurons,
            K_TILE=tiles.channels,
            **experts,
            RUN=run_of(size, larger, tiles.neurons),
            **launch,
        )
        outputs_of_few[(o_tiles, splits, token_tiles)](
            *(h_TF, weights.down_FD, selected_TE, sums_STO, done, weights.down_scale_D, weights.down_bias_D, y_TO),
            *(num_tokens, F, O, tiles.neurons_per_split, *weights.down_FD.stride(), *selected_TE.stride()),
            T_TILE=tiles.tokens,
            K_TILE=tiles.depth,
            O_TILE=tiles.outputs,
            S_TILE=SPLITS_AT_ONCE,
            **experts,
            RUN=run_of(size, larger, tiles.depth),
            **launch,
        )
    return y_TO


SPLITS_AT_ONCE = 32
"""Splits of one token's sums that the last program reads at once: there are some 60 for a GPU of 132 units."""


@triton.jit
def hidden_of_one(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    up_scale_ptr,
    gate_scale_ptr,
    mask_ptr,
    h_ptr,
    done_ptr,
    num_tokens,
    width,
    num_neurons,
    token_tiles,
    num_done,
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
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """A tile of one token's activations: x in one dimension, for of (1, K) every thread would load all of it."""
    tl.static_assert(T_TILE == 1)
    _zero(done_ptr, num_done)
    t = (tl.program_id(0) % token_tiles).to(tl.int64)
    n_N = (tl.program_id(0) // token_tiles) * N_TILE + tl.arange(0, N_TILE)
    there_N = n_N < num_neurons
    wide_N = n_N.to(tl.int64)
    keep_N_ptr = mask_ptr + expert_of(n_N, SIZE, LARGER).to(tl.int64) * mask_stride_e + t * mask_stride_t
    keep_N = tl.max_constancy(tl.load(keep_N_ptr, mask=there_N, other=0) != 0, [RUN])
    if tl.max(keep_N.to(tl.int32), axis=0) == 0:
        return
    up_NK = tl.zeros((N_TILE, K_TILE), tl.float32)
    gate_NK = tl.zeros((N_TILE, K_TILE), tl.float32)
    for start in range(0, width, K_TILE):
        k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
        there_K = k_K < width
        x_K = tl.load(x_ptr + t * x_stride_t + k_K * x_stride_d, mask=there_K, other=0).to(tl.float32)
        read_NK = keep_N[:, None] & there_K[None, :]
        w_NK = tl.load(up_ptr + (wide_N * up_stride_f)[:, None] + (k_K * up_stride_d)[None, :], mask=read_NK, other=0)
        up_NK += w_NK.to(tl.float32) * x_K[None, :]
        if gate_ptr is not None:
            w_NK = tl.load(gate_ptr + (wide_N * gate_stride_f)[:, None] + (k_K * gate_stride_d)[None, :], mask=read_NK, other=0)
            gate_NK += w_NK.to(tl.float32) * x_K[None, :]
    h_TN, _, _ = activated(
        *(tl.sum(up_NK, axis=1)[None, :], tl.sum(gate_NK, axis=1)[None, :], gate_ptr),
        *(up_bias_ptr, gate_bias_ptr, up_scale_ptr, gate_scale_ptr, n_N, there_N, ACTIVATION, THRESHOLD),
    )
    h_TN_ptr = h_ptr + t * num_neurons + wide_N[None, :]
    tl.store(h_TN_ptr, tl.where(keep_N[None, :], h_TN, 0.0).to(h_ptr.dtype.element_ty), mask=there_N[None, :])


@triton.jit
def hidden_of_few(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    up_scale_ptr,
    gate_scale_ptr,
    mask_ptr,
    h_ptr,
    done_ptr,
    num_tokens,
    width,
    num_neurons,
    token_tiles,
    num_done,
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
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """A tile of tokens and neurons; programs whose neurons no token of theirs selects exit."""
    _zero(done_ptr, num_done)
    t_T = ((tl.program_id(0) % token_tiles) * T_TILE + tl.arange(0, T_TILE)).to(tl.int64)
    n_N = (tl.program_id(0) // token_tiles) * N_TILE + tl.arange(0, N_TILE)
    there_T, there_N = t_T < num_tokens, n_N < num_neurons
    wide_N = n_N.to(tl.int64)
    there_TN = there_T[:, None] & there_N[None, :]
    mask_TN_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (expert_of(n_N, SIZE, LARGER).to(tl.int64) * mask_stride_e)[None, :]
    keep_TN = tl.load(mask_TN_ptr, mask=there_TN, other=0) != 0
    read_N = tl.max_constancy(tl.max(keep_TN.to(tl.int32), axis=0) > 0, [RUN])
    if tl.max(read_N.to(tl.int32), axis=0) == 0:
        return
    up_TN, gate_TN = pre_activations(
        *(x_ptr, up_ptr, gate_ptr, t_T, there_T, wide_N, read_N, width, x_stride_t, x_stride_d),
        *(up_stride_f, up_stride_d, gate_stride_f, gate_stride_d, T_TILE, N_TILE, K_TILE),
    )
    h_TN, _, _ = activated(
        *(up_TN, gate_TN, gate_ptr, up_bias_ptr, gate_bias_ptr, up_scale_ptr, gate_scale_ptr, n_N, there_N, ACTIVATION, THRESHOLD)
    )
    h_TN_ptr = h_ptr + (t_T * num_neurons)[:, None] + wide_N[None, :]
    tl.store(h_TN_ptr, tl.where(keep_TN, h_TN, 0.0).to(h_ptr.dtype.element_ty), mask=there_TN)


@triton.jit
def _zero(done_ptr, num_done):
    """The counters, shared out among the programs."""
    for i in range(tl.program_id(0), num_done, tl.num_programs(0)):
        tl.store(done_ptr + i, 0)


@triton.jit
def outputs_of_few(
    h_ptr,
    down_ptr,
    mask_ptr,
    sums_ptr,
    done_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    num_neurons,
    num_outputs,
    neurons_per_split,
    down_stride_f,
    down_stride_o,
    mask_stride_t,
    mask_stride_e,
    T_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    O_TILE: tl.constexpr,
    S_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """One split's sums for a tile of outputs and tokens; y, where all others have theirs. What a token does not select is never read, of h
    nor of the weights."""
    o_O = tl.program_id(0) * O_TILE + tl.arange(0, O_TILE)
    split = tl.program_id(1)
    t_T = (tl.program_id(2) * T_TILE + tl.arange(0, T_TILE)).to(tl.int64)
    there_O = o_O < num_outputs
    there_T = t_T < num_tokens
    first = split * neurons_per_split
    last = tl.minimum(first + neurons_per_split, num_neurons)
    wide_O = o_O.to(tl.int64)
    if T_TILE == 1:
        t = tl.program_id(2).to(tl.int64)
        sums_KO = tl.zeros((K_TILE, O_TILE), tl.float32)
        for start in range(first, last, K_TILE):
            k_K = start + tl.arange(0, K_TILE)
            wide_K = k_K.to(tl.int64)
            at_K_ptr = mask_ptr + t * mask_stride_t + expert_of(k_K, SIZE, LARGER).to(tl.int64) * mask_stride_e
            read_K = tl.max_constancy(tl.load(at_K_ptr, mask=k_K < last, other=0) != 0, [RUN])
            h_K = tl.load(h_ptr + t * num_neurons + wide_K, mask=read_K, other=0).to(tl.float32)
            down_KO_ptr = down_ptr + (wide_K * down_stride_f)[:, None] + (wide_O * down_stride_o)[None, :]
            w_KO = tl.load(down_KO_ptr, mask=read_K[:, None] & there_O[None, :], other=0)
            sums_KO += h_K[:, None] * w_KO.to(tl.float32)
        sums_TO = tl.sum(sums_KO, axis=0)[None, :]
    else:
        sums_TO = tl.zeros((T_TILE, O_TILE), tl.float32)
        for start in range(first, last, K_TILE):
            k_K = start + tl.arange(0, K_TILE)
            wide_K = k_K.to(tl.int64)
            at_TK_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (expert_of(k_K, SIZE, LARGER).to(tl.int64) * mask_stride_e)[None, :]
            keep_TK = tl.load(at_TK_ptr, mask=there_T[:, None] & (k_K < last)[None, :], other=0) != 0
            keep_TK = tl.max_constancy(keep_TK, [1, RUN])
            read_K = tl.max_constancy(tl.max(keep_TK.to(tl.int32), axis=0) > 0, [RUN])
            h_TK = tl.load(h_ptr + (t_T * num_neurons)[:, None] + wide_K[None, :], mask=keep_TK, other=0)
            down_KO_ptr = down_ptr + (wide_K * down_stride_f)[:, None] + (wide_O * down_stride_o)[None, :]
            w_KO = tl.load(down_KO_ptr, mask=read_K[:, None] & there_O[None, :], other=0)
            sums_TO = tl.dot(h_TK, w_KO.to(h_TK.dtype), sums_TO, input_precision="ieee")
    out_TO_ptr = sums_ptr + ((split * num_tokens + t_T) * num_outputs)[:, None] + wide_O[None, :]
    there_TO = there_T[:, None] & there_O[None, :]
    tl.store(out_TO_ptr, sums_TO, mask=there_TO)
    tl.debug_barrier()  # all threads have stored before one of them says so
    splits = tl.num_programs(1)
    if tl.atomic_add(done_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
        # past the first cache, which knows nothing of other units; of one token many at once, or each would wait for the one before
        if T_TILE == 1:
            total_SO = tl.zeros((S_TILE, O_TILE), tl.float32)
            for start in range(0, splits, S_TILE):
                i_S = (start + tl.arange(0, S_TILE)).to(tl.int64)
                in_SO_ptr = sums_ptr + ((i_S * num_tokens + tl.program_id(2)) * num_outputs)[:, None] + wide_O[None, :]
                total_SO += tl.load(in_SO_ptr, mask=(i_S < splits)[:, None] & there_O[None, :], other=0, cache_modifier=".cg")
            total_TO = tl.sum(total_SO, axis=0)[None, :]
        else:
            total_TO = tl.zeros((T_TILE, O_TILE), tl.float32)
            for i in range(splits):
                in_TO_ptr = sums_ptr + ((i * num_tokens + t_T) * num_outputs)[:, None] + wide_O[None, :]
                total_TO += tl.load(in_TO_ptr, mask=there_TO, other=0, cache_modifier=".cg")
        if scale_ptr is not None:
            total_TO *= tl.load(scale_ptr + o_O, mask=there_O, other=0)[None, :]
        if bias_ptr is not None:
            total_TO += tl.load(bias_ptr + o_O, mask=there_O, other=0).to(tl.float32)[None, :]
        y_TO_ptr = y_ptr + (t_T * num_outputs)[:, None] + wide_O[None, :]
        tl.store(y_TO_ptr, total_TO.to(y_ptr.dtype.element_ty), mask=there_TO)
