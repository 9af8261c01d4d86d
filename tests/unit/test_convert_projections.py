"""Linear layers of attention replaced by MLPs, and such a model converted, rebuilt and dense again."""

import dataclasses
import json

import pytest
import tiny
import torch

from moeify._config import from_dict, to_dict
from moeify.controls import set_mode
from moeify.convert import (
    ConvertConfig,
    convert,
    plan_conversion,
    rebuild,
    rebuild_projections,
    replace_projections,
    to_dense,
    tried_projections,
)
from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.kernels.plan import neuron_mask
from moeify.layers import MoEProjection, moe_layers
from moeify.manifest import Manifest, manifest_of
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import ProjectionRecord, find_ffn_sites, find_projections, replaced_projections


@pytest.fixture
def replaced():
    """A tiny Llama all of whose attention projections are MLPs with random weights."""
    return tiny.replaced_llama(seed=3)


def logits(model):
    with torch.no_grad():
        return model(**tiny.tiny_inputs()).logits


def test_replacing_puts_the_given_weights_in_place_and_writes_the_manifest(replaced):
    model = tiny.tiny_llama()
    records = tiny.projection_records(model)
    mlps = {
        name: {k: v for k, v in module.state_dict().items() if k != "weight"} for name, module in replaced_projections(replaced).items()
    }
    replace_projections(model, records, mlps)
    assert torch.equal(logits(model), logits(replaced))
    assert manifest_of(model).projections == tuple(records)
    assert Manifest.from_dict(json.loads(json.dumps(manifest_of(model).to_dict()))) == manifest_of(model)
    assert model.config.quantization_config["projections"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert not model.model.layers[0].self_attn.q_proj.training


def test_mlps_of_layers_without_a_bias_have_biases_and_the_record_says_so(tmp_path):
    model = tiny.tiny_llama()
    records = find_projections(model, tiny.tiny_inputs(), attention=("k", "o"))
    assert all(record.adds_bias and not record.bias and record.mlp_bias for record in records)
    replace_projections(model, records, None)
    k_proj = model.model.layers[0].self_attn.k_proj
    assert (k_proj.up.bias.shape, k_proj.down.bias.shape) == ((11,), (16,))
    assert manifest_of(model).projections == tuple(records)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert manifest_of(loaded).projections == tuple(records)
    older = {key: value for key, value in to_dict(tiny.projection_records(tiny.tiny_llama())[0]).items() if key != "adds_bias"}
    assert "adds_bias" not in to_dict(tiny.projection_records(tiny.tiny_llama())[0]), "manifests from before read and write as they were"
    assert not from_dict(ProjectionRecord, older).mlp_bias
    with pytest.raises(ConfigError, match="adds_bias is for layers without"):
        dataclasses.replace(records[0], bias=True)


def test_tried_replacements_are_there_inside_and_nothing_has_changed_afterwards():
    model = tiny.tiny_llama()
    expected, modules, config = logits(model), dict(model.named_modules()), model.config.to_dict()

    def fails_inside():
        with tried_projections(model, tiny.projection_records(model)):
            assert len(replaced_projections(model)) == 8
            assert not torch.equal(logits(model), expected)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails_inside()
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), expected)


def test_a_layer_with_two_names_in_one_module_is_refused():
    model = tiny.tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.also = attention.q_proj
    with pytest.raises(UnsupportedModelError, match="one module in several places"):
        replace_projections(model, tiny.projection_records(model)[:1], None)


