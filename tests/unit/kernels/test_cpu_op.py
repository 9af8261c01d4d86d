"""The operator of the compiled kernels: what autograd, the tracer and torch.compile see of it; and tensors that change between calls.

`test_kernels.py` compares its results and gradients with every other implementation's.
Letters: T tokens, D model width, F FFN width, E experts.
"""

import dataclasses
import gc
import weakref

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, random_ffn, random_plan, tensors_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from moeify import kernels
from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, cpu_op, explain, moe_ffn

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
pytestmark = [needs_library, pytest.mark.usefixtures("poisoned_empty")]


def by_neuron(weights):
    return map_weights(weights, torch.Tensor.contiguous)


@pytest.mark.parametrize("gated", [False, True])
def test_operator_passes_opcheck(gated):
    weights, x_TD, plan = by_neuron(random_ffn(8, 12, gated=gated, biased=True)), torch.randn(5, 8), random_plan(5, 3, 0.6)
    tensors = [t if t is None else t.clone().requires_grad_() for t in (x_TD, *(getattr(weights, name) for name in cpu_op._FIELDS))]
    results = torch.library.opcheck(torch.ops.moeify.ffn_cpu.default, (*tensors, plan.mask_TE, "silu"))
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_graph_runs_the_kernel_for_any_number_of_tokens():
    weights = by_neuron(random_ffn(16, 24, gated=True))

    def layer(x_TD, scores_TE):
        return moe_ffn(x_TD * 2, weights, build_plan(scores_TE > 0.4), activation="silu") + 1

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for T in (3, 70):
            x_TD, scores_TE = torch.randn(T, 16), torch.rand(T, 6)
            torch.testing.assert_close(compiled(x_TD, scores_TE), layer(x_TD, scores_TE))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_backward_of_the_operator_gives_every_gradient_of_the_loop(compiled):
    weights, x_TD, plan = by_neuron(random_ffn(8, 12, gated=True, biased=True)), torch.randn(5, 8), random_plan(5, 3, 0.6)
    upstream_TD = torch.randn(5, 8)

    def gradients(function, dtype):
        x, w = x_TD.to(dtype).requires_grad_(), map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
        return torch.autograd.grad(function(x, w), [x, *tensors_of(w)], upstream_TD.to(dtype))

    def operator(x, w):
        return moe_ffn(x, w, build_plan(plan.mask_TE), activation="silu", impl="cpu")

    found = gradients(torch.compile(operator, fullgraph=True, backend="aot_eager") if compiled else operator, torch.float32)
    oracle = gradients(lambda x, w: loop_over_tokens(x, w, plan.mask_TE, activation="silu"), torch.float64)
    for got, exact in zip(found, oracle, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def swap_data(weights):
    weights.down_FD.data = 3 * weights.down_FD.data


def swap_the_parameter_that_it_is_a_view_of(weights):
    whole = torch.nn.Parameter(torch.cat([weights.up_FD, weights.gate_FD]), requires_grad=False)
    object.__setattr__(weights, "up_FD", whole[:24])
    run(weights)
    whole.data = -whole.data  # the view stays what it was
    run(weights)
    object.__setattr__(weights, "up_FD", whole[:24])


def other_strides_in_the_same_place(weights):
    wide = torch.randn(24, 32)
    object.__setattr__(weights, "up_FD", wide[:, :16])
    run(weights)
    object.__setattr__(weights, "up_FD", wide.reshape(48, 16)[:24])
    assert weights.up_FD.data_ptr() == wide.data_ptr()


def another_view_in_the_same_place(weights):
    buffer = torch.randn(24 * 16)
    for sign in (1, -1):
        object.__setattr__(weights, "gate_FD", buffer.view(24, 16))
        run(weights)
        buffer.mul_(sign)


CHANGES = {
    "values": lambda weights: weights.up_FD.mul_(2),
    "data": swap_data,
    "field": lambda weights: object.__setattr__(weights, "gate_FD", torch.randn(24, 16)),
    "bias": lambda weights: object.__setattr__(weights, "down_bias_D", None),
    "view": swap_the_parameter_that_it_is_a_view_of,
    "strides": other_strides_in_the_same_place,
    "place": another_view_in_the_same_place,
    "rows no more": lambda weights: object.__setattr__(weights, "up_FD", torch.randn(16, 24).t()),
}
ONE_TOKEN = {"x_TD": torch.randn(1, 16, generator=torch.Generator().manual_seed(1)), "mask_TE": torch.tensor([[True, False, True]])}


def run(weights, *, impl="auto"):
    return moe_ffn(ONE_TOKEN["x_TD"], weights, build_plan(ONE_TOKEN["mask_TE"]), activation="silu", impl=impl)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_between_calls_are_seen(change):
    weights = by_neuron(random_ffn(16, 24, gated=True, biased=True))
    with torch.no_grad():
        before = run(weights)
        change(weights)
        found = run(weights)
        torch.testing.assert_close(found, run(weights, impl="reference"))
    assert not found.equal(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: setattr(t, "data", torch.randn(23, 16)), r"up_FD has shape \(23, 16\)", id="fewer rows"),
        pytest.param(lambda t: setattr(t, "data", torch.randn(24, 15)), r"up_FD has shape \(24, 15\)", id="shorter rows"),
        pytest.param(lambda t: setattr(t, "data", t.data.double()), "up_FD is torch.float64", id="dtype"),
        pytest.param(lambda t: setattr(t, "data", t.data.view(torch.int32)), "up_FD is torch.int32", id="dtype in the same place"),
        pytest.param(lambda t: t.resize_(5, 16), r"up_FD has shape \(5, 16\)", id="resized"),
        pytest.param(lambda t: t.untyped_storage().resize_(0), r"shape \(24, 16\) has no memory", id="given back"),
    ],
)
def test_weights_that_no_longer_fit_after_a_call_are_refused(change, message):
    weights = by_neuron(random_ffn(16, 24, gated=True, biased=True))
    with torch.no_grad():
        run(weights)
        change(weights.up_FD)
        for impl in ("auto", "cpu"):
            with pytest.raises(KernelError, match=message):
                run(weights, impl=impl)


