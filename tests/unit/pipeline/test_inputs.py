"""Batches of each kind of model, from files; and what is kept from them to measure the result."""

import io
import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
import transformers
from tiny import byte_tokenizer, tiny_llama
from torch.nn import functional as F

from moeify.data import DataConfig, text_pieces
from moeify.errors import DataError
from moeify.evaluate import default_metric, measure_quality
from moeify.pipeline import calibration_batches, evaluation_batches, inputs
from moeify.pipeline.inputs import hold_out

SMALL = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_long_document_reaches_an_encoder_in_pieces_up_to_max_tokens(tmp_path):
    text = "some words of text " * 200
    (tmp_path / "text.txt").write_text(text)
    model = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=16))
    data = DataConfig(data=str(tmp_path / "text.txt"), max_tokens=300)
    batches = calibration_batches(model, byte_tokenizer(), data, batch_tokens=64)
    assert 300 <= sum(int(b["attention_mask"].sum()) for b in batches) < 300 + 64
    assert max(b["input_ids"].shape[1] for b in batches) == 14  # "some words of "[:16] at a blank
    read = [ids[mask.bool()].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    pieces = text_pieces([text], byte_tokenizer(), max_length=16)
    assert sorted(byte_tokenizer().decode(ids) for ids in read) == sorted(islice(pieces, len(read))), "nothing is cut off"


T5 = {"vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def test_an_encoder_decoder_continues_the_text_that_its_encoder_reads(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789abcdefghij")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    tokenizer = byte_tokenizer()
    (batch,) = calibration_batches(model, tokenizer, DataConfig(data=str(tmp_path / "text.txt"), window=9))
    assert [tokenizer.decode(row) for row in batch["input_ids"]] == ["0123", "89ab"]
    assert batch["decoder_input_ids"][:, 0].tolist() == [0, 0]
    assert [tokenizer.decode(row[1:]) for row in batch["decoder_input_ids"]] == ["4567", "cdef"]


def test_an_encoder_decoder_with_few_positions_gets_shorter_halves(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text " * 20)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    config = transformers.BartConfig(vocab_size=257, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=10, **sizes)
    batches = calibration_batches(transformers.BartModel(config), byte_tokenizer(), DataConfig(data=str(tmp_path / "text.txt")))
    assert {(b["input_ids"].shape[1], b["decoder_input_ids"].shape[1]) for b in batches} == {(10, 11)}


def test_perplexity_of_an_encoder_decoder_is_that_of_its_decoders_next_token(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text " * 20)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    data = DataConfig(data=str(tmp_path / "text.txt"), window=32)
    batches = evaluation_batches(model, byte_tokenizer(), data, batch_size=3)
    metric = default_metric(model, batches[0])
    assert metric == "perplexity"
    found = measure_quality(model, batches, metric=metric)
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["decoder_input_ids"][:, 1:].flatten(), reduction="none"))
    assert found.count == sum(map(len, losses))
    assert found.value == pytest.approx(math.exp(torch.cat(losses).mean().item()), rel=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_have_as_many_channels_as_the_model_reads(tmp_path, channels, mode):
    image = pytest.importorskip("PIL.Image")
    for label in ("LABEL_0", "LABEL_1"):
        (tmp_path / label).mkdir()
        image.new("RGB", (4, 4)).save(tmp_path / label / "1.png")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "image_size": 4, "patch_size": 2, "num_channels": channels})
    )
    seen = []

    def processor(picture):
        seen.append(picture.mode)
        return torch.zeros(channels, 4, 4)

    data = DataConfig(data=str(tmp_path))
    calibration_batches(model, processor, data)
    evaluation_batches(model, processor, data, batch_size=1)
    assert seen == [mode] * 4


@pytest.mark.parametrize(("max_tokens", "images"), [(4, 8), (36, 16)])
def test_images_need_no_class_ids_and_count_their_patches(tmp_path, max_tokens, images):
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(10):
            image.new("RGB", (4, 4)).save(tmp_path / label / f"{i}.png")
    config = transformers.ViTConfig(**{**SMALL, "image_size": 4, "patch_size": 2})
    model = transformers.ViTForImageClassification(config)
    data = DataConfig(data=str(tmp_path), max_tokens=max_tokens)
    batches = calibration_batches(model, lambda _image: torch.zeros(3, 4, 4), data)
    assert all(set(batch) == {"pixel_values"} for batch in batches)
    assert sum(len(batch["pixel_values"]) for batch in batches) == images


