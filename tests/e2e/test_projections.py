"""A model with replaced projections through everything that knows FFNs alone: trained, profiled, converted, swept, int8."""

import random

import pytest
import tiny
import torch
import transformers

from moeify.controls import record_active
from moeify.convert import ConvertConfig
from moeify.cost import estimate_flops
from moeify.data import DataConfig
from moeify.evaluate import Curve
from moeify.hf.load import load_model
from moeify.layers import MoEProjection, moe_layers
from moeify.manifest import manifest_of
from moeify.pipeline import (
    CalibrationConfig,
    convert_checkpoint,
    profile_checkpoint,
    quantize_checkpoint,
    report_checkpoint,
    sparsify_checkpoint,
    sweep_checkpoint,
)
from moeify.routers import NormRouterConfig
from moeify.sites import ProjectionMLP, replaced_projections
from moeify.sparsity import EnforcementConfig
from moeify.train import SparsifyConfig, TrainConfig
from moeify.train.fit import RouterTrainConfig

WINDOW = 32
PROJECTIONS = {f"model.layers.{layer}.self_attn.{role}_proj" for layer in range(2) for role in "qkvo"}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Text, and the checkpoints that each stage makes of the one before."""
    root = tmp_path_factory.mktemp("projections")
    tiny.replaced_llama().save_pretrained(root / "replaced")
    tiny.byte_tokenizer().save_pretrained(root / "replaced")
    rng = random.Random(0)
    text = "\n".join(" ".join(rng.choices(("one", "two", "three"), k=12)) for _ in range(150))
    (root / "text").mkdir()
    for name in ("train", "validation"):
        (root / "text" / f"{name}.txt").write_text(text)
    train = TrainConfig(steps=30, batch_sequences=4, lr=1e-2, compute="float32")
    config = SparsifyConfig(enforcement=EnforcementConfig(weight=0.05, schedule="constant"))
    data = DataConfig(data=str(root / "text"), split="train", window=WINDOW, max_tokens=None)
    sparsify_checkpoint(str(root / "replaced"), root / "sparse", data=data, config=config, train=train)
    calibration = CalibrationConfig(target_active=0.5, max_tokens=3_000, window=WINDOW, router=RouterTrainConfig(epochs=1))
    options = ConvertConfig(router=NormRouterConfig(width=8), projection_router=NormRouterConfig(width=4), projection_expert_size=4)
    convert_checkpoint(str(root / "sparse"), root / "moe", data=text_of(root), config=options, calibration=calibration)
    return root


def text_of(root):
    return DataConfig(data=str(root / "text" / "validation.txt"), window=WINDOW, max_tokens=30 * WINDOW)


def test_training_keeps_the_structure_and_makes_projections_sparse(root):
    before, after = (profile_checkpoint(str(root / name), data=text_of(root)) for name in ("replaced", "sparse"))
    assert set(after) > PROJECTIONS
    zeros = {name: (1 - before[name].firing_rate_F.mean(), 1 - after[name].firing_rate_F.mean()) for name in PROJECTIONS}
    assert all(new > old for old, new in zeros.values()), zeros
    model, _ = load_model(root / "sparse")
    guards = {tuple(module.weight.tolist()) for module in replaced_projections(model).values()}
    assert guards == {(0.0,)}, "no optimiser has touched them"


def test_conversion_fits_calibrates_and_measures_projections_like_ffns(root):
    model, _ = load_model(root / "moe")
    layers = moe_layers(model)
    assert {name for name, layer in layers.items() if isinstance(layer, MoEProjection)} == PROJECTIONS
    assert {layer.router.config.width for name, layer in layers.items() if name in PROJECTIONS} == {4}
    assert len(manifest_of(model).projections) == 8
    with record_active(model) as recorder, torch.no_grad():
        model(**tiny.tiny_inputs())
    assert recorder.per_layer().keys() == layers.keys()


def test_a_sweep_and_a_report_see_the_replaced_model_as_dense(root):
    curve = sweep_checkpoint(root / "moe", data=text_of(root), targets=[0.3, 1.0], out=root / "curve.json")
    points = sorted(curve.points, key=lambda point: point.active_fraction)
    assert points[-1].active_fraction == 1
    assert points[-1].quality == pytest.approx(curve.dense.quality, rel=1e-4)
    assert points[0].flops_fraction < points[-1].flops_fraction
    assert 0.1 < points[0].active_fraction < 0.5
    report_checkpoint(root / "moe", curve=root / "curve.json", out=root / "report")
    assert "| replaced projections |" in (root / "report" / "report.md").read_text()
    again = Curve.read(root / "curve.json")
    assert again.points == curve.points
    dense, cheap = again.cost_by_part(), again.cost_by_part(points[0])
    assert sum(dense.values()) == pytest.approx(curve.dense.flops_per_token)
    for point in points:
        assert sum(again.cost_by_part(point).values()) == pytest.approx(point.flops_fraction * curve.dense.flops_per_token)
    assert cheap["projections"] == pytest.approx(points[0].projection_flops_fraction * dense["projections"])
    assert cheap["projections"] < 0.9 * dense["projections"]
    assert cheap["experts"] < 0.9 * dense["experts"]
    # The dense model is the one from before projections were replaced: a fresh one costs as much.
    original = estimate_flops(tiny.tiny_llama(), {"input_ids": torch.zeros(1, WINDOW, dtype=torch.long)}).dense_flops_per_token
    assert curve.dense.flops_per_token == pytest.approx(original)


def test_int8_checkpoints_of_replaced_projections_load(root):
    quantize_checkpoint(root / "moe", root / "int8")
    model, _ = load_model(root / "int8")
    assert all(moe_layers(model)[name].is_int8 for name in PROJECTIONS)
    assert all(isinstance(model.get_submodule(name), ProjectionMLP) for name in PROJECTIONS)
    other, _ = load_model(root / "moe")
    with torch.no_grad():
        found, expected = (m(**tiny.tiny_inputs()).logits for m in (model, other))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
