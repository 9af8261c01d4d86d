"""The Triton kernels of linear layers whose tokens skip input channels. `gpu_linear` loads this when needed.

Only the files called triton_* import triton.

Letters: T tokens, K input channels, N outputs; as suffixes within kernels, their tiles.

A skipped channel's row of weights is masked out of the load, so it is never read. Sums of a split of the channels go to a workspace, and a
second kernel adds them in order: the same call gives the same bits. `triton.jit` interprets on the CPU where ``TRITON_INTERPRET=1`` is set
before this is imported (not bfloat16, which that interpreter computes wrongly).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu_linear import LinearWeights
from .tiles import LinearTiles


def run(x_TK: Tensor, layer: LinearWeights, tiles: LinearTiles) -> Tensor:
    """``y = (x * keep) W^T + b``, ``keep_tk = not |x_tk| < level_k``; a zero keeps nothing. No host sync.

    Args:
        x_TK: any strides.
        layer: as `gpu_linear.refusal` wants it, which this takes for granted.

    Returns:
        y_TN, x's dtype; sums in fp32.
    """
    weight_KN, level_K, bias_N, scale_N = layer
    (num_tokens, K), N = x_TK.shape, weight_KN.shape[1]
    y_TN = x_TK.new_empty((num_tokens, N))
    if not num_tokens:
        return y_TN
    num_splits = triton.cdiv(K, tiles.channels_per_split)
    sums_STN = x_TK.new_empty((num_splits, num_tokens, N), dtype=torch.float32)
    with torch.cuda.device_of(x_TK):
        sum_kept[(triton.cdiv(N, tiles.outputs), num_splits, triton.cdiv(num_tokens, tiles.tokens))](
            x_TK,
            weight_KN,
            level_K,
            sums_STN,
            num_tokens,
            K,
            N,
            *x_TK.stride(),
            weight_KN.stride(0),
            tiles.channels_per_split,
            T_TILE=tiles.tokens,
            K_TILE=tiles.channels,
            N_TILE=tiles.outputs,
            num_warps=tiles.num_warps,
        )
        add_splits[(num_tokens, triton.cdiv(N, tiles.outputs))](
            sums_STN, scale_N, bias_N, y_TN, num_tokens, N, num_splits, N_TILE=tiles.outputs, S_TILE=SPLITS_AT_ONCE, num_warps=1
        )
    return y_TN


SPLITS_AT_ONCE = 8
"""Splits that are read at once when they are added: one after another, each would wait for the one before."""


@triton.jit
def sum_kept(
    x_ptr,
    weight_ptr,
    level_ptr,
    sums_ptr,
    num_tokens,
    num_channels,
    num_outputs,
    x_stride_t,
    x_stride_k,
    weight_stride,
    channels_per_split,
    T_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
):
    """One split's sums for a tile of outputs and tokens: products of several tokens by matrix instructions, of one without."""
    n_N = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    split = tl.program_id(1)
    t_T = tl.program_id(2) * T_TILE + tl.arange(0, T_TILE)
    first = split * channels_per_split
    last = tl.minimum(first + channels_per_split, num_channels)
    there_N = n_N < num_outputs
    x_T_ptr = x_ptr + t_T.to(tl.int64) * x_stride_t
    if T_TILE == 1:
        sums_KN = tl.zeros((K_TILE, N_TILE), tl.float32)  # across channels once, at the end
    else:
        sums_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
    for start in range(first, last, K_TILE):
        k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
        there_K = k_K < last
        level_K = tl.zeros((K_TILE,), tl.float32)
        if level_ptr is not None:
            level_K = tl.load(level_ptr + k_K, mask=there_K, other=0)
        w_KN_ptr = weight_ptr + (k_K * weight_stride)[:, None] + n_N[None, :]
        if T_TILE == 1:  # in one dimension: of (1, K), every thread would load all of x
            x_K = tl.load(x_ptr + tl.program_id(2).to(tl.int64) * x_stride_t + k_K * x_stride_k, mask=there_K, other=0).to(tl.float32)
            keep_K = _kept(x_K, level_K)
            w_KN = tl.load(w_KN_ptr, mask=keep_K[:, None] & there_N[None, :], other=0)
            sums_KN += tl.where(keep_K, x_K, 0.0)[:, None] * w_KN.to(tl.float32)
        else:
            there_TK = (t_T < num_tokens)[:, None] & there_K[None, :]
            x_TK = tl.load(x_T_ptr[:, None] + (k_K * x_stride_k)[None, :], mask=there_TK, other=0)
            keep_TK = _kept(x_TK.to(tl.float32), level_K[None, :])
            read_K = tl.max(keep_TK.to(tl.int32), axis=0) > 0
            w_KN = tl.load(w_KN_ptr, mask=read_K[:, None] & there_N[None, :], other=0)
            sums_TN = tl.dot(tl.where(keep_TK, x_TK, 0), w_KN.to(x_TK.dtype), sums_TN, input_precision="ieee")
    if T_TILE == 1:
        sums_TN = tl.sum(sums_KN, axis=0)[None, :]
    out_TN_ptr = sums_ptr + (split * num_tokens + t_T).to(tl.int64)[:, None] * num_outputs + n_N[None, :]
    tl.store(out_TN_ptr, sums_TN, mask=(t_T < num_tokens)[:, None] & there_N[None, :])


@triton.jit
def _kept(x, level):
    return (x != 0) & ~(tl.abs(x) < level)  # what is no number differs from zero, and is below nothing


@triton.jit
def add_splits(sums_ptr, scale_ptr, bias_ptr, y_ptr, num_tokens, num_outputs, num_splits, N_TILE: tl.constexpr, S_TILE: tl.constexpr):
    """One token's sums over the splits, scaled, with the bias, in y's dtype."""
    t = tl.program_id(0).to(tl.int64)  # the only axis of a grid that holds more than 65535
    n_N = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    there_N = n_N < num_outputs
    sum_SN = tl.zeros((S_TILE, N_TILE), tl.float32)
    for start in range(0, num_splits, S_TILE):
        s_S = start + tl.arange(0, S_TILE)
        in_SN_ptr = sums_ptr + ((s_S * num_tokens + t) * num_outputs)[:, None] + n_N[None, :]
        sum_SN += tl.load(in_SN_ptr, mask=(s_S < num_splits)[:, None] & there_N[None, :], other=0)
    sum_N = tl.sum(sum_SN, axis=0)
    if scale_ptr is not None:
        sum_N *= tl.load(scale_ptr + n_N, mask=there_N, other=0)
    if bias_ptr is not None:
        sum_N += tl.load(bias_ptr + n_N, mask=there_N, other=0).to(tl.float32)
    tl.store(y_ptr + t * num_outputs + n_N, sum_N.to(y_ptr.dtype.element_ty), mask=there_N)
