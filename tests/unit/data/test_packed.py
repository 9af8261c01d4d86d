"""Files of ids: the same windows as in memory, made once, and made again where they are of something else."""

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer

from moeify.data import ByteTokenizer, DataConfig, WindowData, pack_tokens, text_windows
from moeify.data import packed as module
from moeify.errors import CheckpointError, DataError


def packed(tmp_path, *, window=8, max_tokens=None, tokenizer=None, made_from=None, text="abcdefghijklmnopqrstuvwxyz" * 3):
    source = tmp_path / "text.txt"
    source.write_text(text)
    config = DataConfig(data=str(source), window=window, max_tokens=max_tokens)
    found = pack_tokens(
        config, tokenizer or ByteTokenizer(), tmp_path / "tokens.bin", vocab_size=256, made_from=made_from or {"source": text}
    )
    return config, found


def test_windows_of_the_file_are_those_in_memory(tmp_path):
    config, found = packed(tmp_path, max_tokens=50)
    whole = text_windows(config, ByteTokenizer())
    assert found.shape == tuple(whole.shape) == (6, 8)
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * 48
    rows = torch.tensor([4, 0, 4])
    assert found[rows].equal(whole[rows])
    assert WindowData(found).batch([4, 0, 4], generator=None)["labels"].equal(whole[rows])


def test_documents_are_joined_with_the_end_of_text_or_the_separator_of_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "b.txt").write_text("bb")
    config = DataConfig(data=str(tmp_path), window=6, max_tokens=None)
    out = tmp_path / ".hidden"
    out.mkdir()
    for options, end in (({}, 256), ({"sep_token": "[SEP]"}, 257)):
        tokenizer = byte_tokenizer(**options)
        if options:
            tokenizer.eos_token = None
        found = pack_tokens(config, tokenizer, out / "t.bin", vocab_size=300, made_from=options)
        letters = [tokenizer("a", add_special_tokens=False)["input_ids"][0], tokenizer("b", add_special_tokens=False)["input_ids"][0]]
        assert found[torch.tensor([0])].tolist() == [[letters[0]] * 3 + [end] + [letters[1]] * 2]


def test_a_file_is_made_once_and_again_for_other_data(tmp_path, monkeypatch):
    packed(tmp_path)
    monkeypatch.setattr(module, "token_chunks", None)  # whoever tokenises now fails
    _, again = packed(tmp_path, window=4)
    assert again.shape == (19, 4)  # another window of the same ids
    with pytest.raises(TypeError):
        packed(tmp_path, made_from={"source": "other"})
    (tmp_path / "tokens.bin").write_bytes(b"ab")  # cut short
    with pytest.raises(TypeError):
        packed(tmp_path)


def test_a_file_that_was_damaged_is_made_again(tmp_path):
    _, before = packed(tmp_path)
    path = tmp_path / "tokens.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.unlink()  # the windows above still read the old one
    path.write_bytes(raw)
    _, after = packed(tmp_path)
    every = torch.arange(len(before))
    assert after[every].equal(before[every])


def test_ids_beyond_the_vocabulary_are_refused_and_not_wrapped(tmp_path):
    with pytest.raises(DataError, match="gives the id 70000 and says that it has 256 tokens"):
        packed(tmp_path, tokenizer=lambda text: [70000 for _ in text])


def test_what_was_killed_on_the_way_is_not_taken_for_whole(tmp_path, monkeypatch):
    def dies(*_args, **_kwargs):
        yield np.zeros(3, dtype=np.int64)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "token_chunks", dies)
    with pytest.raises(KeyboardInterrupt):
        packed(tmp_path)
    assert not (tmp_path / "tokens.bin").exists()
    monkeypatch.undo()
    assert len(packed(tmp_path)[1]) == 9


def test_large_vocabularies_take_four_bytes(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("x" * 8)
    config = DataConfig(data=str(source), window=4)
    found = pack_tokens(config, lambda text: [70_000] * len(text), tmp_path / "t.bin", vocab_size=70_001, made_from={})
    assert found[torch.tensor([1])].tolist() == [[70_000] * 4]


def test_too_little_text_and_a_full_disk_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"text.txt'.*3 tokens are less than one window of 8"):
        packed(tmp_path, text="abc")

    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(CheckpointError, match=r"cannot write.*No space left"):
        packed(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "tokens.bin", "tokens.bin.json"]  # of the first call
