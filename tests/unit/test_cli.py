"""The command line: options from docstrings, one-line errors, exit codes, progress; through `run`, and real processes where it matters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from browser import BROWSER, WIDTH, Browser
from typer.main import get_command
from typer.testing import CliRunner

from moeify import cli
from moeify._config import field_docs
from moeify._progress import NO_PROGRESS
from moeify.cli._help import HEADINGS, _Formatter
from moeify.data import AugmentConfig, DataConfig
from moeify.errors import CheckpointError, TrainingError
from moeify.evaluate import Curve, ExecutedExperts, TokenCosts
from moeify.layers import moe_layers
from moeify.pipeline import METHODS, NeuronConfig, TimedText
from moeify.sparsity import EnforcementConfig
from moeify.thin import ThinConfig
from moeify.train.distill import DistillConfig
from moeify.train.loop import TrainConfig
from moeify.train.sparsify import SparsifyConfig

SMALL = ["--window", "32", "--max-tokens", "640", "--data", "builtin:pydoc"]
COMMANDS = tuple(get_command(cli.app).commands)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("moeify._terminal.make_progress", lambda: NO_PROGRESS)  # which a slow machine would print
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save_dense_tiny(tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def converted(dense):
    out = dense.parent / "moe"
    options = ["--expert-size", "8", "--router-width", "4", "--router-epochs", "1", "--target-active", "0.5", "--seed", "1"]
    assert cli.run(["convert", str(dense), "--out", str(out), *options, *SMALL]) == 0
    return out


def run(capsys, *arguments):
    code = cli.run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments, **options):
    code = "from moeify.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# -- help ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_exits_with_0(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "--debug" in result.output


def test_run_without_arguments_lists_the_commands(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(f"  {command}" in out for command in COMMANDS)


def test_help_tells_commands_in_order_under_headings(capsys):
    _, out, _ = run(capsys)
    shown = re.findall(r"^(?:([A-Z]\w+):|  ([a-z]+)\b)", out[out.index("Look:") :], flags=re.MULTILINE)
    assert [name for _, name in shown if name] == [name for names in HEADINGS.values() for name in names]
    assert [heading for heading, _ in shown if heading] == list(HEADINGS)  # and so no "Other": every command has its place
    assert set(COMMANDS) == {name for names in HEADINGS.values() for name in names}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_without_colour_and_breaks_no_word(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "10000")
    assert cli.run([command, "--help"] if command else ["--help"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([command, "--help"] if command else ["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    words = set(whole.split())
    broken = [word for word in text.split() if word not in words and "|" not in word]
    assert not broken


def test_a_long_choice_is_broken_after_a_bar_and_a_long_word_not_at_all():
    formatter = _Formatter(width=40)
    formatter.write_dl([("--method " + "|".join(["alpha"] * 8), "see --data-split of other-commands"), ("-x", "y" * 60)])
    lines = formatter.getvalue().splitlines()
    assert [line.endswith("|") for line in lines if "alpha" in line][:-1] == [True] * (sum("alpha" in line for line in lines) - 1)
    assert any("--data-split" in line for line in lines)
    assert any("y" * 60 in line for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_is_told_commands_and_options(monkeypatch, capsys, shell):
    def asked(line):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": line}
        for name, value in {**words, "_MOEIFY_COMPLETE": f"complete_{shell}"}.items():
            monkeypatch.setenv(name, value)
        assert cli.run([]) == 0
        return capsys.readouterr().out

    assert re.findall(r"(?<![\w-])(?:sparsify|serve|sweep)(?![\w-])", asked("moeify s"))
    assert all(name in asked("moeify ") for name in COMMANDS)
    options = asked("moeify thin --me")
    assert "--method" in options and "--out" not in options


@pytest.mark.parametrize("command", ["profile", "convert", "sweep", "report"])
def test_help_has_an_option_with_the_docstring_of_every_data_field(command):
    text = " ".join(CliRunner().invoke(cli.app, [command, "--help"], terminal_width=10_000).output.split())
    for field, doc in field_docs(DataConfig).items():
        if field == "seed":  # one --seed for everything random
            continue
        option = "--data-split" if field == "split" else "--" + field.replace("_", "-")
        assert option in text
        assert " ".join(doc.split())[:40] in text


# -- options -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config of every kind of scalar."""

    path: str
    """Required."""
    count: int = 3
    """A number."""
    limit: int | None = 5
    """A number or none."""
    name: str | None = None
    """None by default."""


def call_with_options(arguments):
    import typer

    got = {}
    app = typer.Typer()

    def show(*, config: Config) -> None:
        got["config"] = config

    app.command()(cli.takes("config", Config, name="called")(show))
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, got.get("config"), result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--path", "a"], Config(path="a"), id="defaults"),
        pytest.param(["--path", "a", "--count", "7", "--limit", "9"], Config(path="a", count=7, limit=9), id="given"),
        pytest.param(["--path", "a", "--limit", "none"], Config(path="a", limit=None), id="none"),
        pytest.param(["--path", "a", "--called", "b"], Config(path="a", name="b"), id="renamed"),
    ],
)
def test_takes_builds_the_config_from_options(arguments, expected):
    assert call_with_options(arguments)[:2] == (0, expected)


@pytest.mark.parametrize(
    "arguments", [[], ["--path", "a", "--limit", "many"], ["--path", "a", "--name", "b"]], ids=["missing", "no number", "old name"]
)
def test_takes_refuses_what_the_config_refuses(arguments):
    assert call_with_options(arguments)[0] == 2


# -- commands ------------------------------------------------------------------------------------------------------------------------


