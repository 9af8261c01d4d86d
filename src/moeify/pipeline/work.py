"""The state of a conversion, ``<out>.work``: captured FFN inputs and one file per fitted layer, each written whole.

A run that was killed continues there and comes to the same result; a finished run removes it.
"""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..hf.checkpoint import MANIFEST_FILE, read_calibration
from ..train.fit import FittedSite
from ..train.work import fingerprint as fingerprint
from ..train.work import open_work as open_work
from ..train.work import read_tensors, stored_run_id, write_tensors
from ..train.work import remove_work as remove_work
from ..train.work import run_id as run_id
from ..train.work import weights_checksum as weights_checksum


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
