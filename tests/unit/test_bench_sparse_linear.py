"""The cases that time linear layers which skip input channels."""

import json

import pytest
import torch
from ffn_cases import needs_library
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import sparse_linear_cpu, sparse_linear_gpu
from moeify.errors import ConfigError
from moeify.kernels.linear import masked

pytestmark = needs_library


def rows_of(tmp_path, *options):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main([*options, "--quick", "--json", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _few_layers(monkeypatch):
    monkeypatch.setattr(sparse_linear_cpu, "COLD_BYTES", 1)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_rows_of_single_layers_compare_with_the_faster_dense_one(tmp_path, weights):
    rows = rows_of(tmp_path, "sparse_linear_cpu", "--weights", weights, "--tokens", "1,3")
    assert [(row["dtype"], row["tokens"]) for row in rows] == [(d, t) for d in ("float32", "bfloat16") for t in (1, 3)]
    for row in rows:
        assert abs(row["f"] - 0.5) < 0.05
        assert_allclose(row["ratio"], min(row["ordinary_us"], row["by_input_us"]) / row["ours_us"])
        assert_allclose(row["of_bound"], row["ratio"] * row["f"])


def test_rows_of_gated_ffns_compare_with_layer_by_layer(tmp_path):
    for row in rows_of(tmp_path, "sparse_linear_cpu", "--gated"):
        assert_allclose(row["ratio"], row["three_us"] / row["ours_us"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    assert bench_run.main(["sparse_linear_gpu", "--quick"]) == 2
    assert capsys.readouterr().err == "error: there is nothing to measure: PyTorch sees no CUDA device.\n"


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_rows_of_the_gpu_are_made_like_those_of_the_cpu(tmp_path, monkeypatch, weights):
    """All but the GPU's clock and its kernel."""

    def take_turns(sides, x_STK, *, num_layers, rounds):
        return sparse_linear_cpu._take_turns(sides, x_STK, layers=num_layers, calls=1)

    monkeypatch.setattr(sparse_linear_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(sparse_linear_gpu, "_missing", lambda: None)
    monkeypatch.setattr(sparse_linear_gpu, "_take_turns", take_turns)
    monkeypatch.setattr(sparse_linear_gpu, "SparseLinear", lambda layer, dtype: lambda x: masked(x, layer))
    rows = rows_of(tmp_path, "sparse_linear_gpu", "--weights", weights, "--tokens", "1,4")
    assert [(row["dtype"], row["tokens"]) for row in rows] == [(d, t) for d in ("bfloat16", "float16") for t in (1, 4)]
    for row in rows:
        assert abs(row["f"] - 0.5) < 0.05 and abs(row["read"] - (1 - 0.5 ** row["tokens"])) < 0.05
        assert_allclose(row["ratio"], min(row["ordinary_us"], row["by_input_us"]) / row["ours_us"])


def test_a_wrong_kernel_is_not_timed():
    exact = torch.ones(3, dtype=torch.float64)
    sparse_linear_cpu._check(torch.ones(3), torch.ones(3), exact)
    with pytest.raises(ConfigError, match="the kernel is wrong"):
        sparse_linear_cpu._check(torch.full((3,), 1.1), torch.ones(3), exact)


def test_generation_skips_what_was_asked_for(tmp_path):
    rows = rows_of(tmp_path, "generate_sparse_cpu", "--batches", "1,2", "--skip", "0,0.5")
    assert [(row["dtype"], row["batch"], row["wanted_skip"]) for row in rows] == [
        (dtype, batch, skip) for dtype in ("float32", "bfloat16") for batch in (1, 2) for skip in (0.0, 0.5)
    ]
    for row in rows:
        assert abs(row["skipped"] - row["wanted_skip"]) < 0.15
        assert_allclose(row["ratio"], row["dense_us"] / row["ours_us"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sparse_linear_cpu", "--fractions", "0"), "--fractions must be in"),
        (("sparse_linear_cpu", "--tokens", "0"), "--tokens must be at least 1"),
        (("sparse_linear_cpu", "--shapes", "smollm2 u"), "did you mean 'smollm2 up'"),
        (("sparse_linear_gpu", "--fractions", "0"), "--fractions must be in"),
        (("sparse_linear_gpu", "--tokens", "0"), "--tokens must be at least 1"),
        (("sparse_linear_gpu", "--dtypes", "float6"), "did you mean 'float16'"),
        (("generate_sparse_cpu", "--skip", "1"), "--skip must be in"),
        (("generate_sparse_cpu", "--new-tokens", "1"), "--new-tokens must be at least 2"),
    ],
)
def test_bad_options_are_errors_of_one_line(capsys, options, message):
    assert bench_run.main([*options, "--quick"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
