"""Discovery on tiny models of every family in the table: what it finds, and why it refuses the rest."""

import pytest
from families.models import FAMILIES, REFUSED, SUPPORTED, Family, build
from torch import nn

from moeify.errors import UnsupportedModelError
from moeify.sites import FFNSite, discover, find_ffn_sites, site_weights


def build_or_skip(family_id):
    try:
        return build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))


def per_site(value, family: Family) -> list[str]:
    return list(value) if isinstance(value, tuple) else [value] * family.sites


def forms(model: nn.Module, family: Family) -> list[str]:
    fused = family.fused_in is not None and any(name.endswith(f".{family.fused_in}") for name, _ in model.named_modules())
    return per_site("gate_up" if fused else family.form, family)


def form(site: FFNSite) -> str:
    return "gated" if site.gate is not None else site.fused or "plain"


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_discover_on_a_supported_family_finds_every_ffn_and_its_formula(family_id):
    family = FAMILIES[family_id]
    model, inputs = build_or_skip(family_id)

    found = discover(model, inputs)

    assert len(found.sites) == family.sites
    assert [form(site) for site in found.sites] == forms(model, family)
    assert [site.activation for site in found.sites] == per_site(family.activation, family)
    for site in found.sites:
        weights = site_weights(model, site)
        biases = [b for b in (weights.up_bias_F, weights.gate_bias_F, weights.down_bias_D) if b is not None]
        assert len(biases) == ((3 if site.is_gated else 2) if family.bias else 0)
        assert weights.up_FD.shape == weights.down_FD.shape == (site.d_ff, site.d_model)
        assert site.d_out == site.d_model
        assert not site.explicit_width  # stand-ins of width 1 do in every family of the table
        assert all(path.startswith(f"{site.name}.") for path in (*site.first, site.down))
    assert len({site.name for site in found.sites}) == family.sites
    if family.refused is None:
        assert not found.refused
    else:
        assert any(family.refused in refusal.reason for refusal in found.refused)


@pytest.mark.parametrize("family_id", REFUSED)
def test_find_ffn_sites_on_a_refused_family_raises_with_the_reason(family_id):
    reason = FAMILIES[family_id].refused
    assert reason is not None
    model, inputs = build_or_skip(family_id)

    with pytest.raises(UnsupportedModelError) as error:
        find_ffn_sites(model, inputs)

    assert reason in str(error.value)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family_id", "name", "up", "down"),
    [
        pytest.param("opt", "model.decoder.layers.0", "fc1", "fc2", id="the layer itself"),
        pytest.param("bert", "bert.encoder.layer.0", "intermediate.dense", "output.dense", id="split over two modules"),
        pytest.param("ctrl", "transformer.h.0", "ffn.0", "ffn.2", id="a Sequential cannot be the host"),
        pytest.param("t5", "encoder.block.0.layer.1.DenseReluDense", "wi", "wo", id="own module"),
    ],
)
def test_discover_names_the_innermost_module_that_can_host_the_executor(family_id, name, up, down):
    model, inputs = build_or_skip(family_id)
    site = find_ffn_sites(model, inputs)[0]
    assert (site.name, site.up, site.down) == (name, f"{name}.{up}", f"{name}.{down}")


def test_the_table_supports_enough_families():
    assert len(SUPPORTED) >= 45
    assert len({FAMILIES[i].config for i in SUPPORTED}) >= 45
