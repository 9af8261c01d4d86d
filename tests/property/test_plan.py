"""Any mask becomes a plan and back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.kernels.plan import build_plan


@st.composite
def masks(draw):
    T, E = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=T * E, max_size=T * E)), dtype=torch.bool).view(T, E)


@settings(deadline=None)
@given(masks())
def test_plan_of_any_mask_lists_each_pair_once_in_order(mask_TE):
    plan = build_plan(mask_TE)
    rebuilt_TE = torch.zeros_like(mask_TE)
    offsets = plan.offsets_E1.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == plan.num_pairs == int(mask_TE.sum())
    for e in range(plan.num_experts):
        tokens = plan.token_N[offsets[e] : offsets[e + 1]]
        assert tokens.diff().gt(0).all(), "tokens of an expert ascend"
        rebuilt_TE[tokens, e] = True
    assert rebuilt_TE.equal(mask_TE)
    assert rebuilt_TE.t().nonzero()[:, 0].equal(plan.expert_N())


@settings(deadline=None)
@given(masks())
def test_plan_of_a_strided_mask_is_the_same(mask_TE):
    strided = mask_TE.t().contiguous().t()
    assert build_plan(strided).token_N.equal(build_plan(mask_TE).token_N)
