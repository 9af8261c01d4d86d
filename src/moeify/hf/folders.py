"""Output folders: written beside their place, they get their name whole or not at all; what a kill leaves, the next run mends."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .._files import remove_folder, sync
from ..errors import CheckpointError, MoeifyError

MANIFEST_FILE = "moeify.json"
"""The manifest and how it was calibrated, beside the checkpoint that convert writes."""
TRAINING_FILE = "sparsify.json"
"""How a dense checkpoint was trained, beside the one that sparsify writes."""
PRETRAINING_FILE = "pretrain.json"
"""How a model was pre-trained, beside the checkpoint that pretrain writes."""
EXPORT_FILE = "export.json"
"""What an export is of and how it was checked, beside the files that export writes."""
_MARKERS = (MANIFEST_FILE, TRAINING_FILE, PRETRAINING_FILE, EXPORT_FILE)


@contextmanager
def whole_folder(out: Path, *, overwrite: bool, marker: str = MANIFEST_FILE) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the body has ended without an error, and vanishes otherwise.

    Same parent, so same file system: the rename is atomic. Files reach the disk before the name does.
    """
    check_output(out, overwrite=overwrite)
    out = out.absolute()
    partial, replaced = _names_beside(out)
    done = False
    try:
        if partial.exists():
            remove_folder(partial, last=_marker_of(partial) or marker)
        partial.mkdir(parents=True)
        (partial / marker).touch()  # says that the folder is ours, see _check_leftover
        yield partial
        is_dense = (partial / marker).stat().st_size == 0
        _sync_all(partial)
        if out.exists() and any(out.iterdir()):
            out.rename(replaced)
        partial.rename(out)
        done = True
        if is_dense:
            (out / marker).unlink()
        sync(out.parent)
    except MoeifyError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write '{out}': {_reason(error)}; nothing was changed.") from error
    finally:
        with suppress(OSError):  # the next run's check_output repeats it
            if not done and partial.exists():
                remove_folder(partial, last=marker)
            recover(out)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder before any work is done for it; first `recover` what a killed save left.

    Raises:
        CheckpointError: ``out`` exists, is not empty and may not be replaced, its parent cannot be written, or a name beside it that saving
            needs is taken.
    """
    recover(out)
    if out.is_dir():
        if any(out.iterdir()):
            is_ours = _marker_of(out) is not None
            if not overwrite:
                way_out = "--overwrite replaces it, or choose another --out" if is_ours else "choose another --out"
                raise CheckpointError(f"the output folder '{out}' exists and is not empty; {way_out}.")
            if not is_ours:
                raise CheckpointError(
                    f"'{out}' holds no {' or '.join(_MARKERS)}, so it is not an earlier conversion and is not replaced; "
                    "choose another --out."
                )
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"the output '{out}' is a file; choose another --out.")
    for leftover in _names_beside(out):
        _check_leftover(leftover)
    check_writable(next(p for p in out.absolute().parents if p.exists()), out)


def check_apart(out: Path, source: str | os.PathLike[str]) -> None:
    """Refuse an output folder that is the source, lies in it, or holds it: a source is never written to, nor replaced.

    Raises:
        CheckpointError: it does; names both.
    """
    folder, new = Path(source).expanduser().resolve(), out.expanduser().resolve()
    if folder.is_dir() and new.is_relative_to(folder):
        where = "is the source" if new == folder else f"lies in the source '{source}'"
        raise CheckpointError(f"the output folder '{out}' {where}, which is never written to; choose another --out.")
    if folder.exists() and folder.is_relative_to(new):
        raise CheckpointError(f"the output folder '{out}' holds the source '{source}', which is never replaced; choose another --out.")


def check_writable(folder: Path, out: Path) -> None:
    """Make a nameless file in ``folder``: permissions alone do not tell (a read-only file system, root).

    Raises:
        CheckpointError: it is no folder, or nothing can be written in it; ``out`` is what the user named.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' is not a folder that can be written ({error.strerror}); choose another --out than '{out}'."
        ) from error


def recover(out: Path) -> None:
    """Undo or finish a replacement of ``out`` that was killed: the earlier conversion gets its name back, or goes where the new one has it.

    Nothing happens where no replacement was under way.
    """
    replaced = _names_beside(out)[1]
    if (marker := _marker_of(replaced)) is None:
        if replaced.is_dir() and not any(replaced.iterdir()):
            replaced.rmdir()  # killed when all but the folder was deleted
        return
    if out.is_dir() and any(out.iterdir()):
        remove_folder(replaced, last=marker)
    elif not out.exists() or out.is_dir():
        if out.is_dir():
            out.rmdir()
        replaced.rename(out)


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _names_beside(out: Path) -> tuple[Path, Path]:
    """Where a new ``out`` is written, and where an earlier one is kept while the new one takes its name."""
    out = out.absolute()
    return out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced-by-moeify")


def _marker_of(folder: Path) -> str | None:
    """The file that says that moeify wrote a folder; None where it did not."""
    return next((name for name in _MARKERS if (folder / name).is_file()), None)


def _check_leftover(folder: Path) -> None:
    """A killed save leaves folders of its own: they may go. Anything else of that name may not."""
    if folder.exists() and not (folder.is_dir() and (_marker_of(folder) is not None or not any(folder.iterdir()))):
        raise CheckpointError(f"'{folder}' is in the way and was not written by moeify; move it, or choose another --out.")


def _sync_all(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in (*names, ""):  # the folder itself at the end
            sync(Path(folder) / name)


def _reason(error: Exception) -> str:
    """Why writing failed; safetensors' errors carry the system's number only in their text."""
    text = first_line(error)
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or "No space left" in text or any(f"os error {number})" in text for number in full):
        return "the disk is full"
    return text
