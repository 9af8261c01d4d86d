"""The compiled kernels of layers that skip input channels: every instruction set, odd sizes, threads, and what the border refuses.

Letters: T tokens, K input channels, N outputs, F neurons.
"""

import ctypes
import math

import pytest
import torch
from ffn_cases import needs_library
from numerics import assert_as_accurate_as_torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify.errors import ConfigError, KernelError
from moeify.kernels import cpu, cpu_linear
from moeify.kernels.cpu_linear import LinearWeights, SparseGated, SparseLinear, gated_refusal, refusal
from moeify.kernels.linear import explain_linear, keeps, masked, skip, sparse_linear
from moeify.sites.formula import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_library]
SIZES = [(1, 1), (7, 5), (40, 33), (300, 1000), (2100, 40), (65, 2200)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    if request.param not in cpu.isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(cpu.FORCE_ISA, request.param)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_layer(K, N, *, dtype=torch.float32, biased=False, int8=False, level=1.0):
    weight, scale = torch.randn(K, N).to(dtype), None
    if int8:
        weight, scale = torch.randint(-127, 128, (K, N), dtype=torch.int8), torch.rand(N) / 64
    return LinearWeights(weight, level * torch.rand(K), torch.randn(N).to(dtype) if biased else None, scale)


def in_fp64(x, layer):
    weight = layer.weight_KN.double() * (1 if layer.scale_N is None else layer.scale_N.double())
    kept = torch.where(x.abs().float() >= layer.level_K, x, 0).double()
    return kept @ weight + (0 if layer.bias_N is None else layer.bias_N.double())


@DTYPES
@pytest.mark.parametrize(("biased", "int8"), [(False, False), (True, False), (True, True)], ids=["plain", "biased", "int8, biased"])
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_every_instruction_set_is_as_accurate_as_torch(isa, threads, dtype, biased, int8, K, N):
    layer = random_layer(K, N, dtype=dtype, biased=biased, int8=int8)
    call = SparseLinear(layer, dtype=dtype)
    for T in (1, 2, 5, 70):
        x = torch.randn(T, K).to(dtype)
        out = call(x)
        assert_as_accurate_as_torch(out, oracle=in_fp64(x, layer), baseline=masked(x, layer))
        assert call(x).equal(out), "not the same bits again"


@DTYPES
@pytest.mark.parametrize("T", [1, 3])
def test_channels_that_nobody_keeps_are_not_read(isa, threads, dtype, T):
    layer = random_layer(120, 700, dtype=dtype, biased=True)
    x = torch.randn(T, 120).to(dtype)
    expected = SparseLinear(layer)(x)
    layer.weight_KN[~(x.abs().float() >= layer.level_K).any(0)] = math.nan
    layer.weight_KN[5], x[:, 5] = math.nan, 0
    layer.level_K[5] = 0
    found = SparseLinear(layer)(x)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, :1], in_fp64(x, layer._replace(weight_KN=layer.weight_KN.nan_to_num()))[:, :1].to(dtype))
    assert expected.shape == found.shape


@DTYPES
def test_no_channel_all_channels_and_no_token(isa, dtype):
    layer, x = random_layer(50, 70, dtype=dtype, biased=True), torch.randn(2, 50).to(dtype)
    none = layer._replace(level_K=torch.full((50,), math.inf))
    assert SparseLinear(none)(x).equal(layer.bias_N.expand(2, 70))
    everything = layer._replace(level_K=torch.zeros(50))
    assert SparseLinear(everything)(x).equal(SparseLinear(layer._replace(level_K=None))(x))
    torch.testing.assert_close(SparseLinear(everything)(x), torch.nn.functional.linear(x, layer.weight_KN.t(), layer.bias_N))
    assert SparseLinear(layer)(x[:0]).shape == (0, 70)


