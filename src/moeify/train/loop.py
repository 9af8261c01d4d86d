"""One plain training loop: what ``transformers.Trainer`` does, short enough to read; on several processes by `parallel`.

Order of the data, schedule, weight decay, clipping and normalisation are Trainer's, so that the same seed gives the same losses.
What a stage adds (a sparsity loss, a teacher) is a `Part`: hooks on the model, which the loop only tells the step.
"""

import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from .. import _config
from .._dist import ALONE, Ranks
from .._progress import NO_PROGRESS, Progress
from .._random import restored, seeded
from ..errors import ConfigError, DataError, DivergedError, StoppedError, TrainingError, is_out_of_memory
from ..sites.policy import matching_key
from .capture import fast_dtype
from .labels import counted_labels, shifts_labels
from .parallel import Parallel, ParallelKind, blank, is_finite, is_sharded, share
from .state import PartState, has_state, load_part, load_state, open_state, save_state

_log = logging.getLogger(__name__)
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")
_GROUPED_STEPS = 50  # as transformers' LengthGroupedSampler

_SAVE_FRAC = 0.03
_SAVE_FREE_S = 1.0  # of short runs, whose time is not worth a lost state

FREE_OPTIONS = (
    "micro_sequences",
    "gradient_checkpointing",
    "parallel",
    "expert_parallel",
    "eval_every",
    "save_every",
    "save_frac",
    "log_every",
)
"""Options of `TrainConfig` that may change between a kill and the next start: they decide what is kept and what fits into memory."""


class TrainingData(Protocol):
    """Sequences with random access: resume needs nothing but the step."""

    def __len__(self) -> int:
        """Number of sequences."""

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """The model's arguments for these sequences, labels included; ``generator`` for masking and augmentation only. Sequences of many
        lengths also have ``lengths``, of each in tokens, for `TrainConfig.group_by_length`."""


class Part(Protocol):
    """What a stage adds to training, by hooks on the model. It depends on the step alone, so that resume needs no state of it; one that
    cannot is a `KeptPart`. One whose work within a forward compiled code keeps has a true attribute ``compiles``, one
    whose processes talk to each other ``is_collective``."""

    def set_step(self, step: int) -> None:
        """Called before the forwards of every optimizer step."""

    def values(self) -> Mapping[str, Tensor]:
        """Detached scalars to log, by name; reading one synchronises."""