def test_convert_prints_nothing_on_stderr_and_writes_the_checkpoint(converted):
    record = json.loads((converted / "moeify.json").read_text())
    assert record["calibration"]["target_active"] == 0.5
    assert record["calibration"]["seed"] == 1
    assert {site["router"]["width"] for site in record["sites"]} == {4}
    assert len(moe_layers(transformers.AutoModelForCausalLM.from_pretrained(converted))) == 2
    assert sorted(p.name for p in converted.parent.iterdir()) == ["dense", "moe"], "no state of the conversion stays"


@pytest.mark.parametrize(
    ("options", "router"),
    [
        (["--router", "gate", "--router-scale", "output"], {"name": "gate", "scale": "output"}),
        (["--router", "lowrank", "--router-rank", "8"], {"name": "lowrank", "rank": 8}),
    ],
    ids=["gate", "lowrank"],
)
def test_convert_with_a_router_that_is_not_trained_writes_its_options_to_the_manifest(dense, tmp_path, capsys, options, router):
    code, _, err = run(capsys, "convert", dense, "--out", tmp_path / "moe", "--expert-size", "1", *options, *SMALL)
    assert (code, err) == (0, "")
    sites = json.loads((tmp_path / "moe" / "moeify.json").read_text())["sites"]
    assert [(site["num_experts"], site["router"]) for site in sites] == [(48, router)] * 2


def test_convert_with_options_of_router_and_experts_writes_them_to_the_manifest(dense, tmp_path, capsys):
    options = ["--router-width", "4", "--router-output", "abs", "--router-epochs", "1", "--always-on", "2", "--dtype", "bfloat16"]
    code, _, err = run(capsys, "convert", dense, "--out", tmp_path / "moe", *options, *SMALL)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "moe" / "moeify.json").read_text())
    sites = record["sites"]
    # a third of the experts is always on, and counts: two thirds would run if calibration did not know
    assert record["calibration"]["measured"]["active_fraction"] == pytest.approx(0.5, abs=0.1)
    assert [site["router"]["output"] for site in sites] == ["abs", "abs"]
    assert [len(site["always_on"]) for site in sites] == [2, 2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", "m", "--data", "d", "--out", "o"], "convert_checkpoint"),
        (["sparsify", "m", "--data", "d", "--out", "o", "--steps", "1"], "sparsify_checkpoint"),
        (["thin", "m", "--data", "d", "--out", "o", "--target", "0.5"], "thin_checkpoint"),
        (["sweep", "m", "--data", "d"], "sweep_checkpoint"),
        (["profile", "m", "--data", "d"], "profile_checkpoint"),
        (["generate", "m", "text"], "timed_text"),
    ],
)
def test_dtype_and_device_reach_the_pipeline(monkeypatch, arguments, name):
    got = {}

    def take(*_, dtype, device, **__):
        got.update(dtype=dtype, device=device)
        return TimedText(text="", new_tokens=1, seconds=1.0, active_fraction=1.0) if name == "timed_text" else {}

    monkeypatch.setattr(f"moeify.pipeline.{name}", take)
    assert cli.run([*arguments, "--json"]) == 0
    assert got == {"dtype": "float32", "device": "cpu"}
    assert cli.run([*arguments, "--dtype", "float16", "--device", "cuda:1"]) == 0
    assert got == {"dtype": "float16", "device": "cuda:1"}


def test_convert_with_int8_weights_measures_before_and_after_them(dense, tmp_path, capsys):
    options = ["--router-width", "4", "--router-epochs", "1", "--dtype", "bfloat16", "--weights", "int8"]
    code, _, err = run(capsys, "convert", dense, "--out", tmp_path / "moe", *options, *SMALL)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "moe" / "moeify.json").read_text())
    assert {site["weights"] for site in record["sites"]} == {"int8"}
    calibration = record["calibration"]
    assert calibration["weights"] == "int8"
    assert list(calibration["int8_errors"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    before, after = calibration["measured_float"], calibration["measured"]
    assert before["quality"] != after["quality"]
    assert after["quality"] == pytest.approx(before["quality"], rel=0.05)
    card = (tmp_path / "moe" / "README.md").read_text()
    for row in (
        "| weights of the experts | int8, one scale an output |",
        f"| held-out perplexity | {after['quality']:.4g} (dense",
        f"| held-out perplexity with floating weights | {before['quality']:.4g} (dense",
        "| relative error of the int8 weights | 0.0",
    ):
        assert row in card
    assert "no other loader takes its int8 weights" in card
    mlp = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").model.layers[0].mlp
    assert (mlp.up_proj.weight.dtype, mlp.up_proj.weight_scale.dtype) == (torch.int8, torch.float32)


TRAIN = ["--window", "16", "--data", "builtin:pydoc", "--max-tokens", "6400", "--validation-tokens", "160", "--steps", "3"]


def test_sparsify_makes_a_dense_checkpoint_that_convert_takes(tmp_path, capsys):
    source = tiny.save_dense_tiny(tmp_path / "silu", hidden_act="silu")
    options = ["--weight", "0.01", "--batch-tokens", "100", "--lr", "0.001", "--seed", "1"]
    code, out, err = run(capsys, "sparsify", source, "--out", tmp_path / "relu", *TRAIN, *options, "--json")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "relu" / "sparsify.json").read_text())
    assert json.loads(out) == record
    assert record["tokens"] == 3 * 96
    assert (record["train"]["seed"], record["train"]["lr"]) == (1, 0.001)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "relu").config.hidden_act == "relu"
    quick = ["--expert-size", "8", "--router", "centre", "--split", "contiguous"]
    assert run(capsys, "convert", tmp_path / "relu", "--out", tmp_path / "moe", *quick, *SMALL)[0] == 0


def test_sparsify_without_json_shows_quality_and_layers_but_no_long_lists(dense, tmp_path, capsys):
    code, out, _ = run(capsys, "sparsify", dense, "--out", tmp_path / "out", *TRAIN)
    assert code == 0
    assert "metric: perplexity" in out
    assert "model.layers.1.mlp" in out
    assert all(len(line) < 200 for line in out.splitlines())


