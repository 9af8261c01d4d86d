"""What kernels of experts share: which neurons an expert has, the first products of a tile of neurons, activations and their derivatives.

Letters: T tokens, N neurons, K input channels; as suffixes within kernels, tiles of them.
"""

import triton
import triton.language as tl
from torch import Tensor


def strides(matrix: Tensor | None) -> tuple[int, ...]:
    """Of a matrix that there may not be."""
    return (0, 0) if matrix is None else matrix.stride()


def run_of(size: int, larger: int, tile: int) -> int:
    """Neighbours of a tile that belong to one expert for certain, a power of two: so wide may loads be where a mask limits them."""
    return 1 if larger else min(size & -size, tile)


def named(activation: str) -> dict[str, str | float]:
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
def expert_of(neuron, SIZE: tl.constexpr, LARGER: tl.constexpr):
    """Whose neuron it is; the first LARGER experts have SIZE + 1, the others SIZE."""
    expert = neuron // SIZE
    if LARGER > 0:
        edge = LARGER * (SIZE + 1)
        expert = tl.where(neuron < edge, neuron // (SIZE + 1), LARGER + (neuron - edge) // SIZE)
    return expert


@triton.jit
def first_neuron(expert, SIZE: tl.constexpr, LARGER: tl.constexpr):
    """Where an expert begins; of the expert after the last one, the number of neurons."""
    first = expert * SIZE
    if LARGER > 0:
        first += tl.minimum(expert, LARGER)
    return first


@triton.jit
def pre_activations(
    x_ptr,
    up_ptr,
    gate_ptr,
    t_T,
    there_T,
    wide_N,
    read_N,
    width,
    x_stride_t,
    x_stride_d,
    up_stride_f,
    up_stride_d,
    gate_stride_f,
    gate_stride_d,
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    """x up and x gate (zeros without one) of a tile of tokens and neurons, by matrix instructions; weights where ``read_N``."""
    up_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
    gate_TN = tl.zeros((T_TILE, N_TILE), tl.float32)
    for start in range(0, width, K_TILE):
        k_K = (start + tl.arange(0, K_TILE)).to(tl.int64)
        there_K = k_K < width
        x_TK_ptr = x_ptr + (t_T * x_stride_t)[:, None] + (k_K * x_stride_d)[None, :]
        x_TK = tl.load(x_TK_ptr, mask=there_T[:, None] & there_K[None, :], other=0)
        read_KN = there_K[:, None] & read_N[None, :]
        w_KN = tl.load(up_ptr + (k_K * up_stride_d)[:, None] + (wide_N * up_stride_f)[None, :], mask=read_KN, other=0)
        up_TN = tl.dot(x_TK, w_KN.to(x_TK.dtype), up_TN, input_precision="ieee")
        if gate_ptr is not None:
            w_KN = tl.load(gate_ptr + (k_K * gate_stride_d)[:, None] + (wide_N * gate_stride_f)[None, :], mask=read_KN, other=0)
            gate_TN = tl.dot(x_TK, w_KN.to(x_TK.dtype), gate_TN, input_precision="ieee")
    return up_TN, gate_TN


@triton.jit
def activated(
    up_TN,
    gate_TN,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    up_scale_ptr,
    gate_scale_ptr,
    n_N,
    there_N,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """h, and up and gate as the nonlinearity got them: scaled (int8) and with biases."""
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
    return h_TN, up_TN, gate_TN
