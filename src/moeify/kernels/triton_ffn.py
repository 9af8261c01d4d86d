"""The Triton kernels of experts. Like `triton_linear` it imports triton; `gpu_ffn` loads it when needed, and checks what it relies on.

Letters: T tokens, D input width, O output width, F FFN width, E experts, G groups of neighbouring experts, W neurons of a group, C room for
pairs; as suffixes within kernels, tiles: T of tokens, N of neurons, K of what is summed over, O of outputs, R of rows.

Two ways:

- `union`, few tokens: neurons stay in their order, programs whose neurons no token of their tile selects exit, rows of weights that nobody
  selects are masked out of the load. Three kernels; sums over neurons by splits, added in order: the same bits again.
- `ragged`, many tokens and training: (token, group) pairs are ordered by group on the device, by a plan for as many pairs as there may be;
  the products of a group gather its tokens while they load. A group is one expert, or several thin ones that are computed together. What
  the second product adds up goes to y by atomics (thick experts), or through h in the order of the tokens, a dense product and no atomics
  (thin ones: a pair then writes less to h than it would add to y).

No grid depends on a value: nothing waits for the host, and a captured CUDA graph holds for any mask of its shape.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sites.site import FFNWeights
from .tiles import FFNTiles
from .triton_linear import add_splits


def union(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str, tiles: FFNTiles) -> Tensor:
    """y (T, O) in x's dtype; weights may be int8. Three kernels, workspace (T, F) in x's dtype and (splits, T, O) in fp32."""
    (num_tokens, width), (F, O) = x_TD.shape, weights.down_FD.shape  # noqa: E741
    y_TO = x_TD.new_empty((num_tokens, O))
    if not num_tokens:
        return y_TO
    selected_TE = mask_TE.view(torch.uint8)
    size, larger = divmod(F, mask_TE.shape[1])
    experts = {"SIZE": size, "LARGER": larger}
    h_TF = x_TD.new_empty((num_tokens, F))
    token_tiles = triton.cdiv(num_tokens, tiles.tokens)
    splits = triton.cdiv(F, tiles.neurons_per_split)
    sums_STO = x_TD.new_empty((splits, num_tokens, O), dtype=torch.float32)
    with torch.cuda.device_of(x_TD):
        first_products[(triton.cdiv(F, tiles.neurons) * token_tiles,)](
            *(x_TD, weights.up_FD, weights.gate_FD, weights.up_bias_F, weights.gate_bias_F, weights.up_scale_F, weights.gate_scale_F),
            *(selected_TE, None, None, h_TF, None),
            *(num_tokens, width, F, mask_TE.shape[1], 1, token_tiles, 1, F, 0, 0),
            *(*x_TD.stride(), *weights.up_FD.stride(), *_strides(weights.gate_FD), *selected_TE.stride()),
            **_named(activation),
            IS_RAGGED=False,
            BY_TOKEN=True,
            T_TILE=tiles.tokens,
            N_TILE=tiles.neurons,
            K_TILE=tiles.channels,
            **experts,
            RUN=_run(size, larger, tiles.neurons),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        second_products[(triton.cdiv(O, tiles.outputs), splits, token_tiles)](
            *(h_TF, weights.down_FD, selected_TE, sums_STO),
            *(num_tokens, F, O, tiles.neurons_per_split, *weights.down_FD.stride(), *selected_TE.stride()),
            T_TILE=tiles.tokens,
            K_TILE=tiles.depth,
            O_TILE=tiles.outputs,
            **experts,
            RUN=_run(size, larger, tiles.depth),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        add_splits[(num_tokens, triton.cdiv(O, tiles.outputs))](
            *(sums_STO, weights.down_scale_D, weights.down_bias_D, y_TO, num_tokens, O, splits), N_TILE=tiles.outputs, num_warps=1
        )
    return y_TO


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


def hidden(
    x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, ragged: Ragged, *, activation: str, tiles: FFNTiles, by_token: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Activations of the pairs, and what backward needs of them.

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
        first_products[(ragged.num_groups * n_tiles * row_tiles,)](
            *(x_TD, weights.up_FD, weights.gate_FD, weights.up_bias_F, weights.gate_bias_F, None, None),
            *(selected_TE, ragged.offset_G1, ragged.token_C, h, kept),
            *(num_tokens, x_TD.shape[1], F, mask_TE.shape[1], ragged.experts_per_group, row_tiles, n_tiles),
            *(h.stride(0), ragged.width, ragged.room * ragged.width),
            *(*x_TD.stride(), *weights.up_FD.stride(), *_strides(weights.gate_FD), *selected_TE.stride()),
            **_named(activation),
            IS_RAGGED=True,
            BY_TOKEN=by_token,
            T_TILE=tiles.tokens,
            N_TILE=tiles.neurons,
            K_TILE=tiles.channels,
            **ragged.experts,
            RUN=_run(ragged.size, ragged.larger, tiles.neurons),
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
        products: one or two of (rows (C, W), weight (F, O)).
    """
    (a, w), (b, v) = products[0], products[1] if len(products) > 1 else (None, None)
    O = sums_TO.shape[1]  # noqa: E741
    row_tiles, o_tiles = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(O, tiles.outputs)
    with torch.cuda.device_of(sums_TO):
        add_products[(ragged.num_groups * row_tiles * o_tiles,)](
            *(a, w, b, v, ragged.offset_G1, ragged.token_C, sums_TO),
            *(O, num_experts, ragged.experts_per_group, row_tiles, o_tiles),
            *(ragged.width, *w.stride(), *_strides(v)),
            R_TILE=tiles.tokens,
            K_TILE=tiles.depth if b is None else max(16, tiles.depth // 2),  # four operands in the memory of two
            O_TILE=tiles.outputs,
            **ragged.experts,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


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
            **_named(activation),
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
            *(*x_TD.stride(), *_strides(grad_FD)),
            BY_TOKEN=by_token,
            R_TILE=tiles.depth,
            N_TILE=tiles.neurons,
            D_TILE=tiles.outputs,
            **ragged.experts,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _run(size: int, larger: int, tile: int) -> int:
    """Neighbours of a tile that belong to one expert for certain, a power of two: so wide may loads be where a mask limits them."""
    return 1 if larger else min(size & -size, tile)


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _named(activation: str) -> dict[str, str | float]:
    """The function and, of a shifted ReLU, its threshold."""
    name, _, threshold = activation.partition(":")
    return {"ACTIVATION": name, "THRESHOLD": float(threshold or 0)}


FUNCTIONS = (
    *("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "gelu_10"),
    "shifted_relu",
)
"""What `act` and `act_grad` compute."""


@triton.jit
def act(z, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr):
    """The activation, in fp32."""
    if ACTIVATION == "relu":
        y = tl.where(z < 0, 0.0, z)  # not a maximum: what is no number stays
    elif ACTIVATION == "shifted_relu":
        y = tl.where(z - THRESHOLD < 0, 0.0, z - THRESHOLD)
    elif ACTIVATION == "relu2":
        y = tl.where(z < 0, 0.0, z * z)
    elif ACTIVATION == "relu6":
        y = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z < 0, 0.01 * z, z)
    elif ACTIVATION == "silu":
        y = z * _sigmoid(z)
    elif ACTIVATION == "quick_gelu":
        y = z * _sigmoid(1.702 * z)
    elif ACTIVATION == "gelu_tanh":
        y = z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 1 + tanh(u) = 2 sigmoid(2 u)
    elif ACTIVATION == "mish":
        y = z * _tanh_softplus(z)
    elif ACTIVATION == "hardswish":
        y = z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3)) / 6
    else:
        tl.static_assert(ACTIVATION == "gelu" or ACTIVATION == "gelu_10", "no such activation")
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
        if ACTIVATION == "gelu_10":
            y = tl.where(y < -10, -10.0, tl.where(y > 10, 10.0, y))
    return y


