"""Int8 weights in every kernel: error against the fp64 oracle of the weights that they stand for, gradients, tracing, refusals.

Letters: T tokens, D model width, F FFN width, E experts.
"""

import dataclasses

import pytest
import torch
from ffn_cases import CPU_REGIMES, loop_over_tokens, map_weights, needs_library, random_ffn, random_plan
from numerics import assert_as_accurate_as_torch

from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, cpu_op, explain, impls_for, masked, moe_ffn
from moeify.routers import NormRouterConfig
from moeify.select import DynKMax, Threshold
from moeify.sites import FFNWeights
from moeify.sites.int8 import quantize_rows

pytestmark = pytest.mark.usefixtures("poisoned_empty")
HERE = impls_for("cpu")
HALF_AND_FULL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KINDS = pytest.mark.parametrize(
    ("gated", "biased"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "plain, biased", "gated", "gated, biased"],
)


def int8_ffn(D, F, **options) -> FFNWeights:
    """A random FFN whose outputs, of sizes far apart and one of them zero, are quantised."""
    weights = random_ffn(D, F, **options)
    weights.up_FD[0] = 0
    weights.down_FD.mul_(torch.logspace(-1, 1, weights.down_FD.shape[1])).select(1, 3).zero_()
    changed = {}
    for matrix in ("up_FD", "gate_FD"):
        if (rows_FD := getattr(weights, matrix)) is not None:
            changed[matrix], changed[matrix.replace("FD", "scale_F")] = quantize_rows(rows_FD)
    q_DF, scale_D = quantize_rows(weights.down_FD.t())
    return dataclasses.replace(weights, **changed, down_FD=q_DF.t().contiguous(), down_scale_D=scale_D)


def oracle_of(x_TD, weights, plan, *, activation="silu"):
    exact = map_weights(weights.dequantized(torch.float32), torch.Tensor.double)
    return loop_over_tokens(x_TD.double(), exact, plan.mask_TE, activation=activation)


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@HALF_AND_FULL
@KINDS
@CPU_REGIMES
def test_every_instruction_set_is_as_accurate_as_torch_on_dequantised_weights(monkeypatch, isa, dtype, gated, biased, T, E, F, D, keep):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, x_TD, plan = int8_ffn(D, F, gated=gated, biased=biased, dtype=dtype), torch.randn(T, D).to(dtype), random_plan(T, E, keep)
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    baseline = masked.moe_ffn(x_TD, weights.dequantized(dtype), plan, activation="silu")
    assert_as_accurate_as_torch(out, oracle=oracle_of(x_TD, weights, plan), baseline=baseline)
    assert moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu").equal(out), "not the same bits again"


@pytest.mark.parametrize("impl", HERE)
@HALF_AND_FULL
@KINDS
@pytest.mark.parametrize("T", [0, 1, 37])
def test_every_implementation_is_as_accurate_as_torch_on_dequantised_weights(impl, dtype, gated, biased, T):
    weights, x_TD, plan = int8_ffn(24, 83, gated=gated, biased=biased, dtype=dtype), torch.randn(T, 24).to(dtype), random_plan(T, 5, 0.4)
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)
    baseline = masked.moe_ffn(x_TD, weights.dequantized(dtype), plan, activation="silu")
    factor = 2.0 if impl != "reference" or dtype is torch.float32 else 10.0  # it adds experts' rounded outputs one by one
    assert_as_accurate_as_torch(out, oracle=oracle_of(x_TD, weights, plan), baseline=baseline, factor=factor)


