"""from_pretrained of converted checkpoints: equal results, equal files, and refusals before anything is loaded."""

import copy
import json
import pickle

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

import moeify  # noqa: F401 - registers the quantizer
from moeify.controls import set_mode, set_rule
from moeify.convert import ConvertConfig, convert
from moeify.errors import CheckpointError
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import GateRouterConfig, LowRankRouterConfig
from moeify.select import DynKMax, Threshold, TopK
from moeify.sites import find_ffn_sites

INPUTS = tiny.tiny_inputs()


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture
def converted(tmp_path):
    return tiny.save_converted_tiny(tmp_path / "moe", rule=TopK(k=2))


def test_from_pretrained_of_a_converted_checkpoint_is_bit_equal(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=2))
    model.save_pretrained(tmp_path)

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert len(moe_layers(loaded)) == 2
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny.tiny_llama())), "two of six experts are not the dense model"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_from_pretrained_of_a_sharded_checkpoint_is_bit_equal(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=2))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_save_pretrained_after_from_pretrained_writes_identical_files(converted, tmp_path):
    LlamaForCausalLM.from_pretrained(converted).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes(), name


def test_save_pretrained_after_set_rule_keeps_the_new_rule(converted, tmp_path):
    model = LlamaForCausalLM.from_pretrained(converted)
    set_rule(model, DynKMax(tau=0.25))
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert {moe.rule for moe in moe_layers(again).values()} == {DynKMax(tau=0.25)}


def test_from_pretrained_as_base_model_finds_sites_without_the_prefix(converted):
    whole = LlamaForCausalLM.from_pretrained(converted)
    base = LlamaModel.from_pretrained(converted)
    assert list(moe_layers(base)) == ["layers.0.mlp", "layers.1.mlp"]
    with torch.no_grad():
        assert torch.equal(base(**INPUTS).last_hidden_state, whole.model(**INPUTS).last_hidden_state)


def test_from_pretrained_with_head_of_a_base_checkpoint_finds_sites_under_the_prefix(converted, tmp_path):
    base = LlamaModel.from_pretrained(converted)
    base.save_pretrained(tmp_path / "base")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert list(moe_layers(whole)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    with torch.no_grad():
        assert torch.equal(base(**INPUTS).last_hidden_state, whole.model(**INPUTS).last_hidden_state)


def test_from_pretrained_with_another_head_lacks_only_that_head(converted):
    model, info = LlamaForSequenceClassification.from_pretrained(converted, output_loading_info=True)
    assert len(moe_layers(model)) == 2
    assert set(info["missing_keys"]) == {"score.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_from_pretrained_in_half_precision_keeps_routers_in_fp32(converted, dtype):
    model = LlamaForCausalLM.from_pretrained(converted, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".moe." in name else dtype), name


def test_from_pretrained_of_a_bf16_checkpoint_with_dtype_auto_is_bit_equal(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama(dtype=torch.bfloat16), rule=TopK(k=2))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_loaded_model_in_dense_mode_equals_the_dense_model(converted):
    model = LlamaForCausalLM.from_pretrained(converted)
    set_mode(model, "dense")
    torch.testing.assert_close(logits(model), logits(tiny.tiny_llama()), rtol=0, atol=2e-5)


def test_loaded_model_can_be_cast_copied_and_pickled(converted):
    model = LlamaForCausalLM.from_pretrained(converted)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert model.half().dtype is torch.float16
    assert model.float().dtype is torch.float32


def test_loaded_model_generates_and_trains(converted):
    model = LlamaForCausalLM.from_pretrained(converted)
    out = model.generate(**INPUTS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, 12)
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(moe.host.down_proj.weight.grad.abs().sum() > 0 for moe in moe_layers(model).values())


def test_loaded_model_passes_the_trainers_checks(converted):
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(LlamaForCausalLM.from_pretrained(converted))


def test_dequantize_returns_the_dense_model(converted, tmp_path):
    model = LlamaForCausalLM.from_pretrained(converted).dequantize()
    assert not moe_layers(model)
    torch.testing.assert_close(logits(model), logits(tiny.tiny_llama()), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_from_config_of_a_converted_checkpoint_is_dense(converted):
    assert not moe_layers(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted)))


def _delete_routers(tensors):
    for name in [n for n in tensors if n.endswith("layers.1.mlp.moe.router.out.weight")]:
        del tensors[name]


def _cut_router(tensors):
    name = next(n for n in tensors if n.endswith("layers.0.mlp.moe.router.hidden.weight"))
    tensors[name] = tensors[name][:3].contiguous()


def _add_router(tensors):
    tensors["model.layers.7.mlp.moe.router.out.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_delete_routers, r"lacks 1 router tensors.*'model\.layers\.1\.mlp\.moe\.router\.out\.weight'", id="missing"),
        pytest.param(_cut_router, r"'model\.layers\.0\.mlp\.moe\.router\.hidden\.weight' of shape \(4, 32\)", id="other shape"),
        pytest.param(_add_router, r"1 router tensors that its manifest does not name.*layers\.7", id="too many"),
    ],
)
def test_from_pretrained_with_wrong_router_tensors_raises(converted, change, message):
    tiny.edit_tensors(converted, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(converted)


def _newer(config):
    config["quantization_config"]["schema"] = 99


def _unknown_field(config):
    config["quantization_config"]["sitez"] = []


def _no_sites(config):
    del config["quantization_config"]["sites"]


def _unknown_rule(config):
    config["quantization_config"]["sites"][0]["rule"] = {"name": "dynk_mux", "tau": 0.1}


def _other_path(config):
    config["quantization_config"]["sites"][1]["site"]["down"] = "model.layers.5.mlp.down_proj"


def _other_width(config):
    config["quantization_config"]["sites"][1]["site"]["d_ff"] = 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_newer, "schema 99 is newer .* upgrade moeify", id="newer schema"),
        pytest.param(_unknown_field, "unknown option 'sitez'.*did you mean 'sites'", id="unknown field"),
        pytest.param(_no_sites, "lacks 'sites'", id="no sites"),
        pytest.param(_unknown_rule, "dynk_m", id="unknown rule"),
        pytest.param(_other_path, r"FFN 'model\.layers\.1\.mlp', which this LlamaForCausalLM has not", id="site not in the model"),
        pytest.param(_other_width, r"'model\.layers\.1\.mlp' has \(F, D\) = \(64, 32\), the model has \(48, 32\)", id="other width"),
    ],
)
def test_from_pretrained_with_a_broken_manifest_raises(converted, change, message):
    tiny.edit_config(converted, change)
    with pytest.raises(CheckpointError, match=message) as error:
        LlamaForCausalLM.from_pretrained(converted)
    assert "\n" not in str(error.value)


