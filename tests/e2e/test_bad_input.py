"""Every bad input: one clear line on stderr, exit code 2, nothing half-written, nothing lost."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
import transformers

from moeify import cli
from moeify._progress import NO_PROGRESS
from moeify.hf import save

SMALL = ["--window", "32", "--max-tokens", "640"]
QUICK = ["--expert-size", "8", "--router", "centre", "--split", "contiguous"]
DATA = ["--data", "builtin:pydoc"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("moeify._terminal.make_progress", lambda: NO_PROGRESS)  # which a slow machine would print beside the error
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes; this one has read it already
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_input")
    tiny.save_dense_tiny(root / "dense")
    assert cli.run(["convert", str(root / "dense"), "--out", str(root / "moe"), *QUICK, *SMALL, *DATA]) == 0
    return root


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """A folder with fresh copies of a dense and a converted checkpoint, as working directory."""
    for name in ("dense", "moe"):
        shutil.copytree(originals / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(directory):
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.rglob("*") if p.is_file()}


def check(directory, capsys, arguments, message):
    before = snapshot(directory)
    check_line(capsys, arguments, message)
    assert snapshot(directory) == before


def check_line(capsys, arguments, message):
    code = cli.run(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for part in message if isinstance(message, tuple) else (message,):
        assert part in captured.err


def convert(*options, source="dense", out="out", data=DATA):
    return ["convert", source, "--out", out, *QUICK, *SMALL, *data, *options]


def thin(*options, method="teal", source="dense", out="out", data=DATA):
    return [
        "thin",
        source,
        "--out",
        out,
        "--method",
        method,
        *SMALL,
        *data,
        *([] if "--target" in options else ["--target", "0.5"]),
        *options,
    ]


def sweep(*options, data=DATA):
    return ["sweep", "moe", *SMALL, *data, *options]


# -- options -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(convert("--expert-sise", "4"), ("No such option", "--expert-size"), id="unknown option"),
        pytest.param(convert("--router", "nrom"), ("'nrom'", "did you mean 'norm'"), id="unknown router"),
        pytest.param(convert("--split", "kmean"), ("'kmean'", "did you mean 'kmeans'"), id="unknown split"),
        pytest.param(convert("--rule", "dynkmax"), ("'dynkmax'", "did you mean 'dynk_max'"), id="unknown rule"),
        pytest.param(
            convert("--router-width", "4"),
            ("--router centre", "'width' of CentreRouterConfig; there are none"),
            id="option of another router",
        ),
        pytest.param(convert("--dtype", "float8"), ("--dtype", "'float8'"), id="unknown dtype"),
        pytest.param(convert("--device", "gpu"), "--device must be cpu, cuda or cuda:N, got 'gpu'", id="unknown device"),
        pytest.param(convert("--device", "cuda:99"), "--device cuda:99: torch sees", id="device that is not there"),
        pytest.param(convert("--router", "norm", "--router-output", "log"), ("output", "'exp', 'abs'"), id="unknown router output"),
        pytest.param(convert("--always-on", "-1"), "always_on must be at least 0", id="always-on below 0"),
        pytest.param(sweep("--dtype", "float8"), ("--dtype", "'float8'"), id="sweep: unknown dtype"),
        pytest.param(["generate", "moe", "a", "--device", "gpu"], "--device must be", id="generate: unknown device"),
        pytest.param(["profile", "dense", *DATA, "--device", "cuda:99"], "--device cuda:99", id="profile: device that is not there"),
        pytest.param(convert("--scope", "glob"), ("scope", "'layer', 'global'"), id="unknown scope"),
        pytest.param(convert("--expert-size", "0"), "expert_size must be at least 1", id="expert size 0"),
        pytest.param(
            convert("--expert-size", "49"), ("expert_size 49", "48 neurons", "choose at most 48"), id="d_ff smaller than an expert"
        ),
        pytest.param(convert("--target-active", "0"), "target_active must be in (0, 1], got 0", id="target 0"),
        pytest.param(convert("--target-active", "1.5"), "target_active must be in (0, 1], got 1.5", id="target above 1"),
        pytest.param(
            convert("--policy", '{"model.layers.9.mlp": null}'),
            ("'model.layers.9.mlp' matches no FFN", "did you mean"),
            id="policy of no FFN",
        ),
        pytest.param(
            convert("--policy", '{"re:.*": {"expert_sise": 4}}'),
            ("expert_sise", "did you mean 'expert_size'"),
            id="policy with unknown option",
        ),
        pytest.param(convert("--policy", '{"re:.*": null}'), "leaves no FFN to convert", id="policy that leaves nothing"),
        pytest.param(convert("--policy", "nothing.json"), ("--policy must be a JSON object", "nothing.json"), id="policy file missing"),
        pytest.param(convert("--policy", "[1]"), "--policy must be a JSON object", id="policy a list"),
        pytest.param(thin(method="chees"), ("--method", "'chees'", "did you mean 'chess'"), id="thin: unknown method"),
        pytest.param(thin("--target", "1"), "(--target) must be in [0, 1), got 1", id="thin: everything"),
        pytest.param(thin("--target", "nan", method="cats"), "(--target) must be in [0, 1), got nan", id="thin: target nan"),
        pytest.param(thin("--allocate", "gready"), ("allocate", "did you mean 'greedy'"), id="thin: unknown allocation"),
        pytest.param(thin("--roles", "ffn"), ("roles", "'ffn_hidden'", "got 'ffn'"), id="thin: unknown role"),
        pytest.param(thin("--roles", "ffn_in", method="cats"), "leave out --roles, which is for channels", id="thin: roles of neurons"),
        pytest.param(sweep("--rule", "top_k"), ("'top_k'", "did you mean 'topk'"), id="sweep: unknown rule"),
        pytest.param(sweep("--values", "0.1;0.2"), "--values must be numbers separated by commas", id="sweep: values no numbers"),
        pytest.param(sweep("--values=-1"), ("Threshold.theta", "at least 0, got -1"), id="sweep: value out of range"),
        pytest.param(sweep("--rule", "topk", "--values", "1.5"), "TopK.k must be int, got 1.5", id="sweep: half an expert"),
        pytest.param(["generate", "moe", ""], "the prompt is empty", id="generate: empty prompt"),
        pytest.param(["generate", "moe", "a", "--temperature", "-1"], "temperature must be at least 0", id="generate: temperature below 0"),
        pytest.param(["generate", "moe", "a", "--temperature", "nan"], "temperature must be at least 0", id="generate: temperature nan"),
        pytest.param(["generate", "moe", "a", "--draft", "fsat"], "'fsat'", id="generate: unknown preset"),
        pytest.param(
            ["generate", "moe", "a", "--draft", "treshold=1"], ("--draft", "did you mean 'threshold'"), id="generate: unknown rule"
        ),
        pytest.param(["generate", "moe", "a", "--draft", "threshold=x"], "'x' is no number", id="generate: knob no number"),
        pytest.param(
            ["generate", "moe", "a", "--draft", "0.33"], ("--draft: no rules are stored", "0.3, 0.35"), id="generate: draft not stored"
        ),
        pytest.param(
            ["generate", "moe", "a", "--draft", "0.3", "--draft-tokens", "0"], "draft_tokens must be at least 1", id="generate: no draft"
        ),
        pytest.param(["generate", "moe", "a", "--draft-tokens", "3"], "name it with --draft", id="generate: tokens of no draft"),
        pytest.param(["generate", "dense", "a", "--draft", "threshold=1"], "is dense", id="generate: draft of a dense model"),
        pytest.param(["profile", "dense", *DATA, "--eps", "-1"], "eps must be finite and >= 0, got -1", id="profile: eps below 0"),
    ],
)
def test_bad_option_is_one_line(here, capsys, arguments, message):
    check(here, capsys, arguments, message)


# -- data ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        pytest.param(b"", [], "'data.txt'", id="empty"),
        pytest.param(b"\n \n\n", [], ("'data.txt'", "no text"), id="blank"),
        pytest.param(b"\x00\x01\x02\xff\xfe" * 100, [], ("'data.txt'", "binary"), id="binary"),
        pytest.param(b"too short", [], ("data.txt", "32"), id="shorter than one window"),
        pytest.param(None, [], "data.txt", id="missing"),
        pytest.param(b"text " * 100, ["--window", "1"], "window must be at least 2", id="window of 1"),
        pytest.param(b"text " * 100, ["--max-tokens", "0"], "max_tokens must be at least 1", id="no tokens"),
        pytest.param(b"text " * 100, ["--max-tokens", "5"], ("max_tokens", "5", "32"), id="less tokens than a window"),
        pytest.param(b"text " * 100, ["--data-split", "tset"], ("tset", "validation"), id="unknown split"),
    ],
)
@pytest.mark.parametrize("command", [convert, sweep, thin])
def test_bad_text_file_is_one_line(here, capsys, command, content, options, message):
    if content is not None:
        (here / "data.txt").write_bytes(content)
    check(here, capsys, command(*options, data=["--data", "data.txt"]), message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("data.jsonl", b'{"txt": "a"}\n', ("'text'", "txt"), id="no such column"),
        pytest.param("data.jsonl", b'{"text": "a"\n', "data.jsonl", id="not JSON"),
        pytest.param("data.parquet", b"PAR1 no parquet", "data.parquet", id="not parquet"),
        pytest.param("data.png", b"\x89PNG", "data.png", id="an image for a text model"),
    ],
)
def test_bad_table_is_one_line(here, capsys, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (here / name).write_bytes(content)
    check(here, capsys, convert(data=["--data", name]), message)


def test_unknown_builtin_corpus_is_one_line(here, capsys):
    check(here, capsys, convert(data=["--data", "builtin:pydocs"]), ("builtin:pydocs", "builtin:pydoc"))


# -- models --------------------------------------------------------------------------------------------------------------------------


def _truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _foreign(directory):
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04 a zip file")


def _nan(directory):
    tiny.edit_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))


def _other_model(directory):
    tiny.edit_tensors(directory, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def _pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _unknown_family(directory):
    tiny.edit_config(directory, lambda config: config.update(model_type="lama"))


def _no_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _wrong_type(directory):
    tiny.edit_config(directory, lambda config: config.update(hidden_size="x"))


def _empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def _native_moe(directory):
    shutil.rmtree(directory)
    config = transformers.MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(directory)
    tiny.byte_tokenizer().save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_truncate, ("model.safetensors", "truncated"), id="truncated"),
        pytest.param(_foreign, ("model.safetensors", "not a safetensors file"), id="foreign file"),
        pytest.param(_nan, ("'model.layers.1.mlp.up_proj.weight'", "NaN"), id="NaN"),
        pytest.param(_other_model, ("lacks 1 tensors", "'model.layers.0.mlp.up_proj.weight'"), id="tensors of another model"),
        pytest.param(_pickle, ("pickled", "safetensors"), id="pickle only"),
        pytest.param(_unknown_family, ("'lama'", "did you mean"), id="unknown family"),
        pytest.param(_no_tokenizer, "without a tokenizer", id="no tokenizer"),
        pytest.param(_empty, "no config.json", id="empty folder"),
        pytest.param(_wrong_type, ("config.json", "hidden_size"), id="config of another type"),
        pytest.param(_native_moe, ("MixtralForCausalLM", "native MoE"), id="zero sites"),
    ],
)
def test_bad_model_is_one_line(here, capsys, damage, message):
    damage(here / "dense")
    check(here, capsys, convert(), message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("./nowhere", ("'./nowhere' does not exist", "Hub id"), id="path"),
        pytest.param("nobody/nothing", ("'nobody/nothing'", "Hub", "network"), id="Hub id that cannot be fetched"),
        pytest.param("dense/config.json", "is a file; give the folder", id="a file"),
        pytest.param("moe", "'moe' is converted already; give the dense checkpoint", id="converted already"),
    ],
)
def test_bad_source_is_one_line(here, capsys, source, message):
    check(here, capsys, convert(source=source), message)


# -- training --------------------------------------------------------------------------------------------------------------------------


def sparsify(*options, source="dense", data=DATA, steps="2"):
    small = ["--window", "16", "--max-tokens", "6400", "--validation-tokens", "160"]
    return ["sparsify", source, "--out", "out", "--steps", steps, *small, *data, *options]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(sparsify(steps="0"), "steps must be at least 1, got 0", id="no step"),
        pytest.param(sparsify("--loss", "hoier"), ("'hoier'", "did you mean 'hoyer'"), id="unknown penalty"),
        pytest.param(sparsify("--activation", "gelu"), ("'relu', 'relu2', 'keep'", "'gelu'"), id="unknown activation"),
        pytest.param(sparsify("--weight", "-1"), "weight must be finite and >= 0", id="weight below 0"),
        pytest.param(sparsify("--lr", "nan"), "lr must be finite", id="lr nan"),
        pytest.param(
            sparsify("--batch-tokens", "64", "--batch-sequences", "4"), "--batch-tokens or --batch-sequences, not both", id="two batches"
        ),
        pytest.param(sparsify("--batch-tokens", "15"), "--batch-tokens 15 is less than one window of 16", id="batch below a window"),
        pytest.param(sparsify("--distill-temperature", "2"), "need --distill", id="distillation options alone"),
        pytest.param(sparsify("--task", "masked_lm"), ("--task", "did you mean 'masked-lm'"), id="unknown task"),
        pytest.param(sparsify("--crop", "2"), "vary images; LlamaForCausalLM reads text", id="crop of text"),
        pytest.param(sparsify("--layer-weights", '{"model.layers.7": 0}'), ("model.layers.7", "matches no"), id="weights of no layer"),
        pytest.param(sparsify("--activation-policy", '{"mlp": null}'), ("policy 'mlp'", "matches no"), id="activation of no layer"),
        pytest.param(sparsify("--layer-weights", "0.5"), "--layer-weights must be a JSON object", id="weights no object"),
        pytest.param(sparsify("--device", "cuda:99"), "--device cuda:99: torch sees", id="device that is not there"),
        pytest.param(sparsify("--validation", "./other"), "no such file or folder: './other'", id="validation not there"),
        pytest.param(sparsify("--validation-split", "test"), "has no split 'test'", id="validation split not there"),
        pytest.param(sparsify("--window", "256"), "--window 256 is more than the 128 positions", id="window too long"),
        pytest.param(sparsify("--max-tokens", "9"), "max_tokens 9 is less than one window of 16", id="less data than a window"),
        pytest.param(sparsify(source="moe"), "'moe' is converted already; give the dense checkpoint", id="converted already"),
    ],
)
def test_bad_training_option_is_one_line(here, capsys, arguments, message):
    check(here, capsys, arguments, message)


def test_a_penalty_on_activations_without_zeros_is_one_line(here, capsys):
    tiny.edit_config(here / "dense", lambda config: config.update(hidden_act="silu"))
    options = ["--activation", "keep", "--loss", "l1", "--on", "activations"]
    check(here, capsys, sparsify(*options), ("the activation silu, which is never zero", "change the activation to relu first"))


ROWS = [{"text": "good", "label": "LABEL_1"}, {"text": "bad", "label": "LABEL_0"}] * 30


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        pytest.param([{"text": "a", "emotion": 1}] * 60, [], ("no column 'label'", "'text', 'emotion'"), id="label column missing"),
        pytest.param(
            [{**r, "label": "joy"} for r in ROWS], [], ("'rows.jsonl': label 'joy' is not a class", "LABEL_0"), id="unknown class"
        ),
        pytest.param([{**r, "label": 2} for r in ROWS], [], "label 2 is not a class of the model's head, whose 2 are 0 to 1", id="number"),
        pytest.param([{**r, "label": None} for r in ROWS], [], "label None is neither an integer nor a string", id="no label"),
        pytest.param(ROWS, ["--batch-tokens", "64"], "give --batch-sequences for sequence-classification", id="tokens of texts"),
        pytest.param(ROWS, ["--task", "image-classification"], "no head for image-classification in the family 'bert'", id="other task"),
        pytest.param(ROWS, ["--task", "masked-lm"], "has no mask token", id="no mask token"),
    ],
)
def test_bad_labelled_data_is_one_line(here, capsys, rows, options, message):
    shutil.rmtree(here / "dense")
    config = transformers.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    transformers.BertForSequenceClassification(config).save_pretrained(here / "dense")
    tiny.byte_tokenizer().save_pretrained(here / "dense")
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(here, capsys, sparsify(*options, data=["--data", "rows.jsonl"]), message)


def test_a_model_without_a_head_is_one_line(here, capsys):
    model = transformers.AutoModel.from_pretrained(here / "dense")
    shutil.rmtree(here / "dense")
    model.save_pretrained(here / "dense")
    tiny.byte_tokenizer().save_pretrained(here / "dense")
    check(here, capsys, sparsify(), ("LlamaModel has no head for a known task", "--task causal-lm, masked-lm"))


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_last_good_state(here, capsys, recwarn):
    code = cli.run(sparsify("--lr", "1e20", "--clip", "0", "--save-every", "1", steps="20"))
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: the ")
    assert err.count("\n") == 1
    assert "out.work/train" in err
    assert list((here / "out.work" / "train").glob("step-*"))
    assert not (here / "out").exists()


def test_the_state_of_another_run_is_one_line(here, capsys):
    assert cli.run(sparsify("--lr", "1e20", "--clip", "0", steps="20")) == 2
    capsys.readouterr()
    check(here, capsys, sparsify(), ("'out.work' is the state of another run", "train.lr was 1e+20, is 0.0001", "--overwrite"))
    check(here, capsys, convert(), ("'out.work' is the state of a training run, which is not deleted", "another --out"))
    assert cli.run(sparsify("--overwrite")) == 0
    assert not (here / "out.work").exists()


def test_the_state_of_a_conversion_is_not_taken_for_one_of_training(here, capsys, monkeypatch):
    monkeypatch.setattr("moeify.pipeline.convert.apply_site", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.run(convert()) == 130
    capsys.readouterr()
    check(here, capsys, sparsify(), ("'out.work' is the state of a conversion", "--overwrite deletes it"))


# -- converted checkpoints -----------------------------------------------------------------------------------------------------------


def _drop_routers(directory):
    tiny.edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.moe.router" in name])


def _newer_config(directory):
    tiny.edit_config(directory, lambda config: config["quantization_config"].update(schema=99))


def _newer_record(directory):
    record = json.loads((directory / "moeify.json").read_text())
    (directory / "moeify.json").write_text(json.dumps(record | {"schema": 99}))


def _no_record(directory):
    (directory / "moeify.json").unlink()


def _broken_record(directory):
    (directory / "moeify.json").write_text("{")


def _unknown_key(directory):
    tiny.edit_config(directory, lambda config: config["quantization_config"]["sites"][0].update(num_expert=3))


def _change_record(directory, change):
    record = json.loads((directory / "moeify.json").read_text())
    change(record["calibration"])
    (directory / "moeify.json").write_text(json.dumps(record))


def _short_knobs(directory):
    _change_record(directory, lambda record: record["knobs"]["threshold"]["model.layers.1.mlp"].pop())


def _other_knobs(directory):
    _change_record(directory, lambda record: record["knobs"]["threshold"].pop("model.layers.1.mlp"))


def _no_knobs(directory):
    _change_record(directory, lambda record: record["knobs"].update(threshold={}))


def _list_of_knobs(directory):
    _change_record(directory, lambda record: record.update(knobs=[1]))


def _two_rules(directory):
    rule = {"name": "topk", "k": 2}
    tiny.edit_config(directory, lambda config: config["quantization_config"]["sites"][1].update(rule=rule))


def test_report_of_scores_that_are_a_list_is_one_line(here, capsys):
    _change_record(here / "moe", lambda record: record.update(router_scores=[1, 2]))
    check(here, capsys, ["report", "moe"], ("moeify.json", "router_scores must be an object", "convert the model again"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            _short_knobs, ("knobs['threshold']['model.layers.1.mlp'] has 18 values for 19 targets", "convert"), id="knobs missing"
        ),
        pytest.param(_other_knobs, ("no knobs of the rule 'threshold'", "convert it again"), id="knobs of another model"),
        pytest.param(_no_knobs, ("no knobs of the rule 'threshold'", "convert it again"), id="no knobs"),
        pytest.param(_list_of_knobs, ("knobs must be an object, got [1]", "convert the model again"), id="knobs a list"),
        pytest.param(_two_rules, ("rules of different kinds ('threshold', 'topk')", "set_rule"), id="two kinds of rules"),
        pytest.param(_drop_routers, ("router tensors", "'model.layers.1.mlp.moe.router"), id="router tensors missing"),
        pytest.param(_newer_config, ("schema 99 is newer", "upgrade moeify"), id="newer schema in config.json"),
        pytest.param(_newer_record, ("schema 99 is newer", "upgrade moeify"), id="newer schema in moeify.json"),
        pytest.param(_no_record, ("no moeify.json", "moeify convert"), id="not a conversion"),
        pytest.param(_broken_record, "moeify.json", id="moeify.json not JSON"),
        pytest.param(_unknown_key, ("num_expert", "did you mean 'num_experts'"), id="unknown key"),
        pytest.param(_truncate, "truncated", id="truncated"),
    ],
)
def test_bad_converted_checkpoint_is_one_line(here, capsys, damage, message):
    damage(here / "moe")
    check(here, capsys, sweep("--out", "curve.json"), message)


# -- output --------------------------------------------------------------------------------------------------------------------------


def _folder(here):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years of work")


def _earlier(here):
    shutil.copytree(here / "moe", here / "out")


def _file(here):
    (here / "out").write_text("a file")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        pytest.param(_folder, [], "exists and is not empty", id="folder"),
        pytest.param(_folder, ["--overwrite"], "not an earlier conversion", id="folder, overwrite"),
        pytest.param(_earlier, [], "--overwrite replaces it", id="earlier conversion"),
        pytest.param(_file, [], "is a file", id="file"),
    ],
)
def test_output_that_exists_is_one_line(here, capsys, prepare, options, message):
    prepare(here)
    check(here, capsys, convert(*options), message)


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model takes minutes: what can be checked before is."""

    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("moeify.pipeline.measure.load_model", fail)
    monkeypatch.setattr("moeify.pipeline.convert.load_model", fail)
    monkeypatch.setattr("moeify.pipeline.tasks.load_model", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(sweep("--out", "nowhere/curve.json"), ("'nowhere' is not a folder", "nowhere/curve.json"), id="sweep: no such folder"),
        pytest.param(sweep("--out", "dense/config.json/c.json"), "'dense/config.json'", id="sweep: a file as folder"),
        pytest.param(sweep("--out", "moe"), "cannot read 'moe': Is a directory", id="sweep: a folder as file"),
        pytest.param(sweep(data=["--data", "text.tx"]), "text.tx", id="sweep: no such data"),
        pytest.param(sweep(data=["--data", "moe/config.json"]), "unknown extension", id="sweep: data of no known kind"),
        pytest.param(convert(data=["--data", "./texts"]), "no such file or folder: './texts'", id="convert: no such data"),
        pytest.param(convert(data=["--data", "rows.jsonl", "--column", "txt"]), "no column 'txt'", id="convert: no such column"),
        pytest.param(
            convert(out="rows.jsonl/out"),
            ("rows.jsonl' is not a folder", "choose another --out"),
            id="convert: a file as folder",
        ),
        pytest.param(["profile", "dense", "--data", "./texts"], "no such file or folder: './texts'", id="profile: no such data"),
        pytest.param(sparsify(data=["--data", "./texts"]), "no such file or folder: './texts'", id="sparsify: no such data"),
        pytest.param(sparsify("--task", "masked"), "did you mean 'masked-lm'", id="sparsify: unknown task"),
    ],
)
def test_what_can_be_checked_without_the_model_is(here, capsys, arguments, message):
    (here / "rows.jsonl").write_text('{"text": "a"}\n')
    check(here, capsys, arguments, message)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no such file system")
