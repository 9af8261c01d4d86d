"""The runner of measurements, and the case that compares a conversion with its source."""

import json
import sys
import types

import pytest
import tiny
import torch
import transformers

from bench import run as bench_run
from bench.cases import exactness, grouped
from moeify.evaluate import default_metric
from moeify.kernels import cpu, impls_for
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


def test_run_of_an_option_without_sense_is_one_line(case, capsys):
    case.add_options = lambda parser: parser.add_argument("--tokens", type=int)
    with pytest.raises(SystemExit, match="2"):
        bench_run.main(["echo", "--tokens", "many"])
    assert capsys.readouterr().err == "error: argument --tokens: invalid int value: 'many'\n"


def test_table_has_a_column_for_what_differs_and_a_line_for_what_all_rows_share(case, capsys):
    case.run = lambda **_: iter([{"dtype": "float32", "ratio": 1.5, "only": None}, {"dtype": "float32", "ratio": 2.0}])
    assert bench_run.main(["echo"]) == 0
    *_, shared, title, _, head, _, first, second, _ = capsys.readouterr().out.splitlines()
    assert (shared, title.strip()) == ("dtype float32", "echo")
    assert [line.replace("┃", " ").replace("│", " ").split() for line in (head, first, second)] == [
        ["ratio", "only"],
        ["1.5", "None"],
        ["2"],
    ]


@pytest.fixture(scope="module")
def rows():
    transformers.logging.disable_progress_bar()
    return list(exactness.run(quick=True, tokens=64, window=32))


def test_exactness_has_a_row_per_kernel_and_rule_all_near_the_dense_model(rows):
    full = [row for row in rows if row["check"] == "all experts"]
    assert [row["impl"] for row in full[: 1 + len(impls_for("cpu"))]] == ["auto", *impls_for("cpu")]
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


def test_grouped_compares_the_loop_with_every_kernel_that_is_there(monkeypatch):
    monkeypatch.setattr(grouped, "SHAPES", {"small": (16, 256, "silu", True)})
    rows = list(grouped.run(quick=True))
    assert [(row["T"], row["E"], row["mask"]) for row in rows] == [
        *((16, E, "uniform") for E in (8, 128)),
        *((256, E, mask) for E in (8, 128) for mask in ("uniform", "skewed")),
    ]
    for row in rows:
        assert row["loop_over_grouped"] == row["loop_ms"] / row["grouped_ms"]
        assert ("gather_ms" in row) == (row["T"] == 16)
        assert row["chosen"] != "cpu", "weights as nn.Linear stores them: what runs without a compiler"
        if cpu.unavailable() is None:
            assert row["loop_over_cpu"] == row["loop_ms"] / row["cpu_ms"]
            assert row["dense_over_cpu"] == row["dense_ms"] / row["cpu_ms"]


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
