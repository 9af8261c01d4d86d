"""Tensors that processes hold parts of, on disk: `torch.distributed.checkpoint`, every process one file of safetensors.

Its usual planner pickles what it notes about a checkpoint. Here a tensor's offsets are in the header of each file, as JSON
(`HuggingFaceStorageWriter`), so that no file is ever unpickled. What processes tell each other while they plan goes through torch's own
pickled messages between them; nothing of that is kept.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .._dist import Ranks
from ..errors import CheckpointError

Like = Callable[[str, torch.Size, torch.dtype], Tensor | None]
"""(name, shape, dtype on disk) -> a tensor to read into, spread or not; None: it is not known."""


def write_shards(folder: Path, tensors: Mapping[str, Tensor], *, ranks: Ranks) -> None:
    """Write every process' part of ``tensors`` into a folder that is there; what all have is written once. All processes call this.

    Raises:
        CheckpointError: one of them could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _quiet():
        try:
            save(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                no_dist=ranks.size == 1,
            )
        except CheckpointException as error:
            failures = "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise CheckpointError(f"cannot write '{folder}': {failures}; free space and run again, the last state is kept.") from error


def read_shards(folder: Path, like: Like, *, ranks: Ranks) -> dict[str, Tensor]:
    """Read what `write_shards` wrote, with any number of processes, which all call this.

    Args:
        folder: of .safetensors files.
        like: what each tensor is read into.

    Raises:
        CheckpointError: a file is missing or damaged, or has what ``like`` does not know.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: dict[str, Tensor] = {}
    with _quiet():
        try:
            for name, found in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
                assert isinstance(found, TensorStorageMetadata)
                target = like(name, found.size, found.properties.dtype)
                whole = target is not None and target.shape == found.size
                # The reader would leave what no file has as it was.
                if target is None or not whole or sum(math.prod(chunk.sizes) for chunk in found.chunks) != math.prod(found.size):
                    raise CheckpointError(f"'{folder}' is of another model, or a file is missing: '{name}' differs; choose another folder.")
                tensors[name] = target
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.size == 1)
        except (CheckpointException, SafetensorError, OSError) as error:
            failures = getattr(error, "failures", {0: (error,)})
            what = "; ".join(str(failure[0]) for failure in failures.values())
            raise CheckpointError(f"'{folder}' is damaged: {what}; delete the state to train from the start.") from error
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """It warns in a process that is alone that it is alone."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    finally:
        logger.setLevel(level)
