"""Recipes: what a file may say, what the command line changes, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest

from moeify._config import from_dict, to_dict
from moeify.errors import ConfigError
from moeify.pipeline.pretrain_recipe import read_pretrain
from moeify.pipeline.recipe import RecipeConfig, merged, read_recipe, shrunk
from moeify.select import DynKMass, Threshold, TopK
from moeify.train.loop import TrainConfig

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TEXT = """
name = "r"
metric = "perplexity"
task = "causal-lm"
[model]
source = "model"
[data]
data = "train.txt"
[validation]
data = "builtin:pydoc"
max_tokens = 64
[[extra_evaluation]]
name = "other"
data = { data = "other.txt" }
[train]
steps = 100
lr = 1e-3
[[variant]]
name = "relu"
main = true
train = { lr = 2e-3 }
[variant.sparsify]
activation = "relu"
[[variant]]
name = "plain"
[variant.convert.config]
rule = { name = "dynk_mass", mass = 0.5 }
[convert.config]
expert_size = 4
rule = { name = "threshold", theta = 1.0 }
[sweep]
targets = [0.1, 0.5]
"""


def read(tmp_path, text=TEXT, **options):
    (tmp_path / "r.toml").write_text(text)
    return read_recipe(tmp_path / "r.toml", **options)


def test_recipe_becomes_configs_with_the_changes_of_each_variant(tmp_path):
    recipe = read(tmp_path)
    relu, plain = recipe.variant
    assert recipe.main is relu
    assert (recipe.train_of(relu).lr, recipe.train_of(relu).steps) == (2e-3, 100)
    assert recipe.train_of(plain) == recipe.train
    assert recipe.convert_of(relu).config.rule == Threshold(theta=1.0)
    changed = recipe.convert_of(plain).config
    assert (changed.rule, changed.expert_size) == (DynKMass(mass=0.5), 4)
    assert plain.sparsify is None
    assert recipe.moefication is recipe.finetune is recipe.routers is None


def test_recipe_reads_all_of_its_data_unless_it_says_otherwise(tmp_path):
    recipe = read(tmp_path)
    assert [data.max_tokens for data in (recipe.data, recipe.validation, recipe.extra_evaluation[0].data)] == [None, 64, None]


def test_paths_that_exist_beside_the_file_are_meant_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "train.txt").touch()
    monkeypatch.chdir("/")
    recipe = read(tmp_path, settings=["validation.data=train.txt"])
    assert (recipe.model.source, recipe.data.data) == (str(tmp_path / "model"), str(tmp_path / "train.txt"))
    assert recipe.extra_evaluation[0].data.data == "other.txt"
    assert recipe.validation.data == "train.txt", "a path on the command line is one of the shell's folder"


def test_settings_change_any_option_by_its_dotted_name(tmp_path):
    settings = [
        "model.source=/some where/model=1",
        "variant.plain.train.lr=5e-4",
        "variant.0.main=true",
        "extra_evaluation.other.data.data=c.txt",
        "seeds=[0, 1]",
        "moefication.config.expert_size=16",
        "train.save_every=7",
    ]
    recipe = read(tmp_path, settings=settings)
    assert recipe.model.source == "/some where/model=1"
    assert recipe.train_of(recipe.variant[1]).lr == 5e-4
    assert recipe.extra_evaluation[0].data.data == "c.txt"
    assert recipe.seeds == (0, 1)
    assert recipe.moefication is not None
    assert recipe.moefication.config.expert_size == 16
    assert recipe.train.save_every == 7


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr", r"--set takes dotted.name=value, got 'train.lr'"),
        (".lr=1", "takes dotted.name=value"),
        ("variant.rellu.main=true", "no entry 'rellu'; did you mean 'relu'"),
        ("variant.2.main=true", "no entry '2'"),
        ("name.x=1", "--set name.x: name is a value"),
        ("train.stepz=1", "unknown option 'stepz' of TrainConfig; did you mean 'steps'"),
        ("train.steps=0", "steps must be at least 1"),
        ("variant.relu.train.lrr=1", r"variant relu: train: unknown option 'lrr' of TrainConfig"),
        ("variant.plain.convert.config.expert_size=0", "variant plain: convert: .*expert_size must be at least 1"),
        ("variant.plain.main=true", "exactly one .* main = true"),
        ("variant.plain.name=relu", "names must differ"),
        ("variant.plain.name='a/b'", "name 'a/b' must be letters"),
        ("variant.plain.name='relu.quality'", r"\[\[variant\]\] name 'relu.quality' must be letters, digits, '_' and '-'"),
        ("variant.plain.name=MoEfication", r"name 'moefication' is that of \[moefication\]; choose another"),
        ("extra_evaluation.other.name=validation", r"name 'validation' is that of \[validation\]; choose another"),
        ("moefication.train.steps=7", r"\[moefication\] train cannot change steps: the baseline is trained for the control's tokens"),
        ("task=masked-lm", "there are no recipes for masked-lm; moeify sparsify, convert and sweep"),
        ("name='a b'", "name 'a b' must be letters"),
        ("seeds=[1, 1]", "seeds must be different"),
        ("task=causal", "task 'causal' is unknown; did you mean 'causal-lm'"),
        ("variant.relu={name='relu', main=true, regress={}, sparsify={anneal_frac=0.5}}", "variant relu: regress starts with the final"),
        ("metric=accuracy", "the metric of a recipe for causal-lm is perplexity, not accuracy"),
        ("metric=accurcy", "metric must be one of 'perplexity', 'accuracy'"),
        ("sweep.targets=[0.33]", "targets must be multiples of 0.05"),
        ("sweep.rule=topp", r"rule 'topp' is unknown; did you mean 'topk'"),
        ("model.architecture.model_type=gpt2", "either a source or an architecture"),
        ("finetune.train.lrr=1", "finetune.train: unknown option 'lrr'"),
        ("moefication.calibration.window=x", r"moefication.calibration: CalibrationConfig.window must be int"),
        ("ztw.points=20", r"\[ztw\] is for classifiers, measured by accuracy; this recipe's metric is perplexity"),
        ("ztw.points=1", r"\[ztw\] points must be at least 2, got 1"),
        ("ztw.config.dept=2", "unknown option 'dept' of ZTWConfig; did you mean 'depth'"),
        ("variant.plain.name=ZTW", r"name 'ztw' is that of \[ztw\]; choose another"),
        ("control.tokens=all", "tokens must be one of 'recipe', 'train'"),
    ],
)
def test_bad_options_are_refused_with_the_way_out(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, settings=[setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("[train]", "[trian]"), "unknown option 'trian' of RecipeConfig; did you mean 'train'"),
        (TEXT.replace('name = "r"', "", 1), "lacks 'name'"),
        (TEXT.replace("main = true", "main = 1"), "main must be bool"),
        ("a = ", "is not TOML"),
        (f"variant = []\n{TEXT.partition('[[variant]]')[0]}", "at least one"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the recipe '.*none.toml': No such file.*; built in are .*gpt_pydoc.*pretrain/gpt"):
        read_recipe(tmp_path / "none.toml")


def test_merged_merges_tables_and_replaces_tagged_ones_of_another_name():
    config = merged(TrainConfig(steps=3, lr=0.5), {"steps": 4, "betas": [0.5, 0.6]}, where="x")
    assert (config.steps, config.lr, config.betas) == (4, 0.5, (0.5, 0.6))
    from moeify.convert import ConvertConfig

    norm = merged(ConvertConfig(), {"router": {"width": 7}}, where="x").router
    assert (norm.name, norm.width) == ("norm", 7)
    assert merged(ConvertConfig(), {"rule": {"name": "topk", "k": 2}}, where="x").rule == TopK(k=2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_read_and_name_no_machine(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert from_dict(RecipeConfig, json.loads(json.dumps(to_dict(recipe)))) == recipe
    text = path.read_text()
    assert "/home" not in text
    assert not [word for word in text.split('"') if word.startswith("/")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_smoke_shrinks_every_stage_and_changes_the_name(path):
    recipe, small = read_recipe(path), read_recipe(path, smoke=True)
    assert small == shrunk(recipe)
    assert small.name == f"{recipe.name}_smoke"
    assert all(small.train_of(variant).steps <= 4 for variant in small.variant)
    assert all((small.convert_of(variant).calibration.max_tokens or 10**9) <= 4096 for variant in small.variant)
    assert max(data.max_tokens or 10**9 for data in (small.validation, *(extra.data for extra in small.extra_evaluation))) <= 1024
    assert len(small.sweep.targets) <= 3
    if small.finetune is not None:
        assert merged(small.train, small.finetune.train, where="").steps <= 4


def test_smoke_keeps_what_the_baseline_changes_and_the_steps_of_the_control(tmp_path):
    recipe = read(tmp_path, settings=["moefication.train.lr=5e-4"], smoke=True)
    assert recipe.moefication is not None
    assert recipe.moefication.train["lr"] == 5e-4
    assert merged(recipe.train, recipe.moefication.train, where="").steps == 4


def test_smoke_shrinks_heads(tmp_path):
    settings = ["metric=accuracy", "task=image-classification", "ztw.config.depth=2"]
    recipe, small = read(tmp_path, settings=settings), read(tmp_path, settings=settings, smoke=True)
    assert recipe.ztw is not None
    assert small.ztw is not None
    assert (recipe.ztw.points, small.ztw.points) == (20, 4)
    assert (small.ztw.config.depth, small.ztw.config.hidden, small.ztw.config.train.steps) == (2, 32, 4)


def test_there_are_four_recipes():
    assert [path.stem for path in RECIPES] == ["gpt_pydoc", "minilm_emotion", "smollm2_novels", "vit_fashion"]


def without_sources(value):
    """A recipe's JSON without where models and data came from."""
    if isinstance(value, dict):
        return {k: without_sources(v) for k, v in value.items() if k != "source" and not (k == "data" and isinstance(v, str))}
    return [without_sources(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", sorted(ROOT.glob("bench/results/*/*.json")), ids=lambda path: path.stem)
def test_a_committed_result_is_of_its_recipe_as_it_is(path):
    stored = from_dict(RecipeConfig, json.loads(path.read_text())["config"])
    recipe = read_recipe(ROOT / f"recipes/{path.stem}.toml")
    assert without_sources(to_dict(stored)) == without_sources(to_dict(recipe))


@pytest.mark.parametrize("name", ["gpt_pydoc", "recipes/gpt_pydoc.toml"])
def test_recipes_that_moeify_brings_along_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt_pydoc").mkdir()  # what a recipe leaves is no recipe
    assert read_recipe(name) == read_recipe(ROOT / "recipes" / "gpt_pydoc.toml")
    assert read_pretrain("gpt").name == read_pretrain(ROOT / "recipes" / "pretrain" / "gpt.toml").name
