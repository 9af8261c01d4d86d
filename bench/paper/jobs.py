"""``--jobs N``: processes that share the stages of figures.

Nobody assigns work. Every process goes through the same list of pieces, works on what is not done, and leaves a stage that another one has
locked, with what needs it, for its next round; it waits only when nothing else is left. A killed process's lock vanishes with it, and what
it worked on goes on where it was. Seeds belong to stages, so numbers do not depend on who made them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch
from transformers.utils.logging import disable_progress_bar

from moeify._files import CAN_LOCK
from moeify._progress import NO_PROGRESS
from moeify._terminal import Lines
from moeify.errors import ConfigError, MoeifyError
from moeify.pipeline.stages import StageTakenError, key_of, open_folder

from .figures import Figure, read_figure
from .measure import Run, pretrain, run_experiment
from .recipes import Curve, experiment, pretraining

_LAST = ("dense", "sparsify", "convert", "ztw", "sweep")
"""Stages that end a piece, in the order of their pieces."""
_LOOK_S = 1.0
_WORTH_TELLING_S = 1.0


class WorkerError(MoeifyError):
    """A process could not do its work."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Stages of one seed that follow from each other; what another piece has done of them is found."""

    model: str
    """Whose recipes it takes."""
    seed: int
    """Which."""
    last: str = "pretraining"
    """Stage that it ends with: "pretraining", or one of `moeify.pipeline.run_recipe.STAGES`."""
    curves: tuple[Curve, ...] = ()
    """One; its way to train and to convert."""
    ztw: bool = False
    """Early exit, too."""

    def __str__(self) -> str:
        names = [curve.name for curve in self.curves] + ["ztw"] * (self.ztw and self.last == "sweep")
        of = f" of {', '.join(names)}" if self.last in ("sparsify", "convert", "sweep") else ""
        return f"{self.model}, seed {self.seed}: {self.last}{of}"


def pieces_of(figure: Figure, run: Run) -> list[Piece]:
    """What a figure's stages are cut into: pieces that take long and that others need come first.

    One recipe for each curve makes the same stages as one for all, for a stage's name knows only what decides it. Early exit is trained
    for what the first curve's training reads, and goes with it.
    """
    if figure.model is None:
        return []
    curves = figure.curves(run.smoke)
    pieces = [Piece(model=figure.model, seed=seed) for seed in run.seeds]
    for last in _LAST[: _LAST.index(figure.last_stage) + 1]:
        chosen = {"dense": curves[:1], "ztw": curves[:1] if figure.ztw else ()}.get(last, curves)
        for curve in chosen:
            ztw = figure.ztw and curve == curves[0] and last in ("ztw", "sweep")
            pieces += [Piece(model=figure.model, seed=seed, last=last, curves=(curve,), ztw=ztw) for seed in run.seeds]
    return pieces


def carry_out(piece: Piece, run: Run) -> None:
    """Do what is not done of a piece.

    Raises:
        StageTakenError: another process has a part, and ``run`` does not wait.
    """
    run = replace(run, seeds=(piece.seed,))
    if piece.curves:
        run_experiment(piece.model, piece.curves, run, stage=piece.last, ztw=piece.ztw)
    else:
        pretrain(piece.model, run, seed=piece.seed)


def work(pieces: Sequence[Piece], run: Run) -> Iterator[tuple[int, float]]:
    """Carry all pieces out, together with whoever else works in the same folder; the number of each that is done, and seconds it took here.

    What comes first is looked at again after every piece that took longer than a look: another process may have made way for it.
    """
    run = replace(run, wait=False)
    left = list(range(len(pieces)))
    while left:
        has_worked = False
        for i in list(left):
            start = time.monotonic()
            with suppress(StageTakenError):
                carry_out(pieces[i], run)
                left.remove(i)
                yield i, time.monotonic() - start
            if has_worked := time.monotonic() - start > _LOOK_S:
                break
        if left and not has_worked:
            time.sleep(_LOOK_S)


