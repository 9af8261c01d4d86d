"""The case that times FFNs which skip single neurons."""

import json

import pytest
import torch
from ffn_cases import needs_library
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import neuron_ffn_cpu, sparse_linear_cpu

pytestmark = needs_library


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(sparse_linear_cpu, "COLD_BYTES", 1)
    monkeypatch.setattr(neuron_ffn_cpu, "SHAPES", {"smollm2": (96, 256)})


def test_rows_compare_with_dense_and_with_the_pieces(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["neuron_ffn_cpu", "--quick", "--skip", "0,0.5", "--tokens", "1,3", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["dtype"], row["method"], row["tokens"], row["wanted_skip"]) for row in rows] == [
        (dtype, method, tokens, skip)
        for dtype in ("float32", "bfloat16")
        for method in ("cats", "predictor", "topk")
        for tokens in (1, 3)
        for skip in (0.0, 0.5)
    ]
    for row in rows:
        assert abs(1 - row["f"] - row["wanted_skip"]) < 0.05
        assert_allclose(row["ratio"], row["dense_us"] / row["ours_us"])
        assert_allclose(row["of_bound"], row["ratio"] * row["read"])
        assert_allclose(row["over_pieces"], row["pieces_us"] / row["ours_us"])
        if row["method"] == "cats" and row["tokens"] == 1:
            assert_allclose(row["read"], (1 + 2 * row["f"]) / 3)
        if row["method"] == "topk" and row["tokens"] == 1:
            assert_allclose(row["read"], (2 + row["f"]) / 3)


def test_a_prediction_reads_its_own_matrices_too():
    config = neuron_ffn_cpu.METHODS["predictor"]
    with torch.no_grad():
        case = neuron_ffn_cpu._Case(256, 96, torch.bfloat16, config)
    matrices = 4 * 128 * (256 + 2 * 96) + 2 * 4 * 96  # fp32, and biases
    assert_allclose(case._read(0.5), 0.5 + matrices / (2 * 3 * 256 * 96))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--skip", "1"), "--skip must be in"),
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--shapes", "smollm"), "did you mean 'smollm2'"),
        (("--methods", "cat"), "did you mean 'cats'"),
        (("--dtypes", "float33"), "did you mean 'float32'"),
    ],
)
def test_bad_options_are_errors_of_one_line(capsys, options, message):
    assert bench_run.main(["neuron_ffn_cpu", *options, "--quick"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
