"""FLOPs against closed forms, against torch's own counter, and against eager attention."""

import pytest
import torch
import transformers as hf
from families.models import build as build_family
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moeify.convert import replace_projections
from moeify.cost import (
    CostBreakdown,
    FFNCost,
    MoECost,
    estimate_flops,
    estimate_weights,
    register_formulas,
    roofline_s,
    site_flops_per_token,
)
from moeify.sites import find_ffn_sites, find_projections

B, S, D, FF, L, H, V = 2, 6, 16, 40, 2, 4, 48
T = B * S


def _llama(**kwargs):
    config = hf.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **kwargs,
    )
    return hf.LlamaForCausalLM(config).eval(), _ids()


def _gpt2(**kwargs):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=V, n_positions=64, n_embd=D, n_layer=L, n_head=H, n_inner=FF, **kwargs)
    ).eval(), _ids()


def _bert(**kwargs):
    config = hf.BertConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=L,
        num_attention_heads=H,
        max_position_embeddings=64,
        num_labels=3,
        **kwargs,
    )
    return hf.BertForSequenceClassification(config).eval(), _ids() | {"attention_mask": torch.ones(B, S, dtype=torch.int64)}


def _vit(**kwargs):
    config = hf.ViTConfig(
        hidden_size=D, intermediate_size=FF, num_hidden_layers=L, num_attention_heads=H, image_size=8, patch_size=4, num_labels=3, **kwargs
    )
    return hf.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(B, 3, 8, 8)}


