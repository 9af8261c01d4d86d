"""The result of a recipe from hand-made stages: means over seeds, the format that others read, and pictures."""

import json
import re
import subprocess

import pytest

from moeify.errors import DataError
from moeify.pipeline import results
from moeify.pipeline.recipe import RecipeConfig
from moeify.pipeline.results import mean_of, recipe_result, source_commit, write_result

RECIPE = {
    "name": "tiny",
    "metric": "perplexity",
    "model": {"source": "/home/somebody/models/tiny-llama"},
    "data": {"data": "builtin:pydoc"},
    "validation": {"data": "builtin:pydoc"},
    "train": {"steps": 3},
    "variant": [{"name": "relu", "main": True}, {"name": "gelu"}],
}


def recipe():
    from moeify._config import from_dict

    return from_dict(RecipeConfig, RECIPE)


def point(flops, quality, *, rule="topk"):
    return {
        "rule": rule,
        "value": 10 * flops,
        "active_fraction": flops,
        "ffn_flops_fraction": flops,
        "flops_fraction": flops,
        "quality": quality,
        "quality_ratio": quality / 10,
        "kl": None,
    }


def seed(number, shift=0.0, *, points=2):
    curve = [point(0.25 * (i + 1), 12.0 - i + shift) for i in range(points)]
    variant = {"points": curve, "eps": 0.001, "neurons": {"0": 8.0, "1": 8.0}, "active": {"0": 3.0, "1": 4.0}}
    return {
        "seed": number,
        "start": 99.0,
        "dense": 10.0 + shift,
        "control": 9.0 + shift,
        "sparsified": 10.5 + shift,
        "moefication": None,
        "points": curve,
        "moefication_points": [],
        "ztw_points": [],
        "at_flops": {"relu": {"0.2": None, "0.4": 11.4 + shift}, "gelu": {"0.2": None, "0.4": 11.4}},
        "at_all_flops": {"relu": {"0.2": 15.0 + shift, "0.4": None}},
        "variants": {
            "relu": {"main": True, "quality": 10.5 + shift, "nonzeros": {"0": 2.0 + shift, "1": 1.0}, **variant},
            "gelu": {"main": False, "quality": 10.0, "nonzeros": {"0": 8.0, "1": 8.0}, **variant},
        },
        "extra_evaluations": {"other": {"dense": 20.0 + shift, "points": curve}},
        "train_tokens": 100,
        "control_tokens": 101,
        "main_s": 5.0 + shift,
    }


def result(*seeds):
    return recipe_result(recipe(), seeds, seconds={"seed0/dense": 2.0, "seed0/sparsify.relu": 3.5}, device="cpu")


