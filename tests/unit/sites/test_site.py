"""Site records: canonical views alias the model, and permuting neurons changes nothing but their order."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moeify.errors import ConfigError, UnsupportedModelError
from moeify.sites import (
    FFNSite,
    expert_bounds,
    ffn_dense,
    in_decoder,
    neuron_parameters,
    not_plain_reason,
    permute_neurons,
    site_weights,
    store_by_neuron,
    token_mask_of,
)


class Conv1D(nn.Module):
    """The layout of transformers' Conv1D: (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))


def make_site(**kwargs):
    return FFNSite(**({"name": "", "up": "up", "down": "down", "activation": "silu", "d_model": 4, "d_ff": 6, "d_out": 4} | kwargs))


LAYOUTS = {
    "linear": (lambda: {"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}, {}),
    "no bias": (lambda: {"up": nn.Linear(4, 6, bias=False), "down": nn.Linear(6, 4, bias=False)}, {}),
    "conv1d": (lambda: {"up": Conv1D(6, 4), "down": Conv1D(4, 6)}, {}),
    "gated": (lambda: {"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}, {"gate": "gate"}),
    "gate_up": (lambda: {"up": nn.Linear(4, 12), "down": nn.Linear(6, 4)}, {"fused": "gate_up"}),
    "up_gate": (lambda: {"up": nn.Linear(4, 12), "down": nn.Linear(6, 4)}, {"fused": "up_gate"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permute_neurons_in_every_layout_keeps_the_function_and_the_parameters(layout):
    torch.manual_seed(0)
    leaves, kwargs = LAYOUTS[layout]
    model, site = nn.ModuleDict(leaves()).double(), make_site(**kwargs)
    x_TD, order_F = torch.randn(5, 4, dtype=torch.float64), torch.tensor([3, 1, 5, 0, 2, 4])
    before = site_weights(model, site)
    y_TD, up_FD, down_FD = ffn_dense(x_TD, before, activation="silu"), before.up_FD.clone(), before.down_FD.clone()
    pointers = [p.data_ptr() for p in model.parameters()]

    permute_neurons(model, site, order_F)

    after = site_weights(model, site)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(after.up_FD, up_FD[order_F])
    assert torch.equal(after.down_FD, down_FD[order_F])
    torch.testing.assert_close(ffn_dense(x_TD, after, activation="silu"), y_TD)
    assert after.num_neurons == 6
    assert (after.gate_FD is not None) == site.is_gated


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neuron_parameters_view_tensors_of_a_parameters_shape_by_neuron(layout):
    leaves, kwargs = LAYOUTS[layout]
    model, site = nn.ModuleDict(leaves()), make_site(**kwargs)
    found = neuron_parameters(model, site)
    views = [rows for parameter, rows_of in found for rows in rows_of(parameter.detach())]
    expected = list(site_weights(model, site).per_neuron())
    assert sorted((v.data_ptr(), v.shape, v.stride()) for v in views) == sorted((v.data_ptr(), v.shape, v.stride()) for v in expected)
    copies = [rows for parameter, rows_of in found for rows in rows_of(parameter.detach().clone(memory_format=torch.contiguous_format))]
    assert all(torch.equal(a, b) for a, b in zip(copies, views, strict=True))


def strides(model, name):
    return model[name].weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_by_neuron_in_every_layout_makes_each_neurons_row_contiguous_and_changes_nothing_else(layout):
    leaves, kwargs = LAYOUTS[layout]
    model, site = nn.ModuleDict(leaves()), make_site(**kwargs)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    weights = site_weights(model, site)
    assert weights.down_FD.is_contiguous() == (layout == "conv1d")  # nn.Linear's down, Conv1D's up: one of the two has to move
    assert weights.up_FD.is_contiguous() == (layout != "conv1d")

    store_by_neuron(model, site)

    after = site_weights(model, site)
    rows = [t for t in (after.up_FD, after.gate_FD, after.down_FD) if t is not None]
    assert len(rows) == 2 + site.is_gated
    assert all(t.is_contiguous() for t in rows)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == before.keys()
    for name, (parameter, values) in before.items():
        assert parameters[name] is parameter
        assert parameter.shape == values.shape
        assert torch.equal(parameter, values)
    pointers = [p.data_ptr() for p in model.parameters()]
    store_by_neuron(model, site)
    assert [p.data_ptr() for p in model.parameters()] == pointers, "what lies right already was copied"


@pytest.mark.parametrize("kwargs", [{"fused": "gate_up"}, {"fused": "up_gate"}, {"gate": "gate"}], ids=str)
def test_store_by_neuron_of_a_gated_conv1d_moves_gate_and_up(kwargs):
    model = nn.ModuleDict({"gate": Conv1D(6, 4), "up": Conv1D(12 if "fused" in kwargs else 6, 4), "down": Conv1D(4, 6)})
    values = [p.detach().clone() for p in model.parameters()]
    store_by_neuron(model, make_site(**kwargs))
    weights = site_weights(model, make_site(**kwargs))
    assert weights.up_FD.is_contiguous() and weights.gate_FD.is_contiguous()
    assert strides(model, "down") == (4, 1)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_store_by_neuron_leaves_weights_that_share_memory_with_others_alone():
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    both = torch.randn(2, 4, 6)
    model["down"].weight = nn.Parameter(both[1])
    store_by_neuron(model, make_site())
    assert strides(model, "down") == (6, 1)
    both.zero_()
    assert not model["down"].weight.any(), "no longer the memory that it shared"


def test_store_by_neuron_leaves_a_parameter_tied_between_modules_one_parameter():
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "other": nn.Linear(6, 4)})
    model["other"].weight = model["down"].weight
    values = model["down"].weight.detach().clone()
    store_by_neuron(model, make_site())
    assert model["other"].weight is model["down"].weight
    assert torch.equal(model["other"].weight, values)


def test_store_by_neuron_leaves_meta_tensors_alone():
    with torch.device("meta"):
        model = nn.ModuleDict(LAYOUTS["linear"][0]())
    parameters = list(model.parameters())
    store_by_neuron(model, make_site())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert strides(model, "down") == (6, 1)


@pytest.mark.parametrize(
    ("num_neurons", "num_experts", "bounds"), [(6, 3, (0, 2, 4, 6)), (7, 3, (0, 3, 5, 7)), (2, 2, (0, 1, 2)), (5, 1, (0, 5))]
)
def test_expert_bounds_splits_as_evenly_as_possible(num_neurons, num_experts, bounds):
    assert expert_bounds(num_neurons, num_experts) == bounds


@pytest.mark.parametrize(("num_neurons", "num_experts"), [(3, 4), (3, 0)])
def test_expert_bounds_on_an_impossible_split_raises(num_neurons, num_experts):
    with pytest.raises(ConfigError, match="cannot split"):
        expert_bounds(num_neurons, num_experts)


def test_site_weights_on_meta_tensors_gives_shapes():
    with torch.device("meta"):
        model = nn.ModuleDict(LAYOUTS["linear"][0]())
    assert site_weights(model, make_site()).down_FD.shape == (6, 4)
    assert not_plain_reason(model["up"]) == "is on the meta device"


def test_site_weights_on_an_odd_module_raises():
    model = nn.ModuleDict({"up": nn.Bilinear(4, 4, 6), "down": nn.Linear(6, 4)})
    with pytest.raises(UnsupportedModelError, match="'up' is a Bilinear"):
        site_weights(model, make_site())


def test_not_plain_reason_names_hooks_and_parametrisations():
    hooked, normed, offloaded = nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda module, args: None)
    offloaded._hf_hook = object()
    assert not_plain_reason(nn.Linear(2, 2)) is None
    assert not_plain_reason(hooked) == "has a forward hook"
    assert "Parametrized" in not_plain_reason(normed)
    assert "accelerate" in not_plain_reason(offloaded)


def test_not_plain_reason_tells_another_class_called_linear_from_ours():
    other = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(2, 2)
    assert not_plain_reason(other) == "is a peft.tuners.lora.layer.Linear, not a plain Linear or Conv1D"


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2, 3), True), ((6,), True), ((3, 2), False), ((1, 6), False), ((2,), False), ((2, 1), False), ((2, 3, 1), False)],
)
def test_token_mask_of_fits_batch_and_length_or_flattened_tokens_only(shape, fits):
    mask_BS = torch.tensor([[1, 0, 1], [0, 0, 1]])
    mask_T = token_mask_of(mask_BS, shape)
    assert (mask_T is not None and mask_T.tolist() == [True, False, True, False, False, True]) == fits
    assert fits or mask_T is None
    assert token_mask_of(None, shape) is None
    assert token_mask_of(mask_BS[:, None], shape) is None


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"is_encoder_decoder": True}, "model.decoder.layers.0", True),
        ({"is_encoder_decoder": True}, "model.encoder.layers.0", False),
        ({"is_encoder_decoder": True}, "model.my_decoder.0", False),
        ({"is_encoder_decoder": False}, "model.decoder.layers.0", False),
        ({}, "decoder", False),
    ],
)
def test_in_decoder_is_true_in_the_decoder_of_an_encoder_decoder_only(config, name, expected):
    model = nn.Module()
    model.config = SimpleNamespace(**config)
    assert in_decoder(model, make_site(name=name)) is expected
    assert not in_decoder(nn.Module(), make_site(name=name))