def test_from_pretrained_of_a_dense_checkpoint_with_our_config_is_refused(converted, tmp_path):
    tiny.save_dense_tiny(tmp_path / "dense")
    config = AutoConfig.from_pretrained(converted).quantization_config
    from moeify.hf.quantizer import MoeifyConfig

    with pytest.raises(ValueError, match="pre-quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=MoeifyConfig.from_dict(config))


@pytest.fixture(params=[GateRouterConfig(), LowRankRouterConfig(rank=4)], ids=["gate", "lowrank"])
def of_weights(request, tmp_path):
    """A checkpoint whose routers read their scores off the FFN's own weights."""
    model = tiny.tiny_llama()
    convert(model, ConvertConfig(expert_size=1, router=request.param, rule=Threshold(theta=0.1)), sites=find_ffn_sites(model, INPUTS))
    model.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_rules_on_scores_of_other_weights_are_refused(of_weights, projection):
    tiny.edit_tensors(of_weights, lambda tensors: tensors[f"model.layers.1.mlp.{projection}.weight"].mul_(1.05))
    with pytest.raises(CheckpointError, match=r"router and rule of 'model\.layers\.1\.mlp' were calibrated for other weights"):
        LlamaForCausalLM.from_pretrained(of_weights)


def test_weights_that_moved_little_or_were_trained_keep_their_rules(of_weights, tmp_path):
    tiny.edit_tensors(of_weights, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.001))
    model = LlamaForCausalLM.from_pretrained(of_weights, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    assert len(moe_layers(LlamaForCausalLM.from_pretrained(tmp_path / "trained"))) == 2


def test_int8_weights_keep_their_rules(of_weights, tmp_path):
    model = LlamaForCausalLM.from_pretrained(of_weights)
    quantize(model)
    model.save_pretrained(tmp_path / "int8")
    assert len(moe_layers(LlamaForCausalLM.from_pretrained(tmp_path / "int8"))) == 2
    tiny.edit_tensors(tmp_path / "int8", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_scale"].mul_(1.05))
    with pytest.raises(CheckpointError, match=r"router and rule of 'model\.layers\.0\.mlp' were calibrated for other weights"):
        LlamaForCausalLM.from_pretrained(tmp_path / "int8")
