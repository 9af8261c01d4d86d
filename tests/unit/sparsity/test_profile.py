import json

import pytest
import torch
from torch import nn

from moeify.errors import ConfigError, DataError
from moeify.sites.site import FFNSite
from moeify.sparsity import ActivationProfile, down_norms, profile_activations


def profile_of(h_TF, norm_F=None, **options):
    h_TF = torch.as_tensor(h_TF, dtype=torch.float32)
    lengths = options.pop("lengths", None)
    profile = ActivationProfile(h_TF.shape[1], **options)
    profile.update(h_TF, torch.ones(h_TF.shape[1]) if norm_F is None else torch.tensor(norm_F), lengths=lengths)
    return profile


def same(a, b):
    assert (a.tokens, a.windows) == (b.tokens, b.windows)
    assert a._sums.keys() == b._sums.keys()
    for name, tensor in a._sums.items():
        torch.testing.assert_close(b._sums[name], tensor)


def test_summary_when_counted_by_hand_agrees():
    profile = profile_of(
        [
            [10.0, 0.0, -0.5, 0.0],  # 2 non-zeros; energies 100, .25
            [1.0, 1.0, 1.0, 0.0],  # 3; energies equal: 95 % needs all three
            [0.0, 0.0, 0.0, 0.0],  # 0; no energy, no neuron needed
        ],
        eps=0.6,
    )
    summary = profile.summary()
    assert summary["tokens"] == 3
    assert summary["zero_frac"] == 7 / 12
    assert summary["near_zero_frac"] == 8 / 12
    assert summary["nonzeros_per_token"] == {"mean": 5 / 3, "p50": 2, "p95": 3}
    assert summary["neurons_for_95_percent_energy"] == {"mean": 4 / 3, "p50": 1, "p95": 3}
    # 7 zeros; and 0.5 < 10 / 10 but not below 10 / 100
    assert summary["below_max_over_10_frac"] == 8 / 12
    assert summary["below_max_over_100_frac"] == 7 / 12
    assert summary["dead_neurons"] == 1
    assert profile.dead_F.tolist() == [False, False, False, True]
    assert profile.firing_rate_F.tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3, 0])
    assert profile.mean_energy_F.tolist() == pytest.approx([101 / 3, 1 / 3, 1.25 / 3, 0])
    assert profile.mean_F.tolist() == pytest.approx([11 / 3, 1 / 3, 0.5 / 3, 0])


def test_energy_view_when_down_columns_differ_weighs_them():
    summary = profile_of([[1.0, 1.0]], [1.0, 10.0]).summary()
    assert summary["neurons_for_99_percent_energy"]["mean"] == 1
    assert summary["neurons_for_95_percent_energy"]["mean"] == 1


def test_union_when_sequences_end_takes_complete_windows_only():
    h = torch.zeros(19, 4)
    h[0, 0] = 1.0
    h[7, 1] = 1.0  # the first window of 8 sees neurons 0 and 1
    h[9, 2] = 1.0  # tail of the first sequence: no window
    h[18, 3] = 1.0  # ninth token of the second: no window
    profile = profile_of(h, lengths=[10, 9])
    assert profile.windows == {8: 2, 32: 0}
    summary = profile.summary()
    assert summary["union_8_tokens_frac"] == 2 / 8
    assert summary["union_8_tokens_energy_frac"] == 2 / 8
    assert summary["union_32_tokens_frac"] is None


def test_profile_when_merged_equals_the_whole():
    h = torch.randn(64, 7, generator=torch.Generator().manual_seed(0)).relu()
    norms = torch.rand(7, generator=torch.Generator().manual_seed(1))
    whole, first, second = (ActivationProfile(7, coactivation=True) for _ in range(3))
    whole.update(h, norms, lengths=[32, 32])
    first.update(h[:32], norms)
    second.update(h[32:], norms)
    same(first.merge(second), whole)
    same(ActivationProfile(7, coactivation=True).merge(whole), whole)


def test_update_when_masked_equals_the_tokens_alone():
    h = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(20, dtype=torch.int64)
    mask[[0, 1, 18, 19]] = 0
    masked, alone = ActivationProfile(5), ActivationProfile(5)
    h_poisoned = h.clone()
    h_poisoned[mask == 0] = torch.nan
    masked.update(h_poisoned, torch.ones(5), mask_T=mask, lengths=[10, 10])
    alone.update(h[2:18], torch.ones(5), lengths=[8, 8])
    same(masked, alone)


def test_update_when_chunked_equals_one_piece(monkeypatch):
    h = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    whole = profile_of(h)
    monkeypatch.setattr("moeify.sparsity.profile._CHUNK", 18)
    same(profile_of(h), whole)


def test_json_when_read_back_is_the_same_profile():
    profile = profile_of(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).relu(), coactivation=True, eps=0.25)
    text = json.dumps(profile.to_json_dict())
    same(ActivationProfile.from_json_dict(json.loads(text), tensors=profile.tensors()), profile)
    light = ActivationProfile.from_json_dict(json.loads(text))
    assert not light.has_coactivation
    assert light.summary() == profile.summary()
    assert json.dumps(light.to_json_dict()) == text


def test_from_json_dict_when_damaged_raises():
    data = profile_of([[1.0, 2.0]]).to_json_dict()
    with pytest.raises(DataError, match="schema 2"):
        ActivationProfile.from_json_dict(data | {"schema": 2})
    with pytest.raises(DataError, match="lacks 'tokens'"):
        ActivationProfile.from_json_dict({key: value for key, value in data.items() if key != "tokens"})
    with pytest.raises(DataError, match="'fired' has shape"):
        ActivationProfile.from_json_dict(data | {"sums": data["sums"] | {"fired": [1]}})