@needs_library
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 9, 70])
def test_every_activation_sees_the_scaled_and_biased_sum(activation, T):
    weights, x_TD, plan = int8_ffn(32, 48, gated=True, biased=True), torch.randn(T, 32), random_plan(T, 6, 0.5)
    out = moe_ffn(x_TD, weights, plan, activation=activation, impl="cpu")
    torch.testing.assert_close(out.double(), oracle_of(x_TD, weights, plan, activation=activation), rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("T", [1, 70])
def test_rows_longer_than_a_step_of_the_first_product_are_added_up(monkeypatch, isa, T):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, x_TD, plan = int8_ffn(3200, 12), torch.randn(T, 3200), random_plan(T, 2, 0.5)
    oracle = oracle_of(x_TD, weights, plan)
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    assert (out - oracle).abs().max() < 1e-6 * oracle.abs().max() + 1e-5


@needs_library
def test_relu_never_reads_the_second_row_of_a_silent_neuron():
    weights = int8_ffn(16, 24)
    x_TD, plan = torch.randn(1, 16), build_plan(torch.ones(1, 4, dtype=torch.bool))
    silent = (weights.dequantized(torch.float32).up_FD @ x_TD[0]) <= 0
    expected = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu")
    weights.down_FD[silent] = 99
    assert silent.any()
    assert moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu").equal(expected)


@pytest.mark.parametrize("impl", HERE)
def test_input_and_biases_get_the_gradients_of_the_dequantised_ffn_and_integers_none(impl):
    weights, x_TD, plan = int8_ffn(8, 12, gated=True, biased=True), torch.randn(5, 8), random_plan(5, 3, 0.6)

    def gradients(dtype, make):
        x = x_TD.to(dtype).requires_grad_()
        biases = {name: getattr(weights, name).to(dtype).requires_grad_() for name in cpu.BIASES}
        return torch.autograd.grad(make(x, dataclasses.replace(weights, **biases)).square().sum(), [x, *biases.values()])

    def oracle(x, w):
        return loop_over_tokens(x, w.dequantized(torch.float64), plan.mask_TE, activation="silu")

    found = gradients(torch.float32, lambda x, w: moe_ffn(x, w, plan, activation="silu", impl=impl))
    for got, exact in zip(found, gradients(torch.float64, oracle), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("gated", [False, True])
def test_operator_with_scales_passes_opcheck(gated):
    weights, x_TD, plan = int8_ffn(8, 12, gated=gated, biased=True), torch.randn(5, 8), random_plan(5, 3, 0.6)
    tensors = [
        t.clone().requires_grad_() if t is not None and name not in (*cpu.MATRICES, *cpu.SCALES) else t
        for name, t in (("x_TD", x_TD), *((name, getattr(weights, name)) for name in cpu_op._FIELDS))
    ]
    results = torch.library.opcheck(torch.ops.moeify.ffn_cpu.default, (*tensors, plan.mask_TE, "silu"))
    assert set(results.values()) == {"SUCCESS"}


@needs_library
def test_compiled_graph_runs_the_kernel_for_any_number_of_tokens_and_trains_what_comes_before():
    weights = int8_ffn(16, 24, gated=True)

    def layer(x_TD, scores_TE):
        return moe_ffn(x_TD * 2, weights, build_plan(scores_TE > 0.4), activation="silu", impl="cpu") + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 70):
        x_TD, scores_TE = torch.randn(T, 16), torch.rand(T, 6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x_TD, scores_TE), layer(x_TD, scores_TE))
        grads = [torch.autograd.grad(f(x := x_TD.clone().requires_grad_(), scores_TE).sum(), x)[0] for f in (compiled, layer)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["auto", *HERE])
def test_autocast_casts_input_and_biases_and_leaves_the_integers(impl):
    weights, x_TD, plan = int8_ffn(16, 24, biased=True), torch.randn(5, 16), random_plan(5, 3, 0.6)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)
    assert out.dtype is torch.bfloat16
    biases = {name: t.bfloat16() for name in cpu.BIASES if (t := getattr(weights, name)) is not None}
    half = dataclasses.replace(weights, **biases)
    assert torch.equal(out, moe_ffn(x_TD.bfloat16(), half, plan, activation="silu", impl=impl))


