"""Calibration: what it reports is what the rules do, and the nearest to the target that can be reached."""

import pytest
import torch

from moeify.errors import ConfigError
from moeify.select import RULES, DynKMax, Threshold, TopK
from moeify.select.calibrate import Calibrator, calibrate

TARGETS = [0.1, 0.35, 0.5, 0.75, 1.0]


@pytest.fixture
def scores():
    """Three layers of different concentration; the last has fewer experts."""
    return {f"layer{i}": (torch.randn(200, E).abs() ** p) * 10**i for i, (p, E) in enumerate([(0.3, 24), (1.0, 24), (3.0, 16)])}


def measured(calibrated, scores, *, weights=None, always_on=None):
    """Active fractions of the rules themselves."""
    own = {}
    for name, scores_TE in scores.items():
        mask_TE = calibrated.rules[name](scores_TE)
        mask_TE[:, list((always_on or {}).get(name, ()))] = True
        own[name] = mask_TE.float().mean().item()
    weights = weights or dict.fromkeys(scores, 1.0)
    return own, sum(weights[n] * own[n] for n in own) / sum(weights.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", RULES)
def test_calibrate_reports_what_the_rules_do_and_reaches_the_target(scores, name, scope, target):
    weights, always_on = {"layer0": 96.0, "layer1": 96.0, "layer2": 64.0}, {"layer1": (3,)}
    got = calibrate(RULES[name], scores, target_active=target, scope=scope, weights=weights, always_on=always_on)
    own, mean = measured(got, scores, weights=weights, always_on=always_on)
    assert got.per_layer == pytest.approx(own, abs=1e-6)
    assert got.active_fraction == pytest.approx(mean, abs=1e-6)
    # a whole k is at most half an expert off; one layer's k less than a third of that
    assert got.active_fraction == pytest.approx(target, abs=1e-3 if name != "topk" else 0.5 / 16)
    if scope == "layer":
        assert list(own.values()) == pytest.approx([target] * 3, abs=2e-3 if name != "topk" else 0.5 / 16 + 0.01)
    elif name != "topk":
        assert got.rule is not None, "one knob for all layers"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_calibrate_is_monotone_in_the_target(scores, name, scope):
    calibrator = Calibrator(RULES[name], scores)
    reached = [calibrator.solve(target, scope=scope).active_fraction for target in TARGETS]
    assert reached == sorted(reached)


def test_calibrate_topk_when_global_mixes_whole_k():
    scores = {str(i): torch.rand(50, 10) for i in range(8)}
    got = calibrate(TopK, scores, target_active=0.4625, scope="global")
    assert sorted(rule.k for rule in got.rules.values()) == [4, 4, 4, 5, 5, 5, 5, 5]
    assert got.active_fraction == pytest.approx(0.4625)
    assert got.rule is None


@pytest.mark.parametrize(("target", "reached"), [(0.3, 0.25), (0.6, 0.5), (0.8, 1.0), (0.01, 0.25)])
def test_calibrate_when_scores_tie_takes_the_nearest_reachable(target, reached):
    tied = {"a": torch.tensor([[4.0, 2.0, 1.0, 1.0]] * 5)}
    for scope in ("layer", "global"):
        assert calibrate(DynKMax, tied, target_active=target, scope=scope).active_fraction == reached


def test_calibrate_when_all_scores_are_equal_runs_everything():
    for rule_type in (DynKMax, Threshold):
        assert calibrate(rule_type, {"a": torch.ones(4, 3)}, target_active=0.5).active_fraction == 1.0


def test_calibrate_of_chunks_equals_calibrate_of_the_whole(scores):
    chunks = {name: s.split(64) for name, s in scores.items()}
    assert calibrate(DynKMax, chunks, target_active=0.3) == calibrate(DynKMax, scores, target_active=0.3)


def test_calibrate_when_always_on_exceeds_the_target_runs_one_more_at_most(scores):
    got = calibrate(DynKMax, scores, target_active=0.1, always_on={"layer0": range(12)})
    assert 0.5 <= got.per_layer["layer0"] <= 0.55


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"target_active": 0.0}, r"in \(0, 1\], got 0.0", id="nothing"),
        pytest.param({"target_active": 1.2}, "got 1.2", id="more than all"),
        pytest.param({"target_active": 0.5, "scope": "model"}, "'layer' or 'global', got 'model'", id="scope"),
        pytest.param({"target_active": 0.5, "weights": {"b": 1.0}}, "weights names the layer 'b'", id="foreign weights"),
        pytest.param({"target_active": 0.5, "always_on": {"b": (0,)}}, "always_on names the layer 'b'", id="foreign always_on"),
    ],
)
def test_calibrate_when_an_argument_is_wrong_says_so(arguments, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(DynKMax, {"a": torch.rand(3, 4)}, **arguments)


def test_calibrate_without_scores_is_refused():
    with pytest.raises(ConfigError, match="at least one layer"):
        calibrate(DynKMax, {}, target_active=0.5)
    with pytest.raises(ConfigError, match="'a' has no scores"):
        calibrate(DynKMax, {"a": torch.zeros(0, 4)}, target_active=0.5)
