"""Training-free channel sparsity from calibration to a thinner model."""

import sys

import pytest
import torch
from tiny import silence_ffn, tiny_inputs, tiny_llama

from moeify.channels import record_channels, sparse_inputs
from moeify.controls import set_mode
from moeify.convert import ConvertConfig, convert, to_dense
from moeify.errors import ConfigError, DataError, UnsupportedModelError
from moeify.evaluate import default_metric
from moeify.layers import moe_layers
from moeify.sites import find_ffn_sites, find_linear_sites
from moeify.sparsity.blocks import BlockCalls
from moeify.sparsity.channel import SCORES
from moeify.sparsity.channel_profile import profile_channels
from moeify.thin import ThinConfig, layer_seconds, thin


def batches(count, *, seed):
    rng = torch.Generator().manual_seed(seed)
    vocabulary = tiny_llama().config.vocab_size
    return [{"input_ids": torch.randint(vocabulary, (4, 16), generator=rng)} for _ in range(count)]


def skipped(model, data):
    with torch.no_grad(), record_channels(model) as recorder:
        for batch in data:
            model(**batch)
    return recorder


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("skip_frac", [0.0, 0.25, 0.6])
def test_the_wanted_share_is_skipped_on_other_data_of_the_same_kind(score, skip_frac):
    model = tiny_llama().eval()
    config = ThinConfig(skip_frac=skip_frac, score=score, allocate="shared" if score == "sensitivity" else "uniform", first_dense=0)
    expected = thin(model, batches(8, seed=0), config)
    recorder = skipped(model, batches(8, seed=1))
    # With a share for each layer, one that reads many zeros skips them all.
    assert skip_frac - 0.02 <= recorder.skipped_frac() <= skip_frac + (0.02 if score == "sensitivity" else 0.15 * (skip_frac > 0))
    assert recorder.per_layer().keys() == expected.keys() == sparse_inputs(model).keys()
    for name, share in recorder.per_layer().items():
        assert share == pytest.approx(expected[name], abs=0.03)


def test_a_transform_changes_the_weights_and_not_the_dense_model_that_is_left():
    model, batch = tiny_llama(hidden_act="silu").eval(), batches(1, seed=0)[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    before, values = model(**batch).logits.detach(), weight.detach().clone()
    config = ThinConfig(skip_frac=0.4, score="wina", allocate="uniform", transform="orthogonal", first_dense=0)
    thin(model, batches(8, seed=0), config)
    assert skipped(model, batches(8, seed=1)).skipped_frac() == pytest.approx(0.4, abs=0.02)
    to_dense(model)
    assert model.model.layers[0].mlp.up_proj.weight is weight and not torch.allclose(weight, values, atol=0.1)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_a_calibration_that_fails_after_a_transform_gives_the_weights_back(monkeypatch):
    model, before = tiny_llama().eval(), tiny_llama().state_dict()

    def interrupted(changed, *_args, **_options):
        assert not torch.equal(changed.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["moeify.thin"], "profile_channels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, transform="orthogonal"))
    assert not sparse_inputs(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_levels_are_for_are_not_transformed():
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("attn_in",)))
    with pytest.raises(UnsupportedModelError, match="transform a dense model"):
        thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_in",), transform="orthogonal"))


def test_roles_choose_the_layers():
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.5, roles=("ffn_hidden",)))
    assert {name.rpartition(".")[2] for name in sparse_inputs(model)} == {"down_proj"}
    assert skipped(model, batches(2, seed=0)).skipped_frac() == pytest.approx(0.5, abs=0.1)


def test_a_shared_level_gives_the_layers_that_matter_less_the_larger_share():
    model = tiny_llama().eval()
    with torch.no_grad():  # what this layer gives changes next to nothing
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    expected = thin(model, batches(8, seed=0), ThinConfig(skip_frac=0.3))
    others = [share for name, share in expected.items() if name != "model.layers.0.mlp.down_proj"]
    assert expected["model.layers.0.mlp.down_proj"] > 0.85 > 0.8 > max(others)


@pytest.mark.parametrize("allocate", ["uniform", "greedy", "block_influence"])
@pytest.mark.parametrize("score", ["magnitude", "sensitivity"])
def test_allocated_shares_meet_the_budget_on_other_data_of_the_same_kind(allocate, score):
    model = tiny_llama(hidden_act="silu").eval()  # no zeros, so that no layer skips more than its share
    config = ThinConfig(skip_frac=0.4, score=score, allocate=allocate, first_dense=0, refine=1)
    expected = thin(model, batches(8, seed=0), config)
    recorder = skipped(model, batches(8, seed=1))
    assert recorder.skipped_frac() == pytest.approx(0.4, abs=0.02)
    for name, share in recorder.per_layer().items():
        assert share == pytest.approx(expected[name], abs=0.03)
    assert (len({round(share, 2) for share in expected.values()}) > 1) == (allocate != "uniform")