@runtime_checkable
class KeptPart(Part, Protocol):
    """A part that has a state, or changes what the optimizer holds, between two steps."""

    name: str
    """Tells its state from other parts'."""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once before the first step, and before a state is loaded."""

    def state(self) -> PartState:
        """A JSON object and tensors: all that the rest of the run depends on besides model, optimizer and step."""

    def load_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`; model and optimizer have been loaded."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW, its schedule, and what a run keeps."""

    steps: int
    """Optimizer steps."""
    batch_sequences: int = 8
    """Sequences per optimizer step, of all processes together."""
    micro_sequences: int | None = None
    """Sequences per forward of a process; fewer need less memory and give the same result, but for other random numbers (dropout, masking)
    and for what stages take from one forward. None: all of a step at once."""
    lr: float = 1e-4
    """Largest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the first has learning rate 0, as with Trainer."""
    min_lr_frac: float = 0.0
    """Where 'cosine' and 'linear' end, as a fraction of lr, in [0, 1]."""
    weight_decay: float = 0.0
    """Decay of weights; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages of the gradient and of its square, each in [0, 1)."""
    clip: float = 1.0
    """Largest gradient norm; 0: any."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix products (autocast); weights and optimizer keep theirs. 'auto': bfloat16 where the device multiplies it natively,
    else float32. 'float16' scales the loss, and needs a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them: less memory, a third more time, the same result."""
    compile: bool = field(default=False, metadata=_config.LATER)
    """Compile the model's forward and backward (``torch.compile``); the first step, and the first sparse one of SSD, take longer. Only
    together with parts that say `compiles`."""
    parallel: ParallelKind = "auto"
    """Several processes (torchrun): 'ddp', each has all weights; 'fsdp', each a part of weights, gradients and moments; 'none', they do not
    know of each other. 'auto': 'ddp' where there are several."""
    expert_parallel: int = field(default=1, metadata=_config.LATER)
    """Neighbouring processes that share out the experts of FFNs in sparse steps: each computes a part of them, for the tokens of all. It
    divides the number of processes; 1: every process computes all of its own tokens' experts."""
    eval_every: int | None = None
    """Steps between evaluations; None: only at the end."""
    save_every: int | None = None
    """Steps between saved states; None: only at the end."""
    save_frac: float | None = field(default=None, metadata=_config.LATER)
    """Most of a run's time that saving may take, in (0, 1): a state that is due is left out above it, once saving has taken a second.
    None: every one that is due is saved."""
    log_every: int = 10
    """Steps between readings of what the stages add."""
    group_by_length: bool = field(default=False, metadata=_config.LATER)
    """Sequences of like length share a step, so that little is padded; texts of many lengths train in about half the time. Of those of one
    length the order stays as it is."""
    seed: int = 0
    """Seed of the order of sequences, of dropout and of masking."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_sequences", "micro_sequences", "expert_parallel", "eval_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be at least 0, got {self.warmup_steps}.")
        for name in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        if self.save_frac is not None and not 0 < self.save_frac < 1:
            raise ConfigError(f"save_frac must be in (0, 1), got {self.save_frac}.")
        if not 0 <= self.min_lr_frac <= 1:
            raise ConfigError(f"min_lr_frac must be in [0, 1], got {self.min_lr_frac}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}.")

    def epochs(self, sequences: int) -> float:
        """Passes over a data set of this many sequences; far more than 1 on a small one is learning by heart."""
        return self.steps / math.ceil(sequences / self.batch_sequences)

    def saving(self) -> "TrainConfig":
        """With a state 20 times a run where ``save_every`` is None, as long as that takes little of its time."""
        if self.save_every is not None:
            return self
        return replace(self, save_every=max(1, self.steps // 20), save_frac=self.save_frac or _SAVE_FRAC)

    def decisive(self) -> dict[str, Any]:
        """JSON values of the options that decide what a run gives: all but `FREE_OPTIONS`."""
        return {key: value for key, value in _config.to_dict(self).items() if key not in FREE_OPTIONS}


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """What a run did; plain numbers."""

    losses: tuple[float, ...] = ()
    """Of every step: the mean over its labels, in nats, with what stages put into ``outputs.loss``."""
    evals: tuple[tuple[int, float], ...] = ()
    """(steps done, what ``evaluate`` said)."""
    parts: tuple[dict[str, float], ...] = ()
    """Each reading: the step, and every part's values."""
    tokens: int = 0
    """Tokens that were trained on, padding left out; an image counts as one."""
    epochs: float = 0.0
    """Passes over the data."""
    seconds: float = 0.0
    """Time in the loop, of all processes that took part in turn; evaluation included, saving not."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step that has been done, for whoever watches."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean over its labels, in nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate that it was done with; of parameters without a factor."""
    losses: Sequence[float]
    """Of every step so far, those of earlier processes included; grows as training goes on."""
    evals: Sequence[tuple[int, float]]
    """Every evaluation so far."""
    seconds: float
    """As `TrainRecord.seconds`."""
    parts: Sequence[Mapping[str, float]] = ()
    """Every reading of the parts so far, with its "step"."""


