"""Tensors of safetensors files one at a time, read and written: what safetensors itself reads and writes."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.errors import CheckpointError
from moeify.hf.shards import TensorFiles, TensorWriter

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([[True], [False]]),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 4),
}
PLAN = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_read_gives_what_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    assert set(files.infos) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert files.read(name).dtype is tensor.dtype
        assert torch.equal(files.read(name), tensor)


@pytest.mark.parametrize(("shard_bytes", "files"), [(1 << 30, 1), (26, 2), (1, 5)], ids=["one file", "two", "each its own"])
def test_safetensors_reads_what_was_written_in_any_order(shard_bytes, files, tmp_path):
    with TensorWriter(tmp_path, PLAN, shard_bytes=shard_bytes) as writer:
        for name in reversed(PLAN):
            writer.write(name, TENSORS[name])
    found = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(found) == files
    merged = {name: tensor for tensors in found.values() for name, tensor in tensors.items()}
    assert merged.keys() == TENSORS.keys()
    assert all(torch.equal(merged[name], TENSORS[name]) for name in TENSORS)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        assert all(name in found[file] for name, file in json.loads(index.read_text())["weight_map"].items())


def test_writer_refuses_what_was_not_announced_and_what_is_missing_at_the_end(tmp_path):
    writer = TensorWriter(tmp_path, {"b": PLAN["b"]})
    with pytest.raises(ValueError, match="announced"):
        writer.write("b", TENSORS["a"])
    with pytest.raises(CheckpointError, match="1 tensors were not written, first 'b'"), writer:
        pass


def broken(kind, raw):
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    if kind == "cut":
        return raw[:-1]
    if kind == "long header":
        return struct.pack("<Q", 1 << 60) + raw[8:]
    if kind == "short":
        return raw[:4]
    header["a"] = {
        "outside": {**header["a"], "data_offsets": [10_000, 10_024]},
        "negative": {**header["a"], "data_offsets": [-24, 0]},
        "size": {**header["a"], "shape": [3, 3]},
        "no dict": 3,
        "type": {**header["a"], "dtype": "F8_E4M3"},
    }[kind]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


@pytest.mark.parametrize("kind", ["cut", "long header", "short", "outside", "negative", "size", "no dict", "type"])
def test_a_damaged_file_is_one_line(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": TENSORS["a"]}, path)
    path.write_bytes(broken(kind, path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        TensorFiles([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened_is_truncated(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": TENSORS["a"]}, path)
    files = TensorFiles([path])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        files.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        files.read("a")