@pytest.fixture
def sparsify_call(monkeypatch):
    got = {}

    def take(source, out, **options):
        got.update(options, source=source, out=out)
        return {}

    monkeypatch.setattr("moeify.pipeline.sparsify_checkpoint", take)
    return got


def test_sparsify_options_reach_the_configs(sparsify_call, tmp_path, capsys):
    arguments = ["sparsify", "m", "--data", "d", "--out", "o", "--steps", "7"]
    assert cli.run(arguments) == 0
    plain = sparsify_call.copy()
    assert plain["train"] == TrainConfig(steps=7)
    assert plain["config"] == SparsifyConfig()
    assert plain["data"] == DataConfig(data="d", split="train", max_tokens=None)
    assert plain["validation"] == DataConfig(data="d", split="validation", max_tokens=100_000)
    assert (plain["task"], plain["batch_tokens"], plain["overwrite"], plain["augment"]) == (None, None, False, AugmentConfig())
    more = {
        "--activation": "relu2", "--activation-policy": '{"a": null}',
        "--loss": "l1", "--weight": "0.5", "--on": "preactivations", "--weight-schedule": "linear",
        "--layer-weights": '{"re:.*": 2.0}', "--distill-temperature": "2", "--batch-sequences": "3", "--micro-sequences": "1",
        "--schedule": "linear", "--save-every": "2", "--seed": "5", "--task": "masked-lm", "--crop": "4", "--max-tokens": "90",
        "--data-split": "all", "--validation": "v", "--validation-split": "test", "--validation-tokens": "30", "--column": "c",
    }  # fmt: skip
    flags = ["--distill", "--gradient-checkpointing", "--flip", "--overwrite"]
    assert cli.run([*arguments, *flags, *(part for pair in more.items() for part in pair)]) == 0
    enforcement = EnforcementConfig(loss="l1", weight=0.5, on="preactivations", schedule="linear", layer_weights={"re:.*": 2.0})
    got = sparsify_call
    assert got["config"] == SparsifyConfig(
        activation="relu2", policy={"a": None}, enforcement=enforcement, distill=DistillConfig(temperature=2.0)
    )
    assert got["train"] == TrainConfig(
        steps=7, batch_sequences=3, micro_sequences=1, schedule="linear", save_every=2, seed=5, gradient_checkpointing=True
    )
    assert got["data"] == DataConfig(data="d", column="c", split="all", max_tokens=90, seed=5)
    assert got["validation"] == DataConfig(data="v", column="c", split="test", max_tokens=30)
    assert (got["task"], got["overwrite"], got["augment"]) == ("masked-lm", True, AugmentConfig(flip=True, crop=4))
    assert cli.run([*arguments, "--batch-tokens", "64"]) == 0
    assert got["batch_tokens"] == 64


# -- thin ----------------------------------------------------------------------------------------------------------------------------

THIN = ["thin", "m", "--data", "d", "--out", "o"]


@pytest.fixture
def thin_call(monkeypatch):
    got = {}

    def take(source, out, **options):
        got.update(options, source=source, out=out)
        return {}

    monkeypatch.setattr("moeify.pipeline.thin_checkpoint", take)
    return got