def _t5(**kwargs):
    config = hf.T5Config(vocab_size=V, d_model=D, d_kv=D // H, d_ff=FF, num_layers=L, num_heads=H, decoder_start_token_id=0, **kwargs)
    return hf.T5ForConditionalGeneration(config).eval(), _ids() | {"decoder_input_ids": torch.zeros(B, 3, dtype=torch.int64)}


def _ids():
    return {"input_ids": torch.arange(T).reshape(B, S) % V}


MODELS = {
    "llama: GLU, grouped queries": _llama,
    "gpt2: Conv1D": _gpt2,
    "bert: split FFN": _bert,
    "vit: patches": _vit,
    "t5: cross-attention": _t5,
}


def _estimate(model, inputs, **kwargs) -> CostBreakdown:
    return estimate_flops(model, inputs, sites=find_ffn_sites(model, inputs), **kwargs)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_estimate_flops_on_tiny_models_equals_torch_counter_to_the_flop(build):
    model, inputs = build()
    register_formulas()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert _estimate(model, inputs).dense_flops == counter.get_total_flops()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_estimate_flops_with_eager_attention_equals_fused_attention_line_by_line(build):
    torch.manual_seed(0)
    fused, inputs = build(attn_implementation="sdpa")
    eager, _ = build(attn_implementation="eager")
    assert _estimate(fused, inputs).lines() == _estimate(eager, inputs).lines()


def test_estimate_flops_on_llama_equals_closed_forms():
    model, inputs = _llama()
    lines = _estimate(model, inputs).lines()
    kv = D // H * 2
    assert lines["ffn_dense"] == 2 * L * 3 * D * FF
    assert lines["attention_proj"] == 2 * L * (2 * D * D + 2 * D * kv)
    assert lines["attention_scores"] == 2 * L * 2 * S * D
    assert lines["head"] == 2 * D * V


def test_estimate_flops_on_gpt2_equals_closed_forms():
    model, inputs = _gpt2()
    lines = _estimate(model, inputs).lines()
    assert lines["ffn_dense"] == lines["ffn_unconverted"] == 2 * L * 2 * D * FF
    assert lines["attention_proj"] == 2 * L * 4 * D * D
    assert lines["attention_scores"] == 2 * L * 2 * S * D
    assert lines["head"] == 2 * D * V
    assert lines["experts"] == lines["router"] == lines["other"] == 0


def test_estimate_flops_on_bert_books_output_projection_as_attention_and_classifier_as_head():
    model, inputs = _bert()
    lines = _estimate(model, inputs).lines()
    assert lines["ffn_dense"] == 2 * L * 2 * D * FF
    assert lines["attention_proj"] == 2 * L * 4 * D * D
    assert lines["head"] * T == 2 * B * D * 3
    assert lines["other"] * T == 2 * B * D * D  # the pooler


def test_estimate_flops_on_vit_counts_patches_as_tokens():
    model, inputs = _vit()
    cost = _estimate(model, inputs)
    patches = 4 + 1
    assert (cost.tokens, cost.context) == (B * patches, patches)
    assert cost.lines()["ffn_dense"] == 2 * L * 2 * D * FF
    assert cost.other_flops == 2 * B * 4 * 3 * 4 * 4 * D  # the patch convolution
    assert cost.head_flops == 2 * B * D * 3


def test_estimate_flops_on_t5_counts_encoder_decoder_and_cross_attention():
    model, inputs = _t5()
    cost = _estimate(model, inputs)
    R = B * 3  # decoder rows
    assert cost.dense_ffn_flops == 2 * L * 2 * D * FF * (T + R)
    assert cost.attention_proj_flops == 2 * L * D * D * (4 * T + 4 * R + 2 * R + 2 * T)
    assert cost.attention_score_flops == 2 * L * 2 * D * (T * S + R * 3 + R * S)
    assert cost.head_flops == 2 * R * D * V
    assert cost.tokens == T


def test_estimate_flops_with_shared_layer_counts_every_call():
    config = hf.AlbertConfig(
        vocab_size=V,
        embedding_size=8,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=3,
        num_attention_heads=H,
        max_position_embeddings=64,
    )
    model = hf.AlbertModel(config, add_pooling_layer=False).eval()
    assert _estimate(model, _ids()).lines()["ffn_dense"] == 3 * 2 * 2 * D * FF


def test_estimate_flops_under_inference_mode_equals_no_grad():
    model, inputs = _llama()
    expected = _estimate(model, inputs)
    sites = find_ffn_sites(model, inputs)
    with torch.inference_mode():
        assert estimate_flops(model, inputs, sites=sites) == expected


def test_at_context_from_short_forward_equals_long_forward():
    model, short = _llama()
    long = {"input_ids": torch.zeros(B, 32, dtype=torch.int64)}  # the batch shares what transformers 5.17 computes of positions
    assert _estimate(model, short).at_context(32).lines() == _estimate(model, long).lines()


def test_fractions_with_router_and_active_experts_equal_hand_computed():
    model, inputs = _gpt2()
    names = [site.name for site in find_ffn_sites(model, inputs)]
    cost = _estimate(model, inputs, moe={name: MoECost(num_experts=10, router_flops=100) for name in names})
    ffn = 2 * 2 * D * FF
    assert cost.ffn_flops_fraction(0.25) == pytest.approx(0.25 + 100 / ffn)
    assert cost.ffn_flops_fraction({names[0]: 0.5, names[1]: 0.0}) == pytest.approx(0.25 + 100 / ffn)
    rest = 2 * L * (4 * D * D + 2 * S * D) + 2 * D * V
    assert cost.flops_fraction(0.25) == pytest.approx((L * (0.25 * ffn + 100) + rest) / (L * ffn + rest))
    assert cost.flops_per_token(1.0) == pytest.approx(cost.dense_flops_per_token + L * 100)
    lines = cost.lines(0.25)
    assert sum(lines.values()) - lines["ffn_dense"] == pytest.approx(cost.flops_per_token(0.25))


def test_fractions_with_one_layer_converted_keep_the_other_dense():
    model, inputs = _gpt2()
    name = find_ffn_sites(model, inputs)[0].name
    cost = _estimate(model, inputs, moe={name: MoECost(num_experts=10, router_flops=0)})
    assert cost.ffn_flops_fraction(0.5) == pytest.approx(0.75)


def test_estimate_flops_with_labels_and_training_mode_leaves_mode_and_counts_no_loss():
    model, inputs = _gpt2()
    model.train()
    expected = _estimate(model, inputs)
    assert _estimate(model, inputs | {"labels": inputs["input_ids"]}) == expected
    assert model.training


def test_estimate_flops_with_unknown_moe_name_raises():
    model, inputs = _gpt2()
    with pytest.raises(ValueError, match=r"h\.9\.mlp"):
        _estimate(model, inputs, moe={"h.9.mlp": MoECost(num_experts=2, router_flops=1)})


def test_site_flops_per_token_on_every_model_equals_measured():
    for build in (_llama, _gpt2):
        model, inputs = build()
        sites = find_ffn_sites(model, inputs)
        assert sum(map(site_flops_per_token, sites)) == estimate_flops(model, inputs, sites=sites).lines()["ffn_dense"]


def test_ffn_flops_fraction_without_sites_raises():
    cost = CostBreakdown(tokens=1, context=1, ffns={}, attention_proj_flops=1.0, attention_score_flops=1.0, head_flops=1.0, other_flops=1.0)
    with pytest.raises(ValueError, match="without FFN sites"):
        cost.ffn_flops_fraction(0.5)


def test_ffn_cost_of_unconverted_site_ignores_active_fraction():
    assert FFNCost(dense_flops=10.0).flops(0.1) == 10.0


def test_estimate_weights_with_tied_head_reads_table_once_and_experts_by_fraction():
    model, inputs = _gpt2()
    sites = find_ffn_sites(model, inputs)
    cost = estimate_weights(model, sites=sites, routers={sites[0].name: nn.Linear(D, 5)})
    ffn = 2 * D * FF + FF + D
    assert cost.ffn == {site.name: (ffn, 4 * ffn) for site in sites}
    assert cost.num_params == model.num_parameters()  # tied table once
    assert cost.embedding == (64 * D, 4 * 64 * D)  # positions; the token table is the head, read whole
    assert cost.embedding_row_bytes == 4 * D
    dense = cost.read_bytes_per_token()
    assert dense == 4 * (model.num_parameters() - 64 * D + D)
    assert cost.read_bytes_per_token(0.5) == dense - 0.5 * 4 * ffn  # only the first layer has a router


def test_read_bytes_of_a_router_that_reads_part_of_the_ffn_count_that_part_once():
    model, inputs = _gpt2()
    sites = find_ffn_sites(model, inputs)
    names = [site.name for site in sites]
    cost = estimate_weights(model, sites=sites, routers={names[0]: nn.Module()}, router_shares={names[0]: 0.25, names[1]: 0.25})
    ffn, dense = cost.ffn[names[0]][1], cost.read_bytes_per_token(1.0)
    assert cost.num_params == model.num_parameters()
    assert dense == 4 * (model.num_parameters() - 64 * D + D)
    assert cost.read_bytes_per_token(0.0) == dense - 0.75 * ffn  # the second layer has no router
    assert cost.read_bytes_per_token(0.5) == dense - 0.75 * 0.5 * ffn


def test_estimate_weights_on_meta_with_untied_head_reads_one_row():
    with torch.device("meta"):
        model, _ = _llama(tie_word_embeddings=False)
    cost = estimate_weights(model)
    assert cost.embedding_row_bytes == 4 * D
    assert cost.num_params == model.num_parameters()


def test_roofline_when_memory_bound_is_bytes_over_bandwidth():
    assert roofline_s(flops=1e9, num_bytes=4e9, peak_flops_per_s=1e12, peak_bytes_per_s=2e9) == 2.0
    assert roofline_s(flops=4e12, num_bytes=1.0, peak_flops_per_s=1e12, peak_bytes_per_s=2e9) == 4.0


def test_register_formulas_on_grouped_mm_counts_rows_once():
    register_formulas()
    a_TD, b_EDG = torch.randn(16, 8), torch.randn(4, 8, 12)
    with FlopCounterMode(display=False) as counter:
        F.grouped_mm(a_TD, b_EDG, offs=torch.tensor([4, 4, 10, 16], dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 16 * 8 * 12


def test_register_formulas_on_attention_backward_counts_five_products():
    register_formulas()
    q, k, v = (torch.randn(1, H, S, 8, requires_grad=True) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.ones_like(out))
    assert counter.get_total_flops() == 5 * 2 * H * S * S * 8


def test_replaced_projections_count_as_ffns_at_the_cost_of_the_layers():
    model, inputs = build_family("bert")
    dense = estimate_flops(model, inputs, sites=find_ffn_sites(model, inputs))
    replace_projections(model, find_projections(model, inputs, attention=("q", "k", "v")), None)
    sites = find_ffn_sites(model, inputs)
    moe = {site.name: MoECost(num_experts=4, router_flops=100.0) for site in sites if site.name.endswith("query")}
    cost = estimate_flops(model, inputs, sites=sites, moe=moe)
    assert cost.dense_flops == dense.dense_flops
    assert cost.attention_proj_flops == dense.attention_proj_flops / 4, "the output projection, a level above the others, stays"
    assert cost.dense_ffn_flops - dense.dense_ffn_flops == dense.attention_proj_flops * 3 / 4
    tokens, query = cost.tokens, 2 * 2 * 32 * 16  # two products of 32 x 16
    assert cost.projection_flops(1.0) == 2 * tokens * (3 * query + 100)
    assert cost.projection_flops(0.25) == 2 * tokens * (2 * query + query / 4 + 100)
    compared = ("ffn_dense", "projections_dense")
    assert sum(flops for part, flops in cost.lines(0.25).items() if part not in compared) == pytest.approx(cost.flops_per_token(0.25))
    assert cost.lines(0.25)["projections"] == cost.projection_flops(0.25) / tokens
    assert cost.lines()["projections_dense"] == dense.attention_proj_flops * 3 / 4 / tokens
    assert (cost.lines()["experts"], cost.lines()["router"]) == (0, 0), "those of projections have a line of their own"
    assert "projections" not in dense.lines()


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("named", [pytest.param(True, id="sites"), pytest.param(False, id="no site is named")])
def test_fractions_of_a_replaced_model_are_of_the_original(factor, named):
    """GPT-2's fused q, k and v, of which k is kept, and widths that are no whole multiple."""
    model, inputs = build_family("gpt2")
    dense = estimate_flops(model, inputs, sites=find_ffn_sites(model, inputs))
    records = find_projections(model, inputs, attention=("q", "v", "o"), flops_factor=factor)
    replace_projections(model, records, None)
    sites = find_ffn_sites(model, inputs)
    cost = estimate_flops(model, inputs, sites=sites if named else [site for site in sites if site.name.endswith("mlp")])
    assert cost.dense_flops == pytest.approx(dense.dense_flops)
    register_formulas()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert cost.flops_fraction(1.0) == pytest.approx(counter.get_total_flops() / dense.dense_flops)
    replaced = dense.attention_proj_flops * 3 / 4
    assert cost.dense_projection_flops == pytest.approx(replaced)
    assert cost.projection_flops_fraction(1.0) == pytest.approx(factor, rel=0.01)
    assert dense.projection_flops_fraction(1.0) is None
