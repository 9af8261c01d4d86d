"""Bounds on what a checkpoint's manifest may say: it comes from whoever made the checkpoint, and sizes in it become memory."""

from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

MOST_LAYERS = 100_000
"""Entries of a list of layers, and keys of an object."""
MOST_ITEMS = 2**20
"""Entries of any other list, such as the experts that always run."""
MOST_SIZE = 2**24
"""Width, number of experts, or any other whole number that is a size."""
MOST_CHARACTERS = 4096
"""Characters of a name or path."""

_LAYERS = ("sites", "channels", "projections", "presets")
_NO_SIZES = ("k", "seed", "schema")
"""Whole numbers of which nothing is made: a `TopK` that runs everything has k = 2^31."""
_DEEPEST = 32


def check_bounds(value: Any, *, where: str, key: str = "", depth: int = 0) -> None:
    """Look through a JSON value before anything is built from it.

    Args:
        value: JSON value.
        where: what is being read.
        key: what the value is called in its object.
        depth: of nesting so far.

    Raises:
        CheckpointError: too long, too large or negative, or nested too deeply; names the entry.
    """
    place = f"{where}: {key!r}" if key else where
    if depth > _DEEPEST:
        raise CheckpointError(f"{place} is nested more than {_DEEPEST} deep; the manifest is damaged.")
    if isinstance(value, Mapping):
        if len(value) > MOST_LAYERS:
            raise CheckpointError(f"{place} has {len(value)} entries, more than {MOST_LAYERS}; the manifest is damaged.")
        for name, entry in value.items():
            check_bounds(str(name), where=where, key=key, depth=depth + 1)
            check_bounds(entry, where=where, key=str(name), depth=depth + 1)
    elif isinstance(value, (list, tuple)):
        most = MOST_LAYERS if key in _LAYERS else MOST_ITEMS
        if len(value) > most:
            raise CheckpointError(f"{place} has {len(value)} entries, more than {most}; the manifest is damaged.")
        for entry in value:
            check_bounds(entry, where=where, key=key, depth=depth + 1)
    elif isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise CheckpointError(f"{place} is a text of {len(value)} characters, more than {MOST_CHARACTERS}; the manifest is damaged.")
    elif isinstance(value, int) and not isinstance(value, bool) and key not in _NO_SIZES and not 0 <= value <= MOST_SIZE:
        raise CheckpointError(f"{place} is {value if abs(value) < 10**30 else 'huge'}; sizes are in [0, {MOST_SIZE}].")
