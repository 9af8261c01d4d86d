"""Tiny models of every family, converted: the dense function with all experts on, the masked one with some; saved, loaded, generating."""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
from families.models import SUPPORTED, build
from torch import nn
from transformers import AutoConfig

from moeify.controls import set_impl, set_mode, set_rule
from moeify.convert import ConvertConfig, convert, to_dense
from moeify.hf.load import weight_files
from moeify.hf.skeleton import check_headers
from moeify.kernels import impls_for
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig
from moeify.select import DynKMass, DynKMax, TopK
from moeify.sites import expert_bounds, find_ffn_sites, permute_neurons
from moeify.split import RandomSplit

EXPERT_SIZE = 7  # divides no F of the table: experts of two sizes
ALL, HALF = DynKMax(tau=0.0), TopK(k=4)


def build_or_skip(family_id):
    try:
        return build(family_id)
    except LookupError as missing:
        pytest.skip(str(missing))


@functools.cache
def sites_of(family_id):
    """Discovery costs more than all the rest; sites are immutable."""
    return tuple(find_ffn_sites(*build(family_id)))


def converted(family_id, *, rule=ALL):
    model, inputs = build_or_skip(family_id)
    config = ConvertConfig(expert_size=EXPERT_SIZE, router=NormRouterConfig(width=4), split=RandomSplit(), rule=rule)
    convert(model, config, sites=sites_of(family_id))
    return model, inputs


