"""Checkpoint tensors one at a time: read from safetensors files, and written into new ones in any order.

safetensors' own reader maps files into memory, where pages that were read count as the process' own until the system wants them back.
Here a tensor is read into memory of its own and gone with its last reference, so that the peak is what the caller holds.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError

SHARD_BYTES = 4 << 30
"""Of a written file, at most, but for a tensor that is larger alone."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER_BYTES = 100_000_000  # what safetensors itself accepts


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int


class TensorFiles:
    """The tensors of safetensors files by name; each read is of one tensor, and nothing is kept.

    Args:
        paths: files; a name in several of them is the last one's.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or holds a type that no model's weights have.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        for path in paths:
            self.infos |= _read_header(path)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: the file ends too early, or cannot be read.
        """
        info = self.infos[name]
        raw = torch.empty(info.num_bytes, dtype=torch.uint8)
        left = raw.numpy().data
        try:
            with info.path.open("rb", buffering=0) as file:
                file.seek(info.start)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise CheckpointError(f"'{info.path}' is truncated; download or save it again.")
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"'{info.path}' cannot be read: {error.strerror or error}.") from error
        return raw.view(info.dtype).view(info.shape)


class TensorWriter:
    """New safetensors files whose tensors come in any order; complete when the ``with`` ends without an error.

    Args:
        folder: existing folder.
        tensors: shape and dtype of every tensor, by name.
        shard_bytes: of one file, about.

    Raises:
        OSError: the disk is full, or cannot be written.
        CheckpointError: at the end, a tensor was not written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, shard_bytes: int = SHARD_BYTES) -> None:
        shards: list[list[str]] = [[]]
        used = 0
        for name, (shape, dtype) in tensors.items():
            size = _num_bytes(shape, dtype)
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int, tuple[int, ...], torch.dtype]] = {}
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        for file_name, members in zip(names, shards, strict=True):
            # Wide types first, as safetensors itself orders them: so every tensor begins at a multiple of its element's size.
            members.sort(key=lambda name: -tensors[name][1].itemsize)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in members:
                shape, dtype = tensors[name]
                start, end = end, end + _num_bytes(shape, dtype)
                header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            file = (folder / file_name).open("wb")
            self._files.append(file)
            file.write(struct.pack("<Q", len(text)) + text)
            begin = file.tell()
            file.truncate(begin + end)
            for name in members:
                self._places[name] = (file, begin + header[name]["data_offsets"][0], *tensors[name])
        self._missing = set(self._places)
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, members in zip(names, shards, strict=True) for name in members}
            total = sum(_num_bytes(*tensors[name]) for name in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the shape and dtype that were announced."""
        file, start, shape, dtype = self._places[name]
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise ValueError(f"'{name}' was announced as {shape} {dtype}, and is {tuple(tensor.shape)} {tensor.dtype}.")
        file.seek(start)
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files:
            file.close()
        if kind is None and self._missing:
            raise CheckpointError(f"{len(self._missing)} tensors were not written, first '{min(self._missing)}'.")


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"'{path}': the tensor '{name}' is of type {entry['dtype']}, which no floating model has.")
            dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if min((start, *shape), default=0) < 0 or end - start != _num_bytes(shape, dtype) or 8 + length + end > size:
                raise ValueError(f"'{name}' does not fit the file")
            found[name] = TensorInfo(path, dtype, shape, 8 + length + start, end - start)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"'{path}' is truncated or not a safetensors file ({error}); download or save it again.") from error
    return found