def train(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig,
    *,
    parts: Sequence[Part] = (),
    lr_factors: Mapping[str, float] | None = None,
    state: Path | None = None,
    run: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    watch: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Progress = NO_PROGRESS,
) -> TrainRecord:
    """Train in place the parameters of ``model`` that require a gradient.

    Epoch e takes the sequences in the order ``randperm(len(data))`` of seed ``seed + e``, ``batch_sequences`` a step, its last what is
    left; with ``group_by_length`` 50 steps' sequences each are sorted by length, and the epoch's steps are shuffled. A step's loss is the
    mean over all its labels, however they fall into micro-batches: each one's mean is weighted by its share. Of several processes
    (`TrainConfig.parallel`), which all call this alike, each takes every n-th sequence of a step; the losses are those of one process, but
    for random numbers (dropout, masking). One that is gone is a TrainingError in the others.
    Gradients that the model comes with are dropped.

    Args:
        model: any whose forward takes a batch's entries and returns an object with ``loss``, the mean over its labels.
        data: sequences; see `TrainConfig.epochs` for how often they are passed over.
        config: optimizer, schedule and what is kept.
        parts: what a stage has attached to the model.
        lr_factors: factors on the learning rate by parameter name, or by 're:' pattern on it.
        state: folder for what a killed run leaves; the same ``run`` and ``config`` go on there, to the same losses (on a CPU bit for bit).
            A finished run's state gives its result at once.
        run: JSON object that, with ``config``, tells this run from others.
        evaluate: called with the model in eval mode, every ``eval_every`` steps and at the end.
        watch: told of every step before a state is saved; what it raises ends the run, and the last state stays.
        stop: asked after every step whether to save and end here; of several processes one is enough.
        progress: told every step.

    Returns:
        The record; the model is in eval mode, without gradients.

    Raises:
        ConfigError: nothing to train, float16 weights to train, float16 products without a GPU, or ``compile`` with a part whose hooks
            compiled code would not see.
        DataError: no sequences, or a step without a label.
        CheckpointError: ``state`` is of another run, or cannot be written.
        TrainingError: the loss or a gradient is not finite (`DivergedError`), or memory ran out. The model then has the weights that gave
            it.
        StoppedError: ``stop`` said so; the state is saved.
    """
    device = next(model.parameters()).device
    compute = _compute_dtype(config, device)
    if len(data) == 0:
        raise DataError("the training data has no sequence.")
    loop = _Loop(model, data, config, parts=parts, lr_factors=lr_factors or {}, compute=compute, state=state)
    checkpointing = _gradient_checkpointing(model, enabled=config.gradient_checkpointing)
    with seeded(config.seed, device), checkpointing, loop.parallel.shared_experts():
        done = loop.begin(run or {})
        with progress.task("train", total=config.steps) as task:
            task.advance(done)
            for step in range(done, config.steps):
                start = time.perf_counter()
                loss, norm, lr = loop.step(step)
                loop.look(step, loss=loss, norm=norm, lr=lr, evaluate=evaluate)
                loop.log.seconds += time.perf_counter() - start
                if watch is not None:
                    watch(loop.report(step, loss=loss, norm=norm, lr=lr))
                is_stopping = loop.stops(stop) if stop is not None and step + 1 < config.steps else False
                loop.save(step, now=is_stopping)
                task.advance(1)
                if is_stopping:
                    raise StoppedError(f"stopped after step {step + 1} of {config.steps}.", step=step + 1)
    model.eval()
    return loop.record()


