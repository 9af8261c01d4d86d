"""Attention projections of every family: found by data flow, replaced by MLPs, and converted like any FFN."""

import re
import warnings

import pytest
import torch
from families.models import FAMILIES, build

from moeify.convert import ConvertConfig, convert, replace_projections
from moeify.cost import estimate_flops
from moeify.errors import UnsupportedModelError
from moeify.layers import MoEProjection, moe_layers
from moeify.sites import find_ffn_sites, find_linear_sites, find_projections

REFUSED = {
    "rwkv": "no attention of RwkvForCausalLM was seen",
    "fnet": "no attention of FNetModel was seen",
    "mamba": "no attention of MambaForCausalLM was seen",
    "wavlm": "made of no linear layers that run on their own",  # it hands its weights to torch's function
    "xlnet": "has no linear layer that gives its q",  # einsum with parameters
    "jetmoe": "has no linear layer that gives its q",  # a mixture of experts makes it
    "squeezebert": "is a Conv1d, not a plain Linear",
}
"""Families of which no projection can be found, and what the error says."""
WARNED = {"siglip-vision": "head", "siglip": "vision_model.head"}
"""Families one of whose attentions is left as it is, and where that is."""
FUSED = {
    "gpt2": "c_attn q(0, 32, 32, 1) k(32, 32, 32, 1) v(64, 32, 32, 1)",
    "openai-gpt": "c_attn q(0, 32, 32, 1) k(32, 32, 32, 1) v(64, 32, 32, 1)",
    "gpt_bigcode": "c_attn q(0, 32, 32, 1) k(32, 8, 8, 1) v(40, 8, 8, 1)",
    "codegen": "qkv_proj q(0, 8, 24, 4) k(16, 8, 24, 4) v(8, 8, 24, 4)",
    "gpt_neox": "query_key_value q(0, 8, 24, 4) k(8, 8, 24, 4) v(16, 8, 24, 4)",
    "persimmon": "query_key_value q(0, 8, 24, 4) k(8, 8, 24, 4) v(16, 8, 24, 4)",
    "bloom": "query_key_value q(0, 8, 24, 4) k(8, 8, 24, 4) v(16, 8, 24, 4)",
    "mpt": "Wqkv q(0, 32, 32, 1) k(32, 32, 32, 1) v(64, 32, 32, 1)",
    "falcon": "query_key_value q(0, 32, 32, 1) k(32, 8, 8, 1) v(40, 8, 8, 1)",
    "phi3": "qkv_proj q(0, 32, 32, 1) k(32, 16, 16, 1) v(48, 16, 16, 1)",
    "deberta": "in_proj q(0, 8, 24, 4) k(8, 8, 24, 4) v(16, 8, 24, 4)",
    "modernbert": "Wqkv q(0, 32, 32, 1) k(32, 32, 32, 1) v(64, 32, 32, 1)",
    "deepseek_v3": "kv_b_proj k(0, 8, 16, 4) v(8, 8, 16, 4)",
}
"""Families with fused layers: the layer's own name and the layout of its outputs."""
ATTENTIONS = {"encoder-decoder": 6, "text+vision": 4}
"""Attentions of a model by kind, where not 2."""
OTHER_ATTENTIONS = {
    "albert": 1, "vit_mae": 3, "vilt": 2, "whisper": 6, "speech_to_text": 6, "moonshine": 6,
}  # fmt: skip
ROUND_TRIP = (
    "gpt2", "gpt_bigcode", "codegen", "bloom", "falcon", "llama", "phi3", "deepseek_v3", "mixtral", "bert", "deberta", "albert", "t5",
    "bart", "vit", "swin", "clip", "wav2vec2", "whisper",
)  # fmt: skip
"""One family for each layout and each way of computing attention; what differs between the others is names."""
SAME_ROLE = re.compile(r"(^|[._])(?:W|linear_|query_|key_|value_)?(q|k|v|o|query|key|value|out|dense)(?:_lin|_proj|_b_proj)?$")


def build_or_skip(family_id):
    try:
        return build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))


def find(family_id, **options):
    model, inputs = build_or_skip(family_id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = find_projections(model, inputs, **({"attention": "qkvo"} | options))
    told = [str(w.message) for w in caught if "left as it is" in str(w.message)]
    assert len(told) == (family_id in WARNED)
    assert all(f"'{WARNED[family_id]}" in text for text in told)
    return model, inputs, records


@pytest.mark.parametrize("family_id", [f for f in FAMILIES if f not in REFUSED])
def test_every_attention_has_its_layers(family_id):
    family = FAMILIES[family_id]
    _, _, records = find(family_id)
    count = OTHER_ATTENTIONS.get(family_id, ATTENTIONS.get(family.kind, 2))
    roles = [record.role for record in records if record.role] + [part.name for record in records for part in record.parts]
    extra = 2 if family_id == "deepseek_v3" else 0  # the rotated part of its keys has a layer of its own
    assert {role: roles.count(role) for role in "qkvo"} == {"q": count, "k": count + extra, "v": count, "o": count}
    for record in records:
        name = record.name.rpartition(".")[2]
        if record.parts:
            assert f"{name} " + " ".join(f"{part.name}{part.rows[0]}" for part in record.parts) == FUSED[family_id]
            assert all(len(part.rows) == 1 for part in record.parts)
        elif match := SAME_ROLE.search(name):  # names agree where they say anything
            assert record.role == {"query": "q", "key": "k", "value": "v", "out": "o", "dense": "o"}.get(match[2], match[2])
    assert (family_id in FUSED) == any(record.parts for record in records)


@pytest.mark.parametrize("family_id", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_reason(family_id):
    model, inputs = build_or_skip(family_id)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family_id]):
        find_projections(model, inputs, attention="qkvo")


def outputs(model, inputs):
    torch.manual_seed(0)  # some families draw noise in their forward
    with torch.no_grad():
        found = model(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


@pytest.mark.parametrize("family_id", ROUND_TRIP)
def test_replaced_and_converted_with_every_expert_is_the_replaced_model(family_id):
    model, inputs, records = find(family_id)
    before, original = outputs(model, inputs), estimate_flops(model, inputs).dense_flops
    replace_projections(model, records, None)
    expected = outputs(model, inputs)
    assert any(not torch.allclose(expected[key], before[key]) for key in before), "random MLPs are in use"
    sites = find_ffn_sites(model, inputs)
    mlps = {name for record in records for name in record.mlps}
    assert mlps <= {site.name for site in sites}
    cost = estimate_flops(model, inputs, sites=sites)
    assert cost.dense_flops == pytest.approx(original)
    assert abs(cost.flops_fraction(1.0) - 1) < 0.01, "equal cost, up to a neuron of these widths"
    assert mlps <= {site.name.rpartition(".")[0] for site in find_linear_sites(model, inputs, ffn_sites=sites)}
    convert(model, ConvertConfig(projection_expert_size=5), sites=sites)
    assert {name for name, layer in moe_layers(model).items() if isinstance(layer, MoEProjection)} == mlps
    for key, value in outputs(model, inputs).items():
        # Round-off of a few layers, in units of the largest value; the worst of all families has 1.1e-6.
        assert (value - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max(), key
