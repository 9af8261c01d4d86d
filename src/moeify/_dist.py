"""What the processes of one training have to tell each other, and tensors of which each holds a part.

Without `torch.distributed`, or with one process, everything here is what it would be without it.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import errors

_Result = TypeVar("_Result")

BEAT_S = 20.0
"""Seconds between two signs of life while the first process does something long: far below any timeout."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, seen from one of them. All call the same methods in the same order."""

    rank: int = 0
    """This process, in [0, size)."""
    size: int = 1
    """Number of processes."""

    @classmethod
    def present(cls) -> "Ranks":
        """The processes of the default group; this one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and takes decisions."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same bits on each; a new tensor where there are several."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self._device(tensor), copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, tensor: Tensor, *, source: int) -> Tensor:
        """The tensor of process ``source``; the others give one of its shape and dtype."""
        if self.size == 1:
            return tensor
        sent = tensor.detach().to(self._device(tensor), copy=True).contiguous()
        dist.broadcast(sent, src=source)
        return sent.to(tensor.device)

    def same(self, value: Any) -> Any:
        """The JSON value of the first process; None is one small message."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_first and value is not None else b""
        length = int(self.broadcast(torch.tensor(len(text)), source=0))
        if length == 0:
            return None
        sent = torch.tensor(list(text), dtype=torch.uint8) if self.is_first else torch.empty(length, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(sent, source=0).tolist()))

    def first(self, action: Callable[[], _Result], *, is_long: bool = False) -> _Result | None:
        """Do something in the first process alone, and wait for it; an error there is one in all.

        Args:
            action: sends nothing to other processes.
            is_long: it may take longer than processes wait for each other; they are told now and then that it goes on.

        Returns:
            What it gave in the first process; None in others.

        Raises:
            MoeifyError: what ``action`` raised, with its fields; in other processes an echo (`MoeifyError.is_echo`). What is not one of
                ours is a TrainingError there.
        """
        result, error = None, None
        if self.is_first:
            try:
                with self._others_patient() if is_long and self.size > 1 else nullcontext():
                    result = action()
            except Exception as raised:  # noqa: BLE001 - raised again below, when the others know
                error = raised
        elif is_long:
            while int(self.broadcast(torch.tensor(0), source=0)):
                pass
        told = self.same(None if error is None else _told(error))
        if error is not None:
            raise error
        if told is not None:
            raise _echo(told)
        return result

    @contextmanager
    def _others_patient(self) -> Iterator[None]:
        """The first process' side: 1 every `BEAT_S` seconds, 0 at the end."""
        ended, failed = threading.Event(), list[RuntimeError]()

        def beat() -> None:
            try:
                while not ended.wait(BEAT_S):
                    self.broadcast(torch.tensor(1), source=0)
            except RuntimeError as error:  # another process is gone
                failed.append(error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if not failed:
                self.broadcast(torch.tensor(0), source=0)
        if failed:
            raise failed[0]

    def _device(self, tensor: Tensor) -> torch.device:
        """Where the default group takes such a tensor: gloo on the CPU, NCCL on a GPU alone."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        if tensor.device.type in backends:
            return tensor.device
        return torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())


ALONE = Ranks()
"""One process."""


def _told(error: Exception) -> list[Any]:
    """An error as JSON: the nearest of our classes, its text and its fields."""
    if not isinstance(error, errors.MoeifyError):
        return [errors.TrainingError.__name__, f"the first process failed: {type(error).__name__}: {error}", {}]
    kind = next(cls.__name__ for cls in type(error).__mro__ if hasattr(errors, cls.__name__))
    return [kind, str(error), vars(error)]


def _echo(told: Sequence[Any]) -> errors.MoeifyError:
    kind, text, fields = told
    cls: type[errors.MoeifyError] = getattr(errors, kind)
    error = cls.__new__(cls, text)  # not by __init__, which may ask for its fields
    vars(error).update(fields, is_echo=True)
    return error


# ---- tensors that are spread (DTensor: fully_shard's parameters, their gradients and moments)


def is_spread(tensor: Any) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")  # by name: the class' module takes as long to import as all of ours


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; itself where it is not spread. All processes call this together."""
    return cast(Any, tensor).full_tensor() if is_spread(tensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory."""
    return cast(Any, tensor).to_local() if is_spread(tensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor that may be spread, in place: each process its part, and nothing is sent."""
    if not is_spread(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    spread = cast(Any, tensor)
    local = part_of(spread)
    own = distribute_tensor(value.to(local.device), spread.device_mesh, spread.placements, src_data_rank=None)
    local.copy_(part_of(own))


@contextmanager
def gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, spread parameters of these modules (not of their children) are whole and plain, to be read; all processes enter together.

    Memory: of the whole parameters.
    """
    kept = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None and is_spread(p)]
    try:
        for module, name, parameter in kept:
            module._parameters[name] = nn.Parameter(whole(parameter.detach()), requires_grad=False)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
