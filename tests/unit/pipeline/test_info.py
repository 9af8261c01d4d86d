"""What `moeify info` says of folders of every kind, and of bad ones."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from moeify import cli, set_rule
from moeify.hf.load import load_model
from moeify.hf.save import save_checkpoint
from moeify.manifest import stamp
from moeify.pipeline.info import checkpoint_info, info_text
from moeify.presets import Preset, presets, store
from moeify.quantize import quantize
from moeify.select import DynKMax

MEASURED = {"metric": "perplexity", "quality": 9.0, "kl": None}
CALIBRATION = {"rule": "dynk_max", "active_fraction": 0.5, "source": "org/base", "measured": MEASURED}


def save(model, out, **calibration):
    save_checkpoint(model, None, out, calibration={**CALIBRATION, **calibration}, card="card")
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("info")
    tiny.save_dense_tiny(root / "dense")
    model = tiny.convert_tiny(tiny.tiny_llama(), rule=DynKMax(tau=0.5))
    save(model, root / "moe")
    rules = {name: DynKMax(tau=0.9) for name in ("model.layers.0.mlp", "model.layers.1.mlp")}
    fast = Preset(name="fast", rules=rules, active_fraction=0.25, metric="perplexity", quality=11.0, dense_quality=8.0, flops_fraction=0.7)
    stamp(model)
    assert store(model, [fast]) and presets(model)
    save(model, root / "presets")
    quantize(model)
    save(model, root / "int8", measured=None, measured_float=CALIBRATION["measured"])
    return root


def test_a_dense_folder(folders):
    info = checkpoint_info(folders / "dense")
    tensors = load_file(folders / "dense" / "model.safetensors")
    assert (info["kind"], info["family"], info["architecture"]) == ("dense", "llama", "LlamaForCausalLM")
    assert info["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert (info["added_parameters"], info["dtypes"]) == (0, {"float32": info["parameters"]})
    assert info["weight_bytes"] == (folders / "dense" / "model.safetensors").stat().st_size < info["bytes"]
    assert info["dense_equal"] is None
    assert not {"ffns", "channels", "projections", "presets", "measured"} & set(info)


def test_a_mixture_of_experts(folders):
    info, dense = checkpoint_info(folders / "moe"), checkpoint_info(folders / "dense")
    assert info["kind"] == "mixture of experts"
    assert info["ffns"] == {
        "converted": 2,
        "neurons": 48,
        "experts": 6,
        "router": "norm",
        "rule": "dynk_max",
        "knob": 0.5,
        "calibrated_active_fraction": 0.5,
        "always_on": 0,
        "weights": "float",
    }
    assert info["parameters"] == dense["parameters"]
    tensors = load_file(folders / "moe" / "model.safetensors")
    assert info["added_parameters"] == sum(tensor.numel() for name, tensor in tensors.items() if ".moe.router." in name) > 0
    assert info["measured"] == {"metric": "perplexity", "quality": 9.0}
    assert (info["base_model"], info["dense_equal"]) == ("org/base", None)
    assert info["versions"]["torch"] == torch.__version__


def test_rules_that_were_set_since_are_said_to_be(folders, tmp_path):
    model, _ = load_model(folders / "moe")
    set_rule(model, DynKMax(tau=0.8))
    model.save_pretrained(tmp_path)
    (tmp_path / "moeify.json").write_bytes((folders / "moe" / "moeify.json").read_bytes())
    ffns = checkpoint_info(tmp_path)["ffns"]
    assert ffns["knob"] == 0.8
    assert "since calibration" in ffns["rules_changed"]


def test_presets_have_quality_and_cost(folders):
    info = checkpoint_info(folders / "presets")
    assert [preset["name"] for preset in info["presets"]] == ["fast"]
    assert info_text(info)["presets"] == {"fast": "active 0.25, perplexity 11 (dense 8), FLOPs 0.7"}


def test_int8_weights_have_no_dense_equal(folders):
    info = checkpoint_info(folders / "int8")
    assert (info["kind"], info["ffns"]["weights"]) == ("mixture of experts, int8", "int8")
    assert set(info["dtypes"]) == {"float32", "int8"}
    assert "int8" in info["dense_equal"]
    assert info["measured_float"]["quality"] == 9.0 and "measured" not in info


def test_replaced_projections_have_no_dense_equal(tmp_path):
    model = tiny.replaced_llama()
    stamp(model)
    save(model, tmp_path / "replaced")
    info = checkpoint_info(tmp_path / "replaced")
    assert info["kind"] == "dense, projections replaced"
    assert info["projections"] == {"replaced": 8, "roles": {"q": 2, "k": 2, "v": 2, "o": 2}}
    assert "replaced by MLPs" in info["dense_equal"]


def test_records_of_training_are_shown(folders, tmp_path):
    for path in (folders / "dense").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sparsify.json").write_text(json.dumps({"task": "clm", "metric": "perplexity", "source": "org/dense", "losses": [1.0]}))
    (tmp_path / "pretrain.json").write_text(json.dumps({"name": "r", "tokens": 7, "losses": [1.0]}))
    info = checkpoint_info(tmp_path)
    assert info["kind"] == "dense, sparsified, pre-trained"
    assert info["sparsified"] == {"task": "clm", "metric": "perplexity"}
    assert info["pretrained"] == {"name": "r", "tokens": 7}
    assert info["base_model"] == "org/dense"


def test_the_command_prints_text_and_json(folders, capsys):
    assert cli.run(["info", str(folders / "presets")]) == 0
    out = capsys.readouterr().out
    assert "kind: mixture of experts" in out and "fast: active 0.25" in out
    assert "None" not in out
    assert cli.run(["info", str(folders / "presets"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(checkpoint_info(folders / "presets")))


def damaged(folder, tmp_path, name, content):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", "short", "is truncated or not a safetensors file"),
        ("moeify.json", "[1]", "has no 'calibration' record"),
        ("sparsify.json", "[" * 5000, "cannot be read"),
        ("pretrain.json", "3", "is not a JSON object"),
    ],
)
def test_damaged_folders_are_one_line(folders, tmp_path, capsys, name, content, message):
    assert cli.run(["info", str(damaged(folders / "moe", tmp_path, name, content))]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_newer_schema_and_a_missing_folder_are_one_line(folders, tmp_path, capsys):
    folder = damaged(folders / "moe", tmp_path, "README.md", "")
    tiny.edit_config(folder, lambda config: config["quantization_config"].update(schema=99))
    assert cli.run(["info", str(folder)]) == 2
    assert "schema 99 is newer" in capsys.readouterr().err
    assert cli.run(["info", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
