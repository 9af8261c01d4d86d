"""Gated FFNs of every family whose layers skip input channels: as one native call they give what the layers give one by one."""

import pytest
import torch
from families.models import FAMILIES, SUPPORTED, build
from ffn_cases import needs_library

from moeify.channels import SparseInput, attach_channels, sparse_inputs
from moeify.kernels.cpu import ACTIVATIONS
from moeify.kernels.cpu_linear import SparseGated
from moeify.sites import find_linear_sites

GATED = [name for name in SUPPORTED if FAMILIES[name].form != "plain"]


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("family_id", GATED)
def test_a_gated_ffn_in_one_call_equals_its_layers_one_by_one(family_id, monkeypatch):
    try:
        model, inputs = build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))
    for site in find_linear_sites(model, inputs):
        executor = SparseInput(site)
        executor.level_K.fill_(0.3 if site.role == "ffn_in" else 0.05)
        attach_channels(model, executor)
    calls = []
    call = SparseGated.__call__
    monkeypatch.setattr(SparseGated, "__call__", lambda native, x: calls.append(native) or call(native, x))
    torch.manual_seed(0)
    as_one = model(**inputs)[0]
    ffns = [e.site.ffn for e in sparse_inputs(model).values() if e.site.ffn is not None]
    assert len(calls) == sum(ffn.activation in ACTIVATIONS for ffn in ffns) and ffns
    for executor in sparse_inputs(model).values():
        executor.gated = None
    torch.manual_seed(0)
    torch.testing.assert_close(as_one, model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert len(calls) <= len(ffns)