class _Loop:
    """What `train` holds from the first step to the last."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: TrainConfig,
        *,
        parts: Sequence[Part],
        lr_factors: Mapping[str, float],
        compute: torch.dtype,
        state: Path | None,
    ) -> None:
        self.model, self.data, self.config, self.parts, self.compute, self.folder = model, data, config, parts, compute, state
        self.device = next(model.parameters()).device
        _check_together(parts, config)
        self.parallel = Parallel(config.parallel, model, compute=compute, experts=config.expert_parallel)
        self.forward = torch.compile(self.parallel.model) if config.compile else self.parallel.model
        self.ranks = self.parallel.ranks
        groups = _parameter_groups(model, config, lr_factors)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_lr_factor, config=config))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute is torch.float16)
        self.kept_parts = {part.name: part for part in parts if isinstance(part, KeptPart)}
        for own_part in self.kept_parts.values():
            own_part.begin(self.optimizer)
        self.log = _Log()
        self.order = _Order(len(data), config, self.ranks, lengths=getattr(data, "lengths", None))
        self._shifted: bool | None = None
        self._began_s, self._saving_s = time.perf_counter(), 0.0

    def begin(self, run: Mapping[str, Any]) -> int:
        """Take up what a killed run left; the steps it had done."""
        done = 0
        if self.folder is not None:
            named = {"train": self.config.decisive(), "sequences": len(self.data), "run": dict(run)}
            self.ranks.first(partial(open_state, self.folder, named))
            if kept := load_state(self.folder, **self._held(), ranks=self.ranks):
                done, self.log = kept.step, _Log.of(_config.from_dict(TrainRecord, kept.record, where=str(self.folder)))
                for name, own_part in self.kept_parts.items():
                    own_part.load_state(*load_part(kept.folder, name))
        self.model.train()
        self.model.zero_grad(set_to_none=True)  # what a failed step, or somebody else, left there
        return done

    def step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: its loss, its gradient's norm before clipping, and the learning rate it was done with."""
        self.parallel.begin_step(step, seed=self.config.seed)
        with self.parallel.faults(step):
            for part in self.parts:
                part.set_step(step)
        batches, counts, all_labels = self._read(step)
        total = torch.zeros((), device=self.device)
        with _memory_errors(self.config, step), self.parallel.faults(step):
            for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
                if count == 0:  # its mean is NaN
                    if self.ranks.size == 1:
                        continue
                    batch = blank(batch)  # the other processes run one
                with self.parallel.micro_step(is_last=i == len(batches) - 1):
                    with _autocast(self.device, self.compute):
                        loss = _loss(self.forward, _to(batch, self.device)) * self.parallel.weight(count, all_labels)
                    self.scaler.scale(loss).backward()
                total += loss.detach() / self.ranks.size
            found = self._update(step, total, batches)
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _read(self, step: int) -> tuple[list[Mapping[str, Tensor]], list[int], int]:
        """This process' micro-batches of a step, the labels in each, and those of all processes together."""
        if self.order.begins_epoch(step):
            torch.empty((), dtype=torch.int64).random_()  # a DataLoader does when it starts: so dropout is Trainer's, too
        generator = torch.Generator().manual_seed(1_000_003 * (self.config.seed + 1) + step + (self.ranks.rank << 40))
        shares = self.order.micro_batches(step)
        batches: list[Mapping[str, Tensor]] = [
            self.data.batch(rows, generator=generator) if rows else blank(self.data.batch(self.order.rows(step)[:1], generator=generator))
            for rows in shares
        ]
        if self._shifted is None:
            with _memory_errors(self.config, step), _autocast(self.device, self.compute), restored(self.device):
                self._shifted = shifts_labels(self.model, _to(batches[0], self.device))
        counts = [counted_labels(batch, shifted=self._shifted) if rows else 0 for rows, batch in zip(shares, batches, strict=True)]
        tokens = sum(_num_tokens(batch) for rows, batch in zip(shares, batches, strict=True) if rows)
        with self.parallel.faults(step):
            all_labels, all_tokens = self.parallel.totals(sum(counts), tokens)
        if all_labels == 0:
            raise DataError(f"no label in the sequences of step {step}; raise batch_sequences ({self.config.batch_sequences}).")
        self.log.tokens += all_tokens
        return batches, counts, all_labels

    def _update(self, step: int, total: Tensor, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, float, float]:
        """From summed gradients to new weights; nothing that is no number gets into them."""
        scaler = self.scaler
        scaler.unscale_(self.optimizer)
        norm = self.parallel.norm([p.grad for p in self.model.parameters() if p.grad is not None])
        values = torch.stack([self.ranks.sum(total), norm.to(total)]).tolist()  # the one synchronisation of a step
        overflowed = scaler.is_enabled() and scaler.get_scale() > 1 and not math.isfinite(values[1])
        if not (math.isfinite(values[0]) and (math.isfinite(values[1]) or overflowed)):
            with _autocast(self.device, self.compute):
                raise _not_finite(values, self.model, batches, step=step, config=self.config, state=self.folder)
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        lr = float(self.schedule.get_last_lr()[0])
        scaler.step(self.optimizer)  # float16: not where a gradient overflowed; the next losses are scaled less
        scaler.update()
        if not overflowed:
            self.schedule.step()
        return values[0], values[1], lr

    def look(self, step: int, *, loss: float, norm: float, lr: float, evaluate: Callable[[nn.Module], float] | None) -> None:
        """Log a step that was done; read the parts and evaluate where it is due."""
        done, config, log = step + 1, self.config, self.log
        is_last = done == config.steps
        log.losses.append(loss)
        if is_last or done % config.log_every == 0:
            read = {name: float(value) for part in self.parts for name, value in part.values().items()}
            log.parts += [{"step": float(done), **read}] if read else []
            level = logging.INFO if self.ranks.is_first else logging.DEBUG
            _log.log(level, "step %d of %d: loss %.4f, gradient norm %.3g, lr %.3g %s", done, config.steps, loss, norm, lr, read or "")
        if evaluate is not None and (is_last or _is_due(done, config.eval_every)):
            with self.parallel.faults(step):
                log.evals.append((done, float(self.ranks.same(_evaluated(self.model, evaluate, self.device)))))

    def report(self, step: int, *, loss: float, norm: float, lr: float) -> StepReport:
        log = self.log
        so_far: dict[str, Any] = {"losses": log.losses, "evals": log.evals, "parts": log.parts, "seconds": log.seconds}
        return StepReport(step=step + 1, loss=loss, grad_norm=norm, lr=lr, **so_far)

    def stops(self, stop: Callable[[], bool]) -> bool:
        """Whether any process is to stop: a signal may reach one alone."""
        is_stopping = stop()
        return bool(self.ranks.sum(torch.tensor(int(is_stopping)))) if self.ranks.size > 1 else is_stopping

    def save(self, step: int, *, now: bool) -> None:
        """Keep the state after a step, where it is due or ``now``."""
        done = step + 1
        must = now or done == self.config.steps
        if self.folder is None or not (must or _is_due(done, self.config.save_every)):
            return
        if not must and self.config.save_frac is not None and self.ranks.same(self._saves_too_long(self.config.save_frac)):
            return
        start = time.perf_counter()
        own = {name: own_part.state() for name, own_part in self.kept_parts.items()}
        so_far = _config.to_dict(self.log.record(self.order.epochs(done)))
        with self.parallel.faults(step):
            save_state(self.folder, step=done, **self._held(), record=so_far, parts=own, ranks=self.ranks)
        self._saving_s += time.perf_counter() - start

    def _saves_too_long(self, frac: float) -> bool:
        return self._saving_s > max(_SAVE_FREE_S, frac * (time.perf_counter() - self._began_s))

    def record(self) -> TrainRecord:
        return self.log.record(self.order.epochs(self.config.steps))

    def _held(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}


