"""Traces of signals in, modes out."""

import json

import pytest

from moeify import _config
from moeify.errors import CheckpointError, ConfigError
from moeify.ssd import Controller, ControllerState, Decision, Fallback, Signals, SSDConfig, decide, spike
from moeify.ssd import modes as modes_of

ADAPTIVE = SSDConfig(probe_frac=0.02, sparse_frac=0.2, final_dense_frac=0.1)  # of 100 steps: measured every 2, sparse for 20, dense from 90


def run(config, signals_of, *, steps=100):
    """Decides where it is due; ``signals_of(step, mode)`` are the measured signals."""
    controller = Controller(config, total_steps=steps)
    modes = []
    for step in range(steps):
        if controller.is_due(step):
            measured = signals_of(step, controller.mode) if controller.measures(step) else {}
            controller.decide(Signals(step=step, **measured))
        modes.append(controller.mode)
    return controller, modes


def switches(controller):
    return [(d.step, d.after, d.reason) for d in controller.log if d.before != d.after]


def healthy(step, mode):
    """Sparse from step 10 on, and the pattern stable from step 20 on; sparse phases do no harm."""
    found = {"sparsity": 0.9 if step >= 10 else 0.5, "similarity": None if step == 0 else 0.95 if step >= 20 else 0.2 + step / 50}
    return found | ({"captured": 0.6, "dense_loss": 2.0, "sparse_loss": 2.1} if mode == "sparse" else {})


def test_controller_goes_sparse_when_sparse_and_stable_back_after_a_phase_and_ends_dense():
    controller, modes = run(ADAPTIVE, healthy)
    assert switches(controller) == [
        (20, "sparse", "sparse and stable"),
        (40, "dense", "the phase has had its length"),
        (42, "sparse", "sparse and stable"),  # the similarity at 40 compares with the sparse phase and does not count
        (62, "dense", "the phase has had its length"),
        (64, "sparse", "sparse and stable"),
        (84, "dense", "the phase has had its length"),
        (86, "sparse", "sparse and stable"),  # two measurements before the end fit
        (90, "dense", "final dense phase"),
    ]
    assert modes.count("sparse") == 64
    assert controller.state.sparse_phases == 4


def test_every_decision_is_logged_with_what_it_was_made_on():
    controller, _ = run(ADAPTIVE, healthy)
    assert [d.step for d in controller.log] == sorted({*range(0, 100, 2)})
    first = next(d for d in controller.log if d.after == "sparse")
    assert first.numbers == {"sparsity": 0.9, "similarity": 0.95, "min_sparsity": 0.7, "min_similarity": 0.9, **gains(first)}
    back = next(d for d in controller.log if d.before == "sparse" and d.after == "dense")
    assert (back.numbers["lasted_steps"], back.numbers["sparse_steps"]) == (20, 20)
    assert back.numbers["loss_gap"] == pytest.approx(0.1)


def gains(decision):
    return {key: decision.numbers[key] for key in ("similarity_gain", "plateau_gain")}


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        pytest.param({"sparsity": 0.69, "similarity": 1.0}, "not sparse yet", id="not sparse"),
        pytest.param({"sparsity": float("nan"), "similarity": 1.0}, "not sparse yet", id="NaN"),
        pytest.param({"sparsity": 0.9}, "no similarity within this phase yet", id="no similarity"),
        pytest.param({}, "nothing was measured", id="nothing"),
    ],
)
def test_controller_stays_dense(signals, reason):
    state, decision = decide(ADAPTIVE, total_steps=100, state=ControllerState(step=8, measured=8), signals=Signals(step=10, **signals))
    assert (state.mode, decision.after, decision.reason) == ("dense", "dense", reason)


