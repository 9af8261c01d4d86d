"""What a training run tells: lines on the console, rows of a file, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from .._config import to_dict
from ..errors import CheckpointError, ConfigError, DivergedError
from ..ssd import SSD, spike
from ..train.loop import StepReport, TrainConfig

_AFTER_SAVING = ("decision", "probe", "final")  # of step s they belong to what comes after the state of step s
_FEW = 3  # steps before the time left is worth saying


class Sink(Protocol):
    """Who is told of numbers by step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step."""

    def close(self) -> None:
        """Nothing more comes."""


class JsonLines:
    """One JSON object a line, each on the disk's way at once; what is there of steps after ``start`` goes first.

    So a run that goes on from the state of step ``start`` writes every step once.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self._path = path
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_kept(line, start)] if path.exists() else []
        temporary = path.with_name(path.name + ".new")
        try:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row; numbers that JSON does not have become null."""
        row = {"kind": kind, "step": step, **{key: _finite(value) for key, value in values.items()}}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file; what could not be written has been said."""
        with suppress(OSError):  # a full disk once more: Python tries again what a failed flush left
            self._file.close()

    def _error(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write '{self._path}': {error.strerror}; free space and run again, the last state is kept.")


class TensorBoard:
    """Scalars for TensorBoard, which must be installed."""

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Each under its name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Board:
    """A training loop's steps for TensorBoard; a run that goes on writes over what a killed one wrote after its last state.

    Args:
        folder: of the events; they stay there.
        metric: what evaluations measure.
    """

    def __init__(self, folder: Path, *, metric: str) -> None:
        self._folder, self._metric = folder, metric
        self._sink: TensorBoard | None = None

    def watch(self, report: StepReport) -> None:
        """After a step: its loss, and what was read and measured at it.

        Raises:
            CheckpointError: it cannot be written.
        """
        step = report.step
        values = {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm, "seconds": report.seconds}
        if report.parts and report.parts[-1]["step"] == step:
            values |= {name: value for name, value in report.parts[-1].items() if name != "step"}
        told = {f"train/{name}": value for name, value in values.items()}
        if report.evals and report.evals[-1][0] == step:
            told[f"validation/{self._metric}"] = report.evals[-1][1]
        try:
            self._sink = self._sink or TensorBoard(self._folder, start=step - 1)
            self._sink.scalars(step, told)
        except OSError as error:
            raise CheckpointError(f"cannot write '{self._folder}': {error.strerror}; choose another --tensorboard.") from error

    def close(self) -> None:
        """Write what is left."""
        if self._sink is not None:
            self._sink.close()


class WandB:
    """Scalars for Weights & Biases, which must be installed; a run that goes on is the same run there, as long as ``folder`` is kept.

    A step may come twice, after a fallback or a kill: it is a number of its own, for W&B drops what goes back.
    """

    def __init__(self, project: str, *, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        check_wandb()
        import wandb  # type: ignore[import-not-found, unused-ignore]

        note = folder / "wandb"
        try:
            if not note.exists():
                note.write_text(secrets.token_hex(8))
            run = note.read_text()
        except OSError as error:
            raise CheckpointError(f"cannot write '{note}': {error.strerror}; free space and run again.") from error
        self._run: Any = wandb.init(project=project, name=name, id=run, resume="allow", config=dict(config))
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step at once."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def has_tensorboard() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def check_tensorboard() -> None:
    """Refuse what would only be seen when training begins.

    Raises:
        ConfigError: it is not installed.
    """
    if not has_tensorboard():
        raise ConfigError("--tensorboard needs TensorBoard; pip install 'moeify[train]', or leave it out.")


def check_wandb() -> None:
    """Refuse what would only be seen after the data has been prepared.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("[log] wandb is set, and wandb is not installed; pip install wandb, or leave it out.")


class Console:
    """A line with loss, learning rate, speed, mode and the time left, at most every ``every_s`` seconds.

    Args:
        say: told a line.
        steps: of the run.
        every_s: least time between two lines.
        clock: seconds that only rise.
    """

    def __init__(
        self, say: Callable[[str], None], *, steps: int, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._steps, self._every_s, self._clock = say, steps, every_s, clock
        self._begun: tuple[float, int] | None = None
        self._last = (0.0, 0, 0)

    def begin(self, step: int, tokens: int) -> None:
        """The clock of a run that goes on from ``step`` starts."""
        now = self._clock()
        self._begun, self._last = (now, step), (now, step, tokens)

    def step(self, step: int, *, loss: float, lr: float, tokens: int, mode: str) -> None:
        """One step is done."""
        assert self._begun is not None
        now = self._clock()
        last, _, last_tokens = self._last
        few = step - self._begun[1] == _FEW
        if not (few or now - last >= self._every_s) or step == self._steps:
            return
        self._last = (now, step, tokens)
        left = (now - self._begun[0]) / (step - self._begun[1]) * (self._steps - step)
        speed = (tokens - last_tokens) / max(now - last, 1e-9)
        self._say(f"step {step}/{self._steps}: loss {loss:.4f}, lr {lr:.3g}, {speed:,.0f} tokens/s, {mode}, {duration(left)} left")


class RunLog:
    """What is told of one attempt at a run, step by step.

    Args:
        train: of the run.
        ssd: the part that measures and decides; None trains dense.
        lines: the file.
        sinks: who else is told of numbers.
        start: steps that were done before.
        tokens: of text, of each step.
        per_epoch: steps that pass over the data once.
        say: told a line.
    """

    def __init__(
        self,
        train: TrainConfig,
        ssd: SSD | None,
        lines: JsonLines,
        sinks: Sequence[Sink],
        *,
        start: int,
        tokens: Sequence[int],
        per_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        self._train, self._ssd, self._lines, self._sinks, self._start = train, ssd, lines, sinks, start
        self._each, self._tokens, self._per_epoch, self._say = tokens, sum(tokens[:start]), per_epoch, say
        self._told: tuple[int, int] | None = None
        self._console = Console(say, steps=train.steps)
        self._console.begin(start, self._tokens)

    def watch(self, report: StepReport) -> None:
        """After a step, before its state is saved.

        Raises:
            DivergedError: the loss of a sparse step jumped (`spike`).
        """
        step, train = report.step, self._train
        self._tokens += self._each[step - 1]
        mode = "dense" if self._ssd is None else self._ssd.controller.mode
        self._tell_ssd()
        if step % train.log_every == 0 or step == train.steps:
            values = {
                "loss": report.loss,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "tokens": self._tokens,
                "seconds": report.seconds,
            }
            self._lines.write("step", step, {**values, "mode": mode})
            self._sink(step, {**{f"train/{name}": value for name, value in values.items()}, "train/sparse": float(mode == "sparse")})
        if report.evals and report.evals[-1][0] == step:
            loss = report.evals[-1][1]
            self._lines.write("eval", step, {"loss": loss})
            self._sink(step, {"validation/loss": loss})
            self._say(f"step {step}/{train.steps}: validation loss {loss:.4f}")
        self._console.step(step, loss=report.loss, lr=report.lr, tokens=self._tokens, mode=mode)
        if step % self._per_epoch == 0 and step < train.steps:
            done = step // self._per_epoch
            self._lines.write("epoch", step, {"done": done})
            self._say(f"step {step}/{train.steps}: the data is at its end, pass {done + 1} over it begins.")
        if self._ssd is not None and mode == "sparse" and (numbers := spike(self._ssd.config, report.losses)) is not None:
            raise DivergedError(f"the loss of step {step} jumped: {numbers}.", step=step, numbers=numbers)

    def close(self) -> None:
        """Nothing more comes."""
        self._lines.close()
        for sink in self._sinks:
            with suppress(OSError):
                sink.close()

    def _tell_ssd(self) -> None:
        """Measurements and decisions since the last time; not those of steps before ``start``, which were told then."""
        if self._ssd is None:
            return
        probes, decisions = self._ssd.probes, self._ssd.decisions
        if self._told is None:
            self._told = (sum(p.signals.step < self._start for p in probes), sum(d.step < self._start for d in decisions))
        for probe in probes[self._told[0] :]:
            step, row = probe.signals.step, to_dict(probe)
            self._lines.write("probe", step, row)
            self._sink(step, {f"ssd/{name}": v for name, v in row["signals"].items() if name != "step" and v is not None})
        for decision in decisions[self._told[1] :]:
            self._lines.write("decision", decision.step, to_dict(decision))
            if decision.before != decision.after:
                self._say(f"step {decision.step}/{self._train.steps}: {decision.before} to {decision.after}: {decision.reason}")
        self._told = (len(probes), len(decisions))

    def _sink(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.scalars(step, values)


def duration(seconds: float) -> str:
    """Seconds as people say them: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _is_kept(line: str, start: int) -> bool:
    try:
        row = json.loads(line)
        step, kind = int(row["step"]), row["kind"]
    except (ValueError, KeyError, TypeError):  # half a line, which a kill left
        return False
    return step < start if kind in _AFTER_SAVING else step <= start


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
