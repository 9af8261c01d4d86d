"""The border of the GPU's kernels of experts: what is refused, what is chosen, how work is cut up. No GPU, and triton not imported.

Tensors "on a GPU" are stand-ins without memory, which is all that a choice looks at.
"""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from ffn_cases import map_weights, random_ffn
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify import layers
from moeify.errors import KernelError
from moeify.kernels import DispatchPlan, build_plan, explain, gpu_ffn, gpu_linear, gpu_routed, impls_for, moe_ffn
from moeify.kernels.tiles import FLOAT32_ROWS, ROUTER_SPLITS, TOKENS, UNION_TOKENS, ragged_tiles, router_tiles, union_tiles
from moeify.layers import MoEFFN, attach
from moeify.routers import NormRouterConfig, build_router
from moeify.select import DynKMass, DynKMax, NormBudget, Threshold, TopK
from moeify.sites import FFNSite, site
from moeify.sites.formula import ACTIVATIONS


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def on_gpu():
    with FakeTensorMode() as mode:
        yield mode


def an_ffn(T=3, E=4, *, dtype=torch.float32, device="cuda"):
    weights = map_weights(random_ffn(8, 16, gated=True, dtype=dtype), lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    return torch.empty(T, 8, dtype=dtype, device=device), weights, build_plan(torch.empty(T, E, dtype=torch.bool, device=device))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", gpu_ffn.DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 512, 513])
def test_auto_takes_the_kernels_on_a_gpu_and_looks_at_no_value(dtype, T):
    x_TD, weights, plan = an_ffn(T, dtype=dtype)
    with torch.no_grad():
        chosen = {c.name: c for c in explain(x_TD, weights, plan, activation="silu")}
        assert chosen["triton"].chosen
        assert "keeps less for backward" in chosen["triton_recompute"].reason
        assert moe_ffn(x_TD, weights, plan, activation="silu").shape == (T, 8)
        tensors = [getattr(weights, name) for name in gpu_ffn._FIELDS]
        y_TD, kept = gpu_ffn._ffn_train_gpu(x_TD, *tensors, None, plan.mask_TE, "silu", gpu_ffn._pairs(plan), True)
    assert y_TD.shape == (T, 8) and kept.shape == (2 * max(T, 1) * 16,)
    assert "num_pairs" not in vars(plan) and "token_N" not in vars(plan)


def test_where_nearly_every_expert_is_known_to_run_many_tokens_run_dense():
    """With the pairs counted already; to count them would be a host sync."""
    from moeify import kernels

    with FakeTensorMode():
        x_TD = torch.empty(UNION_TOKENS + 1, 8, device="cuda")
    plan = DispatchPlan(torch.ones(UNION_TOKENS + 1, 4, dtype=torch.bool))
    assert kernels._triton_objection(x_TD, plan, activation="relu") is None
    assert plan.num_pairs == 4 * (UNION_TOKENS + 1)
    assert "1.00 is above the crossover 0.9 for 513 tokens" in kernels._triton_objection(x_TD, plan, activation="relu")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "shifted_relu:0.5"])
def test_every_activation_of_the_table_is_known(activation):
    x_TD, _, plan = an_ffn()
    assert gpu_ffn.refusal(x_TD, num_experts=plan.num_experts, activation=activation) is None


@pytest.mark.usefixtures("on_gpu")
def test_what_it_refuses_says_why(monkeypatch):
    x_TD, weights, plan = an_ffn()

    def why(x_TD=x_TD, num_experts=4, activation="relu"):
        return gpu_ffn.refusal(x_TD, num_experts=num_experts, activation=activation)

    assert "x_TD is torch.float64" in why(x_TD.double())
    assert "does not know the activation 'sine'" in why(activation="sine")
    assert "3 tokens x 1000000000 experts" in why(num_experts=10**9)
    assert "runs on a GPU (or in Triton's interpreter, TRITON_INTERPRET=1), x_TD is on cpu" in why(torch.empty(3, 8))
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in why()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "needs compute capability 8.0, this GPU has 7.5" in why()
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: False)
    assert "triton is not installed" in why()
    with pytest.raises(KernelError, match="impl 'triton': triton is not installed"):
        moe_ffn(x_TD, weights, plan, activation="relu", impl="triton")