@needs_library
def test_auto_takes_the_compiled_kernel_and_says_of_others_that_they_dequantise():
    weights, x_TD, plan = int8_ffn(16, 64), torch.randn(1, 16), random_plan(1, 8, 0.5)
    with torch.no_grad():
        assert explain(x_TD, weights, plan, activation="relu")[0].chosen
        by_name = {c.name: c for c in explain(x_TD, weights, plan, activation="relu", impl="masked")}
        unknown = explain(x_TD, weights, plan, activation="mish")
    assert "dequantises the int8 weights at every call" in by_name["masked"].reason
    chosen = next(c for c in unknown if c.chosen)
    assert chosen.name != "cpu"
    assert "dequantises" in chosen.reason
    half = int8_ffn(16, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        busy, sparse = (explain(torch.randn(300, 16).bfloat16(), half, random_plan(300, 8, f), activation="relu")[0] for f in (0.9, 0.1))
        in_fp32 = explain(torch.randn(300, 16), weights, random_plan(300, 8, 1.0), activation="relu")[0]
    assert "above the crossover" in busy.reason
    assert sparse.chosen
    assert in_fp32.chosen, "dequantising costs more than the kernel at any fraction"


def without(weights, name):
    return dataclasses.replace(weights, **{name: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: without(w, "up_scale_F"), "up_FD and up_scale_F do not fit", id="no scale"),
        pytest.param(lambda w: without(w, "down_scale_D"), "down_FD and down_scale_D do not fit", id="no scale of down"),
        pytest.param(lambda w: without(w, "gate_FD"), "gate_FD and gate_scale_F do not fit", id="scale without gate"),
        pytest.param(lambda w: dataclasses.replace(w, up_FD=w.up_FD.float()), "up_FD and up_scale_F do not fit", id="scale of floats"),
        pytest.param(
            lambda w: dataclasses.replace(w, down_FD=w.down_FD.float()), "down_FD is torch.float32.*must be torch.int8", id="mixed"
        ),
        pytest.param(lambda w: dataclasses.replace(w, up_scale_F=w.up_scale_F[:-1]), r"up_scale_F has shape \(23,\)", id="short scale"),
        pytest.param(
            lambda w: dataclasses.replace(w, down_scale_D=w.up_scale_F),
            r"down_scale_D has shape \(24,\), expected \(16,\)",
            id="scale of down by neuron",
        ),
        pytest.param(
            lambda w: dataclasses.replace(w, up_scale_F=w.up_scale_F.bfloat16()),
            "up_scale_F is torch.bfloat16",
            id="half",
        ),
        pytest.param(lambda w: dataclasses.replace(w, up_FD=w.up_FD.short()), "do not fit", id="int16"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused_before_anything_runs(change, message):
    weights, x_TD, plan = int8_ffn(16, 24, gated=True), torch.randn(2, 16), random_plan(2, 3, 0.6)
    for impl in ("auto", *HERE):
        with pytest.raises(KernelError, match=message):
            moe_ffn(x_TD, change(weights), plan, activation="silu", impl=impl)


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@HALF_AND_FULL
@pytest.mark.parametrize("rule", [Threshold(theta=0.9), DynKMax(tau=0.7)], ids=lambda rule: rule.name)
def test_routed_call_is_router_rule_and_ffn_one_after_the_other(monkeypatch, isa, dtype, rule):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, router, x_TD, scores_TE = routed_case(rule, dtype)
    y_TD, mask_TE = cpu.Routed(weights, router, activation="silu", dtype=dtype)(x_TD)
    assert mask_TE.equal(rule(scores_TE))
    assert 0 < mask_TE.sum() < mask_TE.numel()
    assert y_TD.equal(moe_ffn(x_TD, weights, build_plan(mask_TE), activation="silu", impl="cpu"))
    weights, router, x_TD, scores_TE = routed_case(rule, dtype, T=70)
    assert cpu.Routed(weights, router, activation="silu", dtype=dtype).select(x_TD).equal(rule(scores_TE))


def routed_case(rule, dtype, *, T=4):
    weights, hidden, out = int8_ffn(48, 100, gated=True, biased=True, dtype=dtype), torch.nn.Linear(48, 13), torch.nn.Linear(13, 9)
    out.weight.data.mul_(5)  # scores far enough apart for the rule to take some and leave some
    tensors = [t.detach() for t in (hidden.weight, hidden.bias, out.weight, out.bias)]
    router = cpu.RouterWeights(*tensors, output=NormRouterConfig().output, rule=rule.name, knob=rule.value)
    x_TD = torch.randn(T, 48).to(dtype)
    return weights, router, x_TD, (out(torch.relu(hidden(x_TD.float()))) / 2).exp().detach()


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: without(w, "gate_scale_F"), "int8 with scales", id="no scale"),
        pytest.param(lambda w: dataclasses.replace(w, down_FD=w.down_FD.float()), "int8 with scales", id="mixed"),
        pytest.param(lambda w: dataclasses.replace(w, up_scale_F=w.up_scale_F.double()), "scales must be contiguous float32", id="double"),
        pytest.param(lambda w: dataclasses.replace(w, down_scale_D=w.up_scale_F), "shapes do not fit", id="scale of down by neuron"),
        pytest.param(lambda w: dataclasses.replace(w, gate_scale_F=w.gate_scale_F[1:]), "shapes do not fit", id="short scale"),
        pytest.param(lambda w: dataclasses.replace(w, up_bias_F=w.up_bias_F.bfloat16()), "biases must be contiguous", id="biases"),
    ],
)
def test_routed_call_refuses_what_native_code_would_misread(change, message):
    weights, router, _, _ = routed_case(Threshold(theta=0.9), torch.float32)
    with pytest.raises(KernelError, match=message):
        cpu.Routed(change(weights), router, activation="silu", dtype=torch.float32)
    with pytest.raises(KernelError, match="takes float32 and bfloat16"):
        cpu.Routed(weights, router, activation="silu")


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@HALF_AND_FULL
@pytest.mark.parametrize("T", [1, 3, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_a_token_stays_in_that_token(monkeypatch, isa, dtype, T, value):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, x_TD, plan = int8_ffn(40, 48, dtype=dtype), torch.randn(T, 40).to(dtype), build_plan(torch.ones(T, 6, dtype=torch.bool))
    clean = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    x_TD[T // 2, 33] = value
    out = moe_ffn(x_TD, weights, plan, activation="silu", impl="cpu")
    assert not out[T // 2].isfinite().any()
    others = torch.arange(T) != T // 2
    assert clean.isfinite().all()
    # They may be computed another way beside such a token.
    torch.testing.assert_close(out[others], clean[others], rtol=2e-2, atol=2e-2 * clean.abs().max().item())


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
@HALF_AND_FULL
@pytest.mark.parametrize("T", [1, 9, 70])
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-3, 1e4], ids=str)
@pytest.mark.parametrize("largest", [30, 200, 3000])
def test_tokens_of_any_size_with_one_large_input_are_as_accurate_as_torch(monkeypatch, isa, dtype, T, size, largest):
    # What multiplies the large input is as small, as in models that have learned to live with it: its own contribution hides nothing.
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights, plan = int8_ffn(1030, 24, dtype=dtype), random_plan(T, 3, 0.7)
    weights.up_FD[:, 7] = weights.up_FD[:, 7].float().div(largest).round().to(torch.int8)
    x_TD = torch.randn(T, 1030).mul_(size).index_fill(1, torch.tensor([7]), largest * size).to(dtype)
    out = moe_ffn(x_TD, weights, plan, activation="relu", impl="cpu")
    baseline = masked.moe_ffn(x_TD, weights.dequantized(dtype), plan, activation="relu")
    assert_as_accurate_as_torch(out, oracle=oracle_of(x_TD, weights, plan, activation="relu"), baseline=baseline)
