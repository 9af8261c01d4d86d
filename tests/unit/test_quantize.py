"""Int8 weights of a converted model: what stays, what is saved and loaded, what is refused."""

import copy
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from moeify import kernels
from moeify.channels import SparseInput, attach_channels, sparse_inputs
from moeify.controls import record_active, set_impl, set_mode, set_rule
from moeify.convert import ConvertConfig, convert, to_dense
from moeify.errors import CheckpointError, UnsupportedModelError
from moeify.evaluate import model_weights
from moeify.hf.load import load_model
from moeify.layers import moe_layers
from moeify.manifest import Manifest, manifest_of
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig, OracleRouterConfig
from moeify.select import DynKMax, Threshold, TopK
from moeify.sites import Int8Linear, find_ffn_sites, find_linear_sites, site_weights

INPUTS = tiny.tiny_inputs()
HERE = kernels.impls_for("cpu")


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or INPUTS)).logits


def int8_llama(*, rule=None, **options):
    model = tiny.convert_tiny(tiny.tiny_llama(**options), rule=rule or TopK(k=3))
    quantize(model)
    return model


@pytest.fixture
def saved(tmp_path):
    int8_llama().save_pretrained(tmp_path / "int8")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def with_dequantised_weights(model):
    """The same model with floating experts, made from the definition alone."""
    expected = tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=3))
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("weight_scale")}
    for name, tensor in state.items():
        if tensor.dtype is torch.int8:
            q_RD, scale = tensor[0], model.state_dict()[f"{name}_scale"]
            state[name] = (q_RD * scale).t() if "down_proj" in name else q_RD * scale[:, None]
    expected.load_state_dict(state)
    return expected


# -- what it computes ----------------------------------------------------------------------------------------------------------------


def test_quantize_returns_the_relative_error_of_each_ffn():
    model = tiny.convert_tiny(tiny.tiny_llama())
    sites = {name: moe.site for name, moe in moe_layers(model).items()}
    before = {name: site_weights(model, site) for name, site in sites.items()}
    errors = quantize(model)
    assert list(errors) == list(sites)
    for name, site in sites.items():
        after = site_weights(model, site).dequantized(torch.float32)
        pairs = [(getattr(before[name], m), getattr(after, m)) for m in ("up_FD", "gate_FD", "down_FD")]
        w, v = (torch.cat([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1))
        assert errors[name] == pytest.approx(((v - w).norm() / w.norm()).item(), rel=1e-4)
        assert 0 < errors[name] < 0.01


@pytest.mark.parametrize("impl", ["auto", *HERE])
def test_int8_model_computes_what_its_dequantised_weights_compute(impl):
    model = int8_llama()
    set_impl(model, impl)
    expected = logits(with_dequantised_weights(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    one = {"input_ids": INPUTS["input_ids"][:1, :1]}  # the native call for few tokens
    torch.testing.assert_close(logits(model, **one), logits(with_dequantised_weights(model), **one), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=3))))


def test_int8_model_in_dense_mode_is_the_dense_model_up_to_quantisation():
    model, dense = int8_llama(), logits(tiny.tiny_llama())
    set_mode(model, "dense")
    found = logits(model)
    assert 0 < (found - dense).abs().max() < 0.05 * dense.abs().max()
    set_mode(model, "moe")
    set_rule(model, DynKMax(tau=0.0))
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(kernels.cpu.unavailable() is not None, reason=str(kernels.cpu.unavailable()))
def test_generate_says_the_same_with_reference_and_compiled_kernels():
    model = int8_llama(rule=Threshold(theta=0.5))
    texts = {}
    for impl in ("reference", "cpu", "auto"):
        set_impl(model, impl)
        texts[impl] = model.generate(INPUTS["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()
    assert texts["cpu"] == texts["auto"] == texts["reference"]


@pytest.mark.skipif(kernels.cpu.unavailable() is not None, reason=str(kernels.cpu.unavailable()))
def test_one_token_runs_the_native_call_and_records_what_ran():
    model = int8_llama(rule=TopK(k=2))
    with torch.no_grad(), record_active(model) as stats:
        model(input_ids=INPUTS["input_ids"][:1, :1])
    assert stats.active_fraction() == pytest.approx(2 / 6)
    assert all(moe._native is not None and moe._native.routed is not None for moe in moe_layers(model).values())


def test_oracle_router_scores_the_dequantised_experts():
    model = tiny.tiny_llama()
    convert(model, ConvertConfig(expert_size=8, router=OracleRouterConfig(), rule=TopK(k=2)), sites=find_ffn_sites(model, INPUTS))
    moe = next(iter(moe_layers(model).values()))
    x_TD = torch.randn(5, 32)
    before = moe.scores(x_TD)
    quantize(model)
    torch.testing.assert_close(moe.scores(x_TD), before, rtol=0.05, atol=0.01)


def test_compiled_graph_of_an_int8_model_is_whole():
    model = int8_llama()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**INPUTS).logits, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["moe", "dense"])