def test_what_is_remembered_of_weights_keeps_no_memory_and_stays_small(monkeypatch):
    monkeypatch.setattr(cpu, "_MOST", 5)
    kept = []
    with torch.no_grad():
        for _ in range(12):
            weights = by_neuron(random_ffn(16, 24, gated=True, biased=True))
            run(weights)
            kept += [weakref.ref(t) for t in (*tensors_of(weights), weights)]
            assert 1 <= len(cpu._DESCRIBED) <= 5
    del weights
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_weights_that_ran_before_are_neither_checked_nor_described_again(monkeypatch):
    weights = by_neuron(random_ffn(16, 24, gated=True, biased=True))
    with torch.no_grad():
        expected = run(weights)
        for owner, name in ((kernels, "_check"), (kernels, "_auto"), (cpu, "_describe")):
            monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("asked again"))
        assert run(weights).equal(expected)
        assert run(weights, impl="cpu").equal(expected)


def test_weights_that_ran_before_do_not_run_where_something_else_decides():
    weights, x_TD, plan = by_neuron(random_ffn(16, 24, gated=True)), ONE_TOKEN["x_TD"], build_plan(ONE_TOKEN["mask_TE"])

    def settled(x_TD, plan, **changes):
        return kernels._settled(x_TD, weights, plan, **{"activation": "silu", "impl": "auto"} | changes) is not None

    with torch.no_grad():
        run(weights)
        assert settled(x_TD, plan)
        assert settled(x_TD, plan, impl="cpu")
        assert not settled(x_TD, plan, impl="masked")
        assert not settled(x_TD, plan, activation="relu")
        assert not settled(x_TD, build_plan(torch.ones(1, 4, dtype=torch.bool)))
        assert not settled(x_TD.bfloat16(), plan)
        assert not settled(x_TD[:, :15], plan)
        assert not settled(x_TD, random_plan(2, 3, 0.5))
        assert not settled(x_TD.to("meta"), plan)
        many = int(kernels.cpu_always(torch.float32, is_int8=False)) + 1
        assert settled(torch.randn(many - 1, 16), random_plan(many - 1, 3, 0.5))
        assert not settled(torch.randn(many, 16), random_plan(many, 3, 0.5))
        assert settled(torch.randn(many, 16), random_plan(many, 3, 0.5), impl="cpu")
        with torch.autocast("cpu", torch.bfloat16):
            assert not settled(x_TD, plan)
            assert run(weights).dtype is torch.bfloat16
    wants_grad = dataclasses.replace(weights, up_FD=weights.up_FD.requires_grad_())
    assert run(wants_grad).requires_grad