@dataclass
class _Log:
    """A `TrainRecord` that grows."""

    losses: list[float] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, record: TrainRecord) -> "_Log":
        return cls(list(record.losses), list(record.evals), list(record.parts), record.tokens, record.seconds)

    def record(self, epochs: float) -> TrainRecord:
        return TrainRecord(
            losses=tuple(self.losses),
            evals=tuple(self.evals),
            parts=tuple(self.parts),
            tokens=self.tokens,
            epochs=epochs,
            seconds=self.seconds,
        )


def _check_together(parts: Sequence[Part], config: TrainConfig) -> None:
    def lacks(attribute: str, wanted: bool) -> str | None:
        return next((type(part).__name__ for part in parts if getattr(part, attribute, False) is not wanted), None)

    if config.compile and config.gradient_checkpointing:
        raise ConfigError("compile and gradient_checkpointing do not go together; compiled code chooses what it keeps by itself.")
    if config.compile and (name := lacks("compiles", True)):
        raise ConfigError(f"compile does not go with {name}, whose hooks compiled code would not see; leave it out.")
    if config.parallel == "none" and Ranks.present().size > 1 and (name := lacks("is_collective", False)):
        raise ConfigError(f"parallel='none' leaves processes alone, and those of {name} need each other; choose 'ddp'.")