def test_a_value_at_its_level_is_kept_and_what_is_no_number_stays(isa):
    x = torch.tensor([[0.5, -0.5, 0.25, 0.0] * 5])
    layer = LinearWeights(torch.ones(20, 3), torch.full((20,), 0.5))
    assert SparseLinear(layer)(x.abs())[0, 0].item() == 5.0
    assert SparseLinear(layer)(x)[0, 0].item() == 0.0
    x[0, 2] = math.nan
    assert SparseLinear(layer)(x).isnan().all()
    assert masked(x, layer).isnan().all()


def test_any_strides_of_x_and_of_rows(isa):
    layer, x = random_layer(30, 40), torch.randn(30, 6, 2).transpose(0, 1)[..., 0]
    wide = torch.randn(30, 99)
    wide[:, 7:47] = layer.weight_KN
    expected = SparseLinear(layer)(x.contiguous())
    assert SparseLinear(layer._replace(weight_KN=wide[:, 7:47]))(x).equal(expected)
    assert SparseLinear(layer)(x.reshape(2, 3, 30)).equal(expected.view(2, 3, 40))


@DTYPES
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_three_layers_in_one_call_are_as_accurate_as_one_by_one(isa, threads, dtype, activation):
    for K, F, N, T in ((40, 65, 33, 1), (100, 600, 90, 3)):
        gate, up = (random_layer(K, F, dtype=dtype, biased=True) for _ in range(2))
        down = random_layer(F, N, dtype=dtype, level=0.0)
        x = torch.randn(T, K).to(dtype)
        act = ACTIVATIONS[activation]
        oracle = in_fp64(act(in_fp64(x, gate)) * in_fp64(x, up), down)
        baseline = masked(act(masked(x, gate)) * masked(x, up), down)
        out = SparseGated(gate, up, down, activation=activation, dtype=dtype)(x)
        assert_as_accurate_as_torch(out, oracle=oracle, baseline=baseline)
        # levels of down skip what stays below them
        high = down._replace(level_K=torch.full((F,), math.inf))
        assert SparseGated(gate, up, high, activation=activation, dtype=dtype)(x).eq(0).all()


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33), (300, 100), (0, 8)], ids=str)
def test_the_mask_keeps_what_reaches_its_level_bit_for_bit(isa, threads, dtype, shape):
    x = torch.randn(shape).to(dtype)
    x[..., 0] = math.nan
    x[..., -1] = -math.inf
    level = torch.rand(shape[-1])
    level[shape[-1] // 2] = 0.0
    expected = torch.where(keeps(x, level), x, 0)
    assert cpu_linear.can_mask(x, level)
    for strided in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        torch.testing.assert_close(skip(strided, level), expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(KernelError, match="levels must be"):
        cpu_linear.mask(x, torch.rand(shape[-1] + 1))


def test_a_mask_that_wants_gradients_is_pytorchs():
    x, level = torch.randn(4, 6, requires_grad=True), torch.full((6,), 0.5)
    assert not cpu_linear.can_mask(x, level) and not cpu_linear.can_mask(x.detach().double(), level)
    skip(x, level).sum().backward()
    assert torch.equal(x.grad, keeps(x, level).float())


def test_refusals_name_what_is_wrong():
    layer = random_layer(8, 6)
    for bad, message in (
        (layer._replace(weight_KN=torch.randn(6, 8).t()), "store_by_input"),
        (layer._replace(weight_KN=layer.weight_KN.double()), "must be torch.float32 as x is"),
        (layer._replace(weight_KN=layer.weight_KN.to(torch.int8)), "int8 with scales"),
        (layer._replace(weight_KN=layer.weight_KN[:0]), "something in it"),
        (layer._replace(level_K=torch.zeros(7)), "the levels must be 8"),
        (layer._replace(level_K=torch.zeros(8).bfloat16()), "the levels must be"),
        (layer._replace(bias_N=torch.zeros(12)[::2]), "the bias must be 6 contiguous"),
        (layer._replace(scale_N=torch.zeros(6)), "int8 with scales"),
        (layer._replace(bias_N=torch.zeros(6, device="meta")), "runs on the CPU"),
    ):
        assert message in refusal(bad, dtype=torch.float32)
        with pytest.raises(KernelError, match="impl 'cpu'"):
            SparseLinear(bad, dtype=torch.float32)
    assert "float32 and bfloat16" in refusal(layer, dtype=torch.float16)
    for x in (torch.randn(2, 7), torch.randn(2, 8).double(), torch.randn(2, 8, device="meta")):
        with pytest.raises(KernelError, match=r"expected \(\.\.\., 8\) torch.float32 on cpu"):
            SparseLinear(layer)(x)
    assert "do not fit together" in gated_refusal(layer, layer, layer, activation="silu", dtype=torch.float32)
    assert "does not know the activation 'mish'" in gated_refusal(layer, layer, layer, activation="mish", dtype=torch.float32)
    with pytest.raises(KernelError, match="do not fit together"):
        SparseGated(layer, layer, layer, activation="silu", dtype=torch.float32)


def test_the_library_checks_its_arguments():
    layer, x, y = random_layer(8, 6), torch.randn(1, 8), torch.empty(1, 6)
    run = cpu._library().moeify_linear_run

    def status(*, isa=0, threads=1, tokens=1, **change):
        structure = cpu_linear._describe(layer, torch.float32)
        for name, value in change.items():
            setattr(structure, name, value)
        return run(ctypes.byref(structure), x.data_ptr(), 8, tokens, y.data_ptr(), 6, isa, threads)

    assert status() == 0
    bad = (
        {"weight": None},
        {"d_in": 0},
        {"d_out": 0},
        {"dtype": 2},
        {"weight_dtype": 1},
        {"weight_dtype": 2},
        {"scale": 1},
        {"threads": 0},
    )
    for change in (*bad, {"tokens": -1}, {"weight_stride": 5}):
        assert status(**change) == 1, change
    assert status(isa=99) == 3


def test_impl_auto_is_explained_and_a_named_one_never_falls_back():
    layer, x = random_layer(8, 6), torch.randn(2, 8)
    chosen = {c.name: c for c in explain_linear(x, layer)}
    assert chosen["cpu"].chosen and not chosen["masked"].chosen
    many = {c.name: c for c in explain_linear(torch.randn(65, 8), layer)}
    assert many["masked"].chosen and "made for decoding, up to 64 tokens of torch.float32 at once, and these are 65" in many["cpu"].reason
    assert [c.reason for c in explain_linear(x, layer, impl="masked") if c.chosen] == ["asked for by name"]
    torch.testing.assert_close(sparse_linear(x, layer), sparse_linear(x, layer, impl="masked"))
    strided = layer._replace(weight_KN=torch.randn(6, 8).t())
    assert "store_by_input" in explain_linear(x, strided)[0].reason
    with pytest.raises(KernelError, match="store_by_input"):
        sparse_linear(x, strided, impl="cpu")
    with pytest.raises(ConfigError, match="did you mean 'masked'"):
        sparse_linear(x, layer, impl="mask")
    assert "while training" in explain_linear(x, layer, training=True)[0].reason
    x.requires_grad_()
    assert "no gradient" in explain_linear(x, layer)[0].reason
    sparse_linear(x, layer).sum().backward()
    assert x.grad is not None
    with pytest.raises(KernelError, match="has no gradient"):
        sparse_linear(x, layer, impl="cpu")


def test_operator_passes_torchs_own_checks():
    layer = random_layer(8, 6, biased=True)
    torch.library.opcheck(cpu_linear._sparse_linear_cpu, (torch.randn(2, 3, 8), *layer))
    with FakeTensorMode() as mode, torch.no_grad():
        fake = LinearWeights(*(None if t is None else mode.from_tensor(t) for t in layer))
        assert cpu_linear.sparse_linear(mode.from_tensor(torch.randn(2, 8)), fake).shape == (2, 6)
    with pytest.raises(KernelError, match="has no gradient"):
        cpu_linear._sparse_linear_cpu(torch.randn(2, 8, requires_grad=True), *layer)