def test_greedy_gives_the_larger_share_to_the_layer_whose_skipping_its_block_does_not_notice():
    model = tiny_llama(hidden_act="silu").eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    expected = thin(model, batches(4, seed=0), ThinConfig(skip_frac=0.4, score="wina", allocate="greedy"))
    of_ffn, of_attention = (
        [share for name, share in expected.items() if name.startswith(f"model.layers.0.{part}")] for part in ("mlp", "self_attn")
    )
    assert min(of_ffn) > 0.55 > 0.25 > max(of_attention)  # the FFN is 60 % of the block
    block_error = {}
    for allocate in ("uniform", "greedy"):
        model = tiny_llama(hidden_act="silu").eval()
        inputs = batches(4, seed=0)
        calls = BlockCalls(model, ["model.layers.0", "model.layers.1"], batches(1, seed=1)[0])
        assert calls.error("model.layers.0") == 0
        thin(model, inputs, ThinConfig(skip_frac=0.4, score="wina", allocate=allocate, refine=0))
        block_error[allocate] = [calls.error(f"model.layers.{i}") for i in (0, 1)]
    assert all(greedy < uniform for greedy, uniform in zip(block_error["greedy"], block_error["uniform"], strict=True))


def thin_and_back(model, data, costs):
    expected = thin(model, data, ThinConfig(skip_frac=0.5), costs=costs)
    to_dense(model)
    return expected


def test_measured_time_is_a_cost_and_every_layer_has_one(monkeypatch):
    model, data = tiny_llama().eval(), batches(2, seed=0)
    sites = find_linear_sites(model, data[0])
    seconds = layer_seconds(model, sites, rounds=3)
    assert seconds.keys() == {site.name for site in sites} and all(0 < found < 1 for found in seconds.values())
    of_time = {name: 100.0 if name.endswith("o_proj") else 1.0 for name in seconds}
    monkeypatch.setattr(sys.modules["moeify.thin"], "layer_seconds", lambda *_: of_time)
    expected = thin(model, data, ThinConfig(skip_frac=0.5, cost="time", refine=0))
    mean = sum(of_time[name] * share for name, share in expected.items()) / sum(of_time.values())
    assert mean == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ConfigError, match="unknown name 'bytes'"):
        ThinConfig(skip_frac=0.5, cost="bytes")


@pytest.mark.parametrize("allocate", ["shared", "greedy"])
def test_costs_are_what_the_mean_is_weighted_by(allocate):
    model, data = tiny_llama(hidden_act="silu").eval(), batches(4, seed=0)
    names = thin(model, data, ThinConfig(skip_frac=0.5)).keys()
    to_dense(model)
    costs = {name: 100.0 if name.endswith("o_proj") else 1.0 for name in names}
    expected = thin(model, data, ThinConfig(skip_frac=0.5, allocate=allocate, first_dense=0), costs=costs)
    mean = sum(costs[name] * share for name, share in expected.items()) / sum(costs.values())
    assert mean == pytest.approx(0.5, abs=0.01)
    to_dense(model)
    if allocate == "shared":  # what saves more for the same loss is skipped more
        parameters = {name: float(model.get_submodule(name).weight.numel()) for name in names}
        name = next(name for name in names if name.endswith("o_proj"))
        dear = parameters | {name: 4 * parameters[name]}
        shares = [thin_and_back(model, data, costs)[name] for costs in (parameters, dear)]
        assert shares[1] > shares[0] + 0.05
    with pytest.raises(ConfigError, match=r"cost of 'model.layers.0.self_attn.q_proj' must be finite and greater than 0, got 0"):
        thin(model, data, ThinConfig(skip_frac=0.5), costs=costs | {"model.layers.0.self_attn.q_proj": 0.0})
    assert not sparse_inputs(model)


def test_levels_set_again_in_the_sparse_model_keep_every_layer_at_its_share():
    def worst(refine):
        model = tiny_llama().eval()
        config = ThinConfig(skip_frac=0.6, score="wina", allocate="uniform", first_dense=0, refine=refine)
        expected = thin(model, batches(8, seed=0), config)
        return max(abs(share - expected[name]) for name, share in skipped(model, batches(8, seed=1)).per_layer().items())

    assert worst(1) < 0.5 * worst(0)


