"""Checkpoints of somebody who means harm: sizes, paths and names that reach further than the folder and the model, in one clear line."""

import json
import sys

import pytest
import tiny

from moeify._bounds import MOST_LAYERS, check_bounds
from moeify.errors import CheckpointError
from moeify.hf import load
from moeify.hf.load import load_model, read_manifest
from moeify.hf.offload import load_offloaded
from moeify.manifest import Manifest, manifest_of
from moeify.routers import build_router


@pytest.fixture
def folder(tmp_path):
    return tiny.save_converted_tiny(tmp_path / "moe")


def first_site(config):
    return config["quantization_config"]["sites"][0]


def other_layer(config):
    first_site(config)["site"]["up"] = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: first_site(c).update(num_experts=10**9), "'num_experts' is 1000000000; sizes are in", id="experts"),
        pytest.param(lambda c: first_site(c)["site"].update(d_ff=10**12), "'d_ff' is 1000000000000; sizes are in", id="neurons"),
        pytest.param(lambda c: first_site(c)["router"].update(width=10**9), "'width' is 1000000000; sizes are in", id="router"),
        pytest.param(
            lambda c: first_site(c)["router"].update(width=2**24), "lacks .* router tensors|asks for, first", id="router within bounds"
        ),
        pytest.param(lambda c: first_site(c)["site"].update(d_ff=-1), "'d_ff' is -1; sizes are in", id="negative"),
        pytest.param(lambda c: first_site(c).update(always_on=[0] * (2**20 + 1)), "'always_on' has 1048577 entries", id="always on"),
        pytest.param(lambda c: first_site(c)["site"].update(name="x" * 5000), "'name' is a text of 5000 characters", id="name"),
        pytest.param(lambda c: first_site(c)["site"].update(d_out=31), "has 31 outputs, the model has 32", id="outputs"),
        pytest.param(
            lambda c: first_site(c)["site"].update(activation="__import__"), "activation '__import__', which is not known", id="activation"
        ),
        pytest.param(lambda c: first_site(c)["site"].update(down="__class__.mro"), "which this LlamaForCausalLM has not", id="attribute"),
        pytest.param(
            lambda c: first_site(c)["site"].update(up="model.layers.0.mlp.forward"),
            "names 'model.layers.0.mlp', which this LlamaForCausalLM has not",
            id="method",
        ),
        pytest.param(other_layer, "has the projection 'model.layers.1.mlp.up_proj', which lies outside it", id="another layer's"),
    ],
)
@pytest.mark.parametrize("load", [load_model, lambda folder: load_offloaded(folder, folder.parent / "offload")], ids=["memory", "disk"])
def test_manifests_that_reach_too_far_are_refused(folder, load, change, message):
    tiny.edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message) as refused:
        load(folder)
    assert not (folder.parent / "offload").exists()
    assert "\n" not in str(refused.value)


def test_lists_of_layers_are_bounded_before_anything_is_built_of_them():
    record = manifest_of(tiny.convert_tiny(tiny.tiny_llama())).to_dict()
    for name in ("sites", "channels", "projections", "presets"):
        with pytest.raises(CheckpointError, match=f"'{name}' has {MOST_LAYERS + 1} entries, more than {MOST_LAYERS}"):
            Manifest.from_dict({**record, name: [None] * (MOST_LAYERS + 1)})
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested more than 32 deep"):
        check_bounds({"sites": deep}, where="here")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "..\\x.safetensors", 3])
def test_an_index_names_files_of_its_folder_only(folder, shard):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder.parent / "secret.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="which is no safetensors file of this folder"):
        load_model(folder)


def test_json_files_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(load, "_MOST_JSON", 100)
    for read in (load_model, read_manifest):
        with pytest.raises(CheckpointError, match="bytes; no checkpoint needs more than 100"):
            read(folder)


def test_json_of_a_million_brackets_is_not_json(folder):
    (folder / "config.json").write_text("[" * 1_000_000)
    with pytest.raises(CheckpointError, match="is not JSON: it is nested too deeply"):
        load_model(folder)


def test_a_router_takes_no_memory_before_the_files_are_known_to_hold_one(folder, tmp_path, monkeypatch):
    tiny.edit_config(folder, lambda c: first_site(c)["router"].update(width=2**20))
    taken = []

    def build(*args, **options):
        router = build_router(*args, **options)
        taken.append(sum(parameter.nbytes for parameter in router.parameters() if not parameter.is_meta))
        return router

    monkeypatch.setattr(sys.modules["moeify.convert"], "build_router", build)
    with pytest.raises(CheckpointError, match="router tensors"):
        load_offloaded(folder, tmp_path / "offload")
    assert taken == [0, 0]