def test_images_of_a_table_need_no_label_column(tmp_path):
    image, pa = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    image.new("RGB", (4, 4)).save(stream, format="PNG")
    pq.write_table(pa.table({"picture": [stream.getvalue()] * 3}), tmp_path / "images.parquet")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**SMALL, "image_size": 4, "patch_size": 2}))
    data = DataConfig(data=str(tmp_path / "images.parquet"), column="picture")
    (batch,) = calibration_batches(model, lambda _image: torch.zeros(3, 4, 4), data)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    with pytest.raises(DataError, match="no column 'label'"):
        evaluation_batches(model, None, data, batch_size=1)


def classifier(**options):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, max_position_embeddings=64, **options))


def test_labelled_texts_are_read_up_to_max_tokens_and_cut_to_the_window(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a" * 30] * 20, "label": [0, 1] * 10}), tmp_path / "data.parquet")
    data = DataConfig(data=str(tmp_path / "data.parquet"), max_tokens=None)
    whole = evaluation_batches(classifier(), byte_tokenizer(), data, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in whole] == [(2, 30)] * 10
    for batch_size in (2, 4, 9):
        few = evaluation_batches(classifier(), byte_tokenizer(), replace(data, window=12, max_tokens=100), batch_size=batch_size)
        assert [label for batch in few for label in batch["labels"].tolist()] == [0, 1] * 4 + [0]  # 12 tokens each: the ninth reaches 100
        assert {tuple(batch["input_ids"].shape) for batch in few} == {(batch_size, 12), (9 % batch_size or 9, 12)}


def test_labelled_texts_of_a_model_with_few_positions_are_cut_to_them(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a" * 100, "label": "LABEL_1"}) + "\n")
    (batch,) = evaluation_batches(classifier(), byte_tokenizer(), DataConfig(data=str(tmp_path / "data.jsonl")), batch_size=4)
    assert batch["input_ids"].shape == (1, 64)
    assert batch["labels"].tolist() == [1], "as the head numbers it"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["LABEL_0", 1], "labels mix integers and names"),
        (["LABEL_0", "other"], "'other' is not a class"),
        ([0, 2], "label 2 is not a class of the model's head, whose 2 are 0 to 1"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(tmp_path, labels, message):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    with pytest.raises(DataError, match=message):
        evaluation_batches(classifier(), byte_tokenizer(), DataConfig(data=str(tmp_path / "data.jsonl")), batch_size=1)


def test_labelled_images_are_read_one_batch_at_a_time_up_to_max_tokens(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for label in ("LABEL_0", "LABEL_1"):
        (tmp_path / label).mkdir()
        for i in range(10):
            image.new("RGB", (4, 4)).save(tmp_path / label / f"{i}.png")
    decoded = []
    read = inputs.read_examples

    def spy(data):
        for example in read(data):
            decoded.append(example)
            yield example

    monkeypatch.setattr(inputs, "read_examples", spy)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**SMALL, "image_size": 4, "patch_size": 2}))
    data = DataConfig(data=str(tmp_path), max_tokens=36)
    batches = evaluation_batches(model, lambda _image: torch.zeros(3, 4, 4), data, batch_size=3)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]  # 4 patches an image: 36 tokens
    assert len(decoded) == 9, "the rest is never opened"
    batches = evaluation_batches(model, lambda _image: torch.zeros(3, 4, 4), data, batch_size=5)
    assert [len(batch["labels"]) for batch in batches] == [5, 4]


# -- what is held out ------------------------------------------------------------------------------------------------------------------


def windows(count, *, length=8, batch=8):
    ids = torch.arange(count).view(-1, 1).expand(-1, length)
    return [{"input_ids": part} for part in ids.split(batch)]


def sequences(batches):
    return [int(row[0]) for batch in batches for row in batch["input_ids"]]


@pytest.mark.parametrize(
    ("count", "length", "expected"),
    [
        pytest.param(3, 8, [], id="too few"),
        pytest.param(4, 8, [3], id="one at least"),
        pytest.param(100, 8, [49, 99], id="one of 50, spread"),
        pytest.param(3000, 1024, [374, 749, 1124, 1499, 1874, 2249, 2624, 2999], id="at most 8192 tokens"),
    ],
)
def test_hold_out_takes_sequences_spread_over_the_data(count, length, expected):
    kept, held_out = hold_out(tiny_llama(), windows(count, length=length))
    assert sequences(held_out) == expected
    assert sorted(sequences(kept) + expected) == list(range(count))
    assert all(len(batch["input_ids"]) for batch in kept + held_out)


def test_hold_out_keeps_the_rows_of_all_inputs_together():
    batch = {"input_ids": torch.arange(5).view(5, 1), "attention_mask": torch.arange(5).view(5, 1)}
    kept, held_out = hold_out(tiny_llama(), [batch])
    for part in kept + held_out:
        assert torch.equal(part["input_ids"], part["attention_mask"])
    assert sequences(held_out) == [4]
