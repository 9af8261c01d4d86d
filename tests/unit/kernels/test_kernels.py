"""Every implementation against the fp64 loop over tokens, forward and every gradient.

Covered: 1 results; 2 gradients; 3 autocast and compile; 4 dispatch and its explanations; 5 what the border refuses.
Letters: T tokens, D model width, F FFN width, E experts.
"""

import dataclasses

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, random_ffn, random_plan, tensors_of
from numerics import assert_as_accurate_as_torch

from moeify.errors import ConfigError, KernelError
from moeify.kernels import IMPLS, TEACHING, build_plan, explain, impls_for, masked, moe_ffn

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Where there is no compiler there is no library; test_cpu.py fails if there is a compiler and yet no library.
HERE = impls_for("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RUNS = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype)[6:]}")
    for impl in HERE
    for dtype in FLOATS
    if not impl.startswith("cpu") or dtype in (torch.float32, torch.bfloat16)
]
SHAPES = [
    pytest.param(1, 4, 64, 32, 0.5, id="decode: one token"),
    pytest.param(37, 5, 80, 24, 0.3, id="odd everything"),
    pytest.param(37, 5, 83, 23, 0.3, id="experts differ by one neuron, unaligned widths"),
    pytest.param(40, 8, 128, 32, 0.05, id="some experts get no token, some tokens no expert"),
    pytest.param(40, 8, 128, 32, 1.0, id="all experts: equals dense"),
    pytest.param(9, 8, 128, 32, 0.0, id="no pair at all"),
    pytest.param(12, 3, 300, 16, 0.4, id="wide experts: one GEMM each"),
    pytest.param(30, 20, 20, 16, 0.3, id="experts of one neuron"),
    pytest.param(0, 4, 16, 8, 0.5, id="no token"),
]
KINDS = [
    pytest.param("relu", False, False, id="plain"),
    pytest.param("gelu", False, True, id="plain, biased"),
    pytest.param("silu", True, False, id="gated"),
    pytest.param("gelu_tanh", True, True, id="gated, biased"),
]


@pytest.mark.parametrize(("impl", "dtype"), RUNS)
@pytest.mark.parametrize(("activation", "gated", "biased"), KINDS)
@pytest.mark.parametrize(("T", "E", "F", "D", "keep"), SHAPES)
def test_moe_ffn_matches_fp64_loop(impl, dtype, activation, gated, biased, T, E, F, D, keep):
    weights = random_ffn(D, F, gated=gated, biased=biased, dtype=dtype)
    x_TD, plan = torch.randn(T, D).to(dtype), random_plan(T, E, keep)
    out = moe_ffn(x_TD, weights, plan, activation=activation, impl=impl)
    oracle = loop_over_tokens(x_TD.double(), map_weights(weights, torch.Tensor.double), plan.mask_TE, activation=activation)
    baseline = masked.moe_ffn(x_TD, weights, plan, activation=activation)
    # the reference adds experts' rounded outputs one by one in the input's dtype: its error grows with their number
    factor = 2.0 if impl != "reference" or dtype in (torch.float32, torch.float64) else 2.0 * E
    assert_as_accurate_as_torch(out, oracle=oracle, baseline=baseline, factor=factor)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("activation", "gated", "biased"), KINDS)
@pytest.mark.parametrize(("T", "E", "F", "D", "keep"), SHAPES[1:7])
def test_gradients_match_fp64_loop(impl, dtype, activation, gated, biased, T, E, F, D, keep):
    weights = random_ffn(D, F, gated=gated, biased=biased, dtype=dtype)
    x_TD, plan, upstream_TD = torch.randn(T, D).to(dtype), random_plan(T, E, keep), torch.randn(T, D).to(dtype)

    def gradients(function, dtype):
        x = x_TD.to(dtype).requires_grad_()
        w = map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
        out = function(x, w) + 0 * x.sum()  # without pairs nothing else depends on an input
        return torch.autograd.grad(out, [x, *tensors_of(w)], upstream_TD.to(dtype), allow_unused=True, materialize_grads=True)

    out = gradients(lambda x, w: moe_ffn(x, w, plan, activation=activation, impl=impl), dtype)
    oracle = gradients(lambda x, w: loop_over_tokens(x, w, plan.mask_TE, activation=activation), torch.float64)
    baseline = gradients(lambda x, w: masked.moe_ffn(x, w, plan, activation=activation), dtype)
    factor = 2.0 if impl != "reference" or dtype is torch.float32 else 2.0 * E
    for got, exact, plain in zip(out, oracle, baseline, strict=True):
        assert_as_accurate_as_torch(got, oracle=exact, baseline=plain, factor=factor)


