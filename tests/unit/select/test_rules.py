"""Every rule by hand: the rule itself, ties, zeros, NaN, one expert; its knob's range; JSON."""

import json

import pytest
import torch

from moeify._config import from_tagged, to_dict
from moeify.errors import ConfigError
from moeify.select import RULES, DynKMass, DynKMax, NormBudget, Threshold, TopK

NAN, INF = float("nan"), float("inf")

BY_HAND = [
    pytest.param(TopK(k=2), [4.0, 1.0, 3.0, 2.0], [1, 0, 1, 0], id="topk: the two largest"),
    pytest.param(TopK(k=2), [1.0, 2.0, 1.0, 1.0], [1, 1, 0, 0], id="topk: of equal scores the lowest expert"),
    pytest.param(TopK(k=2), [0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0], id="topk: zeros are ties"),
    pytest.param(TopK(k=1), [-3.0, -1.0, -2.0, -4.0], [0, 1, 0, 0], id="topk: any sign"),
    pytest.param(TopK(k=9), [1.0, 2.0], [1, 1], id="topk: more than there are"),
    pytest.param(TopK(k=1), [1.0, NAN, 2.0], [0, 1, 0], id="topk: NaN counts as the largest"),
    pytest.param(DynKMax(tau=0.5), [4.0, 1.0, 2.0, 1.9], [1, 0, 1, 0], id="dynk_max: at least half of the largest, equality kept"),
    pytest.param(DynKMax(tau=1.0), [4.0, 1.0, 4.0, 3.9], [1, 0, 1, 0], id="dynk_max: 1 keeps what shares the maximum"),
    pytest.param(DynKMax(tau=0.0), [4.0, 0.0, 1.0, 2.0], [1, 1, 1, 1], id="dynk_max: 0 keeps all"),
    pytest.param(DynKMax(tau=0.5), [0.0, 0.0, 0.0], [1, 1, 1], id="dynk_max: a row of zeros keeps all"),
    pytest.param(DynKMax(tau=0.5), [1.0, NAN, 0.0], [1, 1, 1], id="dynk_max: NaN keeps all"),
    pytest.param(DynKMax(tau=0.5), [1.0, INF, 0.0], [0, 1, 0], id="dynk_max: infinite keeps itself"),
    pytest.param(DynKMax(tau=0.5), [-2.0, -1.0, -3.0], [0, 1, 0], id="dynk_max: below zero keeps the best"),
    pytest.param(DynKMass(mass=0.6), [1.0, 5.0, 3.0, 1.0], [0, 1, 1, 0], id="dynk_mass: 0.5 is short of 0.6, 0.8 is not"),
    pytest.param(DynKMass(mass=0.5), [1.0, 5.0, 3.0, 1.0], [0, 1, 0, 0], id="dynk_mass: exactly reached"),
    pytest.param(DynKMass(mass=0.85), [1.0, 5.0, 3.0, 1.0], [1, 1, 1, 0], id="dynk_mass: of equal scores the lowest expert"),
    pytest.param(DynKMass(mass=0.0), [1.0, 5.0, 3.0, 1.0], [0, 1, 0, 0], id="dynk_mass: 0 keeps the best"),
    pytest.param(DynKMass(mass=1.0), [1.0, 5.0, 0.0, 0.0], [1, 1, 1, 1], id="dynk_mass: 1 keeps all"),
    pytest.param(DynKMass(mass=0.5), [0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0], id="dynk_mass: in a row of zeros all are equal"),
    pytest.param(DynKMass(mass=0.5), [1.0, NAN, 3.0], [1, 1, 1], id="dynk_mass: NaN keeps all"),
    pytest.param(DynKMass(mass=0.9), [-5.0, 4.0, -1.0], [0, 1, 0], id="dynk_mass: below zero counts as zero"),
    # joint norms of the sorted prefixes over that of all: 3 4 12 of 13: 0.923, 0.973, 1; half-way 0.948, 0.987
    pytest.param(NormBudget(beta=0.94), [3.0, 4.0, 12.0], [0, 0, 1], id="norm_budget: 0.923 is nearer than 0.973"),
    pytest.param(NormBudget(beta=0.95), [3.0, 4.0, 12.0], [0, 1, 1], id="norm_budget: 0.973 is nearer than 0.923"),
    pytest.param(NormBudget(beta=0.99), [3.0, 4.0, 12.0], [1, 1, 1], id="norm_budget: all are nearest"),
    pytest.param(NormBudget(beta=0.0), [3.0, 4.0, 12.0], [0, 0, 1], id="norm_budget: 0 keeps the best"),
    pytest.param(NormBudget(beta=0.99), [4.0, 3.0, 0.0], [1, 1, 0], id="norm_budget: what adds nothing is left out"),
    pytest.param(NormBudget(beta=1.0), [4.0, 3.0, 0.0], [1, 1, 1], id="norm_budget: 1 keeps all"),
    pytest.param(NormBudget(beta=0.7), [1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0], id="norm_budget: of equal scores the lowest experts"),
    pytest.param(NormBudget(beta=0.7), [0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0], id="norm_budget: in a row of zeros all are equal"),
    pytest.param(NormBudget(beta=0.5), [1.0, NAN, 3.0], [1, 1, 1], id="norm_budget: NaN keeps all"),
    pytest.param(NormBudget(beta=0.9), [-5.0, 4.0, -1.0], [0, 1, 0], id="norm_budget: below zero counts as zero"),
    pytest.param(NormBudget(beta=0.95), [3e-30, 4e-30, 1e-33], [1, 1, 0], id="norm_budget: squares below fp32"),
    pytest.param(Threshold(theta=2.0), [4.0, 1.0, 2.0, 1.9], [1, 0, 1, 0], id="threshold: at least theta, equality kept"),
    pytest.param(Threshold(theta=9.0), [4.0, 1.0, 2.0, 4.0], [1, 0, 0, 1], id="threshold: always the best, shared"),
    pytest.param(Threshold(theta=0.0), [0.0, 1.0], [1, 1], id="threshold: 0 keeps all"),
    pytest.param(Threshold(theta=9.0), [1.0, NAN], [1, 1], id="threshold: NaN keeps all"),
]


