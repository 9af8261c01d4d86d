"""Samples of inputs and slopes of the loss, against the model's own arithmetic."""

import copy

import pytest
import torch
from families.models import build
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from moeify.errors import ConfigError, DataError, UnsupportedModelError
from moeify.sites import find_linear_sites
from moeify.sparsity.channel_profile import profile_channels


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    return LlamaForCausalLM(config)


def ids(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def test_every_layer_gets_a_sample_of_its_own_input_without_padding(llama):
    batch = {"input_ids": ids(2, 10), "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])}
    sites = find_linear_sites(llama, {"input_ids": ids(1, 4)})
    seen = {}

    def see(site):
        return lambda _module, args: seen.__setitem__(site.name, args[0].detach())

    handles = [llama.get_submodule(site.name).register_forward_pre_hook(see(site)) for site in sites]
    llama.eval()
    with torch.no_grad():
        llama(**batch)
    for handle in handles:
        handle.remove()
    stats = profile_channels(llama, sites, [batch], rows=100)
    for site in sites:
        expected = seen[site.name].reshape(20, -1)[batch["attention_mask"].flatten().bool()].bfloat16().float()
        found = stats[site.name].rows_RK.float()
        assert found.shape == (16, site.d_in)
        torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)


def test_the_sample_is_drawn_from_all_batches(llama):
    sites = find_linear_sites(llama, {"input_ids": ids(1, 4)})[:1]
    batches = [{"input_ids": torch.full((1, 40), token)} for token in range(8)]
    rows_RK = profile_channels(llama, sites, batches, rows=64)[sites[0].name].rows_RK
    assert rows_RK.shape[0] == 64
    # the first layer reads embeddings: one row a token of the vocabulary
    counts = rows_RK.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert counts.min() >= 2


def test_slopes_are_the_derivatives_by_each_layers_own_use_of_its_input(llama):
    sites = find_linear_sites(llama, {"input_ids": ids(1, 4)})
    batch = {"input_ids": ids(1, 12)}
    stats = profile_channels(llama, sites, [batch], slopes=True, seed=3)

    # The same by hand: x of one layer is replaced by a leaf of its own, so that its gradient is that layer's alone.
    llama.eval()
    with torch.no_grad():
        logits_TV = llama(**batch).logits[0]
    labels_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    for site in sites:
        leaf = []

        def own(_module, args, leaf=leaf):
            leaf.append(args[0].detach().requires_grad_(True))
            return (leaf[0],)

        handle = llama.get_submodule(site.name).register_forward_pre_hook(own)
        loss = nn.functional.cross_entropy(llama(**batch).logits[0], labels_T, reduction="sum")
        handle.remove()
        (grad,) = torch.autograd.grad(loss, leaf[0])
        torch.testing.assert_close(stats[site.name].slope_K, grad[0].square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_slopes_need_no_parameter_before_all_layers(llama):
    class Captioner(nn.Module):
        """Text and images; asked for text only, its first parameters have no part in the loss."""

        def __init__(self):
            super().__init__()
            self.vision, self.text = nn.Linear(4, 16), llama

        def forward(self, **inputs):
            return self.text(**inputs)

    batch, both = {"input_ids": ids(2, 8)}, Captioner()
    found = profile_channels(both, find_linear_sites(both, batch), [batch], slopes=True)
    alone = profile_channels(llama, find_linear_sites(llama, batch), [batch], slopes=True)
    assert found.keys() == {f"text.{name}" for name in alone}
    assert all(torch.equal(found[f"text.{name}"].slope_K, stats.slope_K) for name, stats in alone.items())


def test_every_tower_that_the_loss_depends_on_has_slopes():
    model, inputs = build("whisper")  # its embeddings are the decoder's
    sites = find_linear_sites(model, inputs)
    stats = profile_channels(model, sites, [inputs], slopes=True)
    assert any(".encoder." in site.name for site in sites)
    assert all(bool(stats[site.name].slope_K.any()) for site in sites)


def test_a_layer_without_part_in_the_loss_is_named(llama):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.side, self.main = copy.deepcopy(llama), llama

        def forward(self, **inputs):
            self.side(**inputs)
            return self.main(**inputs)

    model, batch = Aside(), {"input_ids": ids(1, 8)}
    with pytest.raises(DataError, match=r"the loss does not depend on 'side\.model\.layers\.0\.self_attn\.q_proj', so it has no slope"):
        profile_channels(model, find_linear_sites(model, batch), [batch], slopes=True)


def test_the_model_is_left_as_it_was(llama):
    sites = find_linear_sites(llama, {"input_ids": ids(1, 4)})
    llama.train()
    weight = llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    llama.lm_head.weight.grad = torch.ones_like(llama.lm_head.weight)
    profile_channels(llama, sites, [{"input_ids": ids(2, 8)}], slopes=True)
    assert llama.training and not weight.requires_grad
    assert all(p.requires_grad for p in llama.parameters() if p is not weight)
    assert (llama.lm_head.weight.grad == 1).all()
    assert all(p.grad is None for p in llama.parameters() if p is not llama.lm_head.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_errors_say_what_is_wrong(llama):
    sites = find_linear_sites(llama, {"input_ids": ids(1, 4)})
    batch = {"input_ids": ids(1, 8)}
    with pytest.raises(ConfigError, match="no layer to calibrate"):
        profile_channels(llama, [], [batch])
    with pytest.raises(ConfigError, match="no batch"):
        profile_channels(llama, sites, [])
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        profile_channels(llama, sites, [batch], rows=0)
    with pytest.raises(DataError, match=r"no token reached 'model\.layers\.0\.self_attn\.q_proj'"):
        profile_channels(llama, sites, [{**batch, "attention_mask": torch.zeros(1, 8, dtype=torch.long)}])
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(DataError, match=r"input of 'model\.layers\.1\.self_attn\.q_proj' holds NaN"):
        profile_channels(llama, sites, [batch])


def test_slopes_of_a_model_without_a_head_are_refused():
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    sites = find_linear_sites(bert, {"input_ids": ids(1, 4)})
    assert profile_channels(bert, sites, [{"input_ids": ids(1, 8)}])
    with pytest.raises(UnsupportedModelError, match="no logits"):
        profile_channels(bert, sites, [{"input_ids": ids(1, 8)}], slopes=True)