def test_on_the_cpu_it_is_an_error_by_name_and_never_chosen(monkeypatch):
    x_TD, weights, plan = an_ffn(device="cpu")
    with pytest.raises(KernelError, match="impl 'triton': it runs on a GPU"):
        moe_ffn(x_TD, weights, plan, activation="relu", impl="triton")
    assert not {"triton", "triton_recompute"} & set(impls_for("cpu"))
    assert {"triton", "triton_recompute", "masked"} <= set(impls_for("cuda")) and "cpu" not in impls_for("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" in impls_for("cpu")
    assert {c.name: c.reason for c in explain(x_TD, weights, plan, activation="relu")}["triton"] == "it runs on a GPU, x_TD is on cpu"


def test_an_old_operator_without_gradient_says_so():
    x_TD, weights, plan = an_ffn(device="cpu")
    tensors = [getattr(weights, name) for name in (*gpu_ffn._FIELDS, "up_scale_F", "gate_scale_F", "down_scale_D")]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(KernelError, match="moeify::ffn_gpu has no gradient"):
        gpu_ffn._ffn_gpu(x_TD.requires_grad_(), *tensors, plan.mask_TE, "relu")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_FD": ("cpu", torch.float32, (16, 8))}, "up_FD is torch.float32 on cpu, x_TD is torch.float32 on cuda:0"),
        ({"down_FD": ("cuda", torch.float16, (16, 8))}, "down_FD is torch.float16 on cuda:0"),
        ({"gate_FD": ("cuda", torch.float32, (16, 7))}, r"gate_FD has shape \(16, 7\)"),
        ({"down_bias_D": ("cuda", torch.float32, (16,))}, r"down_bias_D has shape \(16,\)"),
        ({"up_scale_F": ("cuda", torch.float32, (16,))}, "up_FD and up_scale_F do not fit"),
    ],
    ids=["devices", "dtypes", "gate", "bias", "scales"],
)
def test_tensors_that_do_not_fit_together_are_an_error(change, message):
    x_TD, weights, plan = an_ffn()
    (name, (device, dtype, shape)) = next(iter(change.items()))
    bad = dataclasses.replace(weights, **{name: torch.empty(shape, dtype=dtype, device=device)})
    with pytest.raises(KernelError, match=message):
        moe_ffn(x_TD, bad, plan, activation="silu", impl="triton")


@pytest.mark.usefixtures("on_gpu")
def test_plans_that_do_not_fit_are_an_error():
    x_TD, weights, _ = an_ffn()
    for mask_TE, message in (
        (torch.empty(4, 4, dtype=torch.bool, device="cuda"), "3 tokens, the plan has 4"),
        (torch.empty(3, 17, dtype=torch.bool, device="cuda"), "17 experts, the FFN only 16 neurons"),
        (torch.empty(3, 4, dtype=torch.bool), "the plan is on cpu, x_TD on cuda:0"),
        (torch.empty(3, 4, device="cuda"), r"mask_TE must be 2-D bool, got \(3, 4\) torch.float32"),
    ):
        with pytest.raises(KernelError, match=message):
            moe_ffn(x_TD, weights, DispatchPlan(mask_TE), activation="silu", impl="triton")


@pytest.mark.usefixtures("on_gpu")
def test_what_32_bits_cannot_count_runs_by_another_kernel_or_is_an_error():
    for T, fits in ((71582720, True), (71582721, False), (2**40, False)):
        x_TD, weights, plan = an_ffn(T, E=15)
        with torch.no_grad():
            assert {c.name: c.chosen for c in explain(x_TD, weights, plan, activation="silu")}["triton"] == fits
        if not fits:
            with pytest.raises(KernelError, match=f"it counts up to 1073740800 pairs, these are {T} tokens x 15 experts"):
                moe_ffn(x_TD, weights, plan, activation="silu", impl="triton")


def test_biases_of_any_stride_are_made_plain():
    _, weights, _ = an_ffn(device="cpu")
    assert gpu_ffn._with_plain_vectors(weights) is weights
    strided = dataclasses.replace(weights, up_bias_F=torch.arange(32.0)[::2])
    plain = gpu_ffn._with_plain_vectors(strided)
    assert plain.up_bias_F.is_contiguous() and plain.up_bias_F.equal(strided.up_bias_F) and plain.up_FD is weights.up_FD


def a_layer(*, device="cuda", rule=None):
    """A MoEFFN on stand-ins."""
    host = torch.nn.Module()
    sizes = {"up": (8, 16), "gate": (8, 16), "down": (16, 8)}
    for name, (d_in, d_out) in sizes.items():
        host.add_module(name, torch.nn.Linear(d_in, d_out, bias=False))
    ffn = FFNSite(name="", up="up", down="down", gate="gate", activation="silu", d_model=8, d_ff=16, d_out=8)
    router = build_router(NormRouterConfig(width=4), site=ffn, num_experts=4)
    moe = MoEFFN(ffn, num_experts=4, router=router, rule=rule or DynKMax(tau=0.5))
    host.eval().requires_grad_(False)
    attach(host, moe)
    to_device(host, device)
    return host, moe


