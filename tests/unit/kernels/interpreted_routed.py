"""Router, rule and experts of few tokens in Triton's interpreter; test_triton_ffn.py runs this with TRITON_INTERPRET=1.

Letters: T tokens, D model width, F FFN width, W router width, E experts.
"""

import dataclasses
import math

import pytest
import torch
from ffn_cases import map_weights, random_ffn
from tiny import convert_tiny, tiny_inputs, tiny_llama

from moeify.controls import set_impl, set_rule
from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, gpu_ffn, gpu_routed, masked
from moeify.layers import moe_layers
from moeify.routers import NormRouterConfig, build_router
from moeify.select import RULES, DynKMass, DynKMax, NormBudget, Threshold, TopK
from moeify.serving.rules import PresetRules
from moeify.sites import FFNSite
from moeify.sites.int8 import quantize_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # numpy, of triton 3.6's interpreter
]
D, F, W, E = 40, 26, 12, 5
KNOBS = [Threshold(theta=1.0), DynKMax(tau=0.7), DynKMass(mass=0.6), TopK(k=2), NormBudget(beta=0.8)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def router_of(rule, *, output="exp", always_on=(), num_experts=E):
    site = FFNSite(name="", up="up", down="down", activation="silu", d_model=D, d_ff=F, d_out=D)
    router = build_router(NormRouterConfig(width=W, output=output), site=site, num_experts=num_experts)
    router.out.weight.mul_(8)
    tensors = [t.detach() for t in (router.hidden.weight, router.hidden.bias, router.out.weight, router.out.bias)]
    return router, cpu.RouterWeights(*tensors, output=output, rule=rule.name, knob=rule.value, always_on=always_on)


def is_clear(rule, scores_TE):
    """Pairs that no rounding of scores or sums can move."""
    if isinstance(rule, TopK):
        return torch.ones_like(scores_TE, dtype=torch.bool)
    critical_TE = type(rule).critical(scores_TE)
    return (critical_TE - rule.value).abs() > 1e-4 * max(1, rule.value)


@pytest.mark.parametrize("rule", KNOBS, ids=lambda rule: rule.name)
@pytest.mark.parametrize(("T", "dtype", "output"), [(1, torch.float16, "exp"), (5, torch.float32, "abs"), (6, torch.float32, "exp")])
def test_it_selects_what_router_and_rule_select(monkeypatch, rule, T, dtype, output):
    monkeypatch.setattr(gpu_routed, "MOST_TOKENS", 5)  # of six, the hidden layer is torch's
    router, weights = router_of(rule, output=output, always_on=(3,))
    x_TD = torch.randn(D, T).t().to(dtype)
    scores_TE = router(x_TD)
    expected_TE, clear_TE = rule(scores_TE), is_clear(rule, scores_TE)
    expected_TE[:, 3] = True
    assert clear_TE.float().mean() > 0.9
    assert gpu_routed.select(x_TD, weights)[clear_TE].equal(expected_TE[clear_TE])


def test_three_numbers_of_half_the_size_hold_a_weight():
    """In float16, which the interpreter knows; bfloat16 has the range of float32 besides."""
    x_TD, hidden_WD = torch.randn(D, 130).t().half(), torch.randn(W, D)
    found_1TW = gpu_routed._kernels().hidden_of_many(x_TD, hidden_WD)
    exact_TW = x_TD.double() @ hidden_WD.double().t()
    rounded = (x_TD.double() @ hidden_WD.half().double().t() - exact_TW).abs().max()
    plain = (x_TD.float() @ hidden_WD.t() - exact_TW).abs().max()
    assert (found_1TW[0] - exact_TW).abs().max() < 3 * plain < rounded / 20


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scores", [[0.0] * 4, [2.0, 1.0, 2.0, 1.0], [1.0, math.nan, 3.0, 2.0], [math.inf, 1.0, 0.0, 2.0]], ids=str)
def test_zeros_equal_scores_and_what_is_no_number(name, scores):
    """Scores are the router's output bias: a hidden layer of zeros adds nothing."""
    z_E, kind = torch.tensor(scores), RULES[name]
    if name in ("dynk_mass", "norm_budget") and math.inf in scores:
        pytest.skip("a share of infinity is nothing that anybody promises")
    zeros = torch.zeros(1, 2, 4), torch.zeros(4), torch.zeros(4, 4), z_E
    for knob in (0.0, 0.5, 1.0) if kind.bounds[1] == 1 else (1, 2, 4):
        found_TE = gpu_routed._kernels().choose(*zeros, is_exp=False, rule=name, knob=float(knob), always_on=())
        assert found_TE.equal(kind.at(knob)(z_E.expand(2, 4))), knob


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_the_call_is_selection_then_experts(int8):
    """Kernels of experts have tests of their own: here are the ends that meet."""
    weights = random_ffn(D, F, gated=True, biased=True)
    if int8:
        (up, up_F), (gate, gate_F), (down, down_D) = map(quantize_rows, (weights.up_FD, weights.gate_FD, weights.down_FD.t()))
        changed = {"up_FD": up, "gate_FD": gate, "down_FD": down.t(), "up_scale_F": up_F, "gate_scale_F": gate_F, "down_scale_D": down_D}
        weights = dataclasses.replace(weights, **changed)
    rule = DynKMax(tau=0.7)
    _, router = router_of(rule)
    routed = gpu_routed.Routed(weights, router, activation="silu", dtype=torch.float32)
    x = torch.randn(2, 3, D)
    y, mask_TE = routed(x)
    expected = masked.moe_ffn(x.view(6, D), weights.dequantized(torch.float32), build_plan(mask_TE), activation="silu")
    torch.testing.assert_close(y.view(6, D), expected)
    assert 0 < mask_TE.float().mean() < 1 and routed(x)[0].equal(y), "not the same bits again"
    assert routed(x[:0])[0].shape == (0, 3, D) and routed(x[0, 0])[0].shape == (D,)
    for bad in (x.half(), x[..., 1:]):
        with pytest.raises(KernelError, match=r"expected \(\.\.\., 40\) torch.float32 on cpu"):
            routed(bad)


def test_more_pairs_than_32_bits_count_are_an_error(monkeypatch):
    monkeypatch.setattr(gpu_ffn, "MOST_PAIRS", 6 * E)
    _, router = router_of(TopK(k=2))
    routed = gpu_routed.Routed(random_ffn(D, F, gated=True), router, activation="silu", dtype=torch.float32)
    assert routed(torch.randn(6, D))[0].shape == (6, D)
    with pytest.raises(KernelError, match=f"impl 'triton': it counts up to 30 pairs, these are 7 tokens x {E} experts"):
        routed(torch.randn(7, D))


def test_operator_passes_torchs_own_checks():
    weights, (_, router) = random_ffn(D, F, gated=True), router_of(TopK(k=2), always_on=(1,))
    matrices = [getattr(weights, name) for name in (*cpu.MATRICES, *cpu.BIASES, *cpu.SCALES)]
    args = (torch.randn(2, D), *matrices, *router.tensors, [1], "silu", "exp", "topk", 2.0)
    torch.library.opcheck(gpu_routed._routed_ffn_gpu, args)
    with torch.enable_grad(), pytest.raises(KernelError, match="routed_ffn_gpu has no gradient"):
        gpu_routed._routed_ffn_gpu(args[0].requires_grad_(), *args[1:])


def test_a_packed_batch_of_several_presets_runs_on_it():
    model = convert_tiny(tiny_llama(), rule=TopK(k=6)).eval()
    layers = tuple(moe_layers(model))
    presets = {
        "fast": dict.fromkeys(layers, TopK(k=1)),
        "half": dict.fromkeys(layers, TopK(k=3)),
        "whole": {},
        "all": {layers[0]: TopK(k=7)},
    }
    rules, mlp, x = PresetRules(model, presets), model.model.layers[0].mlp, torch.randn(1, 3, 32)
    for requests in ([("fast", 1), ("half", 2)], [("whole", 2), ("all", 1)]):
        rules.apply_batch(requests, torch.arange(3))
        set_impl(model, "masked")
        expected = mlp(x)
        set_impl(model, "triton")
        torch.testing.assert_close(mlp(x), expected)


def test_a_model_decodes_by_it_eagerly_and_compiled_with_a_static_cache(monkeypatch):
    model = convert_tiny(tiny_llama(), rule=TopK(k=1)).eval()
    prompt, calls, graphs = tiny_inputs(batch=1, length=4)["input_ids"], [], []
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    set_impl(model, "masked")
    expected = model.generate(prompt, **options)
    set_impl(model, "triton")
    moe = next(iter(moe_layers(model).values()))
    assert moe.native_refusal(torch.randn(1, 32)) is None
    assert "65 tokens are more than 64" in moe.native_refusal(torch.randn(65, 32))
    run, select = gpu_ffn._forward, gpu_routed.select
    monkeypatch.setattr(gpu_ffn, "_forward", lambda *args, **options: run(*args, **options))
    monkeypatch.setattr(gpu_routed, "select", lambda *args: calls.append(1) or select(*args))
    assert model.generate(prompt, **options).equal(expected)
    assert len(calls) == 3 * len(moe_layers(model)), "eager layers did not select by it"

    def backend(graph, inputs):
        graphs.append([name for node in graph.graph.nodes if (name := str(node.target)).startswith("moeify.")])
        return graph

    forward = model.forward
    model.forward = torch.compile(forward, backend=backend, fullgraph=True)
    assert model.generate(prompt, **options).equal(expected)
    assert graphs and all(set(names) == {"moeify.routed_ffn_gpu.default"} for names in graphs)
    model.forward = forward
    set_rule(model, NormBudget(beta=0.5))
    assert moe.native_refusal(torch.randn(1, 32)) is None, "the CPU's calls do not know this rule, these do"
    set_impl(model, "cpu")
    assert "no native call knows the rule" in moe.native_refusal(torch.randn(1, 32))
    count = len(calls)
    set_impl(model, "masked")
    model(prompt)
    assert len(calls) == count, "what was prepared for one implementation ran for another"


def test_what_it_cannot_take_says_why():
    weights, (_, router) = random_ffn(D, F, biased=True), router_of(TopK(k=2))

    def why(weights=weights, dtype=torch.float32, activation="silu", **change):
        return gpu_routed.refusal(weights, dataclasses.replace(router, **change), activation=activation, dtype=dtype)

    assert why() is None
    assert "interpreter computes bfloat16 wrongly" in why(dtype=torch.bfloat16)
    assert "does not know the activation" in why(activation="sine")
    assert "the weights must be torch.float16" in why(dtype=torch.float16)
    assert "the biases must be contiguous" in why(map_weights(weights, lambda t: t.repeat_interleave(2)[::2] if t.dim() == 1 else t))
    assert "scores up to 1024 experts, these are 2000" in why(random_ffn(D, 2000), out_EW=torch.zeros(2000, W))
    assert "5 experts do not fit 4 neurons" in why(random_ffn(D, 4))
    assert "contiguous float32" in why(hidden_WD=router.hidden_WD.half())
    assert "does not fit" in why(hidden_WD=torch.zeros(W, 7))
    assert "biases do not fit" in why(out_bias_E=torch.zeros(4))
    assert "does not know the rule 'best'" in why(rule="best")
    assert "always_on must name experts" in why(always_on=(5,))
    with pytest.raises(KernelError, match="impl 'triton': always_on"):
        gpu_routed.Routed(weights, dataclasses.replace(router, always_on=(9,)), activation="silu")
