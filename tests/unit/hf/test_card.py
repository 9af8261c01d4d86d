"""The model card: valid metadata, measured numbers, usable code."""

import pytest
import tiny

from moeify.hf.card import model_card, trained_card
from moeify.select import TopK

CALIBRATION = {
    "rule": "topk",
    "knob": "k",
    "value": 2.0,
    "target_active": 0.35,
    "active_fraction": 0.33333333,
    "tokens": 1000,
    "router_scores": {"model.layers.0.mlp": {"0.25": 0.61234, "0.5": 0.8}, "model.layers.1.mlp": {"0.25": 0.7, "0.5": 0.9}},
    "knobs": {"topk": [1, 2]},
}


@pytest.fixture(scope="module")
def model():
    return tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=2))


def test_model_card_has_metadata_numbers_and_a_table_of_router_scores(model):
    card = model_card(model, name="tiny-moe", base_model="org/tiny", calibration=CALIBRATION)
    head = card.split("---\n")[1]
    assert "library_name: transformers\n" in head
    assert "base_model: org/tiny\n" in head
    assert "- moeify\n" in head
    assert "| active fraction | 0.3333 |" in card
    assert "| tokens | 1000 |" in card
    assert "| selection rule | TopK(k=2) |" in card
    assert "| `model.layers.0.mlp` | 0.6123 | 0.8 |" in card
    assert "knobs" not in card


@pytest.mark.parametrize("source", ["/home/me/model", "./model", "a/b/c", "model.gguf", "~/model"])
def test_model_card_of_a_local_source_names_no_base_model_in_the_metadata(model, source):
    assert "base_model" not in model_card(model, name="x", base_model=source, calibration=CALIBRATION).split("---\n")[1]


def test_model_card_code_names_the_models_own_class(model):
    assert 'LlamaForCausalLM.from_pretrained("tiny-moe")' in model_card(model, name="tiny-moe", base_model="a", calibration={})


@pytest.mark.parametrize(("base_model", "is_named"), [("org/name", True), ("./folder", False)])
def test_trained_card_names_a_source_on_the_hub_and_shows_what_was_measured(base_model, is_named):
    mean = {"zero_frac": 0.25, "near_zero_frac": 0.5, "nonzeros_per_token": 36.0}
    record = {
        "task": "masked-lm",
        "metric": "pseudo_perplexity",
        "quality": {"before": 20.0, "after": 21.5},
        "activations": {"before": {"mean": mean}, "after": {"mean": {**mean, "zero_frac": 0.875}}},
        "config": {"activation": "keep", "enforcement": {"loss": "l1", "weight": 0.001}, "distill": {"temperature": 1.0}},
        "train": {"steps": 7},
        "tokens": 70,
        "epochs": 0.5,
        "data": "texts",
    }
    card = trained_card(tiny.tiny_llama(), name="sparse", base_model=base_model, record=record)
    assert ("base_model: org/name\nbase_model_relation: finetune\n" in card) == is_named
    for line in (
        "# sparse",
        "| pseudo-perplexity, before and after | 20, 21.5 |",
        "| zeros among activations, before and after | 0.25, 0.875 |",
        "| activation | keep |",
        "| penalty | l1, weight 0.001 |",
        "| distilled from the source | yes |",
        "| training | 7 steps, 70 tokens, 0.50 epochs of `texts` |",
    ):
        assert f"\n{line}\n" in card