# ---- what a step trains on


def sequences_read(sequences: int, config: TrainConfig, *, lengths: Sequence[int] | None = None) -> list[int]:
    """Numbers of the sequences that a training by `train` reads of so many, rising: from the first whole pass on all of them.

    Args:
        sequences: how many there are.
        config: of the training.
        lengths: of each, where ``config.group_by_length`` goes by them.
    """
    order = _Order(sequences, config, lengths=lengths)
    if order.epochs(config.steps) >= 1:
        return list(range(sequences))
    return sorted(row for step in range(config.steps) for row in order.rows(step))


class _Order:
    """Which sequences a step takes: the same as with Trainer, whose sampler accelerate seeds by ``seed + epoch``."""

    def __init__(self, sequences: int, config: TrainConfig, ranks: Ranks = ALONE, *, lengths: Sequence[int] | None = None) -> None:
        self._sequences, self._config, self._ranks = sequences, config, ranks
        self._lengths = lengths if config.group_by_length else None
        self._per_epoch = math.ceil(sequences / config.batch_sequences)
        self._epoch = -1
        self._rows: list[int] = []

    def begins_epoch(self, step: int) -> bool:
        return step % self._per_epoch == 0

    def rows(self, step: int) -> list[int]:
        """Sequences of a step."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._config.seed + epoch)
            self._epoch, self._rows = epoch, torch.randperm(self._sequences, generator=generator).tolist()
            if self._lengths is not None:
                self._rows = _grouped(self._rows, self._lengths, self._config.batch_sequences, generator)
        size = self._config.batch_sequences
        return self._rows[position * size : (position + 1) * size]

    def micro_batches(self, step: int) -> list[list[int]]:
        """Rows of each of this process' forwards of a step."""
        return share(self.rows(step), self._config.micro_sequences, self._ranks)

    def epochs(self, steps: int) -> float:
        return steps / self._per_epoch


