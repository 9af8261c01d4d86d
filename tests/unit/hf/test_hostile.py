"""Checkpoints of somebody who means harm: sizes, paths and names that reach further than the folder and the model, in one clear line."""

import io
import json
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from moeify._bounds import MOST_LAYERS, check_bounds
from moeify.errors import CheckpointError
from moeify.hf import load, skeleton
from moeify.hf.load import load_model, read_manifest
from moeify.hf.offload import load_offloaded
from moeify.hf.shards import TensorFiles
from moeify.hf.streamed import open_streamed
from moeify.hf.tokenizer import load_tokenizer
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
    assert taken
    assert not any(taken)


def streamed(folder):
    return open_streamed(str(folder), dtype=torch.float32)


def served(folder):
    pytest.importorskip("fastapi")
    from moeify.serving import ServeConfig
    from moeify.serving.app import build

    return build(folder, ServeConfig())


def offloaded(folder):
    return load_offloaded(folder, folder.parent / "offload")


WAYS = {"memory": load_model, "disk": offloaded, "streamed": streamed, "served": served}


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    """A checkpoint, dense where it is streamed, and each way to load it."""
    save = tiny.save_dense_tiny if request.param == "streamed" else tiny.save_converted_tiny
    return save(tmp_path / "checkpoint"), WAYS[request.param]


def without_norm(folder):
    tiny.edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def left_out_of_the_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, folder / "model-2.safetensors")
    save_file(tensors, folder / "model-1.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config(**fields):
    return lambda folder: tiny.edit_config(folder, lambda c: c.update(fields))


def file(name, text="{}"):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(without_norm, r"lacks 1 tensors of LlamaForCausalLM, first 'model\.norm\.weight'", id="missing"),
        pytest.param(
            left_out_of_the_index, r"lacks 1 tensors of LlamaForCausalLM, first 'model\.norm\.weight'", id="left out of the index"
        ),
        pytest.param(config(vocab_size=2**40), r"has shape \(257, 32\), LlamaForCausalLM has \(1099511627776, 32\)", id="size"),
        pytest.param(config(num_hidden_layers=2000), "config.json asks for more than [0-9]+ tensors, which is more than", id="layers"),
        pytest.param(config(num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000; no model has more than", id="layers, in a list"),
        pytest.param(config(text={"n_layer": 1e300}), "'n_layer' is huge; no model has more than", id="layers, inside"),
        pytest.param(config(hidden_act="__import__"), "there is no LlamaForCausalLM as config.json describes it", id="activation"),
        pytest.param(file("adapter_config.json", '{"peft_type": "LORA"}'), "has a PEFT adapter .* merge it", id="adapter"),
        pytest.param(
            config(transformers_weights="adapter_model.bin"), "names other weights, 'adapter_model.bin'; moeify reads", id="pickle"
        ),
        pytest.param(config(transformers_weights="x.safetensors"), "names other weights, 'x.safetensors'", id="other weights"),
        pytest.param(file("shard-00000-model-00001-of-00001.safetensors"), "spread over processes .*; save it whole", id="of ranks"),
    ],
)
def test_files_that_are_not_those_of_the_config_are_refused_before_a_weight_is_read(way, damage, message, monkeypatch):
    folder, load = way
    damage(folder)

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(TensorFiles, "read", read)
    monkeypatch.setattr(skeleton, "_FEW_TENSORS", 0)  # no need to build more than that many
    with pytest.raises(CheckpointError, match=message) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert not (folder.parent / "offload").exists()


def test_numbers_that_are_none_are_not_served(folder):
    tiny.edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has NaN"):
        served(folder)


def test_tables_that_no_file_holds_are_bounded(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    load_model(tmp_path / "bert")
    tiny.edit_config(tmp_path / "bert", lambda c: c.update(max_position_embeddings=2**40))
    with pytest.raises(CheckpointError, match="GB of tables that no file holds"):
        load_model(tmp_path / "bert")


def test_tensors_that_transformers_makes_of_others_are_bounded(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=9, num_local_experts=2))
    model.save_pretrained(tmp_path / "mixtral")  # each expert's tensors by themselves; the model has them stacked
    load_model(tmp_path / "mixtral")
    tiny.edit_config(tmp_path / "mixtral", lambda c: c.update(intermediate_size=2**40))
    with pytest.raises(CheckpointError, match=r"config\.json asks for [0-9]+ numbers beside those of its files"):
        load_model(tmp_path / "mixtral")


def test_an_adapter_that_no_folder_shows_is_refused(folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_hf_peft_config_loaded", True)  # as transformers marks a model of the Hub that has one
    with pytest.raises(CheckpointError, match="has a PEFT adapter"):
        load_model(folder)


OWN_CODE = {
    "tokenizer_config.json": {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    "processor_config.json": {"processor_class": "EvilProcessor", "auto_map": {"AutoProcessor": "evil.Evil"}},
}


EVIL = "open({!r}, 'w').close()\nclass Evil:\n    from_pretrained = print\n"


@pytest.mark.parametrize("name", OWN_CODE)
def test_code_of_a_checkpoint_is_not_run_whatever_the_terminal_answers(tmp_path, monkeypatch, name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    folder = tmp_path / "vit"  # a family without a tokenizer or processor of its own, which would go first
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(folder)
    (folder / name).write_text(json.dumps(OWN_CODE[name]))
    (folder / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(CheckpointError, match="code of the checkpoint's own, which moeify does not run") as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)
    if name.startswith("tokenizer"):
        with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
            load_tokenizer(str(folder))
    assert sys.stdin.tell() == 0, "nobody was asked"
    assert not (tmp_path / "ran").exists()


def test_nobody_is_asked_where_transformers_forgets_what_it_was_told(tmp_path, monkeypatch):
    folder = tmp_path / "altclip"  # its processor is found by the family, and loads tokenizers without a word about their code
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "altclip"}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(OWN_CODE["tokenizer_config.json"]))
    (folder / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(CheckpointError, match="which moeify does not run"):
        load.load_processor(str(folder), {}, "altclip")
    assert sys.stdin.tell() == 0, "nobody was asked"
    assert not (tmp_path / "ran").exists()


def test_weights_that_a_config_of_the_hub_names_are_safetensors(monkeypatch):
    named = LlamaConfig(transformers_weights="adapter_model.bin")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: named)
    with pytest.raises(CheckpointError, match=r"names the weights 'adapter_model\.bin', which are no safetensors file"):
        load_model("org/name")
