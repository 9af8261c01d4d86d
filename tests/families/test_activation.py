"""Other activations in every family: seen by discovery, and the same after saving and loading."""

import pytest
import torch
from families.models import SUPPORTED, build

from moeify.errors import UnsupportedModelError
from moeify.sites import find_ffn_sites
from moeify.sparsity import ActivationConfig, set_activation

REFUSED = {
    "bloom": "no entry of BloomForCausalLM's config",
    "mpt": "no entry of MptForCausalLM's config",
    "ctrl": "no entry of CTRLLMHeadModel's config",
    "rwkv": "no module computes its relu2",
    "esm": "no module computes its gelu",
    "dinov2-swiglu": "no entry of Dinov2Model's config",
}
RESTORED = {
    "bert", "electra", "distilbert", "albert", "falcon_h1", "deepseek_v3", "llama4", "siglip", "siglip-vision", "switch_transformers",
    "wav2vec2-conformer",
}  # fmt: skip
"""A head or another part reads the same entry of the config, so that only moeify can load what was changed in the FFNs alone."""


def built(family):
    try:
        return build(family)
    except LookupError as error:
        pytest.skip(str(error))


def output(model, inputs):
    torch.manual_seed(0)  # ViTMAE and ViLT draw patches
    with torch.no_grad():
        result = model(**inputs)
    return next(v for v in result.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


@pytest.mark.parametrize("family", sorted(set(SUPPORTED) - set(REFUSED)))
def test_activation_when_changed_is_found_and_survives_saving(family, tmp_path):
    model, inputs = built(family)
    before = output(model, inputs)
    sites = find_ffn_sites(model, inputs)
    new = "relu2" if "relu" in {site.activation for site in sites} else "relu"
    changed = set_activation(model, sites, ActivationConfig(activation=new))
    assert {site.activation for site in changed} == {new}
    assert find_ffn_sites(model, inputs) == changed
    after = output(model, inputs)
    assert not torch.equal(after, before)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(loaded, inputs), after, rtol=0, atol=1e-6 * after.abs().max().item())  # Switch's buffers round
    assert hasattr(loaded.config, "moeify_activations") == (family in RESTORED)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_activation_when_it_could_not_be_saved_is_refused(family):
    model, inputs = built(family)
    before, config = output(model, inputs), model.config.to_dict()
    sites = find_ffn_sites(model, inputs)
    new = "relu2" if "relu" in {site.activation for site in sites} else "relu"
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        set_activation(model, sites, ActivationConfig(activation="relu" if family == "rwkv" else new))
    assert torch.equal(output(model, inputs), before)
    assert model.config.to_dict() == config