def _grouped(rows: Sequence[int], lengths: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Each 50 steps' rows sorted by length, then the steps shuffled, but for a last one that is not full."""
    many = _GROUPED_STEPS * size
    ordered = [row for i in range(0, len(rows), many) for row in sorted(rows[i : i + many], key=lambda row: lengths[row])]
    full = len(rows) // size
    steps = torch.randperm(full, generator=generator).tolist()
    return [row for step in steps for row in ordered[step * size : (step + 1) * size]] + ordered[full * size :]


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _loss(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise DataError(f"{type(model).__name__} gives no loss for {', '.join(batch)}: it needs a head, and the data labels.")
    return cast(Tensor, loss)


def _num_tokens(batch: Mapping[str, Tensor]) -> int:
    if (mask := batch.get("attention_mask")) is not None:
        return int(mask.sum())
    ids = batch.get("input_ids")
    return ids.numel() if ids is not None else len(next(iter(batch.values())))


# ---- optimizer and precision


def _parameter_groups(model: nn.Module, config: TrainConfig, lr_factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainer's two groups, biases and all that belongs to a norm do not decay; two more for each factor on the learning rate."""
    norms = tuple(name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the model requires a gradient: nothing to train.")
    if low := next((name for name, p in trained if p.dtype is torch.float16), None):
        raise ConfigError(
            f"'{low}' is float16, in which a gradient's square is 0; load the model in float32 (compute='float16' multiplies in it)."
        )
    if low := next((name for name, p in trained if p.dtype is torch.bfloat16), None):
        warnings.warn(
            f"'{low}' is bfloat16, which rounds small steps away; load the model in float32 (compute='bfloat16' multiplies in it).",
            stacklevel=3,
        )
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {(None, True): [], (None, False): []}
    for name, parameter in trained:
        is_still = _NOT_DECAYED.search(name.lower()) or name.rpartition(".")[0] in norms
        groups.setdefault((matching_key(lr_factors, name), not is_still), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.lr * (1.0 if key is None else lr_factors[key]),
        }
        for (key, decays), parameters in groups.items()
    ]


def _lr_factor(step: int, *, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a fraction of ``lr``; transformers' schedules of these names."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {"constant": 1.0, "linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.min_lr_frac + (1 - config.min_lr_frac) * left


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.compute == "float16" and device.type != "cuda":
        raise ConfigError("compute='float16' needs a GPU; use bfloat16, float32 or auto.")
    return fast_dtype(device) if config.compute == "auto" else cast(torch.dtype, getattr(torch, config.compute))


def _autocast(device: torch.device, compute: torch.dtype) -> Any:
    return nullcontext() if compute is torch.float32 else torch.autocast(device.type, dtype=compute)


# ---- what surrounds the loop


@contextmanager
def _gradient_checkpointing(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; lower micro_sequences instead.")
    # transformers 5.23 gave the two methods new names and deprecates the old ones, which 5.17 has alone.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    config = cast(Any, model).config
    had_cache = getattr(config, "use_cache", False)
    if had_cache:  # models turn it off by themselves, with a warning that no compiled forward can give
        config.use_cache = False
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        if had_cache:
            config.use_cache = had_cache


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float], device: torch.device) -> float:
    """Leaves mode and random numbers as they were."""
    model.eval()
    with restored(device), torch.no_grad():
        value = float(evaluate(model))
    model.train()
    return value


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


# ---- what can go wrong


@contextmanager
def _memory_errors(config: TrainConfig, step: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        micro = config.micro_sequences or config.batch_sequences
        knob = f"lower micro_sequences ({micro})" if micro > 1 else "take shorter sequences"
        more = "" if config.gradient_checkpointing else ", or set gradient_checkpointing"
        raise TrainingError(f"out of memory at step {step}; {knob}{more}: a state that was saved can be continued so.") from error


def _not_finite(
    loss_and_norm: Sequence[float],
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    step: int,
    config: TrainConfig,
    state: Path | None,
) -> DivergedError:
    """What to raise before a loss or gradient that is no number gets into the weights."""
    loss, norm = loss_and_norm
    device = next(model.parameters()).device
    layers: Iterator[str | None] = (_first_bad_layer(model, _to(batch, device)) for batch in batches)
    if is_sharded(model) or config.expert_parallel > 1:  # then all processes run all their batches, or some wait for the others' parts
        layers = iter(list(layers))
    layer = next(filter(None, layers), None)
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    where = "all activations are finite"
    if layer is not None:
        where = f"the activations of '{layer}' are the first that are not finite"
    elif gradients:
        where += f", the gradient of '{gradients[-1]}' is not"
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    way_out = f"Lower lr ({config.lr}) or clip ({config.clip})"
    if state is not None:
        way_out += ", which is another run: it needs a new state folder (another --out, or --overwrite)"
        if has_state(state):
            way_out += f". '{state}' keeps the last good state as a record: with the same options it goes on to the same step"
    numbers = {"loss": loss, "grad_norm": norm}
    return DivergedError(f"the {what} at step {step}: {where}. {way_out}.", step=step, numbers=numbers)


@torch.no_grad()
def _first_bad_layer(model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """Name of the first module whose output is not finite, from one more forward."""
    found: list[str] = []

    def look(_module: nn.Module, _args: Any, output: Any, *, name: str) -> None:
        if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    handles = [module.register_forward_hook(partial(look, name=name)) for name, module in model.named_modules() if name]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
