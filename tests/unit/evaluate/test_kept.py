"""Kept channels by part of each block, and what tokens cost there, against a plain count of what each layer keeps."""

import pytest
import torch
from tiny import tiny_inputs, tiny_llama

from moeify.channels import record_channels, sparse_inputs
from moeify.errors import ConfigError
from moeify.evaluate import channel_costs, kept_channels
from moeify.select import Threshold
from moeify.thin import ThinConfig, thin

PARTS = [f"model.layers.{i}: {part}" for i in (0, 1) for part in ("attention", "FFN")]


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(hidden_act="silu").eval()
    thin(model, [tiny_inputs(batch=4, length=32)], ThinConfig(skip_frac=0.4, first_dense=2))
    return model


def kept_by_hand(model, batch):
    """(part, token) -> kept and all parameters, one layer and one token at a time."""
    seen, hooks = {}, []
    for name, executor in sparse_inputs(model).items():
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _module, args, name=name: seen.setdefault(name, args[0]))
        hooks.append((hook, executor))
    with torch.no_grad():
        model(**batch)
    for hook, _ in hooks:
        hook.remove()
    kept, whole = {}, {}
    for name, x_BSK in seen.items():
        executor = sparse_inputs(model)[name]
        block = name.partition(".self_attn")[0].partition(".mlp")[0]
        part = f"{block}: {'attention' if '.self_attn' in name else 'FFN'}"
        level_K, num_outputs = executor.level_K.double(), executor.site.d_out
        for b, s in ((b, s) for b in range(x_BSK.shape[0]) for s in range(x_BSK.shape[1])):
            keeps = executor.site.d_in if s < 2 else int((x_BSK[b, s].double().abs() >= level_K).sum())
            kept[part, b, s] = kept.get((part, b, s), 0) + num_outputs * keeps
            whole[part, b, s] = whole.get((part, b, s), 0) + num_outputs * executor.site.d_in
    return kept, whole


def test_costs_and_shares_are_those_of_a_plain_count(model):
    batch = tiny_inputs(batch=2, length=9)
    kept, whole = kept_by_hand(model, batch)
    costs = channel_costs(model, batch)
    assert list(costs.layers) == PARTS
    assert costs.flops_LBS.shape == (4, 2, 9)
    for i, part in enumerate(PARTS):
        assert costs.dense_flops[i] == 2 * whole[part, 0, 0]
        assert costs.flops_LBS[i].tolist() == [[2 * kept[part, b, s] for s in range(9)] for b in (0, 1)]
    assert costs.fraction_BS[0, 0] == 1, "the first positions keep all"
    assert 0.3 < costs.fraction_BS[:, 2:].mean() < 0.9

    found = kept_channels(model, [batch, batch], {"own": {}, "all": Threshold(theta=0.0)})
    for part in PARTS:
        shares = [kept[part, b, s] / whole[part, b, s] for b in (0, 1) for s in range(9)]
        one = found.settings["own"][part]
        assert one.tokens == 36
        assert one.mean == pytest.approx(sum(shares) / 18, abs=1e-12)
        assert one.p5 == pytest.approx(min(shares), abs=0.05)
        assert found.settings["all"][part].mean == 1
    assert all(executor.rule == Threshold(theta=1.0) for executor in sparse_inputs(model).values()), "rules are given back"


def test_padding_is_left_out_and_costs_nothing_that_is_a_number(model):
    batch = tiny_inputs(batch=1, length=9)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    costs = channel_costs(model, {**batch, "attention_mask": mask})
    assert costs.fraction_BS.isnan().tolist() == [[False] * 6 + [True] * 3]
    short = kept_channels(model, [{"input_ids": batch["input_ids"][:, :6]}]).settings["as it is"]
    padded = kept_channels(model, [{**batch, "attention_mask": mask}]).settings["as it is"]
    assert padded[PARTS[0]].tokens == 6
    assert padded == short


def test_the_mean_over_parts_is_what_the_recorder_says(model):
    batch = tiny_inputs(batch=2, length=9)
    with torch.no_grad(), record_channels(model) as recorder:
        model(**batch)
    costs = channel_costs(model, batch)
    assert float(costs.fraction_BS.mean()) == pytest.approx(1 - recorder.skipped_frac(), abs=1e-12)


def test_a_model_that_skips_nothing_is_refused():
    with pytest.raises(ConfigError, match="thin it first"):
        channel_costs(tiny_llama(), tiny_inputs())
    with pytest.raises(ConfigError, match="thin it first"):
        kept_channels(tiny_llama(), [tiny_inputs()])
