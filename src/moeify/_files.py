"""Files and folders that a kill may leave half done."""

import shutil
from pathlib import Path


def remove_folder(folder: Path, *, last: str) -> None:
    """Delete a folder, the file that says whose it is at the end: what remains if this is killed is still known to be ours."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != last:
            child.unlink()
    shutil.rmtree(folder)
