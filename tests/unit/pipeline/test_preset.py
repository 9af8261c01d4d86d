"""Presets and budgets of a checkpoint: calibrated and measured on different data, written beside untouched weights, used by name."""

import json
import shutil

import pytest
import tiny
from numpy.testing import assert_allclose

from bench.tiny import convert_tiny
from moeify import DataConfig, load_model, presets, set_rule
from moeify.budget import AllocateConfig
from moeify.cli import run
from moeify.controls import record_active
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import measure_quality
from moeify.hf.presets import read_presets, write_presets
from moeify.layers import moe_layers
from moeify.pipeline import budget_checkpoint, evaluation_batches, generate_text, preset_checkpoint
from moeify.presets import Preset
from moeify.select import Threshold

DATA = DataConfig(data="builtin:pydoc", split="validation", window=64, max_tokens=1024)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return convert_tiny(tmp_path_factory.mktemp("presets"))[1]


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """The checkpoint with presets, one of them from a budget; and what making them returned."""
    path = tmp_path_factory.mktemp("with") / "moe"
    shutil.copytree(made, path)
    first = preset_checkpoint(path, data=DATA, fractions={"half": 0.5, "few": 0.3})
    config = AllocateConfig(unit="ffn_flops", fraction=0.6, passes=1)
    second = budget_checkpoint(path, data=DATA, config=config, preset="six")
    return path, first, second


def test_presets_are_measured_on_data_that_set_no_knob_and_hold_after_loading(folder):
    path, made, _ = folder
    model, tokenizer = load_model(path)
    assert list(presets(model)) == ["half", "few", "six"] == list(read_presets(path))
    held_out = evaluation_batches(model, tokenizer, DATA, batch_size=1)[1::2]
    for name in ("half", "few", "six"):
        preset = presets(model)[name]
        with set_rule(model, name), record_active(model) as active:
            assert_allclose(measure_quality(model, held_out, metric="perplexity").value, preset.quality, rtol=1e-5)
        assert_allclose(active.active_fraction(), preset.active_fraction, atol=1e-6)
    assert_allclose([made["half"]["active_fraction"], made["few"]["active_fraction"]], [0.5, 0.3], atol=0.06)
    assert made["half"]["latency_fraction"] > 0
    assert "1 x 1" in made["half"]["machine"], "a decoding step"
    assert presets(model)["six"].latency_fraction is None


def test_a_budget_becomes_a_preset_with_what_it_reached(folder):
    path, _, found = folder
    preset = read_presets(path)["six"]
    assert preset.asked == {"ffn_flops": 0.6}
    assert_allclose(preset.ffn_flops_fraction, 0.6, atol=0.05)
    assert_allclose(found["allocation"]["reached"], 0.6, atol=0.03)
    assert found["allocation"]["loss"] <= min(way["loss"] for way in found["allocation"]["compared"].values()) + 1e-12


def test_weights_and_own_rules_stay_and_the_card_has_one_table(made, folder):
    path, _, _ = folder
    for name in ("model.safetensors", "moeify.json", "tokenizer.json"):
        assert (path / name).read_bytes() == (made / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made, path))
    after["quantization_config"].pop("presets")
    assert after == before
    card = (path / "README.md").read_text()
    assert card.count("## Presets") == 1
    assert card.startswith((made / "README.md").read_text().rstrip())
    assert all(card.count(f"| `{name}` |") == 1 for name in ("half", "few", "six"))
    assert not list(path.glob(".*"))


def test_a_preset_of_the_same_name_is_replaced(folder, tmp_path):
    path = tmp_path / "moe"
    shutil.copytree(folder[0], path)
    rules = {name: Threshold(theta=0.0) for name in read_presets(path)["half"].rules}
    write_presets(path, [Preset(name="half", rules=rules, active_fraction=1.0)])
    assert list(read_presets(path)) == ["half", "few", "six"]
    assert read_presets(path)["half"].active_fraction == 1.0
    with pytest.raises(CheckpointError, match="preset 'x' has a rule for 'nowhere'"):
        write_presets(path, [Preset(name="x", rules={"nowhere": Threshold(theta=0.0)}, active_fraction=1.0)])
    assert "x" not in read_presets(path)


def test_generate_takes_a_preset_and_names_those_there_are(folder):
    path, _, _ = folder
    assert isinstance(generate_text(path, "def f(", max_new_tokens=2, preset="few"), str)
    with pytest.raises(ConfigError, match=r"no preset 'hal'; did you mean 'half'\? There are: half, few, six"):
        generate_text(path, "def f(", preset="hal")


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        pytest.param({"a b": 0.5}, "cannot be named 'a b'", id="name"),
        pytest.param({"default": 0.5}, "cannot be named 'default', which names the checkpoint's own rules", id="reserved"),
        pytest.param({"0.5": 0.5}, "cannot be named '0.5': where a preset may stand, a number is an active fraction", id="number"),
        pytest.param({"1e3": 0.5}, "cannot be named '1e3': where", id="number with an exponent"),
        pytest.param({"none": 0.0}, r"active fraction of preset 'none' must be in \(0, 1\], got 0.0", id="fraction"),
    ],
)
def test_wrong_presets_are_refused_before_anything_is_loaded(tmp_path, fractions, message):
    with pytest.raises(ConfigError, match=message):
        preset_checkpoint(tmp_path / "nothing", data=DATA, fractions=fractions)


def test_too_little_data_is_refused(folder):
    with pytest.raises(DataError, match="gave one batch; presets need two"):
        preset_checkpoint(folder[0], data=DataConfig(data="builtin:pydoc", window=64, max_tokens=64))


def test_a_dense_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="of a dense model; convert it first"):
        preset_checkpoint(tiny.save_dense_tiny(tmp_path / "dense"), data=DATA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["budget", "DIR", "--data", "builtin:pydoc"], "give one of --flops, --ffn-flops, --bytes and --latency, got 0.", id="none"
        ),
        pytest.param(["budget", "DIR", "--data", "builtin:pydoc", "--flops", "0.5", "--bytes", "0.5"], "got 2.", id="two"),
        pytest.param(["budget", "DIR", "--data", "builtin:pydoc", "--flops", "1.5"], "must be in (0, 1]", id="range"),
        pytest.param(["preset", "DIR", "--data", "builtin:pydoc", "--at", "fast"], "--at takes NAME=NUMBER, got 'fast'.", id="no number"),
        pytest.param(["preset", "DIR", "--data", "builtin:pydoc", "--at", "a=0.5,a=0.6"], "the name 'a' is there twice.", id="twice"),
        pytest.param(["generate", "DIR", "x", "--preset", "quick"], "no preset 'quick'", id="generate"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(folder, arguments, message, capsys):
    assert run([str(folder[0]) if a == "DIR" else a for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_command_line_makes_presets(made, tmp_path, capsys):
    path = tmp_path / "moe"
    shutil.copytree(made, path)
    data = ["--data", "builtin:pydoc", "--window", "64", "--max-tokens", "256"]
    assert run(["preset", str(path), *data, "--at", "a=0.5", "--no-latency", "--json"]) == 0
    made_by_it = json.loads(capsys.readouterr().out)["a"]
    assert (made_by_it["asked"], made_by_it.get("latency_fraction")) == ({"active_fraction": 0.5}, None)
    assert run(["budget", str(path), *data, "--ffn-flops", "0.7", "--passes", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"]["name"] == "ffn-flops-0.7"
    assert list(read_presets(path)) == ["a", "ffn-flops-0.7"]
    assert len(moe_layers(load_model(path)[0])) == 2
