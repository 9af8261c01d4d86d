"""The stages as callbacks of ``transformers.Trainer``, also under ``accelerate launch``.

    Trainer(model=model, args=args, train_dataset=data, callbacks=[SparsifyCallback(sites, SparsifyConfig())]).train()

Imports transformers and, through Trainer, accelerate (``pip install 'moeify[train]'``); nothing that ``import moeify`` loads imports it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..sites import FFNSite
from ..ssd import SSD, SSDConfig
from .distill import Distillation, DistillConfig
from .finetune import FinetuneConfig, Finetuning, RouterTraining
from .loop import KeptPart, Part
from .sparsify import Sparsification, SparsifyConfig
from .state import load_part, save_parts


class AttachedPart(Part, Protocol):
    """A part that can be taken off. One with an attribute ``total_steps`` is given the length of the run before the first step."""

    def remove(self) -> None:
        """Take its hooks off the model."""


class PartsCallback(TrainerCallback):
    """Any parts of training as a callback: attached when the Trainer has been made, told every step, logged, and removed at the end.

    Their values are in ``trainer.state.log_history`` and in what is printed, beside the loss. Most depend on the step alone; what a
    `KeptPart` keeps is written into Trainer's checkpoints, and ``resume_from_checkpoint`` takes it from there. A run that ends in an
    exception leaves them on the model; the next one goes on.

    Args:
        attach: makes the parts of a model; called with the Trainer's own model, neither wrapped nor compiled, and its arguments, and
            before a checkpoint to resume from is loaded.
    """

    def __init__(self, attach: Callable[[nn.Module, TrainingArguments], Sequence[AttachedPart]]) -> None:
        self._attach = attach
        self._parts: list[AttachedPart] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before anything is compiled, which would not see later hooks, and before a checkpoint is loaded."""
        self._parts = list(self._attach(kwargs["model"], args))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The length of the run is known; `on_init_end` is not called for a callback that was added later."""
        if not self._parts:
            self._parts = list(self._attach(kwargs["model"], args))
        for part in self._parts:
            if hasattr(part, "total_steps"):
                cast(Any, part).total_steps = state.max_steps
            if isinstance(part, KeptPart):
                part.begin(kwargs["optimizer"])
                if state.global_step:
                    part.load_state(*load_part(_checkpoint(args, state), part.name))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Into Trainer's checkpoint, which is there by now."""
        if state.is_world_process_zero:
            save_parts(_checkpoint(args, state, saving=True), {p.name: p.state() for p in self._parts if isinstance(p, KeptPart)})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        for part in self._parts:
            part.set_step(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside the training loss, not beside an evaluation's."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            values = {name: float(value) for part in self._parts for name, value in part.values().items()}
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Bring schedules to their end, and take everything off."""
        for part in self._parts:
            part.set_step(state.global_step)
            part.remove()
        self._parts = []


class DistillationCallback(PartsCallback):
    """`Distillation` for Trainer.

    Args:
        teacher: the frozen model; moved to the student's device.
        config: weights.
        sites: FFNs, for ``ffn_weight``.

    Raises:
        ConfigError: with ``torch_compile``, whose graph hooks of the whole model cannot be in.
    """

    def __init__(self, teacher: nn.Module, config: DistillConfig | None = None, sites: Sequence[FFNSite] = ()) -> None:
        def attach(model: nn.Module, args: TrainingArguments) -> list[AttachedPart]:
            _check_compile(args, distils=True)
            return [Distillation(model, teacher.to(args.device), config, sites, compute=_compute(args))]

        super().__init__(attach)


class SparsifyCallback(PartsCallback):
    """`sparsify` for Trainer: activation function, sparsity loss and distillation.

    Args:
        sites: FFNs of the model that the Trainer is given, as `find_ffn_sites` returned them.
        config: what to do.
        teacher: for ``config.distill``; moved to the student's device.

    Raises:
        ConfigError: with ``torch_compile``, where the loss is scaled or distilled: compiled code does not show what multiplies its loss.
    """

    def __init__(self, sites: Sequence[FFNSite], config: SparsifyConfig | None = None, *, teacher: nn.Module | None = None) -> None:
        self.sites = list(sites)
        """The FFNs; once training has begun, with the functions that they compute at the end."""

        def attach(model: nn.Module, args: TrainingArguments) -> list[AttachedPart]:
            _check_compile(args, distils=teacher is not None)
            moved = teacher.to(args.device) if teacher is not None else None
            part = Sparsification(model, self.sites, config, teacher=moved, compute=_compute(args))
            self.sites = part.sites
            return [part]

        super().__init__(attach)


class FinetuneCallback(PartsCallback):
    """`Finetuning` for Trainer: a converted model trained as it runs. Call `recalibrate` afterwards.

    Routers learn at Trainer's learning rate, unless its ``optimizers`` argument says otherwise: ``router_lr_factor`` has no effect.

    Args:
        config: budgets, what is trained, how routers learn, distillation; the budgets' seed is Trainer's.
        teacher: for ``config.distill``; moved to the student's device.

    Raises:
        ConfigError: with ``torch_compile``, or as `Finetuning`.
    """

    def __init__(self, config: FinetuneConfig | None = None, *, teacher: nn.Module | None = None) -> None:
        def attach(model: nn.Module, args: TrainingArguments) -> list[AttachedPart]:
            _refuse_compile(args)
            moved = teacher.to(args.device) if teacher is not None else None
            return [Finetuning(model, config, seed=args.seed, teacher=moved, compute=_compute(args))]

        super().__init__(attach)


class RouterTrainingCallback(PartsCallback):
    """`RouterTraining` for Trainer: the routers' regression is the loss, in dense mode, everything else frozen. Call `recalibrate`
    afterwards.

    Raises:
        ConfigError: with ``torch_compile``, or as `RouterTraining`.
    """

    def __init__(self) -> None:
        def attach(model: nn.Module, args: TrainingArguments) -> list[AttachedPart]:
            _refuse_compile(args)
            return [RouterTraining(model)]

        super().__init__(attach)


class SSDCallback(PartsCallback):
    """`SSD` for Trainer: switchable sparse-dense pre-training. The optimizer must be Trainer's own, or be made after the Trainer.

    Args:
        sites: FFNs of the model that the Trainer is given, as `find_ffn_sites` returned them.
        config: experts and rules.
        probe: batches that everything is measured on.

    Raises:
        ConfigError: as `SSD`.
    """

    def __init__(self, sites: Sequence[FFNSite], config: SSDConfig | None = None, *, probe: Sequence[Mapping[str, Tensor]]) -> None:
        self.ssd: SSD | None = None
        """The part, once the Trainer has been made; its probes and decisions stay readable after training."""

        def attach(model: nn.Module, args: TrainingArguments) -> list[AttachedPart]:
            self.ssd = SSD(model, sites, config, probe=probe, compute=_compute(args))
            return [self.ssd]

        super().__init__(attach)


def _checkpoint(args: TrainingArguments, state: TrainerState, *, saving: bool = False) -> Path:
    """Where Trainer keeps, or has found, the state of this step."""
    given = getattr(args, "resume_from_checkpoint", None)
    if not saving and isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _compute(args: TrainingArguments) -> torch.dtype | None:
    """accelerate casts inside of the model's forward, where a hook does not see it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _refuse_compile(args: TrainingArguments) -> None:
    if args.torch_compile:
        raise ConfigError("torch_compile and the training of converted models do not go together; leave torch_compile out.")


def _check_compile(args: TrainingArguments, *, distils: bool) -> None:
    scaled = args.gradient_accumulation_steps > 1 or args.fp16 or args.world_size > 1
    if args.torch_compile and (distils or scaled):
        what = "distillation" if distils else "gradient accumulation, fp16 or several processes"
        raise ConfigError(f"torch_compile of the whole model cannot be combined with {what} here; compile its layers instead.")
