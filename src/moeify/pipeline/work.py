"""The state of a conversion or training run, ``<out>.work``, each file written whole.

A run that was killed continues there and comes to the same result; a finished run removes it. Of a conversion these are captured FFN inputs
and one file per fitted layer: minutes, which another run to the same ``out`` may delete. Training is hours: another run has to be told to.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..hf.folders import MANIFEST_FILE, TRAINING_FILE
from ..hf.load import read_calibration
from ..train import work as train_work
from ..train.fit import FittedSite
from ..train.state import has_state, open_state
from ..train.work import RUN_FILE as RUN_FILE
from ..train.work import fingerprint as fingerprint
from ..train.work import read_tensors, stored_run_id, write_tensors
from ..train.work import remove_work as remove_work
from ..train.work import run_id as run_id
from ..train.work import weights_checksum as weights_checksum

TRAINING_STATE = "train"
"""Folder in it for the state of the training loop."""
DISTILLATION = "projections"
"""Folder in it for the layers that are distilled first. They depend on nothing that comes after, so another conversion or training of the
same model to the same place finds them again."""

_KIND = {"kind": "training"}


def open_work(work: Path, run: Mapping[str, Any]) -> None:
    """`moeify.train.work.open_work`, which deletes the state of another run, but not that of training.

    Raises:
        CheckpointError: ``work`` is the state of training, or something of somebody else, or it cannot be written.
    """
    if _is_training(work / RUN_FILE):
        raise CheckpointError(f"'{work}' is the state of a training run, which is not deleted; move it or choose another --out.")
    train_work.open_work(work, run, keep=(DISTILLATION,))


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
            remove_work(work, keep=(DISTILLATION,))
            if work.exists():  # with what was distilled; the rest is to be this run's
                temporary = path.with_suffix(".new")
                temporary.write_text(json.dumps(run, sort_keys=True))
                temporary.replace(path)
    try:
        open_state(work, run)
    except CheckpointError as error:
        if not path.exists():
            raise
        raise CheckpointError(f"{str(error).removesuffix('.')}: another --out, or --overwrite.") from None


def finished_record(out: Path, work: Path) -> dict[str, Any] | None:
    """The calibration record of ``out``, if the run whose state lies in ``work`` has saved it and was killed while it deleted the state."""
    if not work.is_dir() or not (out / MANIFEST_FILE).is_file():
        return None
    try:
        record = read_calibration(out)
    except CheckpointError:
        return None
    stored = stored_run_id(work)
    is_its_own = stored == record.get("run") if stored is not None else not any(work.iterdir())
    return record if is_its_own else None


def finished_training(out: Path, work: Path, *, file: str = TRAINING_FILE) -> dict[str, Any] | None:
    """`finished_record` of a training run, whose record is ``file``."""
    if not work.is_dir() or not (out / file).is_file():
        return None
    record, path = _read_run(out / file), work / RUN_FILE
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
    write_tensors(path, tensors, {"captured": site.captured, "always_on": site.always_on})


def read_fitted(path: Path) -> FittedSite | None:
    """What `write_fitted` kept; None where there is nothing, or what is there is damaged."""
    found = read_tensors(path)
    if found is None:
        return None
    tensors, metadata = found
    try:
        order_F, scores_TE = tensors["order_F"], tensors["scores_TE"]
        captured, always_on = metadata["captured"], metadata["always_on"]
    except KeyError:
        return None
    router = {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}
    return FittedSite(order_F=order_F, router_state=router, scores_TE=scores_TE, always_on=tuple(always_on), captured=captured)
