"""Writes checkpoints, whole or not at all: converted ones, trained ones, and what is exported."""

import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .._progress import NO_PROGRESS, Progress
from ..manifest import stamp
from .folders import EXPORT_FILE, MANIFEST_FILE, PRETRAINING_FILE, TRAINING_FILE, whole_folder


def save_checkpoint(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    calibration: Mapping[str, Any],
    card: str,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a converted model: checkpoint, tokenizer, ``moeify.json`` and ``README.md``; all of it, or nothing.

    Args:
        model: converted model.
        processor: tokenizer or processor to save beside it, or None.
        out: new folder.
        calibration: how the rules were set and what was measured; JSON values. Library versions are added.
        card: text of the model card, from `moeify.hf.card.model_card`.
        overwrite: replace ``out`` where it holds an earlier conversion; the old one is deleted only when the new one is complete.
        progress: told when everything is on the disk under its name.

    Raises:
        CheckpointError: ``out`` is in the way, or cannot be written (disk full); nothing has changed then.
        UnsupportedModelError: the model is dense.
    """
    files = {MANIFEST_FILE: _manifest_text(model, calibration), "README.md": card}
    _save_whole(model, processor, out, files, marker=MANIFEST_FILE, overwrite=overwrite, progress=progress)


def save_dense(model: nn.Module, processor: Any, out: Path) -> None:
    """Write a dense model and its tokenizer; all of it, or nothing.

    Raises:
        CheckpointError: ``out`` exists and is not empty, or cannot be written.
    """
    with whole_folder(out, overwrite=False) as partial:
        _save(model, processor, partial)


def save_trained(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    record: Mapping[str, Any],
    card: str,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a dense model that was trained, its tokenizer, ``sparsify.json`` and ``README.md``; all of it, or nothing.

    Args:
        model: dense model.
        processor: tokenizer or processor to save beside it, or None.
        out: new folder.
        record: how it was trained and what was measured; JSON values.
        card: text of the model card.
        overwrite: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    files = {TRAINING_FILE: json.dumps(record, indent=2) + "\n", "README.md": card}
    _save_whole(model, processor, out, files, marker=TRAINING_FILE, overwrite=overwrite, progress=progress)


def save_pretrained_run(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    record: Mapping[str, Any],
    card: str,
    calibration: Mapping[str, Any] | None = None,
    beside: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a model that was pre-trained, its tokenizer, ``pretrain.json``, ``README.md`` and its logs; all of it, or nothing.

    Args:
        model: dense or converted model.
        processor: tokenizer to save beside it.
        out: new folder.
        record: how it was trained and what was measured; JSON values.
        card: text of the model card.
        calibration: of a converted model, as in `save_checkpoint`: ``moeify.json`` is written, too.
        beside: files and folders to copy.
        overwrite: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    files = {PRETRAINING_FILE: json.dumps(record, indent=1) + "\n", "README.md": card}
    if calibration is not None:
        files[MANIFEST_FILE] = _manifest_text(model, calibration)
    _save_whole(model, processor, out, files, marker=PRETRAINING_FILE, beside=beside, overwrite=overwrite, progress=progress)


@contextmanager
def exported_folder(out: Path, *, overwrite: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write an export into, and the record of it, which becomes ``export.json``; all of it takes the name ``out``, or nothing.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    with whole_folder(out, overwrite=overwrite, marker=EXPORT_FILE) as partial:
        record: dict[str, Any] = {}
        yield partial, record
        (partial / EXPORT_FILE).write_text(json.dumps({**record, "versions": library_versions()}, indent=2) + "\n")


def library_versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    found = {}
    for name in ("moeify", "torch", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _manifest_text(model: nn.Module, calibration: Mapping[str, Any]) -> str:
    """``moeify.json`` of a converted model, whose config gets the manifest, too.

    Raises:
        UnsupportedModelError: the model is dense.
    """
    record = {**stamp(model).to_dict(), "calibration": {**calibration, "versions": library_versions()}}
    return json.dumps(record, indent=2) + "\n"


def _save_whole(
    model: Any,
    processor: Any,
    out: Path,
    files: Mapping[str, str],
    *,
    marker: str,
    beside: Iterable[Path] = (),
    overwrite: bool,
    progress: Progress,
) -> None:
    """Model, processor, texts by file name and copies of ``beside`` into a new folder: all of them, or nothing."""
    with progress.task(f"save {out}", total=1) as task:
        with whole_folder(out, overwrite=overwrite, marker=marker) as partial:
            _save(model, processor, partial)
            for name, text in files.items():  # after the model, whose own model card they replace
                (partial / name).write_text(text)
            for path in beside:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, partial / path.name)
        task.advance(1)


def _save(model: Any, processor: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)
