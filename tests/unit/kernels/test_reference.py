"""The oracle's own gradients, by finite differences."""

import pytest
import torch
from ffn_cases import map_weights, random_ffn, random_plan, tensors_of

from moeify.kernels import masked, reference
from moeify.sites.formula import ffn_dense
from moeify.sites.site import FFNWeights

IMPLS = {"reference": reference.moe_ffn, "masked": masked.moe_ffn}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("activation", "gated", "biased"), [("gelu", False, True), ("silu", True, False), ("silu", True, True)])
def test_gradcheck(impl, activation, gated, biased):
    weights = map_weights(random_ffn(3, 7, gated=gated, biased=biased, dtype=torch.float64), torch.Tensor.requires_grad_)
    names = [name for name, t in vars(weights).items() if t is not None]
    x_TD, plan = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), random_plan(4, 3, 0.6)

    def function(x, *tensors):
        return IMPLS[impl](x, FFNWeights(**dict(zip(names, tensors, strict=True))), plan, activation=activation)

    assert torch.autograd.gradcheck(function, (x_TD, *tensors_of(weights)))


def test_reference_when_all_experts_run_equals_dense():
    weights, x_TD = random_ffn(16, 30, gated=True, biased=True, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    out = reference.moe_ffn(x_TD, weights, random_plan(5, 4, 1.0), activation="silu")
    torch.testing.assert_close(out, ffn_dense(x_TD, weights, activation="silu"))


def test_reference_when_a_token_has_no_expert_gives_the_output_bias():
    weights = random_ffn(8, 12, biased=True)
    assert reference.moe_ffn(torch.randn(2, 8), weights, random_plan(2, 3, 0.0), activation="relu").equal(weights.down_bias_D.expand(2, 8))