def test_training_reaches_everything_but_the_integers(mode):
    model = int8_llama()
    set_mode(model, mode)
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)} | {"model.embed_tokens.weight"} <= grads
    assert not any(".mlp." in name for name in grads)


# -- what stays ----------------------------------------------------------------------------------------------------------------------


def test_weights_are_a_quarter_of_the_bytes_and_everything_counts_them():
    model = tiny.convert_tiny(tiny.tiny_llama())
    names, footprint, cost = list(model.state_dict()), model.get_memory_footprint(), model_weights(model)
    quantize(model)
    numbers = 2 * 3 * 48 * 32
    scales = 2 * (48 + 48 + 32) * 4
    assert model.get_memory_footprint() == footprint - 3 * numbers + scales
    after = model_weights(model)
    assert sum(size for _, size in after.ffn.values()) == numbers + scales
    assert after.num_bytes == cost.num_bytes - 3 * numbers + scales
    assert set(names) < set(model.state_dict())
    assert {n.rpartition(".")[2] for n in set(model.state_dict()) - set(names)} == {"weight_scale"}


def test_cast_copies_and_pickles_compute_the_same():
    model = int8_llama()
    expected, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    model.to(torch.bfloat16).to(torch.float32)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is state[name].dtype
        if ".mlp." in name and ".moe." not in name:
            assert torch.equal(tensor, state[name]), name


def test_the_float_weights_are_not_kept_by_the_native_call():
    model = tiny.convert_tiny(tiny.tiny_llama())
    logits(model, input_ids=INPUTS["input_ids"][:1, :1])
    quantize(model)
    assert all(moe._native is None for moe in moe_layers(model).values())


def test_to_dense_gives_a_floating_model_of_the_same_function(tmp_path):
    model = int8_llama(dtype=torch.bfloat16)
    set_mode(model, "dense")
    expected = logits(model)
    to_dense(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.is_quantized
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    dense = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert not moe_layers(dense)
    torch.testing.assert_close(logits(dense), expected)


def test_ffns_that_stayed_dense_are_left_as_they_are():
    model = tiny.tiny_llama()
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=2), policy={"model.layers.0.mlp": None})
    convert(model, config, sites=find_ffn_sites(model, INPUTS))
    quantize(model)
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.float32
    assert model.model.layers[1].mlp.up_proj.weight.dtype is torch.int8


# -- saved and loaded ----------------------------------------------------------------------------------------------------------------


def test_from_pretrained_is_bit_equal_and_complete(saved):
    model = int8_llama()
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert manifest_of(loaded) == manifest_of(model)
    assert {record.weights for record in manifest_of(loaded).sites} == {"int8"}
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(t.dtype is state[name].dtype and torch.equal(t, state[name]) for name, t in loaded.state_dict().items())
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if ".mlp." in name and ".moe." not in name)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_from_pretrained_in_half_precision_keeps_integers_and_scales(saved, dtype):
    model, state = LlamaForCausalLM.from_pretrained(saved, dtype=dtype), int8_llama().state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale") or state[name].dtype is torch.int8:
            assert torch.equal(tensor, state[name]), name
        else:
            assert tensor.dtype is (torch.float32 if ".moe." in name else dtype), name
    assert logits(model).dtype is dtype


def test_save_pretrained_after_from_pretrained_writes_identical_files(saved, tmp_path):
    LlamaForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_sharded_and_base_models_load(saved, tmp_path):
    model = LlamaForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "shards")), logits(model))
    with torch.no_grad():
        base = LlamaModel.from_pretrained(saved)(**INPUTS).last_hidden_state
        assert torch.equal(base, model.model(**INPUTS).last_hidden_state)


def test_dequantize_and_trainer_do_as_the_library_does_for_quantised_models(saved):
    from transformers.trainer_utils import validate_quantization_for_training

    model = LlamaForCausalLM.from_pretrained(saved)
    assert model.is_quantized
    with pytest.raises(ValueError, match="purely quantized models"):
        validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized models"):
        validate_quantization_for_training(int8_llama())
    model = model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    validate_quantization_for_training(model)


