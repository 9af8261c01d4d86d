"""Convert, sweep, reload, kill and resume: whole runs on a tiny byte-level language model."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import write_words
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_dense_tiny, tiny_inputs
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from moeify import cli, demo
from moeify._config import to_dict
from moeify.controls import record_active, set_mode, set_rule
from moeify.convert import ConvertConfig, to_dense
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError
from moeify.evaluate import Curve, CurvePoint, perplexity
from moeify.hf.load import load_model
from moeify.layers import moe_layers
from moeify.manifest import Manifest
from moeify.pipeline import TARGETS, CalibrationConfig, convert_checkpoint, measure, profile_checkpoint, sweep_checkpoint
from moeify.pipeline import convert as conversion
from moeify.routers import GateRouterConfig, LowRankRouterConfig, NormRouterConfig
from moeify.select import DynKMax, Threshold, TopK
from moeify.train.fit import RouterTrainConfig

WINDOW, TOKENS = 64, 9_000  # three batches of calibration data
TRAIN = RouterTrainConfig(epochs=1)
CONFIG = ConvertConfig(expert_size=7, router=NormRouterConfig(width=8), rule=DynKMax(tau=0.0))
CALIBRATION = CalibrationConfig(target_active=0.4, max_tokens=TOKENS, window=WINDOW, router=TRAIN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint, text, and one finished conversion."""
    root = tmp_path_factory.mktemp("pipeline")
    save_dense_tiny(root / "dense")
    rng = random.Random(0)
    write_words(root / "text.txt", 400, rng=rng)
    record = convert(root, "moe")
    (root / "record.json").write_text(json.dumps(record))
    return root


def convert(root, name, *, config=CONFIG, calibration=CALIBRATION, **options):
    data = DataConfig(data=str(root / "text.txt"))
    return convert_checkpoint(str(root / "dense"), root / name, data=data, config=config, calibration=calibration, **options)


def sweep(root, **options):
    data = DataConfig(data=str(root / "text.txt"), window=WINDOW, max_tokens=4 * WINDOW)
    return sweep_checkpoint(root / options.pop("name", "moe"), data=data, batch_size=4, **options)


def hashes(directory):
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.rglob("*")) if p.is_file()}


# -- convert -------------------------------------------------------------------------------------------------------------------------