def share(figures: Sequence[Figure], run: Run, *, jobs: int) -> Iterator[Figure]:
    """Run the stages of figures in ``jobs`` processes; yields each figure when its stages are done.

    The threads that torch has here are divided among the processes, for what the figure's maker computes, too, until this ends.

    Raises:
        ConfigError: the system has no locks; the folder is somebody else's.
        WorkerError: a process met an error, which is this one's message, or was killed; the others are stopped. The same call goes on.
    """
    if not CAN_LOCK:
        raise ConfigError("--jobs needs file locks, which this system does not have; leave it out.")
    pieces: list[Piece] = []
    needed: dict[str, set[int]] = {}
    for figure in figures:
        wanted = [] if _is_measured(figure, run) else pieces_of(figure, run)
        pieces += [piece for piece in wanted if piece not in pieces]
        needed[figure.number] = {pieces.index(piece) for piece in wanted}
        if wanted:
            _open_folders(wanted[-1], run)
    waiting = list(figures)
    with _threads(max(1, torch.get_num_threads() // jobs)), _workers(min(jobs, len(pieces)), pieces, run) as workers:
        done: set[int] = set()
        while waiting:
            while waiting and needed[waiting[0].number] <= done:
                yield waiting.pop(0)
            if waiting:
                for worker, (i, seconds) in _reports(workers):
                    if i not in done and seconds >= _WORTH_TELLING_S:
                        run.say(f"{len(done) + 1}/{len(pieces)} {pieces[i]}: {seconds:.0f} s of process {worker}")
                    done.add(i)


def _open_folders(piece: Piece, run: Run) -> None:
    """Make the folders of a model's stages, before two processes do it at once."""
    size = {"smoke": run.smoke, "large": run.large}
    for recipe in (pretraining(piece.model, run.inputs, **size), experiment(piece.model, piece.curves, run.inputs, **size)):
        open_folder(run.out / "stages" / recipe.name, owner=recipe.name)


def _is_measured(figure: Figure, run: Run) -> bool:
    """Whether its numbers are in its file."""
    path = run.out / f"fig{figure.number}.json"
    return path.exists() and read_figure(path).get("fingerprint") == key_of(figure.settings(run))


# -- processes


@dataclass(frozen=True, kw_only=True)
class _Worker:
    number: int
    process: SpawnProcess
    reports: Connection


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads here and in processes that are started."""
    before, name = torch.get_num_threads(), "OMP_NUM_THREADS"
    variable = os.environ.get(name)
    torch.set_num_threads(count)
    os.environ[name] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop(name)
        if variable is not None:
            os.environ[name] = variable


@contextmanager
def _workers(count: int, pieces: Sequence[Piece], run: Run) -> Iterator[list[_Worker]]:
    """Processes at work; whatever ends the block ends them."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    asked = {"inputs": dict(run.inputs), "out": run.out, "seeds": run.seeds, "smoke": run.smoke, "large": run.large, "device": run.device}
    workers: list[_Worker] = []
    try:
        for number in range(1, count + 1):
            receiver, sender = context.Pipe(duplex=False)
            shown = run.progress is not NO_PROGRESS
            process = context.Process(target=_main, args=(sender, number, pieces, asked, torch.get_num_threads(), shown), daemon=True)
            process.start()
            sender.close()  # the process has its own: the pipe ends with it
            workers.append(_Worker(number=number, process=process, reports=receiver))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.reports.close()


def _reports(workers: list[_Worker]) -> Iterator[tuple[int, tuple[int, float]]]:
    """What processes tell next; those that have finished leave ``workers``.

    Raises:
        WorkerError: one tells of an error, or has ended without a word.
    """
    for reports in wait([worker.reports for worker in workers]):
        worker = next(worker for worker in workers if worker.reports is reports)
        try:
            told = worker.reports.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise WorkerError(f"process {worker.number} of --jobs {how}; the same command goes on where it was.") from None
            workers.remove(worker)
        else:
            if isinstance(told, str):
                raise WorkerError(told)
            yield worker.number, told


def _main(reports: Connection, number: int, pieces: Sequence[Piece], asked: Mapping[str, object], threads: int, shown: bool) -> None:
    """A process: does pieces and tells of each that is done, or of its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the starter, too, who stops this one
    threading.Thread(target=_end_with_starter, daemon=True).start()
    torch.set_num_threads(threads)
    disable_progress_bar()
    run = Run(
        **asked,  # type: ignore[arg-type]
        progress=Lines(_Named(number)) if shown else NO_PROGRESS,  # type: ignore[arg-type]
        say=lambda line: print(f"process {number}: {line}", file=sys.stderr, flush=True),
    )
    try:
        for found in work(pieces, run):
            reports.send(found)
    except (MoeifyError, OSError) as error:
        reports.send(str(error))
        sys.exit(2)


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    if starter is not None:
        starter.join()
        os._exit(1)


class _Named:
    """stderr, with the process's number before every line."""

    def __init__(self, number: int) -> None:
        self._prefix = f"process {number}: "

    def write(self, text: str) -> int:
        return sys.stderr.write(self._prefix + text if text.strip() else text)

    def flush(self) -> None:
        sys.stderr.flush()
