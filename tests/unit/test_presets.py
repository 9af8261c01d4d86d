"""Presets: kept in the manifest, through files and other model classes; set_rule by name and for a block."""

import copy
import json

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

import moeify
from moeify.controls import set_rule
from moeify.convert import convert, rebuild, to_dense
from moeify.errors import CheckpointError, ConfigError
from moeify.layers import moe_layers
from moeify.manifest import Manifest, manifest_of, set_presets
from moeify.presets import MOST, Preset, presets
from moeify.quantize import quantize
from moeify.select import DynKMax, Threshold, TopK

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"
FAST = Preset(
    name="fast", rules={FIRST: TopK(k=1), SECOND: TopK(k=2)}, active_fraction=0.25, asked={"active_fraction": 0.25}, metric="perplexity"
)
QUALITY = Preset(name="quality", rules={FIRST: TopK(k=5), SECOND: TopK(k=5)}, active_fraction=0.83)


@pytest.fixture
def model():
    made = tiny.convert_tiny(tiny.tiny_llama())
    set_presets(made, [QUALITY, FAST])
    return made


def rules(model):
    return [layer.rule for layer in moe_layers(model).values()]


def stored(model):
    """What the model's config says, whichever way it is kept."""
    kept = model.config.quantization_config
    return kept if isinstance(kept, dict) else kept.to_dict()


# -- set_rule --------------------------------------------------------------------------------------------------------------------------


def test_set_rule_in_a_with_block_puts_back_rules_and_manifest_also_after_errors_and_nested(model):
    before, written = rules(model), copy.deepcopy(stored(model))
    with set_rule(model, TopK(k=3)) as outer:
        assert rules(model) == [TopK(k=3)] * 2
        inside = []

        def fail():
            with set_rule(model, {SECOND: DynKMax(tau=0.5)}):
                inside.extend([rules(model), stored(model)["sites"][1]["rule"]])
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert inside == [[TopK(k=3), DynKMax(tau=0.5)], {"name": "dynk_max", "tau": 0.5}]
        assert rules(model) == [TopK(k=3)] * 2
        assert stored(model)["sites"][1]["rule"] == {"name": "topk", "k": 3}
    assert rules(model) == before
    assert stored(model) == written
    with outer:
        assert rules(model) == [TopK(k=3)] * 2, "a handle may be used again"
    assert rules(model) == before


def test_set_rule_without_with_stays_until_restored(model):
    handle = set_rule(model, "fast")
    assert rules(model) == [TopK(k=1), TopK(k=2)]
    handle.restore()
    assert rules(model) == [DynKMax(tau=0.0)] * 2


def test_a_handle_outlives_the_conversion_it_was_made_for(model):
    with set_rule(model, "fast"):
        to_dense(model)
    assert not moe_layers(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("fasst", "this model has no preset 'fasst'; did you mean 'fast'? There are: quality, fast.", id="near"),
        pytest.param("zzz", "this model has no preset 'zzz'; known: quality, fast.", id="far"),
    ],
)
def test_a_wrong_name_changes_nothing_and_names_those_there_are(model, name, message):
    with pytest.raises(ConfigError) as error:
        set_rule(model, name)
    assert str(error.value) == message
    assert rules(model) == [DynKMax(tau=0.0)] * 2


def test_a_model_without_presets_says_how_to_get_them():
    with pytest.raises(ConfigError, match="no preset 'fast': this model has none; `moeify preset DIR"):
        set_rule(tiny.convert_tiny(tiny.tiny_llama()), "fast")
    assert presets(tiny.tiny_llama()) == {}


def test_a_part_of_a_model_takes_what_a_preset_says_of_its_layers(model):
    set_rule(model.model.layers[1], {SECOND: TopK(k=4)})
    set_rule(model.model, "fast")  # shares the config
    assert rules(model) == [TopK(k=1), TopK(k=2)]


# -- where they are kept -----------------------------------------------------------------------------------------------------------------


