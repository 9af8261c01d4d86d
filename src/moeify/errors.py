"""The library's exceptions: one line each, saying what, where and the way out.

``ConfigError``, ``UnsupportedModelError``, ``CheckpointError`` and ``DataError`` are also ``ValueError``, because to a caller they are bad
arguments; ``KernelError`` and ``TrainingError`` are ``RuntimeError``. The command line prints the message alone and exits with 2.
"""

import torch

_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")  # CPU on Linux and Windows; cuBLAS


class MoeifyError(Exception):
    """Base of every error that the library raises on purpose."""

    is_echo = False
    """Whether the first of several processes raises it, too, and says it."""


class ConfigError(MoeifyError, ValueError):
    """An option, configuration field or recipe is unknown, of the wrong type or out of range."""


class UnsupportedModelError(MoeifyError, ValueError):
    """No FFN of the model can be converted, or one that was asked for cannot; names each near miss and its reason."""


class KernelError(MoeifyError, RuntimeError):
    """An explicitly requested kernel cannot run here, or got tensors that it does not take."""


class CheckpointError(MoeifyError, ValueError):
    """A checkpoint is missing, truncated, foreign, of a newer schema, or could not be written."""


class DataError(MoeifyError, ValueError):
    """A data source is missing, empty, binary, too short, or lacks the named column."""


class TrainingError(MoeifyError, RuntimeError):
    """Training cannot go on: the loss or a gradient is no number any more, or memory ran out; what was kept before is still there."""


class DivergedError(TrainingError):
    """The loss or a gradient of a step is no number, or has jumped; what was saved before is still there."""

    def __init__(self, message: str, *, step: int, numbers: dict[str, float]) -> None:
        super().__init__(message)
        self.step = step
        """Optimizer steps done when it was seen."""
        self.numbers = numbers
        """What was seen, and the limits that it was held against."""


class StoppedError(MoeifyError):
    """Somebody asked training to stop: the step was finished and saved, and the same call goes on from there."""

    def __init__(self, message: str, *, step: int, signum: int = 2) -> None:
        super().__init__(message)
        self.step = step
        """Optimizer steps done."""
        self.signum = signum
        """The signal that asked; the command line exits with 128 more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has an exception of its own for accelerators only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )
