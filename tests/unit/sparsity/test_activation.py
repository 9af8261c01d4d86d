"""Changing activations, and what a checkpoint says of it."""

import json

import pytest
import torch
from families.models import build
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from without_moeify import run_without_moeify

from moeify.convert import ConvertConfig, convert, replace_projections, to_dense
from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.hf.load import load_model, read_manifest
from moeify.manifest import manifest_of
from moeify.sites import find_ffn_sites, find_projections, projection_mlps
from moeify.sparsity import ActivationConfig, set_activation, set_mix
from moeify.sparsity.activation import RECORD, UNRESTORED, BlendedActivation, find_activation

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"


def llama():
    model, inputs = build("llama")
    return model, inputs, find_ffn_sites(model, inputs)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def reloaded(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def load_without_moeify(directory):
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(m(input_ids=torch.arange(6)[None]).logits.double().sum().item())"
    )
    return run_without_moeify(script, directory)


def test_set_activation_when_all_layers_agree_writes_an_ordinary_config(tmp_path):
    model, inputs, sites = llama()
    changed = set_activation(model, sites)
    assert [site.activation for site in changed] == ["relu", "relu"]
    z = torch.linspace(-2, 2, 9)
    assert torch.equal(model.model.layers[1].mlp.act_fn(z), z.relu())
    assert model.config.hidden_act == "relu"
    after = logits(model, inputs)
    assert torch.equal(logits(reloaded(model, tmp_path), inputs), after)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["hidden_act"] == "relu"
    assert not {RECORD, "quantization_config"} & set(written)
    done = load_without_moeify(tmp_path)
    expected = model(input_ids=torch.arange(6)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5), done.stderr


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(ActivationConfig(policy={FIRST: None}), ["silu", "relu"], id="one layer kept"),
        pytest.param(ActivationConfig(policy={r"re:.*\.1\.mlp": {"activation": "relu2"}}), ["relu", "relu2"], id="two functions"),
        pytest.param(ActivationConfig(threshold=0.25), ["shifted_relu:0.25"] * 2, id="shifted, no bias"),
        pytest.param(
            ActivationConfig(policy={FIRST: {"threshold": -0.5}, "re:.*": None}), ["shifted_relu:-0.5", "silu"], id="name before pattern"
        ),
    ],
)
def test_set_activation_when_the_config_cannot_say_it_is_restored_or_fails(config, expected, tmp_path):
    model, inputs, sites = llama()
    changed = set_activation(model, sites, config)
    assert [site.activation for site in changed] == expected
    assert find_ffn_sites(model, inputs) == changed
    after = logits(model, inputs)
    loaded = reloaded(model, tmp_path / "a")
    assert torch.equal(logits(loaded, inputs), after)
    assert find_ffn_sites(loaded, inputs) == changed
    assert torch.equal(logits(reloaded(loaded, tmp_path / "b"), inputs), after)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert torch.equal(logits(load_model(tmp_path / "a")[0], inputs), after)
    bare = LlamaModel.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(model.lm_head(logits(bare, inputs)), after)
    with pytest.raises(CheckpointError, match="is of a dense model"):
        read_manifest(tmp_path / "a")
    done = load_without_moeify(tmp_path / "a")
    assert done.returncode != 0
    assert UNRESTORED in done.stderr


def test_set_activation_when_the_projection_has_a_bias_moves_the_threshold_into_it(tmp_path):
    for family in ("gpt2", "llama-bias"):
        model, inputs = build(family)
        sites = find_ffn_sites(model, inputs)
        wanted, same_weights = build(family)[0], model.state_dict()
        set_activation(wanted, sites, ActivationConfig(threshold=0.5), mix=1.0)
        for site in sites:
            bias = wanted.get_submodule(site.gate or site.up).bias
            torch.testing.assert_close(bias, same_weights[f"{site.gate or site.up}.bias"] - 0.5)
        assert {site.activation for site in find_ffn_sites(wanted, inputs)} == {"relu"}
        assert not hasattr(wanted.config, RECORD)
        shifted, _ = build(family)
        set_activation(shifted, sites, ActivationConfig(threshold=0.5), mix=0.0)  # annealed: a module of its own
        set_mix(shifted, 1.0)
        torch.testing.assert_close(logits(shifted, inputs), logits(wanted, inputs), rtol=1e-4, atol=1e-4)
        assert hasattr(shifted.config, RECORD)
        assert {site.activation for site in find_ffn_sites(shifted, inputs)} == {"shifted_relu:0.5"}


def test_set_activation_when_gate_and_up_are_one_projection_shifts_the_gate_half():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.act, self.down = nn.Linear(8, 64), nn.SiLU(), nn.Linear(32, 8)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, -1)
            return self.down(self.act(gate) * up)

    net = Net()
    before = net.both.bias.detach().clone()
    set_activation(net, find_ffn_sites(net, {"x": torch.randn(5, 8)}), ActivationConfig(threshold=0.5))
    torch.testing.assert_close(net.both.bias, before - 0.5 * (torch.arange(64) < 32))


def test_set_activation_when_the_threshold_is_in_the_bias_reports_plain_relu():
    model, inputs = build("gpt2")
    changed = set_activation(model, find_ffn_sites(model, inputs), ActivationConfig(threshold=0.5))
    assert find_ffn_sites(model, inputs) == changed


def test_set_mix_when_annealing_goes_from_the_old_function_to_the_new(tmp_path):
    model, inputs, sites = llama()
    before = logits(model, inputs)
    changed = set_activation(model, sites, mix=0.0)
    assert [site.activation for site in changed] == ["relu", "relu"]
    assert torch.equal(logits(model, inputs), before)
    set_mix(model, 0.25)
    z = torch.linspace(-3, 3, 31)
    expected = 0.75 * nn.functional.silu(z) + 0.25 * z.relu()
    torch.testing.assert_close(model.get_submodule(find_activation(model, changed[0]))(z), expected)
    halfway = logits(model, inputs)
    loaded = reloaded(model, tmp_path / "half")
    assert torch.equal(logits(loaded, inputs), halfway)
    for each in (model, loaded):
        set_mix(each, 1.0)
        assert each.config.hidden_act == "relu"
        assert not hasattr(each.config, RECORD)
        assert getattr(each.config, "quantization_config", None) is None
        assert find_ffn_sites(each, inputs) == changed
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    again = reloaded(loaded, tmp_path / "done")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not any(isinstance(module, BlendedActivation) for module in again.modules())
    set_mix(model, 1.0)
    with pytest.raises(ConfigError, match="no more"):
        set_mix(model, 0.5)


def test_set_mix_when_compiled_compiles_again_only_at_the_end():
    blended = BlendedActivation(nn.SiLU(), nn.ReLU(), mix=0.0)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(blended, backend=backend, fullgraph=True)
    z = torch.linspace(-3, 3, 31)
    for mix in (0.0, 0.1, 0.5, 0.9):
        blended.set_mix(mix)
        torch.testing.assert_close(compiled(z), (1 - mix) * nn.functional.silu(z) + mix * z.relu())
    assert len(graphs) == 1
    blended.set_mix(1.0)
    assert torch.equal(compiled(z), z.relu())
    assert len(graphs) == 2


def test_set_activation_twice_ends_at_the_last(tmp_path):
    model, inputs, sites = llama()
    sites = set_activation(model, sites, ActivationConfig(policy={FIRST: None}))
    sites = set_activation(model, sites, ActivationConfig(threshold=0.5, policy={FIRST: None}), mix=0.5)
    half = logits(model, inputs)
    assert torch.equal(logits(reloaded(model, tmp_path / "half"), inputs), half)
    sites = set_activation(model, sites)
    assert [site.activation for site in sites] == ["relu", "relu"]
    assert model.config.hidden_act == "relu"
    assert not hasattr(model.config, RECORD)
    assert find_ffn_sites(model, inputs) == sites


