"""The linear layers of every family's blocks, and what they read."""

import re

import pytest
from families.models import SUPPORTED, build
from torch import nn

from moeify.errors import UnsupportedModelError
from moeify.sites import find_ffn_sites, find_linear_sites


def build_or_skip(family_id):
    try:
        return build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))


def in_layer(sites, layer):
    """role -> last parts of the names of one layer's sites."""
    roles: dict[str, list[str]] = {}
    for site in sites:
        if re.search(rf"\.{layer}\.", site.name):
            roles.setdefault(site.role, []).append(site.name.rpartition(".")[2])
    return roles


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_every_ffn_has_its_layers_and_each_reads_what_another_of_its_block_reads(family_id):
    model, inputs = build_or_skip(family_id)
    ffns = find_ffn_sites(model, inputs)
    sites = {site.name: site for site in find_linear_sites(model, inputs, ffn_sites=ffns)}
    for ffn in ffns:
        assert sites[ffn.down].role == "ffn_hidden"
        assert sites[ffn.down].ffn == (ffn if ffn.is_gated else None)
        assert not any(sites[path].ffn for path in ffn.first)
        assert {sites[path].reads for path in ffn.first} == {ffn.first[0]}
    for site in sites.values():
        assert site.name.startswith(f"{site.block}.") or site.block == site.name
        first = sites[site.reads]
        assert (first.reads, first.role, first.d_in, first.block) == (site.reads, site.role, site.d_in, site.block)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    assert head is None or all(model.get_submodule(name) is not head for name in sites)


@pytest.mark.parametrize(
    ("family_id", "roles"),
    [
        ("llama", "attn_in q_proj k_proj v_proj, attn_out o_proj, ffn_in gate_proj up_proj, ffn_hidden down_proj"),
        ("gpt2", "attn_in c_attn, attn_out c_proj, ffn_in c_fc, ffn_hidden c_proj"),
        ("bert", "attn_in query key value, attn_out dense, ffn_in dense, ffn_hidden dense"),
        ("phi3", "attn_in qkv_proj, attn_out o_proj, ffn_in gate_up_proj, ffn_hidden down_proj"),
    ],
)
def test_roles_of_known_families(family_id, roles):
    model, inputs = build_or_skip(family_id)
    found = in_layer(find_linear_sites(model, inputs), 1)
    assert ", ".join(" ".join([role, *names]) for role, names in found.items()) == roles


def test_layers_of_a_cross_attention_are_grouped_by_what_they_read():
    model, inputs = build_or_skip("t5")
    sites = {site.name: site for site in find_linear_sites(model, inputs)}
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert [sites[f"{cross}.{name}"].reads.rpartition(".")[2] for name in "qkvo"] == ["q", "k", "k", "o"]
    assert [sites[f"{cross}.{name}"].role for name in "qkvo"] == ["attn_in", "attn_in", "attn_in", "attn_out"]


def test_a_layer_that_cannot_be_read_is_named():
    model, inputs = build_or_skip("llama")
    ffns = find_ffn_sites(model, inputs)
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.self_attn\.q_proj' has a forward hook"):
        find_linear_sites(model, inputs, ffn_sites=ffns)


def test_the_model_is_left_as_it_was():
    model, inputs = build_or_skip("llama")
    model.train()
    find_linear_sites(model, inputs)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))
