"""The runner of measurements, and the case that compares a conversion with its source."""

import json
import sys
import types

import pytest
import tiny
import torch
import transformers

from bench import run as bench_run
from bench.cases import decode, exactness
from moeify.evaluate import default_metric
from moeify.kernels import IMPLS
from moeify.select import RULES


@pytest.fixture
def case(monkeypatch):
    """A case that returns its own options as a row."""
    module = types.ModuleType("bench.cases.echo")
    module.run = lambda **options: iter([options])
    monkeypatch.setitem(sys.modules, "bench.cases.echo", module)
    monkeypatch.setattr(bench_run, "case_names", lambda: ["echo"])
    return module


def test_run_hands_a_case_its_own_options_and_writes_rows_with_the_environment(case, tmp_path):
    case.add_options = lambda parser: parser.add_argument("--tokens", type=int, default=3)
    out = tmp_path / "new" / "rows.jsonl"
    assert bench_run.main(["echo", "--json", str(out), "--tokens", "5"]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["quick"], row["tokens"], row["torch"]) == ("echo", False, 5, torch.__version__)


def test_run_of_a_case_without_options_takes_quick_alone(case, tmp_path):
    assert bench_run.main(["--quick", "echo", "--json", str(tmp_path / "rows.jsonl")]) == 0
    assert json.loads((tmp_path / "rows.jsonl").read_text())["quick"] is True
    with pytest.raises(SystemExit):
        bench_run.main(["echo", "--tokens", "5"])


def test_run_names_the_nearest_case_and_prints_errors_of_the_library_on_one_line(case, capsys):
    assert bench_run.main(["ecko"]) == 2
    assert "did you mean 'echo'?" in capsys.readouterr().err
    assert bench_run.main([]) == 2
    assert bench_run.main(["--help"]) == 0
    case.run = lambda **_: exactness.run(quick=True, dense="x")
    capsys.readouterr()
    assert bench_run.main(["echo"]) == 2
    assert capsys.readouterr().err == "error: give --dense and --converted, or neither.\n"


@pytest.fixture(scope="module")
def rows():
    transformers.logging.disable_progress_bar()
    return list(exactness.run(quick=True, tokens=64, window=32))


def test_exactness_has_a_row_per_kernel_and_rule_all_near_the_dense_model(rows):
    full = [row for row in rows if row["check"] == "all experts"]
    assert [row["impl"] for row in full[: 1 + len(IMPLS)]] == ["auto", *IMPLS]
    assert {row["rule"] for row in full} == set(RULES)
    assert {row["active_fraction"] for row in full} == {1.0}
    assert all(0 < row["max_abs_diff"] < 1e-4 < row["max_abs_output"] for row in full)
    assert all(row["rows"] == 512 for row in full)


def test_exactness_loads_bit_equal_and_without_moeify_the_dense_model(rows):
    assert [row["bit_equal"] for row in rows if "load" in row["check"]] == [True, True]
    (alone,) = [row for row in rows if row["check"] == "process without moeify"]
    assert alone["max_abs_diff"] < 1e-4


def test_exactness_sees_a_conversion_of_another_model(tmp_path):
    tiny.save_dense_tiny(tmp_path / "dense", seed=1)
    tiny.save_converted_tiny(tmp_path / "moe")
    rows = list(exactness.run(quick=True, dense=str(tmp_path / "dense"), converted=tmp_path / "moe", window=32))
    assert all(row["max_abs_diff"] > 0.1 for row in rows if "load" not in row["check"])


def test_decode_has_a_row_per_mode_and_the_least_time_of_each():
    transformers.logging.disable_progress_bar()
    dense, moe = decode.run(quick=True, new_tokens=4)
    assert (dense["mode"], dense["active_fraction"], dense["dense_over_this"]) == ("dense", 1.0, 1.0)
    assert (moe["mode"], 0 < moe["active_fraction"] < 1) == ("moe", True)
    assert moe["read_mb_per_token"] != dense["read_mb_per_token"]
    for row in (dense, moe):
        assert 0 < row["roofline_ms"] < row["ms_per_token"] == pytest.approx(1e3 / row["tokens_per_s"])


def test_distance_of_an_encoder_pools_what_is_no_padding():
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    assert default_metric(model, batch) == "cosine"
    outputs = exactness._Outputs.of(model, [batch])
    padded = outputs.tensors[0].clone()
    padded[1, 1:] = 100
    same = outputs.distance([padded])
    assert (same["max_abs_diff"], same["rows"]) == (0.0, 4)
    assert same["min_cosine"] == pytest.approx(1)
    turned = outputs.distance([torch.cat([padded[:1], -padded[1:]])])
    assert (turned["mean_cosine"], turned["min_cosine"]) == (pytest.approx(0, abs=1e-6), pytest.approx(-1))