@triton.jit
def act_grad(z, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr):
    """Its derivative, in fp32; at kinks PyTorch's."""
    if ACTIVATION == "relu":
        g = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "shifted_relu":
        g = tl.where(z - THRESHOLD > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        g = tl.where(z > 0, 2 * z, 0.0)
    elif ACTIVATION == "relu6":
        g = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(z > 0, 1.0, 0.01)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        g = s * (1 + z * (1 - s))
    elif ACTIVATION == "quick_gelu":
        s = _sigmoid(1.702 * z)
        g = s * (1 + 1.702 * z * (1 - s))
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        g = s * (1 + z * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z))
    elif ACTIVATION == "mish":
        t = _tanh_softplus(z)
        g = t + z * (1 - t * t) * _sigmoid(z)
    elif ACTIVATION == "hardswish":
        g = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3 + 0.5))
    else:
        tl.static_assert(ACTIVATION == "gelu" or ACTIVATION == "gelu_10", "no such activation")
        below = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        g = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
        if ACTIVATION == "gelu_10":
            g = tl.where((z * below >= -10) & (z * below <= 10), g, 0.0)
    return g


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _tanh_softplus(z):
    e = tl.exp(tl.where(z > 20, 20.0, z))  # from there on 1 in fp32
    n = e * (e + 2)
    return n / (n + 2)