def test_convert_writes_the_files_that_others_read(folder):
    moe = folder / "moe"
    files = {path.name for path in moe.iterdir()}
    assert {"config.json", "model.safetensors", "moeify.json", "README.md", "tokenizer.json"} <= files
    assert not (folder / "moe.work").exists()
    assert not [p for p in folder.iterdir() if "partial" in p.name]

    stored = json.loads((moe / "moeify.json").read_text())
    calibration = stored.pop("calibration")
    assert Manifest.from_dict(stored).schema == 1
    assert calibration == json.loads((folder / "record.json").read_text())
    assert calibration["rule"] == "dynk_max"
    assert calibration["knob"] == "tau"
    assert 0 < calibration["value"] < 1
    assert calibration["active_fraction"] == pytest.approx(0.4, abs=0.005)
    assert calibration["target_active"] == 0.4
    assert set(calibration["router_scores"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    for scores in calibration["router_scores"].values():
        assert set(scores) == {f"{kind}@{frac}" for kind in ("captured", "oracle") for frac in (0.1, 0.25, 0.5, 0.75)}
        assert all(0 <= scores[f"captured@{f}"] <= scores[f"oracle@{f}"] + 1e-6 <= 1 + 2e-6 for f in (0.1, 0.25, 0.5, 0.75))
    assert calibration["tokens"] == (TOKENS // WINDOW - 2) * WINDOW  # two windows of 140 measure the result
    assert {"source", "data", "seed", "versions"} <= set(calibration)

    card = (moe / "README.md").read_text()
    assert f"{calibration['active_fraction']:.4g}" in card


def test_convert_measures_what_it_made_on_windows_that_it_did_not_fit(folder):
    calibration = json.loads((folder / "record.json").read_text())
    measured = calibration["measured"]
    model, tokenizer = load_model(folder / "moe")
    ids = torch.tensor(tokenizer((folder / "text.txt").read_text()).input_ids[: TOKENS // WINDOW * WINDOW]).view(-1, WINDOW)
    held_out = ids[[len(ids) // 2 - 1, len(ids) - 1]]
    assert measured["quality"] == pytest.approx(perplexity(model, held_out), rel=1e-5)
    set_mode(model, "dense")
    assert measured["dense_quality"] == pytest.approx(perplexity(model, held_out), rel=1e-5)
    assert measured["sequences"] * WINDOW + calibration["tokens"] == ids.numel()
    assert measured["active_fraction"] == pytest.approx(0.4, abs=0.1)
    card = (folder / "moe/README.md").read_text()
    assert f"| held-out perplexity | {measured['quality']:.4g} (dense {measured['dense_quality']:.4g}" in card
    assert "| MFLOPs per token, experts |" in card


def test_convert_puts_the_calibrated_rules_in_the_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    calibration = json.loads((folder / "record.json").read_text())
    layers = moe_layers(model)
    values = [layer.rule.value for layer in layers.values()]
    assert all(isinstance(layer.rule, DynKMax) for layer in layers.values())
    assert sum(values) / len(values) == pytest.approx(calibration["value"])
    column = calibration["targets"].index(0.4)
    assert values == [calibration["knobs"]["dynk_max"][name][column] for name in layers]
    assert {p.dtype for layer in layers.values() for p in layer.router.parameters()} == {torch.float32}


def test_converted_model_runs_the_calibrated_fraction_and_equals_the_dense_one_in_dense_mode(folder):
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    text = (folder / "text.txt").read_bytes()[:512]
    with torch.no_grad(), record_active(model) as stats:
        model(input_ids=torch.tensor(list(text)).view(8, 64))
        assert 0.2 < stats.active_fraction() < 0.6
        set_mode(model, "dense")
        torch.testing.assert_close(model(**tiny_inputs()).logits, dense(**tiny_inputs()).logits, rtol=1e-4, atol=1e-5)
        to_dense(model)
        torch.testing.assert_close(model(**tiny_inputs()).logits, dense(**tiny_inputs()).logits, rtol=1e-4, atol=1e-5)


def test_convert_onto_an_existing_folder_needs_overwrite_and_gives_the_same_again(folder):
    convert(folder, "again")
    before = hashes(folder / "again")
    with pytest.raises(CheckpointError, match="exists and is not empty; --overwrite replaces it"):
        convert(folder, "again")
    assert hashes(folder / "again") == before
    convert(folder, "again", overwrite=True)
    assert hashes(folder / "again") == before
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "moe/model.safetensors").read_bytes()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", [TopK(k=7), DynKMax(tau=0.0)], ids=lambda r: r.name)
def test_convert_meets_the_target_with_every_scope(folder, tmp_path, rule, scope):
    calibration = replace(CALIBRATION, target_active=4 / 7, scope=scope, max_tokens=2_000)
    data = DataConfig(data=str(folder / "text.txt"))
    record = convert_checkpoint(
        str(folder / "dense"), tmp_path / "moe", data=data, config=replace(CONFIG, rule=rule), calibration=calibration
    )
    assert record["rule"] == rule.name
    assert record["active_fraction"] == pytest.approx(4 / 7, abs=0.01)


def test_convert_refuses_a_rule_of_one_layers_own_before_any_work(folder, tmp_path):
    config = replace(CONFIG, policy={"model.layers.1.mlp": {"rule": {"name": "topk", "k": 2}}})
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp': one rule is calibrated for all layers"):
        convert_checkpoint(
            str(folder / "dense"), tmp_path / "moe", data=DataConfig(data=str(folder / "text.txt")), config=config, calibration=CALIBRATION
        )
    assert list(tmp_path.iterdir()) == []


def test_convert_by_policy_leaves_the_named_ffn_dense(folder, tmp_path):
    config = replace(CONFIG, policy={"model.layers.0.mlp": None})
    calibration = replace(CALIBRATION, max_tokens=2_000)
    data = DataConfig(data=str(folder / "text.txt"))
    convert_checkpoint(str(folder / "dense"), tmp_path / "moe", data=data, config=config, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert list(moe_layers(model)) == ["model.layers.1.mlp"]


@pytest.mark.parametrize("router", [GateRouterConfig(), GateRouterConfig(scale="none"), LowRankRouterConfig(rank=24)], ids=repr)
def test_experts_of_one_neuron_with_routers_that_are_not_trained_meet_the_target_on_held_out_text(folder, router):
    config = ConvertConfig(expert_size=1, router=router, rule=Threshold(theta=0.0))
    name = f"of_one_{router.name}_{router!r}"
    record, out = convert(folder, name, config=config), folder / name
    assert record["measured"]["active_fraction"] == pytest.approx(0.4, abs=0.03)
    for scores in record["router_scores"].values():
        assert 0.6 < scores["captured@0.5"] <= scores["oracle@0.5"] + 1e-6
    dense, thin = load_file(folder / "dense" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(thin[name], tensor) for name, tensor in dense.items())  # experts of one neuron keep the neurons' own order
    curve = sweep(folder, name=name, rule="threshold", values=[0.0])
    assert curve.points[0].quality_ratio == pytest.approx(1, abs=1e-4)


def test_convert_and_sweep_of_an_encoder_decoder_measure_how_it_continues_text(folder, tmp_path):
    sizes = {"vocab_size": 257, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    data = DataConfig(data=str(folder / "text.txt"), window=WINDOW, max_tokens=2_000)
    calibration = replace(CALIBRATION, max_tokens=2_000)
    record = convert_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", data=data, config=CONFIG, calibration=calibration)
    assert set(record["router_scores"]) == {"encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"}
    assert record["measured"]["metric"] == "perplexity"
    assert 1 < record["measured"]["dense_quality"] < 1e4
    curve = sweep_checkpoint(tmp_path / "moe", data=data, values=[0.0], batch_size=4)
    assert curve.metric == "perplexity"
    assert curve.points[0].quality_ratio == pytest.approx(1, abs=1e-4)


# -- sweep -----------------------------------------------------------------------------------------------------------------------------


def test_sweep_without_values_covers_the_range_and_the_calibrated_point(folder, tmp_path):
    out = tmp_path / "curve.json"
    curve = sweep(folder, out=out)
    written = json.loads(out.read_text())

    assert {"schema", "model", "metric", "dense", "points"} <= set(written)
    assert written["schema"] == 1
    assert written["metric"] == "perplexity"
    assert set(written["dense"]) == {"quality", "flops_per_token"}
    fields = {
        "rule",
        "value",
        "active_fraction",
        "ffn_flops_fraction",
        "flops_fraction",
        "bytes_fraction",
        "quality",
        "quality_ratio",
        "kl",
    }
    assert all(set(point) == fields for point in written["points"])
    assert written["points"] == [to_dict(point) for point in curve.points]

    assert len(curve.points) == 19  # 0.1, 0.15 ... 1.0; the calibrated point is one of them
    fractions = [point.active_fraction for point in curve.points]
    assert all(abs(found - wanted) < 0.15 for found, wanted in zip(fractions, [*TARGETS[1:], 1.0], strict=True))
    assert fractions == sorted(fractions)
    own = curve.calibrated_point()
    assert own is not None
    assert own.value == json.loads((folder / "record.json").read_text())["value"]
    assert own.active_fraction == pytest.approx(0.4, abs=0.1)

    full = curve.points[-1]
    assert full.active_fraction == 1
    assert full.quality_ratio == pytest.approx(1, abs=1e-4)
    assert full.kl == pytest.approx(0, abs=1e-6)
    assert full.ffn_flops_fraction > 1  # the router is not free
    for point in curve.points:
        assert point.quality_ratio == pytest.approx(point.quality / curve.dense.quality)
        assert 0 < point.active_fraction < point.ffn_flops_fraction
        assert point.flops_fraction < max(1.0, point.ffn_flops_fraction)


def test_sweep_adds_the_calibrated_point_where_no_step_meets_it(folder, tmp_path):
    calibration = replace(CALIBRATION, target_active=0.43, max_tokens=2_000)
    data = DataConfig(data=str(folder / "text.txt"))
    convert_checkpoint(str(folder / "dense"), tmp_path / "moe", data=data, config=CONFIG, calibration=calibration)
    curve = sweep_checkpoint(tmp_path / "moe", data=replace(data, window=WINDOW, max_tokens=2 * WINDOW), batch_size=2)
    assert len(curve.points) == 20
    assert curve.calibrated_point() is not None


@pytest.mark.parametrize(
    ("rule", "values"),
    [("topk", [1, 7]), ("dynk_mass", [0.0, 1.0]), ("norm_budget", [0.0, 1.0]), ("threshold", [0.0]), ("dynk_max", [1.0, 0.0])],
)
def test_sweep_of_given_values_measures_those_and_no_other(folder, rule, values):
    curve = sweep(folder, rule=rule, values=values)
    assert [(point.rule, point.value) for point in curve.points] == [(rule, value) for value in values]
    most = max(curve.points, key=lambda point: point.active_fraction)
    assert most.active_fraction == 1
    assert most.quality_ratio == pytest.approx(1, abs=1e-4)


def test_sweep_killed_and_run_again_measures_only_what_is_missing(folder, tmp_path, monkeypatch):
    out, values = tmp_path / "curve.json", [0.0, 0.3, 0.6]
    whole = sweep(folder, rule="dynk_max", values=values)
    sweep(folder, rule="dynk_max", values=values[:2], out=out)
    measured = []
    real = measure.sweep

    def spy(*args, on_point, **kwargs):
        return real(*args, on_point=lambda point: (measured.append(point.value), on_point(point)), **kwargs)

    monkeypatch.setattr(measure, "sweep", spy)
    assert sweep(folder, rule="dynk_max", values=values, out=out).points == whole.points
    assert measured == [0.6]
    assert all(isinstance(point, CurvePoint) for point in whole.points)


def test_sweep_killed_twice_keeps_all_points_and_those_of_other_values(folder, tmp_path, monkeypatch):
    out, values = tmp_path / "curve.json", [0.0, 0.2, 0.4, 0.6, 0.8]
    sweep(folder, rule="topk", values=[2], out=out)
    real = measure.sweep

    def killed_after_two(*args, on_point, **kwargs):
        seen = []

        def stop(point):
            on_point(point)
            seen.append(point)
            if len(seen) == 2:
                raise KeyboardInterrupt

        return real(*args, on_point=stop, **kwargs)

    for finished in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(measure, "sweep", killed_after_two)
            with pytest.raises(KeyboardInterrupt):
                sweep(folder, rule="dynk_max", values=values, out=out)
        assert [(p.rule, p.value) for p in Curve.read(out).points] == [("topk", 2), *(("dynk_max", v) for v in values[:finished])]
    curve = sweep(folder, rule="dynk_max", values=values, out=out)
    assert curve == Curve.read(out)
    assert [p.value for p in curve.points] == [2, *values]


def test_sweep_of_another_conversion_of_the_same_name_measures_everything_again(folder, tmp_path):
    data = DataConfig(data=str(folder / "text.txt"), window=WINDOW, max_tokens=2_000)
    out = tmp_path / "curve.json"
    for epochs in (1, 8):
        calibration = replace(CALIBRATION, max_tokens=2_000, router=replace(TRAIN, epochs=epochs, lr=0.01 * epochs))
        config = replace(CONFIG, rule=TopK(k=7))  # its calibrated knob is a whole number, the same for both
        options = {"data": data, "config": config, "calibration": calibration, "overwrite": True}
        convert_checkpoint(str(folder / "dense"), tmp_path / "moe", **options)
        curve = sweep_checkpoint(tmp_path / "moe", data=data, values=[3], out=out)
    assert len(curve.points) == 1
    assert curve == sweep_checkpoint(tmp_path / "moe", data=data, values=[3], out=tmp_path / "fresh.json")
    assert out.read_text() == (tmp_path / "fresh.json").read_text()


@pytest.mark.parametrize("rule", [TopK(k=2), DynKMax(tau=0.9)], ids=lambda rule: rule.name)
def test_sweep_after_set_rule_measures_and_names_the_rule_of_the_checkpoint(folder, tmp_path, rule):
    shutil.copytree(folder / "moe", tmp_path / "moe")
    model, _ = load_model(tmp_path / "moe")
    set_rule(model, rule)
    model.save_pretrained(tmp_path / "moe")
    data = DataConfig(data=str(folder / "text.txt"), window=WINDOW, max_tokens=4 * WINDOW)
    curve = sweep_checkpoint(tmp_path / "moe", data=data, targets=[0.5], batch_size=4)
    assert {point.rule for point in curve.points} == {rule.name}
    own = curve.calibrated_point()
    assert own is not None
    assert own.value == rule.value
    alone = sweep_checkpoint(tmp_path / "moe", data=data, values=[rule.value], batch_size=4)
    alone = sweep_checkpoint(tmp_path / "moe", data=data, values=[rule.value], batch_size=4)
    assert alone.points == (own,)


def test_sweep_of_another_rule_includes_the_calibrated_point(folder):
    curve = sweep(folder, rule="topk", targets=[0.5])
    assert [point.rule for point in curve.points] == ["topk", "dynk_max"]
    assert curve.calibrated_point() == curve.points[1]


def test_sweep_checks_what_it_can_before_loading_the_model(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(measure, "load_model", fail)
    (tmp_path / "curve.json").write_text("[]")
    with pytest.raises(ConfigError, match="tau"):
        sweep(folder, values=[7.0])
    with pytest.raises(ConfigError, match="--targets"):
        sweep(folder, targets=[0.123])
    with pytest.raises(DataError, match="not a curve"):
        sweep(folder, out=tmp_path / "curve.json")
    shutil.copytree(folder / "moe", tmp_path / "moe")
    record = json.loads((tmp_path / "moe/moeify.json").read_text())
    for key in ("knobs", "targets", "scope", "most_experts"):
        less = record | {"calibration": {k: v for k, v in record["calibration"].items() if k != key}}
        (tmp_path / "moe/moeify.json").write_text(json.dumps(less))
        with pytest.raises(CheckpointError, match=f"lacks '{key}'; convert the model again"):
            sweep_checkpoint(tmp_path / "moe", data=DataConfig(data="x.txt"))


def test_sweep_with_a_window_above_the_models_positions_names_both(folder):
    with pytest.raises(DataError, match=r"--window 129 is more than the 128 positions of LlamaForCausalLM"):
        sweep_checkpoint(folder / "moe", data=DataConfig(data=str(folder / "text.txt"), window=129))


def test_profile_of_a_converted_checkpoint_equals_that_of_the_dense_one(folder):
    data = DataConfig(data=str(folder / "text.txt"), window=WINDOW, max_tokens=2 * WINDOW)
    dense, converted = (profile_checkpoint(str(folder / name), data=data) for name in ("dense", "moe"))
    for name, profile in dense.items():
        found, expected = (p.firing_rate_F.sort().values for p in (converted[name], profile))  # conversion re-orders neurons
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


# -- another process -------------------------------------------------------------------------------------------------------------------


def run_python(code, *arguments, check=True):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=check, env=environment)


def test_a_fresh_process_loads_the_checkpoint_and_computes_the_same(folder):
    code = (
        "import sys, torch, moeify\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "from moeify.layers import moe_layers\n"
        "assert len(moe_layers(model)) == 2\n"
        "with torch.no_grad(): print(model(input_ids=torch.arange(9).view(1, 9)).logits.double().sum().item())\n"
    )
    found = float(run_python(code, folder / "moe").stdout)
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    with torch.no_grad():
        assert found == model(input_ids=torch.arange(9).view(1, 9)).logits.double().sum().item()


# What a process does before the command: it lets a step of the conversion run so many times, and dies of SIGKILL right before or after.
MOMENTS = {
    "run.json not yet written": "before(pathlib.Path, 'replace', 1)",
    "work folder made": "before(convert, 'capture_ffn_inputs', 1)",
    "second batch captured": "after(capture, '_write_state', 2)",
    "rows written, state not": "before(capture, '_write_state', 2)",
    "first site fitted": "after(convert, 'write_fitted', 1)",
    "file of the second site not yet written": "before(work, 'save_file', 2)",
    "checkpoint half-saved": "after(save, '_save', 1)",
}
# The same, with the checkpoint complete.
LATE = {
    "state not yet deleted": "before(convert, 'remove_work', 1)",
    "half of the state deleted": "before(pathlib.Path, 'unlink', 2)",
    "all of the state deleted but its folder": "before(os, 'rmdir', 2)",
}
# Forks a process for each moment, so that the libraries are imported once.
KILL = """
import json, os, pathlib, signal, sys
import torch
from transformers import LlamaForCausalLM
from moeify import cli
from moeify.pipeline import convert
from moeify.hf import save
from moeify.train import capture, work

def wrap(owner, name, count, kill_first):
    real, calls = getattr(owner, name), []
    def step(*args, **kwargs):
        calls.append(1)
        if kill_first and len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, step)

before = lambda owner, name, count: wrap(owner, name, count, True)
after = lambda owner, name, count: wrap(owner, name, count, False)
ended = {}
for moment, (prepare, words) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        torch.set_num_threads(int(sys.argv[2]))
        exec(prepare)
        os._exit(cli.run(words))
    ended[moment] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ended))
"""


def command(folder, out):
    options = {
        "data": folder / "text.txt", "out": out, "expert-size": 7, "router": "norm", "router-width": 8, "rule": "dynk_max",
        "target-active": 0.4, "max-tokens": TOKENS, "window": WINDOW, "router-epochs": 1, "seed": 0,
    }  # fmt: skip
    return ["convert", str(folder / "dense"), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def killed(folder):
    """What was there before, and one killed conversion for each moment."""
    source = hashes(folder / "dense")
    moments = MOMENTS | LATE
    outs = {moment: folder / f"killed{i}" / "moe" for i, moment in enumerate(moments)}
    runs = {moment: (moments[moment], command(folder, out)) for moment, out in outs.items()}
    ended = json.loads(run_python(KILL, json.dumps(runs), torch.get_num_threads()).stdout)
    assert ended == dict.fromkeys(moments, -signal.SIGKILL)
    assert [moment for moment, out in outs.items() if out.exists()] == list(LATE)
    assert all(out.with_name("moe.work").exists() for out in outs.values() if out.parent.exists() and any(out.parent.iterdir()))
    shutil.copytree(outs["state not yet deleted"].parent, folder / "late")
    assert hashes(folder / "dense") == source
    assert cli.run(command(folder, folder / "uninterrupted")) == 0
    return source, outs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no SIGKILL")
@pytest.mark.parametrize("moment", [*MOMENTS, *LATE])
def test_convert_killed_and_run_again_gives_the_same_bits(folder, killed, moment):
    source, outs = killed
    out, whole = outs[moment], folder / "uninterrupted"

    assert cli.run(command(folder, out)) == 0

    assert hashes(folder / "dense") == source
    assert (out / "moeify.json").read_bytes() == (whole / "moeify.json").read_bytes()
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    found, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert [path.name for path in out.parent.iterdir()] == ["moe"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no SIGKILL")
def test_convert_killed_when_complete_does_not_count_for_other_options(folder, killed, capsys):
    out = folder / "late" / "moe"
    before = hashes(out)
    for words in ([*command(folder, out)[:-1], "1"], [*command(folder, out), "--target-active", "0.5"]):
        assert cli.run(words) == 2
        assert "exists and is not empty; --overwrite replaces it" in capsys.readouterr().err
        assert hashes(out) == before


def test_convert_run_again_reuses_what_the_interrupted_run_had_done(folder, tmp_path, monkeypatch):
    fitted, real = [], conversion.fit_site

    def interrupted_at_the_second(*args):
        fitted.append(args[2].site.name)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(conversion, "fit_site", interrupted_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert_to(tmp_path / "moe", folder)
    convert_to(tmp_path / "moe", folder)
    assert fitted == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp"]


def convert_to(out, folder, *, source=None, calibration=None):
    data, calibration = DataConfig(data=str(folder / "text.txt")), calibration or replace(CALIBRATION, max_tokens=1_000)
    return convert_checkpoint(str(source or folder / "dense"), out, data=data, config=CONFIG, calibration=calibration)


def test_convert_after_an_interrupted_one_with_other_weights_or_options_starts_anew(folder, tmp_path, monkeypatch):
    source, few = tmp_path / "dense", replace(CALIBRATION, max_tokens=1_000)

    def interrupted(calibration):
        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(conversion, "save_checkpoint", stop)
            with pytest.raises(KeyboardInterrupt):
                convert_to(tmp_path / "moe", folder, source=source, calibration=calibration)

    save_dense_tiny(source)
    interrupted(replace(few, seed=1))
    (source / "model.safetensors").unlink()
    save_dense_tiny(source, seed=1)  # other weights under the same name
    interrupted(few)
    found = convert_to(tmp_path / "moe", folder, source=source)
    assert found == convert_to(tmp_path / "fresh", folder, source=source)
    assert (tmp_path / "moe/model.safetensors").read_bytes() == (tmp_path / "fresh/model.safetensors").read_bytes()


def test_convert_does_not_touch_a_folder_of_somebody_else_in_the_place_of_its_state(folder, tmp_path):
    work = tmp_path / "moe.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    data = DataConfig(data=str(folder / "text.txt"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is in the way and is not the state of an earlier run"):
            convert_checkpoint(str(folder / "dense"), tmp_path / "moe", data=data, config=CONFIG, calibration=CALIBRATION)
    assert (work / "thesis.txt").read_text() == "years"


# -- demo ------------------------------------------------------------------------------------------------------------------------------


def test_demo_of_three_steps_goes_all_the_way(tmp_path, monkeypatch):
    real = {"model": demo.small_relu_gpt, "calibration": demo.CalibrationConfig, "windows": demo.text_windows}

    def smaller(*, seed):
        model = real["model"](seed=seed)
        config = type(model.config)(**{**model.config.to_dict(), "n_embd": 32, "n_layer": 2, "n_inner": 64})
        return type(model)(config)

    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setattr(demo, "small_relu_gpt", smaller)
    monkeypatch.setattr(demo, "CalibrationConfig", lambda **options: real["calibration"](**options | {"max_tokens": 4096}))
    monkeypatch.setattr(
        demo, "text_windows", lambda data, *args, **options: real["windows"](replace(data, max_tokens=20_000), *args, **options)
    )
    result = demo.run_demo(tmp_path / "demo", steps=3)
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {"dense", "moe", "curve.json", "curve.png"}
    assert result["curve"].points[-1].quality_ratio == pytest.approx(1, abs=1e-4)
    assert result["text"].startswith(demo.PROMPT.strip())
