"""Text larger than memory: tokenised once into a file of ids, of which windows are read wherever they lie.

Letters: B batch, S window length, W windows.
"""

import hashlib
import json
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import sync
from .._progress import NO_PROGRESS, Progress
from ..errors import CheckpointError, DataError
from .config import DataConfig, of_split
from .read import read_texts
from .tokens import Tokenizer, TooShortError, token_chunks


class PackedWindows:
    """Windows of consecutive ids of a file that stays on the disk; what `WindowData` and others take for a tensor (W, S).

    Args:
        path: ids one after the other.
        dtype: of an id in the file.
        count: ids in it.
        window: S; the rest that does not fill one is left out.
    """

    def __init__(self, path: Path, *, dtype: str, count: int, window: int) -> None:
        self.tokens = count
        """Ids in the file."""
        self._ids_WS = np.memmap(path, dtype=dtype, mode="r", shape=(count // window, window))

    @property
    def shape(self) -> tuple[int, int]:
        """(W, S)."""
        return self._ids_WS.shape[0], self._ids_WS.shape[1]

    def __len__(self) -> int:
        return len(self._ids_WS)

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        """(B, S), int64; these rows alone are read."""
        return torch.from_numpy(self._ids_WS[rows_B.numpy()].astype(np.int64))


def pack_tokens(
    config: DataConfig, tokenizer: Tokenizer, path: Path, *, vocab_size: int, made_from: Mapping[str, Any], progress: Progress = NO_PROGRESS
) -> PackedWindows:
    """Tokenise a source into ``path``, unless it is there already, and give its windows.

    Documents are joined in order, with the tokenizer's end of text (or else its separator of sentences) between two of them, or with
    ``config.separator``.

    Args:
        config: source, window and ``max_tokens``, rounded down to whole windows.
        tokenizer: transformers tokenizer, or a callable text -> ids.
        path: file of ids; ``<path>.json`` beside it says what it was made from. Both are whole or not there: a killed call starts again.
        vocab_size: number of different ids; up to 65536 take two bytes each, more four.
        made_from: JSON values that tell data and tokenizer from others.
        progress: told the tokens.

    Raises:
        DataError: as `text_windows`; or the tokenizer gives ids that it says it does not have.
        CheckpointError: the file cannot be written.

    Cost: memory of about a million characters. A file that is there is read once, to see that it is whole (a second a gigabyte or so).
    """
    limit = None if config.max_tokens is None else config.max_tokens // config.window * config.window
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    item = np.dtype(dtype).itemsize
    key = hashlib.sha256(json.dumps({**made_from, "limit": limit, "dtype": dtype}, sort_keys=True).encode()).hexdigest()[:16]
    note = path.with_name(path.name + ".json")
    found = _read(note)
    if found.get("key") != key or not path.exists() or path.stat().st_size != found["count"] * item or _crc32(path) != found["checksum"]:
        end_id = None if config.separator is not None else end_of_text(tokenizer)
        chunks = token_chunks(read_texts(config), tokenizer, limit=limit, separator=config.separator, end_id=end_id)
        temporary, count, checksum = path.with_name(path.name + ".new"), 0, 0
        try:
            with temporary.open("wb") as file, progress.task(f"tokenise {path.stem}", total=limit or 0) as task:
                for chunk in chunks:
                    raw = _narrow(chunk, dtype, vocab_size=vocab_size)
                    file.write(raw)
                    count, checksum = count + len(chunk), zlib.crc32(raw, checksum)
                    task.advance(len(chunk))
            sync(temporary)
            temporary.replace(path)
            found = {"key": key, "count": count, "dtype": dtype, "checksum": f"{checksum:08x}"}
            new_note = note.with_name(note.name + ".new")
            new_note.write_text(json.dumps(found))
            sync(new_note)
            new_note.replace(note)
            sync(note.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write '{path}': {error.strerror}; free space or choose another --out.") from error
    if found["count"] < config.window:
        raise TooShortError(
            f"'{config.data}'{of_split(config)}: {found['count']} tokens are less than one window of {config.window}; give more text or a "
            "smaller window."
        )
    return PackedWindows(path, dtype=dtype, count=found["count"], window=config.window)


def end_of_text(tokenizer: Any) -> int | None:
    """What stands between two documents: the end of text, or else the separator of sentences that encoders have; None without either."""
    ids = (getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id"))
    return next((i for i in ids if i is not None), None)


def _narrow(chunk: "array[int]", dtype: str, *, vocab_size: int) -> bytes:
    if not len(chunk):
        return b""
    ids = np.frombuffer(chunk, dtype=np.int64)
    if ids.max() >= vocab_size:  # ids with gaps between them
        raise DataError(f"the tokenizer gives the id {ids.max()} and says that it has {vocab_size} tokens; take another tokenizer.")
    return ids.astype(dtype).tobytes()


def _crc32(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def _read(note: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none, or half of one."""
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
