"""From a dense checkpoint to a thinned one on disk, and from there to a curve and a report."""

import json
import random
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM
from without_moeify import run_without_moeify

from moeify import load_model, model_cost, model_weights, set_rule
from moeify.channels import record_channels, sparse_inputs
from moeify.convert import ConvertConfig
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.evaluate import perplexity
from moeify.pipeline import (
    CalibrationConfig,
    NeuronConfig,
    PanelRequest,
    convert_checkpoint,
    report_checkpoint,
    sweep_checkpoint,
    thin_checkpoint,
)
from moeify.pipeline import thin as pipeline_thin
from moeify.routers import GateRouterConfig, LowRankRouterConfig, OracleRouterConfig
from moeify.select import Threshold, TopK
from moeify.thin import ThinConfig


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny.save_dense_tiny(tmp_path_factory.mktemp("thin") / "llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0)
    path.write_text("".join(words.choice("abcdefghij klm") for _ in range(6000)))
    return DataConfig(data=str(path), window=32, max_tokens=4096)


@pytest.fixture(scope="module")
def made(llama, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return out, thin_checkpoint(llama, out, data=data, config=ThinConfig(skip_frac=0.4, first_dense=0))


@pytest.fixture(scope="module")
def curve(made, data):
    out, _ = made
    return sweep_checkpoint(out, data=data, targets=(0.3, 0.5, 0.8, 1.0), out=out / "curve.json")


def test_thin_writes_a_dense_checkpoint_its_record_and_a_card(made, llama):
    out, record = made
    assert json.loads((out / "moeify.json").read_text())["calibration"] == json.loads(json.dumps(record))
    assert record["config"]["skip_frac"] == 0.4
    assert record["measured"]["active_fraction"] == pytest.approx(0.6, abs=0.02)
    assert set(record["skipped"]) == set(sparse_inputs(load_model(out)[0]))
    dense = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    thinned = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(thinned[name], value) for name, value in dense.items())
    card = (out / "README.md").read_text()
    assert "| wanted share of channels skipped | 0.4 |" in card
    assert "transform of" not in card and record["untied_head"] is False
    assert f"| held-out perplexity | {record['measured']['quality']:.4g} (dense" in card


def test_a_transformed_checkpoint_is_a_dense_one_of_the_same_function_and_says_so(data, tmp_path):
    model = tiny.tiny_llama(hidden_act="silu")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.norm.weight.add_(torch.rand(32))
    model.save_pretrained(tmp_path / "dense")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "dense")
    config = ThinConfig(skip_frac=0.4, score="wina", allocate="uniform", transform="orthogonal")
    record = thin_checkpoint(str(tmp_path / "dense"), tmp_path / "out", data=data, config=config)
    assert record["config"]["transform"] == "orthogonal" and record["untied_head"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| transform of the weights | orthogonal (same function, other numbers; the head, tied to" in card
    without = "import sys, torch; from transformers import AutoModelForCausalLM as A, logging; "
    without += "logging.set_verbosity_error(); m = [A.from_pretrained(path) for path in sys.argv[1:]]; "
    without += "a, b = (x(torch.arange(9)[None]).logits for x in m); print(float((a - b).abs().max() / a.abs().max()))"
    done = run_without_moeify(without, tmp_path / "dense", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1e-4
    thinned, _ = load_model(tmp_path / "out")
    assert len(sparse_inputs(thinned)) == len(record["skipped"])


def test_sweep_of_a_thinned_model_reaches_its_budgets_and_the_dense_model(curve):
    own, *points = [curve.calibrated_point(), *(point for point in curve.points if point != curve.calibrated_point())]
    assert own.value == 1.0
    assert own.active_fraction == pytest.approx(0.6, abs=0.02)
    assert [point.active_fraction for point in points] == pytest.approx([0.3, 0.5, 0.8, 1.0], abs=0.03)
    assert points[-1].quality == pytest.approx(curve.dense.quality, rel=1e-5)
    for point in curve.points:  # all linear layers are thinned alike, on average; the rest is head and scores
        assert point.flops_fraction > point.active_fraction - 0.03
        assert sum(curve.cost_by_part(point).values()) == pytest.approx(point.flops_fraction * curve.dense.flops_per_token)
    cheap, dense = curve.cost_by_part(points[0]), curve.cost_by_part()
    assert cheap["attention_proj"] < 0.6 * dense["attention_proj"]
    assert cheap["ffn_unconverted"] < 0.6 * dense["ffn_unconverted"]
    assert {cheap[key] - dense[key] for key in ("head", "attention_scores", "router", "experts")} == {0.0}


def test_sweep_of_a_thinned_model_measures_what_set_rule_makes_of_it(made, data, curve):
    out, record = made
    model, processor = load_model(out)
    batches = pipeline_thin.calibration_batches(model, processor, data, batch_tokens=32)
    factor = record["knobs"]["threshold"]["model.layers.0.mlp.down_proj"][record["targets"].index(0.5)]
    set_rule(model, Threshold(theta=factor))
    with record_channels(model) as recorder:
        quality = perplexity(model, torch.cat([batch["input_ids"] for batch in batches]))
    point = next(point for point in curve.points if point.value == pytest.approx(factor))
    assert quality == pytest.approx(point.quality, rel=1e-5)
    assert 1 - recorder.skipped_frac() == pytest.approx(point.active_fraction)


def test_a_second_sweep_takes_the_points_of_the_first(made, data, curve, monkeypatch):
    out, _ = made
    monkeypatch.setattr(sys.modules["moeify.evaluate.sweep"], "_measure_point", lambda *_, **__: pytest.fail("measured again"))
    again = sweep_checkpoint(out, data=data, targets=(0.5,), out=out / "curve.json")
    assert sorted(again.points, key=lambda p: p.value) == sorted(curve.points, key=lambda p: p.value)


def test_uniform_knobs_keep_every_layer_at_its_share(llama, data, tmp_path):
    config = ThinConfig(skip_frac=0.5, score="wina", allocate="uniform", first_dense=0)
    record = thin_checkpoint(llama, tmp_path / "out", data=data, config=config)
    model, processor = load_model(tmp_path / "out")
    at = record["targets"].index(0.75)
    set_rule(model, {name: Threshold(theta=factors[at]) for name, factors in record["knobs"]["threshold"].items()})
    batches = pipeline_thin.calibration_batches(model, processor, data, batch_tokens=1024)
    with record_channels(model) as recorder, torch.no_grad():
        for batch in batches:
            model(**batch)
    shares = recorder.per_layer()
    assert record["scope"] == "layer"
    assert all(share == pytest.approx(0.25, abs=0.08) for name, share in shares.items() if not name.endswith("down_proj"))


def test_decoded_bytes_fall_by_what_is_skipped(made):
    model, _ = load_model(made[0])
    weights = model_weights(model)
    linear = sum(p.numel() * 4 for name, p in model.named_parameters() if "_proj.weight" in name)
    assert sum(weights.channels.values()) == linear
    assert weights.read_bytes_per_token(0.4) == pytest.approx(weights.read_bytes_per_token() - 0.6 * linear)


def test_cost_counts_every_thinned_layer_once(made):
    model, _ = load_model(made[0])
    cost = model_cost(model, {"input_ids": torch.arange(8)[None]})
    assert cost.flops_fraction(1.0) == 1
    shapes = {name: executor.site.d_in * executor.site.d_out for name, executor in sparse_inputs(model).items()}
    assert cost.flops_per_token(1.0) - cost.flops_per_token(0.0) == pytest.approx(2 * sum(shapes.values()))
    ffn = 2 * sum(size for name, size in shapes.items() if ".mlp." in name)
    assert cost.ffn_flops(0.25) == pytest.approx(0.25 * ffn * cost.tokens)


def test_report_of_a_thinned_model_paints_a_text(made, tmp_path):
    pytest.importorskip("matplotlib")
    report_checkpoint(made[0], out=tmp_path / "page", request=PanelRequest(text="a"))
    assert "## Cost of a text" in (tmp_path / "page/report.md").read_text()


def test_report_of_a_thinned_model_lists_its_layers(made, curve, tmp_path):
    pytest.importorskip("matplotlib")
    report_checkpoint(made[0], out=tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Skipped channels" in text
    assert "| `model.layers.0.mlp.down_proj` |" in text
    assert "## Routers" not in text


def test_what_is_thinned_already_is_refused_and_nothing_written(made, data, tmp_path):
    with pytest.raises(UnsupportedModelError, match="is thinned already; give the dense checkpoint"):
        thin_checkpoint(str(made[0]), tmp_path / "again", data=data, config=ThinConfig(skip_frac=0.4))
    assert not (tmp_path / "again").exists()


def test_an_output_folder_in_the_way_is_refused_before_loading(made, llama, data, monkeypatch):
    monkeypatch.setattr(pipeline_thin, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(CheckpointError, match="overwrite"):
        thin_checkpoint(llama, made[0], data=data, config=ThinConfig(skip_frac=0.4))


def test_levels_of_zero_have_no_knobs_and_the_sweep_says_so(llama, data, tmp_path):
    record = thin_checkpoint(llama, tmp_path / "out", data=data, config=ThinConfig(skip_frac=0.0))
    assert record["knobs"] == {}
    with pytest.raises(CheckpointError, match="no knobs of the rule 'threshold'"):
        sweep_checkpoint(tmp_path / "out", data=data)


NEURONS = {
    "cats": (GateRouterConfig(scale="none"), Threshold(theta=0.0)),
    "chess": (GateRouterConfig(scale="up"), Threshold(theta=0.0)),
    "predictor": (LowRankRouterConfig(rank=128), Threshold(theta=0.0)),
    "topk": (OracleRouterConfig(of="activation"), TopK(k=1)),
}


@pytest.mark.parametrize("method", NEURONS)
def test_skipped_neurons_are_the_conversion_to_experts_of_one_neuron(llama, data, tmp_path, method):
    router, rule = NEURONS[method]
    record = thin_checkpoint(llama, tmp_path / "thin", data=data, config=NeuronConfig(method=method, skip_frac=0.4))
    config = ConvertConfig(expert_size=1, router=router, rule=rule)
    calibration = CalibrationConfig(target_active=0.6, max_tokens=data.max_tokens, window=data.window)
    converted = convert_checkpoint(llama, tmp_path / "converted", data=data, config=config, calibration=calibration)
    notes = {"method": method, "skips": "neurons of FFNs", "skip_frac": 0.4}
    assert {key: value for key, value in record.items() if key != "run"} == {k: v for k, v in {**notes, **converted}.items() if k != "run"}
    assert (record["target_active"], record["tokens"]) == (0.6, converted["tokens"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "thin" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


def test_a_method_of_channels_is_none_of_neurons():
    with pytest.raises(ConfigError, match="method: unknown name 'wina'; known: cats, chess, predictor, topk"):
        NeuronConfig(method="wina", skip_frac=0.4)


@pytest.mark.parametrize("config", [ThinConfig(skip_frac=0.4), NeuronConfig(method="cats", skip_frac=0.4)], ids=["channels", "neurons"])
def test_an_output_folder_within_or_around_the_source_is_refused_before_loading(llama, data, monkeypatch, config):
    monkeypatch.setattr(pipeline_thin, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    source = Path(llama)
    for out, message in (
        (source, "is the source, which is never written to"),
        (source / "new", "lies in the source '.*', which is never written to"),
        (source.parent, "holds the source '.*', which is never replaced"),
    ):
        with pytest.raises(CheckpointError, match=f"{message}; choose another --out"):
            thin_checkpoint(llama, out, data=data, config=config, overwrite=True)


def test_a_rule_for_a_name_that_is_no_layer_is_refused(made):
    model, _ = load_model(made[0])
    with pytest.raises(ConfigError, match=r"no MoE layer 'model\.layers\.9' in this model"):
        set_rule(model, {"model.layers.9": Threshold(theta=1.0)})
