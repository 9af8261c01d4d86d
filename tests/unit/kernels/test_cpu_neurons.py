"""The compiled kernels of FFNs that skip single neurons: every instruction set, odd sizes, threads, and what the border refuses.

Letters: T tokens, D model width, F FFN width, R rank.
"""

import ctypes
import dataclasses
import math

import pytest
import torch
from ffn_cases import map_weights, needs_library, random_ffn
from numerics import assert_as_accurate_as_torch

from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, masked
from moeify.kernels.cpu_neurons import LowRankWeights, NeuronRouterWeights, RoutedNeurons, neurons_refusal
from moeify.routers import GateRouterConfig, LowRankRouterConfig, OracleRouterConfig, build_router
from moeify.select import RULES
from moeify.sites import FFNSite
from moeify.sites.formula import ffn_dense, ffn_hidden
from moeify.sites.int8 import quantize_rows

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_library]
SIZES = [(1, 1), (7, 5), (40, 33), (96, 130), (1700, 50)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KINDS = ("gate", "lowrank", "lowrank, plain", "hidden", "hidden, plain")
KNOBS = {"threshold": 0.4, "dynk_max": 0.2, "dynk_mass": 0.8, "topk": 3}


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    if request.param not in cpu.isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(cpu.FORCE_ISA, request.param)


def random_router(kind, D, F, *, activation="silu"):
    """A module of `moeify.routers` with random content: the definition of the scores."""
    gate = None if kind.endswith("plain") else "mlp.gate"
    site = FFNSite(name="mlp", up="mlp.up", down="mlp.down", gate=gate, activation=activation, d_model=D, d_ff=F, d_out=D)
    configs = {"gate": GateRouterConfig(), "lowrank": LowRankRouterConfig(rank=9), "hidden": OracleRouterConfig(of="activation")}
    config = configs[kind.removesuffix(", plain")]
    router = build_router(config, site=site, num_experts=F)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.detach().copy_(torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor) / tensor.shape[1] ** 0.5)
    return router


def native_weights(router, rule, *, always_on=()):
    low_rank = None
    if isinstance(router.config, LowRankRouterConfig):
        gate = router.gate
        gated = () if gate is None else (gate.weight.detach(), gate.bias.detach(), router.gate_std_F)
        low_rank = LowRankWeights(
            router.project.weight.detach(), router.up.weight.detach(), router.up.bias.detach(), router.up_std_F, *gated
        )
    scale_F = None if isinstance(router.config, OracleRouterConfig) else router.scale_F
    return NeuronRouterWeights(scale_F=scale_F, rule=rule.name, knob=rule.value, low_rank=low_rank, always_on=always_on)


def random_case(kind, D, F, *, dtype=torch.float32, biased=False, int8=False, name="threshold", knob=None, activation="silu"):
    weights = random_ffn(D, F, gated=not kind.endswith("plain"), biased=biased, dtype=dtype, conv1d=False)
    weights = map_weights(weights, torch.Tensor.contiguous)
    if int8:
        changed = {}
        for matrix in ("up_FD", "gate_FD"):
            if (rows_FD := getattr(weights, matrix)) is not None:
                changed[matrix], changed[matrix.replace("FD", "scale_F")] = quantize_rows(rows_FD)
        q_DF, scale_D = quantize_rows(weights.down_FD.t())
        weights = dataclasses.replace(weights, **changed, down_FD=q_DF.t().contiguous(), down_scale_D=scale_D)
    rule = RULES[name](**{RULES[name].knob: KNOBS[name] if knob is None else knob})
    return weights, random_router(kind, D, F, activation=activation), rule


def in_fp64(x_TD, weights, mask_TF):
    """Every neuron computed, and of each token those left out that it does not keep."""
    exact = map_weights(weights.dequantized(torch.float32), torch.Tensor.double)
    h_TF = ffn_hidden(x_TD.double(), exact, activation="silu").masked_fill(~mask_TF, 0)
    return h_TF @ exact.down_FD + (0 if exact.down_bias_D is None else exact.down_bias_D)


