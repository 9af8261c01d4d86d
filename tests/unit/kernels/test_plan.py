"""The CSR plan, by hand."""

import pytest
import torch

from moeify.kernels.plan import build_plan, neuron_mask
from moeify.sites.site import expert_bounds


def test_build_plan_by_hand():
    plan = build_plan(torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool))
    assert plan.token_N.tolist() == [0, 1, 1, 2]
    assert plan.offsets_E1.tolist() == [0, 2, 2, 4]
    assert plan.expert_N().tolist() == [0, 0, 2, 2]
    assert (plan.num_tokens, plan.num_experts, plan.num_pairs) == (4, 3, 4)
    assert plan.active_fraction == 4 / 12
    assert plan.offsets_E1.dtype is torch.int32


def test_build_plan_without_tokens_is_empty():
    plan = build_plan(torch.zeros(0, 3, dtype=torch.bool))
    assert plan.token_N.tolist() == []
    assert plan.offsets_E1.tolist() == [0, 0, 0, 0]
    assert plan.active_fraction == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(torch.zeros(3, dtype=torch.bool), "2-D bool tensor, got \\(3,\\)", id="1-D"),
        pytest.param(torch.zeros(3, 4), "\\(3, 4\\) torch.float32", id="float"),
        pytest.param(torch.zeros(3, 0, dtype=torch.bool), "at least one expert", id="no expert"),
    ],
)
def test_build_plan_when_mask_is_wrong_says_what_it_got(mask, message):
    with pytest.raises(ValueError, match=message):
        build_plan(mask)


def test_neuron_mask_when_split_is_even_repeats_columns():
    assert neuron_mask(torch.tensor([[True, False]]), 6).tolist() == [[True, True, True, False, False, False]]


def test_neuron_mask_when_split_is_uneven_follows_expert_bounds():
    mask_TE = torch.rand(5, 4) < 0.5
    bounds = expert_bounds(11, 4)
    expected = torch.cat([mask_TE[:, e : e + 1].expand(5, bounds[e + 1] - bounds[e]) for e in range(4)], dim=1)
    assert neuron_mask(mask_TE, 11).equal(expected)
