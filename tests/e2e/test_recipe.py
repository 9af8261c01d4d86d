"""A whole recipe on a tiny model: killed and continued to the same result, and run again only where something changed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers
from data_files import write_words
from tiny import save_dense_tiny, tiny_inputs

from moeify import cli
from moeify._progress import NO_PROGRESS
from moeify.errors import ConfigError, DataError
from moeify.evaluate import CurvePoint, quality_at
from moeify.hf.load import load_model, read_calibration
from moeify.layers import moe_layers
from moeify.pipeline.recipe import read_recipe
from moeify.pipeline.run_recipe import run_recipe
from moeify.sites import find_ffn_sites

RECIPE = """
name = "tiny"
metric = "perplexity"
[model]
source = "dense"
[data]
data = "train.txt"
window = 32
[validation]
data = "other.txt"
window = 32
max_tokens = 256
[[extra_evaluation]]
name = "train"
data = { data = "train.txt", window = 32, max_tokens = 128 }
[train]
steps = 4
batch_sequences = 4
lr = 1e-3
save_every = 1
compute = "float32"
[[variant]]
name = "relu"
main = true
regress_tokens = 1024
regress = { epochs = 1 }
sparsify = { activation = "relu", enforcement = { weight = 1e-2 }, distill = {} }
teacher = "dense"
[[variant]]
name = "plain"
finetune = false
[convert]
config = { expert_size = 8, router = { name = "norm", width = 8 } }
calibration = { target_active = 0.62, max_tokens = 2048, window = 32, router = { epochs = 1 } }
[finetune]
train = { steps = 3, lr = 5e-4 }
config = { distill = {} }
[routers]
epochs = 1
[sweep]
targets = [0.5, 1.0]
batch_size = 4
[moefication]
config = { expert_size = 8, router = { name = "mlp" }, split = { name = "kmeans" }, rule = { name = "topk", k = 100 } }
"""
MEASURED = {"start", "dense.quality", "sparsify.relu.quality", "control.quality", "moefication.quality"}
TIMES = {"wall_s", "main_wall_s", "stage_wall_s", "train_s"}


class Steps:
    """Counts the steps of the task whose label ends in some words, and raises after so many."""

    def __init__(self, ending="", *, after=0):
        self.ending, self.after = ending, after

    @contextmanager
    def task(self, label, *, total):
        if not self.ending or not label.endswith(self.ending):
            with NO_PROGRESS.task(label, total=total) as other:
                yield other
            return
        self.done, self.total = 0, total
        yield self

    def advance(self, steps):
        self.done += steps
        if self.done == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint, texts, the recipe, and its finished run."""
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("recipe")
    save_dense_tiny(root / "dense", hidden_act="silu")
    rng = random.Random(0)
    for name, lines in (("train.txt", 120), ("other.txt", 20)):
        write_words(root / name, lines, rng=rng)
    (root / "r.toml").write_text(RECIPE)
    overall = Steps("tiny: stages")
    run(root, "whole", progress=overall)
    assert overall.done == overall.total, "stages are counted before they run"
    return root


def run(root, out, *settings, said=None, progress=None, **options):
    recipe = read_recipe(root / "r.toml", settings=settings)
    said = [] if said is None else said
    return run_recipe(recipe, root / out, progress=progress or Steps(), say=said.append, **options)


def result(root, out):
    def without_times(value):
        if isinstance(value, dict):
            return {key: without_times(item) for key, item in value.items() if key not in TIMES}
        return [without_times(item) for item in value] if isinstance(value, list) else value

    return without_times(json.loads((root / out / "tiny.json").read_text()))


