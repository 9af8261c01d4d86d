"""The compiled kernels: every instruction set in every regime, threads, and what the border refuses.

`test_kernels.py` compares them with every other implementation; here is what only they have.
Letters: T tokens, D model width, F FFN width, E experts.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ffn_cases import CPU_REGIMES, loop_over_tokens, map_weights, needs_library, random_ffn, random_plan, tensors_of
from numerics import assert_as_accurate_as_torch

from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, explain, masked, moe_ffn
from moeify.kernels.plan import DispatchPlan
from moeify.select import DynKMass, DynKMax, Threshold, TopK
from moeify.sites.formula import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def by_neuron(weights):
    return map_weights(weights, torch.Tensor.contiguous)


def test_library_is_there_where_there_is_a_compiler():
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    assert cpu.unavailable() is None
    assert cpu.describe().startswith(cpu.isas()[-1])
    assert "error" not in cpu.build_note(), "a source that does not compile is left out, too"


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_library_shares_no_function_between_instruction_sets():
    # A weak function is there once, compiled for whichever instruction set the linker saw first; an older processor would die of it.
    library = next(Path(cpu.__file__).parent.glob("libmoeify_cpu.*"))
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("moeify_ffn_run" in line for line in symbols)
    assert not [line for line in symbols if " W " in line and "(" in line]


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("neurons", range(1, 8))
def test_infinity_in_a_row_of_down_stays_infinity(monkeypatch, isa, dtype, neurons):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    for T in (1, 3, 70):
        weights, x_TD = by_neuron(random_ffn(40, neurons, dtype=dtype)), torch.rand(T, 40).add(0.1).to(dtype)
        weights.up_FD.abs_()  # so that no neuron is zero
        weights.down_FD[0, ::3] = float("inf")
        out = moe_ffn(x_TD, weights, build_plan(torch.ones(T, 1, dtype=torch.bool)), activation="relu", impl="cpu")
        assert out[:, ::3].eq(float("inf")).all() and out[:, 1::3].isfinite().all()


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, False)], ids=["plain, biased", "gated"])
@CPU_REGIMES
def test_every_instruction_set_is_as_accurate_as_torch(monkeypatch, isa, dtype, gated, biased, T, E, F, D, keep):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, x_TD, plan = by_neuron(random_ffn(D, F, gated=gated, biased=biased, dtype=dtype)), torch.randn(T, D).to(dtype), None
    plan = random_plan(T, E, keep)
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    oracle = loop_over_tokens(x_TD.double(), map_weights(weights, torch.Tensor.double), plan.mask_TE, activation="silu")
    assert_as_accurate_as_torch(out, oracle=oracle, baseline=masked.moe_ffn(x_TD, weights, plan, activation="silu"))
    assert moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu").equal(out), "not the same bits again"


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_every_activation_is_accurate_over_its_whole_range(monkeypatch, isa, activation):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    x_TD = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0])])[
        :, None
    ]
    one = torch.ones(1, 1)
    weights = by_neuron(random_ffn(1, 1))
    weights.up_FD.copy_(one), weights.down_FD.copy_(one)
    out = moe_ffn(x_TD, weights, build_plan(torch.ones(len(x_TD), 1, dtype=torch.bool)), activation=activation, impl="cpu")
    exact, torchs = ACTIVATIONS[activation](x_TD.double()), ACTIVATIONS[activation](x_TD)
    eps = torch.finfo(torch.float32).eps
    error, allowed = (out - exact).abs(), 2 * (torchs - exact).abs() + 2 * eps * exact.abs() + 1e-7 * eps
    # pointwise up to a few roundings of the argument, which the exponential of a large one magnifies
    assert ((error <= allowed) | (error <= 4 * eps * x_TD.abs().clamp(max=4))).all(), (error - allowed).max()


@needs_library
@pytest.mark.parametrize("T", [1, 9, 100])
def test_bits_do_not_change_between_calls_and_other_callers(T):
    weights, x_TD, plan = by_neuron(random_ffn(64, 256, gated=True)), torch.randn(T, 64), random_plan(T, 32, 0.4)
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(moe_ffn, x_TD, weights, DispatchPlan(plan.mask_TE), activation="silu", impl="cpu") for _ in range(24)]
        assert all(torch.allclose(run.result(), out, atol=1e-6) for run in runs)
    assert moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu").equal(out)


@needs_library
@pytest.mark.parametrize("T", [1, 9, 100])
def test_one_thread_gives_the_same_up_to_rounding(T):
    weights, x_TD, plan = by_neuron(random_ffn(64, 256)), torch.randn(T, 64), random_plan(T, 32, 0.4)
    out, threads = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu"), out)
    finally:
        torch.set_num_threads(threads)


def _in_child(queue, x_TD, weights, mask_TE):
    queue.put(moe_ffn(x_TD, weights, build_plan(mask_TE), activation="relu", impl="cpu").sum().item())


@needs_library
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # newer Pythons warn of any fork beside threads: that is the point
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_of_a_process_that_used_threads_does_not_wait_for_them():
    weights, x_TD, plan = by_neuron(random_ffn(32, 64)), torch.randn(100, 32), random_plan(100, 8, 0.5)
    expected = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu").sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x_TD, weights, plan.mask_TE))
    child.start()
    assert queue.get(timeout=30) == pytest.approx(expected, rel=1e-4)
    child.join(timeout=30)
    assert child.exitcode == 0


@needs_library
def test_relu_never_reads_the_second_row_of_a_silent_neuron():
    weights = by_neuron(random_ffn(16, 24))
    x_TD, plan = torch.randn(1, 16), build_plan(torch.ones(1, 4, dtype=torch.bool))
    silent = (weights.up_FD @ x_TD[0]) <= 0
    assert silent.any()
    expected = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu")
    weights.down_FD[silent] = float("nan")
    assert moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu").equal(expected)


@needs_library
@pytest.mark.parametrize("T", [66, 100, 127, 130, 340])
def test_neighbouring_experts_that_every_token_takes_fill_the_workspace_and_no_more(T):
    # They are computed in larger pieces than one of them: the last piece before the workspace is full is the one that must fit.
    weights, x_TD = by_neuron(random_ffn(8, 2600, gated=True)), torch.randn(T, 8)
    plan = build_plan(torch.ones(T, 325, dtype=torch.bool))
    torch.testing.assert_close(
        moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu"),
        moe_ffn(x_TD, weights, plan, activation="silu", impl="masked"),
        rtol=1e-4,
        atol=1e-4,
    )


@needs_library
def test_values_that_are_not_finite_come_out_as_torch_has_them():
    weights, x_TD = by_neuron(random_ffn(8, 16)), torch.randn(70, 8)
    x_TD[3, 2], x_TD[5, 1] = float("nan"), float("inf")
    plan = build_plan(torch.ones(70, 4, dtype=torch.bool))
    out = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu")
    assert out[3].isnan().all()
    assert out.isfinite().all(1).sum() == 68


@needs_library
def test_auto_takes_it_where_rows_are_contiguous_and_says_why_not_elsewhere():
    x_TD, plan = torch.randn(1, 16), random_plan(1, 8, 0.5)
    weights = random_ffn(16, 64)
    with torch.no_grad():
        assert explain(x_TD, by_neuron(weights), plan, activation="relu")[0].chosen
        strided = explain(x_TD, weights, plan, activation="relu")[0]
        unknown = explain(x_TD, by_neuron(weights), plan, activation="mish")[0]
        busy = explain(torch.randn(199, 16), by_neuron(weights), random_plan(199, 8, 0.99), activation="relu")
    assert not strided.chosen
    assert "store_by_neuron" in strided.reason
    assert "does not know the activation 'mish'" in unknown.reason
    assert "above the crossover" in busy[0].reason
    trains = explain(x_TD, by_neuron(weights), plan, activation="relu", training=True)
    assert trains[0].reason.startswith("while training")
    assert not trains[0].chosen
    wants_grad = explain(x_TD.requires_grad_(), by_neuron(weights), plan, activation="relu")[0]
    assert "backward" in wants_grad.reason


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_named_impl_refuses_what_it_cannot_do(dtype):
    weights, x_TD, plan = random_ffn(8, 16, dtype=dtype), torch.randn(3, 8).to(dtype), random_plan(3, 4, 0.5)
    with pytest.raises(KernelError, match="takes float32 and bfloat16"):
        moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu")
    with pytest.raises(KernelError, match="does not know the activation 'mish'"):
        moe_ffn(x_TD.float(), map_weights(weights, torch.Tensor.float), plan, activation="mish", impl="cpu")


@needs_library
def test_unknown_instruction_set_names_those_there_are(monkeypatch):
    monkeypatch.setenv(cpu.FORCE_ISA, "avx1024")
    with pytest.raises(KernelError, match="they have portable"):
        moe_ffn(torch.randn(1, 8), random_ffn(8, 16), random_plan(1, 4, 0.5), activation="relu", impl="cpu")


def routed_case(rule, *, dtype=torch.float32, output="exp", always_on=(), T=4):
    weights = by_neuron(random_ffn(48, 100, gated=True, biased=True, dtype=dtype))
    hidden, out = torch.nn.Linear(48, 13), torch.nn.Linear(13, 9)
    out.weight.data.mul_(5)  # scores far enough apart for every rule to take some and leave some
    router = cpu.RouterWeights(
        *(t.detach() for t in (hidden.weight, hidden.bias, out.weight, out.bias)),
        output=output,
        rule=rule.name,
        knob=rule.value,
        always_on=always_on,
    )
    x_TD = torch.randn(T, 48).to(dtype)
    z_TE = out(torch.relu(hidden(x_TD.float())))
    scores_TE = (z_TE / 2).exp() if output == "exp" else z_TE.abs()
    return weights, router, x_TD, scores_TE.detach()


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("output", ["exp", "abs"])
@pytest.mark.parametrize("rule", [Threshold(theta=0.9), DynKMax(tau=0.7), DynKMass(mass=0.6), TopK(k=4)], ids=lambda rule: rule.name)
def test_routed_call_is_router_rule_and_ffn_one_after_the_other(monkeypatch, isa, dtype, output, rule):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, router, x_TD, scores_TE = routed_case(rule, dtype=dtype, output=output)
    y_TD, mask_TE = cpu.Routed(weights, router, activation="silu")(x_TD)
    assert mask_TE.equal(rule(scores_TE))
    assert 0 < mask_TE.sum() < mask_TE.numel()
    assert y_TD.equal(moe_ffn(x_TD, weights, build_plan(mask_TE), activation="silu", impl="cpu"))


@needs_library
@pytest.mark.parametrize("rule", [Threshold(theta=3.0), DynKMax(tau=1.0), DynKMass(mass=0.0), TopK(k=1)], ids=lambda rule: rule.name)
def test_routed_call_adds_the_experts_that_always_run(rule):
    weights, router, x_TD, scores_TE = routed_case(rule, always_on=(2, 5))
    _, mask_TE = cpu.Routed(weights, router, activation="silu")(x_TD)
    expected = rule(scores_TE)
    expected[:, [2, 5]] = True
    assert mask_TE.equal(expected)


@needs_library
@pytest.mark.parametrize(
    "rule",
    [Threshold(theta=0.5), DynKMax(tau=0.5), DynKMax(tau=0.0), DynKMass(mass=0.5), DynKMass(mass=1.0), TopK(k=3), TopK(k=99)],
    ids=str,
)
def test_routed_call_selects_as_the_rule_does_with_ties_zeros_and_nan(rule):
    weights, router, x_TD, _ = routed_case(rule, output="abs")
    router.out_EW.zero_(), router.out_bias_E.copy_(torch.tensor([0.5, -0.5, 0.25, 0.0, 0.5, 0.125, -0.25, 0.0, 0.1]))
    x_TD[1, 0] = float("nan")
    _, mask_TE = cpu.Routed(weights, router, activation="silu")(x_TD)
    scores_TE = router.out_bias_E.abs().expand(4, -1).clone()
    scores_TE[1] = float("nan")
    assert mask_TE.equal(rule(scores_TE))
    router.out_bias_E[4:6] = float("inf")
    _, mask_TE = cpu.Routed(weights, router, activation="silu")(x_TD[2:])
    assert mask_TE.equal(rule(router.out_bias_E.abs().expand(2, -1)))
    router.out_bias_E.zero_()
    _, mask_TE = cpu.Routed(weights, router, activation="silu")(x_TD[2:])
    assert mask_TE.equal(rule(torch.zeros(2, 9)))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact_case(T, rule, *, dtype=torch.float32, output="abs"):
    """Small integers, times a power of two for exp: every order of summation gives the same z. The last token but one has a NaN."""
    D, R, E, unit = 37, 13, 45, 1.0 if output == "abs" else 1 / 512
    weights = by_neuron(random_ffn(D, 100, dtype=dtype))
    hidden_WD, hidden_bias_W = torch.randint(-2, 3, (R, D)).float(), torch.randint(-9, 10, (R,)).float()
    out_EW, out_bias_E = torch.randint(-2, 3, (E, R)) * unit, torch.randint(-9, 10, (E,)) * unit
    out_EW[7], out_bias_E[7] = 0, 1  # one z above 0, so that exp's rounding of the largest never decides
    x_TD = torch.randint(-2, 3, (T, D)).to(dtype)
    x_TD[-2, 5] = float("nan")
    z_TE = (torch.relu(x_TD.double() @ hidden_WD.double().t() + hidden_bias_W) @ out_EW.double().t() + out_bias_E).float()
    router = cpu.RouterWeights(hidden_WD, hidden_bias_W, out_EW, out_bias_E, output=output, rule=rule.name, knob=rule.value)
    return weights, router, x_TD, rule(z_TE.abs() if output == "abs" else (z_TE / 2).exp())


ROUTER_TOKENS = [2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130]


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("output", ["exp", "abs"])
@pytest.mark.parametrize("threads", [1, 2, 8])  # 8: more than there are vectors of tokens, so that they share rows
def test_router_selects_as_python_for_any_number_of_tokens_and_threads(monkeypatch, set_threads, isa, dtype, output, threads):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    set_threads(threads)
    rule = Threshold(theta=math.exp(1 / 2048) if output == "exp" else 60.5)  # between two scores
    for T in ROUTER_TOKENS:
        weights, router, x_TD, expected = exact_case(T, rule, dtype=dtype, output=output)
        routed = cpu.Routed(weights, router, activation="relu")
        mask_TE = routed.select(x_TD)
        assert mask_TE.equal(expected), f"{T} tokens"
        assert 0.1 < mask_TE.float().mean() < 0.9 or T < 4
        assert routed.select(x_TD).equal(mask_TE), "not the same again"


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize(
    "rule",
    [DynKMax(tau=0.5), *(DynKMass(mass=m) for m in (0.0, 0.25, 0.5, 0.9375)), *(TopK(k=k) for k in (1, 2, 20, 44, 45))],
    ids=str,
)
def test_router_selects_as_the_rule_does_for_every_row(monkeypatch, isa, rule):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    for T in (3, 130):
        weights, router, x_TD, expected = exact_case(T, rule)
        assert cpu.Routed(weights, router, activation="relu").select(x_TD).equal(expected)


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("rule", [Threshold(theta=1.5), DynKMax(tau=0.5), DynKMass(mass=0.5), TopK(k=3)], ids=lambda rule: rule.name)
def test_router_takes_the_lowest_of_equal_scores_as_the_rule_does(monkeypatch, isa, value, rule):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, router, x_TD, _ = exact_case(20, rule)
    x_TD.nan_to_num_(), router.out_EW.zero_(), router.out_bias_E.fill_(1.0)
    router.out_bias_E[[3, 8, 20, 21, 44]] = torch.tensor([value, value, value, -value, value])
    expected = rule(router.out_bias_E.abs().expand(20, -1).contiguous())
    assert cpu.Routed(weights, router, activation="relu").select(x_TD).equal(expected)


@needs_library
def test_routed_call_refuses_what_it_cannot_read_in_place():
    weights, router, x_TD, _ = routed_case(TopK(k=1))
    with pytest.raises(KernelError, match="rows are not contiguous"):
        cpu.Routed(random_ffn(48, 100), router, activation="silu")
    with pytest.raises(KernelError, match="contiguous float32"):
        cpu.Routed(weights, dataclasses.replace(router, out_EW=router.out_EW.double()), activation="silu")
    with pytest.raises(KernelError, match="does not fit"):
        cpu.Routed(weights, dataclasses.replace(router, hidden_WD=torch.zeros(13, 47)), activation="silu")
    for name in ("hidden_bias_W", "out_bias_E"):
        with pytest.raises(KernelError, match="biases do not fit"):
            cpu.Routed(weights, dataclasses.replace(router, **{name: torch.zeros(3)}), activation="silu")
    with pytest.raises(KernelError, match="shapes do not fit"):
        cpu.Routed(dataclasses.replace(weights, gate_FD=torch.zeros(100, 40)), router, activation="silu")
    with pytest.raises(KernelError, match="must all be on the CPU"):
        cpu.Routed(weights, dataclasses.replace(router, out_EW=router.out_EW.to("meta")), activation="silu")
    routed = cpu.Routed(weights, router, activation="silu")
    for wrong in (x_TD[:, :47], x_TD.double(), x_TD[0, 0]):
        for call in (routed, routed.select):
            with pytest.raises(KernelError, match=r"expected \(\.\.\., 48\)"):
                call(wrong)


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [0, 1, 4, 5, 65, 300])
def test_routed_selection_alone_is_router_and_rule_for_any_number_of_tokens(monkeypatch, isa, dtype, T):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    for rule in (Threshold(theta=0.9), DynKMax(tau=0.7), DynKMass(mass=0.6), TopK(k=4)):
        weights, router, x_TD, scores_TE = routed_case(rule, dtype=dtype, T=T)
        routed = cpu.Routed(weights, router, activation="silu")
        mask_TE = routed.select(x_TD)
        assert (mask_TE.shape, mask_TE.dtype) == ((T, 9), torch.bool)
        assert mask_TE.equal(rule(scores_TE)), rule
        assert mask_TE.equal(routed(x_TD)[1])
        assert T == 0 or 0 < mask_TE.sum() < mask_TE.numel()


@needs_library
def test_routed_call_keeps_the_inputs_shape_and_takes_any_strides():
    weights, router, x_TD, _ = routed_case(TopK(k=4), T=6)
    routed = cpu.Routed(weights, router, activation="silu")
    y_TD, mask_TE = routed(x_TD)
    strided = torch.stack([x_TD, torch.full_like(x_TD, float("nan"))], -1)[..., 0]
    assert not strided.is_contiguous()
    for x in (x_TD.reshape(2, 3, 48), strided.reshape(6, 48), strided, x_TD.t().contiguous().t()):
        y, again_TE = routed(x)
        assert y.shape == x.shape
        assert y.reshape(6, 48).equal(y_TD)
        assert again_TE.equal(mask_TE)
        assert routed.select(x).equal(mask_TE)
    assert routed(x_TD[0])[0].equal(routed(x_TD[:1])[0][0])


@needs_library
def test_routed_call_stays_on_the_cpu_whatever_the_default_device_is():
    weights, router, x_TD, scores_TE = routed_case(TopK(k=4), always_on=(2,))
    with torch.device("meta"):
        mask_TE = cpu.Routed(weights, router, activation="silu").select(x_TD)
    assert mask_TE.equal(TopK(k=4)(scores_TE).index_fill(1, torch.tensor([2]), True))


@needs_library
def test_nothing_of_the_arguments_is_written_to():
    weights, x_TD, plan = by_neuron(random_ffn(16, 40, gated=True, biased=True)), torch.randn(80, 16), random_plan(80, 5, 0.5)
    before = [t.clone() for t in (x_TD, plan.mask_TE, *tensors_of(weights))]
    moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    assert all(a.equal(b) for a, b in zip(before, (x_TD, plan.mask_TE, *tensors_of(weights)), strict=True))


def test_package_without_the_library_says_so_and_goes_on(tmp_path):
    code = (
        "import pathlib, moeify.kernels.cpu as cpu\n"
        f"cpu.__file__ = {str(tmp_path / 'cpu.py')!r}\n"
        "import torch\n"
        "from moeify.kernels import build_plan, explain, moe_ffn\n"
        "from moeify.sites import FFNWeights\n"
        "x, w, p = torch.ones(2, 4), FFNWeights(torch.ones(6, 4), torch.ones(6, 4)), build_plan(torch.ones(2, 3, dtype=torch.bool))\n"
        "print(moe_ffn(x, w, p, activation='relu').sum().item(), explain(x, w, p, activation='relu')[0].reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("192.0 the compiled library is missing")


def test_compiler_that_fails_leaves_its_error_where_doctor_reads_it(tmp_path, monkeypatch):
    root = Path(__file__).parents[3]
    if not (root / "setup.py").is_file():
        pytest.skip("needs the sources")
    pytest.importorskip("setuptools")
    compiler = tmp_path / "odd-c++"
    compiler.write_text("#!/bin/sh\necho 'In file included from a.h:' >&2\necho 'odd-c++: error: no licence' >&2\nexit 1\n")
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects")]
    subprocess.run(command, cwd=root, env={**os.environ, "CXX": str(compiler)}, capture_output=True, check=True, timeout=120)
    place = tmp_path / "moeify" / "kernels"
    assert [path.name for path in place.iterdir()] == ["libmoeify_cpu.txt"]
    monkeypatch.setattr(cpu, "__file__", str(place / "cpu.py"))
    cpu._library.cache_clear()
    try:
        said = cpu.unavailable()
        assert said.startswith("the compiled library is missing: it could not be compiled at installation: odd-c++: error: no licence; ")
        assert said == cpu.describe()
        (place / "libmoeify_cpu.txt").unlink()
        cpu._library.cache_clear()
        assert "it was never built" in cpu.unavailable()
    finally:
        cpu._library.cache_clear()
