"""Fixed-k checkpoints of other architectures: loaded by plain transformers, compared with our own model of the same routing."""

import json

import pytest
import tiny
import torch
import transformers
from families.models import build
from safetensors import safe_open

from moeify.controls import set_mode, set_rule
from moeify.convert import ConvertConfig, convert
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.export import NativeMoEConfig, check_exportable, fit_routing, routed_as, to_native_moe
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import LinearRouterConfig, NormRouterConfig
from moeify.select import Threshold, TopK
from moeify.sites import find_ffn_sites

CLASSES = {"qwen2-moe": transformers.Qwen2MoeForCausalLM, "mixtral": transformers.MixtralForCausalLM}


def converted(*, width=48, rule=None, **options):
    model = tiny.tiny_llama(hidden_act="silu", intermediate_size=width)
    config = ConvertConfig(expert_size=8, **{"router": NormRouterConfig(width=4)} | options, rule=rule or TopK(k=3))
    convert(model, config, sites=find_ffn_sites(model, tiny.tiny_inputs()))
    return model


def batches():
    return [{"input_ids": torch.randint(0, tiny.VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))}]


def logits(model):
    with torch.no_grad():
        return model(**tiny.tiny_inputs()).logits


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("layout", CLASSES)
@pytest.mark.parametrize("width", [48, 45], ids=["equal experts", "uneven experts"])
def test_plain_transformers_loads_it_and_computes_our_topk(layout, width, tmp_path):
    model, config = converted(width=width), NativeMoEConfig(layout=layout)
    routings = fit_routing(model, batches(), config)
    to_native_moe(model, routings, config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in stored
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CLASSES[layout]
    assert not any(info.values()), "no tensor is missing, left over or drawn"
    shared = stored.get("shared_expert_intermediate_size", 0) // 8
    assert stored["num_experts_per_tok"] + shared == 3
    assert stored.get("num_experts", stored.get("num_local_experts")) + shared == 6
    assert shared == (0 if layout == "mixtral" else len(routings["model.layers.0.mlp"].shared))
    with routed_as(model, routings, 3):
        assert difference(logits(loaded), logits(model)) < 2e-3, "weights of experts are 1 up to sharpness, 1e-3"
    assert all(type(moe.router).__name__ == "NormRouter" and moe.rule == TopK(k=3) for moe in moe_layers(model).values())


@pytest.mark.parametrize("layout", CLASSES)
def test_flatter_routers_come_nearer_and_all_experts_are_the_dense_model(layout):
    model = converted()
    errors = []
    for sharpness in (0.3, 0.03, 0.003):
        config = NativeMoEConfig(layout=layout, sharpness=sharpness)
        routings = fit_routing(model, batches(), config)
        with routed_as(model, routings, 3):
            errors.append(difference(logits(to_native_moe(model, routings, config)), logits(model)))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    config = NativeMoEConfig(layout=layout, k=6, sharpness=1e-5)
    everything = to_native_moe(model, fit_routing(model, batches(), config), config)
    set_mode(model, "dense")
    assert difference(logits(everything), logits(model)) < 1e-4


def test_a_linear_router_is_kept_as_it_is():
    model = converted(router=LinearRouterConfig())
    for moe in moe_layers(model).values():
        torch.nn.init.normal_(moe.router.out.weight)
    config = NativeMoEConfig(layout="mixtral")
    routings = fit_routing(model, batches(), config)
    assert difference(logits(to_native_moe(model, routings, config)), logits(model)) < 5e-3
    assert all(routing.captured == pytest.approx(routing.captured_before) for routing in routings.values())


def test_always_on_experts_and_dense_layers_have_their_place_in_qwen2_moe():
    model = tiny.tiny_llama(hidden_act="silu")
    sites = find_ffn_sites(model, tiny.tiny_inputs())
    convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=2)), sites=sites[1:])
    (moe,) = moe_layers(model).values()
    moe.always_on = (4,)
    quantize(model)
    config = NativeMoEConfig(layout="qwen2-moe", shared=1)
    assert check_exportable(model, config) == 3
    routings = fit_routing(model, batches(), config)
    exported = to_native_moe(model, routings, config)
    assert routings["model.layers.1.mlp"].shared == (4,)
    assert exported.config.mlp_only_layers == [0]
    with routed_as(model, routings, 3):
        assert difference(logits(exported), logits(model)) < 5e-3
    with pytest.raises(UnsupportedModelError, match="1 FFNs of the model stay dense, which mixtral has none of"):
        check_exportable(model, NativeMoEConfig(layout="mixtral"))


@pytest.mark.parametrize(
    ("name", "needed"), [("bert", "takes causal language models of llama, mistral, qwen2; use --to onnx"), ("llama-bias", "not a SwiGLU")]
)
def test_other_families_are_refused_by_what_works(name, needed):
    model, inputs = build(name)
    convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=2)), sites=find_ffn_sites(model, inputs))
    with pytest.raises(UnsupportedModelError, match=needed):
        check_exportable(model, NativeMoEConfig(layout="qwen2-moe"))


def test_biases_of_attention_have_a_place_in_qwen2_moe_alone(tmp_path):
    model, inputs = build("qwen2")
    convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=2)), sites=find_ffn_sites(model, inputs))
    config = NativeMoEConfig(layout="qwen2-moe")
    ids = [{"input_ids": inputs["input_ids"]}]
    routings = fit_routing(model, ids, config)
    exported = to_native_moe(model, routings, config)
    with routed_as(model, routings, 2), torch.no_grad():
        assert difference(exported(**inputs).logits, model(**inputs).logits) < 5e-3
    exported.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in names, "the names that other engines read"
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias' has no place in mixtral; use --to qwen2-moe"):
        check_exportable(model, NativeMoEConfig(layout="mixtral"))


def test_numbers_that_mean_nothing_are_refused():
    model = converted(rule=Threshold(theta=0.1))
    with pytest.raises(ConfigError, match="say how many of the 6 experts run"):
        check_exportable(model, NativeMoEConfig(layout="mixtral"))
    set_rule(model, TopK(k=1))
    with pytest.raises(ConfigError, match=r"k must be in \[2, 6\]"):
        check_exportable(model, NativeMoEConfig(layout="qwen2-moe"))
    with pytest.raises(ConfigError, match="k = 7"):
        check_exportable(model, NativeMoEConfig(layout="mixtral", k=7))
    with pytest.raises(ConfigError, match="layout must be"):
        NativeMoEConfig(layout="gpt-oss")
    with pytest.raises(UnsupportedModelError, match="is dense; convert it first"):
        check_exportable(tiny.tiny_llama(), NativeMoEConfig(layout="mixtral"))