def to_device(module, device):
    """What `Module.to` does, without copying: there is no such device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device=device), requires_grad=False)


@pytest.mark.usefixtures("on_gpu")
def test_a_layer_decodes_by_one_call_on_a_gpu_and_says_what_stands_in_its_way(monkeypatch):
    for module in (layers, site):
        monkeypatch.setattr(module, "not_plain_reason", lambda *_, **__: None)  # a stand-in is no plain weight
    _, moe = a_layer()
    x = torch.empty(2, 3, 8, device="cuda")
    with torch.no_grad():
        assert moe.native_refusal(x) is None
        y, mask_TE = moe._operator(x)(x)
        assert y.shape == x.shape and mask_TE.shape == (6, 4) and mask_TE.dtype is torch.bool
        assert "65 tokens are more than 64" in moe.native_refusal(x.new_empty(65, 8))
        for impl in ("cpu", "masked"):
            moe.impl = impl
            assert "for impl 'auto', 'cpu' or 'triton'" in moe.native_refusal(x)
        moe.impl = "triton"
        assert "the weights must be torch.float16" in moe.native_refusal(x.half())
        to_device(moe.router, "cpu")
        assert "weights and router must all be on cuda:0" in moe.native_refusal(x) and moe._operator(x) is None
        router = moe._router_weights()
        with pytest.raises(KernelError, match="x is on cuda:0; weights and router must all be there"):
            gpu_routed.routed_ffn(x, weights=moe.weights(), router=router, activation="silu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "needs compute capability 8.0, this GPU has 7.5" in moe.native_refusal(x)
        monkeypatch.setattr(gpu_linear, "_is_installed", lambda: False)
        assert "triton is not installed" in moe.native_refusal(x)


@pytest.mark.usefixtures("on_gpu")
def test_a_rule_that_runs_all_takes_no_router_and_the_dense_path(monkeypatch):
    for module in (layers, site):
        monkeypatch.setattr(module, "not_plain_reason", lambda *_, **__: None)
    _, moe = a_layer(rule=DynKMax(tau=0.0))
    monkeypatch.setattr(moe.router, "forward", lambda *_: pytest.fail("the router ran"))
    x = torch.empty(2, 3, 8, device="cuda")
    with torch.no_grad():
        assert "every expert runs" in moe.native_refusal(x)
        plan = moe._plan(x)
        assert plan.is_full and plan.num_pairs == 6 * 4 and plan.active_fraction == 1
        reasons = {c.name: c for c in explain(x.view(6, 8), moe.weights(), plan, activation="silu")}
        assert reasons["masked"].chosen and "every expert runs" in reasons["triton"].reason
        assert moe_ffn(x.view(6, 8), moe.weights(), plan, activation="silu").shape == (6, 8)


@pytest.mark.parametrize("rule", [DynKMax(tau=0.0), DynKMass(mass=1.0), TopK(k=4), NormBudget(beta=1.0)], ids=lambda rule: rule.name)
def test_rules_that_run_all_do_so_whatever_the_scores(rule):
    scores_TE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.nan, 1, 2, 3], [math.inf, 0, 0, 1], [-1, -2, 0, 5]])
    assert rule.runs_all(4) and rule(scores_TE).all()
    less = rule.with_value(2 if isinstance(rule, TopK) else 0.5)
    assert not less.runs_all(4) and not Threshold(theta=0.0).runs_all(4), "scores below zero stay below"


def test_on_the_cpu_the_call_is_asked_for_by_name_alone():
    _, moe = a_layer(device="cpu")
    x = torch.randn(2, 8)
    assert not gpu_routed.is_for(x, impl="auto") and gpu_routed.is_for(x, impl="triton")
    moe.impl = "triton"
    with torch.no_grad():
        assert "runs on a GPU (or in Triton's interpreter" in moe.native_refusal(x)


sizes = st.integers(1, 20_000)


@given(D=sizes, W=st.integers(1, 512), T=st.integers(1, 64), num_units=st.integers(1, 300))
def test_splits_of_the_routers_input_cover_it_and_none_is_empty(D, W, T, num_units):
    tiles = router_tiles(d_model=D, width=W, num_tokens=T, num_units=num_units)
    splits = -(-D // tiles.channels_per_split)
    assert tiles.channels_per_split % tiles.channels == 0 and splits <= ROUTER_SPLITS
    assert (splits - 1) * tiles.channels_per_split < D <= splits * tiles.channels_per_split
    assert (tiles.tokens == 1) == (T == 1) and all(side.bit_count() == 1 for side in (tiles.tokens, tiles.rows, tiles.channels))


@given(F=sizes, O=sizes, E=sizes, T=st.integers(0, UNION_TOKENS), bytes_per_number=st.sampled_from([2, 4]), num_units=st.integers(1, 300))
def test_splits_of_few_tokens_cover_all_neurons_and_none_is_empty(F, O, E, T, bytes_per_number, num_units):  # noqa: E741
    E = min(E, F)
    tiles = union_tiles(
        d_in=64, d_out=O, num_neurons=F, num_experts=E, num_tokens=T, bytes_per_number=bytes_per_number, num_units=num_units
    )
    assert tiles.neurons_per_split % tiles.depth == 0
    splits = -(-F // tiles.neurons_per_split)
    assert (splits - 1) * tiles.neurons_per_split < F <= splits * tiles.neurons_per_split
    assert (tiles.tokens == 1) == (T <= 1)
    _check_sides(tiles, bytes_per_number)


@given(F=sizes, E=sizes, T=sizes, bytes_per_number=st.sampled_from([2, 4]), by_expert=st.booleans())
def test_thin_experts_share_a_tile_unless_kept_apart(F, E, T, bytes_per_number, by_expert):
    E = min(E, F)
    tiles = ragged_tiles(num_neurons=F, num_experts=E, num_tokens=T, bytes_per_number=bytes_per_number, by_expert=by_expert)
    assert 1 <= tiles.experts_per_group <= E and (tiles.experts_per_group == 1 or tiles.experts_per_group * (F // E) <= 16)
    assert not by_expert or tiles.experts_per_group == 1
    assert tiles.tokens >= TOKENS
    _check_sides(tiles, bytes_per_number)


def test_tiles_tuned_on_experts_of_one_size_fit_others(monkeypatch):
    """Whether thin experts add by atomics says nothing of thick ones, and no tile is wider than an expert."""
    tuned = {("sm90", "ragged"): {"atomic_neurons": 64, "num_stages": 4}, ("sm90", "1"): {"neurons": 16, "num_warps": 2}}
    monkeypatch.setattr("moeify.kernels.tiles.TUNED", tuned)
    sizes = {"num_neurons": 14336, "num_tokens": 4096, "bytes_per_number": 2}
    found = {size: ragged_tiles(num_experts=14336 // size, architecture="sm90", **sizes) for size in (16, 64, 256)}
    assert {size: tiles.is_atomic for size, tiles in found.items()} == {16: False, 64: True, 256: True}
    assert all(tiles.num_stages == 4 for tiles in found.values())
    assert [ragged_tiles(num_experts=14336 // size, **sizes).is_atomic for size in (16, 64, 256)] == [False, False, True]
    few = {"d_in": 64, "d_out": 64, "num_neurons": 1024, "num_tokens": 1, "bytes_per_number": 2, "num_units": 132, "architecture": "sm90"}
    assert [union_tiles(num_experts=1024 // size, **few).neurons for size in (4, 8, 64)] == [4, 8, 16]
    assert union_tiles(num_experts=16, **few).num_warps == 2


def test_amds_units_hold_two_stages():
    assert ragged_tiles(num_neurons=64, num_experts=2, num_tokens=600, bytes_per_number=2, architecture="gfx1100").num_stages == 2
    few = {"d_in": 64, "d_out": 64, "num_neurons": 64, "num_experts": 4, "num_tokens": 8, "bytes_per_number": 2, "num_units": 60}
    assert union_tiles(architecture="gfx942", **few).num_stages == 2 and union_tiles(architecture="sm90", **few).num_stages == 3


def _check_sides(tiles, bytes_per_number):
    for side in (tiles.tokens, tiles.neurons, tiles.channels, tiles.outputs, tiles.depth):
        assert side.bit_count() == 1 and (side >= 16 or tiles.tokens == 1)
    if bytes_per_number == 4:
        assert tiles.tokens <= FLOAT32_ROWS and tiles.neurons <= FLOAT32_ROWS


def test_decoding_an_8b_model_is_work_for_every_unit():
    tiles = union_tiles(d_in=4096, d_out=4096, num_neurons=14336, num_experts=224, num_tokens=1, bytes_per_number=2, num_units=132)
    quarter_of_first = 14336 // tiles.neurons // 4
    second = 4096 // tiles.outputs * -(-14336 // tiles.neurons_per_split)
    assert quarter_of_first >= 2 * 132 and second >= 3.5 * 132


def test_looking_for_it_does_not_import_triton():
    script = "import sys; from moeify.kernels import gpu_ffn; gpu_ffn.unavailable('cuda'); assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "error", "-c", script], check=False).returncode == 0
