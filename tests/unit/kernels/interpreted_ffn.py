"""The Triton kernels of experts in Triton's interpreter; test_triton_ffn.py runs this with TRITON_INTERPRET=1.

Letters: T tokens, D input width, O output width, F FFN width, E experts.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, random_ffn, random_plan, tensors_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate_as_torch
from tiny import convert_tiny, tiny_inputs, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.controls import set_impl
from moeify.errors import KernelError
from moeify.kernels import build_plan, explain, gpu_ffn, impls_for, masked, moe_ffn, reference, tiles, triton_ffn, triton_union
from moeify.kernels.tiles import FFNTiles
from moeify.layers import moe_layers
from moeify.select import DynKMass, DynKMax, TopK
from moeify.sites.formula import ACTIVATIONS
from moeify.sites.int8 import quantize_rows
from moeify.sites.site import FFNWeights

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # numpy, of triton 3.6's interpreter
]
RAGGED = tiles.UNION_TOKENS + 1
SHAPES = [
    pytest.param(1, 4, 64, 32, 0.5, id="decode: one token"),
    pytest.param(1, 5, 83, 23, 0.4, id="decode: experts differ by one neuron, unaligned widths"),
    pytest.param(7, 5, 83, 23, 0.3, id="decode: several tokens, odd everything"),
    pytest.param(40, 6, 96, 32, 0.05, id="batch: some experts get no token, some tokens no expert"),
    pytest.param(70, 3, 150, 16, 0.4, id="batch: more tokens than a tile, wide experts"),
    pytest.param(9, 8, 128, 32, 0.0, id="no pair at all"),
    pytest.param(30, 20, 20, 16, 0.3, id="experts of one neuron"),
    pytest.param(20, 4, 64, 32, 1.0, id="all experts: equals dense"),
    pytest.param(RAGGED, 3, 50, 17, 0.3, id="ragged: thin experts"),
    pytest.param(RAGGED, 2, 384, 16, 0.02, id="ragged: thick experts, few pairs"),
    pytest.param(0, 4, 16, 8, 0.5, id="no token"),
]
KINDS = [
    pytest.param("relu", False, True, False, torch.float16, id="plain, biased, fp16"),
    pytest.param("silu", True, False, False, torch.float32, id="gated, fp32"),
    pytest.param("gelu_tanh", True, True, True, torch.float16, id="gated, biased, as Conv1D stores it, fp16"),
]


def wider(weights: FFNWeights, O: int) -> FFNWeights:  # noqa: E741
    """The same FFN with other outputs."""
    down_FD = torch.randn(weights.num_neurons, O).to(weights.up_FD.dtype) / weights.num_neurons**0.5
    bias = None if weights.down_bias_D is None else torch.randn(O).to(down_FD.dtype)
    return dataclasses.replace(weights, down_FD=down_FD, down_bias_D=bias)


def check(out, x_TD, weights, plan, *, activation):
    oracle = loop_over_tokens(x_TD.double(), map_weights(weights, torch.Tensor.double), plan.mask_TE, activation=activation)
    assert_as_accurate_as_torch(out, oracle=oracle, baseline=masked.moe_ffn(x_TD, weights, plan, activation=activation))


@pytest.mark.parametrize(("activation", "gated", "biased", "conv1d", "dtype"), KINDS)
@pytest.mark.parametrize(("T", "E", "F", "D", "keep"), SHAPES)
def test_it_is_as_accurate_as_torch(dtype, activation, gated, biased, conv1d, T, E, F, D, keep):
    weights = random_ffn(D, F, gated=gated, biased=biased, dtype=dtype, conv1d=conv1d)
    x_TD, plan = torch.randn(T, D).to(dtype), random_plan(T, E, keep)
    check(moe_ffn(x_TD, weights, plan, activation=activation, impl="triton"), x_TD, weights, plan, activation=activation)


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.sampled_from([1, 2, 16, 33]),
    E=st.integers(1, 9),
    extra=st.integers(0, 60),
    D=st.integers(1, 40),
    O=st.integers(1, 40),
    neurons=st.sampled_from([16, 32]),
    channels=st.sampled_from([16, 32]),
    outputs=st.sampled_from([16, 32]),
    depth=st.sampled_from([16, 32]),
    splits=st.integers(1, 3),
    group=st.integers(1, 3),
    by_token=st.booleans(),
    keep=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_tiles(T, E, extra, D, O, neurons, channels, outputs, depth, splits, group, by_token, keep, seed):  # noqa: E741
    torch.manual_seed(seed)
    F = E + extra
    weights, x_TD, plan = wider(random_ffn(D, F, gated=True, biased=True), O), torch.randn(T, D), random_plan(T, E, keep)
    sides = {"neurons": neurons, "channels": channels, "outputs": outputs, "depth": depth}
    few = FFNTiles(tokens=1 if T == 1 else 16, neurons_per_split=-(-F // depth // splits) * depth, **sides)
    check(triton_ffn.union(x_TD, weights, plan.mask_TE, activation="silu", tiles=few), x_TD, weights, plan, activation="silu")

    many = FFNTiles(tokens=16, experts_per_group=group, **sides)
    ragged = triton_ffn.order_pairs(plan.mask_TE, num_neurons=F, experts_per_group=group, room=T * E)
    same = {"activation": "silu", "tiles": many}
    h, _ = triton_ffn.hidden(x_TD, weights, plan.mask_TE, ragged, by_token=by_token, keep=False, **same)
    if by_token:
        y_TO = torch.addmm(weights.down_bias_D, h, weights.down_FD)
    else:
        y_TO = weights.down_bias_D.repeat(T, 1)
        triton_ffn.add_up(y_TO, ragged, [(h, weights.down_FD)], num_tokens=T, num_experts=E, tiles=many)
    check(y_TO, x_TD, weights, plan, activation="silu")


def test_more_splits_of_one_token_than_are_added_at_once():
    weights, x_TD, plan = random_ffn(24, 1200, gated=True, biased=True), torch.randn(1, 24), random_plan(1, 75, 0.5)
    tiles = FFNTiles(tokens=1, neurons=16, channels=32, outputs=16, depth=16, neurons_per_split=16)
    assert 1200 // tiles.neurons_per_split > 2 * triton_union.SPLITS_AT_ONCE
    check(triton_ffn.union(x_TD, weights, plan.mask_TE, activation="silu", tiles=tiles), x_TD, weights, plan, activation="silu")


@pytest.mark.parametrize(("T", "E", "group"), [(50, 7, 1), (50, 7, 3), (300, 40, 1), (257, 70, 2)])
def test_pairs_are_in_the_order_of_the_plan(T, E, group):
    plan = random_plan(T, E, 0.3)
    ragged = triton_ffn.order_pairs(plan.mask_TE, num_neurons=2 * E, experts_per_group=group, room=100_000)
    by_group = build_plan(torch.stack([part.any(1) for part in plan.mask_TE.split(group, 1)], 1))
    assert ragged.offset_G1.equal(by_group.offsets_E1)
    assert ragged.token_C[: by_group.num_pairs].equal(by_group.token_N.int())
    assert ragged.pair_TG[by_group.mask_TE].sort().values.equal(torch.arange(by_group.num_pairs, dtype=torch.int32))
    assert ragged.pair_TG.ge(0).equal(by_group.mask_TE)
    assert ragged.room == T * by_group.num_experts, "more room than pairs there can be"
    short = triton_ffn.order_pairs(plan.mask_TE, num_neurons=2 * E, experts_per_group=group, room=5)
    assert short.offset_G1.max() == 5 and short.token_C.equal(ragged.token_C[:5]), "what has no room is left out, not written"


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("down_by_neuron", [True, False])
def test_experts_that_nobody_selects_are_not_read(T, down_by_neuron):
    weights, mask_TE = random_ffn(24, 96, gated=True), torch.zeros(T, 12, dtype=torch.bool)
    mask_TE[0, [1, 2, 7]] = True
    mask_TE[-1, 11] = True
    plan = build_plan(mask_TE)
    if down_by_neuron:
        weights = dataclasses.replace(weights, down_FD=weights.down_FD.contiguous())
    x_TD = torch.randn(T, 24)
    expected = masked.moe_ffn(x_TD, weights, plan, activation="silu")
    unread_F = ~plan.mask_TE.any(0).repeat_interleave(8)
    poisoned = map_weights(weights, lambda t: t.clone(memory_format=torch.preserve_format))
    for matrix in (poisoned.up_FD, poisoned.gate_FD, poisoned.down_FD):
        matrix[unread_F] = math.nan
    torch.testing.assert_close(moe_ffn(x_TD, poisoned, plan, activation="silu", impl="triton"), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy, of sigmoid far out: it is 0 there
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "shifted_relu:0.25"])
def test_every_activation_and_its_derivative(activation):
    """One neuron an expert, weights of one: y = act(x), dL/dx = act'(x), also at the kinks and far out."""
    z = torch.cat([torch.linspace(-30, 30, 97), torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 0.25, 1e4, -1e4])])
    one = FFNWeights(torch.ones(1, 1), torch.ones(1, 1))
    plan = build_plan(torch.ones(len(z), 1, dtype=torch.bool))

    def both(dtype, function):
        x = z.to(dtype)[:, None].requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    found = both(torch.float32, lambda x: moe_ffn(x, one, plan, activation=activation, impl="triton"))
    oracle = both(torch.float64, ACTIVATIONS[activation])
    for got, exact in zip(found, oracle, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=4e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("T", [1, 3])
def test_what_is_no_number_stays_with_its_token(T):
    weights, plan = random_ffn(16, 32), build_plan(torch.ones(T, 2, dtype=torch.bool))
    x_TD = torch.randn(T, 16)
    x_TD[0, 3] = math.nan
    y_TD = moe_ffn(x_TD, weights, plan, activation="relu", impl="triton")
    assert y_TD[0].isnan().all() and not y_TD[1:].isnan().any()


@pytest.mark.parametrize(
    ("T", "most", "thick"), [(1, 512, 192), (3, 512, 192), (3, 2, 192), (3, 2, 8)], ids=["one", "few", "thin", "thick"]
)
def test_int8_weights_are_read_as_they_are(monkeypatch, T, most, thick):
    monkeypatch.setattr(gpu_ffn, "UNION_TOKENS", most)
    monkeypatch.setattr(tiles, "ATOMIC_NEURONS", thick)
    floating = random_ffn(24, 48, gated=True, biased=True)
    (up, up_scale), (gate, gate_scale) = quantize_rows(floating.up_FD), quantize_rows(floating.gate_FD)
    down, down_scale = quantize_rows(floating.down_FD.t())
    matrices = {"up_FD": up, "gate_FD": gate, "down_FD": down.t()}
    scales = {"up_scale_F": up_scale, "gate_scale_F": gate_scale, "down_scale_D": down_scale}
    weights = dataclasses.replace(floating, **matrices, **scales)
    x_TD, plan = torch.randn(T, 24), random_plan(T, 6, 0.5)
    check(moe_ffn(x_TD, weights, plan, activation="silu", impl="triton"), x_TD, weights.dequantized(torch.float32), plan, activation="silu")


@pytest.mark.parametrize(("impl", "dtype"), [("triton", torch.float32), ("triton_recompute", torch.float16)])
@pytest.mark.parametrize(
    ("T", "E", "F", "D", "gated", "conv1d"),
    [
        pytest.param(7, 4, 64, 32, True, False, id="gated"),
        pytest.param(37, 5, 83, 23, True, True, id="odd everything, as Conv1D stores it"),
        pytest.param(33, 2, 384, 16, False, False, id="thick experts: atomics, more pairs than a tile"),
        pytest.param(20, 6, 18, 16, True, False, id="thin experts in one group"),
    ],
)
def test_gradients_are_as_accurate_as_torchs(impl, dtype, T, E, F, D, gated, conv1d):
    weights = random_ffn(D, F, gated=gated, biased=not gated or conv1d, dtype=dtype, conv1d=conv1d)
    x_TD, plan, upstream_TD = torch.randn(T, D).to(dtype), random_plan(T, E, 0.4), torch.randn(T, D).to(dtype)
    probs_TE = torch.rand(T, E) if F != 18 else None  # what routers learn from keeps experts apart

    def gradients(function, dtype):
        x = x_TD.to(dtype).requires_grad_()
        w = map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
        probs = None if probs_TE is None else probs_TE.to(dtype if dtype is torch.float64 else torch.float32).requires_grad_()
        y = function(x, w, build_plan(plan.mask_TE, probs))
        return [y.detach(), *torch.autograd.grad(y, [x, *tensors_of(w), *([] if probs is None else [probs])], upstream_TD.to(dtype))]

    out = gradients(lambda x, w, p: moe_ffn(x, w, p, activation="silu", impl=impl), dtype)
    baseline = gradients(lambda x, w, p: masked.moe_ffn(x, w, p, activation="silu"), dtype)
    oracle = gradients(lambda x, w, p: reference.moe_ffn(x, w, p, activation="silu"), torch.float64)
    for got, plain, exact in zip(out, baseline, oracle, strict=True):
        assert_as_accurate_as_torch(got, oracle=exact, baseline=plain)


def test_only_what_is_wanted_gets_a_gradient_and_layouts_stay():
    weights, plan = random_ffn(16, 32, conv1d=True), random_plan(5, 4, 0.5)
    weights.up_FD.requires_grad_()
    moe_ffn(torch.randn(5, 16), weights, plan, activation="relu", impl="triton").sum().backward()
    assert weights.up_FD.grad.stride() == weights.up_FD.stride() == (1, 32) and weights.down_FD.grad is None


@pytest.mark.parametrize(("impl", "numbers"), [("triton", 10 * 2 * 256), ("triton_recompute", 0)])
def test_autograd_keeps_the_pairs_alone(impl, numbers):
    """Ten pairs of 160: memory linear in those, and none of F where the hidden activations are computed again."""
    weights, mask_TE = random_ffn(16, 4 * 256, gated=True), torch.zeros(40, 4, dtype=torch.bool)
    mask_TE[:10, 1] = True
    x_TD, kept = torch.randn(40, 16, requires_grad=True), []
    same = {t.data_ptr() for t in (x_TD, *tensors_of(weights), mask_TE)}

    def pack(tensor):
        if tensor.data_ptr() not in same:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_ffn(x_TD, weights, build_plan(mask_TE), activation="silu", impl=impl).sum().backward()
    assert sum(kept) == numbers


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("T", [0, 3])
def test_no_token_and_no_pair_have_gradients_of_zero(T, keep):
    weights, mask_TE = random_ffn(8, 32, biased=True), torch.zeros(T, 2, dtype=torch.bool)
    mask_TE[:, 0] = keep > 0
    x_TD, leaves = torch.randn(T, 8, requires_grad=True), [t.requires_grad_() for t in tensors_of(weights)]
    y_TD = moe_ffn(x_TD, weights, build_plan(mask_TE), activation="relu", impl="triton")
    found = torch.autograd.grad(y_TD.sum(), [x_TD, *leaves])
    assert all(t.isfinite().all() for t in found)
    assert found[1][16:].eq(0).all() and ((keep > 0 and T > 0) or found[1].eq(0).all())


def test_deterministic_algorithms_leave_atomics_out(monkeypatch):
    weights, x_TD, plan = random_ffn(16, 384), torch.randn(6, 16, requires_grad=True), random_plan(6, 2, 0.5)

    def run():
        return moe_ffn(x_TD, weights, plan, activation="relu", impl="triton")

    expected = run()
    monkeypatch.setattr(triton_ffn, "add_up", lambda *_, **__: pytest.fail("atomics"))
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(run(), expected)
        run().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_any_strides_of_x_and_of_the_mask():
    weights, plan = random_ffn(24, 48), random_plan(6, 5, 0.5)
    x_TD = torch.randn(24, 6, 2).transpose(0, 1)[..., 0]
    expected = moe_ffn(x_TD.contiguous(), weights, plan, activation="relu", impl="triton")
    strided = build_plan(plan.mask_TE.t().contiguous().t())
    assert moe_ffn(x_TD, weights, strided, activation="relu", impl="triton").equal(expected)
    x = x_TD.detach().requires_grad_()
    torch.testing.assert_close(moe_ffn(x, weights, strided, activation="relu", impl="triton"), expected)


def test_operators_pass_torchs_own_checks():
    weights, x_TD, plan = random_ffn(8, 32, gated=True, biased=True), torch.randn(3, 8), random_plan(3, 2, 0.5)
    floats = [getattr(weights, name) for name in gpu_ffn._FIELDS]
    torch.library.opcheck(gpu_ffn._ffn_gpu, (x_TD, *floats, None, None, None, plan.mask_TE, "silu"))
    leaves = [t.requires_grad_() for t in (x_TD, *floats)]
    for keep in (True, False):  # of pairs that there are not, what is kept is whatever was in memory
        inputs = (*leaves, torch.rand(3, 2, requires_grad=True), plan.mask_TE, "silu", plan.num_pairs, keep)
        torch.library.opcheck(gpu_ffn._ffn_train_gpu, inputs, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("trains", [False, True])
def test_a_graph_is_compiled_whole_and_holds_for_any_mask(trains):
    weights, x_TD = random_ffn(16, 32, gated=True), torch.randn(5, 16, requires_grad=trains)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x_TD, mask_TE):
        return moe_ffn(x_TD * 2, weights, build_plan(mask_TE), activation="silu", impl="triton") + 1

    for keep in (0.3, 0.9):
        plan = random_plan(5, 4, keep)
        out, expected = layer(x_TD, plan.mask_TE), masked.moe_ffn(x_TD * 2, weights, plan, activation="silu") + 1
        torch.testing.assert_close(out, expected)
        if trains:
            (found,), (exact,) = torch.autograd.grad(out.sum(), x_TD), torch.autograd.grad(expected.sum(), x_TD)
            torch.testing.assert_close(found, exact)


def test_autocast_casts_as_linear_does(monkeypatch):
    weights, x_TD, plan = random_ffn(16, 32), torch.randn(4, 16), random_plan(4, 2, 0.5)
    with torch.autocast("cpu", torch.float16):
        out = moe_ffn(x_TD, weights, plan, activation="relu", impl="triton")
    assert out.dtype is torch.float16
    expected = moe_ffn(x_TD.half(), map_weights(weights, torch.Tensor.half), plan, activation="relu", impl="triton")
    assert out.equal(expected)


def test_what_it_cannot_compute_is_an_error():
    weights, plan = random_ffn(8, 16), random_plan(2, 2, 0.5)
    for dtype, message in ((torch.bfloat16, "interpreter computes bfloat16 wrongly"), (torch.float64, "takes float32, float16")):
        same = map_weights(weights, lambda t, dtype=dtype: t.to(dtype))
        with pytest.raises(KernelError, match=message):
            moe_ffn(torch.randn(2, 8).to(dtype), same, plan, activation="relu", impl="triton")
    assert "triton" in impls_for("cpu")
    reasons = {c.name: c.reason for c in explain(torch.randn(2, 8), weights, plan, activation="relu")}
    assert reasons["triton"] == "it runs on a GPU, x_TD is on cpu", "'auto' never takes the interpreter"


def test_a_converted_model_runs_and_trains_by_it_when_asked_for_by_name(monkeypatch):
    model = convert_tiny(tiny_llama(), rule=TopK(k=1)).eval()
    inputs, calls = tiny_inputs(), []
    forward = gpu_ffn._forward
    monkeypatch.setattr(gpu_ffn, "_forward", lambda *args, **options: calls.append(1) or forward(*args, **options))

    def logits_and_gradients(impl):
        set_impl(model, impl)
        with torch.no_grad():
            logits = model(**inputs).logits
        model.zero_grad()
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.eval()
        return logits, [p.grad for p in model.parameters() if p.grad is not None]

    found, grads = logits_and_gradients("triton")
    assert len(calls) == len(moe_layers(model))
    expected, exact = logits_and_gradients("masked")
    torch.testing.assert_close(found, expected)
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Waiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU: it reads a value, or copies one of its own there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func.name() == "aten::lift_fresh" and args[0].dim() > 0  # a single number is an argument of a kernel
        assert not copies and func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("rule", "trains"), [(DynKMass(mass=0.6), True), (TopK(k=2), True), (DynKMax(tau=0.7), False)])
