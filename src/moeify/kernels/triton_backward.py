"""Backward of the experts of many tokens, as far as their neurons: the first products' gradients, and those of the weights.

Letters: T tokens, O output width, F FFN width, E experts, W neurons of a group, C room for pairs; as suffixes within kernels, tiles: T of
tokens, N of neurons, K of what is summed over, D of inputs, R of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sites.site import FFNWeights
from .tiles import FFNTiles
from .triton_neurons import act, act_grad, expert_of, first_neuron, named, strides
from .triton_plan import Ragged


def hidden_gradients(
    grad_TO: Tensor,
    weights: FFNWeights,
    mask_TE: Tensor,
    ragged: Ragged,
    kept: Tensor,
    *,
    activation: str,
    tiles: FFNTiles,
    by_token: bool,
    wants_energy: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """h, the gradients of up and gate before the nonlinearity (rows as in `hidden`), and of each pair sum of h dL/dh, (C,) in fp32."""
    num_tokens, F, room = grad_TO.shape[0], weights.num_neurons, ragged.room
    rows = (num_tokens, F) if by_token else (room, ragged.width)
    h = grad_TO.new_empty(rows)
    up = grad_TO.new_zeros(rows) if by_token else grad_TO.new_empty(rows)
    gate = None if weights.gate_FD is None else torch.zeros_like(up) if by_token else torch.empty_like(up)
    row_tiles, n_tiles = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(ragged.width, tiles.neurons)
    energy = torch.empty((room, n_tiles), dtype=torch.float32, device=grad_TO.device) if wants_energy else None
    selected_TE = mask_TE.view(torch.uint8)
    with torch.cuda.device_of(grad_TO):
        through_activation[(ragged.num_groups * n_tiles * row_tiles,)](
            *(grad_TO, weights.down_FD, kept, selected_TE, ragged.offset_G1, ragged.token_C, h, up, gate, energy),
            *(grad_TO.shape[1], mask_TE.shape[1], ragged.experts_per_group, row_tiles, n_tiles),
            *(h.stride(0), ragged.width, room * ragged.width),
            *(*grad_TO.stride(), *weights.down_FD.stride(), *selected_TE.stride()),
            **named(activation),
            BY_TOKEN=by_token,
            T_TILE=tiles.tokens,
            N_TILE=tiles.neurons,
            K_TILE=tiles.channels,
            **ragged.experts,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return h, up, gate, None if energy is None else energy.sum(1)


def weight_gradients(
    rows: Tensor,
    x_TD: Tensor,
    ragged: Ragged,
    *,
    num_experts: int,
    tiles: FFNTiles,
    by_token: bool,
    grad_FD: Tensor | None,
    grad_bias_F: Tensor | None,
) -> None:
    """grad_FD[j] = sum over the pairs of j's group of rows[pair, j] x[token], grad_bias_F[j] without x: both written, in a fixed order."""
    width = x_TD.shape[1]
    n_tiles, d_tiles = triton.cdiv(ragged.width, tiles.neurons), 1 if grad_FD is None else triton.cdiv(width, tiles.outputs)
    with torch.cuda.device_of(x_TD):
        sum_pairs[(ragged.num_groups * n_tiles * d_tiles,)](
            *(rows, x_TD, ragged.offset_G1, ragged.token_C, grad_FD, grad_bias_F),
            *(width, num_experts, ragged.experts_per_group, n_tiles, d_tiles, rows.stride(0)),
            *(*x_TD.stride(), *strides(grad_FD)),
            BY_TOKEN=by_token,
            R_TILE=tiles.depth,
            N_TILE=tiles.neurons,
            D_TILE=tiles.outputs,
            **ragged.experts,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


@triton.jit
def through_activation(
    grad_ptr,
    down_ptr,
    kept_ptr,
    mask_ptr,
    offset_ptr,
    token_ptr,
    h_ptr,
    up_ptr,
    gate_ptr,
    energy_ptr,
    num_outputs,
    num_experts,
    experts_per_group,
    row_tiles,
    n_tiles,
    row_stride,
    kept_stride,
    kept_gate,
    grad_stride_t,
    grad_stride_o,
    down_stride_f,
    down_stride_o,
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
):
    """Backward as far as the first products' results: a tile of one group's pairs and neurons."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    group = tile // n_tiles
    n_tile = tile % n_tiles
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
    n_N = group_start + n_tile * N_TILE + tl.arange(0, N_TILE)
    there_N = n_N < last_neuron
    there_TN = there_T[:, None] & there_N[None, :]
    wide_N = n_N.to(tl.int64)
    wide_T = row_T.to(tl.int64)
    dh_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
    for start in range(0, num_outputs, K_TILE):
        k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
        there_K = k_K < num_outputs
        grad_TK_ptr = grad_ptr + (t_T * grad_stride_t)[:, None] + (k_K * grad_stride_o)[None, :]
        grad_TK = tl.load(grad_TK_ptr, mask=there_T[:, None] & there_K[None, :], other=0)
        down_KN_ptr = down_ptr + (k_K * down_stride_o)[:, None] + (wide_N * down_stride_f)[None, :]
        down_KN = tl.load(down_KN_ptr, mask=there_K[:, None] & there_N[None, :], other=0)
        dh_TN = tl.dot(grad_TK, down_KN, dh_TN, input_precision="ieee")
    mask_TN_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (expert_of(n_N, SIZE, LARGER).to(tl.int64) * mask_stride_e)[None, :]
    keep_TN = tl.load(mask_TN_ptr, mask=there_TN, other=0) != 0
    kept_TN_ptr = kept_ptr + (wide_T * kept_stride)[:, None] + (n_N - group_start)[None, :]
    u_TN = tl.load(kept_TN_ptr, mask=there_TN, other=0).to(tl.float32)
    if BY_TOKEN:
        at_TN = (t_T * row_stride)[:, None] + wide_N[None, :]
    else:
        at_TN = (wide_T * row_stride)[:, None] + (n_N - group_start)[None, :]
    if gate_ptr is not None:
        z_TN = tl.load(kept_TN_ptr + kept_gate, mask=there_TN, other=0).to(tl.float32)
        a_TN = act(z_TN, ACTIVATION, THRESHOLD)
        h_TN = a_TN * u_TN
        du_TN = a_TN * dh_TN
        dz_TN = act_grad(z_TN, ACTIVATION, THRESHOLD) * u_TN * dh_TN
        tl.store(gate_ptr + at_TN, tl.where(keep_TN, dz_TN, 0.0).to(gate_ptr.dtype.element_ty), mask=there_TN)
    else:
        h_TN = act(u_TN, ACTIVATION, THRESHOLD)
        du_TN = act_grad(u_TN, ACTIVATION, THRESHOLD) * dh_TN
    tl.store(up_ptr + at_TN, tl.where(keep_TN, du_TN, 0.0).to(up_ptr.dtype.element_ty), mask=there_TN)
    h_TN = tl.where(keep_TN, h_TN, 0.0)
    tl.store(h_ptr + at_TN, h_TN.to(h_ptr.dtype.element_ty), mask=there_TN)
    if energy_ptr is not None:
        energy_T = tl.sum(tl.where(keep_TN, h_TN * dh_TN, 0.0), axis=1)
        tl.store(energy_ptr + wide_T * n_tiles + n_tile, energy_T, mask=there_T)


@triton.jit
def sum_pairs(
    rows_ptr,
    x_ptr,
    offset_ptr,
    token_ptr,
    out_ptr,
    bias_ptr,
    width,
    num_experts,
    experts_per_group,
    n_tiles,
    d_tiles,
    row_stride,
    x_stride_t,
    x_stride_d,
    out_stride_f,
    out_stride_d,
    BY_TOKEN: tl.constexpr,
    R_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
):
    """A tile of a weight's gradient, and of a bias': sums over the pairs of one group, in order."""
    d_tile = tl.program_id(0) % d_tiles
    tile = tl.program_id(0) // d_tiles
    group = tile // n_tiles
    first_expert = group * experts_per_group
    group_start = first_neuron(first_expert, SIZE, LARGER)
    last_neuron = first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER)
    n_N = group_start + (tile % n_tiles) * N_TILE + tl.arange(0, N_TILE)
    there_N = n_N < last_neuron
    d_D = (d_tile * D_TILE + tl.arange(0, D_TILE)).to(tl.int64)
    there_D = d_D < width
    wide_N = n_N.to(tl.int64)
    first_row = tl.load(offset_ptr + group)
    last_row = tl.load(offset_ptr + group + 1)
    sums_ND = tl.zeros((N_TILE, D_TILE), tl.float32)
    bias_N = tl.zeros((N_TILE,), tl.float32)
    for start in range(first_row, last_row, R_TILE):
        row_R = start + tl.arange(0, R_TILE)
        there_R = row_R < last_row
        t_R = tl.load(token_ptr + row_R, mask=there_R, other=0).to(tl.int64)
        if BY_TOKEN:
            rows_NR_ptr = rows_ptr + wide_N[:, None] + (t_R * row_stride)[None, :]
        else:
            rows_NR_ptr = rows_ptr + (n_N - group_start)[:, None] + (row_R.to(tl.int64) * row_stride)[None, :]
        rows_NR = tl.load(rows_NR_ptr, mask=there_N[:, None] & there_R[None, :], other=0)
        if out_ptr is not None:
            x_RD_ptr = x_ptr + (t_R * x_stride_t)[:, None] + (d_D * x_stride_d)[None, :]
            x_RD = tl.load(x_RD_ptr, mask=there_R[:, None] & there_D[None, :], other=0)
            sums_ND = tl.dot(rows_NR, x_RD, sums_ND, input_precision="ieee")
        if bias_ptr is not None:
            bias_N += tl.sum(rows_NR.to(tl.float32), axis=1)
    if out_ptr is not None:
        out_ND_ptr = out_ptr + (wide_N * out_stride_f)[:, None] + (d_D * out_stride_d)[None, :]
        tl.store(out_ND_ptr, sums_ND.to(out_ptr.dtype.element_ty), mask=there_N[:, None] & there_D[None, :])
    if bias_ptr is not None:
        tl.store(bias_ptr + n_N, bias_N.to(bias_ptr.dtype.element_ty), mask=there_N & (d_tile == 0))
