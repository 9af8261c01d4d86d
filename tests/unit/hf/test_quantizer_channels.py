"""Checkpoints of models that skip channels: from_pretrained rebuilds them, and everybody else reads the dense model."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from ffn_cases import needs_library
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from moeify.channels import record_channels, sparse_inputs
from moeify.convert import ConvertConfig, convert, to_dense
from moeify.errors import CheckpointError
from moeify.layers import moe_layers
from moeify.sites import find_ffn_sites
from moeify.thin import ThinConfig, thin

INPUTS = tiny.tiny_inputs()


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def thinned(**options):
    model = tiny.tiny_llama().eval()
    thin(model, [INPUTS], ThinConfig(**{"skip_frac": 0.4, **options}))
    return model


@pytest.fixture
def saved(tmp_path):
    thinned().save_pretrained(tmp_path / "thin")
    return tmp_path / "thin"


def test_from_pretrained_is_bit_equal_and_saves_identical_files(saved, tmp_path):
    model = thinned()
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(sparse_inputs(loaded)) == 14
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(tiny.tiny_llama()), atol=1e-3)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_half_precision_keeps_levels_in_fp32(saved):
    loaded = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    for name, executor in sparse_inputs(loaded).items():
        assert executor.level_K.dtype == torch.float32
        assert torch.equal(executor.level_K, sparse_inputs(thinned())[name].level_K)
    with record_channels(loaded) as recorder:
        logits(loaded)
    assert recorder.skipped_frac() == pytest.approx(0.4, abs=0.1)


@needs_library
@pytest.mark.parametrize("model_class", [LlamaForCausalLM, LlamaModel])
def test_a_loaded_model_runs_its_ffns_as_one_call(saved, model_class):
    loaded = model_class.from_pretrained(saved)
    gated = [executor.gated for executor in sparse_inputs(loaded).values() if executor.site.ffn is not None]
    assert len(gated) == 2
    with torch.no_grad():
        assert all(ffn.separate_reason(torch.zeros(1, 1, 32)) is None for ffn in gated)


def test_a_checkpoint_that_names_no_ffn_runs_layer_by_layer_and_a_wrong_name_is_an_error(saved):
    def edit(change):
        config = json.loads((saved / "config.json").read_text())
        for record in config["quantization_config"]["channels"]:
            if "ffn" in record["site"]:
                change(record["site"])
        (saved / "config.json").write_text(json.dumps(config))

    edit(lambda site: site["ffn"].update(gate="model.layers.0.mlp.nothing"))
    with pytest.raises(CheckpointError, match="which this LlamaForCausalLM has not"):
        LlamaForCausalLM.from_pretrained(saved)
    edit(lambda site: site.pop("ffn"))
    loaded = LlamaForCausalLM.from_pretrained(saved)
    assert not any(executor.gated for executor in sparse_inputs(loaded).values())
    torch.testing.assert_close(logits(loaded), logits(thinned()))


def test_a_process_without_moeify_reads_the_dense_model(saved, tmp_path):
    code = (
        "import sys, torch\n"
        "from transformers import LlamaForCausalLM\n"
        f"model = LlamaForCausalLM.from_pretrained({str(saved)!r}).eval()\n"
        f"ids = torch.tensor({INPUTS['input_ids'].tolist()})\n"
        f"torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'moeify' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(tiny.tiny_llama()), rtol=0, atol=1e-6)


def test_base_model_finds_its_layers_without_the_prefix(saved):
    loaded = LlamaModel.from_pretrained(saved)
    assert set(sparse_inputs(loaded)) == {name.removeprefix("model.") for name in sparse_inputs(thinned())}


def test_channels_of_attention_beside_experts_of_ffns_are_both_kept(tmp_path):
    model = thinned(roles=("attn_in", "attn_out"))
    convert(model, ConvertConfig(expert_size=8), sites=find_ffn_sites(tiny.tiny_llama(), INPUTS))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (len(sparse_inputs(loaded)), len(moe_layers(loaded))) == (8, 2)
    assert torch.equal(logits(loaded), logits(model))
    to_dense(loaded)
    assert not sparse_inputs(loaded) and not moe_layers(loaded)
    assert not hasattr(loaded.config, "quantization_config")


def test_levels_of_other_weights_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    other = tiny.tiny_llama(seed=1).state_dict()
    save_file({name: other.get(name, tensor) for name, tensor in tensors.items()}, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"levels of 'model\.layers\.0\.self_attn\.q_proj' were calibrated for other weights"):
        LlamaForCausalLM.from_pretrained(saved)


def test_weights_that_moved_little_keep_their_levels(saved):
    tensors = load_file(saved / "model.safetensors")
    moved = {name: tensor * (1 if name.endswith("level_K") else 1.001) for name, tensor in tensors.items()}
    save_file(moved, saved / "model.safetensors", metadata={"format": "pt"})
    assert sparse_inputs(LlamaForCausalLM.from_pretrained(saved))


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_levels_that_are_not_those_of_the_manifest_are_refused(saved, change):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.channels.level_K"
    if change == "extra":
        tensors["model.layers.7.mlp.down_proj.channels.level_K"] = tensors[name].clone()
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        del tensors[name]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 level tensors that its manifest .*layers\.[17]\.mlp\.down_proj\.channels\.level_K"):
        LlamaForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 31}, r"q_proj' has \(N, K\) = \(32, 31\), the model has \(32, 32\)"),
        ({"name": "model.layers.9.q"}, r"names the linear layer 'model\.layers\.9\.q', which this LlamaForCausalLM has not"),
    ],
)
def test_a_manifest_of_another_model_is_refused(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["channels"][0]["site"] |= change
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(saved)
