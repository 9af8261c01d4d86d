"""The state of a conversion or training run, ``<out>.work``, each file written whole.

A run that was killed continues there and comes to the same result; a finished run removes it. Of a conversion these are captured FFN inputs
and one file per fitted layer: minutes, which another run to the same ``out`` may delete. Training is hours: another run has to be told to.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..hf.checkpoint import MANIFEST_FILE, TRAINING_FILE, read_calibration, remove_folder
from ..train.fit import FittedSite
from ..train.state import has_state, open_state

RUN_FILE = "run.json"
"""What tells one run from another; also the mark that the folder is ours."""
TRAINING_STATE = "train"
"""Folder in it for the state of the training loop."""

_KIND = {"kind": "training"}


def run_id(run: Mapping[str, Any]) -> str:
    """A short name for everything that decides the outcome of a run."""
    return _digest(json.dumps(run, sort_keys=True))


def open_work(work: Path, run: Mapping[str, Any]) -> None:
    """Use what an earlier run of the same conversion left; anything else there is started anew.

    Raises:
        CheckpointError: something of somebody else has the folder's name, or it cannot be written.
    """
    path, text = work / RUN_FILE, json.dumps(run, sort_keys=True)
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_suffix(".new")
    if work.exists():
        if not work.is_dir() or (not path.exists() and any(p != temporary for p in work.iterdir())):
            raise CheckpointError(f"'{work}' is in the way and is not the state of a conversion; move it or choose another --out.")
        if _is_training(path):
            raise CheckpointError(f"'{work}' is the state of a training run, which is not deleted; move it or choose another --out.")
        remove_work(work)
    try:
        work.mkdir(parents=True)
        temporary.write_text(text)
    except OSError as error:
        raise CheckpointError(f"cannot write '{work}': {error.strerror}; free space or choose another --out.") from error
    temporary.replace(path)


def open_training(work: Path, run: Mapping[str, Any], *, overwrite: bool) -> None:
    """Use what an earlier process of the same training run left; of another one that kept no step, nothing is lost by starting anew.

    Args:
        work: new folder, or what a run left.
        run: a JSON object: everything that decides the run's outcome.
        overwrite: delete the state of another run, or of a conversion.

    Raises:
        CheckpointError: there is one and ``overwrite`` is not set (says what differs), somebody else's folder has the name, or it cannot be
            written.
    """
    path, run = work / RUN_FILE, json.loads(json.dumps({**run, **_KIND}))
    if path.exists() and _read_run(path) != run:
        if not overwrite and not _is_training(path):
            raise CheckpointError(f"'{work}' is the state of a conversion; --overwrite deletes it, or choose another --out.")
        if overwrite or not has_state(work / TRAINING_STATE):
            remove_work(work)
    try:
        open_state(work, run)
    except CheckpointError as error:
        if not path.exists():
            raise
        raise CheckpointError(f"{str(error).removesuffix('.')}: another --out, or --overwrite.") from None


def remove_work(work: Path) -> None:
    """Delete the state of a run; what a kill leaves of it is still known to be ours."""
    remove_folder(work, last=RUN_FILE)


def finished_record(out: Path, work: Path) -> dict[str, Any] | None:
    """The calibration record of ``out``, if the run whose state lies in ``work`` has saved it and was killed while it deleted the state."""
    if not work.is_dir() or not (out / MANIFEST_FILE).is_file():
        return None
    try:
        record = read_calibration(out)
    except CheckpointError:
        return None
    path = work / RUN_FILE
    is_its_own = _digest(path.read_text()) == record.get("run") if path.exists() else not any(work.iterdir())
    return record if is_its_own else None


def finished_training(out: Path, work: Path) -> dict[str, Any] | None:
    """`finished_record` of a training run."""
    if not work.is_dir() or not (out / TRAINING_FILE).is_file():
        return None
    record, path = _read_run(out / TRAINING_FILE), work / RUN_FILE
    run = {key: value for key, value in _read_run(path).items() if key not in _KIND}
    is_its_own = run_id(run) == record.get("run") if path.exists() else not any(work.iterdir())
    return record if is_its_own else None


def _read_run(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_training(path: Path) -> bool:
    return _read_run(path).items() >= _KIND.items()


def write_fitted(path: Path, site: FittedSite) -> None:
    """Keep what fitting one site gave."""
    tensors = {"order_F": site.order_F, "scores_TE": site.scores_TE, **{f"router.{k}": v for k, v in site.router_state.items()}}
    temporary = path.with_suffix(".new")
    try:
        save_file(tensors, temporary, metadata={"captured": json.dumps(site.captured), "always_on": json.dumps(site.always_on)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write '{path}': {error}; free space and run again, what is fitted already is kept.") from error
    temporary.replace(path)


def read_fitted(path: Path) -> FittedSite | None:
    """What `write_fitted` kept; None where there is nothing, or what is there is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
        order_F, scores_TE = tensors["order_F"], tensors["scores_TE"]
        captured, always_on = (json.loads(metadata[key]) for key in ("captured", "always_on"))
    except (SafetensorError, KeyError):
        return None
    router = {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}
    return FittedSite(order_F=order_F, router_state=router, scores_TE=scores_TE, always_on=tuple(always_on), captured=captured)


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of the values and shapes of batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            digest.update(key.encode() + str(tuple(batch[key].shape)).encode() + batch[key].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_checksum(model: nn.Module) -> str:
    """What tells that a source of the same name holds other weights now."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