def check_selection(mask_TF, x_TD, weights, router, rule, *, relative):
    """The rule on the router's own scores; where it differs, the scores are as near to each other as rounding leaves them."""
    scores_TF = router(x_TD.float(), map_weights(weights.dequantized(torch.float32), torch.Tensor.float))
    expected_TF = rule(scores_TF)
    for t in (mask_TF != expected_TF).any(1).nonzero().flatten().tolist():
        differs = mask_TF[t] != expected_TF[t]
        level = scores_TF[t][expected_TF[t]].min()
        assert differs.sum() <= 2 + 0.01 * len(differs), "more than the neurons at the level are others"
        assert ((scores_TF[t][differs] - level).abs() <= relative * scores_TF[t].amax()).all()


@DTYPES
@pytest.mark.parametrize(("biased", "int8"), [(False, False), (True, False), (True, True)], ids=["plain", "biased", "int8, biased"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "F"), SIZES)
def test_every_instruction_set_is_as_accurate_as_torch(isa, kind, dtype, biased, int8, D, F):
    weights, router, rule = random_case(kind, D, F, dtype=dtype, biased=biased, int8=int8)
    call = RoutedNeurons(weights, native_weights(router, rule), activation="silu", dtype=dtype)
    x_TD = torch.randn(22, D).to(dtype)
    parts = [call(x_tD) for x_tD in x_TD.split([1, 2, 19])]
    y_TD, mask_TF = (torch.cat(part) for part in zip(*parts, strict=True))
    assert mask_TF.any(1).all()
    check_selection(mask_TF, x_TD, weights, router, rule, relative=1e-5 if dtype is torch.float32 else 1e-3)
    baseline = masked.moe_ffn(x_TD, weights.dequantized(dtype), build_plan(mask_TF), activation="silu")
    assert_as_accurate_as_torch(y_TD, oracle=in_fp64(x_TD, weights, mask_TF), baseline=baseline)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_give_the_same_bits_again(isa, kind, dtype, threads):
    weights, router, rule = random_case(kind, 64, 70, dtype=dtype, biased=True)
    call, before = RoutedNeurons(weights, native_weights(router, rule), activation="silu"), torch.get_num_threads()
    x_TD = torch.randn(3, 64).to(dtype)
    alone_TD, alone_TF = call(x_TD)
    torch.set_num_threads(threads)
    try:
        (y_TD, mask_TF), (again_TD, again_TF) = call(x_TD), call(x_TD)
    finally:
        torch.set_num_threads(before)
    assert again_TD.equal(y_TD) and again_TF.equal(mask_TF) and mask_TF.equal(alone_TF)
    torch.testing.assert_close(y_TD, alone_TD)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "silu") for name in KNOBS), *(("threshold", activation) for activation in cpu.ACTIVATIONS if activation != "silu")],
)
def test_every_rule_and_activation_selects_as_its_pieces_do(kind, name, activation):
    weights, router, rule = random_case(kind, 24, 70, name=name, activation=activation)
    x_TD = torch.randn(5, 24)
    _, mask_TF = RoutedNeurons(weights, native_weights(router, rule), activation=activation)(x_TD)
    check_selection(mask_TF, x_TD, weights, router, rule, relative=1e-4)
    if name == "topk":
        assert mask_TF.sum(1).eq(3).all()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 5])
