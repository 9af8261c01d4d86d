"""The AMX path: the library built with the tile instructions in plain C++ (csrc/amx_emulated.h), on any processor with AVX-512-BF16.

Letters: T tokens, D model width, F FFN width, E experts.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ffn_cases import CPU_REGIMES, loop_over_tokens, map_weights, random_ffn, random_plan
from numerics import assert_as_accurate_as_torch

from moeify.kernels import build_plan, cpu, explain, masked, moe_ffn
from moeify.kernels.plan import DispatchPlan
from moeify.sites.site import FFNWeights

ROOT = Path(__file__).parents[3]
INF, NAN = float("inf"), float("nan")

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "amx"),
    pytest.mark.skipif("avx512_bf16" not in cpu.isas(), reason="needs the compiled library and AVX-512-BF16"),
]


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory):
    """The library as setup.py builds it, tiles emulated, in a folder of its own."""
    if not (ROOT / "setup.py").is_file() or all(shutil.which(c) is None for c in ("c++", "g++", "clang++")):
        pytest.skip("needs the sources and a C++ compiler")
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("emulated")
    # -O1 comes last and takes half the time to compile. A sanitizer's flags, where tests run under one, stay.
    flags = f"{os.environ.get('MOEIFY_CXXFLAGS', '')} -DMOEIFY_AMX_EMULATED -O1"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the compiler runs without a sanitizer's libraries
    subprocess.run(command, cwd=ROOT, env={**plain, "MOEIFY_CXXFLAGS": flags}, check=True, timeout=600)
    return next(folder.glob("moeify/kernels/libmoeify_cpu.*"))


@pytest.fixture
def amx(emulated_library, monkeypatch):
    """The emulating library in place of the installed one."""
    monkeypatch.setattr(cpu, "__file__", str(emulated_library.with_name("cpu.py")))
    caches = (cpu._library, cpu._available)
    for cache in caches:
        cache.cache_clear()
    assert cpu.isas()[-1] == "amx_bf16"
    yield
    for cache in caches:
        cache.cache_clear()


def bf16_case(T, E, F, D, keep, *, gated=False, biased=False):
    weights = map_weights(random_ffn(D, F, gated=gated, biased=biased, dtype=torch.bfloat16), torch.Tensor.contiguous)
    return torch.randn(T, D).bfloat16(), weights, random_plan(T, E, keep)


def run(x_TD, weights, plan, activation="silu"):
    return moe_ffn(x_TD, weights, plan, activation=activation, impl="cpu")


def assert_accurate(x_TD, weights, plan, activation="silu"):
    out = run(x_TD, weights, plan, activation)
    oracle = loop_over_tokens(x_TD.double(), map_weights(weights, torch.Tensor.double), plan.mask_TE, activation=activation)
    assert_as_accurate_as_torch(out, oracle=oracle, baseline=masked.moe_ffn(x_TD, weights, plan, activation=activation))
    assert run(x_TD, weights, plan, activation).equal(out), "not the same bits again"


@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, False)], ids=["plain, biased", "gated"])
@CPU_REGIMES
def test_tiles_are_as_accurate_as_torch_in_every_regime(gated, biased, T, E, F, D, keep):
    assert_accurate(*bf16_case(T, E, F, D, keep, gated=gated, biased=biased))


@pytest.mark.parametrize(("gated", "biased"), [(False, False), (True, True)], ids=["plain", "gated, biased"])
@pytest.mark.parametrize(
    ("T", "E", "F", "D", "keep"),
    [
        pytest.param(66, 12, 12, 31, 0.5, id="experts of one neuron, rows shorter than a tile"),
        pytest.param(70, 8, 64, 64, 0.5, id="experts of 8: up and gate in one tile"),
        pytest.param(130, 6, 102, 96, 0.5, id="experts of 17: pieces that begin anywhere in a tile of H"),
        pytest.param(97, 1, 40, 33, 0.7, id="one expert of all neurons, one column more than a tile"),
        pytest.param(80, 20, 1300, 40, 0.3, id="three chunks of neurons"),
        pytest.param(300, 4, 32, 72, 0.9, id="more tokens than tiles side by side hold"),
        pytest.param(1000, 5, 30, 48, 0.6, id="two blocks of tokens"),
        pytest.param(67, 3, 24, 1100, 0.6, id="rows longer than a panel"),
    ],
)
def test_tiles_are_as_accurate_as_torch_at_their_own_borders(gated, biased, T, E, F, D, keep):
    assert_accurate(*bf16_case(T, E, F, D, keep, gated=gated, biased=biased))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_tiles_know_every_activation(gated, activation):
    assert_accurate(*bf16_case(70, 5, 60, 40, 0.5, gated=gated, biased=True), activation)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_tokens_and_experts_without_each_other(biased):
    x_TD, weights, plan = bf16_case(90, 6, 48, 40, 0.5, gated=True, biased=biased)
    mask_TE = plan.mask_TE.clone()
    mask_TE[:, 2] = False  # an expert without tokens
    mask_TE[:, 4] = True  # one that takes all
    mask_TE[16:48] = False  # tiles of tokens without experts
    assert_accurate(x_TD, weights, build_plan(mask_TE))
    out = run(x_TD, weights, build_plan(torch.zeros_like(mask_TE)))
    assert out.equal(weights.down_bias_D.expand_as(out) if biased else torch.zeros_like(out))
    assert_accurate(x_TD, weights, build_plan(torch.ones_like(mask_TE)))


def within(matrix):
    """The same as rows of a wider matrix, apart from each other, NaN between them."""
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 9), NAN, dtype=matrix.dtype)
    wide[:, 3 : 3 + matrix.shape[1]] = matrix
    return wide[:, 3 : 3 + matrix.shape[1]]


def test_tiles_take_strided_input_and_weights():
    x_TD, weights, plan = bf16_case(70, 5, 60, 40, 0.5, gated=True)
    assert run(within(x_TD), map_weights(weights, within), plan).equal(run(x_TD, weights, plan))


@pytest.mark.parametrize("matrix", ["up_FD", "gate_FD", "down_FD"])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_weights_of_an_expert_that_a_token_does_not_take_never_reach_it(matrix, value):
    x_TD, weights, plan = bf16_case(100, 6, 48, 40, 0.5, gated=True)
    mask_TE = plan.mask_TE.clone()
    mask_TE[0], mask_TE[1] = False, True
    plan, takes = build_plan(mask_TE), mask_TE[:, 3]
    expected = run(x_TD, weights, plan)
    getattr(weights, matrix)[25, 7] = value  # a neuron of expert 3
    out = run(x_TD, weights, plan)
    torch.testing.assert_close(out[~takes], expected[~takes], rtol=2e-2, atol=2e-2)
    if matrix == "down_FD":
        assert not out[takes, 7].isfinite().any()
        assert out[takes, 8].isfinite().all()
    else:
        assert not out[takes].isfinite().any()


@pytest.mark.parametrize("value", [INF, NAN])
def test_a_token_that_is_not_finite_reaches_no_other(value):
    x_TD, weights, plan = bf16_case(100, 6, 48, 40, 0.5, gated=True)
    plan = build_plan(plan.mask_TE.index_fill(0, torch.tensor([20]), True))
    expected = run(x_TD, weights, plan)
    x_TD[20, 39] = value
    out = run(x_TD, weights, plan)
    others = torch.arange(100) != 20
    assert not out[20].isfinite().any()
    assert out[others].equal(expected[others])


def test_many_tokens_in_bf16_are_summed_as_tiles_sum_and_others_are_not(monkeypatch):
    # A tile sums even and odd elements apart: of its first 32 the 15 ones beside 2^24 are lost and 16 are kept, of the others all 31.
    # Were tiles not in use, every other test here would test nothing.
    x_TD = torch.ones(65, 64)
    x_TD[:, 0], x_TD[:, 63] = 2.0**24, -(2.0**24)
    weights, plan = FFNWeights(torch.ones(1, 64), torch.ones(1, 1)), build_plan(torch.ones(65, 1, dtype=torch.bool))
    half = map_weights(weights, lambda w: within(w.bfloat16()))  # read beyond its rows, down would look as if it were not finite
    cases = (within(x_TD.bfloat16()), half, plan), (x_TD[:64].bfloat16(), half, DispatchPlan(plan.mask_TE[:64])), (x_TD, weights, plan)
    tiled, *rest = (run(*case, "relu") for case in cases)
    assert tiled.eq(47).all()
    monkeypatch.setenv(cpu.FORCE_ISA, "avx512_bf16")
    assert not run(*cases[0], "relu").eq(47).any()
    assert all(run(*case, "relu").equal(out) for case, out in zip(cases[1:], rest, strict=True)), (
        "few tokens and fp32 are none of the tiles'"
    )


def test_int8_weights_are_none_of_the_tiles(monkeypatch):
    x_TD, weights, plan = bf16_case(70, 5, 60, 40, 0.5, gated=True)
    q = map_weights(weights, lambda w: (w > 0).to(torch.int8))  # two of them together are a finite bf16 number
    q = dataclasses.replace(q, up_scale_F=torch.rand(60), gate_scale_F=torch.rand(60), down_scale_D=torch.rand(40))
    out = run(x_TD, q, plan)
    monkeypatch.setenv(cpu.FORCE_ISA, "avx512_bf16")
    assert out.isfinite().all()
    assert run(x_TD, q, plan).equal(out)


def test_any_number_of_threads_computes_the_same_sums():
    x_TD, weights, plan = bf16_case(600, 5, 40, 48, 0.5, gated=True)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run(x_TD, weights, plan))
            assert run(x_TD, weights, plan).equal(results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results), "a token's sums do not depend on who else is in its block"


def test_the_library_says_what_it_has():
    assert cpu.describe().startswith("amx_bf16 (this processor and the library have portable, avx2, avx512, avx512_bf16, amx_bf16)")


@pytest.mark.parametrize(
    ("T", "threads", "keep", "chosen"),
    [
        pytest.param(4, 1, 1.0, True, id="decode: both wait for the weights"),
        pytest.param(64, 1, 0.5, False, id="small batch: no tiles here"),
        pytest.param(64, 1, 0.05, True, id="small batch, few experts"),
        pytest.param(600, 2, 0.3, True, id="prefill"),
        pytest.param(600, 2, 0.6, False, id="prefill, many experts"),
        pytest.param(600, 12, 0.1, False, id="prefill: every thread would pack all weights for 50 tokens"),
    ],
)
def test_auto_is_careful_in_bf16_where_torch_has_tiles_too(T, threads, keep, chosen):
    x_TD, weights, _ = bf16_case(T, 1, 20, 8, 1.0)
    mask_TE = (torch.arange(T * 20) % 20 < round(20 * keep)).view(T, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            first = explain(x_TD, weights, build_plan(mask_TE), activation="relu")[0]
            fp32 = explain(x_TD.float(), map_weights(weights, torch.Tensor.float), build_plan(mask_TE), activation="relu")[0]
    finally:
        torch.set_num_threads(before)
    assert (first.name, first.chosen) == ("cpu", chosen)
    assert chosen or "above the crossover" in first.reason
    assert fp32.chosen, "fp32 has no tiles"
