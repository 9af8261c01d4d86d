"""Points, resuming, state after errors, curve files."""

import functools
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from moeify._config import to_dict
from moeify.controls import set_mode, set_rule
from moeify.errors import ConfigError, DataError
from moeify.evaluate import (
    Curve,
    CurvePoint,
    DenseQuality,
    DenseReference,
    LayerRules,
    agreement,
    model_cost,
    model_weights,
    on_line,
    perplexity,
    quality_at,
    sweep,
)
from moeify.layers import moe_layers
from moeify.select import DynKMax, TopK

POINT = CurvePoint(
    rule="topk", value=3.0, active_fraction=0.3, ffn_flops_fraction=0.35, flops_fraction=0.6, quality=11.0, quality_ratio=1.1, kl=0.1
)


def _state(model):
    return {name: (layer.mode, layer.rule, layer.recorder) for name, layer in moe_layers(model).items()}


def _batches(windows):
    return [{"input_ids": window_S[None]} for window_S in windows]


def test_sweep_points_equal_measurements_by_hand(random_gpt, windows):
    model, batches = random_gpt, _batches(windows)
    before = _state(model)
    points = sweep(model, batches, TopK, [2, 10])
    assert _state(model) == before
    set_mode(model, "dense")
    dense = perplexity(model, windows)
    set_mode(model, "moe")
    set_rule(model, TopK(k=2))
    router = 2 * 16 * 10
    first, full = points
    assert (first.rule, first.value, first.active_fraction) == ("topk", 2.0, pytest.approx(0.2))
    assert first.ffn_flops_fraction == pytest.approx(0.2 + router / (2 * 2 * 16 * 40))
    assert first.quality == pytest.approx(perplexity(model, windows))
    assert first.quality_ratio == pytest.approx(first.quality / dense)
    assert first.kl == pytest.approx(agreement(model, batches).kl, rel=1e-4)
    assert full.quality_ratio == pytest.approx(1.0, abs=1e-5)
    assert full.kl == pytest.approx(0.0, abs=1e-6)
    assert first.flops_fraction < 1 < full.flops_fraction


def test_sweep_with_padding_counts_only_real_tokens(encoder, padded_batch):
    (point,) = sweep(encoder, [padded_batch], TopK, [3], quality="cosine")
    assert point.active_fraction == pytest.approx(0.3)
    assert point.kl is None
    assert point.quality == point.quality_ratio < 1


def test_sweep_with_layer_rules_uses_each_and_labels_the_point(random_gpt, windows):
    first, second = moe_layers(random_gpt)
    rules = LayerRules(value=0.3, rules={first: TopK(k=1), second: TopK(k=5)})
    (point,) = sweep(random_gpt, _batches(windows), TopK, [rules])
    assert (point.value, point.active_fraction) == (0.3, pytest.approx(0.3))


def test_sweep_with_done_points_measures_only_the_others_and_calls_back(gpt, windows):
    batches = _batches(windows)
    complete = sweep(gpt, batches, TopK, [1, 3, 5])
    seen = []
    resumed = sweep(gpt, batches, TopK, [1, 3, 5], done=complete[:1], on_point=seen.append)
    assert resumed == complete
    assert seen == complete[1:]
    assert sweep(gpt, batches, TopK, [5, 1], done=complete, on_point=seen.append) == [complete[2], complete[0]]
    assert len(seen) == 2


def test_sweep_of_steps_with_one_mean_knob_keeps_them_apart_also_when_resumed(random_gpt, windows):
    first, second = moe_layers(random_gpt)
    steps = [LayerRules(value=3.0, rules={first: TopK(k=a), second: TopK(k=6 - a)}) for a in (1, 5)]
    points = sweep(random_gpt, _batches(windows), TopK, [*steps, steps[0]])
    assert points[0].quality != points[1].quality
    assert points[2] == points[0]
    seen = []
    assert sweep(random_gpt, _batches(windows), TopK, steps, done=points[:1], on_point=seen.append) == points[:2]
    assert seen == points[1:2]


def test_sweep_interrupted_by_error_restores_rules_and_modes(gpt, windows):
    set_mode(gpt, "dense")
    before = _state(gpt)

    def stop(point):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(gpt, _batches(windows), TopK, [1, 3], on_point=stop)
    assert _state(gpt) == before


