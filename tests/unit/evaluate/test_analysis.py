"""Histograms, costs by token and tables, against plain loops over the masks that the layers chose."""

import json
import math

import pytest
import tiny
import torch
import transformers as hf

from moeify.controls import set_mode, set_rule
from moeify.errors import ConfigError, DataError
from moeify.evaluate import (
    AblationTable,
    CurvePoint,
    Distribution,
    ExecutedExperts,
    NonzeroActivations,
    TokenCosts,
    ablation,
    executed_experts,
    nonzero_activations,
    rules_at,
    sweep,
    token_costs,
)
from moeify.layers import MoEFFN, attach, moe_layers
from moeify.routers import NormRouterConfig, build_router
from moeify.select import DynKMax, Threshold, TopK
from moeify.sites import find_ffn_sites


def text_batch():
    """Two texts of six and three tokens."""
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    }


def convert_unequal(model, inputs, *, experts=(10, 7)):
    """Layers with different E; 40 neurons in 7 experts are five of 6 and two of 5."""
    for site, num_experts in zip(find_ffn_sites(model, inputs), experts, strict=True):
        router = build_router(NormRouterConfig(width=4), site=site, num_experts=num_experts)
        torch.manual_seed(num_experts)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        attach(model, MoEFFN(site, num_experts=num_experts, router=router, rule=DynKMax(tau=0.5)))
    return model


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    return convert_unequal(hf.BertModel(config).eval(), text_batch())


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = hf.ViTConfig(
        image_size=(8, 12),
        patch_size=4,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    pixels = torch.randn(2, 3, 8, 12)
    return convert_unequal(hf.ViTModel(config).eval(), {"pixel_values": pixels}), {"pixel_values": pixels}


def watched_masks(model, batch):
    """Executed neurons of each token, (B, S) by layer, by a plain loop over the masks that `MoEFFN.select` gives for the layer's input."""
    found = {}
    for name, layer in moe_layers(model).items():
        inputs = []
        first, _ = layer.projections()
        handle = first.register_forward_pre_hook(lambda _module, args, to=inputs: to.append(args[0].clone()))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        (x_BSD,) = inputs
        mask_TE = layer.select(x_BSD.reshape(-1, x_BSD.shape[-1]))
        counts = []
        for row_E in mask_TE.tolist():
            neurons = 0
            for expert, runs in enumerate(row_E):
                if runs:
                    neurons += layer.bounds[expert + 1] - layer.bounds[expert]
            counts.append(neurons)
        found[name] = torch.tensor(counts).reshape(x_BSD.shape[:2])
    return found


def state(model):
    return {name: (layer.mode, layer.rule, layer.recorder) for name, layer in moe_layers(model).items()}


def real_counts(model, batch):
    """What `watched_masks` found, without padding."""
    return {name: counts_BS[batch["attention_mask"].bool()].tolist() for name, counts_BS in watched_masks(model, batch).items()}


# -- distributions --------------------------------------------------------------------------------------------------------------------


def test_distribution_of_counts_by_hand():
    # of F = 4: one token with 0, two with 1, one with 4
    found = Distribution.of_counts(torch.tensor([1, 2, 0, 0, 1]))
    assert (found.tokens, found.num_neurons, found.num_values) == (4, 4, 4)
    assert {i: n for i, n in enumerate(found.histogram) if n} == {0: 1, 25: 2, 99: 1}
    assert found.mean == pytest.approx(1.5 / 4)
    assert found.deviation == pytest.approx(math.sqrt((1.5**2 + 2 * 0.5**2 + 2.5**2) / 4) / 4)
    assert (found.p5, found.p25, found.p50, found.p75, found.p95) == (0.0, 0.0, 0.25, 0.25, 1.0)
    assert found.relative_deviation == pytest.approx(found.deviation / 0.375)
    assert Distribution.of_counts(torch.tensor([3, 0])).relative_deviation is None


def test_distribution_bins_are_exact_where_floats_round_down():
    counts = torch.zeros(101, dtype=torch.int64)
    counts[29] = 1  # 0.29 * 100 is 28.999999999999996
    assert Distribution.of_counts(counts).histogram[29] == 1


# -- executed experts -----------------------------------------------------------------------------------------------------------------


def test_executed_experts_equal_loops_over_masks_of_layers_with_different_experts(bert):
    batches = [text_batch(), {name: value[:1] for name, value in text_batch().items()}]
    before = state(bert)
    found = executed_experts(bert, batches, rules_at(DynKMax, (0.3, 0.9)))
    assert state(bert) == before
    assert list(found.settings) == ["tau = 0.3", "tau = 0.9"]
    for tau, label in ((0.3, "tau = 0.3"), (0.9, "tau = 0.9")):
        set_rule(bert, DynKMax(tau=tau))
        by_batch = [real_counts(bert, batch) for batch in batches]
        for name in moe_layers(bert):
            counts = [count for batch in by_batch for count in batch[name]]
            got = found.settings[label][name]
            assert got.tokens == len(counts) == 9 + 6
            assert (got.num_neurons, got.num_values) == (40, moe_layers(bert)[name].num_experts)
            assert got.mean == pytest.approx(sum(counts) / len(counts) / 40)
            bins = [0] * 100
            for count in counts:
                bins[min(99, count * 100 // 40)] += 1
            assert list(got.histogram) == bins
            assert got.deviation == pytest.approx(torch.tensor(counts).double().div(40).std(correction=0).item())
    means = found.active_fraction()
    assert all(means["tau = 0.9"][name] < means["tau = 0.3"][name] for name in moe_layers(bert))


def test_executed_experts_agree_with_the_active_fraction_of_a_sweep(bert):
    (point,) = sweep(bert, [text_batch()], DynKMax, [0.7], quality="cosine")
    (means,) = executed_experts(bert, [text_batch()], rules_at(DynKMax, [0.7])).active_fraction().values()
    assert sum(means.values()) / 2 == pytest.approx(point.active_fraction)  # both layers have 40 neurons


def test_executed_experts_without_rules_takes_those_of_the_model_and_rules_by_layer_keep_the_others(bert):
    first, second = moe_layers(bert)
    found = executed_experts(bert, [text_batch()]).settings["as it is"]
    set_mode(bert, "dense")
    steps = {"a": {first: TopK(k=1)}, "b": {second: TopK(k=7)}}
    both = executed_experts(bert, [text_batch()], steps).settings
    assert {layer.mode for layer in moe_layers(bert).values()} == {"dense"}
    assert both["a"][first].mean == pytest.approx(0.1)
    assert both["a"][first].deviation == pytest.approx(0)
    assert both["a"][second] != both["b"][second]
    assert (both["b"][first], both["b"][second].mean) == (found[first], 1.0), "a setting starts from the model's own rules"


def test_executed_experts_restore_everything_after_an_error(bert):
    bert.train()
    set_mode(bert, "dense")
    before = state(bert)
    broken = {"input_ids": torch.tensor([[500]])}  # not in the vocabulary
    with pytest.raises(IndexError):
        executed_experts(bert, [text_batch(), broken], {"all": TopK(k=1)})
    assert state(bert) == before
    assert all(module.training for module in bert.modules() if not isinstance(module, MoEFFN))
    with pytest.raises(ConfigError, match="no MoE layer 'nowhere'"):
        executed_experts(bert, [text_batch()], {"a": {"nowhere": TopK(k=1)}})
    assert state(bert) == before


def test_rules_in_the_config_of_a_model_converted_here_are_restored_too(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama())
    before = json.dumps(model.config.quantization_config)
    sweep(model, [tiny.tiny_inputs()], DynKMax, [0.7])
    executed_experts(model, [tiny.tiny_inputs()], rules_at(DynKMax, [0.6]))
    assert json.dumps(model.config.quantization_config) == before, "else a save would write the last measured rule"


def test_executed_experts_refuse_dense_models_and_nothing_to_run(bert):
    with pytest.raises(ConfigError, match=r"no MoE layer.*convert it first"):
        executed_experts(torch.nn.Linear(2, 2), [text_batch()])
    with pytest.raises(DataError, match="no batch"):
        executed_experts(bert, [])
    with pytest.raises(ConfigError, match="no rule"):
        executed_experts(bert, [text_batch()], {})
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(DataError, match="nothing but padding"):
        executed_experts(bert, [padding])
    with pytest.raises(ConfigError, match="tau"):
        rules_at(DynKMax, [7.0])


def test_executed_experts_as_json_come_back_equal(bert):
    found = executed_experts(bert, [text_batch()], rules_at(Threshold, [0.5]))
    assert ExecutedExperts.from_json(json.loads(json.dumps(found.to_json()))) == found
    for bad in (
        {},
        [],
        {"schema": 99, "settings": {}},
        {"schema": 1, "settings": {"a": {"b": {"tokens": "x"}}}},
        {"schema": 1, "other": 1},
    ):
        with pytest.raises(DataError, match="ExecutedExperts"):
            ExecutedExperts.from_json(bad)


# -- non-zero activations -------------------------------------------------------------------------------------------------------------


def test_nonzero_activations_equal_a_loop_over_hidden_values(tmp_path):
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, hidden_act="relu", num_labels=3
    )
    model = hf.BertForSequenceClassification(config).eval()
    sites, batch = find_ffn_sites(model, text_batch()), text_batch()
    hidden = {}
    handles = [
        model.get_submodule(site.down).register_forward_pre_hook(lambda _m, args, name=site.name: hidden.update({name: args[0].clone()}))
        for site in sites
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    found = nonzero_activations(model, sites, [{**batch, "labels": torch.tensor([0, 1])}])
    for site in sites:
        real = [(b, s) for b in range(2) for s in range(6) if batch["attention_mask"][b, s]]
        counts = [sum(value != 0 for value in hidden[site.name][b, s].tolist()) for b, s in real]
        got = found.layers[site.name]
        assert (got.tokens, got.num_neurons) == (9, 40)
        assert got.mean * 40 == pytest.approx(sum(counts) / 9)
        assert got.deviation * 40 == pytest.approx(torch.tensor(counts).double().std(correction=0).item())
        assert 0 < got.mean < 1
    assert NonzeroActivations.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_nonzero_activations_of_no_token_say_so(bert):
    sites = [layer.site for layer in moe_layers(bert).values()]
    with pytest.warns(UserWarning, match="no token reached"), pytest.raises(DataError, match="no profile has a token"):
        nonzero_activations(bert, sites, [])


# -- costs by token -------------------------------------------------------------------------------------------------------------------


def test_token_costs_equal_router_plus_executed_neurons_and_leave_padding_out(bert):
    batch = text_batch()
    before = state(bert)
    costs = token_costs(bert, batch)
    assert state(bert) == before
    assert costs.layers == tuple(moe_layers(bert))
    counts = watched_masks(bert, batch)
    for i, (name, layer) in enumerate(moe_layers(bert).items()):
        router = 2 * (16 * 4 + 4 * layer.num_experts)
        assert costs.router_flops[i] == router
        assert costs.dense_flops[i] == 2 * 2 * 16 * 40
        for b in range(2):
            for s in range(6):
                got = costs.flops_LBS[i, b, s].item()
                if batch["attention_mask"][b, s]:
                    assert got == pytest.approx(router + 2 * 2 * 16 * int(counts[name][b, s]))
                else:
                    assert math.isnan(got)
    assert torch.allclose(costs.flops_BS, costs.flops_LBS[0] + costs.flops_LBS[1], equal_nan=True)
    assert torch.allclose(costs.fraction_BS, costs.fraction_LBS.mean(0), equal_nan=True), "both layers cost the same when dense"
    assert len(costs.fraction_BS[0].unique()) > 1, "tokens differ"
    assert costs.grid is None
    with pytest.raises(ConfigError, match="not the patches"):
        _ = costs.patches_BHW


def test_token_costs_of_named_layers(bert):
    _, second = moe_layers(bert)
    whole, part = token_costs(bert, text_batch()), token_costs(bert, text_batch(), layers=[second])
    assert torch.equal(part.flops_LBS[0].nan_to_num(), whole.flops_LBS[1].nan_to_num())
    with pytest.raises(ConfigError, match="unknown name 'nowhere'"):
        token_costs(bert, text_batch(), layers=["nowhere"])
    with pytest.raises(ConfigError, match="empty"):
        token_costs(bert, text_batch(), layers=[])
    with pytest.raises(ConfigError, match="no MoE layer"):
        token_costs(torch.nn.Linear(2, 2), text_batch())


def test_token_costs_of_an_image_lie_in_the_grid_of_patches_with_the_class_token_apart(vit):
    model, batch = vit
    costs = token_costs(model, batch)
    assert costs.flops_LBS.shape == (2, 2, 1 + 2 * 3)
    assert costs.grid == (2, 3)
    assert costs.patches_BHW.shape == (2, 2, 3)
    for b in range(2):
        assert costs.specials_BS[b].tolist() == [costs.fraction_BS[b, 0].item()]
        for row in range(2):
            for column in range(3):
                assert costs.patches_BHW[b, row, column] == costs.fraction_BS[b, 1 + 3 * row + column]


def test_token_costs_of_layers_that_flatten_their_tokens_have_the_batch_s_shape():
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=48,
        hidden_size=16,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
    )
    batch = text_batch()
    model = convert_unequal(hf.OPTModel(config).eval(), batch)
    costs = token_costs(model, batch)
    assert costs.flops_LBS.shape == (2, 2, 6)
    assert torch.equal(costs.flops_BS.isnan(), batch["attention_mask"] == 0)


def test_token_costs_of_encoder_and_decoder_ask_for_one_of_them():
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=48, d_model=16, d_ff=40, d_kv=4, num_layers=1, num_decoder_layers=1, num_heads=4, decoder_start_token_id=0
    )
    batch = {"input_ids": torch.randint(1, 48, (2, 5)), "decoder_input_ids": torch.randint(1, 48, (2, 3))}
    model = convert_unequal(hf.T5Model(config).eval(), batch)
    with pytest.raises(ConfigError, match=r"different positions.*one kind"):
        token_costs(model, batch)
    decoder = next(name for name in moe_layers(model) if name.startswith("decoder"))
    assert token_costs(model, batch, layers=[decoder]).flops_LBS.shape == (1, 2, 3)


def test_token_costs_as_json_come_back_equal(bert, vit):
    model, images = vit
    for costs in (token_costs(bert, text_batch()), token_costs(model, images)):
        back = TokenCosts.from_json(json.loads(json.dumps(costs.to_json(), allow_nan=False)))
        assert torch.equal(back.flops_LBS.nan_to_num(-1), costs.flops_LBS.nan_to_num(-1))
        assert (back.layers, back.dense_flops, back.router_flops, back.grid) == (
            costs.layers,
            costs.dense_flops,
            costs.router_flops,
            costs.grid,
        )
    good = costs.to_json()
    for bad in ({}, good | {"grid": [1]}, good | {"layers": ["a"]}, good | {"flops": [[1.0]]}, good | {"schema": 2}):
        with pytest.raises(DataError, match="TokenCosts"):
            TokenCosts.from_json(bad)


# -- ablation -------------------------------------------------------------------------------------------------------------------------


def points(*pairs):
    return [
        CurvePoint(
            rule="topk", value=1.0, active_fraction=x, ffn_flops_fraction=x / 2, flops_fraction=x, quality=quality, quality_ratio=1.0
        )
        for x, quality in pairs
    ]


ROWS = {
    "MoEfication": points((0.4, 0.50), (0.8, 0.90), (1.0, 0.90)),
    "full": points((0.2, 0.70), (0.4, 0.90), (0.3, 0.60), (0.6, 0.89)),
    "never": points((0.5, 0.10)),
    "free": points((0.3, 0.90)),
}


def test_ablation_interpolates_on_the_front_and_never_leaves_what_was_measured():
    table = ablation(ROWS, metric="accuracy", dense=0.9, within=0.1, fractions=(0.1, 0.3, 0.6, 0.9))
    first, full, never, free = table.rows
    assert first.quality == (None, None, pytest.approx(0.7), pytest.approx(0.9))
    assert full.quality == (None, pytest.approx(0.8), 0.9, None), "0.60 at 0.3 is beaten, and so is 0.89 at 0.6"
    assert (never.quality, never.cheapest) == ((None,) * 4, None)
    assert first.cheapest == pytest.approx(0.7)
    assert full.cheapest == pytest.approx(0.3)
    assert free.cheapest == 0.3
    assert table.cost_ratios("MoEfication") == {
        "MoEfication": 1.0,
        "full": pytest.approx(3 / 7),
        "never": None,
        "free": pytest.approx(3 / 7),
    }
    assert set(table.cost_ratios("never").values()) == {None}
    assert AblationTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_ablation_of_a_metric_where_less_is_better():
    rows = {"a": points((0.2, 40.0), (0.6, 20.0), (0.8, 25.0))}
    table = ablation(rows, metric="perplexity", dense=20.0, within=5.0, fractions=(0.4, 0.7), cost="ffn_flops_fraction")
    assert table.rows[0].quality == (20.0, None), "half the whole model's fractions"
    assert table.rows[0].cheapest == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"within": -1.0}, "at least 0"),
        ({"within": math.nan}, "at least 0"),
        ({"cost": "flops"}, "cost: unknown name 'flops'"),
    ],
)
def test_ablation_refuses_bad_options(change, message):
    with pytest.raises(ConfigError, match=message):
        ablation(ROWS, **{"metric": "accuracy", "dense": 0.9, "within": 0.1} | change)


def test_ablation_without_points_says_which_row():
    with pytest.raises(DataError, match="'b' has no point"):
        ablation({"a": points((0.5, 1.0)), "b": []}, metric="accuracy", dense=1.0, within=0.0)
    with pytest.raises(DataError, match="no method"):
        ablation({}, metric="accuracy", dense=1.0, within=0.0)
