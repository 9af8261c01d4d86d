"""Batches of windows, padded texts and images, and the ids of classes."""

import pytest
import torch
from data_files import write_parquet, write_png

from moeify.data import (
    ByteTokenizer,
    DataConfig,
    class_ids,
    image_batches,
    lm_batches,
    padded_text_batches,
    read_examples,
    seq2seq_batches,
)
from moeify.errors import DataError


def test_lm_batches_cover_all_windows_in_order_or_shuffled():
    windows = torch.arange(20).view(5, 4)
    batches = lm_batches(windows, batch_size=2)
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), windows)
    shuffled = torch.cat([b["input_ids"] for b in lm_batches(windows, batch_size=2, seed=0)])
    assert not torch.equal(shuffled, windows)
    assert torch.equal(shuffled.sort(0).values, windows)


def test_padded_text_batches_cut_pad_mask_and_label():
    first, second = padded_text_batches(["abcdef", "gh", "i"], ByteTokenizer(), max_length=4, batch_size=2, labels=[2, 0, 1])
    assert first["input_ids"].tolist() == [[97, 98, 99, 100], [103, 104, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert first["labels"].tolist() == [2, 0]
    assert second["input_ids"].tolist() == [[105]]


def test_padded_text_batches_by_length_pad_little_and_keep_the_order_of_their_first_texts():
    texts = ["dddd", "a", "ccc", "b", "ee", "ffff"]
    batches = list(padded_text_batches(texts, ByteTokenizer(), max_length=8, batch_size=2, labels=range(6), by_length=True))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 5], [1, 3], [4, 2]]
    assert [batch["input_ids"].shape[1] for batch in batches] == [4, 1, 3]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padded_text_batches_take_the_texts_up_to_the_one_that_reaches_max_tokens(by_length, batch_size):
    options = {"max_length": 8, "batch_size": batch_size, "max_tokens": 5, "by_length": by_length}
    batches = padded_text_batches(["aaa", "b", "cc", "d"], ByteTokenizer(), labels=range(4), **options)
    assert sorted(label for batch in batches for label in batch["labels"].tolist()) == [0, 1, 2]


def test_padded_text_batches_without_text_or_with_wrong_labels_raises():
    with pytest.raises(DataError, match="no text"):
        list(padded_text_batches([], ByteTokenizer(), max_length=4, batch_size=2))
    with pytest.raises(ValueError, match="shorter"):
        list(padded_text_batches(["a", "b"], ByteTokenizer(), max_length=4, batch_size=1, labels=[1]))


def test_class_ids_of_names_integers_and_known_heads():
    assert class_ids(["joy", "anger", "joy"]) == {"anger": 0, "joy": 1}
    assert class_ids([2, 0]) == {0: 0, 2: 2}
    assert class_ids(["joy"], known={"anger": 4, "joy": 5}) == {"joy": 5}
    with pytest.raises(DataError, match="did you mean 'anger'"):
        class_ids(["angre"], known={"anger": 0, "joy": 1})
    with pytest.raises(DataError, match="mix"):
        class_ids(["joy", 1])


def test_image_batches_from_parquet_bytes_stack_pixels_and_labels(tmp_path):
    raw = [write_png(tmp_path / f"{i}.png", i).read_bytes() for i in (1, 2, 3)]
    path = write_parquet(tmp_path / "a.parquet", image=[{"bytes": b, "path": None} for b in raw], label=[7, 8, 9])

    def to_tensor(image):
        assert image.mode == "RGB"
        return torch.full((3, 4, 4), float(image.getpixel((0, 0))[0]))

    batches = list(image_batches(read_examples(DataConfig(data=str(path), column="image")), to_tensor, batch_size=2))
    assert [b["pixel_values"][:, 0, 0, 0].tolist() for b in batches] == [[1.0, 2.0], [3.0]]
    assert [b["labels"].tolist() for b in batches] == [[7, 8], [9]]


def test_image_batches_with_broken_image_or_unknown_label_names_it(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[b"not a png"], label=["cat"])
    with pytest.raises(DataError, match=r"a\.parquet:0: not a readable image"):
        list(read_examples(DataConfig(data=str(path), column="image")))
    path = write_parquet(tmp_path / "b.parquet", image=[write_png(tmp_path / "1.png", 1).read_bytes()], label=["cat"])
    examples = list(read_examples(DataConfig(data=str(path), column="image")))
    with pytest.raises(DataError, match="pass class_ids"):
        list(image_batches(examples, lambda image: torch.zeros(1), batch_size=1))
    with pytest.raises(DataError, match="'cat' is unknown"):
        list(image_batches(examples, lambda image: torch.zeros(1), batch_size=1, class_ids={"dog": 0}))


def test_seq2seq_batches_halve_each_window():
    windows = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    first, second = seq2seq_batches(windows, batch_size=2, start_id=0, specials=([101], [102, 103]))
    assert first["input_ids"].tolist() == [[101, 1, 2, 102, 103], [101, 5, 6, 102, 103]]
    assert first["decoder_input_ids"].tolist() == [[0, 3, 4], [0, 7, 8]]
    assert second["decoder_input_ids"].tolist() == [[0, 11, 12]]
    assert first["input_ids"].dtype == first["decoder_input_ids"].dtype == torch.int64
