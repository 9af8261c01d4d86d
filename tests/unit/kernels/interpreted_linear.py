"""The Triton kernels in Triton's interpreter; test_triton_linear.py runs this with TRITON_INTERPRET=1.

Letters: T tokens, K input channels, N outputs.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate_as_torch
from tiny import tiny_inputs, tiny_llama

from moeify.channels import SparseInput, attach_channels
from moeify.controls import set_impl
from moeify.errors import KernelError
from moeify.kernels import gpu_linear, triton_linear
from moeify.kernels.cpu_linear import LinearWeights
from moeify.kernels.gpu_linear import SparseLinear
from moeify.kernels.linear import masked, sparse_linear
from moeify.kernels.tiles import LinearTiles
from moeify.select import TopK
from moeify.sites import find_linear_sites

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # numpy, of triton 3.6's interpreter
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def random_layer(K, N, *, dtype=torch.float32, biased=False, int8=False, level=1.0):
    weight, scale = torch.randn(K, N).to(dtype), None
    if int8:
        weight, scale = torch.randint(-127, 128, (K, N), dtype=torch.int8), torch.rand(N) / 64
    levels = None if level is None else level * torch.rand(K)
    return LinearWeights(weight, levels, torch.randn(N).to(dtype) if biased else None, scale)


def in_fp64(x, layer):
    weight = layer.weight_KN.double() * (1 if layer.scale_N is None else layer.scale_N.double())
    if layer.level_K is not None:
        x = torch.where(x.abs().float() >= layer.level_K, x, 0)
    return x.double() @ weight + (0 if layer.bias_N is None else layer.bias_N.double())


def tiles_for(T, *, channels=16, outputs=16, splits=1, K=1):
    per_split = -(-K // channels // splits) * channels
    return LinearTiles(tokens=1 if T == 1 else 16, channels=channels, outputs=outputs, channels_per_split=per_split)


@DTYPES
@pytest.mark.parametrize(("biased", "int8"), [(False, False), (True, False), (True, True)], ids=["plain", "biased", "int8, biased"])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 5), (90, 70)])
def test_it_is_as_accurate_as_torch(dtype, biased, int8, K, N):
    layer = random_layer(K, N, dtype=dtype, biased=biased, int8=int8)
    call = SparseLinear(layer, dtype=dtype)
    for T in (1, 2):
        x = torch.randn(T, K).to(dtype)
        out = call(x)
        assert_as_accurate_as_torch(out, oracle=in_fp64(x, layer), baseline=masked(x, layer))
        assert call(x).equal(out), "not the same bits again"


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    K=st.integers(1, 70),
    N=st.integers(1, 50),
    T=st.sampled_from([1, 2, 16, 19]),
    channels=st.sampled_from([16, 32]),
    outputs=st.sampled_from([16, 32]),
    splits=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    int8=st.booleans(),
    biased=st.booleans(),
    level=st.sampled_from([None, 0.0, 1.0, 3.0, math.inf]),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_tiles(K, N, T, channels, outputs, splits, dtype, int8, biased, level, seed):
    torch.manual_seed(seed)
    layer = random_layer(K, N, dtype=dtype, biased=biased, int8=int8, level=level)
    if level == math.inf:
        layer = layer._replace(level_K=torch.full((K,), math.inf))
    x = torch.randn(T, K).to(dtype)
    out = triton_linear.run(x, layer, tiles_for(T, channels=channels, outputs=outputs, splits=splits, K=K))
    assert_as_accurate_as_torch(out, oracle=in_fp64(x, layer), baseline=masked(x, layer))


@DTYPES
@pytest.mark.parametrize("T", [1, 3])
def test_channels_that_nobody_keeps_are_not_read(dtype, T):
    layer = random_layer(60, 20, dtype=dtype, biased=True)
    x = torch.randn(T, 60).to(dtype)
    x[:, 5], layer.level_K[5] = 0, 0  # a zero reaches a level of zero, and adds nothing
    x[:, 6], layer.level_K[6] = -0.0, 0
    expected = masked(x, layer)
    skipped = ~(x.abs().float() >= layer.level_K).any(0)
    assert 3 < skipped.sum() < 57
    skipped[5:7] = True
    layer.weight_KN[skipped] = math.nan
    torch.testing.assert_close(SparseLinear(layer)(x), expected, rtol=1e-2, atol=1e-2)


@DTYPES
def test_no_channel_all_channels_and_no_token(dtype):
    layer, x = random_layer(20, 34, dtype=dtype, biased=True), torch.randn(2, 20).to(dtype)
    none = layer._replace(level_K=torch.full((20,), math.inf))
    everything, unlevelled = layer._replace(level_K=torch.zeros(20)), layer._replace(level_K=None)
    for tokens in (x, x[:1]):
        assert SparseLinear(none)(tokens).equal(layer.bias_N.expand(len(tokens), 34))
        assert SparseLinear(none._replace(bias_N=None))(tokens).eq(0).all()
        assert SparseLinear(everything)(tokens).equal(SparseLinear(unlevelled)(tokens))
    assert SparseLinear(layer)(x[:0]).shape == (0, 34)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of outputs that fill up a tile: infinity times 0
@pytest.mark.parametrize("T", [1, 2])
def test_a_value_at_its_level_is_kept_and_what_is_no_number_stays(T):
    x = torch.tensor([[0.5, -0.5, 0.25, 0.0] * 5]).expand(T, 20).clone()
    layer = LinearWeights(torch.ones(20, 3), torch.full((20,), 0.5))
    assert SparseLinear(layer)(x.abs())[0, 0].item() == 5.0
    assert SparseLinear(layer)(x)[0, 0].item() == 0.0
    x[0, 2] = math.nan
    found = SparseLinear(layer)(x)
    assert found[0].isnan().all() and not found[1:].isnan().any()
    x[0, 2] = math.inf
    assert SparseLinear(layer._replace(level_K=torch.full((20,), math.inf)))(x)[0].tolist() == [math.inf] * 3


@pytest.mark.parametrize("T", [1, 6])
def test_any_strides_of_x_and_of_rows(T):
    layer, x = random_layer(30, 40), torch.randn(30, T, 2).transpose(0, 1)[..., 0]
    wide = torch.randn(30, 99)
    wide[:, 7:47] = layer.weight_KN
    expected = SparseLinear(layer)(x.contiguous())
    assert SparseLinear(layer._replace(weight_KN=wide[:, 7:47]))(x).equal(expected)
    assert SparseLinear(layer)(x.reshape(T, 1, 30)).equal(expected.view(T, 1, 40))
    assert SparseLinear(layer)(x[0]).shape == (40,)


def test_operator_passes_torchs_own_checks():
    layer = random_layer(8, 6, biased=True)
    torch.library.opcheck(gpu_linear._sparse_linear_gpu, (torch.randn(2, 3, 8), *layer))
    x = torch.randn(2, 8, requires_grad=True)
    for call in (lambda: sparse_linear(x, layer, impl="triton"), lambda: gpu_linear._sparse_linear_gpu(x, *layer)):
        with torch.enable_grad(), pytest.raises(KernelError, match="has no gradient"):
            call()


def test_bfloat16_is_refused_here():
    with pytest.raises(KernelError, match="interpreter computes bfloat16 wrongly"):
        sparse_linear(torch.randn(1, 8).bfloat16(), random_layer(8, 6, dtype=torch.bfloat16), impl="triton")


@pytest.mark.parametrize("options", [{}, {"rule": TopK(k=5)}, {"first_dense": 1}], ids=str)
def test_a_model_decodes_by_it_when_asked_for_by_name(options):
    model = tiny_llama().eval()
    site = find_linear_sites(model, tiny_inputs())[0]
    executor = SparseInput(site, **options)
    executor.level_K.fill_(0.5)
    attach_channels(model, executor)
    linear, calls = model.get_submodule(site.name), []
    linear.weight.data = linear.weight.data.t().contiguous().t()  # by input channel, wherever the CPU's library is not
    run = triton_linear.run
    set_impl(model, "triton")
    try:
        triton_linear.run = lambda *args: calls.append(args) or run(*args)
        for x in (torch.randn(1, 2, site.d_in), torch.randn(2, 1, site.d_in), torch.randn(1, 20, site.d_in)):
            expected = torch.nn.functional.linear(torch.where(executor.select(x), x, 0), linear.weight)
            torch.testing.assert_close(linear(x), expected)
            assert executor.masked_reason(linear, x) is None
            torch.testing.assert_close(linear(x), expected)
        assert len(calls) == 6
        if options:
            return
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert len(calls) == 7
        set_impl(model, "auto")
        torch.testing.assert_close(linear(x), expected)
        assert len(calls) == 7, "what was prepared for one implementation ran for another"
    finally:
        triton_linear.run = run
    set_impl(model, "triton")
    with torch.enable_grad(), pytest.raises(KernelError, match="impl 'triton': it has no gradient"):
        linear(x)
