"""Tables to the letter."""

import math
from dataclasses import replace

import pytest
import torch

from moeify._config import to_dict
from moeify.errors import DataError
from moeify.evaluate import Curve, CurvePoint, DenseQuality, Distribution, ExecutedExperts, NonzeroActivations, TokenCosts, ablation
from moeify.report import (
    ablation_markdown,
    cost_markdown,
    costliest_markdown,
    curve_markdown,
    experts_markdown,
    layers_markdown,
    nonzeros_markdown,
    plain_markdown,
    recipe_markdown,
)

CURVE = Curve(
    model="tiny",
    metric="perplexity",
    dense=DenseQuality(quality=29.2, flops_per_token=1e6),
    points=(
        CurvePoint(
            rule="topk",
            value=8,
            active_fraction=0.5,
            ffn_flops_fraction=0.55,
            flops_fraction=0.8,
            quality=30.5,
            quality_ratio=1.0445,
            kl=None,
        ),
        CurvePoint(
            rule="dynk_max",
            value=0.25,
            active_fraction=0.2,
            ffn_flops_fraction=0.25,
            flops_fraction=0.6,
            quality=40,
            quality_ratio=1.37,
            kl=0.3,
        ),
    ),
    extra={"calibrated": {"rule": "topk", "value": 8.0}},
)


def test_curve_markdown_is_sorted_by_cost_with_calibrated_in_bold_and_dense_last():
    assert curve_markdown(CURVE).splitlines() == [
        "| rule | knob | active | FFN FLOPs | all FLOPs | perplexity | ratio | KL |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dynk_max | 0.25 | 20.0 % | 25.0 % | 60.0 % | 40 | 1.3700 | 0.3000 |",
        "| **topk** | **8** | **50.0 %** | **55.0 %** | **80.0 %** | **30.5** | **1.0445** |  |",
        "| dense |  | 100.0 % | 100.0 % | 100.0 % | 29.2 | 1.0000 |  |",
    ]


COST = {
    "ffn_dense": 10e6,
    "ffn_unconverted": 1e6,
    "experts": 9e6,
    "router": 0.5e6,
    "attention_proj": 4e6,
    "attention_scores": 2e6,
    "head": 3e6,
    "other": 0.0,
}


def test_cost_markdown_has_every_part_dense_and_at_the_calibrated_point():
    assert cost_markdown(replace(CURVE, extra={**CURVE.extra, "cost": COST})).splitlines() == [
        "| MFLOPs per token | dense | calibrated |",
        "| --- | ---: | ---: |",
        "| experts | 9.000 | 4.000 |",  # 0.55 * 10 - 1 - 0.5
        "| routers | 0.000 | 0.500 |",
        "| FFNs not converted | 1.000 | 1.000 |",
        "| attention: projections | 4.000 | 4.000 |",
        "| attention: scores | 2.000 | 2.000 |",
        "| head | 3.000 | 3.000 |",
        "| other | 0.000 | 0.000 |",
        "| all | 19.000 | 14.500 |",
    ]


def test_cost_markdown_of_replaced_projections_has_a_line_of_their_own_and_old_curves_have_not():
    point = replace(CURVE.points[0], projection_flops_fraction=0.25)
    cost = COST | {"ffn_unconverted": 0.0, "experts": 8e6, "projections_dense": 2e6, "projections": 2.1e6}
    curve = replace(CURVE, points=(point,), extra={**CURVE.extra, "cost": cost})
    lines = cost_markdown(curve).splitlines()
    assert lines[2] == "| experts | 8.000 | 4.500 |"  # 0.55 * 10 - 0.25 * 2 - 0.5
    assert lines[5] == "| replaced projections | 2.000 | 0.500 |"
    assert lines[-1] == "| all | 19.000 | 14.500 |"
    assert replace(curve, points=(CURVE.points[0],)).to_json()["points"][0].keys() == to_dict(CURVE.points[0]).keys()
    assert "projection_flops_fraction" not in to_dict(CURVE.points[0])


def test_cost_markdown_without_calibrated_point_has_the_dense_column_and_without_cost_nothing():
    assert cost_markdown(replace(CURVE, extra={"cost": COST})).splitlines()[2] == "| experts | 9.000 |"
    assert cost_markdown(CURVE) == ""