@triton.jit
def _expert_of(neuron, SIZE: tl.constexpr, LARGER: tl.constexpr):
    expert = neuron // SIZE
    if LARGER > 0:
        edge = LARGER * (SIZE + 1)
        expert = tl.where(neuron < edge, neuron // (SIZE + 1), LARGER + (neuron - edge) // SIZE)
    return expert


@triton.jit
def _first_neuron(expert, SIZE: tl.constexpr, LARGER: tl.constexpr):
    first = expert * SIZE
    if LARGER > 0:
        first += tl.minimum(expert, LARGER)
    return first


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


@triton.jit
def first_products(
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
    num_tokens,
    width,
    num_neurons,
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
    IS_RAGGED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """A tile of hidden activations: of tokens and neurons in order, or of one group's pairs and neurons."""
    row_tile = tl.program_id(0) % row_tiles
    n_tile = tl.program_id(0) // row_tiles
    if IS_RAGGED:
        group = n_tile // n_tiles
        first_expert = group * experts_per_group
        group_start = _first_neuron(first_expert, SIZE, LARGER)
        last_neuron = _first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER)
        last_row = tl.load(offset_ptr + group + 1)
        first_row = tl.load(offset_ptr + group) + row_tile * T_TILE
        n_N = group_start + (n_tile % n_tiles) * N_TILE + tl.arange(0, N_TILE)
        row_T = first_row + tl.arange(0, T_TILE)
        if first_row >= last_row:
            return
        there_T = row_T < last_row
        t_T = tl.load(token_ptr + row_T, mask=there_T, other=0).to(tl.int64)
    else:
        group_start = 0
        last_neuron = num_neurons
        n_N = n_tile * N_TILE + tl.arange(0, N_TILE)
        row_T = row_tile * T_TILE + tl.arange(0, T_TILE)
        there_T = row_T < num_tokens
        t_T = row_T.to(tl.int64)
    there_N = n_N < last_neuron
    wide_N = n_N.to(tl.int64)
    mask_N_ptr = mask_ptr + _expert_of(n_N, SIZE, LARGER) * mask_stride_e
    if T_TILE == 1:  # in one dimension, summed across channels at the end: of (1, K), every thread would load all of x
        t = row_tile.to(tl.int64)
        keep_N = tl.max_constancy(tl.load(mask_N_ptr + t * mask_stride_t, mask=there_N, other=0) != 0, [RUN])
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
        up_TN = tl.sum(up_NK, axis=1)[None, :]
        gate_TN = tl.sum(gate_NK, axis=1)[None, :]
        keep_TN = keep_N[None, :]
    else:
        keep_TN = tl.load(mask_N_ptr[None, :] + (t_T * mask_stride_t)[:, None], mask=there_T[:, None] & there_N[None, :], other=0) != 0
        read_N = tl.max_constancy(tl.max(keep_TN.to(tl.int32), axis=0) > 0, [RUN])
        if not IS_RAGGED:  # noqa: SIM102 (one of the two is constant). Of a group, zeros are written for experts that nobody selects
            if tl.max(read_N.to(tl.int32), axis=0) == 0:
                return
        up_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
        gate_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
        for start in range(0, width, K_TILE):
            k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
            there_K = k_K < width
            x_TK = tl.load(
                x_ptr + (t_T * x_stride_t)[:, None] + (k_K * x_stride_d)[None, :], mask=there_T[:, None] & there_K[None, :], other=0
            )
            read_KN = there_K[:, None] & read_N[None, :]
            w_KN = tl.load(up_ptr + (k_K * up_stride_d)[:, None] + (wide_N * up_stride_f)[None, :], mask=read_KN, other=0)
            up_TN = tl.dot(x_TK, w_KN.to(x_TK.dtype), up_TN, input_precision="ieee")
            if gate_ptr is not None:
                w_KN = tl.load(gate_ptr + (k_K * gate_stride_d)[:, None] + (wide_N * gate_stride_f)[None, :], mask=read_KN, other=0)
                gate_TN = tl.dot(x_TK, w_KN.to(x_TK.dtype), gate_TN, input_precision="ieee")
    if up_scale_ptr is not None:
        up_TN *= tl.load(up_scale_ptr + n_N, mask=there_N, other=0)[None, :]
    if up_bias_ptr is not None:
        up_TN += tl.load(up_bias_ptr + n_N, mask=there_N, other=0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        if gate_scale_ptr is not None:
            gate_TN *= tl.load(gate_scale_ptr + n_N, mask=there_N, other=0)[None, :]
        if gate_bias_ptr is not None:
            gate_TN += tl.load(gate_bias_ptr + n_N, mask=there_N, other=0).to(tl.float32)[None, :]
        h_TN = act(gate_TN, ACTIVATION, THRESHOLD) * up_TN
    else:
        h_TN = act(up_TN, ACTIVATION, THRESHOLD)
    there_TN = there_T[:, None] & there_N[None, :]
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
def second_products(
    h_ptr,
    down_ptr,
    mask_ptr,
    sums_ptr,
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
    SIZE: tl.constexpr,
    LARGER: tl.constexpr,
    RUN: tl.constexpr,
):
    """One split's sums for a tile of outputs and tokens. What a token does not select is never read, of h nor of the weights."""
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
            at_K_ptr = mask_ptr + t * mask_stride_t + _expert_of(k_K, SIZE, LARGER) * mask_stride_e
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
            at_TK_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (_expert_of(k_K, SIZE, LARGER) * mask_stride_e)[None, :]
            keep_TK = tl.load(at_TK_ptr, mask=there_T[:, None] & (k_K < last)[None, :], other=0) != 0
            keep_TK = tl.max_constancy(keep_TK, [1, RUN])
            read_K = tl.max_constancy(tl.max(keep_TK.to(tl.int32), axis=0) > 0, [RUN])
            h_TK = tl.load(h_ptr + (t_T * num_neurons)[:, None] + wide_K[None, :], mask=keep_TK, other=0)
            down_KO_ptr = down_ptr + (wide_K * down_stride_f)[:, None] + (wide_O * down_stride_o)[None, :]
            w_KO = tl.load(down_KO_ptr, mask=read_K[:, None] & there_O[None, :], other=0)
            sums_TO = tl.dot(h_TK, w_KO.to(h_TK.dtype), sums_TO, input_precision="ieee")
    out_TO_ptr = sums_ptr + ((split * num_tokens + t_T) * num_outputs)[:, None] + wide_O[None, :]
    tl.store(out_TO_ptr, sums_TO, mask=there_T[:, None] & there_O[None, :])


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
    group_start = _first_neuron(first_expert, SIZE, LARGER)
    neurons = _first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER) - group_start
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
        sums_RO = tl.dot(a_RK, w_KO, sums_RO, input_precision="ieee")
        if b_ptr is not None:
            b_RK = tl.load(b_ptr + at_RK, mask=there_RK, other=0)
            v_KO = tl.load(v_ptr + (j_K * v_stride_f)[:, None] + (wide_O * v_stride_o)[None, :], mask=there_KO, other=0)
            sums_RO = tl.dot(b_RK, v_KO, sums_RO, input_precision="ieee")
    out_RO_ptr = sums_ptr + (t_R * num_outputs)[:, None] + wide_O[None, :]
    tl.atomic_add(out_RO_ptr, sums_RO, mask=there_R[:, None] & there_O[None, :], sem="relaxed")


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
    group_start = _first_neuron(first_expert, SIZE, LARGER)
    last_neuron = _first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER)
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
    mask_TN_ptr = mask_ptr + (t_T * mask_stride_t)[:, None] + (_expert_of(n_N, SIZE, LARGER) * mask_stride_e)[None, :]
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
    group_start = _first_neuron(first_expert, SIZE, LARGER)
    last_neuron = _first_neuron(tl.minimum(first_expert + experts_per_group, num_experts), SIZE, LARGER)
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
