"""What holds for every rule on any scores: at least one expert, monotone in its knob, nothing else looked at."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.select import RULES

KNOBS = {
    "topk": st.integers(1, 8),
    "dynk_max": st.floats(0, 1),
    "dynk_mass": st.floats(0, 1),
    "norm_budget": st.floats(0, 1),
    "threshold": st.floats(0, 8),
}


@st.composite
def scores(draw):
    """Norm-like scores with many ties and zeros."""
    T, E = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    values = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 10, width=32))
    return torch.tensor(draw(st.lists(values, min_size=T * E, max_size=T * E))).view(T, E)


def test_every_rule_has_a_strategy():
    assert set(KNOBS) == set(RULES)


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(data=st.data(), scores_TE=scores())
def test_rule_runs_at_least_one_expert_and_is_monotone(name, data, scores_TE):
    low, high = sorted(data.draw(st.tuples(KNOBS[name], KNOBS[name])))
    fewer, more = RULES[name].at(low)(scores_TE), RULES[name].at(high)(scores_TE)
    if not RULES[name].grows:
        fewer, more = more, fewer
    assert fewer.any(dim=1).all()
    assert not (fewer & ~more).any(), "an expert that runs keeps running when the knob allows more"


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(data=st.data(), scores_TE=scores())
def test_rule_keeps_the_largest_scores(name, data, scores_TE):
    mask_TE = RULES[name].at(data.draw(KNOBS[name]))(scores_TE)
    kept = scores_TE.masked_fill(~mask_TE, float("inf")).amin(1)
    left = scores_TE.masked_fill(mask_TE, -1).amax(1)
    assert (kept >= left).all()


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(data=st.data(), scores_TE=scores())
def test_rule_treats_each_token_alone(name, data, scores_TE):
    rule = RULES[name].at(data.draw(KNOBS[name]))
    assert rule(scores_TE).equal(torch.cat([rule(row) for row in scores_TE.split(1)]))


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(scores_TE=scores())
def test_rule_at_the_generous_end_runs_all_experts(name, scores_TE):
    low, high = RULES[name].bounds
    generous = min(high, scores_TE.shape[1]) if RULES[name].grows else low
    assert RULES[name].at(generous)(scores_TE).all()
