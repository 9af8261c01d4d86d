"""Projections with int8 weights: rounding, forward, and what survives casts, copies and pickling."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from moeify.sites import FFNSite, dequantize_site, has_int8, not_plain_reason, permute_neurons, quantize_site, site_weights, store_by_neuron
from moeify.sites.formula import ffn_dense
from moeify.sites.int8 import Int8DownLinear, Int8Linear, dequantize, quantize_rows, to_int8

LAYOUTS = {
    "linear": lambda: {"up": nn.Linear(4, 6), "down": nn.Linear(6, 5)},
    "gated, no bias": lambda: {"gate": nn.Linear(4, 6, bias=False), "up": nn.Linear(4, 6, bias=False), "down": nn.Linear(6, 5, bias=False)},
    "conv1d": lambda: {"up": Conv1D(6, 4), "down": Conv1D(5, 6)},
    "gate_up": lambda: {"up": nn.Linear(4, 12), "down": nn.Linear(6, 5)},
    "up_gate": lambda: {"up": nn.Linear(4, 12), "down": nn.Linear(6, 5)},
    "as wide as deep": lambda: {"up": nn.Linear(6, 6), "down": nn.Linear(6, 6)},
}


def case(layout):
    model = nn.ModuleDict(LAYOUTS[layout]())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    fused = layout if layout in ("gate_up", "up_gate") else None
    d_model, d_out = (6, 6) if layout == "as wide as deep" else (4, 5)
    gate = "gate" if "gate" in model else None
    site = FFNSite(name="", up="up", down="down", gate=gate, fused=fused, activation="silu", d_model=d_model, d_ff=6, d_out=d_out)
    return model, site


def forward(model, site, x):
    up = model["up"](x)
    if site.fused:
        first, second = up.chunk(2, dim=-1)
        gate, up = (first, second) if site.fused == "gate_up" else (second, first)
    else:
        gate = model["gate"](x) if site.gate else None
    return model["down"](nn.functional.silu(up) if gate is None else nn.functional.silu(gate) * up)


def test_quantize_rows_of_a_hand_computed_case():
    rows = torch.tensor([[127.0, -63.5, 0.5, 1.5, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [-2.54, 0.02, 0.01, 0.0, 2.54]])
    q, scale = quantize_rows(rows)
    assert q.dtype is torch.int8
    assert scale.dtype is torch.float32
    assert scale.tolist() == pytest.approx([1.0, 0.0, 0.02])
    assert q.tolist() == [[127, -64, 0, 2, 0], [0, 0, 0, 0, 0], [-127, 1, q[2, 2].item(), 0, 127]]  # halves go to the even integer
    assert dequantize(q, scale[:, None], dtype=torch.float32)[1].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4], ids=str)
def test_quantize_rows_is_symmetric_and_off_by_half_a_step_at_most(dtype, size):
    rows = (torch.randn(20, 33, dtype=torch.float64) * size).to(dtype)
    rows[3] = 0
    q, scale = quantize_rows(rows)
    assert q.abs().max() == 127
    assert q.min() >= -127
    off = (dequantize(q, scale[:, None], dtype=torch.float64) - rows.double()).abs()
    assert (off <= scale.double()[:, None] * 0.5001).all()
    minus_q, minus_scale = quantize_rows(-rows)
    assert torch.equal(minus_q, -q)
    assert torch.equal(minus_scale, scale)


def test_quantize_rows_of_transposed_rows_comes_out_contiguous():
    rows = torch.randn(8, 3)
    q, _ = quantize_rows(rows.t().contiguous().t())
    assert q.is_contiguous()
    assert torch.equal(q, quantize_rows(rows)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_site_keeps_a_row_per_neuron_under_the_weights_name_and_close_to_it(layout):
    model, site = case(layout)
    names, before = set(dict(model.named_parameters())), site_weights(model, site)
    x_TD = torch.randn(7, site.d_model)
    expected = forward(model, site, x_TD)
    assert not has_int8(model, site)

    quantize_site(model, site)

    assert has_int8(model, site)
    weights = site_weights(model, site)
    scales = {f"{name}.weight_scale" for name in model}
    assert set(model.state_dict()) == set(dict(model.named_parameters())) == names | scales
    assert all(model[name].weight.shape[0] == 1 and model[name].weight.dim() == 3 for name in model), "a shape that no dense layer has"
    assert all(not_plain_reason(module) is None for module in model.values())
    for matrix in ("up_FD", "gate_FD", "down_FD"):
        if (float_FD := getattr(before, matrix)) is not None:
            q_FD = getattr(weights, matrix)
            # one scale for each output of the projection, as long as its bias: neurons, but of the down projection the FFN's outputs
            scale_1D = weights.down_scale_D[None] if matrix == "down_FD" else getattr(weights, matrix.replace("FD", "scale_F"))[:, None]
            assert (q_FD.dtype, q_FD.shape, q_FD.stride()) == (torch.int8, float_FD.shape, (float_FD.shape[1], 1))
            assert ((q_FD * scale_1D - float_FD).abs() <= 0.501 * scale_1D).all()
            assert q_FD.abs().amax(0 if matrix == "down_FD" else 1).eq(127).all(), "the largest of each output has all of the range"
    out = forward(model, site, x_TD)
    torch.testing.assert_close(out, ffn_dense(x_TD, weights.dequantized(torch.float32), activation="silu"))
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantize_site_gives_the_dense_layers_back(layout):
    model, site = case(layout)
    dense = {name: (type(module), module.weight.shape) for name, module in model.items()}
    names, x_TD = list(model.state_dict()), torch.randn(7, site.d_model)
    quantize_site(model, site)
    expected = forward(model, site, x_TD)

    dequantize_site(model, site, dtype=torch.float32)

    assert {name: (type(module), module.weight.shape) for name, module in model.items()} == dense
    assert list(model.state_dict()) == names
    assert all(p.requires_grad and p.dtype is torch.float32 and p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(forward(model, site, x_TD), expected)


def test_permute_neurons_takes_the_neurons_scales_along():
    model, site = case("gate_up")
    quantize_site(model, site)
    x_TD = torch.randn(7, 4)
    expected, order = forward(model, site, x_TD), torch.tensor([3, 1, 5, 0, 2, 4])
    up_scale_F, down_scale_D = site_weights(model, site).up_scale_F.clone(), site_weights(model, site).down_scale_D.clone()
    permute_neurons(model, site, order)
    after = site_weights(model, site)
    assert torch.equal(after.up_scale_F, up_scale_F[order])
    assert torch.equal(after.down_scale_D, down_scale_D)
    torch.testing.assert_close(forward(model, site, x_TD), expected)


def test_store_by_neuron_has_nothing_to_do():
    model, site = case("conv1d")
    quantize_site(model, site)
    pointers = [p.data_ptr() for p in model.parameters()]
    store_by_neuron(model, site)
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()])
def test_casts_change_biases_and_leave_integers_and_scales_bit_equal(cast):
    model, site = case("linear")
    quantize_site(model, site)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    dtype = cast(model)["up"].bias.dtype
    assert dtype is not torch.float32
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        if name.endswith("bias"):
            assert parameter.dtype is dtype
        else:
            assert torch.equal(parameter, before[name][1])
            assert parameter.dtype is (torch.int8 if name.endswith("weight") else torch.float32)
    assert forward(model, site, torch.randn(3, 4, dtype=dtype)).dtype is dtype


def test_moving_to_another_device_and_back_onto_memory_keeps_the_types():
    model, site = case("linear")
    quantize_site(model, site)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    assert model["up"].weight_scale.dtype is torch.float32
    assert model["up"].weight.dtype is torch.int8


def test_a_skeleton_on_the_meta_device_takes_the_integers_of_another_model():
    model, site = case("conv1d")
    with torch.device("meta"):
        skeleton = nn.ModuleDict(LAYOUTS["conv1d"]())
    quantize_site(model, site)
    quantize_site(skeleton, site)
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    skeleton.load_state_dict(model.state_dict(), assign=True)
    x_TD = torch.randn(3, 4)
    assert torch.equal(forward(skeleton, site, x_TD), forward(model, site, x_TD))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(clone):
    model, site = case("conv1d")
    quantize_site(model, site)
    other, x_TD = clone(model), torch.randn(3, 4)
    assert torch.equal(forward(other, site, x_TD), forward(model, site, x_TD))
    dequantize_site(other, site, dtype=torch.float32)
    assert has_int8(model, site)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layers_refuse_the_state_of_int8_ones_and_the_reverse(layout):
    model, site = case(layout)
    dense = copy.deepcopy(model)
    quantize_site(model, site)
    for name in dense:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            dense[name].load_state_dict(model[name].state_dict(), strict=False)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            model[name].load_state_dict(dense[name].state_dict(), strict=False)


def test_gradients_reach_the_input_and_the_bias_and_not_the_integers():
    model, site = case("gate_up")
    quantize_site(model, site)
    x_TD = torch.randn(3, 4, requires_grad=True)
    forward(model, site, x_TD).sum().backward()
    assert x_TD.grad.abs().sum() > 0
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"up.bias", "down.bias"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "weight" in name)


def test_the_change_is_in_place_so_that_hooks_and_references_stay():
    linear = nn.Linear(4, 6)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    to_int8(linear, linear.weight, cls=Int8Linear)
    linear(torch.randn(2, 4))
    assert (type(linear), seen) == (Int8Linear, [1])
    assert "rows=6, width=4, bias=True, was=Linear" in repr(linear)


def test_other_integer_weights_are_still_not_plain():
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    assert not_plain_reason(linear) == "has torch.int8 weights"
    assert issubclass(Int8DownLinear, Int8Linear)
