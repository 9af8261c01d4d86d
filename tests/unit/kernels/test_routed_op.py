"""Router, rule and FFN as one operator: what tracers see of it, and the same bits as the native call that eager layers make.

`test_layers.py` has it inside compiled and exported models.
Letters: T tokens, D model width, F FFN width, W router width, E experts.
"""

import dataclasses
import gc
import multiprocessing
import os
import sys
import threading
import weakref

import pytest
import torch
from ffn_cases import map_weights, random_ffn, tensors_of

from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, cpu_always, moe_ffn
from moeify.kernels.routed_op import routed_ffn
from moeify.select import DynKMass, DynKMax, Threshold, TopK
from moeify.sites.int8 import quantize_rows

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("poisoned_empty"),
]
D, F, W, E = 16, 24, 5, 6
WEIGHTS = pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])


def router_of(rule, *, output="exp", always_on=()):
    hidden, out = torch.nn.Linear(D, W), torch.nn.Linear(W, E)
    tensors = [t.detach() for t in (hidden.weight, hidden.bias, 5 * out.weight, out.bias)]
    return cpu.RouterWeights(*tensors, output=output, rule=rule.name, knob=rule.value, always_on=always_on)


def ffn_of(*, is_int8=False, dtype=torch.float32):
    weights = map_weights(random_ffn(D, F, gated=True, biased=True, dtype=dtype), torch.Tensor.contiguous)
    if not is_int8:
        return weights
    (up_FD, up_F), (gate_FD, gate_F), (down_DF, down_D) = map(quantize_rows, (weights.up_FD, weights.gate_FD, weights.down_FD.t()))
    changed = {"up_FD": up_FD, "gate_FD": gate_FD, "down_FD": down_DF.t().contiguous()}
    return dataclasses.replace(weights, **changed, up_scale_F=up_F, gate_scale_F=gate_F, down_scale_D=down_D)


def arguments(x, weights, router, *, activation="silu", impl="auto"):
    """What the operator is called with, flat."""
    matrices = [getattr(weights, name) for name in (*cpu.MATRICES, *cpu.BIASES, *cpu.SCALES)]
    tensors = (router.hidden_WD, router.hidden_bias_W, router.out_EW, router.out_bias_E)
    return (x, *matrices, *tensors, list(router.always_on), activation, router.output, router.rule, float(router.knob), impl)


@WEIGHTS
def test_operator_passes_opcheck(is_int8):
    args = arguments(torch.randn(2, 3, D), ffn_of(is_int8=is_int8), router_of(TopK(k=2), always_on=(1,)))
    results = torch.library.opcheck(torch.ops.moeify.routed_ffn_cpu.default, args)
    assert set(results.values()) == {"SUCCESS"}


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", [Threshold(theta=0.9), DynKMax(tau=0.5), DynKMass(mass=0.6), TopK(k=3)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("shape", [(0, D), (D,), (1, 1, D), (2, 5, D), (300, D)], ids=str)
def test_operator_gives_the_bits_of_the_native_call(is_int8, dtype, rule, shape):
    weights, router, x = ffn_of(is_int8=is_int8, dtype=dtype), router_of(rule, output="abs", always_on=(4,)), torch.randn(shape).to(dtype)
    y, mask_TE = routed_ffn(x, weights=weights, router=router, activation="silu", impl="cpu")
    expected, expected_TE = cpu.Routed(weights, router, activation="silu", dtype=dtype)(x)
    assert y.equal(expected)
    assert mask_TE.equal(expected_TE)
    assert (y.shape, y.dtype, mask_TE.dtype) == (x.shape, dtype, torch.bool)


@WEIGHTS
def test_operator_beyond_the_crossover_runs_what_auto_runs(is_int8):
    dtype = torch.bfloat16 if is_int8 else torch.float32  # the other two have no crossover
    weights, router = ffn_of(is_int8=is_int8, dtype=dtype), router_of(TopK(k=E))
    T = int(cpu_always(dtype, is_int8=is_int8)) + 1
    x_TD = torch.randn(T, D).to(dtype)
    y_TD, mask_TE = routed_ffn(x_TD, weights=weights, router=router, activation="silu", impl="auto")
    auto, dense, ours = (moe_ffn(x_TD, weights, build_plan(mask_TE), activation="silu", impl=impl) for impl in ("auto", "masked", "cpu"))
    assert y_TD.equal(auto)
    assert y_TD.equal(dense)
    assert not y_TD.equal(ours)