def test_help_of_thin_lists_every_method():
    text = " ".join(CliRunner().invoke(cli.app, ["thin", "--help"], terminal_width=10_000).output.split())
    assert "|".join(METHODS) in text
    assert "with cats, chess, predictor, topk of the neurons of each FFN" in text


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], ThinConfig(skip_frac=0.4)),
        (["--method", "teal"], ThinConfig(skip_frac=0.4, score="magnitude", allocate="uniform")),
        (["--method", "magnitude"], ThinConfig(skip_frac=0.4, score="magnitude", allocate="uniform")),
        (["--method", "wina", "--allocate", "greedy"], ThinConfig(skip_frac=0.4, score="wina", allocate="greedy")),
        (
            ["--roles", "attn_in,ffn_in", "--rows", "7", "--first-dense", "0", "--refine", "2", "--seed", "3"],
            ThinConfig(skip_frac=0.4, roles=("attn_in", "ffn_in"), rows=7, first_dense=0, refine=2, seed=3),
        ),
        *((["--method", name], NeuronConfig(method=name, skip_frac=0.4)) for name in ("cats", "chess", "predictor", "topk")),
        (["--method", "chess", "--seed", "3"], NeuronConfig(method="chess", skip_frac=0.4, seed=3)),
    ],
)
def test_thin_options_reach_the_config(thin_call, options, config):
    assert cli.run([*THIN, "--target", "0.4", *options]) == 0
    assert thin_call["config"] == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "catz"], "--method: unknown name 'catz'; did you mean 'cats'?"),
        (["--method", "wina", "--allocate", "shared"], "'wina' is no measure for that; use 'sensitivity' or 'uniform'."),
        (
            ["--method", "cats", "--allocate", "uniform"],
            "leave out --allocate, which is for channels (sensitivity, teal, magnitude, wina).",
        ),
        (["--method", "topk", "--roles", "ffn_in", "--refine", "0"], "the same share in each: leave out --refine, --roles, which are for"),
    ],
)
def test_thin_with_options_that_do_not_go_together_is_one_line(thin_call, capsys, options, message):
    code, out, err = run(capsys, *THIN, "--target", "0.4", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not thin_call


@pytest.mark.parametrize("method", ["sensitivity", "chess"])
@pytest.mark.parametrize("target", ["1", "1.5", "-0.1", "nan"])
def test_thin_with_a_target_out_of_range_is_one_line(thin_call, capsys, method, target):
    line = f"error: skip_frac (--target) must be in [0, 1), got {float(target)}.\n"
    assert run(capsys, *THIN, "--method", method, f"--target={target}") == (2, "", line)
    assert not thin_call


@pytest.mark.parametrize("method", ["cats", "topk"])
def test_thin_of_neurons_says_what_was_skipped_and_sweep_and_report_take_it(dense, tmp_path, capsys, method):
    out = tmp_path / "thin"
    code, text, err = run(capsys, "thin", dense, "--out", out, "--method", method, "--target", "0.5", *SMALL)
    assert (code, err) == (0, "")
    assert text.startswith(f"method: {method}\nskips: neurons of FFNs\nskip_frac: 0.5\n")
    assert "| skips | neurons of FFNs |" in (out / "README.md").read_text()
    code, text, err = run(capsys, "sweep", out, "--targets", "0.3", "--out", out / "curve.json", "--json", *SMALL)
    assert (code, err) == (0, "")
    fractions = [point["active_fraction"] for point in json.loads(text)["points"]]
    assert fractions == pytest.approx([0.3, 0.5], abs=0.05)
    assert run(capsys, "report", out)[0] == 0


@pytest.fixture(scope="module")
def int8(converted):
    out = converted.parent.parent / f"{converted.parent.name}-int8"
    assert cli.run(["quantize", str(converted), "--out", str(out)]) == 0
    return out


def test_quantize_writes_a_whole_checkpoint_and_leaves_its_source_alone(converted, int8, capsys):
    source, record = (json.loads((folder / "moeify.json").read_text())["calibration"] for folder in (converted, int8))
    assert "weights" not in source
    changed = {"weights", "int8_errors", "measured", "measured_float", "versions"}
    assert {key: record[key] for key in source if key not in changed} == {key: source[key] for key in source if key not in changed}
    assert (record["weights"], record["measured"], record["measured_float"]) == ("int8", None, source["measured"])
    assert {p.name for p in int8.iterdir()} == {p.name for p in converted.iterdir()}
    assert (int8 / "model.safetensors").stat().st_size < (converted / "model.safetensors").stat().st_size
    card = (int8 / "README.md").read_text()
    assert "| measured | nothing; `moeify sweep` does |" in card
    assert f"| held-out perplexity with floating weights | {source['measured']['quality']:.4g} (dense" in card
    assert not [p for p in int8.parent.iterdir() if "partial" in p.name]


def test_quantize_with_json_prints_the_record(converted, tmp_path, capsys):
    code, out, err = run(capsys, "quantize", converted, "--out", tmp_path / "int8", "--dtype", "bfloat16", "--json")
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "int8" / "moeify.json").read_text())["calibration"]
    assert json.loads(out) == written
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert model.dtype is torch.bfloat16
    arguments = ["quantize", converted, "--out", tmp_path / "int8"]
    code, _, err = run(capsys, *arguments)
    assert (code, "--overwrite replaces it" in err) == (2, True)
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8").dtype is torch.float32, "the source's own"


def test_quantize_with_overwrite_replaces_its_own_source(converted, tmp_path, capsys):
    shutil.copytree(converted, tmp_path / "moe")
    assert run(capsys, "quantize", tmp_path / "moe", "--out", tmp_path / "moe", "--overwrite")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.model.layers[1].mlp.down_proj.weight.dtype is torch.int8


def test_commands_work_on_int8_weights(int8, tmp_path, capsys):
    code, out, err = run(capsys, "sweep", int8, "--values", "0.0,2.5", "--out", tmp_path / "curve.json", *SMALL)
    assert (code, err) == (0, "")
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["points"][0]["quality_ratio"] == pytest.approx(1, abs=1e-4)
    assert curve["points"][1]["active_fraction"] < 1
    text = run(capsys, "generate", int8, "The ", "--max-new-tokens", "4")
    assert text[0] == 0
    assert text[1].startswith("The ")
    code, out, err = run(capsys, "profile", int8, "--json", *SMALL)
    assert (code, err) == (0, "")
    assert 0 < json.loads(out)["model.layers.0.mlp"]["zero_frac"] < 1


def _no_source(folder):
    record = json.loads((folder / "moeify.json").read_text())
    del record["calibration"]["source"]
    (folder / "moeify.json").write_text(json.dumps(record))


def _nan(folder):
    tiny.edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda f: (f / "moeify.json").unlink(), "has no moeify.json", id="no record"),
        pytest.param(_no_source, "lacks 'source'; convert the model again", id="damaged record"),
        pytest.param(_nan, "'model.layers.1.mlp.up_proj.weight' has NaN or infinite values", id="nan"),
        pytest.param(lambda f: shutil.copy(f / "config.json", f.parent / "int8"), "is a file; choose another --out", id="out is a file"),
    ],
)
def test_quantize_of_a_damaged_checkpoint_is_one_line_and_writes_nothing(converted, tmp_path, capsys, change, message):
    shutil.copytree(converted, tmp_path / "moe")
    change(tmp_path / "moe")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, "quantize", tmp_path / "moe", "--out", tmp_path / "int8")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_quantize_refuses_sources_that_are_no_floating_conversion(dense, int8, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source, message in (
        (dense, "is of a dense model; convert it first"),
        (int8, "has int8 weights already"),
        (tmp_path / "model.gguf", "is a file; give the folder that `moeify convert` wrote (which reads .gguf files)"),
        (tmp_path / "nothing", "cannot be read"),
    ):
        code, out, err = run(capsys, "quantize", source, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "m", "--data", "builtin:pydoc", "--out", "o", "--weights", "int4"], "--weights must be float or int8, got 'int4'"),
        (["convert", "INT8", "--data", "builtin:pydoc", "--out", "o"], "is converted already"),
        (["quantize", "CONVERTED", "--out", "o", "--dtype", "int8"], "--dtype: unknown name 'int8'"),
    ],
)
def test_wrong_types_of_weights_are_one_line(converted, int8, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *[{"INT8": int8, "CONVERTED": converted}.get(a, a) for a in arguments])
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_convert_with_policy_leaves_the_named_ffn_dense(dense, tmp_path, capsys):
    policy = '{"re:.*layers.0.mlp": null, "model.layers.1.mlp": {"expert_size": 12}}'
    code, _, err = run(
        capsys,
        "convert",
        dense,
        "--out",
        tmp_path / "moe",
        "--policy",
        policy,
        "--router",
        "centre",
        "--split",
        "random",
        "--rule",
        "topk",
        *SMALL,
    )
    assert (code, err) == (0, "")
    (site,) = json.loads((tmp_path / "moe" / "moeify.json").read_text())["sites"]
    assert (site["site"]["name"], site["num_experts"], site["router"]["name"], site["rule"]["name"]) == (
        "model.layers.1.mlp",
        4,
        "centre",
        "topk",
    )