def test_a_settled_pattern_is_enough():
    rising = {2: 0.1, 4: 0.3, 6: 0.5, 8: 0.505, 10: 0.509}
    state = ControllerState(step=0, measured=0)
    for step, similarity in rising.items():
        signals = Signals(step=step, sparsity=0.8, similarity=similarity)
        state, decision = decide(ADAPTIVE, total_steps=100, state=state, signals=signals)
        assert decision.after == ("sparse" if step == 10 else "dense"), decision
    assert decision.reason == "sparse, and the pattern has settled"
    assert decision.numbers["similarity_gain"] == pytest.approx(0.009)


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        pytest.param({"captured": 0.53}, "the experts capture less of the activations", id="captured mass"),
        pytest.param({"dense_loss": 2.0, "sparse_loss": 2.6}, "the sparse model has fallen behind the dense one", id="loss gap"),
        pytest.param({"dense_loss": 2.0, "sparse_loss": float("nan")}, "the sparse model has fallen behind the dense one", id="NaN"),
    ],
)
def test_controller_goes_back_early(later, reason):
    state = ControllerState(mode="sparse", began=20, step=20)
    fine = {"sparsity": 0.9, "captured": 0.6, "dense_loss": 2.0, "sparse_loss": 2.4}
    state, decision = decide(ADAPTIVE, total_steps=100, state=state, signals=Signals(step=22, **fine))
    assert (decision.after, decision.reason) == ("sparse", "stays sparse")
    state, decision = decide(ADAPTIVE, total_steps=100, state=state, signals=Signals(step=24, **fine | later))
    assert (decision.after, decision.reason) == ("dense", reason)
    assert state == ControllerState(began=24, step=24, measured=24)


def test_final_phases_come_whatever_is_measured():
    config = SSDConfig(probe_frac=0.1, final_dense_frac=0.15, final_sparse_frac=0.25)
    controller, modes = run(config, lambda step, mode: {"sparsity": 0.0})
    assert modes == ["dense"] * 75 + ["sparse"] * 25
    assert switches(controller) == [(75, "sparse", "final sparse phase")]


def test_phases_of_known_length_end_between_measurements():
    config = SSDConfig(probe_frac=0.1, sparse_frac=0.07, final_dense_frac=0.15)
    controller, _ = run(config, lambda step, mode: {"sparsity": 0.9, "similarity": 0.99, "captured": 0.5})
    assert [(step, mode) for step, mode, _ in switches(controller)] == [(10, "sparse"), (17, "dense"), (30, "sparse"), (37, "dense"),
        (50, "sparse"), (57, "dense")]  # fmt: skip


@pytest.mark.parametrize(
    ("at", "sparse"),
    [((0.0,), range(100)), ((0.3,), range(30, 100)), ((0.1, 0.4, 0.5, 0.95), [*range(10, 40), *range(50, 95)])],
    ids=["sparse only", "one switch", "several"],
)
def test_a_fixed_schedule_looks_at_the_step_alone(at, sparse):
    config = SSDConfig(schedule="fixed", switches=at)
    _, modes = run(config, lambda step, mode: {"sparsity": 0.0})
    assert [step for step, mode in enumerate(modes) if mode == "sparse"] == list(sparse)


def test_controller_goes_on_from_its_json_to_the_same_decisions():
    whole, _ = run(ADAPTIVE, healthy)
    controller, first = run(ADAPTIVE, healthy), Controller(ADAPTIVE, total_steps=100)
    assert controller[0].log == whole.log  # the same signals, the same decisions
    for step in range(100):
        if step == 43:
            data = json.loads(json.dumps(first.to_dict()))
            first = Controller(ADAPTIVE, total_steps=100)
            first.load(data)
        if first.is_due(step):
            first.decide(Signals(step=step, **healthy(step, first.mode)))
            assert not first.is_due(step)  # decided
    assert (first.log, first.state) == (whole.log, whole.state)
    with pytest.raises(CheckpointError, match=r"controller's state is damaged.*mod"):
        first.load(data | {"state": {"mod": "dense"}})


