"""When pre-training is dense and when sparse: a pure function of what was measured.

No tensors, no model and no clock: the same signals give the same decisions, on every rank and after every resume.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from .. import _config
from ..errors import CheckpointError, ConfigError

Phase = Literal["dense", "sparse"]


@dataclass(frozen=True, kw_only=True)
class SSDConfig:
    """Switchable sparse-dense pre-training: experts, what is watched, and when training switches. Fractions are of all steps."""

    num_experts: int = 32
    """Experts E of each FFN; where E does not divide the FFN's width, sizes differ by one."""
    selected: int = 8
    """Experts k that a token runs in a sparse phase, in [1, E]."""
    experts: Literal["kmeans", "random"] = "kmeans"
    """'kmeans': clusters of the input weights, routers from their centres; 'random': random groups and routers, the ablation."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """'adaptive': by what is measured; 'fixed': at the fractions in ``switches``."""
    switches: tuple[float, ...] = ()
    """Of the fixed schedule: where training switches, rising, in [0, 1); it begins dense. (0.0,) is sparse from the start, (0.3,) one
    switch."""
    probe_frac: float = 0.01
    """Between two measurements, in (0, 1]; at least one step."""
    similarity: Literal["coactivation", "rand", "inertia"] = "coactivation"
    """What tells how much of the activation pattern is as it was at the last measurement (`moeify.ssd.SIMILARITIES`)."""
    probe_neurons: int = 256
    """Of 'coactivation': neurons of each FFN whose pairs are compared, at random; at least 2."""
    eps: float = 0.0
    """A neuron is silent on a token where its activation is at most this in size; 0 for ReLU."""
    min_sparsity: float = 0.7
    """Dense to sparse: the mean share of silent neurons is at least this, in [0, 1]."""
    min_similarity: float = 0.9
    """Dense to sparse: the pattern is stable where its similarity is at least this."""
    plateau_gain: float = 0.01
    """Dense to sparse: or settled, where the similarity rises by less than this over ``plateau_probes`` measurements."""
    plateau_probes: int = 2
    """See ``plateau_gain``; at least 1."""
    sparse_frac: float = 0.1
    """Sparse to dense: longest sparse phase, in (0, 1]."""
    min_captured: float = 0.9
    """Sparse to dense: the selected experts' share of all activations falls below this part of what it was at the phase's first
    measurement; 0: never."""
    max_loss_gap: float = 0.5
    """Sparse to dense: the probe's loss of the sparse model is more than this above that of the dense model, in nats; greater than 0."""
    final_dense_frac: float = 0.1
    """Length of the last dense phase, in [0, 1]."""
    final_sparse_frac: float = 0.0
    """Length of the sparse phase after it, in [0, 1]."""
    spike_factor: float = field(default=2.0, metadata=_config.LATER)
    """Fallback: the loss of a sparse step is more than this times the mean of the ``spike_steps`` losses before it, and more than
    ``max_loss_gap`` above that mean; greater than 1."""
    spike_steps: int = field(default=20, metadata=_config.LATER)
    """See ``spike_factor``; at least 1. While there are fewer, only a loss that is no number is one."""
    fallback_frac: float = field(default=0.05, metadata=_config.LATER)
    """After a fallback training is dense for at least this part of all steps, counted from the step that failed; in (0, 1]."""
    max_fallbacks: int = field(default=3, metadata=_config.LATER)
    """One more ends the run with an error; at least 0."""
    seed: int = 0
    """Of clusterings, of the random ablation and of the neurons that are compared."""

    def __post_init__(self) -> None:
        if not 1 <= self.selected <= self.num_experts:
            raise ConfigError(f"selected must be in [1, num_experts = {self.num_experts}], got {self.selected}.")
        for name in ("probe_frac", "sparse_frac", "fallback_frac"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        for name in ("min_sparsity", "min_captured", "final_dense_frac", "final_sparse_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.final_dense_frac + self.final_sparse_frac > 1:
            raise ConfigError("final_dense_frac and final_sparse_frac are more than 1 together.")
        if not self.max_loss_gap > 0:
            raise ConfigError(f"max_loss_gap must be greater than 0, got {self.max_loss_gap}.")
        if not 0 <= self.eps < math.inf:
            raise ConfigError(f"eps must be finite and >= 0, got {self.eps}.")
        if not 1 < self.spike_factor < math.inf:
            raise ConfigError(f"spike_factor must be finite and greater than 1, got {self.spike_factor}.")
        for name, least in (("plateau_probes", 1), ("probe_neurons", 2), ("spike_steps", 1), ("max_fallbacks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        rising = all(a < b for a, b in zip(self.switches, self.switches[1:], strict=False))
        if not rising or any(not 0 <= at < 1 for at in self.switches):
            raise ConfigError(f"switches must rise and be in [0, 1), got {list(self.switches)}.")
        if bool(self.switches) != (self.schedule == "fixed"):
            raise ConfigError("switches belong to schedule='fixed', which needs them.")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What is known when a decision is due; None where it was not measured."""

    step: int
    """Optimizer steps done."""
    sparsity: float | None = None
    """Share of silent neurons, mean over tokens and layers, in [0, 1]; of the dense model."""
    similarity: float | None = None
    """Of the activation pattern with that at the last measurement, mean over layers; at most 1."""
    captured: float | None = None
    """Share of the sum of abs(activation) that lies in selected experts, in [0, 1], mean over layers; in sparse phases."""
    dense_loss: float | None = None
    """The probe's loss of the dense model, in nats; in sparse phases."""
    sparse_loss: float | None = None
    """The probe's loss of the sparse model, in nats; in sparse phases."""

    @property
    def loss_gap(self) -> float | None:
        """Sparse minus dense loss, in nats."""
        return None if self.dense_loss is None or self.sparse_loss is None else self.sparse_loss - self.dense_loss


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """All that decisions depend on besides the signals; JSON by `_config`."""

    mode: Phase = "dense"
    """What the present phase is."""
    began: int = 0
    """Step at which it began."""
    step: int = -1
    """Step of the last decision."""
    measured: int = -1
    """Step of the last measurement."""
    similarities: tuple[float, ...] = ()
    """Measured within this dense phase, the latest last."""
    first_captured: float | None = None
    """At the first measurement of this sparse phase."""
    sparse_phases: int = 0
    """Begun so far."""
    dense_until: int = 0
    """Before this step a fallback keeps training dense."""


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A sparse phase that went wrong: training goes on from an earlier state, dense; JSON by `_config`.

    What the controller is told from outside, like a signal: with the same fallbacks the same run comes out, however often it is killed.
    """

    step: int
    """Optimizer steps done in the state that training goes back to."""
    failed: int
    """Optimizer steps done when it was seen."""
    until: int
    """Before this step training is dense."""
    reason: str
    """What was seen."""
    numbers: dict[str, float]
    """What was measured, and the limits that it was held against; what is no number is in ``reason``."""
    dense_steps: int = 0
    """Dense steps that were lost."""
    sparse_steps: int = 0
    """Sparse steps that were lost."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and on what; JSON by `_config`."""

    step: int
    """Optimizer steps done."""
    before: Phase
    """The mode that was decided about."""
    after: Phase
    """The mode of the next step."""
    reason: str
    """Which rule it was, or which condition is not met."""
    numbers: dict[str, float]
    """What was measured, and the limits that it was held against."""


def decide(config: SSDConfig, *, total_steps: int, state: ControllerState, signals: Signals) -> tuple[ControllerState, Decision]:
    """The next step's mode.

    Phases of time alone come first: the final ones, and those of a fixed schedule. Otherwise

        dense -> sparse   sparsity >= min_sparsity and (similarity >= min_similarity, or similarity - [that plateau_probes ago] <
                          plateau_gain), and a sparse phase of two measurements fits before the final dense phase
        held dense        before the step that a fallback says, whatever the schedule
        sparse -> dense   after sparse_frac of all steps; captured < min_captured * [that at the phase's first measurement];
                          or sparse loss - dense loss > max_loss_gap

    A dense phase's first similarity is with a measurement before it, and does not count.

    Source: Zhang et al. 2024, arXiv:2410.03440, switches to sparse when the pattern's change has become small, and back; thresholds, the
    way back and the final phases are not published and are ours (docs/ssd.md).
    """
    step = signals.step
    numbers = {name: value for name in ("sparsity", "similarity", "captured", "loss_gap") if (value := getattr(signals, name)) is not None}
    after, reason = _by_time(config, total_steps, step)
    if step < state.dense_until:
        after, reason = "dense", "held after a fallback"
        numbers["dense_until"] = float(state.dense_until)
    if after is not None:
        if after == state.mode:
            reason = f"stays {after}: {reason}"
    elif state.mode == "dense":
        if signals.similarity is not None and state.measured >= state.began:
            state = replace(state, similarities=(*state.similarities, signals.similarity)[-1 - config.plateau_probes :])
        after, reason, limits = _leave_dense(config, total_steps, state, signals)
        numbers |= limits
    else:
        if state.first_captured is None and signals.captured is not None:
            state = replace(state, first_captured=signals.captured)
        after, reason, limits = _leave_sparse(config, total_steps, state, signals)
        numbers |= limits
    decision = Decision(step=step, before=state.mode, after=after, reason=reason, numbers=numbers)
    if after != state.mode:
        phases = state.sparse_phases + (after == "sparse")
        state = replace(state, mode=after, began=step, similarities=(), first_captured=None, sparse_phases=phases)
    return replace(state, step=step, measured=state.measured if signals.sparsity is None else step), decision


def spike(config: SSDConfig, losses: Sequence[float]) -> dict[str, float] | None:
    """Whether the last loss of a sparse step jumped: a pure function of the losses of all steps, so the same after every resume.

    loss > spike_factor * mean  and  loss > mean + max_loss_gap,    mean: of the spike_steps losses before it

    Args:
        config: the rule.
        losses: of every step up to this one, in nats.

    Returns:
        The numbers behind it; None where it did not, or fewer losses are known.
    """
    before = losses[-1 - config.spike_steps : -1]
    if len(before) < config.spike_steps:
        return None
    mean, loss = math.fsum(before) / len(before), losses[-1]
    if loss > config.spike_factor * mean and loss > mean + config.max_loss_gap:
        return {"loss": loss, "mean_loss": mean, "spike_factor": config.spike_factor, "max_loss_gap": config.max_loss_gap}
    return None


def modes(decisions: Sequence[Decision], steps: int) -> list[Phase]:
    """The mode of each of ``steps`` steps, from the decisions in their order."""
    found: list[Phase] = []
    mode: Phase = "dense"
    for decision in decisions:
        found += [mode] * (min(decision.step, steps) - len(found))
        mode = decision.after
    return found + [mode] * (steps - len(found))


def _final_phases(config: SSDConfig, total_steps: int) -> tuple[int, int]:
    """Steps at which the final dense and the final sparse phase begin; ``total_steps`` where there is none."""
    final_sparse = total_steps - round(config.final_sparse_frac * total_steps)
    return final_sparse - round(config.final_dense_frac * total_steps), final_sparse


def _by_time(config: SSDConfig, total_steps: int, step: int) -> tuple[Phase | None, str]:
    if config.schedule == "fixed":
        switched = sum(round(at * total_steps) <= step for at in config.switches)
        return ("sparse" if switched % 2 else "dense"), "fixed schedule"
    final_dense, final_sparse = _final_phases(config, total_steps)
    if final_sparse <= step < total_steps:
        return "sparse", "final sparse phase"
    return ("dense", "final dense phase") if final_dense <= step else (None, "")


def _leave_dense(config: SSDConfig, total_steps: int, state: ControllerState, signals: Signals) -> tuple[Phase, str, dict[str, float]]:
    sparsity, seen = signals.sparsity, state.similarities
    if sparsity is None:
        return "dense", "nothing was measured", {}
    limits = {"min_sparsity": config.min_sparsity, "min_similarity": config.min_similarity}
    if not sparsity >= config.min_sparsity:
        return "dense", "not sparse yet", limits
    if not seen:
        return "dense", "no similarity within this phase yet", limits
    is_stable = seen[-1] >= config.min_similarity
    is_settled = False
    if len(seen) > config.plateau_probes:
        limits |= {"similarity_gain": seen[-1] - seen[0], "plateau_gain": config.plateau_gain}
        is_settled = seen[-1] - seen[0] < config.plateau_gain
    if not (is_stable or is_settled):
        return "dense", "the pattern still changes", limits
    left = _final_phases(config, total_steps)[0] - signals.step
    if left < 2 * probe_every(config, total_steps):
        return "dense", "too close to the final dense phase", limits | {"steps_left": float(left)}
    return "sparse", "sparse and stable" if is_stable else "sparse, and the pattern has settled", limits


def _leave_sparse(config: SSDConfig, total_steps: int, state: ControllerState, signals: Signals) -> tuple[Phase, str, dict[str, float]]:
    length = sparse_steps(config, total_steps)
    lasted = signals.step - state.began
    numbers: dict[str, float] = {"lasted_steps": float(lasted), "sparse_steps": float(length)}
    if lasted >= length:
        return "dense", "the phase has had its length", numbers
    if signals.captured is not None and state.first_captured is not None:
        numbers["least_captured"] = least = config.min_captured * state.first_captured
        if signals.captured < least:
            return "dense", "the experts capture less of the activations", numbers
    if signals.loss_gap is not None:
        numbers["max_loss_gap"] = config.max_loss_gap
        if not signals.loss_gap <= config.max_loss_gap:  # NaN, too
            return "dense", "the sparse model has fallen behind the dense one", numbers
    return "sparse", "stays sparse", numbers


def probe_every(config: SSDConfig, total_steps: int) -> int:
    """Steps between two measurements, at least 1."""
    return max(1, round(config.probe_frac * total_steps))


def sparse_steps(config: SSDConfig, total_steps: int) -> int:
    """Longest sparse phase in steps, at least 1."""
    return max(1, round(config.sparse_frac * total_steps))


class Controller:
    """`decide`, with its state and the log of its decisions.

    Args:
        config: the rules.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, config: SSDConfig, *, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.state = ControllerState()
        self.log: list[Decision] = []
        """Every decision, those to stay included."""

    @property
    def mode(self) -> Phase:
        """Of the steps until the next decision."""
        return self.state.mode

    def measures(self, step: int) -> bool:
        """Whether something is to be measured after ``step`` steps."""
        return step % probe_every(self.config, self.total_steps) == 0

    def is_due(self, step: int) -> bool:
        """Whether a decision is due after ``step`` steps: where something is measured, and where a phase of known length ends."""
        if step <= self.state.step:
            return False
        if self.config.schedule == "fixed":
            ends = {round(at * self.total_steps) for at in self.config.switches} | {self.state.dense_until}
        else:
            ends = set(_final_phases(self.config, self.total_steps))
            if self.mode == "sparse":
                ends.add(self.state.began + sparse_steps(self.config, self.total_steps))
        return self.measures(step) or step in ends

    def decide(self, signals: Signals) -> Decision:
        """Decide on the next step's mode, and remember it."""
        self.state, decision = decide(self.config, total_steps=self.total_steps, state=self.state, signals=signals)
        self.log.append(decision)
        return decision

    def fall_back(self, fallback: Fallback) -> Decision:
        """Dense from here on, at least until the step that the fallback says; at a step that is still to be decided about."""
        decision = Decision(
            step=fallback.step,
            before=self.mode,
            after="dense",
            reason=f"fallback: {fallback.reason}",
            numbers={**fallback.numbers, "failed_step": float(fallback.failed), "dense_until": float(fallback.until)},
        )
        held = {"mode": "dense", "began": fallback.step, "similarities": (), "first_captured": None, "dense_until": fallback.until}
        self.state = replace(self.state, **cast(Any, held))
        self.log.append(decision)
        return decision

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        return {"state": _config.to_dict(self.state), "log": [_config.to_dict(decision) for decision in self.log]}

    def load(self, data: Mapping[str, Any]) -> None:
        """Go on from `to_dict`'s value.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            state = _config.from_dict(ControllerState, data["state"], where="controller")
            log: Sequence[Any] = data["log"]
            self.log = [_config.from_dict(Decision, entry, where="controller") for entry in log]
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"the controller's state is damaged: {error}; delete the training state to start anew.") from error
        self.state = state
