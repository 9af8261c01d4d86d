"""Made-up inputs: deterministic, of the asked size, free of tokens with a meaning."""

import pytest
import torch
from families.models import FAMILIES, build
from torch import nn

from moeify.errors import UnsupportedModelError
from moeify.hf.inputs import example_inputs


@pytest.mark.parametrize(
    ("family_id", "shapes"),
    [
        ("llama", {"input_ids": (3, 5), "attention_mask": (3, 5)}),
        ("bart", {"input_ids": (3, 5), "attention_mask": (3, 5), "decoder_input_ids": (3, 5)}),
        ("vit", {"pixel_values": (3, 3, 16, 16)}),
        ("clip", {"input_ids": (3, 5), "attention_mask": (3, 5), "pixel_values": (3, 3, 16, 16)}),
        ("wav2vec2", {"input_values": (3, 48)}),
        ("whisper", {"input_features": (3, 8, 32), "decoder_input_ids": (3, 5)}),
    ],
)
def test_example_inputs_have_the_shapes_of_the_family(family_id, shapes):
    model, _ = build(family_id)
    assert {name: tuple(t.shape) for name, t in example_inputs(model, num_tokens=5, batch_size=3).items()} == shapes


def test_example_inputs_with_the_same_seed_are_equal_and_with_another_differ():
    model, _ = build("llama")
    a, b, c = (example_inputs(model, num_tokens=32, seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_example_inputs_avoid_special_tokens():
    model, _ = build("llama")
    ids = example_inputs(model, num_tokens=500)["input_ids"]
    assert not set(ids.unique().tolist()) & {0, 1, 2}
    assert int(ids.max()) < 64


def test_example_inputs_follow_the_dtype_of_the_model():
    model, _ = build("vit")
    assert example_inputs(model.to(torch.bfloat16))["pixel_values"].dtype == torch.bfloat16


def test_example_inputs_for_a_plain_module_raises():
    with pytest.raises(UnsupportedModelError, match="cannot make up inputs for Linear: it has no config"):
        example_inputs(nn.Linear(2, 2))


def test_example_inputs_for_an_unknown_main_input_names_it():
    model, _ = build("llama")
    model.main_input_name = "latents"
    with pytest.raises(UnsupportedModelError, match="its main input is 'latents'"):
        example_inputs(model)


def test_example_inputs_when_the_config_lacks_the_shape_says_so():
    model, _ = build("vit")
    model.main_input_name = "input_features"
    with pytest.raises(UnsupportedModelError, match="does not say the shape of 'input_features'"):
        example_inputs(model)


def test_every_kind_of_family_is_in_the_table():
    kinds = {family.kind for family in FAMILIES.values()}
    assert kinds == {"decoder", "encoder", "encoder-decoder", "vision", "text+vision", "speech"}