def test_result_of_one_seed_is_its_numbers_in_the_documented_format():
    found = result(seed(0))
    keys = "recipe metric dense control sparsified points moefication_points seeds train_tokens commit wall_s"
    assert not set(keys.split()) - set(found)
    assert (found["recipe"], found["metric"]) == ("tiny", "perplexity")
    assert (found["dense"], found["control"], found["sparsified"], found["moefication"]) == (10.0, 9.0, 10.5, None)
    assert found["points"] == seed(0)["points"]
    assert (found["seeds"], found["train_tokens"], found["control_tokens"]) == ([0], 100, 101)
    assert found["wall_s"] == 5.5
    assert (found["main_wall_s"], found["stage_wall_s"]["seed0/dense"]) == (5.0, 2.0)
    assert found["extra_evaluations"]["other"]["dense"] == 20.0
    assert not {"spread", "per_seed"} & set(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_result_of_several_seeds_has_means_spreads_and_each_seed():
    found = result(seed(0), seed(1, 2.0), seed(2, 4.0))
    assert (found["dense"], found["control"], found["train_tokens"]) == (12.0, 11.0, 100)
    assert [p["quality"] for p in found["points"]] == [14.0, 13.0]
    assert found["points"][0]["rule"] == "topk"
    assert found["at_flops"] == {"relu": {"0.2": None, "0.4": 13.4}, "gelu": {"0.2": None, "0.4": 11.4}}
    assert found["at_all_flops"] == {"relu": {"0.2": 17.0, "0.4": None}}
    assert found["variants"]["relu"]["nonzeros"] == {"0": 4.0, "1": 1.0}
    assert found["variants"]["relu"]["main"] is True
    assert found["spread"] == {"start": 0.0, "dense": 2.0, "control": 2.0, "sparsified": 2.0, "moefication": None}
    assert [one["dense"] for one in found["per_seed"]] == [10.0, 12.0, 14.0]
    assert [one["seed"] for one in found["per_seed"]] == found["seeds"] == [0, 1, 2]


def test_result_of_seeds_with_curves_of_different_lengths_has_those_of_the_first():
    found = result(seed(0), seed(1, 2.0, points=3))
    assert found["points"] == seed(0)["points"]
    assert found["dense"] == 11.0


def test_result_names_no_folder_of_the_machine():
    text = json.dumps(result(seed(0)))
    assert "somebody" not in text
    assert "models/tiny-llama" in text


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([1, 2], 1.5),
        ([3, 3], 3),
        ([True, False], True),
        (["a", "b"], "a"),
        ([{"x": [1.0]}, {"x": [2.0]}], {"x": [1.5]}),
        ([None, 1], None),
        ([1, None], None),
    ],
)
def test_mean_of_keeps_the_shape(values, mean):
    assert mean_of(values) == mean
    assert type(mean_of(values)) is type(mean)


def test_write_result_draws_every_variant_the_baseline_and_both_levels(tmp_path):
    pytest.importorskip("matplotlib")
    one = {**seed(0), "moefication_points": [point(0.5, 20.0)]}
    found = result(one)
    files = write_result(found, tmp_path)
    assert json.loads((tmp_path / "tiny.json").read_text()) == found
    curves = re.findall(r"<!-- (.*?) -->", (tmp_path / "tiny_curves.svg").read_text())
    assert {"relu", "gelu", "MoEfication", "dense: 10", "control: 9"} <= set(curves)
    nonzeros = re.findall(r"<!-- (.*?) -->", (tmp_path / "tiny_nonzeros.svg").read_text())
    assert {"relu", "gelu (|h| &gt; 0.001)"} <= set(nonzeros) or {"relu", "gelu (|h| > 0.001)"} <= set(nonzeros)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("tiny_curves.png", "tiny_nonzeros.png"))
    assert set(files.values()) == {str(path) for path in tmp_path.iterdir()}
    page = (tmp_path / "tiny.md").read_text()
    assert page.startswith("# tiny\n\ntiny: perplexity on validation, seed 0; 100 training tokens, 6 s")
    assert page.endswith("![curves](tiny_curves.png)\n\n![nonzeros](tiny_nonzeros.png)\n")


def test_nonzeros_of_a_variant_that_is_all_but_never_zero_are_those_above_eps():
    kinds = {
        "relu": {"nonzeros": {"0": 400.0}, "active": {"0": 300.0}, "neurons": {"0": 1000.0}, "eps": 0.001},
        "gelu": {"nonzeros": {"0": 940.0}, "active": {"0": 760.0}, "neurons": {"0": 1000.0}, "eps": 0.001},
    }
    assert results._nonzeros(kinds) == {"relu": [400.0], "gelu (|h| > 0.001)": [760.0]}


def test_a_report_without_matplotlib_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"needs matplotlib; pip install 'moeify\[report\]', or stop before it: --stage sweep"):
        results.check_report()


def test_source_commit_says_whether_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *options, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    module = tmp_path / "src/moeify/pipeline/results.py"
    module.parent.mkdir(parents=True)
    module.write_text("1")
    monkeypatch.setattr(results, "__file__", str(module))
    assert source_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    assert source_commit() == commit
    module.write_text("2")
    assert source_commit() == commit + "+"
