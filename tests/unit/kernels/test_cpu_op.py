"""The operator of the compiled kernels: what autograd, the tracer and torch.compile see of it.

`test_kernels.py` compares its results and gradients with every other implementation's.
Letters: T tokens, D model width, F FFN width, E experts.
"""

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, random_ffn, random_plan, tensors_of

from moeify.kernels import build_plan, cpu, cpu_op, moe_ffn

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