@pytest.mark.parametrize("impl", [impl for impl in HERE if impl in TEACHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("activation", "gated", "biased"), KINDS)
@pytest.mark.parametrize(("T", "E", "F", "D", "keep"), SHAPES[1:8])
def test_probabilities_change_nothing_but_get_each_selected_experts_share_of_the_gradient(
    impl, dtype, activation, gated, biased, T, E, F, D, keep
):
    weights = random_ffn(D, F, gated=gated, biased=biased, dtype=dtype)
    x_TD, upstream_TD = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    mask_TE, probs_TE = torch.rand(T, E) < keep, torch.rand(T, E).requires_grad_()

    def gradients(impl, probs_TE):
        x = x_TD.clone().requires_grad_()
        out = moe_ffn(x, weights, build_plan(mask_TE, probs_TE), activation=activation, impl=impl)
        leaves = [x] if probs_TE is None else [x, probs_TE]
        return out, *torch.autograd.grad(out, leaves, upstream_TD, allow_unused=True, materialize_grads=True)

    out, grad_x, grad_probs = gradients(impl, probs_TE)
    plain, plain_grad_x = gradients(impl, None)
    assert torch.equal(out, plain)
    torch.testing.assert_close(grad_x, plain_grad_x)
    wide = map_weights(weights, torch.Tensor.double)
    expected = torch.zeros(T, E, dtype=torch.float64)  # <upstream, y_e>, expert by expert
    for e in range(E):
        only_TE = torch.zeros_like(mask_TE).index_fill(1, torch.tensor(e), True) & mask_TE
        y_TD = loop_over_tokens(x_TD.double(), dataclasses.replace(wide, down_bias_D=None), only_TE, activation=activation)
        expected[:, e] = (y_TD * upstream_TD.double()).sum(1)
    factor = 2.0 if impl != "reference" or dtype is torch.float32 else 2.0 * E
    assert_as_accurate_as_torch(grad_probs, oracle=expected, baseline=gradients("masked", probs_TE)[2], factor=factor)
    assert (grad_probs[~mask_TE] == 0).all()


def test_implementations_without_a_gradient_for_probabilities_refuse_them():
    weights, plan = random_ffn(8, 12), build_plan(torch.ones(3, 4, dtype=torch.bool), torch.rand(3, 4))
    for impl in set(HERE) - set(TEACHING):
        with pytest.raises(KernelError, match=f"impl '{impl}' has no gradient for the router's probabilities"):
            moe_ffn(torch.randn(3, 8), weights, plan, activation="relu", impl=impl)
        (row,) = (c for c in explain(torch.randn(3, 8), weights, plan, activation="relu") if c.name == impl)
        assert (row.chosen, row.reason) == (False, "it has no gradient for the router's probabilities")
    with pytest.raises(ValueError, match=r"probs_TE must be floating, \(3, 4\), got \(3, 5\)"):
        build_plan(plan.mask_TE, torch.rand(3, 5))


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("wanted", ["x", "up_FD", "down_FD", "down_bias_D"])
def test_gradient_of_one_input_when_the_rest_is_frozen(impl, wanted):
    weights, x_TD, plan = random_ffn(8, 12, gated=True, biased=True), torch.randn(5, 8), random_plan(5, 3, 0.6)
    leaf = (x_TD if wanted == "x" else getattr(weights, wanted)).requires_grad_()
    moe_ffn(x_TD, weights, plan, activation="silu", impl=impl).sum().backward()
    got, leaf.grad = leaf.grad, None
    masked.moe_ffn(x_TD, weights, plan, activation="silu").sum().backward()
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_moe_ffn_when_input_is_strided_ignores_the_layout(impl, conv1d):
    weights, plan = random_ffn(16, 24, gated=True, conv1d=conv1d), random_plan(10, 6, 0.4)
    for x_TD in (torch.randn(16, 10).t(), torch.randn(10, 32)[:, ::2], torch.randn(1, 16).expand(10, 16)):
        out = moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)
        torch.testing.assert_close(out, loop_over_tokens(x_TD, weights, plan.mask_TE, activation="silu"))


@pytest.mark.parametrize("impl", HERE)
def test_moe_ffn_when_one_expert_takes_all_tokens(impl):
    weights, mask_TE = random_ffn(16, 40, biased=True), torch.rand(33, 5) < 0.1
    mask_TE[:, 2] = True
    x_TD, plan = torch.randn(33, 16), build_plan(mask_TE)
    torch.testing.assert_close(
        moe_ffn(x_TD, weights, plan, activation="relu", impl=impl), loop_over_tokens(x_TD, weights, mask_TE, activation="relu")
    )


@pytest.mark.parametrize("impl", HERE)
def test_unselected_experts_when_they_overflow_stay_unseen(impl):
    weights, mask_TE = random_ffn(8, 12), torch.ones(6, 3, dtype=torch.bool)
    weights.up_FD[4:8] = float("inf")
    mask_TE[:, 1] = False
    assert moe_ffn(torch.rand(6, 8) + 0.1, weights, build_plan(mask_TE), activation="relu", impl=impl).isfinite().all()