def recipe_result(metric, scale):
    """A recipe of two variants and a baseline; qualities of 10, 11, ... times a scale."""
    point = {"rule": "topk", "value": 8.0, "active_fraction": 0.5, "ffn_flops_fraction": 0.55, "flops_fraction": 0.8, "kl": None}
    return {
        "recipe": "tiny",
        "metric": metric,
        "start": 40 * scale,
        "dense": 11 * scale,
        "control": 10 * scale,
        "moefication": 12 * scale,
        "points": [{**point, "quality": 13 * scale, "quality_ratio": 1.0}],
        "moefication_points": [{**point, "quality": 15 * scale, "quality_ratio": 1.0}],
        "ztw_points": [],
        "at_flops": {"relu": {"0.5": 13.5 * scale, "0.6": 12.5 * scale}, "moefication": {"0.5": None, "0.6": 14 * scale}},
        "variants": {"relu": {"main": True, "quality": 10.5 * scale}, "gelu": {"main": False, "quality": 10.25 * scale}},
        "seeds": [0, 1],
        "train_tokens": 1000,
        "wall_s": 12.4,
    }


def test_recipe_markdown_compares_every_model_with_the_control():
    assert recipe_markdown(recipe_result("perplexity", 1.0)).splitlines() == [
        "tiny: perplexity on validation, mean of the seeds 0, 1; 1000 training tokens, 12 s of training and conversion.",
        "",
        "| before conversion | perplexity | / control |",
        "| ----------------- | ---------: | --------: |",
        "| start             |         40 |    4.0000 |",
        "| dense             |         11 |    1.1000 |",
        "| control           |         10 |    1.0000 |",
        "| relu (main)       |       10.5 |    1.0500 |",
        "| gelu              |      10.25 |    1.0250 |",
        "| MoEfication       |         12 |    1.2000 |",
        "",
        "| converted   | rule | knob | active | FFN FLOPs | perplexity | / control |",
        "| ----------- | ---: | ---: | -----: | --------: | ---------: | --------: |",
        "| relu        | topk |    8 | 50.0 % |    55.0 % |         13 |    1.3000 |",
        "| MoEfication | topk |    8 | 50.0 % |    55.0 % |         15 |    1.5000 |",
        "",
        "| perplexity at FFN FLOPs of | 50 % | 60 % |",
        "| -------------------------- | ---: | ---: |",
        "| relu                       | 13.5 | 12.5 |",
        "| MoEfication                |      |   14 |",
    ]


def test_recipe_markdown_of_accuracies_has_points_over_the_control():
    lines = recipe_markdown(recipe_result("accuracy", 0.05)).splitlines()
    assert "| relu (main)       |    0.525 |               +2.50 |" in lines
    assert "| before conversion | accuracy | points over control |" in lines


def test_recipe_markdown_compares_early_exit_over_the_flops_of_the_whole_model():
    result = recipe_result("accuracy", 0.05)
    thetas = [(0.0, 0.4, 0.4, [1.0, 0.0]), (0.9, 0.8, 0.6, [0.25, 0.75])]
    result["ztw_points"] = [
        {"theta": theta, "quality": quality, "exits": exits, "flops": 1.0, "flops_fraction": share}
        for theta, share, quality, exits in thetas
    ]
    lines = recipe_markdown(result).splitlines()
    assert lines[-10:] == [
        "| early exit | theta | all FLOPs | accuracy | points over control | left by head |",
        "| ---------- | ----: | --------: | -------: | ------------------: | -----------: |",
        "| ZTW        |     0 |    40.0 % |      0.4 |              -10.00 |        100 0 |",
        "| ZTW        |   0.9 |    80.0 % |      0.6 |              +10.00 |        25 75 |",
        "",
        "| accuracy at all FLOPs of | 50 % | 60 % |",
        "| ------------------------ | ---: | ---: |",
        "| relu                     |      |      |",
        "| MoEfication              |      |      |",
        "| ZTW                      | 0.45 |  0.5 |",
    ]


def test_recipe_markdown_with_replaced_projections_compares_over_the_flops_of_the_whole_model():
    result = recipe_result("accuracy", 0.05)
    point = result["points"][0]
    curve = [{**point, "flops_fraction": share, "quality": share, "projection_flops_fraction": 0.3} for share in (0.4, 0.7)]
    result["variants"]["gelu"]["points"] = curve
    assert recipe_markdown(result).splitlines()[-5:] == [
        "| accuracy at all FLOPs of | 50 % | 60 % |",
        "| ------------------------ | ---: | ---: |",
        "| relu                     |      |      |",
        "| gelu                     |  0.5 |  0.6 |",
        "| MoEfication              |      |      |",
    ]