def test_sweep_with_bad_value_fails_before_measuring(gpt, windows):
    points = []
    with pytest.raises(ConfigError, match="tau"):
        sweep(gpt, _batches(windows), DynKMax, [0.5, 7.0], on_point=points.append)
    assert points == []


def test_sweep_of_dense_model_or_without_batches_raises(gpt, windows):
    with pytest.raises(ConfigError, match="convert or thin it first"):
        sweep(torch.nn.Linear(2, 2), _batches(windows), TopK, [1])
    with pytest.raises(DataError, match="no batch"):
        sweep(gpt, [], TopK, [1])


def test_sweep_tells_progress_every_batch(gpt, windows):
    tasks = {}

    class Listener:
        def task(self, label, *, total):
            return Task(label, total)

    class Task:
        def __init__(self, label, total):
            self.label = label
            tasks[label] = [0, total]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def advance(self, steps):
            tasks[self.label][0] += steps

    sweep(gpt, _batches(windows), TopK, [1, 2], progress=Listener())
    assert tasks == {"dense perplexity": [3, 3], "sweep topk": [6, 6]}


def test_model_cost_prices_router_and_context_of_the_batch(random_gpt, windows):
    before = _state(random_gpt)
    cost = model_cost(random_gpt, {"input_ids": windows})
    assert _state(random_gpt) == before
    assert cost.context == 12
    assert cost.lines()["router"] == 2 * (2 * 16 * 10)
    assert cost.lines()["attention_scores"] == 2 * 2 * 2 * 12 * 16


def test_model_weights_reads_a_fifth_of_the_experts_and_all_routers(random_gpt):
    weights = model_weights(random_gpt)
    ffn = 4 * (2 * 16 * 40 + 40 + 16)  # bytes of one layer, biases included
    assert weights.num_params == random_gpt.num_parameters()
    assert list(weights.router) == list(moe_layers(random_gpt))
    assert weights.read_bytes_per_token(0.2) == pytest.approx(weights.read_bytes_per_token() - 0.8 * 2 * ffn)


def test_cost_by_part_of_a_point_adds_up_to_its_flops(random_gpt, windows):
    first, _ = moe_layers(random_gpt)
    rules = LayerRules(value=0.3, rules={first: TopK(k=1)})
    points = sweep(random_gpt, _batches(windows), TopK, [rules, 10])
    cost = model_cost(random_gpt, {"input_ids": windows})
    dense = DenseQuality(quality=1.0, flops_per_token=cost.dense_flops_per_token)
    curve = Curve(model="m", metric="perplexity", dense=dense, points=tuple(points), extra={"cost": cost.lines()})
    assert sum(curve.cost_by_part().values()) == pytest.approx(dense.flops_per_token)
    for point in points:
        assert sum(curve.cost_by_part(point).values()) == pytest.approx(point.flops_fraction * dense.flops_per_token)
    assert curve.cost_by_part(points[1])["experts"] == pytest.approx(curve.cost_by_part()["experts"])
    assert curve.cost_by_part(points[0])["experts"] < 0.5 * curve.cost_by_part()["experts"]
    assert replace(curve, extra={}).cost_by_part() == {}


def _curve(**extra):
    return Curve(model="m", metric="perplexity", dense=DenseQuality(quality=10.0, flops_per_token=1e6), points=(POINT,), extra=extra)


def curve_point(flops, quality):
    fractions = {"active_fraction": flops, "ffn_flops_fraction": flops, "flops_fraction": flops}
    return CurvePoint(rule="topk", value=1.0, **fractions, quality=quality, quality_ratio=1.0)


@pytest.mark.parametrize(("flops", "quality"), [(0.2, 20.0), (0.3, 16.0), (0.45, 10.0), (0.6, 8.0), (0.1, None), (0.9, None)])
def test_quality_at_joins_neighbouring_points_and_never_leaves_the_curve(flops, quality):
    points = [curve_point(0.45, 10.0), curve_point(0.2, 20.0), curve_point(0.75, 6.0), curve_point(0.2, 20.0)]
    found = quality_at(points, flops)
    assert found == (None if quality is None else pytest.approx(quality))


