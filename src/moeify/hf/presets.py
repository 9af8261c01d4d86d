"""Presets into a saved checkpoint: ``config.json`` and the model card change, weights do not."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .. import _config
from .._files import sync
from ..errors import CheckpointError, ConfigError
from ..manifest import Manifest
from ..presets import Preset
from .card import with_presets
from .load import read_manifest


def read_presets(directory: Path) -> dict[str, Preset]:
    """The presets of a converted or thinned checkpoint by name.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    return {preset.name: preset for preset in read_manifest(directory).presets}


def write_presets(directory: Path, presets: Iterable[Preset]) -> dict[str, Preset]:
    """Add presets to a checkpoint; those that it has of the same names are replaced, others stay.

    ``config.json`` is replaced in one step, so a reader sees the old file or the whole new one; then the table in ``README.md``, if there
    is one.

    Returns:
        All presets that the checkpoint has now.

    Raises:
        CheckpointError: no converted checkpoint, a preset does not fit its layers, or it cannot be written; nothing has been changed then.
    """
    manifest = read_manifest(directory)
    kept = {preset.name: preset for preset in (*manifest.presets, *presets)}
    path, card = directory / "config.json", directory / "README.md"
    try:
        manifest = replace(manifest, presets=tuple(kept.values()))
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] = _with(config["quantization_config"], manifest)
        _replace(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if card.is_file():
            _replace(card, with_presets(card.read_text(encoding="utf-8"), kept.values()))
    except ConfigError as error:
        raise CheckpointError(f"'{directory}': {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot write '{error.filename or path}': {error.strerror}.") from error
    return kept


def _with(stored: dict[str, object], manifest: Manifest) -> dict[str, object]:
    """What is stored, with the presets of ``manifest``."""
    return {key: value for key, value in stored.items() if key != "presets"} | {
        "presets": [_config.to_dict(preset) for preset in manifest.presets]
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
