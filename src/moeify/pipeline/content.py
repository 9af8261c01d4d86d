"""What tells models and data apart, in names of stages: of files on this machine their content, not their place."""

import hashlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from .._config import to_dict
from ..data import DataConfig
from .recipe import RecipeConfig


def model_id(recipe: RecipeConfig) -> dict[str, Any]:
    """What tells the starting model from another: of files on this machine their content, not their place."""
    model = recipe.model
    return {**to_dict(model), "source": content_of(model.source), "tokenizer": content_of(model.tokenizer), "task": recipe.task}


def data_id(data: DataConfig) -> dict[str, Any]:
    """What tells data from other data: of files on this machine their content, not their place."""
    # what Python has of itself differs from version to version
    version = list(sys.version_info[:3]) if data.data.startswith("builtin:") else None
    return {**to_dict(data), "data": content_of(data.data), "python": version}


def content_of(source: str | None) -> str | None:
    """A checksum of a file or of all files in a folder; anything else (a Hub id, builtin data) as it is."""
    path = Path(source or "").expanduser()
    if not source or not path.exists():
        return source
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    seen = tuple((file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    return _digest(path, seen)


@lru_cache(maxsize=256)
def _digest(path: Path, seen: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their sizes and times of change, so that a process reads them once."""
    digest = hashlib.sha256()
    for file, *_ in seen:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]
