"""How long work tells how far it is, without knowing who listens."""

from contextlib import AbstractContextManager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, steps: int) -> None:
        """Tell that ``steps`` more of the task's total are done."""


class Progress(Protocol):
    """A listener: the command line's bars, a log, or nothing."""

    def task(self, label: str, *, total: int) -> AbstractContextManager[Task]:
        """Open a task of ``total`` steps (whatever unit the caller counts)."""


class _NullTask:
    def __enter__(self) -> "_NullTask":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, steps: int) -> None:
        return None


class _NullProgress:
    def task(self, label: str, *, total: int) -> _NullTask:
        return _NullTask()


NO_PROGRESS: Progress = _NullProgress()
"""The default: nobody listens."""
