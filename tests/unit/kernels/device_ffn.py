"""The Triton kernels of experts on a GPU where there is one, else in Triton's interpreter, by which test_triton_ffn.py runs this.

On a GPU: ``python -m pytest tests/unit/kernels/device_ffn.py``, also under compute-sanitizer (``make sanitize-gpu``). There a graph is
captured once and replayed with other contents of the same memory; in the interpreter the same function runs again.

Letters: T tokens, D input width, F FFN width, E experts.
"""

import pytest
import torch
from ffn_cases import map_weights, random_ffn, random_plan, tensors_of
from numerics import assert_as_accurate_as_torch
from tiny import convert_tiny, tiny_inputs, tiny_llama

from moeify.controls import set_impl
from moeify.kernels import build_plan, masked, moe_ffn, reference
from moeify.select import DynKMax, TopK

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)  # the interpreter computes bfloat16 wrongly
SIZES = [(1, 5, 83), (33, 6, 384), (600, 7, 300), (600, 2, 512)] if ON_GPU else [(3, 2, 384)]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # numpy, of triton 3.6's interpreter
]


def case(T, E, F, dtype):
    weights = map_weights(random_ffn(40, F, gated=True, dtype=dtype), lambda t: t.to(DEVICE))
    return weights, torch.randn(T, 40).to(DEVICE, dtype), random_plan(T, E, 0.4).mask_TE.to(DEVICE)


def captured(run):
    """Its result, and a function that fills it anew from the inputs' memory."""
    if not ON_GPU:
        found = run()

        def again():
            for kept, new in zip(found, run(), strict=True):
                kept.copy_(new)

        return found, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    return found, graph.replay


def values(function, weights, x_TD, mask_TE, dtype):
    """y and every gradient."""
    x, w = x_TD.detach().to(dtype).requires_grad_(), map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
    y = function(x, w, build_plan(mask_TE), activation="silu")
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *tensors_of(w)])]


def ours(x_TD, weights, plan, *, activation):
    return moe_ffn(x_TD, weights, plan, activation=activation, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E", "F"), SIZES)
@pytest.mark.parametrize("trains", [False, True])
def test_a_graph_holds_for_any_mask_and_is_as_accurate_as_torch(T, E, F, dtype, trains):
    weights, x_TD, mask_TE = case(T, E, F, dtype)

    def run():
        if trains:
            return values(ours, weights, x_TD, mask_TE, dtype)
        with torch.no_grad():
            return [ours(x_TD, weights, build_plan(mask_TE), activation="silu")]

    found, again = captured(run)
    for keep in (0.4, 0.9, 0.0):
        mask_TE.copy_(random_plan(T, E, keep).mask_TE)
        x_TD.copy_(torch.randn(T, 40))
        again()
        plain = values(masked.moe_ffn, weights, x_TD, mask_TE, dtype)
        exact = values(reference.moe_ffn, weights, x_TD, mask_TE, torch.float64)
        for got, other, oracle in zip(found, plain[: len(found)], exact[: len(found)], strict=True):
            assert_as_accurate_as_torch(got, oracle=oracle, baseline=other)


@needs_gpu
@pytest.mark.parametrize("rule", [TopK(k=1), DynKMax(tau=0.7)], ids=lambda rule: rule.name)
def test_a_compiled_model_generates_by_cuda_graphs_what_masked_generates(rule):
    from transformers import CompileConfig

    model = convert_tiny(tiny_llama(), rule=rule).eval().to(DEVICE)
    prompt = tiny_inputs(batch=1, length=4)["input_ids"].to(DEVICE)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    set_impl(model, "masked")
    expected = model.generate(prompt, **options, disable_compile=True)
    set_impl(model, "triton")
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    assert model.generate(prompt, **options, compile_config=compiled).equal(expected)


@needs_gpu
def test_nothing_waits_for_the_device():
    model = convert_tiny(tiny_llama(), rule=TopK(k=1)).to(DEVICE)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 70, 32, device=DEVICE)
    set_impl(model, "triton")
    for trains in (False, True):
        mlp.train(trains)
        with torch.set_grad_enabled(trains):
            mlp(x)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                y = mlp(x)
                if trains:
                    y.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