def test_output_where_nothing_can_be_written_whoever_asks_names_the_way_out(here, capsys):
    check(
        here, capsys, convert(out="/proc/xx/o"), ("'/proc' is not a folder that can be written", "choose another --out than '/proc/xx/o'")
    )


@pytest.mark.usefixtures("no_loading")
@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device")
def test_data_that_is_a_device_is_one_line(here, capsys):
    check(here, capsys, convert(data=["--data", "/dev/null"]), "'/dev/null' is neither a file nor a folder")


def test_sweep_onto_a_file_that_is_no_curve_is_one_line(here, capsys):
    (here / "notes.json").write_text("[]")
    check(here, capsys, sweep("--values", "0.5", "--out", "notes.json"), "notes.json")


def test_report_of_a_file_that_is_no_curve_is_one_line(here, capsys):
    check(here, capsys, ["report", "moe", "--curve", "moe/config.json"], ("moe/config.json", "moeify sweep"))


HOSTILE = "<script>hacked=1</script><b>| a ` b [c](http://x.y) **d**\n# e\n\x1b[31m"


def _hostile_curve(path, **fields):
    """A curve that nobody can refuse, with names that its writer chose."""
    shares = {"active_fraction": 0.5, "ffn_flops_fraction": 0.6, "flops_fraction": 0.7, "latency_fraction": 0.9, "machine": HOSTILE}
    point = {"rule": HOSTILE, "value": 0.5, **shares, "quality": 9.0, "quality_ratio": 1.1, "kl": None}
    broken = {**point, "value": 0.2, "flops_fraction": 0.6, "quality": math.inf, "quality_ratio": math.inf, "kl": math.nan}
    points = [point, broken, {**point, "rule": "$\\frac$", "quality": -1e300, "flops_fraction": 1e308}]
    curve = {"schema": 1, "model": f"../{HOSTILE}", "metric": "perplexity", "dense": {"quality": 8.0, "flops_per_token": 1e6}}
    extra = {"data": HOSTILE, "split": [HOSTILE], "seed": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "fingerprint": []}
    curve |= {"points": points, "calibrated": {"rule": HOSTILE, "value": 0.5}, **extra, HOSTILE: HOSTILE, **fields}
    path.write_text(json.dumps(curve))


