"""The stages of a long experiment on disk: each in a folder named after everything that decides its outcome.

A stage that has finished with the same inputs is not run again, by whatever name it was asked for; one that was killed finds its folder as
it left it; one whose inputs have changed gets a folder of its own, and the earlier one stays, so that nothing is lost and going back costs
nothing.

Several processes may work in one folder: a stage is locked while it runs.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import locked, sync
from .._progress import Progress, Task
from ..errors import CheckpointError, ConfigError, MoeifyError

OWNER_FILE = "recipe.json"
"""What says whose folder it is."""
SCRATCH = "scratch"
"""Folder in a stage's folder for what only a killed run needs; it goes when the stage is recorded."""
_RECORD, _INPUTS, _CLOCK = "record.json", "inputs.json", "seconds.json"
_BEAT_S = 5.0


class StageTakenError(MoeifyError):
    """Another process works on a stage, or on one that it needs."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished stage."""

    label: str
    """What it is called; where an equal one had run before under another name, that name."""
    key: str
    """Of its inputs."""
    folder: Path
    """What it wrote."""
    result: Mapping[str, Any]
    """JSON values that it returned."""
    seconds: float
    """Time that it took, all its runs together."""


class Stages:
    """Runs stages in a folder, or finds them there.

    Args:
        root: the experiment's folder; made if it is not there.
        owner: name of the experiment.
        total: number of stages, for the numbers that are shown.
        progress: told what every stage tells, under its number and name.
        overall: told of every stage that has finished.
        say: told in a line which stages are run again and why.
        wait: for a stage that another process works on.

    Raises:
        ConfigError: the folder is of another experiment, or holds something else.
    """

    def __init__(
        self, root: Path, *, owner: str, total: int, progress: Progress, overall: Task, say: Callable[[str], None], wait: bool = True
    ) -> None:
        self._root, self._total, self._say, self._wait = root, total, say, wait
        self._progress, self._overall, self._count = progress, overall, 0
        open_folder(root, owner=owner)

    def run(self, label: str, inputs: Mapping[str, Any], work: Callable[[Path, Progress], Mapping[str, Any]]) -> Stage:
        """The result of a stage: ``work(folder, progress)``, unless it is known.

        Args:
            label: "seed0/sparsify.relu": a folder and a name.
            inputs: JSON values: all that decides the outcome; of an earlier stage its key.
            work: does the work in a folder, which holds what an earlier, killed call left there, and returns JSON values.

        Raises:
            StageTakenError: another process works on it, and nobody waits here.
        """
        self._count += 1
        inputs = json.loads(json.dumps(inputs))
        key = key_of(inputs)
        found = self._find(key, _RECORD)
        if found is None:
            with self._alone(label, key):
                found = self._find(key, _RECORD)  # who had the lock may have finished it
                if found is None:
                    found = self._find(key, _INPUTS) or self._root / f"{label}-{key}"
                    self._work(found, label, key, inputs, work)
        record = _read(found / _RECORD)
        shutil.rmtree(found / SCRATCH, ignore_errors=True)
        self._overall.advance(1)
        return Stage(label=record["label"], key=key, folder=found, result=record["result"], seconds=record["seconds"])

    def _find(self, key: str, file: str) -> Path | None:
        """The folder of a stage that has a file, under whatever name."""
        return next((path for path in sorted(self._root.glob(f"*/*-{key}")) if (path / file).is_file()), None)

    @contextmanager
    def _alone(self, label: str, key: str) -> Iterator[None]:
        """Hold the stage's lock."""
        lock = self._root / f"{key}.lock"
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock, wait=False))
            except OSError as error:
                if not self._wait and isinstance(error, BlockingIOError):
                    raise StageTakenError(f"{label}: another process works on it.") from None
                if not self._wait:
                    raise CheckpointError(f"cannot lock '{lock}': {error.strerror}; choose another --out.") from error
                if isinstance(error, BlockingIOError):
                    self._say(f"{label}: another process works on it; waits.")
                held.enter_context(locked(lock))
            yield

    def _work(
        self, folder: Path, label: str, key: str, inputs: Mapping[str, Any], work: Callable[[Path, Progress], Mapping[str, Any]]
    ) -> None:
        self._start(folder, label, key, inputs)
        clock = _Clock(folder / _CLOCK)
        result = work(folder, _Within(self._progress, f"[{self._count}/{self._total} {label}] ", clock))
        record = {"label": label, "key": key, "inputs": inputs, "result": result, "seconds": clock.beat(force=True)}
        write_json(folder / _RECORD, record)

    def _start(self, folder: Path, label: str, key: str, inputs: Mapping[str, Any]) -> None:
        if (folder / _INPUTS).is_file():
            self._say(f"{label}: continues where it stopped.")
            return
        name = label.rpartition("/")[2]
        earlier = [
            path for path in folder.parent.glob(f"{name}-*") if len(path.name) == len(name) + 1 + len(key) and (path / _INPUTS).is_file()
        ]
        if earlier:
            latest = max(earlier, key=lambda path: (path / _INPUTS).stat().st_mtime)
            changes = "; ".join(differences(_read(latest / _INPUTS), inputs)[:3])
            self._say(f"{label}: runs again ({changes}); its earlier state stays in '{latest}'.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _INPUTS, inputs)
        except OSError as error:
            raise CheckpointError(f"cannot write '{folder}': {error.strerror}; free space or choose another --out.") from error


def open_folder(root: Path, *, owner: str) -> None:
    """Make an experiment's folder, or check whose it is.

    Raises:
        ConfigError, CheckpointError: as `Stages`.
    """
    marker = root / OWNER_FILE
    if marker.is_file():
        if (found := _read(marker).get("name")) != owner:
            raise ConfigError(f"'{root}' holds the recipe {found!r}, not {owner!r}; choose another --out.")
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"'{root}' exists and was not written by moeify pipeline; choose another --out.")
    else:
        try:
            root.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"name": owner})
        except OSError as error:
            raise CheckpointError(f"cannot write '{root}': {error.strerror}; choose another --out.") from error


def key_of(inputs: Mapping[str, Any]) -> str:
    """A short name for all of ``inputs``."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two JSON values, a line each: "train.lr 0.001 -> 0.002"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line for key in dict.fromkeys((*old, *new)) for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{where} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_json(path: Path, value: Any) -> None:
    """Write a file whole: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
    sync(temporary)
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}); delete its folder, and its stage runs again.") from None
    return value if isinstance(value, dict) else {}


class _Clock:
    """Seconds of a stage over all its runs; on disk every few seconds, because a killed run cannot tell at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(_read(path)["seconds"]) if path.is_file() else 0.0
        self._start = self._written = time.monotonic()

    def beat(self, *, force: bool = False) -> float:
        now = time.monotonic()
        seconds = self._before + now - self._start
        if force or now - self._written >= _BEAT_S:
            self._written = now
            write_json(self._path, {"seconds": seconds})
        return seconds


class _Within:
    """A listener that shows what a stage tells under the stage's heading, and keeps its clock."""

    def __init__(self, progress: Progress, heading: str, clock: _Clock) -> None:
        self._progress, self._heading, self._clock = progress, heading, clock

    @contextmanager
    def task(self, label: str, *, total: int) -> Iterator[Task]:
        with self._progress.task(self._heading + label, total=total) as task:
            yield _Counted(task, self._clock)


class _Counted:
    def __init__(self, task: Task, clock: _Clock) -> None:
        self._task, self._clock = task, clock

    def advance(self, steps: int) -> None:
        self._task.advance(steps)
        self._clock.beat()