@pytest.mark.parametrize("impl", [*HERE, "auto"])
def test_moe_ffn_under_autocast_computes_in_its_dtype(impl):
    weights, x_TD, plan = random_ffn(16, 24, gated=True, biased=True), torch.randn(10, 16, requires_grad=True), random_plan(10, 6, 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_ffn(x_TD, weights, plan, activation="silu", impl=impl)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert x_TD.grad.dtype is torch.float32
    exact = loop_over_tokens(x_TD, weights, plan.mask_TE, activation="silu")
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("impl", ["masked", "auto", *(impl for impl in HERE if impl.startswith("cpu"))])
def test_moe_ffn_when_compiled_is_one_graph(impl):
    weights, x_TD, scores_TE = random_ffn(16, 24, gated=True), torch.randn(10, 16, requires_grad=True), torch.rand(10, 6)

    def layer(x_TD):
        return moe_ffn(x_TD, weights, build_plan(scores_TE < 0.4), activation="silu", impl=impl)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x_TD)
    torch.testing.assert_close(compiled, layer(x_TD))
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x_TD), torch.autograd.grad(layer(x_TD).sum(), x_TD))


def test_grouped_when_compiled_breaks_the_graph_and_stays_right():
    weights, x_TD, plan = random_ffn(16, 24), torch.randn(10, 16), random_plan(10, 6, 0.4)

    def layer(x_TD):
        return moe_ffn(x_TD * 2, weights, plan, activation="relu", impl="grouped") + 1

    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x_TD), layer(x_TD))


def test_auto_order_covers_every_impl_but_the_oracle_and_what_saves_memory():
    from moeify.kernels import AUTO_ORDER

    assert {*AUTO_ORDER, "reference", "triton_recompute"} == set(IMPLS)


@pytest.mark.parametrize(
    ("T", "E", "F", "keep", "chosen"),
    [
        pytest.param(1, 64, 512, 0.05, "gather", id="one token, few experts"),
        pytest.param(64, 16, 128, 0.95, "masked", id="nearly all experts"),
        pytest.param(256, 16, 128, 0.05, "grouped", id="many tokens, few experts each"),
    ],
)
def test_explain_when_auto_names_what_runs_and_why_not_the_rest(T, E, F, keep, chosen):
    weights, x_TD, plan = random_ffn(16, F), torch.randn(T, 16), random_plan(T, E, keep)
    candidates = explain(x_TD, weights, plan, activation="relu")
    assert [c.name for c in candidates if c.chosen] == [chosen]
    assert {c.name for c in candidates} == set(IMPLS)
    assert all(c.reason for c in candidates)


def test_explain_when_impl_is_named_chooses_it():
    weights, x_TD, plan = random_ffn(8, 16), torch.randn(3, 8), random_plan(3, 4, 0.5)
    (chosen,) = [c for c in explain(x_TD, weights, plan, activation="relu", impl="reference") if c.chosen]
    assert (chosen.name, chosen.reason) == ("reference", "asked for by name")


def test_moe_ffn_when_a_name_is_unknown_names_the_nearest():
    weights, x_TD, plan = random_ffn(8, 16), torch.randn(3, 8), random_plan(3, 4, 0.5)
    with pytest.raises(ConfigError, match="did you mean 'grouped'"):
        moe_ffn(x_TD, weights, plan, activation="relu", impl="groupd")
    with pytest.raises(ConfigError, match="did you mean 'silu'"):
        moe_ffn(x_TD, weights, plan, activation="sillu")
    with pytest.raises(ConfigError, match="did you mean 'masked'"):
        explain(x_TD, weights, plan, activation="relu", impl="maskd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.randn(1, 3, 8)}, "2-D floating tensor, got \\(1, 3, 8\\)", id="batched input"),
        pytest.param({"x": torch.ones(3, 8, dtype=torch.int64)}, "torch.int64", id="integer input"),
        pytest.param({"x": torch.randn(4, 8)}, "4 tokens, the plan has 3", id="other number of tokens"),
        pytest.param({"x": torch.randn(3, 9)}, "up_FD has shape \\(16, 8\\), expected \\(16, 9\\)", id="other width"),
        pytest.param({"x": torch.randn(3, 8).double()}, "up_FD is torch.float32.*x_TD is torch.float64", id="mixed dtypes"),
        pytest.param({"x": torch.empty(3, 8, device="meta")}, "on cpu, x_TD is torch.float32 on meta", id="mixed devices"),
        pytest.param({"gate_FD": torch.randn(15, 8)}, "gate_FD has shape", id="gate of another size"),
        pytest.param({"down_bias_D": torch.randn(16)}, "down_bias_D has shape \\(16,\\), expected \\(8,\\)", id="bias of another size"),
        pytest.param({"plan": random_plan(3, 17, 1.0)}, "17 experts, the FFN only 16 neurons", id="more experts than neurons"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "grouped"])
def test_moe_ffn_when_tensors_do_not_fit_says_which(impl, change, message):
    weights, plan = random_ffn(8, 16), change.get("plan") or random_plan(3, 4, 0.5)
    fields = {k: v for k, v in change.items() if k not in ("x", "plan")}
    with pytest.raises(KernelError, match=message):
        moe_ffn(change.get("x", torch.randn(3, 8)), dataclasses.replace(weights, **fields), plan, activation="relu", impl=impl)