def test_neurons_that_nobody_keeps_are_not_read(isa, dtype, kind, T):
    weights, router, rule = random_case(kind, 70, 90, dtype=dtype, biased=True, name="topk", knob=7)
    call = RoutedNeurons(weights, native_weights(router, rule), activation="silu")
    x_TD = torch.randn(T, 70).to(dtype)
    expected_TD, mask_TF = call(x_TD)
    silent = ~mask_TF.any(0)
    assert silent.any()
    first = {"gate": [weights.up_FD], "lowrank": [weights.up_FD, weights.gate_FD], "hidden": []}[kind.removesuffix(", plain")]
    matrices = [weights.down_FD, *(t for t in first if t is not None)]
    for matrix in matrices:
        matrix[silent] = math.nan
    found_TD, again_TF = call(x_TD)
    assert found_TD.equal(expected_TD) and again_TF.equal(mask_TF)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_a_neuron_stays_out_of_tokens_that_skip_it(isa, value):
    weights, router, rule = random_case("gate", 20, 40, name="topk", knob=10)
    x_TD = torch.randn(6, 20)
    call = RoutedNeurons(weights, native_weights(router, rule), activation="silu")
    expected_TD, mask_TF = call(x_TD)
    j = int((mask_TF.any(0) & ~mask_TF.all(0)).nonzero()[0])
    weights.up_FD[j] = weights.down_FD[j] = value
    found_TD, _ = call(x_TD)
    assert found_TD[~mask_TF[:, j]].equal(expected_TD[~mask_TF[:, j]])
    assert not found_TD[mask_TF[:, j]].isfinite().all(1).any()


@pytest.mark.parametrize("kind", ["gate", "lowrank", "hidden"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e15])
def test_a_token_that_is_no_number_selects_as_its_pieces_do(isa, kind, value):
    for name in KNOBS:
        weights, router, rule = random_case(kind, 20, 40, name=name)
        x_TD = torch.randn(3, 20)
        x_TD[1] = value
        y_TD, mask_TF = RoutedNeurons(weights, native_weights(router, rule), activation="silu")(x_TD)
        assert mask_TF[1].equal(rule(router(x_TD, weights))[1]), name
        assert y_TD[[0, 2]].isfinite().all()
        assert y_TD[1].isfinite().any() == math.isfinite(value)


@pytest.mark.parametrize("F", [50, 3000], ids=["few neurons", "sums of many neurons"])
def test_all_kept_is_the_dense_ffn_and_none_is_its_bias(isa, F):
    weights, router, _ = random_case("gate", 33, F, biased=True)
    x_TD = torch.randn(4, 33)
    everything = RoutedNeurons(weights, native_weights(router, RULES["threshold"](theta=0.0)), activation="silu")
    y_TD, mask_TF = everything(x_TD)
    assert mask_TF.all()
    assert_as_accurate_as_torch(y_TD, oracle=in_fp64(x_TD, weights, mask_TF), baseline=ffn_dense(x_TD, weights, activation="silu"))
    # no rule selects nothing; a knob below 1 of the library's "topk" does
    nothing = dataclasses.replace(native_weights(router, RULES["topk"](k=1)), knob=0.0)
    y_TD, mask_TF = RoutedNeurons(weights, nothing, activation="silu")(x_TD)
    assert not mask_TF.any()
    assert y_TD.equal(weights.down_bias_D.expand(4, -1))


def test_kept_neurons_of_a_silent_gate_add_nothing():
    weights, router, rule = random_case("gate", 8, 12, activation="relu")
    weights.gate_FD.fill_(-1)
    y_TD, mask_TF = RoutedNeurons(weights, native_weights(router, rule), activation="relu")(torch.ones(2, 8))
    assert mask_TF.all(), "all scores are equal: none is below the largest"
    assert y_TD.eq(0).all()


def test_always_on_neurons_run(isa):
    weights, router, rule = random_case("gate", 20, 40, name="topk", knob=2)
    x_TD = torch.randn(3, 20)
    _, without_TF = RoutedNeurons(weights, native_weights(router, rule), activation="silu")(x_TD)
    _, mask_TF = RoutedNeurons(weights, native_weights(router, rule, always_on=(0, 39)), activation="silu")(x_TD)
    without_TF[:, [0, 39]] = True
    assert mask_TF.equal(without_TF)


def test_values_written_into_the_tensors_are_seen():
    weights, router, rule = random_case("gate", 20, 40, knob=0.1)
    call = RoutedNeurons(weights, native_weights(router, rule), activation="silu")
    x_TD = torch.randn(2, 20)
    before, _ = call(x_TD)
    weights.up_FD.mul_(2)
    assert call(x_TD)[0].equal(2 * before)