def test_recipe_markdown_without_a_baseline_leaves_it_out():
    result = {**recipe_result("perplexity", 1.0), "moefication": None, "moefication_points": []}
    result["at_flops"] = {"relu": result["at_flops"]["relu"]}
    assert "MoEfication" not in recipe_markdown(result)


def test_ablation_markdown_has_qualities_costs_and_ratios_and_escapes_names():
    def points(*pairs):
        return [replace(CURVE.points[0], flops_fraction=x, quality=quality) for x, quality in pairs]

    rows = {"MoEfication": points((0.4, 0.5), (0.8, 0.9)), "full | *": points((0.2, 0.7), (0.4, 0.9)), "bad": points((0.1, 0.1))}
    table = ablation(rows, metric="accuracy", dense=0.9, within=0.1, fractions=(0.3, 0.5))
    assert [[cell.strip() for cell in line.split(" | ")] for line in ablation_markdown(table).splitlines()] == [
        ["| accuracy at all FLOPs of", "30 %", "50 %", "all FLOPs for >= 0.8", "/ MoEfication |"],
        ["| ------------------------", "---:", "---:", "-------------------:", "------------: |"],
        ["| MoEfication", "", "0.6", "70.0 %", "1.00 |"],
        ["| full \\| \\*", "0.8", "", "30.0 %", "0.43 |"],
        ["| bad", "", "", "", "|"],
    ]


def test_tables_by_layer_to_the_letter():
    spread = Distribution.of_counts(torch.tensor([1, 0, 0, 0, 1]))
    experts = ExecutedExperts(settings={"tau = 0.1": {"l.0": spread, "l.1": spread}, "a|b": {"l.1": spread}})
    assert experts_markdown(experts).splitlines() == [
        "| layer | tau = 0.1 | a\\|b |",
        "| --- | ---: | ---: |",
        "| `l.0` | 0.500 ± 0.500 |  |",
        "| `l.1` | 0.500 ± 0.500 | 0.500 ± 0.500 |",
    ]
    silent = Distribution.of_counts(torch.tensor([1, 0]))
    assert nonzeros_markdown({"dense": NonzeroActivations(layers={"l.0": spread, "l.1": silent})}).splitlines() == [
        "| layer | dense: mean | dense: deviation | dense: deviation / mean |",
        "| --- | ---: | ---: | ---: |",
        "| `l.0` | 2.0 | 2.0 | 1.000 |",
        "| `l.1` | 0.0 | 0.0 |  |",
    ]


def test_costliest_markdown_ranks_tokens_leaves_padding_out_and_escapes():
    flops_LBS = torch.tensor([[[10.0, 40.0, 20.0, math.nan]]], dtype=torch.float64)
    costs = TokenCosts(layers=("a",), flops_LBS=flops_LBS, dense_flops=(40.0,), router_flops=(1.0,))
    tokens = ["<b>", "a|\n", " `x`", "[PAD]"]
    assert costliest_markdown(tokens, costs, count=2).splitlines()[2:] == [
        '| 1 | "a\\|\\\\n" | 1.000 | 0 | "\\<b\\>" | 0.250 |',
        '| 2 | " \\`x\\`" | 0.500 | 2 | " \\`x\\`" | 0.500 |',
    ]
    with pytest.raises(DataError, match=r"1 tokens for the costs of \(1, 4\) positions"):
        costliest_markdown(["a"], costs)


def test_names_that_a_file_chose_are_text_in_every_table():
    odd = "<b>|`x` *y*\n# z"
    shown = r"\<b\>\|\`x\` \*y\* # z"
    table = curve_markdown(replace(CURVE, points=(replace(CURVE.points[0], rule=odd),), extra={}))
    assert table.splitlines()[2].startswith(f"| {shown} | 8 |")
    assert layers_markdown({odd: {odd: "1"}, "model.layers.0: FFN": {odd: "2"}}).splitlines() == [
        f"| layer | {shown} |",
        "| --- | ---: |",
        f"| {shown} | 1 |",
        "| `model.layers.0: FFN` | 2 |",
    ]
    assert [plain_markdown(name) for name in ("dynk_max", "moe-1", "__init__")] == ["dynk_max", "moe-1", r"\_\_init\_\_"]
