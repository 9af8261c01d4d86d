"""Raising activation sparsity by training: another activation function, a sparsity loss, and, if wanted, a teacher."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError
from ..sites import FFNSite
from ..sparsity import ActivationConfig, EnforcementConfig, enforce_sparsity, scheduled_weight, set_activation, set_mix
from ..sparsity.inflight import Removable
from .distill import Distillation, DistillConfig, check_teacher
from .loop import StepReport, TrainConfig, TrainingData, TrainRecord, train


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """What makes activations sparse."""

    activation: Literal["relu", "relu2", "keep"] = "relu"
    """'relu': the FFNs compute ReLU from now on; 'relu2': its square; 'keep': their own function, of which pre-activations are penalised if
    it is never zero."""
    threshold: float = 0.0
    """t of relu(z - t), for relu. Where FFNs have biases and nothing is annealed t goes there; else moeify is needed to load the model."""
    anneal_frac: float = 0.0
    """Share of the steps over which the old function becomes the new one, in [0, 1]; 0: at once. Nothing where it is that already."""
    enforcement: EnforcementConfig = field(default_factory=EnforcementConfig)
    """The sparsity loss."""
    distill: DistillConfig | None = None
    """What is learnt from the teacher; null: nothing."""
    policy: dict[str, dict[str, Any] | None] = field(default_factory=dict, metadata=_config.LATER)
    """Exceptions by FFN name, or by 're:' pattern on it: activation and threshold there, or null to keep the FFN's function. An exact name
    wins, then the first matching pattern."""

    def __post_init__(self) -> None:
        if not 0 <= self.anneal_frac <= 1:
            raise ConfigError(f"anneal_frac must be in [0, 1], got {self.anneal_frac}.")
        if self.activation == "keep" and (self.anneal_frac or self.threshold or self.policy):
            raise ConfigError("anneal_frac, threshold and policy belong to activation 'relu' or 'relu2', and it is 'keep'.")
        self.functions()  # which checks them

    def functions(self) -> ActivationConfig | None:
        """What `set_activation` takes; None where every FFN keeps its function."""
        if self.activation == "keep":
            return None
        return ActivationConfig(activation=self.activation, threshold=self.threshold, policy=self.policy)


class Sparsification(Removable):
    """What `sparsify` attaches to a model: a `moeify.train.Part` for any loop, and a context manager that removes its hooks.

    The activation function stays when it is removed, and has arrived after ``set_step(total_steps)``.

    Args:
        model: dense model; changed in place.
        sites: its FFNs.
        config: what to do.
        total_steps: optimizer steps of the run; may be set later, before the first step.
        teacher: for ``config.distill``: the model as it was, loaded a second time.
        compute: see `Distillation`.

    Raises:
        ConfigError, UnsupportedModelError: as `set_activation`, `enforce_sparsity` and `Distillation`; or a teacher without ``distill``, or
            the reverse.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[FFNSite],
        config: SparsifyConfig | None = None,
        *,
        total_steps: int = 1,
        teacher: nn.Module | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        self.config = config = config or SparsifyConfig()
        check_teacher(config.distill, teacher)
        config.enforcement.enforced(sites)  # what can be refused is refused before the model is changed
        self._model = model
        self._attached = ExitStack()
        distillation = Distillation(model, teacher, config.distill, sites, compute=compute) if teacher is not None else None
        if distillation is not None:
            self._attached.enter_context(distillation)
        self._distillation = distillation
        try:
            self.sites = list(sites)
            """The FFNs with the functions that they compute at the end."""
            if (functions := config.functions()) is not None:
                self.sites = set_activation(model, sites, functions, mix=0.0 if config.anneal_frac else 1.0)
            self._enforcement = self._attached.enter_context(
                enforce_sparsity(model, self.sites, config.enforcement, total_steps=total_steps)
            )
        except BaseException:
            self._attached.close()
            raise
        self._anneals = bool(config.anneal_frac) and any(new != old for new, old in zip(self.sites, sites, strict=True))
        self._mix = 1.0
        self.set_step(0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self._enforcement.total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        """For a run whose length is not known when this is attached."""
        self._enforcement.total_steps = steps

    def set_step(self, step: int) -> None:
        """Set the weight of the sparsity loss and the share of the new function; the last step has all of both."""
        self._enforcement.set_step(step)
        if self._anneals:
            if self.total_steps > 1:
                self._mix = scheduled_weight(
                    1.0, schedule="warmup", step=step, total_steps=self.total_steps, warmup_frac=self.config.anneal_frac
                )
            else:  # the length is not known yet, or there is one step
                self._mix = float(step > 0)
            set_mix(self._model, self._mix)

    def values(self) -> dict[str, Tensor]:
        """'sparsity_loss' (unweighted), 'sparsity_weight', 'activation_mix', and those of the distillation; reading synchronises."""
        own = {
            "sparsity_loss": self._enforcement.value(),
            "sparsity_weight": torch.tensor(self._enforcement.weight),
            "activation_mix": torch.tensor(self._mix),
        }
        return own | (self._distillation.values() if self._distillation is not None else {})

    def remove(self) -> None:
        """Take all hooks off."""
        self._attached.close()


def sparsify(
    model: nn.Module,
    sites: Sequence[FFNSite],
    data: TrainingData,
    config: SparsifyConfig,
    training: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    state: Path | None = None,
    run: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    watch: Callable[[StepReport], None] | None = None,
    progress: Progress = NO_PROGRESS,
) -> TrainRecord:
    """Train a dense model, in place, until few of its neurons are active; it stays an ordinary dense model, to be saved and converted.

    Args:
        model: dense model.
        sites: its FFNs, as `find_ffn_sites` returned them.
        data: what to train on.
        config: activation function, sparsity loss, distillation.
        training: optimizer, schedule and length.
        teacher: for ``config.distill``: the model as it was, loaded a second time, on the same device.
        state, run, evaluate, watch, progress: see `train`; a killed run starts from the same model as the first did.

    Raises:
        ConfigError, UnsupportedModelError: the model or the options do not fit each other; before anything is trained.
        DataError, CheckpointError, TrainingError: see `train`.
    """
    with Sparsification(model, sites, config, total_steps=training.steps, teacher=teacher) as part:
        run = {"sparsify": _config.to_dict(part.config), **(run or {})}
        record = train(model, data, training, parts=[part], state=state, run=run, evaluate=evaluate, watch=watch, progress=progress)
        part.set_step(training.steps)  # also where a finished run was found
    return record
