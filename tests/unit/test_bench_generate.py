"""The cases that time `generate` and measure a conversion by the command line."""

import json

import pytest
import tiny
import torch
from numpy.testing import assert_allclose

from bench import run as bench_run
from bench.cases import generate_cpu
from moeify import moe_layers
from moeify.select import Threshold
from moeify.sites import site_weights

QUICK = ("generate_cpu", "--quick", "--dtypes", "float32", "--fractions", "0.5")
SAME = {"case", "model", "dtype", "weights", "expert_size", "regime", "batch", "prompt_tokens", "new_tokens", "tokens", "torch", "threads"}
NUMBERS = {"wanted_f", "f", "dense_us", "ours_us", "ratio", "spread", "dense_ttft_ms", "ours_ttft_ms"}
SPEEDS = {"dense_tokens_per_s", "ours_tokens_per_s"}


def rows_of(tmp_path, *options):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main([*QUICK, "--json", str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def pair():
    return generate_cpu._random_pair(generate_cpu.TINY, torch.float32, lambda model: None, expert_size=8)


@pytest.fixture
def prompt(pair):
    return pair.prompts(2, 6, 12)


def test_quick_run_of_a_random_model_has_rows_for_decoding_and_for_the_first_token(tmp_path):
    one, two, first = rows_of(tmp_path, "--batches", "1,2", "--expert-size", "16")
    assert [(row["regime"], row["batch"], row["tokens"]) for row in (one, two, first)] == [
        ("decode", 1, 1),
        ("decode", 2, 2),
        ("first token", 1, 32),
    ]
    for row in (one, two, first):
        assert set(row) >= SAME | NUMBERS
        assert all(row[key] > 0 for key in NUMBERS)
        assert "random weights" in row["model"]
        assert (row["dtype"], row["weights"], row["expert_size"], row["compiled_us"]) == ("float32", "float32", 16, None)
        assert abs(row["f"] - 0.5) < 0.1
        assert_allclose(row["ratio"], row["dense_us"] / row["ours_us"])
    for row in (one, two):
        assert row["compiled"] == "not asked for"
        assert_allclose([row[f"{side}_tokens_per_s"] * row[f"{side}_us"] for side in ("dense", "ours")], row["batch"] * 1e6)
    assert 0 < one["ours_roofline_us"] < one["ours_us"]
    assert 0 < one["dense_roofline_us"] < one["dense_us"]
    assert not {"ours_roofline_us"} & (set(two) | set(first))
    assert not SPEEDS & set(first)
    assert_allclose(first["ours_ttft_ms"] * 1e3, first["ours_us"])


def test_run_of_a_converted_checkpoint_decodes_from_text_with_its_own_rule_and_int8_weights(tmp_path):
    tiny.save_converted_tiny(tmp_path / "moe")
    options = ("--converted", str(tmp_path / "moe"), "--batches", "2", "--long-prompt", "0", "--weights", "float,int8")
    rows = rows_of(tmp_path, *options)
    assert [(row["model"], row["weights"], row["regime"]) for row in rows] == [("moe", "float32", "decode"), ("moe", "int8", "decode")]
    assert all(1 / 6 <= row["f"] < 1 for row in rows)


@pytest.mark.parametrize("weights", generate_cpu.WEIGHTS)
@pytest.mark.parametrize("stored", [False, True], ids=["random", "stored"])
def test_dense_side_is_an_ordinary_model_with_the_weights_that_the_converted_one_stands_for(weights, stored, tmp_path):
    change = generate_cpu.WEIGHTS[weights]
    if stored:
        tiny.save_converted_tiny(tmp_path / "moe")
        pair = generate_cpu._stored_pair(tmp_path / "moe", None, torch.bfloat16, change)
    else:
        pair = generate_cpu._random_pair(generate_cpu.TINY, torch.bfloat16, change, expert_size=8)
    assert not moe_layers(pair.dense)
    assert all("forward" not in module.__dict__ and not type(module).__name__.startswith("Int8") for module in pair.dense.modules())
    assert all(parameter.is_contiguous() and parameter.dtype is torch.bfloat16 for parameter in pair.dense.parameters())
    ours = {parameter.data_ptr() for parameter in pair.ours.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in pair.dense.parameters()}
    for name, layer in moe_layers(pair.ours).items():
        assert (layer.weights().up_FD.dtype is torch.int8) == (weights == "int8")
        dense, ours = site_weights(pair.dense, layer.site), layer.weights().dequantized(torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(dense.per_neuron(), ours.per_neuron(), strict=True)), name
    generate_cpu._check_same(pair, pair.prompts(1, 8, 8))


def test_a_dense_source_of_other_weights_is_refused(tmp_path, capsys):
    tiny.save_converted_tiny(tmp_path / "moe")
    tiny.save_dense_tiny(tmp_path / "other", seed=1)
    capsys.readouterr()
    options = ["--converted", str(tmp_path / "moe"), "--dense", str(tmp_path / "other"), "--batches", "1"]
    assert bench_run.main([*QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert "not the same model" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fractions", "0.5,1.5"], "--fractions must be in (0, 1], got 1.5."),
        (["--batches", "0"], "--batches must be at least 1, got 0."),
        (["--new-tokens", "1"], "--new-tokens must be at least 2, got 1."),
        (["--rounds", "0"], "--rounds must be at least 1, got 0."),
        (["--long-prompt", "1"], "--long-prompt must be at least 2, or 0, got 1."),
        (["--weights", "int4"], "did you mean 'int8'?"),
        (["--dense", "x"], "--converted"),
        (["--converted", "x", "--expert-size", "8"], "leave --expert-size out"),
        (["--converted", "nowhere/at/all"], "does not exist"),
    ],
)
def test_options_that_mean_nothing_are_one_line(capsys, options, message):
    assert bench_run.main([*QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_is_not_converted_or_has_too_few_positions_is_one_line(tmp_path, capsys):
    tiny.save_dense_tiny(tmp_path / "dense")
    assert bench_run.main([*QUICK, "--converted", str(tmp_path / "dense")]) == 2
    assert "is not a converted model" in capsys.readouterr().err
    tiny.save_converted_tiny(tmp_path / "moe")
    assert bench_run.main([*QUICK, "--converted", str(tmp_path / "moe"), "--prompt-tokens", "120", "--new-tokens", "9"]) == 2
    assert "129 is more than the 128 positions" in capsys.readouterr().err


def test_nearest_follows_a_bent_curve_and_gives_the_best_trial_where_nothing_is_near():
    asked = []

    def squared(share):
        asked.append(share)
        return {"rule": share}, share**2

    rules, found = generate_cpu._nearest(squared, 0.25)
    assert abs(found - 0.25) <= generate_cpu.NEAR
    assert rules == {"rule": asked[-1]}
    assert len(asked) < generate_cpu.MOST_TRIALS

    def step(share):
        return {"rule": share}, 0.3 if share < 0.9 else 1.0

    assert generate_cpu._nearest(step, 0.5)[1] == 0.3


def test_tuned_rules_run_near_the_wanted_fraction_of_decoding_steps_alone(pair, prompt):
    tuned = generate_cpu._tuned(pair, prompt, (0.75, 0.25), new_tokens=6, counted=2)
    seen = []
    for wanted, (rules, active) in tuned.items():
        counted = generate_cpu._Active(2)
        side = generate_cpu.Side(pair.ours, rules)
        side.prepare(prompt)
        with generate_cpu._recording(pair.ours, counted):
            side(prompt, 6)
        assert counted.active_fraction() == active
        assert abs(active - wanted) < 0.1
        seen += map(int, counted._tokens.values())
    assert set(seen) == {2 * 5}, "the prompt is no decoding step, and the last token is not read"
    assert all(layer.recorder is None for layer in moe_layers(pair.ours).values())


def test_side_sets_its_rules_and_times_the_first_token_apart(pair, prompt, monkeypatch):
    clock = iter([10.0, 13.0, 14.0, 15.0, 16.5])
    monkeypatch.setattr(generate_cpu.time, "perf_counter", lambda: next(clock))
    rules = {name: Threshold(theta=0.5) for name in moe_layers(pair.ours)}
    side = generate_cpu.Side(pair.ours, rules)
    side.prepare(prompt)
    times = side(prompt, 4)
    assert times == generate_cpu.Times(first_s=3.0, step_s=3.5 / 3)
    assert {layer.rule for layer in moe_layers(pair.ours).values()} == {Threshold(theta=0.5)}


def test_sides_take_turns_and_the_warm_up_is_not_counted(prompt):
    calls = []

    class Side:
        def __init__(self, name):
            self.name = name

        def prepare(self, ids_BS):
            calls.append(f"prepare {self.name}")

        def __call__(self, ids_BS, new_tokens):
            assert calls[-1] == f"prepare {self.name}"
            calls[-1] = self.name
            return len(calls)

    times = generate_cpu.take_turns({"a": Side("a"), "b": Side("b")}, prompt, new_tokens=2, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert times == {"a": [3, 6], "b": [4, 5]}


def test_a_failed_compilation_is_said_in_the_row(pair, prompt, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nlong tale")

    monkeypatch.setattr(pair.dense, "get_compiled_call", refuse)
    (row,) = generate_cpu._decoding(pair, prompt, (0.5,), new_tokens=3, rounds=1, compiled=True)
    assert (row["compiled_us"], row["compiled_over_ours"], row["compiled"]) == (None, None, "failed: no C++ compiler")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # torch's compiler uses torch.jit
def test_the_dense_model_is_compiled_with_a_static_cache_and_says_the_same(pair, prompt):
    (row,) = generate_cpu._decoding(pair, prompt, (0.5,), new_tokens=4, rounds=1, compiled=True)
    assert row["compiled"] == generate_cpu.STATIC
    assert_allclose(row["compiled_over_ours"], row["compiled_us"] / row["ours_us"])
    plain = pair.dense.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0)
    options = {"cache_implementation": "static", "compile_config": generate_cpu._on_this_device()}
    static = pair.dense.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0, **options
    )
    assert torch.equal(plain, static)


@pytest.mark.slow
def test_convert_measures_a_process_of_its_own(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["convert", "--quick", "--json", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["source"], row["tokens"]) == ("convert", "random Llama", 2048)
    assert 100 < row["peak_mb"] < 4000
    assert row["cpu_seconds"] > 0
    assert 0 < row["seconds"] < 300
    capsys.readouterr()
    assert bench_run.main(["convert", "--quick", "--source", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: moeify convert: ")
    assert "does not exist" in error
    assert error.count("\n") == 1