def test_load_model_with_dtype_auto_takes_the_checkpoints_own(tmp_path):
    int8_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype="auto")
    assert model.dtype is torch.bfloat16
    assert load_model(tmp_path)[0].dtype is torch.float32


def _drop_scale(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]


def _drop_integers(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def _down_scale_by_neuron(tensors):
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = tensors["model.layers.0.mlp.up_proj.weight_scale"].clone()


def _cut_scale(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = tensors["model.layers.0.mlp.up_proj.weight_scale"][:7].clone()


def _floats(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][0].float()


def _nan_scale(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_drop_scale, r"lacks 1 scale tensors.*'model\.layers\.1\.mlp\.down_proj\.weight_scale'", id="no scale"),
        pytest.param(_cut_scale, r"lacks 1 scale tensors.*'model\.layers\.0\.mlp\.up_proj\.weight_scale' of shape \(48,\)", id="short"),
        pytest.param(
            _down_scale_by_neuron,
            r"lacks 1 scale tensors.*'model\.layers\.0\.mlp\.down_proj\.weight_scale' of shape \(32,\)",
            id="scale of down by neuron",
        ),
        pytest.param(_drop_integers, r"lacks 1 tensors of LlamaForCausalLM, first 'model\.layers\.1\.mlp\.down_proj\.weight'", id="none"),
        pytest.param(_floats, r"'model\.layers\.0\.mlp\.up_proj\.weight' has shape \(48, 32\)", id="floats"),
        pytest.param(_nan_scale, r"'model\.layers\.0\.mlp\.up_proj\.weight_scale' has NaN", id="nan"),
    ],
)
def test_damaged_int8_checkpoints_are_refused(saved, change, message):
    tiny.edit_tensors(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def _set_weights(value):
    def change(config):
        for site in config["quantization_config"]["sites"]:
            site["weights"] = value

    return change


def test_manifest_that_calls_int8_weights_float_is_refused(saved):
    tiny.edit_config(saved, _set_weights("float"))
    with pytest.raises(CheckpointError, match="6 scale tensors that its manifest does not name"):
        load_model(saved)


def test_manifest_that_calls_float_weights_int8_is_refused(tmp_path):
    tiny.edit_config(tiny.save_converted_tiny(tmp_path), _set_weights("int8"))
    with pytest.raises(CheckpointError, match="lacks 6 scale tensors"):
        load_model(tmp_path)


def test_manifest_without_the_type_of_weights_is_of_floats():
    stored = manifest_of(tiny.convert_tiny(tiny.tiny_llama())).to_dict()
    for site in stored["sites"]:
        assert site.pop("weights") == "float"
    assert not Manifest.from_dict(stored).has_int8


def test_manifest_with_an_unknown_type_of_weights_names_the_known(saved):
    tiny.edit_config(saved, _set_weights("int4"))
    with pytest.raises(CheckpointError, match="weights must be one of 'float', 'int8', got 'int4'"):
        load_model(saved)


# -- refused -------------------------------------------------------------------------------------------------------------------------


def unchanged(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_quantize_of_a_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="is dense; convert it, or thin it, first"):
        quantize(tiny.tiny_llama())


def test_quantize_twice_is_refused():
    model = int8_llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.mlp' has int8 weights already"):
        quantize(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_quantize_of_weights_that_are_not_finite_is_refused_before_anything_changes(value):
    model = tiny.convert_tiny(tiny.tiny_llama())
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp' has NaN or infinite weights"):
        quantize(model)
    assert not any(t.dtype is torch.int8 for t in model.state_dict().values())


class Adapter(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def _replace(model):
    model.model.layers[1].mlp.up_proj = Adapter(model.model.layers[1].mlp.up_proj)


def _hook(model):
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)


def _meta(model):
    model.model.layers[1].mlp.to("meta")


def _tie(model):
    model.lm_head.weight = model.model.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_replace, "is a Adapter, not a plain Linear or Conv1D", id="adapter"),
        pytest.param(_hook, "has a forward hook", id="hook"),
        pytest.param(_meta, "is on the meta device", id="meta"),
        pytest.param(_tie, r"'model\.layers\.1\.mlp\.up_proj' shares its weight with another module", id="tied"),
    ],
)
def test_quantize_of_projections_that_are_not_plain_is_refused_before_anything_changes(change, message):
    model = tiny.convert_tiny(tiny.tiny_llama())
    change(model)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        quantize(model)
    assert "'model.layers.1.mlp'" in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(t.dtype is torch.int8 for t in model.state_dict().values())


def test_convert_of_an_int8_model_is_refused():
    model = int8_llama()
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(model, ConvertConfig(expert_size=8), sites=[moe.site for moe in moe_layers(model).values()])


