"""Rules by preset: one at a time, and token by token in a packed batch."""

import pytest
import torch
from tiny import convert_tiny, tiny_inputs, tiny_llama
from torch import Tensor

import moeify
from moeify.channels import sparse_inputs
from moeify.layers import MoEFFN, moe_layers
from moeify.select import PerToken, Threshold, TopK
from moeify.serving.rules import PresetRules

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"


def test_per_token_gives_each_token_its_rules_mask(rng):
    scores_TE = torch.rand(5, 6, generator=rng)
    mixed = PerToken((TopK(k=1), TopK(k=4)), torch.tensor([1, 0, 0, 1, 1]))(scores_TE)
    assert mixed.sum(1).tolist() == [4, 1, 1, 4, 4]
    assert torch.equal(mixed[[0, 3, 4]], TopK(k=4)(scores_TE)[[0, 3, 4]])
    with pytest.raises(ValueError, match="for 5 tokens, the layer got 4"):
        PerToken((TopK(k=1),), torch.zeros(5, dtype=torch.long))(scores_TE[:4])


def test_per_token_runs_all_where_the_rule_of_every_token_does():
    mixed = PerToken((TopK(k=4), TopK(k=6), TopK(k=1)), torch.tensor([1, 0, 1]))
    assert mixed.runs_all(4), "no token has the third rule"
    assert not mixed.runs_all(5)


@torch.no_grad()
def test_presets_in_turns_and_mixed_batches_keep_each_presets_native_call(monkeypatch):
    model, made = convert_tiny(tiny_llama(), rule=TopK(k=6)), []
    make = MoEFFN._make_routed
    monkeypatch.setattr(MoEFFN, "_make_routed", lambda moe, dtype, **options: made.append(moe.rule) or make(moe, dtype, **options))
    rules = PresetRules(model, {"half": {FIRST: TopK(k=3)}, "fast": {FIRST: TopK(k=1)}})
    mlp, x_TD = model.model.layers[0].mlp, torch.randn(1, 2, 32)
    found = {}
    for _ in range(3):
        for preset in ("half", "fast"):
            rules.apply(preset)
            assert torch.equal(mlp(x_TD), found.setdefault(preset, mlp(x_TD)))
        rules.apply_batch([("half", 1), ("fast", 1)], torch.arange(2))
        torch.testing.assert_close(mlp(x_TD), torch.cat((found["half"][:, :1], found["fast"][:, 1:]), dim=1))
    assert made == [TopK(k=3), TopK(k=1)]
    moe = moe_layers(model)[FIRST]
    mlp.down_proj.weight.data = mlp.down_proj.weight * 2
    rules.apply("half")
    torch.testing.assert_close(mlp(x_TD), 2 * found["half"])
    assert [rule for rule, *_ in moe._natives] == [TopK(k=3)], "calls of the old weights are kept in memory"


def alone(model, rules: PresetRules, preset: str, ids_S: Tensor) -> Tensor:
    rules.apply(preset)
    return model(ids_S[None]).logits[0]


@torch.no_grad()
def test_a_packed_batch_of_two_presets_equals_its_requests_alone():
    """No attention between the requests, as in packed batches: here each FFN is called with both requests' tokens in a row."""
    model = convert_tiny(tiny_llama(), rule=TopK(k=6))
    rules = PresetRules(model, {"default": {}, "fast": {FIRST: TopK(k=1), SECOND: TopK(k=2)}})
    mlp, x_TD = model.model.layers[0].mlp, torch.randn(1, 7, 32)
    expected = []
    for preset, part in (("fast", slice(0, 3)), ("default", slice(3, 7))):
        rules.apply(preset)
        expected.append(mlp(x_TD[:, part]))
    assert not torch.allclose(expected[0], mlp(x_TD[:, :3])), "the presets differ"
    rules.apply_batch([("fast", 3), ("default", 4)], torch.arange(7))
    torch.testing.assert_close(mlp(x_TD), torch.cat(expected, dim=1))
    rules.restore()
    assert [layer.rule for layer in moe_layers(model).values()] == [TopK(k=6)] * 2


@torch.no_grad()
def test_a_batch_of_one_preset_has_its_plain_rules_and_padding_any():
    model = convert_tiny(tiny_llama(), rule=TopK(k=6))
    rules = PresetRules(model, {"default": {}, "fast": {FIRST: TopK(k=1)}})
    rules.apply_batch([("fast", 3), ("fast", 1)], torch.arange(4))
    assert [layer.rule for layer in moe_layers(model).values()] == [TopK(k=1), TopK(k=6)], "the layer that it does not name keeps its own"
    rules.apply_batch([("fast", 2), ("default", 1)], torch.arange(8))
    assert isinstance(moe_layers(model)[FIRST].rule, PerToken)
    assert moe_layers(model)[SECOND].rule == TopK(k=6), "both presets have the same there"
    assert model.model.layers[0].mlp(torch.randn(1, 8, 32)).shape == (1, 8, 32)


@torch.no_grad()
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 0.3)], ids=["one preset", "two presets"])
def test_in_a_packed_batch_channels_are_kept_at_the_start_of_each_sequence(factors):
    model = tiny_llama()
    moeify.thin(model, [tiny_inputs(batch=4, length=16)], moeify.ThinConfig(skip_frac=0.5, first_dense=2))
    presets = {
        name: dict.fromkeys(sparse_inputs(model), Threshold(theta=theta)) for name, theta in zip(("default", "fast"), factors, strict=True)
    }
    rules = PresetRules(model, presets)
    linear = model.model.layers[0].mlp.up_proj
    first, second = torch.randn(1, 5, 32), torch.randn(1, 4, 32)
    expected = []
    for preset, x in (("default", first), ("fast", second)):
        rules.apply(preset)
        expected.append(linear(x))
    rules.apply_batch([("default", 5), ("fast", 4)], torch.cat((torch.arange(5), torch.arange(4))))
    packed = torch.cat((first, second), dim=1)
    torch.testing.assert_close(linear(packed), torch.cat(expected, dim=1))
    # Decoding: no sequence begins, and the batch is no sequence whose first tokens were to be kept.
    rules.apply_batch([("default", 1), ("default", 1), ("default", 1)], torch.tensor([5, 9, 4]))
    one_by_one = [linear(first[:, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(linear(first[:, :3]), torch.cat(one_by_one, dim=1))
    rules.restore()
    assert all(executor.start_T is None for executor in sparse_inputs(model).values())