def test_convert_with_overwrite_replaces_an_earlier_conversion(dense, tmp_path, capsys):
    arguments = ["convert", dense, "--out", tmp_path / "moe", "--router", "random", "--split", "contiguous", *SMALL]
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments)[0] == 2
    assert run(capsys, *arguments, "--overwrite")[0] == 0


def test_sweep_writes_the_curve_and_prints_a_table(converted, tmp_path, capsys):
    code, out, err = run(capsys, "sweep", converted, "--values", "0.0,2.5", "--out", tmp_path / "curve.json", *SMALL)
    assert (code, err) == (0, "")
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [point["value"] for point in curve["points"]] == [0.0, 2.5]
    assert curve["points"][0]["quality_ratio"] == pytest.approx(1, abs=1e-4)
    assert curve["points"][1]["active_fraction"] < 1
    assert {point["rule"] for point in curve["points"]} == {"threshold"}, "the checkpoint's own"
    assert "perplexity" in out
    assert len(out.strip().splitlines()) == 4, "header, two points, dense"
    assert all(0 < point["bytes_fraction"] <= 1.1 for point in curve["points"])
    assert not any("latency_fraction" in point for point in curve["points"])
    code, out, _ = run(capsys, "sweep", converted, "--values", "0.0,2.5", "--out", tmp_path / "curve.json", "--latency", *SMALL)
    timed = json.loads((tmp_path / "curve.json").read_text())["points"]
    assert code == 0
    assert [point["value"] for point in timed] == [0.0, 2.5], "points without a time are measured again"
    assert all(point["latency_fraction"] > 0 and "float32, 1 x 1" in point["machine"] for point in timed)
    assert max(map(len, out.splitlines())) <= 80
    assert "time" in out.splitlines()[0].split()


def test_sweep_with_json_prints_what_it_writes(converted, tmp_path, capsys):
    code, out, _ = run(capsys, "sweep", converted, "--rule", "topk", "--values", "1,6", "--out", tmp_path / "c.json", "--json", *SMALL)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "c.json").read_text())