def test_random_replacements_follow_the_seed_and_leave_others_random_numbers():
    models = [tiny.tiny_llama() for _ in range(3)]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for model, seed in zip(models, (3, 3, 4), strict=True):
        replace_projections(model, tiny.projection_records(model), None, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not torch.equal(logits(models[0]), logits(models[2]))
    q, o = models[0].model.layers[0].self_attn.q_proj, models[0].model.layers[0].self_attn.o_proj
    assert not torch.equal(q.up.weight, o.up.weight), "each has its own"


def test_a_replaced_model_converts_like_any_other_and_stays_replaced(replaced):
    expected = logits(replaced)
    sites = find_ffn_sites(replaced, tiny.tiny_inputs())
    manifest = convert(replaced, ConvertConfig(expert_size=8), sites=sites)
    layers = moe_layers(replaced)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj", "mlp"}
    assert [type(layer) for layer in layers.values()].count(MoEProjection) == 8
    torch.testing.assert_close(logits(replaced), expected, rtol=0, atol=1e-5)
    set_mode(replaced, "dense")
    torch.testing.assert_close(logits(replaced), expected, rtol=0, atol=1e-5)
    to_dense(replaced)
    assert not moe_layers(replaced)
    assert manifest_of(replaced).projections == manifest.projections
    assert replaced.config.quantization_config["sites"] == []
    torch.testing.assert_close(logits(replaced), expected, rtol=0, atol=1e-5)


def test_one_expert_of_a_narrow_projection_is_the_masked_mlp(replaced):
    sites = [site for site in find_ffn_sites(replaced, tiny.tiny_inputs()) if site.name == "model.layers.0.self_attn.k_proj"]
    convert(replaced, ConvertConfig(rule=TopK(k=1), projection_expert_size=4), sites=sites)
    k_proj = replaced.model.layers[0].self_attn.k_proj
    x = torch.randn(7, 32)
    mask_TF = neuron_mask(k_proj.moe.select(x), 11)
    assert 0 < mask_TF.float().mean() < 0.5
    with torch.no_grad():
        found, h = k_proj(x), torch.relu(torch.nn.functional.linear(x, k_proj.up.weight))
        torch.testing.assert_close(found, torch.nn.functional.linear(h * mask_TF, k_proj.down.weight), rtol=0, atol=1e-5)


def test_projections_have_options_of_their_own_and_the_policy_wins(replaced):
    sites = find_ffn_sites(replaced, tiny.tiny_inputs())
    policy = {
        "model.layers.0.self_attn.q_proj": {"router": {"name": "norm", "width": 3}},
        "re:.*1.self_attn.q_proj": {"expert_size": 2, "projection_router": {"name": "norm", "width": 5}},
        "re:.*o_proj": None,
    }
    config = ConvertConfig(expert_size=24, router=NormRouterConfig(width=7), projection_expert_size=4, policy=policy)
    found = {record.site.name: (record.num_experts, record.router.width) for record, _ in plan_conversion(replaced, sites, config)}
    assert found == {
        "model.layers.0.mlp": (2, 7),
        "model.layers.1.mlp": (2, 7),
        "model.layers.0.self_attn.q_proj": (4, 3),
        "model.layers.0.self_attn.k_proj": (3, 16),
        "model.layers.0.self_attn.v_proj": (3, 16),
        "model.layers.1.self_attn.q_proj": (8, 5),
        "model.layers.1.self_attn.k_proj": (3, 16),
        "model.layers.1.self_attn.v_proj": (3, 16),
    }
    assert "projection_router" not in to_dict(ConvertConfig()), "names on disk are made from it"
    with pytest.raises(ConfigError, match="projection_expert_size must be at least 1"):
        ConvertConfig(projection_expert_size=0)


def test_a_skeleton_is_rebuilt_once_and_refused_where_it_does_not_fit(replaced):
    convert(replaced, ConvertConfig(), sites=find_ffn_sites(replaced, tiny.tiny_inputs()))
    manifest = manifest_of(replaced)
    with torch.device("meta"):
        skeleton = type(replaced)(tiny.tiny_llama().config)
    rebuild_projections(skeleton, manifest)
    rebuild(skeleton, manifest)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in replaced.state_dict().items()}
    other = tiny.tiny_llama()
    replace_projections(other, [dataclasses.replace(tiny.projection_records(other)[0], width=5)], None)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj' is replaced already, and differently"):
        rebuild(other, manifest)
    wrong = dataclasses.replace(manifest, projections=(dataclasses.replace(manifest.projections[0], d_out=16),))
    with pytest.raises(CheckpointError, match=r"record of 'model\.layers\.0\.self_attn\.q_proj' has .*\(32, 16, False\), the layer"):
        rebuild(tiny.tiny_llama(), wrong)
    gone = dataclasses.replace(manifest, projections=(dataclasses.replace(manifest.projections[0], name="model.layers.9.q"),))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.9\.q' is no module"):
        rebuild(tiny.tiny_llama(), gone)


def test_what_cannot_be_replaced_is_named_and_nothing_is_changed(replaced):
    with pytest.raises(UnsupportedModelError, match="is replaced already"):
        replace_projections(replaced, tiny.projection_records(tiny.tiny_llama()), None)
    model = tiny.tiny_llama()
    first, second = tiny.projection_records(model)[:2]
    for records, tensors, message in (
        ((first, first), None, "named twice"),
        ((first,), {}, "tensors lack"),
        ((first,), {second.name: {}}, "not among the projections"),
        ((first,), {first.name: {}}, "lacks the tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace_projections(model, records, tensors)
    converted = tiny.convert_tiny(tiny.tiny_llama())
    ffn = dataclasses.replace(first, name="model.layers.0.mlp.up_proj", d_out=48)
    with pytest.raises(UnsupportedModelError, match=r"belongs to the converted FFN 'model\.layers\.0\.mlp'"):
        replace_projections(converted, [ffn], None)
    assert not replaced_projections(model)
    assert not replaced_projections(converted)


def test_int8_projections_are_replaced_ones_too(replaced):
    expected = logits(replaced)
    convert(replaced, ConvertConfig(), sites=find_ffn_sites(replaced, tiny.tiny_inputs()))
    errors = quantize(replaced)
    assert len(errors) == 10
    assert (logits(replaced) - expected).abs().max() < 0.05 * expected.abs().max()
    to_dense(replaced)
    assert len(manifest_of(replaced).projections) == 8