# -- layers that skip input channels -------------------------------------------------------------------------------------------------


def thinned_llama(level=0.3, dtype=torch.float32):
    model = tiny.tiny_llama().eval()
    for site in find_linear_sites(model, INPUTS):
        executor = SparseInput(site, first_dense=1)
        executor.level_K.fill_(level)
        attach_channels(model, executor)
    return model.to(dtype)


def rounded(model):
    """The same model with the floating weights that its integers stand for, made from the definition alone."""
    twin = thinned_llama()
    for name in sparse_inputs(twin):
        int8 = model.get_submodule(name)
        twin.get_submodule(name).weight.data.copy_((int8.weight[0].float() * int8.weight_scale).t())
    return twin


def test_int8_layers_that_skip_channels_compute_what_their_dequantised_weights_compute():
    model = thinned_llama()
    errors = quantize(model)
    assert list(errors) == list(sparse_inputs(model)) and all(1e-4 < error < 0.02 for error in errors.values())
    twin = rounded(model)
    for ids in (INPUTS["input_ids"], INPUTS["input_ids"][:1, :1]):  # masked and by the compiled kernel, where there is one
        torch.testing.assert_close(logits(model, input_ids=ids), logits(twin, input_ids=ids), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(thinned_llama())).abs().max() > 1e-5
    set_mode(model, "dense")
    set_mode(twin, "dense")
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(kernels.cpu.unavailable() is not None, reason="no compiled library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_int8_layers_that_skip_channels_runs_by_the_compiled_kernel(dtype):
    model = thinned_llama(dtype=dtype)
    quantize(model)
    ids = {"input_ids": INPUTS["input_ids"][:1, :1]}
    by_default = logits(model, **ids)
    for name, executor in sparse_inputs(model).items():
        linear = model.get_submodule(name)
        assert executor.masked_reason(linear, torch.zeros(1, 1, executor.site.d_in, dtype=dtype)) is None
    set_impl(model, "cpu")
    by_name = logits(model, **ids)
    set_impl(model, "masked")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for found in (by_default, by_name):
        torch.testing.assert_close(found, logits(model, **ids), **tolerance)
    linear = model.get_submodule(next(name for name in sparse_inputs(model) if name.endswith("v_proj")))
    set_impl(model, "cpu")
    before = logits(model, **ids)
    linear.weight_scale = torch.nn.Parameter(linear.weight_scale.detach() * 2, requires_grad=False)  # a new tensor in the old one's place
    assert not torch.equal(logits(model, **ids), before)


def test_a_thinned_model_with_int8_weights_is_saved_loaded_and_made_dense_again(tmp_path):
    model = thinned_llama()
    quantize(model)
    expected, twin = logits(model), rounded(model)
    model.save_pretrained(tmp_path / "int8")
    assert manifest_of(model).has_int8 and {record.weights for record in manifest_of(model).channels} == {"int8"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), expected)
    assert loaded.is_quantized and all(isinstance(loaded.get_submodule(name), Int8Linear) for name in sparse_inputs(loaded))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    linear = half.get_submodule(next(iter(sparse_inputs(half))))
    assert linear.weight.dtype is torch.int8 and linear.weight_scale.dtype is torch.float32
    read = model_weights(loaded).channels
    assert sum(read.values()) == sum(e.site.d_in * e.site.d_out for e in sparse_inputs(loaded).values())  # a byte each
    to_dense(loaded)
    to_dense(twin)
    assert not loaded.is_quantized and type(loaded.get_submodule(linear_name(twin))) is torch.nn.Linear
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=1e-4, atol=1e-5)


def linear_name(model):
    return next(name for name, module in model.named_modules() if name.endswith("q_proj"))


def test_a_thinned_int8_checkpoint_without_moeify_or_with_other_weights_is_refused(tmp_path):
    model = thinned_llama()
    quantize(model)
    model.save_pretrained(tmp_path / "int8")
    config = LlamaForCausalLM.from_pretrained(tmp_path / "int8").config
    del config.quantization_config
    with pytest.raises(RuntimeError, match="mismatch"):  # what a loader without the manifest sees
        LlamaForCausalLM.from_pretrained(tmp_path / "int8", config=config)
    path = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(path)
    name = linear_name(model)
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] * 3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"levels of '{name}' were calibrated for other weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match="has int8 weights already"):
        quantize(model)


def test_quantize_of_layers_that_skip_channels_and_are_not_plain_changes_nothing():
    model = thinned_llama()
    name = linear_name(model)
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=f"'{name}' has NaN"):
        quantize(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, moeify.quantize; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