def test_presets_survive_files_other_classes_rules_int8_and_copies(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert presets(loaded) == {"quality": QUALITY, "fast": FAST} == moeify.presets(model)
    assert manifest_of(loaded) == manifest_of(model)

    set_rule(loaded, "fast")
    quantize(loaded)
    loaded.save_pretrained(tmp_path / "b")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert rules(again) == [TopK(k=1), TopK(k=2)]
    assert list(presets(again)) == ["quality", "fast"]
    assert presets(copy.deepcopy(again)) == presets(again)

    base = LlamaModel.from_pretrained(tmp_path / "a")
    assert list(presets(base)["fast"].rules) == ["layers.0.mlp", "layers.1.mlp"]
    set_rule(base, "fast")
    assert rules(base) == [TopK(k=1), TopK(k=2)]
    base.save_pretrained(tmp_path / "base")
    assert presets(LlamaForCausalLM.from_pretrained(tmp_path / "base")) == presets(loaded)


def test_presets_of_a_loaded_model_can_be_replaced_and_are_saved(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    set_presets(loaded, [FAST])
    loaded.save_pretrained(tmp_path / "b")
    assert list(presets(LlamaForCausalLM.from_pretrained(tmp_path / "b"))) == ["fast"]
    set_presets(loaded, [])
    loaded.save_pretrained(tmp_path / "c")
    assert "presets" not in json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"], (
        "as files from before have none"
    )


def test_rebuild_gives_a_skeleton_the_presets(model):
    skeleton = tiny.tiny_llama()
    rebuild(skeleton, Manifest.from_dict(json.loads(json.dumps(manifest_of(model).to_dict()))))
    assert presets(skeleton) == presets(model)
    to_dense(skeleton)
    assert presets(skeleton) == {}


def test_thinned_models_have_presets_of_their_channels(tmp_path):
    model = tiny.tiny_llama()
    skipped = moeify.thin(model, [tiny.tiny_inputs(batch=4, length=16)], moeify.ThinConfig(skip_frac=0.4))
    half = Preset(name="half", rules={name: Threshold(theta=0.5) for name in skipped}, active_fraction=0.8)
    set_presets(model, [half])
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    base = LlamaModel.from_pretrained(tmp_path)
    for one, inputs in ((loaded, tiny.tiny_inputs()), (base, tiny.tiny_inputs())):
        with moeify.record_channels(one) as usual, torch.no_grad():
            one(**inputs)
        with set_rule(one, "half"), moeify.record_channels(one) as fewer, torch.no_grad():
            one(**inputs)
        assert fewer.skipped_frac() < usual.skipped_frac()


# -- refused ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param([FAST, FAST], "two presets named 'fast'", id="twice"),
        pytest.param([Preset(name="a", rules={"lm_head": TopK(k=1)}, active_fraction=1.0)], "'lm_head', which is no layer", id="layer"),
        pytest.param([Preset(name=f"p{i}", rules=FAST.rules, active_fraction=1.0) for i in range(MOST + 1)], "at most 64", id="many"),
    ],
)
def test_presets_that_do_not_fit_are_refused(model, made, message):
    with pytest.raises(ConfigError, match=message):
        set_presets(model, made)
    assert list(presets(model)) == ["quality", "fast"]


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65])
def test_names_that_cannot_be_typed_or_be_files_are_refused(name):
    with pytest.raises(ConfigError, match="a preset cannot be named"):
        Preset(name=name, rules=FAST.rules, active_fraction=0.5)


def test_a_damaged_preset_in_a_checkpoint_is_one_clear_line(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, lambda config: config["quantization_config"]["presets"][1].update(activ_fraction=0.1))
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config: .*unknown option 'activ_fraction' of Preset"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_a_config_has_nowhere_to_keep_presets():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, x):
            return self.mlp(x)

    net = Net()
    convert(net, moeify.ConvertConfig(expert_size=4), sites=moeify.find_ffn_sites(net, {"x": torch.randn(2, 5, 6)}))
    with pytest.raises(ConfigError, match="Net has no config to keep presets in"):
        set_presets(net, [])
