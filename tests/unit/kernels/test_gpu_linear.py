"""The border of the GPU's kernels of layers that skip input channels: what is refused, what is chosen. No GPU, and triton not imported.

Tensors "on a GPU" are stand-ins without memory, which is all that a choice looks at.
"""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify.errors import KernelError
from moeify.kernels import gpu_linear
from moeify.kernels.cpu_linear import LinearWeights
from moeify.kernels.gpu_linear import SparseLinear, refusal
from moeify.kernels.linear import COMPILED, compiled_for, explain_linear, reads_rows, sparse_linear


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def on_gpu():
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def a_layer(K=8, N=6, *, dtype=torch.float32, device="cuda", **change):
    return LinearWeights(torch.empty(K, N, dtype=dtype, device=device), torch.empty(K, device=device))._replace(**change)


@pytest.mark.parametrize("dtype", gpu_linear.DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 16, 17])
def test_auto_takes_the_kernel_for_up_to_16_tokens_on_a_gpu(dtype, T):
    x, layer = torch.empty(T, 8, dtype=dtype, device="cuda"), a_layer(dtype=dtype)
    chosen = {c.name: c for c in explain_linear(x, layer)}
    assert list(chosen) == ["cpu", "triton", "masked"]
    assert chosen["triton"].chosen == (T < 17) and chosen["masked"].chosen == (T == 17)
    assert "runs on the CPU, x is on cuda:0" in chosen["cpu"].reason
    assert compiled_for(x) is gpu_linear
    if T == 17:
        assert f"up to 16 tokens of {dtype} at once, and these are 17" in chosen["triton"].reason
    else:
        assert sparse_linear(x, layer).shape == (T, 6)


def test_on_the_cpu_auto_never_takes_it_even_where_it_could_be_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, layer = torch.empty(1, 8), a_layer(device="cpu")
    assert refusal(layer, dtype=torch.float32) is None
    assert {c.name: c.reason for c in explain_linear(x, layer)}["triton"] == "it runs on a GPU, x is on cpu"
    assert compiled_for(x).DEVICE == "cpu" and compiled_for(x, impl="triton") is gpu_linear


@pytest.mark.parametrize("why", ["while training", "no gradient", "under autocast", "torch.func"])
def test_what_it_is_not_for_runs_masked(monkeypatch, why):
    x, layer = torch.empty(1, 8, device="cuda"), a_layer()

    def objections():
        return {c.name: c for c in explain_linear(x, layer, training=why == "while training")}

    if why == "under autocast":  # which torch does not switch on without a GPU
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    with torch.set_grad_enabled(why == "no gradient"):
        x.requires_grad_(why == "no gradient")
        if why == "torch.func":
            found = []
            torch.func.vmap(lambda _: found.append(objections()) or x)(torch.empty(1, 2, device="cuda"))
            found = found[0]
        else:
            found = objections()
    assert why in found["triton"].reason and found["masked"].chosen


def test_refusals_name_what_is_wrong(monkeypatch):
    for change, message in (
        ({"weight_KN": torch.empty_strided((8, 6), (1, 8), device="cuda")}, "store_by_input"),
        ({"weight_KN": torch.empty(8, 6, device="cuda", dtype=torch.float64)}, "must be torch.float32 as x is"),
        ({"scale_N": torch.empty(6, device="cuda")}, "int8 with scales"),
        ({"level_K": torch.empty(7, device="cuda")}, "the levels must be 8"),
        ({"bias_N": torch.empty_strided((6,), (2,), device="cuda")}, "the bias must be 6 contiguous"),
        ({"bias_N": torch.empty(6)}, "on several devices: cpu, cuda:0"),
    ):
        bad = a_layer(**change)
        assert message in refusal(bad, dtype=torch.float32)
        with pytest.raises(KernelError, match="impl 'triton'"):
            SparseLinear(bad, dtype=torch.float32)
    assert "float32, float16 and bfloat16, x is torch.float64" in refusal(a_layer(), dtype=torch.float64)
    assert "runs on a GPU (or in Triton's interpreter, TRITON_INTERPRET=1), the layer is on cpu" in refusal(
        a_layer(device="cpu"), dtype=torch.float32
    )
    int8 = a_layer(dtype=torch.int8, scale_N=torch.empty(6, device="cuda"))
    assert all(refusal(int8, dtype=dtype) is None for dtype in gpu_linear.DTYPES)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "wrongly" in refusal(a_layer(dtype=torch.bfloat16), dtype=torch.bfloat16)
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: False)
    assert "triton is not installed" in refusal(a_layer(), dtype=torch.float32)


@pytest.mark.parametrize(("capability", "message"), [((7, 5), "needs compute capability 8.0, this GPU has 7.5"), ((8, 0), None)])
def test_an_old_gpu_is_refused(monkeypatch, capability, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = gpu_linear._too_old(torch.device("cuda"))
    assert found is None if message is None else message in found


def test_what_does_not_fit_the_layer_is_an_error():
    call = SparseLinear(a_layer())
    for x in (torch.empty(2, 7, device="cuda"), torch.empty(2, 8, device="cuda", dtype=torch.float16), torch.empty(2, 8)):
        with pytest.raises(KernelError, match=r"expected \(\.\.\., 8\) torch.float32 on cuda:0"):
            call(x)


def test_weights_on_a_gpu_should_lie_by_input_channel_where_triton_is(monkeypatch):
    assert reads_rows(torch.empty(2, 3, device="cuda", dtype=torch.float16))
    assert not reads_rows(torch.empty(2, 3, device="cuda", dtype=torch.float64))
    for there in (True, False):  # models are loaded on the CPU, and moved
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert reads_rows(torch.empty(2, 3, dtype=torch.float16)) == there
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: False)
    assert not reads_rows(torch.empty(2, 3, device="cuda"))


def test_an_operator_stands_for_it_where_a_tracer_must_see_one():
    x = torch.empty(2, 3, 8, device="cuda")
    assert sparse_linear(x, a_layer(), impl="triton").shape == (2, 3, 6)


def test_compiled_modules_have_what_the_dispatcher_asks_for():
    for kernel in COMPILED.values():
        assert kernel.DEVICE in ("cpu", "cuda") and all(most > 0 for most in kernel.MOST_TOKENS.values())
        assert callable(kernel.refusal) and callable(kernel.SparseLinear) and callable(kernel.sparse_linear)


def test_looking_for_triton_does_not_import_it():
    script = "import sys; from moeify.kernels import gpu_linear; gpu_linear.unavailable(); assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "error", "-c", script], check=False).returncode == 0
