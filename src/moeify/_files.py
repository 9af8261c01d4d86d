"""Files and folders that a kill may leave half done."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path


def remove_folder(folder: Path, *, last: str, keep: Collection[str] = ()) -> None:
    """Delete a folder, the file that says whose it is at the end: what remains if this is killed is still known to be ours. With names to
    keep, only what else is in it."""
    for child in folder.iterdir():
        if child.name in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != last:
            child.unlink()
    if not keep:
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power cut could leave a name without the content."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
