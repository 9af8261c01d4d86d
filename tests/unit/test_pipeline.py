"""Batches of each kind of model, from files."""

import pytest
import torch
import transformers
from tiny import byte_tokenizer

from moeify.data import DataConfig
from moeify.pipeline import calibration_batches

SMALL = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_long_document_reaches_an_encoder_in_pieces_up_to_max_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text " * 200)
    model = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=16))
    data = DataConfig(data=str(tmp_path / "text.txt"), max_tokens=300)
    batches = calibration_batches(model, byte_tokenizer(), data, batch_tokens=64)
    assert 300 <= sum(int(b["attention_mask"].sum()) for b in batches) < 300 + 64
    assert max(b["input_ids"].shape[1] for b in batches) == 16


def test_an_encoder_decoder_gets_the_mask_of_the_decoder(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n{"text": "more"}\n')
    config = transformers.T5Config(vocab_size=257, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    (batch,) = calibration_batches(
        transformers.T5ForConditionalGeneration(config), byte_tokenizer(), DataConfig(data=str(tmp_path / "text.jsonl"))
    )
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
    assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])
    assert not batch["attention_mask"].all()


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