def stages(root, out):
    """Name of each finished stage and when it was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (root / out).glob("seed*/*/record.json")}


def test_recipe_gives_the_documented_result(folder):
    found = json.loads((folder / "whole/tiny.json").read_text())
    assert found["dense"] < found["start"], "it learned"
    assert {point["rule"] for point in found["points"]} == {"threshold"}
    assert {point["rule"] for point in found["moefication_points"]} == {"topk"}
    for points in (found["points"], found["moefication_points"]):
        assert points[-1]["active_fraction"] == 1
        assert points[0]["active_fraction"] == pytest.approx(0.5, abs=0.1)
        assert len(points) == 3, "0.5, 1.0 and what the model itself is calibrated to"
    (calibrated,) = (folder / "whole/seed0").glob("routers.relu-*")
    assert found["points"][1]["value"] == json.loads((calibrated / "record.json").read_text())["result"]["value"]
    assert found["at_flops"]["relu"]["0.9"] == pytest.approx(quality_at([CurvePoint(**point) for point in found["points"]], 0.9))
    assert set(found["at_flops"]) == set(found["at_all_flops"]) == {"relu", "plain", "moefication"}
    whole = quality_at([CurvePoint(**point) for point in found["points"]], 0.9, cost="flops_fraction")
    assert found["at_all_flops"]["relu"]["0.9"] == pytest.approx(whole)
    relu, plain = found["variants"]["relu"], found["variants"]["plain"]
    assert relu["main"]
    assert relu["quality"] == found["sparsified"]
    assert plain["quality"] == found["dense"], "trained as the dense model was"
    assert set(relu["nonzeros_before"].values()) == {48.0}, "SiLU has no zeros"
    assert all(count < 30 for count in relu["nonzeros"].values())
    assert set(plain["nonzeros"].values()) == {48.0}
    assert all(error["after"] < error["before"] for error in relu["regress_errors"].values())
    assert found["points"][-1]["quality"] != pytest.approx(found["sparsified"], rel=1e-4), "the converted model was trained further"
    assert plain["points"][-1]["quality"] == pytest.approx(found["dense"], rel=1e-4)
    extra = found["extra_evaluations"]["train"]
    assert extra["dense"] != found["dense"]
    assert len(extra["points"]) == len(extra["moefication_points"]) == len(found["points"])
    assert extra["at_flops"]["relu"]["0.9"] != found["at_flops"]["relu"]["0.9"]
    assert found["wall_s"] == pytest.approx(sum(found["stage_wall_s"].values()))
    assert 0 < found["main_wall_s"] < found["wall_s"]
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    undocumented = [key for key in (*found, *relu, *extra) if f"`{key}`" not in page]
    assert not undocumented
    for name in ("curves.png", "curves.svg", "nonzeros.png", "nonzeros.svg"):
        assert (folder / f"whole/tiny_{name}").is_file()


def test_a_conversion_killed_while_its_state_is_deleted_leaves_none(folder):
    shutil.copytree(folder / "whole", folder / "converted")
    (converted,) = (folder / "converted/seed0").glob("convert.relu-*")
    (converted / "record.json").unlink()
    (converted / "moe.work/inputs").mkdir(parents=True)
    model = (converted / "moe/model.safetensors").stat().st_mtime_ns
    run(folder, "converted", stage="convert")
    assert set(stages(folder, "converted")) == set(stages(folder, "whole")), "moved, and nothing else was done again"
    assert not (converted / "moe.work").exists()
    assert (converted / "moe/model.safetensors").stat().st_mtime_ns == model, "it was finished"


def test_control_is_trained_for_all_tokens_that_the_main_variant_took(folder):
    found = json.loads((folder / "whole/tiny.json").read_text())
    records = (folder / "whole/seed0").glob("*/record.json")
    tokens = {path.parent.name.rpartition("-")[0]: json.loads(path.read_text())["result"] for path in records}
    calibration = 2048 - 32  # one window is kept to measure
    assert tokens["sparsify.relu"]["regress_tokens"] == 1024
    assert tokens["convert.relu"]["tokens"] == tokens["routers.relu"]["tokens"] == calibration
    trained = (4 + 4 + 3) * 4 * 32  # the teacher's training is the main variant's, too
    assert found["train_tokens"] == trained + 1024 + 2 * calibration
    assert found["train_tokens"] <= found["control_tokens"] < found["train_tokens"] + 4 * 32
    assert tokens["control"]["tokens"] == tokens["moefication"]["tokens"] == found["control_tokens"]
    assert found["control"] < found["dense"], "more tokens help"


def test_converted_models_of_a_recipe_are_ordinary_checkpoints(folder):
    (final,) = (folder / "whole/seed0").glob("routers.relu-*")
    model, tokenizer = load_model(final / "moe")
    assert len(moe_layers(model)) == 2
    assert tokenizer is not None
    stored = [read_calibration(path / "moe") for path in (final, next((folder / "whole/seed0").glob("convert.relu-*")))]
    assert stored[0]["measured"]["dense_quality"] != stored[1]["measured"]["dense_quality"], "measured after all training"
    assert stored[0]["knobs"] != stored[1]["knobs"]
    (dense,) = (folder / "whole/seed0").glob("sparsify.relu-*")
    assert load_model(dense / "model")[0].config.hidden_act == "relu"
    assert not [path for path in (folder / "whole").rglob("*") if path.name == "scratch" or path.suffix == ".work"]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import transformers
transformers.logging.disable_progress_bar()
sys.path.insert(0, sys.argv[3])
from test_recipe import Steps, run

class Killed(Steps):
    def advance(self, steps):
        self.done += steps
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), sys.argv[2], progress=Killed("sparsify.relu] train"))
"""


