"""Random FFNs and the loop that every kernel is compared with."""

import pytest
import torch
from torch import Tensor

from moeify.kernels import DispatchPlan, build_plan, cpu
from moeify.sites.formula import ACTIVATIONS
from moeify.sites.site import FFNWeights, expert_bounds

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
CPU_REGIMES = pytest.mark.parametrize(
    ("T", "E", "F", "D", "keep"),
    [
        pytest.param(1, 6, 50, 40, 0.5, id="decode: one token, odd expert size"),
        pytest.param(4, 3, 200, 64, 0.7, id="decode: four tokens, experts of more than one chunk"),
        pytest.param(23, 16, 128, 96, 0.3, id="small batch: tails of tiles"),
        pytest.param(64, 5, 5, 33, 0.5, id="small batch: experts of one neuron, unaligned width"),
        pytest.param(65, 9, 100, 70, 0.25, id="prefill: just above the small batch"),
        pytest.param(333, 24, 192, 160, 0.15, id="prefill: blocks of unequal size, some experts without tokens"),
        pytest.param(70, 4, 64, 1600, 0.5, id="prefill: rows longer than a panel"),
        pytest.param(70, 2, 12, 4096, 0.9, id="prefill: rows that share the sets of the first cache, copied"),
    ],
)
"""Each code path of the compiled kernels, by the regime that it is."""


def random_ffn(D, F, *, gated=False, biased=False, dtype=torch.float32, conv1d=False):
    """Weights stored as HF does: nn.Linear (down is a transposed view) or Conv1D (up and gate are)."""

    def matrix(rows, columns, transposed):
        weight = torch.randn((columns, rows) if transposed else (rows, columns), dtype=torch.float64) / rows**0.5
        return (weight.t() if transposed else weight).to(dtype)

    return FFNWeights(
        up_FD=matrix(F, D, conv1d),
        down_FD=matrix(F, D, not conv1d),
        gate_FD=matrix(F, D, conv1d) if gated else None,
        up_bias_F=torch.randn(F).to(dtype) if biased else None,
        gate_bias_F=torch.randn(F).to(dtype) if biased and gated else None,
        down_bias_D=torch.randn(D).to(dtype) if biased else None,
    )


def tensors_of(weights: FFNWeights) -> list[Tensor]:
    return [t for t in vars(weights).values() if t is not None]


def map_weights(weights: FFNWeights, function) -> FFNWeights:
    return FFNWeights(**{name: None if t is None else function(t) for name, t in vars(weights).items()})


def random_plan(T, E, keep) -> DispatchPlan:
    return build_plan(torch.rand(T, E) < keep)


def loop_over_tokens(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str) -> Tensor:
    """One token and one expert at a time, straight from the formula."""
    bounds = expert_bounds(weights.up_FD.shape[0], mask_TE.shape[1])
    act = ACTIVATIONS[activation]
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = x_TD.new_zeros(weights.down_FD.shape[1]) if weights.down_bias_D is None else weights.down_bias_D
        for e in range(mask_TE.shape[1]):
            if mask_TE[t, e]:
                s = slice(bounds[e], bounds[e + 1])
                up = weights.up_FD[s] @ x_TD[t] + (0 if weights.up_bias_F is None else weights.up_bias_F[s])
                if weights.gate_FD is None:
                    hidden = act(up)
                else:
                    hidden = act(weights.gate_FD[s] @ x_TD[t] + (0 if weights.gate_bias_F is None else weights.gate_bias_F[s])) * up
                y_D = y_D + hidden @ weights.down_FD[s]
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, weights.down_FD.shape[1])