@pytest.mark.parametrize("value", [ADAPTIVE, ControllerState(similarities=(0.1,)), SSDConfig(schedule="fixed", switches=(0.0, 0.5))])
def test_configs_and_states_come_back_from_json(value):
    assert _config.from_dict(type(value), json.loads(json.dumps(_config.to_dict(value)))) == value


def test_decisions_come_back_from_json():
    decision = Decision(step=3, before="dense", after="sparse", reason="x", numbers={"sparsity": 0.5})
    assert _config.from_dict(Decision, json.loads(json.dumps(_config.to_dict(decision)))) == decision


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selected": 33}, r"selected must be in \[1, num_experts = 32\], got 33"),
        ({"probe_frac": 0.0}, r"probe_frac must be in \(0, 1\], got 0.0"),
        ({"min_sparsity": 1.5}, r"min_sparsity must be in \[0, 1\], got 1.5"),
        ({"final_dense_frac": 0.6, "final_sparse_frac": 0.5}, "more than 1 together"),
        ({"max_loss_gap": 0.0}, "max_loss_gap must be greater than 0"),
        ({"eps": -1.0}, "eps must be finite and >= 0"),
        ({"plateau_probes": 0}, "plateau_probes must be at least 1"),
        ({"schedule": "fixed"}, "which needs them"),
        ({"switches": (0.5,)}, "belong to schedule='fixed'"),
        ({"schedule": "fixed", "switches": (0.5, 0.2)}, r"switches must rise and be in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SSDConfig(**options)


# -- sparse phases that go wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "jumped"),
    [
        pytest.param([2.0] * 20 + [4.1], True, id="twice the mean and 0.5 nats above it"),
        pytest.param([2.0] * 20 + [4.0], False, id="not more than the factor"),
        pytest.param([0.1] * 20 + [0.55], False, id="a small loss may multiply: not 0.5 nats"),
        pytest.param([2.0] * 19 + [9.0], False, id="too few to have a mean"),
        pytest.param([50.0] * 5 + [2.0] * 20 + [4.1], True, id="only the last count"),
    ],
)
def test_a_spike_is_a_rule_of_the_losses(losses, jumped):
    found = spike(SSDConfig(spike_factor=2.0, spike_steps=20, max_loss_gap=0.5), losses)
    assert (found is not None) == jumped
    if found:
        assert found == {"loss": losses[-1], "mean_loss": pytest.approx(2.0), "spike_factor": 2.0, "max_loss_gap": 0.5}


FELL = Fallback(step=22, failed=25, until=31, reason="loss 9", numbers={"loss": 9.0})


@pytest.mark.parametrize("config", [ADAPTIVE, SSDConfig(schedule="fixed", switches=(0.2, 0.5), probe_frac=0.02)])
def test_after_a_fallback_training_is_dense_until_the_step_it_says(config):
    controller = Controller(config, total_steps=100)
    modes = []
    for step in range(100):
        if step == FELL.step and not any(d.reason.startswith("fallback") for d in controller.log):
            assert controller.mode == "sparse"
            controller.fall_back(FELL)
        if controller.is_due(step):
            controller.decide(Signals(step=step, **(healthy(step, controller.mode) if controller.measures(step) else {})))
        modes.append(controller.mode)
    assert modes[20:22] == ["sparse"] * 2
    assert modes[22:31] == ["dense"] * 9
    assert "sparse" in modes[31:40]
    (decision,) = [d for d in controller.log if d.reason == "fallback: loss 9"]
    assert decision.numbers == {"loss": 9.0, "failed_step": 25.0, "dense_until": 31.0}
    assert (decision.before, decision.after) == ("sparse", "dense")
    assert modes_of(controller.log, 100) == modes
    again = Controller(config, total_steps=100)
    again.load(json.loads(json.dumps(controller.to_dict())))
    assert (again.state, again.log) == (controller.state, controller.log)


def test_bad_fallback_options_are_refused():
    for bad in ({"spike_factor": 1.0}, {"spike_steps": 0}, {"fallback_frac": 0.0}, {"max_fallbacks": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SSDConfig(**bad)