def test_curve_written_and_read_is_equal_with_the_issued_fields(tmp_path):
    path = tmp_path / "curve.json"
    curve = _curve(data="x.txt", window=1024, calibrated={"rule": "topk", "value": 3.0})
    curve.write(path)
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert set(data["dense"]) == {"quality", "flops_per_token"}
    assert list(data["points"][0]) == [
        "rule",
        "value",
        "active_fraction",
        "ffn_flops_fraction",
        "flops_fraction",
        "quality",
        "quality_ratio",
        "kl",
    ]
    assert Curve.read(path) == curve
    assert curve.calibrated_point() == POINT
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]


def test_curve_is_same_run_compares_all_but_points():
    assert _curve(window=8).is_same_run(_curve(window=8))
    assert not _curve(window=8).is_same_run(_curve(window=16))


def test_curve_write_when_disk_is_full_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    _curve().write(path)
    before = path.read_text()

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        _curve(window=3).write(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "not JSON", id="truncated"),
        pytest.param("[]", "not a curve", id="foreign: a list"),
        pytest.param('{"schema": 1}', "not a curve", id="foreign: no points"),
        pytest.param(json.dumps({**_curve().to_json(), "schema": 2}), "upgrade", id="newer schema"),
        pytest.param(json.dumps({**_curve().to_json(), "points": [{"rule": "topk"}]}), "lacks", id="point without fields"),
        pytest.param(json.dumps({**_curve().to_json(), "points": 3}), "not a curve", id="points are no list"),
    ],
)
def test_curve_read_of_bad_file_raises_data_error(tmp_path, content, message):
    path = tmp_path / "curve.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        Curve.read(path)


def test_curve_read_of_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(DataError, match="moeify sweep"):
        Curve.read(tmp_path / "nope.json")


def test_sweep_with_given_reference_equals_its_own(gpt, windows):
    batches = _batches(windows)
    reference = DenseReference(gpt, batches, metric="perplexity")
    assert sweep(gpt, batches, TopK, [4], reference=reference) == sweep(gpt, batches, TopK, [4])


def test_on_line_of_a_single_point_is_known_there_alone():
    assert on_line([(0.5, 2.0)], 0.5) == 2.0
    assert on_line([(0.5, 2.0)], 0.4) is None
    assert on_line([], 0.5) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric": "bleu"}, "measured by 'bleu'; this moeify knows"),
        ({"schema": 0}, "schema 0"),
        ({"dense": {"quality": math.nan, "flops_per_token": 1.0}}, "dense.quality is nan"),
        ({"calibrated": "topk"}, "'calibrated' has another shape"),
        ({"versions": ["torch"]}, "'versions' has another shape"),
        ({"cost": {"experts": 1.0}}, "'cost' lacks"),
        ({"cost": "much"}, "'cost' has another shape"),
        ({"metric": []}, "measured by '[]'; this moeify knows"),
        ({"metric": {"perplexity": 1}}, "this moeify knows"),
        ({"schema": ["x" * 1000]}, "this moeify reads up to 1"),
        ({"dense": {"quality": 10**400, "flops_per_token": 1.0}}, "dense: DenseQuality.quality is beyond every float"),
        ({"note": functools.reduce(lambda value, _: [value], range(40), 0)}, "nested too deeply"),
    ],
)
def test_foreign_curves_are_refused_in_a_line(tmp_path, change, named):
    curve = {"schema": 1, "model": "m", "metric": "perplexity", "dense": {"quality": 8.0, "flops_per_token": 1.0}, "points": []}
    (tmp_path / "curve.json").write_text(json.dumps({**curve, **change}))
    with pytest.raises(DataError, match=re.escape(named)):
        Curve.read(tmp_path / "curve.json")


def test_curve_of_a_model_that_broke_down_is_read(tmp_path):
    broken = replace(curve_point(0.5, math.inf), kl=math.nan)
    curve = {**_curve().to_json(), "points": [to_dict(broken)]}
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    assert Curve.read(tmp_path / "curve.json").points[0].quality == math.inf


def test_curve_nested_beyond_the_parser_or_huge_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        Curve.read(path)
    monkeypatch.setattr(sys.modules["moeify.evaluate.sweep"], "_MOST_BYTES", 99_999)  # `sweep` is also a function
    with pytest.raises(DataError, match="has 100000 bytes, more than 99999"):
        Curve.read(path)