def test_report_reads_a_curve_and_draws_it(converted, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run(capsys, "sweep", converted, "--values", "0.0,2.5", "--out", tmp_path / "curve.json", *SMALL)
    code, out, err = run(capsys, "report", converted, "--curve", tmp_path / "curve.json", "--out", tmp_path / "page", "--json")
    assert (code, err) == (0, "")
    files = {
        kind: tmp_path / "page" / name
        for kind, name in (("html", "report.html"), ("page", "report.md"), ("png", "curve.png"), ("svg", "curve.svg"))
    }
    assert json.loads(out) == {kind: str(path) for kind, path in files.items()}
    assert sorted((tmp_path / "page").iterdir()) == sorted(files.values())
    page = files["page"].read_text(encoding="utf-8")
    assert all(part in page for part in ("perplexity", "curve.png", "## Routers", "model.layers.0.mlp"))
    assert files["png"].stat().st_size > 1000
    assert "</svg>" in files["svg"].read_text(encoding="utf-8")
    html, source = files["html"].read_text(encoding="utf-8"), json.loads((converted / "moeify.json").read_text())["calibration"]["source"]
    assert Path(source).is_absolute()
    assert f">{Path(source).name}<" in html and str(Path(source).parent) not in html, "folders say whose machine it was"
    assert "this page: processor" in html and "this page: dtype" not in html, "nothing was run for it"


def test_report_compares_curves_at_equal_cost(converted, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    for path, values in ((mine, "0.0,2.5"), (other, "0.0,1.0,4.0")):
        assert run(capsys, "sweep", converted, "--values", values, "--out", path, *SMALL)[0] == 0
    options = ["--curve", mine, "--out", tmp_path / "page"]
    code, out, err = run(capsys, "report", converted, *options, "--compare", f"another | one={other}", "--within", "1000", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == {"html", "page", "png", "svg", "compare"}
    assert (tmp_path / "page" / "compare.png").stat().st_size > 1000
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    section = page.partition("## Methods at equal cost")[2]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| perplexity at all FLOPs of")
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:4]] == [converted.name, "another \\| one"]
    assert "%" in rows[2], "a loss of 1000 is met somewhere"
    changed = json.loads(other.read_text())
    for change, message in (
        ({"metric": "accuracy"}, "is measured by accuracy, the checkpoint's curve by perplexity"),
        ({"fingerprint": "x"}, "was not measured on the batches of the checkpoint's curve"),
        ({"points": []}, "has no point to compare"),
    ):
        other.write_text(json.dumps({**changed, **change}))
        code, _, err = run(capsys, "report", converted, *options, "--compare", f"b={other}")
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    for wrong, message in (
        (["--compare", "b"], "--compare takes NAME=PATH, got 'b'"),
        (["--compare", f"{converted.name}={mine}"], "is there twice"),
        (["--within", "1"], "--within is what curves to --compare may lose"),
        (["--compare", "b=none.json"], "no such file"),
    ):
        code, _, err = run(capsys, "report", converted, *options, *wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_report_with_data_and_text_runs_the_checkpoint(converted, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--targets", "0.25,1", "--text", "a <b> & | c", "--out", tmp_path / "page", "--json", *SMALL]
    code, out, err = run(capsys, "report", converted, *options)
    assert (code, err) == (0, "")
    files = json.loads(out)
    assert set(files) == {"html", "page", "analysis", "experts", "active", "tokens", "curve", "png", "svg"}
    measured = Curve.read(tmp_path / "page" / "curve.json")
    assert {round(p.active_fraction, 1) for p in measured.points} >= {0.3, 0.5, 0.8}, "what was missing is measured"
    assert all(p.latency_fraction for p in measured.points)
    assert sorted(map(str, (tmp_path / "page").iterdir())) == sorted(files.values())
    found = json.loads((tmp_path / "page" / "analysis.json").read_text())
    settings = ExecutedExperts.from_json(found["experts"]).active_fraction()
    assert list(settings) == ["calibrated", "target 0.25", "target 1"]
    assert list(settings["target 1"].values()) == [1.0, 1.0]
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert settings["target 0.25"][layer] < settings["calibrated"][layer] < 1
    assert "".join(found["text"]["tokens"]) == "a <b> & | c"
    assert TokenCosts.from_json(found["text"]["costs"]).fraction_BS.shape == (1, 11)
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert all(
        part in page
        for part in ("experts.png", "active.png", "(tokens.html)", "| layer | calibrated | target 0.25 | target 1 |", '"\\<"', "## Routers")
    )
    assert "<b>" not in (tmp_path / "page" / "tokens.html").read_text(encoding="utf-8")
    html = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for wanted in ("bytes of weights that a decoded token reads", "measured time", "near what moeify preset makes", "Timed on "):
        assert wanted in html
    own = [f"this page: {name}" for name in ("dtype", "device", "processor", "threads", "system")]
    for wanted in ("executed experts: data", "executed experts: window", "curve: dtype", *own):
        assert f">{wanted}<" in html
    if BROWSER is not None:
        with Browser(tmp_path / "browser") as browser:
            page = browser.open(tmp_path / "page" / "report.html", is_dark=True)
            seen = page.probe()
            assert (seen["problems"], seen["width"], page.requests(), page.complaints()) == ([], WIDTH, [], [])
            assert seen["up"] <= seen["down"] and all(seen["switches"])


def test_report_of_a_thinned_checkpoint_measures_what_is_missing_and_shows_kept_channels(dense, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "thin"
    assert run(capsys, "thin", dense, "--out", out, "--target", "0.4", *SMALL)[0] == 0
    code, _, err = run(capsys, "report", out, "--no-latency", *SMALL)
    assert (code, err) == (0, "")
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    for wanted in (
        "Kept channels by layer",
        "model.layers.0: attention",
        "model.layers.1: FFN",
        "linear layers that skip channels",
        "What each token of a text costs",
    ):
        assert wanted in page
    assert "measured time" not in page
    markdown = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert "## Kept channels" in markdown and "## Cost of a text" in markdown
    first = (out / "report" / "curve.json").stat().st_mtime_ns
    code, _, err = run(capsys, "report", out)
    assert (code, err) == (0, ""), "the curve that a report measured is found again"
    assert (out / "report" / "curve.json").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", " "], "--text is empty; give at least one word."),
        (["--text", "a" * 200], "--text has 200 tokens, LlamaForCausalLM takes 128; give a shorter one."),
        (["--image", "a.png"], "LlamaForCausalLM does not read images; give --text in place of --image."),
        (["--window", "32", "--data-split", "train"], "--data-split, --window without --data; name the data."),
        (["--text", "a", "--targets", "0.5"], "--targets are the active fractions to run --data at; name the data."),
        (["--data", "builtin:pydoc", "--targets", "0.33"], "no knobs are stored for the active fraction 0.33"),
        (["--data", "nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (["--text", "a", "--dtype", "int8"], "unknown name 'int8'"),
    ],
)
def test_report_that_cannot_be_run_says_so_in_one_line_and_writes_nothing(converted, tmp_path, capsys, options, message):
    code, out, err = run(capsys, "report", converted, "--out", tmp_path / "page", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.rglob("*.*"))


def test_report_of_a_dense_checkpoint_or_one_without_tokenizer_is_one_line(dense, converted, tmp_path, capsys):
    code, _, err = run(capsys, "report", dense, "--text", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "has no moeify.json" in err
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare, ignore=lambda _folder, names: [name for name in names if name.startswith("tokenizer")])
    code, _, err = run(capsys, "report", bare, "--text", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "LlamaForCausalLM came without a tokenizer or processor" in err


def test_profile_with_json_gives_numbers_by_ffn(dense, capsys):
    code, out, err = run(capsys, "profile", dense, "--json", *SMALL)
    assert (code, err) == (0, "")
    profile = json.loads(out)
    assert list(profile) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert 0 < profile["model.layers.0.mlp"]["zero_frac"] < 1


def test_profile_with_eps_counts_what_is_at_most_that(dense, capsys):
    near = []
    for eps in ("0", "1e9"):
        code, out, err = run(capsys, "profile", dense, "--eps", eps, "--json", *SMALL)
        assert (code, err) == (0, "")
        near.append(json.loads(out)["model.layers.0.mlp"]["near_zero_frac"])
    assert near[0] < near[1] == 1


def test_generate_continues_the_prompt_the_same_way_every_time(converted, capsys):
    code, first, err = run(capsys, "generate", converted, "The ", "--max-new-tokens", "4")
    assert code == 0
    assert first.startswith("The ")
    assert re.fullmatch(r"4 tokens, \S+ tokens/s, \d+\.\d% active\n", err)
    code, out, err = run(capsys, "generate", converted, "The ", "--max-new-tokens", "4", "--json")
    found = json.loads(out)
    assert (code, err, found["text"] + "\n") == (0, "", first)
    assert found["tokens_per_s"] == pytest.approx(found["new_tokens"] / found["seconds"])
    assert 0 < found["active_fraction"] < 1


@pytest.mark.parametrize("draft", ["0.25", "threshold=0.5"])
def test_generate_with_a_draft_says_the_same_and_how_much_was_accepted(converted, capsys, draft):
    arguments = ("generate", converted, "The ", "--max-new-tokens", "12")
    plain = run(capsys, *arguments)
    code, out, err = run(capsys, *arguments, "--draft", draft, "--draft-tokens", "3")
    assert (code, out) == plain[:2]
    assert re.search(r"\d+ of \d+ drafted tokens accepted .*tokens a verification, .* tokens/s\n$", err)
    code, out, _ = run(capsys, *arguments, "--draft", draft, "--json")
    found = json.loads(out)
    assert found["text"] == plain[1].removesuffix("\n")
    assert found["new_tokens"] == 12
    assert found["accepted"] <= found["drafted"]
    assert found["tokens_per_s"] * found["seconds"] == pytest.approx(12)


def test_doctor_names_every_kernel_and_its_reason(capsys):
    from moeify.kernels import IMPLS

    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert {row["name"] for row in report["kernels"]} == set(IMPLS)
    assert all(row["reason"] for row in report["kernels"])
    assert {"compilers", "triton", "cuda", "caches", "versions"} <= set(report)
    assert set(report["compilers"]) >= {"c++", "g++", "clang++", "nvcc"}
    assert set(report["caches"]) >= {"hub", "datasets", "triton"}
    assert {"torch", "transformers"} <= set(report["versions"])
    assert report["cpu"]["torch_threads"] >= 1
    assert run(capsys, "doctor")[0] == 0


# -- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["convrt"], "No such command 'convrt'", id="unknown command"),
        pytest.param(["sweep", "x", "--data", "y", "--valus", "1"], "No such option: --valus", id="unknown option"),
        pytest.param(["sweep"], "Missing", id="missing argument"),
        pytest.param(["convert", "x", "--out", "y"], "Missing option '--data'", id="missing option"),
        pytest.param(["sweep", "x", "--data", "y", "--max-tokens", "many"], "'--max-tokens'", id="no number"),
        pytest.param(["sweep", "x", "--data", "y", "--batch-size", "0"], "Invalid value for '--batch-size'", id="no batch"),
        pytest.param(["generate", "x", "y", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'", id="no token"),
        pytest.param(["generate", "x", "y", "--seed", "-1"], "Invalid value for '--seed'", id="seed below 0"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(arguments, message, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.fixture
def failing(monkeypatch):
    def fail(error):
        def examine():
            raise error

        import moeify.doctor

        monkeypatch.setattr(moeify.doctor, "doctor", examine)

    return fail


def test_debug_shows_the_traceback_before_the_line(failing, capsys):
    failing(CheckpointError("what, where, the way out."))
    assert run(capsys, "doctor") == (2, "", "error: what, where, the way out.\n")
    code, _, err = run(capsys, "doctor", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("error: what, where, the way out.\n")


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [
        pytest.param(["convert", "m", "--data", "d", "--out", "o"], True, id="convert"),
        pytest.param(["sparsify", "m", "--data", "d", "--out", "o", "--steps", "1"], True, id="sparsify"),
        pytest.param(["sweep", "m", "--data", "d", "--out", "o"], True, id="sweep with a file"),
        pytest.param(["sweep", "m", "--data", "d"], False, id="sweep without a file"),
        pytest.param(["pipeline", "recipes/gpt_pydoc.toml", "--out", "o"], True, id="pipeline"),
        pytest.param(["thin", "m", "--data", "d", "--out", "o", "--target", "0.5", "--method", "chess"], True, id="thin: neurons"),
        pytest.param(["thin", "m", "--data", "d", "--out", "o", "--target", "0.5"], False, id="thin: channels"),
        pytest.param(["profile", "m", "--data", "d"], False, id="profile"),
        pytest.param(["generate", "m", "text"], False, id="generate"),
    ],
)
def test_interrupt_exits_with_130_and_says_whether_it_resumes(monkeypatch, capsys, arguments, resumes):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    names = ("convert", "sparsify", "thin", "sweep", "profile")
    for name in (*(f"{name}_checkpoint" for name in names), "timed_text", "read_recipe"):
        monkeypatch.setattr(f"moeify.pipeline.{name}", interrupt)
    line = "error: interrupted; the same command again continues where it stopped.\n" if resumes else "error: interrupted.\n"
    assert run(capsys, *arguments) == (130, "", line)


def test_a_bug_is_one_line_with_exit_code_1_and_its_traceback_with_debug(failing, capsys):
    failing(ZeroDivisionError("ours."))
    line = "internal error: ZeroDivisionError: ours"
    assert run(capsys, "doctor") == (1, "", f"{line}; run again with --debug for the traceback.\n")
    code, _, err = run(capsys, "doctor", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith(f"\n{line}.\n")


def test_training_that_diverged_is_bad_input(failing, capsys):
    failing(TrainingError("the loss is nan at step 3; lower the learning rate (9)."))
    assert run(capsys, "doctor") == (2, "", "error: the loss is nan at step 3; lower the learning rate (9).\n")


@pytest.mark.parametrize(
    ("error", "size"),
    [
        pytest.param(
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 12000 bytes."
            ),
            " (an allocation of 12000 bytes)",
            id="torch on Linux",
        ),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
            " (an allocation of 7 bytes)",
            id="Windows",
        ),
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.72 GiB"),
            " (an allocation of 2.50 GiB)",
            id="CUDA",
        ),
        pytest.param(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "", id="cuBLAS"),
        pytest.param(MemoryError(), "", id="Python"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_options_that_help(monkeypatch, capsys, error, size):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("moeify.pipeline.sweep_checkpoint", fail)
    code, out, err = run(capsys, "sweep", "m", "--data", "d")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: out of memory{size}; try a smaller --batch-size or a smaller --window or a smaller --max-tokens")
    assert err.count("\n") == 1
    monkeypatch.setattr("moeify.doctor.doctor", fail)
    assert run(capsys, "doctor") == (2, "", f"error: out of memory{size}; free some, or use a machine with more.\n")


def test_out_of_memory_in_training_names_the_options_that_help_there(monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("moeify.pipeline.sparsify_checkpoint", fail)
    arguments = ["sparsify", "m", "--data", "d", "--out", "o", "--steps", "1"]
    less = "a smaller --micro-sequences or a smaller --window or a smaller --max-tokens"  # bfloat16 weights do not train well
    assert run(capsys, *arguments) == (2, "", f"error: out of memory; try {less} or --gradient-checkpointing.\n")
    assert run(capsys, *arguments, "--gradient-checkpointing") == (2, "", f"error: out of memory; try {less}.\n")
    monkeypatch.setattr("moeify.pipeline.read_recipe", fail)
    settings = ("train.micro_sequences=1", "train.gradient_checkpointing=true", "sweep.batch_size=1")
    less = " or ".join(f"--set {setting}" for setting in settings)
    assert run(capsys, "pipeline", "r.toml", "--out", "o") == (2, "", f"error: out of memory; try {less}.\n")


def test_another_runtime_error_is_not_taken_for_missing_memory(failing, capsys):
    failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    code, _, err = run(capsys, "doctor")
    assert code == 1
    assert "out of memory" not in err


def test_an_error_of_several_lines_is_printed_on_one(failing, capsys):
    failing(CheckpointError("one\n  two"))
    assert run(capsys, "doctor")[2] == "error: one two\n"


# -- real processes ------------------------------------------------------------------------------------------------------------------


def test_main_in_a_process_prints_only_the_result(converted):
    done = process("generate", converted, "The ", "--max-new-tokens", "2")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0
    assert re.fullmatch(r"2 tokens, .* active\n", err), "what it took, and nothing of the libraries'"
    assert out.startswith("The ")


def test_ctrl_c_in_a_process_exits_with_130_and_leaves_no_output(dense, tmp_path):
    arguments = ["convert", dense, "--out", tmp_path / "moe", "--router-width", "4", "--router-epochs", "2000", *SMALL]
    # A test run in the background of a shell ignores Ctrl-C, and so would what it starts.
    first = process(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 90
    while not (tmp_path / "moe.work").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("error: interrupted; the same command again continues")
    assert "Traceback" not in err
    assert not (tmp_path / "moe").exists()


def test_a_bug_in_a_process_is_one_line_with_exit_code_1():
    code = (
        "import moeify.doctor, moeify.cli\n"
        "moeify.doctor.doctor = lambda: {}['versions']\n"
        "moeify.cli.sys.argv = ['moeify', 'doctor']\n"
        "moeify.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "internal error: KeyError: 'versions'; run again with --debug for the traceback.\n"


def test_a_reader_that_closes_its_pipe_causes_no_message():
    command = f"{sys.executable} -c 'from moeify.cli import main; main()' doctor | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


# -- 80 columns ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def too_wide(text):
    """Lines beyond 80 columns that could have been broken: not those whose longest word alone is as wide."""
    assert "\x1b" not in text, "colour"
    return [line for line in text.splitlines() if len(line) > 80 and max(map(len, line.split())) < 70]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_readable_at_80_columns(narrow, capsys, command):
    code, out, _ = run(capsys, *([command] if command else []), "--help")
    assert code == 0
    assert too_wide(out) == []


def test_results_are_readable_at_80_columns_without_colour(narrow, converted, tmp_path, capsys):
    moe = tmp_path / "moe"
    shutil.copytree(converted, moe)
    for command in (
        ["preset", moe, "--at", "half=0.5", *SMALL],
        ["sweep", moe, "--values", "0.0,2.5", *SMALL],
        ["info", moe],
        ["profile", moe, *SMALL],
        ["doctor"],
        ["doctor", "--all"],
        ["generate", moe, "The ", "--max-new-tokens", "4"],
    ):
        code, out, err = run(capsys, *command)
        assert code == 0, err
        assert out
        assert too_wide(out + err) == [], command[0]


def test_version_is_one_line(capsys):
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"moeify (\d+\.\d+.*|, from a source tree that is not installed)\n", out)


def test_doctor_is_a_screenful_and_says_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    from moeify import doctor

    monkeypatch.setattr(doctor, "extras", lambda: {"onnx": ("onnxruntime-nowhere",), "report": ("jinja2",)})
    monkeypatch.setattr(doctor.kernels.cpu, "unavailable", lambda: "the compiled library is missing: install g++")
    monkeypatch.setattr(doctor, "_caches", lambda: {"hub": f"/somewhere{doctor._UNWRITABLE}"})
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) < 30
    missing = out.partition("Missing:")[2]
    assert "onnx, missing: onnxruntime-nowhere: pip install 'moeify[onnx]'" in missing
    assert "the compiled library is missing: install g++" in missing
    assert "/somewhere" in missing
    assert "moeify[report]" not in missing
    assert "1 token at 10%" in out
    assert len(run(capsys, "doctor", "--all")[1].splitlines()) > 60