def test_shapes_and_strides_of_the_input():
    weights, router, rule = random_case("gate", 20, 40)
    call = RoutedNeurons(weights, native_weights(router, rule), activation="silu")
    x = torch.randn(2, 3, 20)
    y, mask_TF = call(x)
    assert y.shape == (2, 3, 20) and mask_TF.shape == (6, 40)
    strided = torch.randn(20, 6).t()
    assert call(strided)[0].equal(call(strided.contiguous())[0])
    y, mask_TF = call(torch.randn(0, 20))
    assert y.shape == (0, 20) and mask_TF.shape == (0, 40)
    for wrong in (torch.randn(2, 19), torch.randn(2, 20).bfloat16(), torch.empty(2, 20, device="meta")):
        with pytest.raises(KernelError, match="impl 'cpu': x is"):
            call(wrong)


def test_refusals_name_what_does_not_fit():
    weights, router, rule = random_case("gate", 20, 40)
    native = native_weights(router, rule)
    predicted = native_weights(random_router("lowrank", 20, 40), rule)
    plain = map_weights(random_ffn(20, 40), torch.Tensor.contiguous)
    for router_weights, ffn, activation, message in [
        (dataclasses.replace(native, scale_F=torch.ones(39)), weights, "silu", "the router's tensors do not fit 40 neurons of 20 inputs"),
        (dataclasses.replace(native, scale_F=torch.ones(40).double()), weights, "silu", "contiguous float32"),
        (dataclasses.replace(native, rule="norm_budget"), weights, "silu", "does not know the rule 'norm_budget'"),
        (dataclasses.replace(native, always_on=(40,)), weights, "silu", "always_on must name neurons in"),
        (native, plain, "silu", "no gate to read the scores off"),
        (native, weights, "mish", "does not know the activation 'mish'"),
        (predicted, plain, "silu", "do not fit"),
        (native, random_ffn(20, 40, gated=True), "silu", "rows are not contiguous"),
        (dataclasses.replace(native, scale_F=torch.ones(40, device="meta")), weights, "silu", "must all be on the CPU"),
    ]:
        assert message in neurons_refusal(ffn, router_weights, activation=activation, dtype=torch.float32)
        with pytest.raises(KernelError, match="impl 'cpu': "):
            RoutedNeurons(ffn, router_weights, activation=activation, dtype=torch.float32)


def test_the_library_checks_its_arguments_itself():
    weights, router, rule = random_case("gate", 8, 12)
    call, x_TD = RoutedNeurons(weights, native_weights(router, rule), activation="silu"), torch.randn(1, 8)
    run, y_TD, mask_TF = cpu._library().moeify_neurons_run, torch.zeros(1, 8), torch.zeros(1, 12, dtype=torch.bool)
    here, best = x_TD.data_ptr(), cpu._isa()

    def status(*, ffn=None, neurons=None, x=here, tokens=1, isa=best, threads=1):
        f, n = ctypes.byref(ffn or call._ffn), ctypes.byref(neurons or call._router)
        return run(f, n, x, 8, tokens, mask_TF.data_ptr(), y_TD.data_ptr(), 8, isa, threads)

    def changed(structure, **fields):
        copy = type(structure).from_buffer_copy(structure)
        for name, value in fields.items():
            setattr(copy, name, value)
        return copy

    assert status() == 0
    assert status(tokens=0, x=None) == 0
    assert run(None, None, None, 0, 0, None, None, 0, 0, 1) == 1
    bad = [
        {"x": None},
        {"tokens": -1},
        {"threads": 0},
        {"ffn": changed(call._ffn, num_experts=6)},
        {"ffn": changed(call._ffn, gate=None)},
        {"neurons": changed(call._router, scale=None, project=x_TD.data_ptr(), rank=1)},
        {"neurons": changed(call._router, rule=4)},
        {"neurons": changed(call._router, knob=math.nan)},
        {"neurons": changed(call._router, project=x_TD.data_ptr(), rank=1)},
    ]
    assert [status(**arguments) for arguments in bad] == [1] * len(bad)
    assert status(isa=31) == 3