@pytest.mark.parametrize(("rule", "scores", "mask"), BY_HAND)
def test_rule_by_hand(rule, scores, mask):
    assert rule(torch.tensor([scores])).int().tolist() == [mask]


@pytest.mark.parametrize(("rule", "scores", "mask"), BY_HAND)
def test_critical_by_hand_says_the_same_as_the_rule(rule, scores, mask):
    if rule in (DynKMass(mass=1.0), NormBudget(beta=1.0)):
        pytest.skip("1 runs all experts whatever the sum")
    critical = rule.critical(torch.tensor([scores]))
    switched = critical < rule.value if rule.grows else critical >= rule.value
    assert switched.int().tolist() == [mask]


@pytest.mark.parametrize(
    "rule", [TopK(k=1), DynKMax(tau=0.3), DynKMass(mass=0.3), NormBudget(beta=0.3), Threshold(theta=1.0)], ids=lambda r: r.name
)
def test_rule_of_one_expert_runs_it_and_of_no_token_gives_no_row(rule):
    assert rule(torch.tensor([[0.5], [0.0]])).all()
    assert rule(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "rule", [TopK(k=2), DynKMax(tau=0.3), DynKMass(mass=0.3), NormBudget(beta=0.3), Threshold(theta=1.0)], ids=lambda r: r.name
)
@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)])
def test_rule_when_scores_are_no_matrix_says_what_it_got(rule, scores):
    with pytest.raises(ValueError, match="2-D floating tensor"):
        rule(scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_of_half_scores_compares_in_fp32(dtype):
    scores_TE = torch.tensor([[1.0, 0.5, 0.25]], dtype=dtype)
    assert DynKMax(tau=0.5001)(scores_TE).tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: TopK(k=0), "at least 1, got 0", id="topk"),
        pytest.param(lambda: DynKMax(tau=1.01), r"in \[0, 1\], got 1.01", id="dynk_max above"),
        pytest.param(lambda: DynKMax(tau=NAN), "got nan", id="dynk_max NaN"),
        pytest.param(lambda: DynKMass(mass=-0.1), r"in \[0, 1\], got -0.1", id="dynk_mass below"),
        pytest.param(lambda: NormBudget(beta=1.5), r"in \[0, 1\], got 1.5", id="norm_budget above"),
        pytest.param(lambda: Threshold(theta=-1.0), "at least 0, got -1.0", id="threshold below"),
        pytest.param(lambda: Threshold(theta=INF), "finite", id="threshold infinite"),
        pytest.param(lambda: DynKMax.from_d2dmoe_tau(1.5), "got 1.5", id="their tau"),
        pytest.param(lambda: TopK(k=3).with_value(2.5), "must be int, got 2.5", id="half an expert"),
        pytest.param(lambda: DynKMax(tau=0.1).with_value(2), "got 2", id="with_value"),
    ],
)
def test_knob_when_out_of_range_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_norm_budget_is_the_nearest_prefix_and_mass_of_squares_reaches_it_with_one_more_at_most():
    scores_TE = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)) ** 3
    more = set()
    for beta in (0.3, 0.6, 0.9, 0.97):
        mask_TE = NormBudget(beta=beta)(scores_TE)
        sorted_TE = scores_TE.double().sort(dim=1, descending=True).values
        norms_TE = sorted_TE.square().cumsum(1).sqrt()
        nearest_T = (norms_TE - beta * norms_TE[:, -1:]).abs().argmin(1) + 1
        assert mask_TE.sum(1).tolist() == nearest_T.tolist()
        more |= set((DynKMass(mass=beta**2)(scores_TE.square()).sum(1) - mask_TE.sum(1)).tolist())
    assert more == {0, 1}


def test_from_d2dmoe_tau_turns_the_direction():
    assert DynKMax.from_d2dmoe_tau(0.75) == DynKMax(tau=0.25)


def test_with_value_of_a_whole_float_counts_experts():
    assert TopK(k=1).with_value(3.0) == TopK(k=3)


@pytest.mark.parametrize("name", RULES)
def test_table_name_is_the_class_name_and_json_round_trips(name):
    rule = RULES[name].at(1)
    assert rule.name == name
    assert rule.value == 1
    assert from_tagged(RULES, json.loads(json.dumps(to_dict(rule)))) == rule
    assert RULES[name].bounds[0] <= rule.value <= RULES[name].bounds[1]
