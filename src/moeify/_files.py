"""Files and folders that a kill may leave half done."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
"""Whether `locked` keeps others out on this system."""


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


def write_whole(path: Path, text: str) -> None:
    """Write a file that takes its name when its content is on the disk: a kill leaves all of it, or nothing under that name."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file's lock, which vanishes with the process, however that ends. The file is made, and deleted again.

    Args:
        path: in a folder that exists.
        wait: until whoever holds it lets go; where files cannot be locked (`CAN_LOCK`, some network disks), nobody is kept out.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is False. OSError: files cannot be locked there, and ``wait`` is False.
    """
    handle = _open_locked(path, wait=wait)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _open_locked(path: Path, *, wait: bool) -> int | None:
    """A locked file's handle; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:  # deleted between the two looks
            pass
        except OSError:
            if not wait:
                os.close(handle)
                raise
            os.close(handle)
            return None
        os.close(handle)  # whoever held it has deleted the file: its lock keeps nobody out