def test_convert_after_set_activation_keeps_what_was_changed(tmp_path):
    for config in (ActivationConfig(), ActivationConfig(threshold=0.25), ActivationConfig(policy={FIRST: None})):
        model, inputs, sites = llama()
        sites = set_activation(model, sites, config)
        after = logits(model, inputs)
        convert(model, ConvertConfig(expert_size=8), sites=sites)
        torch.testing.assert_close(logits(model, inputs), after, rtol=1e-4, atol=1e-4)
        loaded = reloaded(model, tmp_path / f"{id(config)}")
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        for each in (model, loaded):
            to_dense(each)
            torch.testing.assert_close(logits(reloaded(each, tmp_path / f"dense{id(each)}"), inputs), after, rtol=1e-4, atol=1e-4)


def test_set_activation_of_a_module_without_config_swaps_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

        def forward(self, x):
            return x + self.down(self.act(self.up(x)))

    net = Net()
    inputs = {"x": torch.randn(5, 8)}
    changed = set_activation(net, find_ffn_sites(net, inputs))
    assert isinstance(net.act, nn.ReLU)
    assert find_ffn_sites(net, inputs) == changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"policy": {"model.layers.0.mpl": None}}, "did you mean 'model.layers.0.mlp'", id="no such layer"),
        pytest.param({"policy": {FIRST: {"treshold": 1.0}}}, "did you mean 'threshold'", id="unknown option"),
        pytest.param({"policy": {"re:(": None}}, "not a regular expression", id="bad pattern"),
        pytest.param({"activation": "relu2", "threshold": 1.0}, "threshold is for", id="shifted square"),
        pytest.param({"threshold": float("inf")}, "finite", id="infinite threshold"),
    ],
)
def test_set_activation_when_config_is_bad_raises_and_changes_nothing(options, message):
    model, inputs, sites = llama()
    before, config = logits(model, inputs), model.config.to_dict()
    with pytest.raises(ConfigError, match=message):
        set_activation(model, sites, ActivationConfig(**options))
    assert torch.equal(logits(model, inputs), before)
    assert model.config.to_dict() == config


def test_set_activation_when_it_cannot_raises():
    model, _, sites = llama()
    with pytest.raises(ConfigError, match="mix"):
        set_activation(model, sites, mix=1.5)
    with pytest.raises(ConfigError, match="is annealed"):
        set_mix(model, 0.5)
    convert(model, ConvertConfig(expert_size=8), sites=sites)
    with pytest.raises(UnsupportedModelError, match="is converted"):
        set_activation(model, sites)


def test_restoring_when_the_record_is_damaged_raises(tmp_path):
    model, _, sites = llama()
    set_activation(model, sites, ActivationConfig(policy={FIRST: None}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for record in ({"entries": {"hidden_act": "silu"}}, {"entries": {"hidden_act": "silu"}, "modules": {f"{SECOND}.act_fn": {"x": 1}}}):
        path.write_text(json.dumps(good | {RECORD: record}))
        with pytest.raises((CheckpointError, ConfigError), match=RECORD):
            LlamaForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps({key: value for key, value in good.items() if key != RECORD}))
    lost = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="were not restored"):
        lost(input_ids=torch.arange(4)[None])


def test_functions_of_replaced_projections_are_not_taken_for_the_ffns_and_stay():
    model, inputs = build("bart")  # FFNs lie in the layer itself, beside attention
    replace_projections(model, find_projections(model, inputs, attention=("q", "o"), activation="gelu"), None)
    sites = find_ffn_sites(model, inputs)
    ffns = [site for site in sites if site.name not in projection_mlps(model)]
    changed = set_activation(model, ffns)
    assert [site.activation for site in changed] == ["relu"] * 4
    assert model.config.activation_function == "relu"
    assert {record.activation for record in manifest_of(model).projections} == {"gelu"}
    with pytest.raises(UnsupportedModelError, match="choose its function when replacing"):
        set_activation(model, sites)
