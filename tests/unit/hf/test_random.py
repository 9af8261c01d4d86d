"""Models from an architecture alone: drawn by the seed, errors that name the field."""

import pytest
import torch
from PIL import Image

from moeify.errors import CheckpointError, ConfigError
from moeify.hf.random import image_processor, random_model
from moeify.hf.tokenizer import byte_tokenizer, load_tokenizer

GPT = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "activation_function": "relu"}
VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}


def test_random_model_is_drawn_by_the_seed_and_leaves_the_generator():
    before = torch.get_rng_state()
    first, same, other = (random_model(GPT, auto_class="AutoModelForCausalLM", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.transformer.wte.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training
    assert first.config.activation_function == "relu"


def test_random_model_has_the_head_and_the_type_that_are_asked_for():
    model = random_model(VIT, auto_class="AutoModelForImageClassification", seed=0, dtype=torch.bfloat16)
    assert (type(model).__name__, model.config.num_labels, model.dtype) == ("ViTForImageClassification", 3, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gtp2"}, "does not know the model type 'gtp2'"),
        ({"n_layers": 2}, "unknown field 'n_layers' of GPT2Config; did you mean 'n_layer'"),
        ({"n_head": 3}, "the architecture makes no model: "),
    ],
)
def test_random_model_of_bad_fields_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        random_model({**GPT, **change}, auto_class="AutoModelForCausalLM", seed=0)


def test_byte_tokenizer_gives_a_token_for_each_byte_and_back():
    tokenizer = byte_tokenizer(context=9)
    ids = tokenizer("aé b")["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "aé b"
    assert (len(tokenizer), tokenizer.model_max_length) == (256, 9)


def test_image_processor_keeps_pixels_of_the_models_size_and_comes_back_from_a_folder(tmp_path):
    model = random_model(VIT, auto_class="AutoModelForImageClassification", seed=0)
    processor = image_processor(model.config)
    image = Image.new("L", (8, 8), 255)
    image.putpixel((1, 0), 0)
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    assert pixels[0, 0, 0, :3].tolist() == [1.0, -1.0, 1.0]
    processor.save_pretrained(tmp_path)
    from transformers import AutoImageProcessor

    assert torch.equal(AutoImageProcessor.from_pretrained(tmp_path)(images=[image], return_tensors="pt")["pixel_values"], pixels)


def test_load_tokenizer_reads_a_folder_and_says_where_there_is_none(tmp_path):
    byte_tokenizer(context=9).save_pretrained(tmp_path / "bytes")
    assert load_tokenizer(str(tmp_path / "bytes"))("ab")["input_ids"] == byte_tokenizer(context=9)("ab")["input_ids"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty': no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
