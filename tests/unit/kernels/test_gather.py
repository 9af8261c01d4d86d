"""What is special to the gathered kernel: it reads the experts that are needed and no other."""

import pytest
import torch
from ffn_cases import map_weights, random_ffn
from numerics import assert_as_accurate_as_torch

from moeify.kernels import build_plan, gather, masked
from moeify.kernels.plan import neuron_mask


@pytest.mark.parametrize("F", [pytest.param(24, id="even split"), pytest.param(26, id="experts differ by one neuron")])
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_gather_never_reads_experts_that_no_token_needs(F, conv1d):
    weights, mask_TE = random_ffn(8, F, gated=True, conv1d=conv1d), torch.zeros(3, 6, dtype=torch.bool)
    mask_TE[0, 1] = mask_TE[2, 4] = True
    x_TD, plan = torch.randn(3, 8), build_plan(mask_TE)
    expected = masked.moe_ffn(x_TD, weights, plan, activation="silu")
    idle = [j for j in range(F) if not neuron_mask(mask_TE, F)[:, j].any()]
    for tensor in weights.per_neuron():
        tensor[idle] = float("nan")
    out = gather.moe_ffn(x_TD, weights, plan, activation="silu")
    exact = gather.moe_ffn(x_TD.double(), map_weights(weights, torch.Tensor.double), plan, activation="silu")
    assert_as_accurate_as_torch(out, oracle=exact, baseline=expected)
