"""Checkpoints of models whose attention projections are MLPs: from_pretrained rebuilds them, converted or not."""

import json

import pytest
import tiny
import torch
from families.models import build
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from moeify.controls import set_rule
from moeify.convert import ConvertConfig, convert, replace_projections, to_dense
from moeify.errors import CheckpointError
from moeify.hf.load import load_model, read_manifest
from moeify.hf.save import save_checkpoint
from moeify.layers import MoEProjection, moe_layers
from moeify.manifest import manifest_of
from moeify.select import TopK
from moeify.sites import FusedProjection, ProjectionMLP, find_ffn_sites, find_projections, projection_mlps, replaced_projections

INPUTS = tiny.tiny_inputs()


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def converted(rule=None):
    model = tiny.replaced_llama()
    config = ConvertConfig(projection_expert_size=4, **({} if rule is None else {"rule": rule}))
    convert(model, config, sites=find_ffn_sites(model, INPUTS))
    return model


def outputs(model, inputs):
    with torch.no_grad():
        return next(value for value in model(**inputs).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("make", [tiny.replaced_llama, converted, lambda: converted(TopK(k=1))], ids=["replaced", "converted", "sparse"])
def test_from_pretrained_is_bit_equal_and_saves_identical_files(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "one")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    assert manifest_of(loaded) == manifest_of(model)
    assert {type(layer) for layer in moe_layers(loaded).values()} == {type(layer) for layer in moe_layers(model).values()}
    assert all(not m.weight.requires_grad and m.up.weight.requires_grad for m in projection_mlps(loaded).values())
    loaded.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_other_dtypes_and_the_body_alone(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path)
    half = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    q_proj = half.model.layers[0].self_attn.q_proj
    assert {q_proj.weight.dtype, q_proj.up.weight.dtype, q_proj.down.weight.dtype} == {torch.bfloat16}
    assert q_proj.moe.router.hidden.weight.dtype is torch.float32
    assert (logits(half) - logits(model)).abs().max() < 0.03 * logits(model).abs().max()
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is LlamaModel
    assert next(iter(replaced_projections(body))) == "layers.0.self_attn.q_proj"
    assert sum(isinstance(layer, MoEProjection) for layer in moe_layers(body).values()) == 8
    with torch.no_grad():
        assert torch.equal(body(**INPUTS).last_hidden_state, model.model(**INPUTS).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    head = LlamaForCausalLM.from_pretrained(tmp_path / "body")
    assert len(replaced_projections(head)) == 8, "and with a prefix in front again"


def test_rules_set_after_loading_are_saved(tmp_path):
    converted().save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    set_rule(loaded, {"model.layers.0.self_attn.k_proj": TopK(k=2)})
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert moe_layers(again)["model.layers.0.self_attn.k_proj"].rule == TopK(k=2)


def test_dense_again_is_saved_as_the_replaced_model(tmp_path):
    converted().save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    to_dense(loaded)
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "two")
    stored = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert stored["sites"] == []
    assert len(stored["projections"]) == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert not moe_layers(again)
    assert torch.equal(logits(again), expected)
    with pytest.raises(CheckpointError, match="is of a dense model"):
        read_manifest(tmp_path / "two")  # it has no expert that a sweep or a report could show


@pytest.mark.parametrize("rule", [None, TopK(k=1)], ids=["all", "sparse"])
def test_generation_with_and_without_cache_is_the_same(rule):
    model = converted(rule)
    ids = INPUTS["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 256}
    cached, whole = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape[1] > ids.shape[1] + 1
    assert torch.equal(cached, whole)


@pytest.mark.parametrize(
    ("family_id", "attention"),
    [
        pytest.param("gpt2", "qv", id="gpt2: fused blocks of a Conv1D, k is kept"),
        pytest.param("bloom", "qkvo", id="bloom: fused, interleaved"),
        pytest.param("vit", "qkvo", id="vit: keys in the file are not module paths"),
        pytest.param("t5", "kv", id="t5: no biases, cross-attention"),
    ],
)
def test_families_save_and_load(family_id, attention, tmp_path):
    model, inputs = build(family_id)
    replace_projections(model, find_projections(model, inputs, attention=tuple(attention)), None)
    expected = outputs(model, inputs)
    convert(model, ConvertConfig(), sites=find_ffn_sites(model, inputs))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert manifest_of(loaded) == manifest_of(model)
    torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
    if family_id == "gpt2":
        fused = loaded.transformer.h[0].attn.c_attn
        assert isinstance(fused, FusedProjection)
        assert [type(fused.get_submodule(name)) for name in "qkv"] == [ProjectionMLP, torch.nn.Linear, ProjectionMLP]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.down.weight"),
            r"lacks 1 projection tensors .* 'model\.layers\.1\.self_attn\.k_proj\.down\.weight' of shape \(16, 11\)",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.up.weight": torch.zeros(5, 32)}),
            r"lacks 1 projection tensors .* 'model\.layers\.0\.self_attn\.q_proj\.up\.weight' of shape \(16, 32\)",
            id="another width",
        ),
        pytest.param(
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}),
            r"lacks 1 projection tensors .* 'model\.layers\.0\.self_attn\.q_proj\.weight' of shape \(1,\)",
            id="the layer itself",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused(change, message, tmp_path):
    tiny.replaced_llama().save_pretrained(tmp_path)
    tiny.edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda p: p.update(name="model.layers.7.self_attn.q_proj"), r"'model\.layers\.7\.self_attn\.q_proj'", id="name"),
        pytest.param(lambda p: p.update(d_out=16), "record of .* has .inputs, outputs, bias.", id="sizes"),
        pytest.param(lambda p: p.update(width=0), "at least 1 neuron", id="width"),
        pytest.param(lambda p: p.update(activation="rleu"), "did you mean 'relu'", id="function"),
    ],
)
def test_damaged_manifests_are_refused(change, message, tmp_path):
    tiny.replaced_llama().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, lambda config: change(config["quantization_config"]["projections"][0]))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_manifest_of_replaced_layers_over_a_dense_file_is_refused(tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path)
    stored = tiny.replaced_llama().config.quantization_config
    tiny.edit_config(tmp_path, lambda config: config.update(quantization_config=stored))
    with pytest.raises(CheckpointError, match="lacks 24 projection tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_librarys_own_loading_and_saving(tmp_path):
    model = converted()
    save_checkpoint(model, tiny.byte_tokenizer(), tmp_path / "out", calibration={}, card="# card\n")
    loaded, _ = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert len(read_manifest(tmp_path / "out").projections) == 8