def test_a_layer_does_not_wait_for_the_device(rule, trains):
    """In training the number of pairs, unless the rule says what it is at most. Dispatch modes see operators as a graph does."""
    model = convert_tiny(tiny_llama(), rule=rule).train(trains)
    moe = next(iter(moe_layers(model).values()))
    moe.always_on, mlp = (0, 2), model.model.layers[0].mlp
    set_impl(model, "triton")
    x = torch.randn(1, 17, 32)
    plans = []
    with torch.set_grad_enabled(trains), Waiting():
        moe.recorder = SimpleNamespace(add=lambda _, mask_TE, shape: plans.append(mask_TE))
        y = mlp(x)
        if trains:
            y.sum().backward()
    assert plans[0][:, [0, 2]].all() and not plans[0].all()
    set_impl(model, "masked")
    torch.testing.assert_close(y, mlp(x))


def test_where_the_rule_says_how_many_run_nobody_counts_them(monkeypatch):
    """The room for pairs, and what backward keeps, is k a token in a compiled graph, too."""
    model = convert_tiny(tiny_llama(), rule=TopK(k=2)).train()
    moe, mlp, rooms, x = next(iter(moe_layers(model).values())), model.model.layers[0].mlp, [], torch.randn(1, 6, 32)
    set_impl(model, "triton")
    order = triton_ffn.order_pairs
    monkeypatch.setattr(triton_ffn, "order_pairs", lambda *args, **options: rooms.append(options["room"]) or order(*args, **options))
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for run, moe.always_on, room in ((mlp, (), 12), (mlp, (0,), 18), (compiled, (0,), 18)):
        rooms.clear()
        run(x).sum().backward()
        assert rooms == [room, room]
    moe.rule = DynKMax(tau=0.7)
    assert moe._plan(x).most_pairs is None


def test_a_compiled_model_generates_with_a_static_cache():
    model = convert_tiny(tiny_llama(), rule=TopK(k=1)).eval()
    prompt = tiny_inputs(batch=1, length=4)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    set_impl(model, "masked")
    expected = model.generate(prompt, **options)
    set_impl(model, "triton")
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert model.generate(prompt, **options).equal(expected)