@torch.no_grad()
def outputs(model, inputs):
    """Every floating tensor that the model returns; some families draw noise in their forward."""
    torch.manual_seed(0)
    found = model(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def round_off(model, inputs, family_id):
    """What re-association alone does to each output: the largest change when the neurons of the dense model are reordered.

    Reordering changes nothing but the order of the additions over F, which is also all that a kernel may change; what follows in the
    model amplifies both alike. A kernel adds in one more order, so it gets four times the largest of three reorderings, and one rounding.
    """
    before = outputs(model, inputs)
    largest = dict.fromkeys(before, 0.0)
    model = copy.deepcopy(model)
    for seed in range(3):
        for site in sites_of(family_id):
            permute_neurons(model, site, torch.randperm(site.d_ff, generator=torch.Generator().manual_seed(seed)))
        for key, value in outputs(model, inputs).items():
            largest[key] = max(largest[key], (value - before[key]).abs().max().item())
    return {key: 4 * value + torch.finfo(before[key].dtype).eps * before[key].abs().max().item() for key, value in largest.items()}


def assert_same(found, expected, within):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.isfinite().all()
        error = (value - expected[key]).abs().max().item()
        assert error <= within[key], f"{key}: error {error:.2e} exceeds round-off {within[key]:.2e}"


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []


class ScoresByToken(nn.Module):
    """Scores that do not look at the input, so that rounding in an earlier layer cannot change a selection."""

    def __init__(self, num_experts, seed):
        super().__init__()
        self.num_experts, self.seed = num_experts, seed

    def forward(self, x_TD, weights=None):
        return torch.rand(x_TD.shape[0], self.num_experts, generator=torch.Generator().manual_seed(self.seed))


def mask_by_hand(model, layer):
    """Hooks that run one dense FFN masked: an expert at a time, from the definition; independent of the executor."""
    site, rule, router = layer.site, layer.rule, layer.router
    bounds = expert_bounds(site.d_ff, layer.num_experts)

    def mask_hidden(_module, args):
        rows_TF = args[0].reshape(-1, site.d_ff).clone()
        mask_TE = rule(router(rows_TF[:, : site.d_model]))
        for e in range(layer.num_experts):
            rows_TF[~mask_TE[:, e], bounds[e] : bounds[e + 1]] = 0
        return (rows_TF.reshape(args[0].shape), *args[1:])

    model.get_submodule(site.down).register_forward_pre_hook(mask_hidden)


def replace_by_a_stranger(model, path):
    """Put another module with the same weights in the place of a projection, as other libraries do; it knows nothing of the executor."""
    parent, _, name = path.rpartition(".")
    stranger = copy.copy(model.get_submodule(path))
    del stranger.__dict__["forward"]
    stranger.__dict__["_forward_pre_hooks"] = OrderedDict()
    setattr(model.get_submodule(parent), name, stranger)


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_convert_with_all_experts_on_equals_the_dense_model(family_id):
    model, inputs = build_or_skip(family_id)
    dense, within = outputs(model, inputs), round_off(model, inputs, family_id)
    names = dict(model.named_parameters())

    model, inputs = converted(family_id)

    layers = moe_layers(model)
    assert sorted(layers) == sorted(site.name for site in sites_of(family_id))
    assert all(layer.masked_reason() is None for layer in layers.values())
    kept = {name: p for name, p in model.named_parameters() if ".moe.router." not in f".{name}"}
    assert {name: p.shape for name, p in kept.items()} == {name: p.shape for name, p in names.items()}
    for impl in (*impls_for("cpu"), "auto"):
        set_impl(model, impl)
        assert_same(outputs(model, inputs), dense, within)

    set_mode(model, "dense")
    in_dense_mode = outputs(model, inputs)
    assert_same(in_dense_mode, dense, within)
    in_order_of_shape = copy.deepcopy(model)
    for parameter in in_order_of_shape.parameters():
        parameter.data = parameter.data.contiguous()  # as `to_dense` leaves them: strides decide how torch's GEMMs round

    to_dense(model)
    assert moe_layers(model) == {}
    assert {name for name, _ in model.named_parameters()} == set(names)
    assert_bit_equal(outputs(model, inputs), outputs(in_order_of_shape, inputs))


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_convert_with_a_sparse_rule_equals_masking_by_hand(family_id):
    model, inputs = converted(family_id, rule=HALF)
    for i, layer in enumerate(moe_layers(model).values()):
        layer.router = ScoresByToken(layer.num_experts, seed=i)
    by_hand, layers = copy.deepcopy(model), moe_layers(model)
    to_dense(by_hand)
    within = round_off(by_hand, inputs, family_id)
    dense = outputs(by_hand, inputs)
    for layer in layers.values():
        mask_by_hand(by_hand, layer)
    masked = outputs(by_hand, inputs)

    assert any((masked[key] - dense[key]).abs().max() > 100 * within[key] for key in dense)
    for impl in (*impls_for("cpu"), "auto"):
        set_impl(model, impl)
        assert_same(outputs(model, inputs), masked, within)

    for layer in layers.values():
        for path in (*layer.site.first, layer.site.down):
            replace_by_a_stranger(model, path)
    assert all("was replaced by another" in layer.masked_reason() for layer in layers.values())
    assert_same(outputs(model, inputs), masked, within)


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_save_and_load_in_moe_mode_is_bit_equal(family_id, tmp_path):
    model, inputs = converted(family_id, rule=DynKMass(mass=0.7))
    before = outputs(model, inputs)

    model.save_pretrained(tmp_path)
    check_headers(type(model), AutoConfig.from_pretrained(tmp_path), weight_files(tmp_path), source=family_id)
    loaded = type(model).from_pretrained(tmp_path).eval()

    assert {name: layer.rule for name, layer in moe_layers(loaded).items()} == dict.fromkeys(moe_layers(model), DynKMass(mass=0.7))
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()  # tensors in a mapped file are not aligned, and a GEMM may add in another order then
    assert_bit_equal(outputs(loaded, inputs), before)


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_int8_weights_run_in_every_kernel_and_load_bit_equal(family_id, tmp_path):
    if family_id == "rwkv":
        pytest.skip("its own forward divides weights in place, which integers refuse")
    model, inputs = converted(family_id, rule=DynKMass(mass=0.7))
    quantize(model)
    for layer in moe_layers(model).values():
        layer.router = ScoresByToken(layer.num_experts, seed=0)
    set_impl(model, "reference")
    expected = outputs(model, inputs)
    for impl in (*impls_for("cpu"), "auto"):
        set_impl(model, impl)
        for key, value in outputs(model, inputs).items():
            assert (value - expected[key]).abs().max() <= 1e-3 * expected[key].abs().max(), (impl, key)

    model, inputs = converted(family_id, rule=DynKMass(mass=0.7))
    quantize(model)
    before = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    check_headers(type(model), AutoConfig.from_pretrained(tmp_path), weight_files(tmp_path), source=family_id)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert_bit_equal(outputs(loaded, inputs), before)


@pytest.mark.parametrize("family_id", SUPPORTED)
def test_generate_with_all_experts_on_says_what_the_dense_model_says(family_id):
    model, inputs = converted(family_id)
    if not model.can_generate():
        pytest.skip(f"{type(model).__name__} does not generate")
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    in_moe_mode = model.generate(**inputs, **options)
    set_mode(model, "dense")
    assert torch.equal(model.generate(**inputs, **options), in_moe_mode)

    set_mode(model, "moe")
    set_rule(model, HALF)
    assert model.generate(**inputs, **options).shape == in_moe_mode.shape


@pytest.mark.parametrize("impl", [*impls_for("cpu"), "auto"])
def test_a_residual_added_in_place_to_the_output_corrupts_neither_weights_nor_gradients(impl):
    # Falcon's block does `mlp_output += residual` on the very tensor that the executor returned.
    model, inputs = converted("falcon")
    set_impl(model, impl)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {}
    for mode in ("dense", "moe"):
        set_mode(model, mode)
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads[mode] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert grads["moe"].keys() == grads["dense"].keys()
    assert any("dense_h_to_4h" in name for name in grads["moe"])
    for name, grad in grads["moe"].items():
        torch.testing.assert_close(grad, grads["dense"][name])