@pytest.mark.parametrize("impl", ["auto", "cpu", "masked"])
@pytest.mark.parametrize("T", [1, 200])
def test_tensors_without_memory_give_tensors_without_memory(impl, T):
    weights, x_TD, plan = by_neuron(random_ffn(16, 24, gated=True)), torch.randn(T, 16), random_plan(T, 3, 0.6)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake, fake_plan = mode.from_tensor(x_TD), build_plan(mode.from_tensor(plan.mask_TE))
    with torch.no_grad():
        moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)  # the real ones are known
        found = [moe_ffn(fake, weights, fake_plan, activation="silu", impl=impl)]
        with mode:
            found.append(moe_ffn(x_TD, weights, fake_plan, activation="silu", impl=impl))
    assert all(isinstance(out, FakeTensor) and out.shape == (T, 16) and out.dtype is torch.float32 for out in found)


@pytest.mark.parametrize("T", [1, 200])
@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_a_stand_in_among_real_tensors_is_refused(impl, T):
    weights, x_TD, plan = by_neuron(random_ffn(16, 24, gated=True)), torch.randn(T, 16), random_plan(T, 3, 0.6)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
        for broken in (dataclasses.replace(weights, up_FD=mode.from_tensor(weights.up_FD)), weights):
            fake_plan = plan if broken is not weights else build_plan(mode.from_tensor(plan.mask_TE))
            with pytest.raises(KernelError, match=r"FakeTensor of shape .* has no memory"):
                moe_ffn(x_TD, broken, fake_plan, activation="silu", impl=impl)


@pytest.mark.parametrize("impl", ["auto", "masked"])
def test_the_meta_device_gives_shapes_and_the_compiled_kernels_refuse_it(impl):
    weights, x_TD = map_weights(random_ffn(16, 24, gated=True), lambda t: t.to("meta")), torch.empty(5, 16, device="meta")
    plan = build_plan(torch.ones(5, 3, dtype=torch.bool, device="meta"))
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)
    assert (out.shape, out.device.type) == ((5, 16), "meta")
    with pytest.raises(KernelError, match="runs on the CPU, x_TD is on meta"):
        moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x_TD": torch.randn(5, 15)}, r"x_TD has shape \(5, 15\)", id="width of x"),
        pytest.param({"x_TD": torch.randn(4, 16)}, r"x_TD has shape \(4, 16\)", id="tokens"),
        pytest.param({"x_TD": torch.randn(5, 2, 16)}, r"x_TD has shape \(5, 2, 16\)", id="three axes"),
        pytest.param({"x_TD": torch.randn(5, 16).bfloat16()}, "weights must be torch.bfloat16", id="dtype of x"),
        pytest.param({"mask_TE": torch.ones(5, 3)}, "mask_TE torch.float32", id="dtype of the mask"),
        pytest.param({"mask_TE": torch.ones(5, 25, dtype=torch.bool)}, "25 experts do not fit 24 neurons", id="experts"),
        pytest.param({"gate_FD": torch.randn(23, 16)}, "shapes do not fit", id="short gate"),
        pytest.param({"down_bias_D": torch.randn(15)}, "shapes do not fit", id="short bias"),
        pytest.param({"down_FD": torch.randn(24)}, "must be 2-D", id="vector"),
        pytest.param({"up_scale_F": torch.randn(24)}, "int8 with scales", id="scale of floats"),
        pytest.param({"activation": "mish"}, "does not know the activation 'mish'", id="activation"),
    ],
)
def test_operator_called_by_itself_checks_what_native_code_reads(change, message):
    weights = by_neuron(random_ffn(16, 24, gated=True, biased=True))
    args = {"x_TD": torch.randn(5, 16)} | {name: getattr(weights, name) for name in cpu_op._FIELDS}
    args |= {"mask_TE": torch.ones(5, 3, dtype=torch.bool), "activation": "silu"} | change
    with pytest.raises(KernelError, match=message):
        torch.ops.moeify.ffn_cpu(*args.values())


