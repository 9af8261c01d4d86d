"""Work that a kill may interrupt: a folder that knows whose it is, so that another call continues what the same run left, and files of
tensors that are whole or not there.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import remove_folder, sync
from ..errors import CheckpointError

RUN_FILE = "run.json"
"""What tells one run from another; also the mark that the folder is ours."""


def run_id(run: Mapping[str, Any]) -> str:
    """A short name for everything that decides the outcome of a run."""
    return _digest(json.dumps(run, sort_keys=True))


def stored_run_id(work: Path) -> str | None:
    """`run_id` of the run whose state lies in ``work``; None where nothing says."""
    path = work / RUN_FILE
    return _digest(path.read_text()) if path.exists() else None


def open_work(work: Path, run: Mapping[str, Any], *, keep: Sequence[str] = ()) -> None:
    """Use what an earlier run of the same run left; anything else there is started anew.

    Args:
        work: new folder, or what a run left.
        run: a JSON object: everything that decides the run's outcome.
        keep: names of folders in it that stay whichever run left them, because they know whose they are themselves.

    Raises:
        CheckpointError: something of somebody else has the folder's name, or it cannot be written.
    """
    path, text = work / RUN_FILE, json.dumps(run, sort_keys=True)
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_suffix(".new")
    if work.exists():
        if not work.is_dir() or (not path.exists() and any(p != temporary for p in work.iterdir())):
            raise CheckpointError(f"'{work}' is in the way and is not the state of an earlier run; move it or choose another --out.")
        remove_work(work, keep=keep)
    try:
        work.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
    except OSError as error:
        raise CheckpointError(f"cannot write '{work}': {error.strerror}; free space or choose another --out.") from error
    temporary.replace(path)


def remove_work(work: Path, *, keep: Sequence[str] = ()) -> None:
    """Delete the state of a run; what a kill leaves of it is still known to be ours. Where folders of a name in ``keep`` are there, they
    and the file that says whose it is stay."""
    kept = [name for name in keep if (work / name).is_dir()]
    remove_folder(work, last=RUN_FILE, keep=(*kept, RUN_FILE) if kept else ())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, its JSON values beside the tensors: whole, or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_suffix(".new")
    try:
        save_file(dict(tensors), temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
        sync(temporary)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write '{path}': {error}; free space and run again, what is fitted already is kept.") from error
    temporary.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_tensors` wrote; None where there is nothing, or what is there is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    except (SafetensorError, ValueError):
        return None


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of the values and shapes of batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            digest.update(key.encode() + str(tuple(batch[key].shape)).encode())
            digest.update(_bytes_of(batch[key]))
    return digest.hexdigest()[:16]


def weights_checksum(model: nn.Module) -> str:
    """What tells that a source of the same name holds other weights now."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(_bytes_of(parameter), checksum)
    return f"{checksum:08x}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of any dtype, on any device."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