def test_operator_refuses_gradients_at_once_and_runs_without():
    weights, router, x_TD = ffn_of(), router_of(TopK(k=2)), torch.randn(3, D)
    for leaf in (x_TD, weights.up_FD, router.out_EW):
        leaf.requires_grad_()
        with pytest.raises(KernelError, match=r"no gradient; run it under torch\.no_grad"):
            routed_ffn(x_TD, weights=weights, router=router, activation="silu", impl="auto")
        with torch.no_grad():
            routed_ffn(x_TD, weights=weights, router=router, activation="silu", impl="auto")
        leaf.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.randn(3, D + 1)}, r"expected \(\.\.\., 16\)", id="width of x"),
        pytest.param({"x": torch.randn(3, D).double()}, "takes float32 and bfloat16", id="dtype of x"),
        pytest.param({"x": torch.randn(3, D).bfloat16()}, "weights must be torch.bfloat16, or int8", id="x and weights differ"),
        pytest.param({"x": torch.randn(())}, r"expected \(\.\.\., 16\)", id="scalar x"),
        pytest.param({"activation": "mish"}, "does not know the activation 'mish'", id="activation"),
        pytest.param({"router": {"rule": "best"}}, "does not know the rule 'best'", id="rule"),
        pytest.param({"router": {"output": "log"}}, "with the output 'log'", id="output"),
        pytest.param({"router": {"always_on": (E,)}}, r"experts in \[0, 6\), got \(6,\)", id="expert that is not there"),
        pytest.param({"router": {"always_on": (-1,)}}, r"experts in \[0, 6\), got \(-1,\)", id="negative expert"),
        pytest.param({"router": {"hidden_WD": torch.randn(W, D + 1)}}, "does not fit", id="router of another width"),
        pytest.param({"router": {"hidden_WD": torch.randn(W)}}, "must be 2-D", id="vector for a matrix"),
        pytest.param({"router": {"out_bias_E": torch.randn(E - 1)}}, "biases do not fit", id="short bias"),
        pytest.param(
            {"router": {"out_EW": torch.randn(F + 1, W), "out_bias_E": torch.randn(F + 1)}}, "25 experts do not fit", id="experts"
        ),
        pytest.param({"weights": {"gate_FD": torch.randn(F - 1, D)}}, "shapes do not fit", id="short gate"),
        pytest.param({"weights": {"up_FD": torch.randn(D, F).t()}}, "rows are not contiguous", id="weights by input"),
        pytest.param({"weights": {"up_FD": torch.randn(F, D, 1)}}, "must be 2-D", id="three axes"),
        pytest.param({"weights": {"down_FD": torch.empty(F, D, device="meta")}}, "must all be there", id="weights without memory"),
        pytest.param({"router": {"out_EW": torch.empty(E, W, device="meta")}}, "must all be there", id="router without memory"),
    ],
)
def test_operator_refuses_what_native_code_would_misread(change, message):
    weights = dataclasses.replace(ffn_of(), **change.get("weights", {}))
    router = dataclasses.replace(router_of(TopK(k=2)), **change.get("router", {}))
    args = arguments(change.get("x", torch.randn(3, D)), weights, router, activation=change.get("activation", "silu"))
    with pytest.raises(KernelError, match=message):
        torch.ops.moeify.routed_ffn_cpu(*args)


def test_operator_on_the_meta_device_gives_shapes():
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(torch.randn(2, 3, D), ffn_of(), router_of(TopK(k=2)))]
    y, mask_TE = torch.ops.moeify.routed_ffn_cpu(*args)
    assert (y.shape, y.device.type, mask_TE.shape, mask_TE.dtype) == ((2, 3, D), "meta", (6, E), torch.bool)


