"""Training-free channel sparsity from calibration to a thinner model."""

import pytest
import torch
from tiny import tiny_llama

from moeify.channels import record_channels, sparse_inputs
from moeify.errors import ConfigError
from moeify.sparsity.channel import SCORES
from moeify.thin import ThinConfig, thin


def batches(count, *, seed):
    rng = torch.Generator().manual_seed(seed)
    vocabulary = tiny_llama().config.vocab_size
    return [{"input_ids": torch.randint(vocabulary, (4, 16), generator=rng)} for _ in range(count)]


def skipped(model, data):
    with torch.no_grad(), record_channels(model) as recorder:
        for batch in data:
            model(**batch)
    return recorder


@pytest.mark.parametrize("score", [name for name in SCORES if name != "chess"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6])
def test_the_wanted_share_is_skipped_on_other_data_of_the_same_kind(score, sparsity):
    model = tiny_llama().eval()
    config = ThinConfig(sparsity=sparsity, score=score, allocate="shared" if score == "sensitivity" else "uniform", first_dense=0)
    expected = thin(model, batches(8, seed=0), config)
    recorder = skipped(model, batches(8, seed=1))
    # With a share for each layer, one that reads many zeros skips them all.
    assert sparsity - 0.02 <= recorder.sparsity() <= sparsity + (0.02 if score == "sensitivity" else 0.15 * (sparsity > 0))
    assert recorder.per_layer().keys() == expected.keys() == sparse_inputs(model).keys()
    for name, share in recorder.per_layer().items():
        assert share == pytest.approx(expected[name], abs=0.03)


def test_roles_choose_the_layers():
    model = tiny_llama().eval()
    thin(model, batches(2, seed=0), ThinConfig(sparsity=0.5, roles=("ffn_hidden",)))
    assert {name.rpartition(".")[2] for name in sparse_inputs(model)} == {"down_proj"}
    assert skipped(model, batches(2, seed=0)).sparsity() == pytest.approx(0.5, abs=0.1)


def test_a_shared_level_gives_the_layers_that_matter_less_the_larger_share():
    model = tiny_llama().eval()
    with torch.no_grad():  # what this layer gives changes next to nothing
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    expected = thin(model, batches(8, seed=0), ThinConfig(sparsity=0.3))
    others = [share for name, share in expected.items() if name != "model.layers.0.mlp.down_proj"]
    assert expected["model.layers.0.mlp.down_proj"] > 0.85 > 0.8 > max(others)


def test_levels_set_again_in_the_sparse_model_keep_every_layer_at_its_share():
    def worst(refine):
        model = tiny_llama().eval()
        config = ThinConfig(sparsity=0.6, score="wina", allocate="uniform", first_dense=0, refine=refine)
        expected = thin(model, batches(8, seed=0), config)
        return max(abs(share - expected[name]) for name, share in skipped(model, batches(8, seed=1)).per_layer().items())

    assert worst(1) < 0.5 * worst(0)


def test_options_that_mean_nothing_are_refused_and_nothing_is_changed():
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\), got 1"):
        ThinConfig(sparsity=1.0)
    with pytest.raises(ConfigError, match="'wina' is no measure for that"):
        ThinConfig(sparsity=0.5, score="wina")
    with pytest.raises(ConfigError, match="unknown name 'winna'"):
        ThinConfig(sparsity=0.5, score="winna")
    with pytest.raises(ConfigError, match="roles must be some of attn_in, attn_out, ffn_in, ffn_hidden, got 'ffn'"):
        ThinConfig(sparsity=0.5, roles=("ffn",))
    model = tiny_llama()
    with pytest.raises(ConfigError, match="no batch"):
        thin(model, [], ThinConfig(sparsity=0.5))
    assert not sparse_inputs(model)
