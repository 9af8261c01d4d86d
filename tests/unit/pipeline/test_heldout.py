"""What is measured of a conversion before it is saved: the same numbers as measured by hand."""

import warnings

import pytest
import torch
import transformers
from tiny import convert_tiny, tiny_llama

from moeify.controls import record_active, set_mode
from moeify.convert import ConvertConfig, convert
from moeify.errors import CheckpointError
from moeify.evaluate import perplexity
from moeify.layers import moe_layers
from moeify.pipeline import heldout
from moeify.pipeline.heldout import card_rows, measure_converted
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites

WINDOWS = torch.arange(3 * 20).view(3, 20) * 37 % 257
BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
PADDED = {"input_ids": torch.arange(1, 19).reshape(3, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])}


@pytest.fixture
def model():
    return convert_tiny(tiny_llama(), rule=TopK(k=2))


def converted(cls, inputs):
    torch.manual_seed(0)
    model = cls(transformers.BertConfig(**BERT)).eval()
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=1))
    convert(model, config, sites=find_ffn_sites(model, inputs))
    return model


def test_measure_converted_of_a_language_model_equals_measuring_by_hand(model):
    found = measure_converted(model, [{"input_ids": WINDOWS[:2]}, {"input_ids": WINDOWS[2:]}])
    with record_active(model) as stats:
        assert found["quality"] == pytest.approx(perplexity(model, WINDOWS), rel=1e-6)
    assert found["active_fraction"] == pytest.approx(stats.active_fraction())
    set_mode(model, "dense")
    assert found["dense_quality"] == pytest.approx(perplexity(model, WINDOWS), rel=1e-6)
    assert found["metric"] == "perplexity"
    assert found["quality_ratio"] == pytest.approx(found["quality"] / found["dense_quality"])
    assert found["kl"] > 0
    assert found["sequences"] == 3


def test_measure_converted_prices_the_parts(model):
    found = measure_converted(model, [{"input_ids": WINDOWS}])
    dense, moe = found["cost"]["dense"], found["cost"]["converted"]
    layers = moe_layers(model).values()
    assert dense["experts"] == sum(2 * 3 * layer.site.d_model * layer.site.d_ff for layer in layers)
    assert moe["experts"] == pytest.approx(found["active_fraction"] * dense["experts"])
    assert moe["router"] == sum(layer.router.flops_per_token for layer in layers)
    assert dense["router"] == 0
    assert found["flops_fraction"] == pytest.approx(sum(moe.values()) / sum(dense.values()))
    for part in ("attention_proj", "attention_scores", "head"):
        assert moe[part] == dense[part] > 0


def test_measure_converted_leaves_modes_and_rules_as_they_were(model):
    before = {name: (layer.mode, layer.rule) for name, layer in moe_layers(model).items()}
    measure_converted(model, [{"input_ids": WINDOWS}])
    assert {name: (layer.mode, layer.rule) for name, layer in moe_layers(model).items()} == before


def test_measure_converted_cuts_long_windows(model, monkeypatch):
    monkeypatch.setattr(heldout, "_MOST_TOKENS", 8)
    found = measure_converted(model, [{"input_ids": WINDOWS[:, :17]}])  # 8 + 8 + 1, and one token predicts nothing
    pieces = torch.cat([WINDOWS[:, :8], WINDOWS[:, 8:16]])
    assert found["sequences"] == 6
    assert found["quality"] == pytest.approx(perplexity(model, pieces), rel=1e-6)


def test_measure_converted_of_an_encoder_is_its_cosine_to_the_dense_one():
    model = converted(transformers.BertModel, PADDED)
    found = measure_converted(model, [PADDED])
    assert found["metric"] == "cosine"
    assert found["dense_quality"] == 1
    assert 0 < found["quality"] < 1
    assert found["kl"] is None


def test_measure_converted_of_a_classifier_without_labels_has_a_divergence():
    model = converted(transformers.BertForSequenceClassification, PADDED)
    found = measure_converted(model, [PADDED])
    assert found["metric"] == "cosine"
    assert found["kl"] > 0


def test_measure_converted_of_a_head_of_another_task_compares_hidden_states():
    model = converted(transformers.BertForQuestionAnswering, PADDED)
    found = measure_converted(model, [PADDED])
    assert (found["metric"], found["kl"]) == ("cosine", None)


def test_measure_converted_without_data_is_none(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_converted(model, []) is None


def test_measure_converted_that_fails_warns_and_loses_nothing(model, monkeypatch):
    def fail(*_, **__):
        raise CheckpointError("perplexity is nan.")

    monkeypatch.setattr(heldout, "sweep", fail)
    with pytest.warns(UserWarning, match="the converted model was not measured: perplexity is nan"):
        assert measure_converted(model, [{"input_ids": WINDOWS}]) is None


def test_card_rows_show_both_models_and_every_part_that_costs(model):
    measured = measure_converted(model, [{"input_ids": WINDOWS}])
    rows = card_rows(measured)
    assert rows["held-out perplexity"].startswith(f"{measured['quality']:.4g} (dense {measured['dense_quality']:.4g}")
    assert rows["held-out active fraction"] == f"{measured['active_fraction']:.4g}"
    parts = [key.removeprefix("MFLOPs per token, ") for key in rows if key.startswith("MFLOPs")]
    parts = [part for part in parts if part != "other"]  # transformers 5.17 makes rotary tables by a matrix product
    assert parts == ["experts", "routers", "attention", "attention scores", "head"]
    assert card_rows(None) == {"measured": "nothing; `moeify sweep` does"}