def test_options_that_mean_nothing_are_refused_and_nothing_is_changed():
    with pytest.raises(ConfigError, match=r"skip_frac \(--target\) must be in \[0, 1\), got 1"):
        ThinConfig(skip_frac=1.0)
    with pytest.raises(ConfigError, match="'wina' is no measure for that"):
        ThinConfig(skip_frac=0.5, score="wina")
    with pytest.raises(ConfigError, match="unknown name 'greedi'"):
        ThinConfig(skip_frac=0.5, allocate="greedi")
    with pytest.raises(ConfigError, match="unknown name 'winna'"):
        ThinConfig(skip_frac=0.5, score="winna")
    with pytest.raises(ConfigError, match="unknown name 'orthogonl'"):
        ThinConfig(skip_frac=0.5, transform="orthogonl")
    with pytest.raises(ConfigError, match="neurons of FFNs are not rotated"):
        ThinConfig(skip_frac=0.5, roles=("ffn_hidden",), transform="orthogonal")
    with pytest.raises(ConfigError, match="roles must be some of attn_in, attn_out, ffn_in, ffn_hidden, got 'ffn'"):
        ThinConfig(skip_frac=0.5, roles=("ffn",))
    model = tiny_llama()
    with pytest.raises(ConfigError, match="no batch"):
        thin(model, [], ThinConfig(skip_frac=0.5))
    assert not sparse_inputs(model)


@pytest.mark.parametrize("score", ["magnitude", "sensitivity"])
def test_a_layer_where_calibration_saw_only_zeros_is_named_and_nothing_is_changed(score):
    model = tiny_llama().eval()
    with torch.no_grad():
        silence_ffn(model.state_dict(), 1)
    sites = find_ffn_sites(model, tiny_inputs())
    ascii_ids = torch.arange(64).view(4, 16)
    with pytest.raises(DataError, match=r"'model\.layers\.1\.mlp\.(gate|down)_proj': .*calibration saw"):
        thin(model, [{"input_ids": ascii_ids}], ThinConfig(skip_frac=0.5, score=score, allocate="uniform"), ffn_sites=sites)
    assert not sparse_inputs(model)


def test_other_roles_can_be_thinned_later_the_same_not_twice():
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_in",)))
    before = {name: executor.level_K.clone() for name, executor in sparse_inputs(model).items()}
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_hidden",)))
    assert {name.rpartition(".")[2] for name in sparse_inputs(model)} == {"gate_proj", "up_proj", "down_proj"}
    assert all(torch.equal(sparse_inputs(model)[name].level_K, level_K) for name, level_K in before.items())
    with pytest.raises(UnsupportedModelError, match="sparse already"):
        thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_in", "attn_out")))
    assert not any(name.endswith("o_proj") for name in sparse_inputs(model))


def test_a_calibration_that_fails_half_way_takes_off_what_it_put_on(monkeypatch):
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("attn_in",)))
    before = sparse_inputs(model).keys()

    def interrupted(model, *args, slopes=False, **options):
        if not slopes:  # the second pass, which sets levels again
            raise KeyboardInterrupt
        return profile_channels(model, *args, slopes=slopes, **options)

    monkeypatch.setattr(sys.modules["moeify.thin"], "profile_channels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_hidden",)))
    assert sparse_inputs(model).keys() == before


def test_a_measurement_gives_the_modes_back():
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.5))
    batch = batches(1, seed=0)[0]
    assert default_metric(model, batch) == "perplexity"
    assert {executor.mode for executor in sparse_inputs(model).values()} == {"moe"}
    with torch.no_grad():
        sparse = model(**batch).logits
        set_mode(model, "dense")
        dense = model(**batch).logits
    assert not torch.equal(sparse, dense)
    default_metric(model, batch)
    assert {executor.mode for executor in sparse_inputs(model).values()} == {"dense"}


def test_an_ffn_that_skips_channels_is_not_converted_attention_may_be():
    model = tiny_llama().eval()
    config, first = ConvertConfig(expert_size=4), batches(1, seed=0)[0]
    sites = find_ffn_sites(model, first)
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("ffn_in",)))
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.mlp\.gate_proj' skips input channels; convert first"):
        convert(model, config, sites=sites)
    to_dense(model)
    thin(model, batches(2, seed=0), ThinConfig(skip_frac=0.3, roles=("attn_in",)))
    convert(model, config, sites=find_ffn_sites(model, first))
    assert moe_layers(model) and sparse_inputs(model)