def test_gradients_pass_gradcheck():
    """In fp32, the kernels' most exact type: a step of 1e-2 and a tolerance of 1e-2 leave rounding (1e-6 / 1e-2) and curvature room."""
    weights, x_TD, mask_TE = by_neuron(random_ffn(4, 6, gated=True, biased=True)), torch.randn(3, 4), torch.rand(3, 3) < 0.6
    inputs = [None if t is None else t.requires_grad_() for t in (x_TD, *(getattr(weights, name) for name in cpu_op._FIELDS))]

    def function(*tensors):
        return torch.ops.moeify.ffn_cpu(*tensors, mask_TE, "silu")

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=1e-6)


@needs_library
def test_transformations_of_torch_func_see_the_operator():
    weights, plan = by_neuron(random_ffn(16, 24)), build_plan(torch.ones(3, 3, dtype=torch.bool))
    x_BTD = torch.randn(2, 3, 16)
    with torch.no_grad():
        found = torch.func.vmap(lambda x_TD: moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu"))(x_BTD)
        expected = torch.stack([moe_ffn(x_TD, weights, plan, activation="silu", impl="reference") for x_TD in x_BTD])
    torch.testing.assert_close(found, expected)


def test_auto_is_differentiated_and_batched_by_torch_func():
    weights, plan = by_neuron(random_ffn(16, 24)), build_plan(torch.rand(3, 3) < 0.5)
    x_BTD, tangent_TD = torch.randn(2, 3, 16), torch.randn(3, 16)

    def ffn(x_TD, impl="auto"):
        return moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)

    expected = torch.stack([ffn(x_TD, "reference") for x_TD in x_BTD])
    torch.testing.assert_close(torch.func.vmap(ffn)(x_BTD), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(ffn)(x_BTD), expected)
    x_TD = x_BTD[0].clone().requires_grad_()
    (gradient_TD,) = torch.autograd.grad(ffn(x_TD, "reference").square().sum(), x_TD)
    torch.testing.assert_close(torch.func.grad(lambda x: ffn(x).square().sum())(x_BTD[0]), gradient_TD)
    step = 1e-3
    slope_TD = (ffn(x_BTD[0] + step * tangent_TD, "reference") - ffn(x_BTD[0] - step * tangent_TD, "reference")) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(ffn, (x_BTD[0],), (tangent_TD,))[1], slope_TD, atol=2e-3, rtol=2e-3)


@needs_library
def test_portable_vectors_leave_many_tokens_of_nearly_every_expert_to_dense(monkeypatch):
    weights, plan, x_TD = by_neuron(random_ffn(16, 64)), build_plan(torch.ones(64, 8, dtype=torch.bool)), torch.randn(64, 16)
    with torch.no_grad():
        assert explain(x_TD, weights, plan, activation="silu")[0].chosen == (cpu.isa() != "portable")
        monkeypatch.setenv(cpu.FORCE_ISA, "portable")
        assert "above the crossover" in explain(x_TD, weights, plan, activation="silu")[0].reason


@needs_library
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_gradients_are_those_of_the_plain_kernels_or_refused(grad):
    weights, plan = by_neuron(random_ffn(16, 24)), build_plan(torch.ones(3, 3, dtype=torch.bool))
    x_TD, tangent_TD = torch.randn(3, 16), torch.randn(3, 16)

    def tangent_of(impl):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            out = moe_ffn(forward_ad.make_dual(x_TD, tangent_TD), weights, plan, activation="silu", impl=impl)
            return forward_ad.unpack_dual(out).tangent

    with torch.no_grad():
        moe_ffn(x_TD, weights, plan, activation="silu")  # remembered: the fast way must look, too
    torch.testing.assert_close(tangent_of("auto"), tangent_of("reference"))
    with pytest.raises(KernelError, match="no forward-mode gradients"):
        tangent_of("cpu")
