"""What the processes of one training have to tell each other, and tensors of which each holds a part.

Without `torch.distributed`, or with one process, everything here is what it would be without it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import errors

_Result = TypeVar("_Result")


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
        """The JSON value of the first process."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        length = int(self.broadcast(torch.tensor(len(text)), source=0))
        sent = torch.tensor(list(text), dtype=torch.uint8) if self.is_first else torch.empty(length, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(sent, source=0).tolist()))

    def first(self, action: Callable[[], _Result]) -> _Result | None:
        """Do something in the first process alone, and wait for it; an error of ours there is one in all.

        Returns:
            What it gave in the first process; None in others.
        """
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except errors.MoeifyError as raised:
                error = raised
        told = self.same(None if error is None else [type(error).__name__, str(error)])
        if error is not None:
            raise error
        if told is not None:
            raise getattr(errors, told[0], errors.MoeifyError)(told[1])
        return result

    def _device(self, tensor: Tensor) -> torch.device:
        """Where the default group takes such a tensor: gloo on the CPU, NCCL on a GPU alone."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        if tensor.device.type in backends:
            return tensor.device
        return torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())


ALONE = Ranks()
"""One process."""


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
