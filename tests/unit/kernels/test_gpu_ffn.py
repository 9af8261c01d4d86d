"""The border of the GPU's kernels of experts: what is refused, what is chosen, how work is cut up. No GPU, and triton not imported.

Tensors "on a GPU" are stand-ins without memory, which is all that a choice looks at.
"""

import subprocess
import sys

import pytest
import torch
from ffn_cases import map_weights, random_ffn
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify.errors import KernelError
from moeify.kernels import DispatchPlan, build_plan, explain, gpu_ffn, gpu_linear, impls_for, moe_ffn
from moeify.kernels.tiles import FLOAT32_ROWS, TOKENS, UNION_TOKENS, ragged_tiles, union_tiles
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


sizes = st.integers(1, 20_000)


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