def test_report_of_a_hostile_curve_shows_every_name_as_text(here, capsys):
    pytest.importorskip("matplotlib")
    (here / "moe").rename(here / "<b>|`x`")
    _hostile_curve(here / "mine.json")
    _hostile_curve(here / "other.json")
    code = cli.run(["report", "<b>|`x`", "--curve", "mine.json", "--compare", "<i>=other.json", "--out", "page"])
    assert (code, capsys.readouterr().err) == (0, "")
    page = (here / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "hacked=1&lt;/script&gt;" in page
    assert not re.search(r"<(b|i)>[|<]", page)
    text = (here / "page" / "report.md").read_text(encoding="utf-8")
    plain = re.sub(r"\\.", "", text)  # what is left is markup
    assert not re.search("<(?!= )|>", plain)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", plain, flags=re.MULTILINE)]
    assert len(tables) >= 3
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1, rows[0]
    headings = [line for line in plain.splitlines() if line.startswith("#")]
    assert headings == ["# bx", "## Methods at equal cost", "## Routers"]


def test_report_without_a_curve_is_one_line(here, capsys):
    check(here, capsys, ["report", "moe"], ("moe/curve.json", "moeify sweep"))


def test_report_of_a_file_is_one_line(here, capsys):
    check(here, capsys, ["report", "moe/config.json"], ("moe/config.json", "moeify convert"))


def test_disk_full_while_saving_is_one_line_and_the_same_command_continues(here, capsys, monkeypatch):
    """The earlier conversion at the output stays; what was fitted stays in the work folder, so that the second run only saves."""
    _earlier(here)
    before = snapshot(here)
    write = save._save

    def full(model, processor, directory):
        write(model, processor, directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, "_save", full)
    assert cli.run(convert("--overwrite")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write")
    assert "the disk is full" in err
    assert err.count("\n") == 1
    assert {k: v for k, v in snapshot(here).items() if not k.startswith("out.work")} == before
    monkeypatch.setattr(save, "_save", write)
    assert cli.run(convert("--overwrite")) == 0
    assert sorted(p.name for p in here.iterdir()) == ["dense", "moe", "out"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # every larger file fails as on a full disk, also in the libraries' native code
from moeify.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_file_that_cannot_grow_while_saving_is_one_line_in_a_process(here):
    before = snapshot(here)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *convert("--max-tokens", "320")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.endswith((" s", " s left"))]  # without progress
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: cannot write")
    assert {k: v for k, v in snapshot(here).items() if not k.startswith("out.work")} == before
    assert not (here / "out").exists()
    assert not (here / "out.partial").exists()


def test_model_of_a_bad_dtype_range_is_one_line(here, capsys):
    """Weights that overflow in float16 are found at loading, not as NaN perplexity at the end."""
    tiny.edit_tensors(here / "dense", lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    assert torch.tensor(1e6, dtype=torch.float16).isinf()
    check(here, capsys, convert("--dtype", "float16"), ("'model.norm.weight'", "infinite"))


# -- thin ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["teal", "sensitivity", "cats", "predictor"])
def test_a_layer_where_calibration_saw_only_zeros_is_one_line(here, capsys, method):
    tiny.edit_tensors(here / "dense", lambda tensors: tiny.silence_ffn(tensors, 1))
    before = snapshot(here)
    check_line(capsys, thin(method=method), ("'model.layers.1.mlp", "calibration saw"))
    shutil.rmtree(here / "out.work", ignore_errors=True)  # of neurons: what was fitted already, for the same command
    assert snapshot(here) == before


@pytest.mark.parametrize("method", ["cats", "chess"])
def test_a_gate_method_for_ffns_without_a_gate_is_one_line(here, capsys, method):
    config = transformers.GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_head=2, n_layer=1, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    tiny.byte_tokenizer().save_pretrained(here / "gpt2")
    check(here, capsys, thin(method=method, source="gpt2"), ("'transformer.h.0.mlp' has no gate", "'lowrank' (predictor)"))


@pytest.mark.parametrize("method", ["teal", "chess", "predictor"])
def test_thresholds_of_other_weights_are_one_line(here, capsys, method):
    assert cli.run(thin(method=method)) == 0
    capsys.readouterr()
    tiny.edit_tensors(here / "out", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.1))
    for arguments in (["generate", "out", "a"], ["sweep", "out", *SMALL, *DATA]):
        check(here, capsys, arguments, ("'model.layers.1.mlp", "were calibrated for other weights", "calibrate this model itself"))


@pytest.mark.parametrize("command", [convert, thin])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("dense", "'dense' is the source, which is never written to"),
        ("dense/new/thin", "'dense/new/thin' lies in the source 'dense', which is never written to"),
        (".", "'.' holds the source 'dense', which is never replaced"),
    ],
)
def test_an_output_within_or_around_the_source_is_one_line(here, capsys, command, out, message):
    check(here, capsys, command("--overwrite", out=out), (message, "choose another --out"))