def test_coactivation_when_accumulated_is_the_sum_of_share_products():
    # shares (9/25, 16/25): amplitudes (.6, .8); a token without energy adds nothing
    tensors = profile_of([[3.0, -4.0], [0.0, 0.0]], coactivation=True).tensors()
    torch.testing.assert_close(tensors["coactivation_FF"], torch.tensor([[0.36, 0.48], [0.48, 0.64]]))
    torch.testing.assert_close(tensors["amplitude_sum_F"], torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_summary_when_empty_has_no_numbers():
    summary = ActivationProfile(3).summary()
    assert summary["tokens"] == 0
    assert summary["zero_frac"] is None
    assert summary["nonzeros_per_token"] is None
    assert summary["dead_neurons"] is None


@pytest.mark.parametrize(
    ("h", "options", "message"),
    [
        pytest.param(torch.tensor([[0.0, torch.nan, 0.0]]), {}, "first in neuron 1", id="nan"),
        pytest.param(torch.ones(2, 4), {}, r"must be \(T, 3\)", id="other width"),
        pytest.param(torch.ones(2, 3), {"lengths": [1]}, "add up to 2", id="lengths"),
        pytest.param(torch.ones(2, 3), {"mask_T": torch.ones(3)}, r"mask_T must be \(2,\)", id="mask"),
    ],
)
def test_update_when_input_is_bad_raises(h, options, message):
    profile = ActivationProfile(3)
    with pytest.raises(ValueError, match=message):
        profile.update(h, torch.ones(3), **options)
    assert profile.tokens == 0


def test_profile_when_kinds_differ_refuses_to_merge():
    with pytest.raises(ConfigError, match="different kinds"):
        ActivationProfile(3).merge(ActivationProfile(3, eps=0.5))
    with pytest.raises(ConfigError, match="num_neurons"):
        ActivationProfile(0)
    with pytest.raises(ConfigError, match="eps"):
        ActivationProfile(3, eps=-1.0)


class TinyModel(nn.Module):
    """Embedding and two FFNs, the second behind pooling when ``pool`` is set."""

    def __init__(self, pool=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.a = nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})
        self.b = nn.ModuleDict({"up": nn.Linear(6, 4), "down": nn.Linear(4, 6)})
        self.dropout = nn.Dropout(0.5)
        self.pool = pool

    def forward(self, input_ids, attention_mask=None):
        x = self.dropout(self.embed(input_ids))
        x = x + self.a["down"](self.a["up"](x).relu())
        if self.pool:
            x = x.mean(1)
        return self.b["down"](self.b["up"](x).relu())


SITES = [FFNSite(name=n, up=f"{n}.up", down=f"{n}.down", activation="relu", d_model=6, d_ff=f, d_out=6) for n, f in (("a", 9), ("b", 4))]


def test_profile_activations_when_padded_ignores_padding():
    model = TinyModel().train()
    ids = torch.arange(20).view(2, 10) % 11
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = profile_activations(model, SITES, [{"input_ids": ids, "attention_mask": mask}])
    expected = ActivationProfile(9)
    h = model.a["up"](model.embed(ids)).relu()
    expected.update(h[mask.bool()], down_norms(model.a["down"].weight.t()), lengths=[7, 10])
    same(found["a"], expected)
    assert found["b"].tokens == 17
    assert model.training
    assert not model.a["down"]._forward_pre_hooks


def test_profile_activations_when_mask_does_not_fit_warns_with_the_site():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5)}
    with pytest.warns(UserWarning, match="tokens of b: padding"):
        found = profile_activations(TinyModel(pool=True), SITES, [batch])
    assert (found["a"].tokens, found["b"].tokens) == (10, 2)


def test_profile_activations_when_a_site_never_runs_warns_with_the_site():
    model = TinyModel()
    spare = FFNSite(name="spare", up="spare.up", down="spare.down", activation="relu", d_model=6, d_ff=4, d_out=6)
    model.spare = nn.ModuleDict({"up": nn.Linear(6, 4), "down": nn.Linear(4, 6)})
    with pytest.warns(UserWarning, match="no token reached spare"):
        found = profile_activations(model, [*SITES, spare], [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}])
    assert (found["a"].tokens, found["spare"].tokens) == (3, 0)


def test_profile_activations_when_weights_are_nan_names_the_site():
    model = TinyModel()
    model.b["up"].weight.data[2] = torch.nan
    with pytest.raises(DataError, match="'b': the activations hold NaN or infinity \\(first in neuron 2\\)"):
        profile_activations(model, SITES, [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}])
    assert not model.a["down"]._forward_pre_hooks
    with pytest.raises(ConfigError, match="no sites"):
        profile_activations(model, [], [])


def test_profile_activations_when_encoder_decoder_uses_each_side_s_mask():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=17, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    paths = {"encoder": "encoder.block.0.layer.1.DenseReluDense", "decoder": "decoder.block.0.layer.2.DenseReluDense"}
    sites = [
        FFNSite(name=path, up=f"{path}.wi", down=f"{path}.wo", activation="relu", d_model=8, d_ff=12, d_out=8) for path in paths.values()
    ]
    ids = torch.arange(8).view(2, 4)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]),
    }
    found = profile_activations(model, sites, [batch])
    assert found[paths["encoder"]].tokens == 5
    assert found[paths["decoder"]].tokens == 3
    del batch["decoder_attention_mask"]
    assert profile_activations(model, sites, [batch])[paths["decoder"]].tokens == 8
