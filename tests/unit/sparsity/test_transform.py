"""Rotations that leave a model's function alone: families they pass, families they cannot, and what happens then."""

import copy
from functools import partial

import pytest
import torch
from families.models import build
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeify.errors import ConfigError, UnsupportedModelError
from moeify.sites import find_linear_sites, linear_weight
from moeify.sparsity import TRANSFORMS
from moeify.sparsity.transform import transformed


def llama(**options):
    """Two layers of width 32 with gains and biases unlike 1 and 0; and inputs."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, **options}
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64, **options)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model, {"input_ids": torch.randint(64, (2, 12))}


def row(family_id):
    try:
        return build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.float()


def orthogonalise(model, inputs):
    with transformed(model, "orthogonal", inputs, find_linear_sites(model, inputs)):
        pass


def coherence(weight_NK):
    """Norm of the products of different columns over that of the columns with themselves; 0 where they are orthogonal."""
    gram_KK = weight_NK.T @ weight_NK
    return ((gram_KK - gram_KK.diag().diag()).norm() / gram_KK.diag().norm()).item()


def readers(model, inputs):
    """Weights that read the residual stream, all of one norm."""
    sites = find_linear_sites(model, inputs)
    weights = [linear_weight(model.get_submodule(s.name)).detach() for s in sites if s.role in ("attn_in", "ffn_in")]
    return [weight_NK / weight_NK.norm() for weight_NK in weights]


def state(model):
    return {name: (id(p), p.data_ptr(), p.clone()) for name, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}


def assert_as_before(model, before):
    now = state(model)
    assert now.keys() == before.keys()
    for name, (identity, pointer, value) in before.items():
        assert now[name][:2] == (identity, pointer)
        assert now[name][2].dtype == value.dtype and torch.equal(now[name][2], value)


MODELS = {
    "llama": lambda: llama(),
    "llama with a tied head": lambda: llama(tie_word_embeddings=True),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, one head for each value": lambda: llama(num_key_value_heads=4),
    **{name: partial(row, name) for name in ("mistral", "qwen2", "qwen3", "gemma", "granite", "arcee", "glm", "phi3", "smollm3")},
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_logits_stay_columns_get_orthogonal_and_the_checkpoint_is_a_dense_one(make, tmp_path):
    model, inputs = make()
    before, names = logits(model, inputs), list(dict(model.named_parameters(remove_duplicate=False)))
    assert coherence(torch.cat(readers(model, inputs))) > 0.2
    orthogonalise(model, inputs)
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert coherence(torch.cat(readers(model, inputs))) < 1e-5
    assert list(dict(model.named_parameters(remove_duplicate=False))) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_layers_that_have_directions_in_common_get_more_orthogonal_each():
    model, inputs = llama(num_key_value_heads=4)
    common_DD = torch.randn(32, 32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (*layer.self_attn.children(), *layer.mlp.children()):
                if linear.__class__ is torch.nn.Linear and linear.in_features == 32:
                    linear.weight.copy_(0.05 * linear.weight @ common_DD)
    before = [coherence(weight_NK) for weight_NK in readers(model, inputs)]
    orthogonalise(model, inputs)
    after = [coherence(weight_NK) for weight_NK in readers(model, inputs)]
    assert all(b < 0.7 * a for a, b in zip(before, after, strict=True))


def test_a_tied_head_stays_tied_where_the_final_gains_are_one_number_and_else_becomes_its_own():
    model, inputs = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[0] = 2
    for each, tied in ((model, True), (other, False)):
        head, before = each.lm_head.weight, logits(each, inputs)
        orthogonalise(each, inputs)
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == each.config.tie_word_embeddings == tied
        assert (each.lm_head.weight is head) == tied
        assert torch.allclose(logits(each, inputs), before, atol=1e-4 * float(before.abs().max()))
    assert (other.model.norm.weight == 1).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_columns_that_read_the_values_of_one_head_are_orthogonal_in_sum(kv_heads):
    model, inputs = llama(num_key_value_heads=kv_heads, attention_bias=True)
    orthogonalise(model, inputs)
    for layer in model.model.layers:
        weight_DHC = layer.self_attn.o_proj.weight.detach().view(32, kv_heads, 4 // kv_heads, 8)
        gram_HCC = torch.einsum("dhgc,dhge->hce", weight_DHC, weight_DHC)
        diagonal_HC = gram_HCC.diagonal(dim1=1, dim2=2)
        assert (gram_HCC - torch.diag_embed(diagonal_HC)).abs().max() < 1e-4 * diagonal_HC.max()
        assert (diagonal_HC.diff(dim=1) < 0).all()


def test_values_of_a_fused_projection_are_left_alone():
    model, inputs = row("phi3")
    columns = [layer.self_attn.o_proj.weight.detach().norm(dim=0) for layer in model.model.layers]
    orthogonalise(model, inputs)
    for layer, before in zip(model.model.layers, columns, strict=True):
        torch.testing.assert_close(layer.self_attn.o_proj.weight.detach().norm(dim=0), before)


def test_values_are_left_alone_where_heads_cannot_be_told_apart():
    model, inputs = llama(num_key_value_heads=4)
    one = {"input_ids": inputs["input_ids"][:1, :1]}  # all heads attend to the only token
    columns = model.model.layers[0].self_attn.o_proj.weight.detach().norm(dim=0)
    before = logits(model, inputs)
    orthogonalise(model, one)
    torch.testing.assert_close(model.model.layers[0].self_attn.o_proj.weight.detach().norm(dim=0), columns)
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_16_bit_weights_are_rotated_in_fp32_and_keep_their_dtypes():
    model, inputs = llama(tie_word_embeddings=True)
    model = model.bfloat16()
    model.lm_head.weight.requires_grad_(False)
    exact = copy.deepcopy(model).float()
    orthogonalise(model, inputs)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert not model.lm_head.weight.requires_grad
    assert set(dtypes.values()) == {torch.bfloat16}
    wanted = logits(exact, inputs)
    error = (logits(model.float(), inputs) - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.02  # the rounding of weights that had been exact


@pytest.mark.parametrize(
    ("family_id", "reason"),
    [
        ("gpt2", r"'transformer\.h\.0\.ln_1' subtracts the mean of the channels \(LayerNorm\)"),
        ("gemma2", r"no linear layer reads 'model\.layers\.0\.post_attention_layernorm' directly, so its gains"),
        ("olmo2", r"no linear layer reads 'model\.layers\.0\.self_attn\.q_norm' directly"),
        ("olmo", r"q_proj' does not read the residual stream through an RMS norm"),
        ("nemotron", r"'model\.layers\.0\.input_layernorm' is no RMS norm with one gain for each channel"),
        ("xlm-roberta", "checked by the logits, which this model's output has not"),
    ],
)
def test_what_a_rotation_cannot_pass_is_refused_by_name_and_left_as_it_was(family_id, reason):
    model, inputs = row(family_id)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        orthogonalise(model, inputs)
    assert_as_before(model, before)


def test_a_part_that_does_not_run_is_refused():
    model, inputs = llama()
    model.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UnsupportedModelError, match="'spare' did not run on the example"):
        orthogonalise(model, inputs)


def test_layers_that_share_a_weight_are_refused():
    model, inputs = llama()
    sites = find_linear_sites(model, inputs)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    before, reason = state(model), "down_proj' shares its weight with another layer"
    with pytest.raises(UnsupportedModelError, match=reason), transformed(model, "orthogonal", inputs, sites):
        pass
    assert_as_before(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_change_undo_everything(dtype):
    model, inputs = llama(tie_word_embeddings=True)
    model = model.to(dtype)
    double_first = torch.tensor([2.0] + [1.0] * 31, dtype=dtype)
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: output * double_first)
    before, tied_keys = state(model), dict(model.all_tied_weights_keys)
    with pytest.raises(UnsupportedModelError, match=r"changes the logits of this LlamaForCausalLM by [0-9.e-]+ of the largest"):
        orthogonalise(model, inputs)
    assert_as_before(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and model.all_tied_weights_keys == tied_keys != {}


def test_a_block_that_fails_undoes_everything():
    model, inputs = llama(tie_word_embeddings=True)
    before, sites, untied = state(model), find_linear_sites(model, inputs), []

    def interrupted():
        with transformed(model, "orthogonal", inputs, sites):
            untied.append(not model.config.tie_word_embeddings)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert untied == [True]
    assert_as_before(model, before)
    assert model.config.tie_word_embeddings


def test_none_runs_nothing_and_an_unknown_name_is_refused():
    assert list(TRANSFORMS) == ["none", "orthogonal"]
    with transformed(torch.nn.Linear(2, 2), "none", {}, []):
        pass
    with pytest.raises(ConfigError, match="unknown name 'orthogonl'"), transformed(torch.nn.Linear(2, 2), "orthogonl", {}, []):
        pass