def test_recipe_killed_in_and_between_stages_continues_to_the_same_result(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(folder), "killed", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (killed,) = (folder / "killed/seed0").glob("sparsify.relu-*")
    assert (killed / "scratch/state").is_dir()
    assert {name.rpartition("-")[0] for name in stages(folder, "killed")} == {"start", "dense", "dense.quality"}

    said = []
    with pytest.raises(KeyboardInterrupt):  # in training again, of the converted model
        run(folder, "killed", said=said, progress=Steps("finetune.relu] train", after=2))
    assert said == ["seed0/sparsify.relu: continues where it stopped."]
    before = stages(folder, "killed")
    with pytest.raises(KeyboardInterrupt):  # between stages: the next one has not begun
        run(folder, "killed", said=said, progress=Steps("tiny: stages", after=14))
    after = stages(folder, "killed")
    assert before.items() < after.items(), "nothing was done twice"
    run(folder, "killed", said=said)
    assert said[1:] == ["seed0/finetune.relu: continues where it stopped."]
    assert after.items() < stages(folder, "killed").items()
    assert result(folder, "killed") == result(folder, "whole")


@pytest.mark.parametrize(
    ("setting", "rerun"),
    [
        ("sweep.targets=[0.5]", {"sweep"}),
        ("validation.max_tokens=128", MEASURED | {"sweep"}),
        ("train.micro_sequences=2", set()),
        ("finetune.train.lr=1e-3", {"finetune.relu", "routers.relu", "sweep"}),
    ],
)
def test_a_changed_option_runs_only_what_depends_on_it_and_says_so(folder, setting, rerun):
    before, said = stages(folder, "whole"), []
    run(folder, "whole", setting, said=said)
    after = stages(folder, "whole")
    assert before.items() <= after.items()
    names = {name.rpartition("-")[0] for name in set(after) - set(before)}
    assert {"sweep" if name.startswith("sweep.") else name for name in names} == rerun
    option = setting.partition("=")[0].rpartition(".")[2]
    assert bool(said) == bool(rerun)
    assert sum("runs again" in line and option in line for line in said) >= min(1, len(rerun)), said
    shutil.rmtree(folder / "copy", ignore_errors=True)
    run(folder, "whole")
    assert stages(folder, "whole") == after, "going back costs nothing"


def test_a_rule_to_sweep_gives_its_points_alone_and_leaves_the_baseline_its_own(folder):
    made = run(folder, "whole", "sweep.rule=dynk_max", "sweep.targets=[0.5]", stage="sweep")
    rules = {name: [point["rule"] for point in made[f"seed0/sweep.{name}.validation"]["points"]] for name in ("relu", "moefication")}
    assert rules == {"relu": ["dynk_max"], "moefication": ["topk", "topk"]}


def test_other_weights_or_data_under_the_same_name_run_again(folder):
    shutil.copytree(folder / "dense", folder / "moved")
    before = stages(folder, "whole")
    made = run(folder, "whole", f"model.source={folder / 'moved'}", stage="dense")
    assert set(made) == {"seed0/start", "seed0/dense", "seed0/dense.quality"}
    assert stages(folder, "whole") == before, "the same weights elsewhere"
    save_dense_tiny(folder / "other", hidden_act="silu", seed=1)
    said = []
    run(folder, "whole", f"model.source={folder / 'other'}", stage="dense", said=said)
    assert len(stages(folder, "whole")) == len(before) + 3
    assert "seed0/dense: runs again (model.source" in "".join(said)


def test_a_threshold_is_subtracted_once_although_layers_are_fitted_before_training(folder):
    sizes = "hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64"
    settings = [
        f"model={{tokenizer='bytes', architecture={{model_type='llama', mlp_bias=true, {sizes}}}}}",
        "task=causal-lm",
        "train.lr=0.0",
        "variant.relu.regress.lr=1e-9",
        "variant.relu.sparsify.threshold=0.05",
    ]
    run(folder, "threshold", *settings, stage="sparsify")
    (trained,) = (folder / "threshold/seed0").glob("sparsify.relu-*")
    model, _ = load_model(trained / "model")
    assert model.config.hidden_act == "relu"
    assert model.model.layers[0].mlp.gate_proj.bias.tolist() == pytest.approx([-0.05] * 24, abs=1e-6)


def test_a_policy_of_activations_holds_where_layers_are_fitted_before_training(folder):
    policy = "{'re:.*[.]1[.]mlp' = {activation = 'relu2'}}"
    run(folder, "policy", f"variant.relu.sparsify.policy={policy}", "train.steps=1", stage="sparsify")
    (trained,) = (folder / "policy/seed0").glob("sparsify.relu-*")
    model, _ = load_model(trained / "model")
    assert [site.activation for site in find_ffn_sites(model, tiny_inputs())] == ["relu", "relu2"]


def test_bad_arguments_of_a_run_are_refused_before_anything_is_made(folder):
    with pytest.raises(ConfigError, match="--stage 'sweeep' is unknown; did you mean 'sweep'"):
        run(folder, "new", stage="sweeep")
    with pytest.raises(ConfigError, match="--device"):
        run(folder, "new", device="gpu")
    with pytest.raises(DataError, match="no such file"):
        run(folder, "new", "validation.data=none.txt")
    assert not (folder / "new").exists()
    with pytest.raises(ConfigError, match="holds the recipe 'tiny', not 'other'"):
        run(folder, "whole", "name=other")


def test_a_variant_that_cannot_be_trained_ends_the_run_before_any_training(folder):
    with pytest.raises(ConfigError, match="never zero"):
        run(folder, "refused", "variant.plain.sparsify={activation='keep', enforcement={on='activations'}}")
    assert {name.rpartition("-")[0] for name in stages(folder, "refused")} == {"start"}


def test_pipeline_command_prints_the_main_numbers_and_ends_bad_input_with_2(folder, capsys):
    assert cli.run(["pipeline", str(folder / "r.toml"), "--out", str(folder / "whole"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = json.loads((folder / "whole/tiny.json").read_text())
    assert {key: shown[key] for key in ("dense", "control", "points")} == {key: found[key] for key in ("dense", "control", "points")}
    assert shown["files"]["tables"] == str(folder / "whole/tiny.md")
    assert cli.run(["pipeline", str(folder / "r.toml"), "--out", str(folder / "whole")]) == 0
    text = capsys.readouterr().out
    assert (folder / "whole/tiny.md").read_text().partition("![")[0].partition("\n\n")[2] in text
    assert f"\ntables: {folder / 'whole/tiny.md'}\n" in text
    assert cli.run(["pipeline", str(folder / "r.toml"), "--out", str(folder / "whole"), "--set", "train.stpes=1"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert cli.run(["pipeline", str(folder / "r.toml"), "--out", str(folder / "quick"), "--smoke", "--stage", "dense"]) == 0
    assert json.loads((folder / "quick/recipe.json").read_text()) == {"name": "tiny_smoke"}
    text = capsys.readouterr().out
    assert "seed0/dense.quality:\n  quality:\n    validation: " in text
    assert not {"losses", "nonzeros"} & set(text.replace(":", "").split())