def test_what_the_operator_remembers_keeps_no_memory_and_stays_small(monkeypatch):
    monkeypatch.setattr(cpu, "_MOST", 5)
    kept = []
    for _ in range(12):
        weights, router, x_TD = ffn_of(), router_of(TopK(k=2), always_on=(1,)), torch.randn(3, D)
        for _ in range(2):
            y_TD, _ = routed_ffn(x_TD, weights=weights, router=router, activation="silu", impl="auto")
            assert y_TD.equal(cpu.Routed(weights, router, activation="silu")(x_TD)[0])
        kept += [weakref.ref(t) for t in (*tensors_of(weights), *router.tensors)]
        assert 1 <= len(cpu._ROUTED) <= 5
    del weights, router
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_values_and_tensors_that_change_between_calls_are_seen():
    weights, router, x_TD = ffn_of(), router_of(TopK(k=2)), torch.randn(3, D)

    activation = "silu"

    def change_activation():
        nonlocal activation
        activation = "relu"

    def check():
        found = routed_ffn(x_TD, weights=weights, router=router, activation=activation, impl="auto")
        expected = cpu.Routed(weights, router, activation=activation)(x_TD)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        return found[0]

    seen = [check()]
    for change in (
        lambda: weights.up_FD.mul_(2),
        lambda: setattr(weights.down_FD, "data", -weights.down_FD.data),
        lambda: setattr(router.out_EW, "data", -router.out_EW.data),
        lambda: router.hidden_WD.mul_(-1),
        lambda: object.__setattr__(router, "knob", 3),
        change_activation,
        lambda: object.__setattr__(router, "rule", "dynk_max"),  # every expert's score is below three times the largest: one runs
        lambda: object.__setattr__(router, "output", {"exp": "abs", "abs": "exp"}[router.output]),
        lambda: object.__setattr__(router, "always_on", (0, 1, 2)),
    ):
        change()
        seen.append(check())
    assert all(not a.equal(b) for a, b in zip(seen, seen[1:], strict=False))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CALLS = {
    "native call": lambda weights, router: cpu.Routed(weights, router, activation="silu"),
    "operator": lambda weights, router: lambda x: routed_ffn(x, weights=weights, router=router, activation="silu", impl="cpu"),
}
BOTH = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


@BOTH
def test_one_thread_gives_the_same_up_to_rounding(make, request):
    weights, router, x_TD = ffn_of(), router_of(DynKMax(tau=0.5)), torch.randn(40, D)
    call = make(weights, router)
    y_TD, mask_TE = call(x_TD)
    request.getfixturevalue("one_thread")
    again_TD, again_TE = call(x_TD)
    torch.testing.assert_close(again_TD, y_TD)
    assert again_TE.equal(mask_TE)


@BOTH
def test_many_threads_at_once_get_their_own_results(make):
    weights, router = ffn_of(), router_of(DynKMax(tau=0.5))
    call, inputs = make(weights, router), [torch.randn(T, D) for T in (1, 1, 3, 8, 40, 90)]
    expected = [call(x_TD) for x_TD in inputs]
    start, wrong = threading.Barrier(len(inputs)), []

    def work(x_TD, y_TD, mask_TE):
        start.wait()
        for _ in range(30):
            found_TD, found_TE = call(x_TD)
            if not (torch.allclose(found_TD, y_TD, atol=1e-5) and found_TE.equal(mask_TE)):
                wrong.append(x_TD.shape[0])

    threads = [threading.Thread(target=work, args=(x_TD, *result)) for x_TD, result in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@BOTH
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # newer Pythons warn of any fork beside threads: that is the point
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_computes_what_its_parent_did(make):
    call, x_TD = make(ffn_of(), router_of(DynKMax(tau=0.5))), torch.randn(90, D)
    y_TD, mask_TE = call(x_TD)

    def child():
        found_TD, found_TE = call(x_TD)
        os._exit(0 if torch.allclose(found_TD, y_TD, atol=1e-5) and found_TE.equal(mask_TE) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert call(x_TD)[0].equal(y_TD)
