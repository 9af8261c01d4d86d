"""A recipe with a variant whose projections are replaced: from the start to its curve, continued after a kill, cached by its options."""

import json
import random
from contextlib import contextmanager

import pytest
import torch
import transformers
from data_files import write_words
from tiny import save_dense_tiny

from moeify import load_model, moe_layers
from moeify._progress import NO_PROGRESS
from moeify.errors import ConfigError, MoeifyError
from moeify.layers import MoEProjection
from moeify.pipeline.recipe import read_recipe
from moeify.pipeline.run_recipe import run_recipe
from moeify.sites import replaced_projections
from moeify.train import project

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
[train]
steps = 3
batch_sequences = 4
lr = 1e-3
save_every = 1
compute = "float32"
[[variant]]
name = "all"
main = true
regress_tokens = 512
regress = { epochs = 1 }
sparsify = { activation = "relu", enforcement = { weight = 1e-2 } }
[variant.projections]
attention = ["q", "k", "v", "o"]
tokens = 512
epochs = 1
sparsity_weight = 1e-3
[[variant]]
name = "plain"
sparsify = { activation = "relu" }
[convert.config]
expert_size = 8
router = { name = "norm", width = 8 }
projection_expert_size = 4
projection_router = { name = "norm", width = 4 }
[convert.calibration]
target_active = 0.5
max_tokens = 1024
window = 32
router = { epochs = 1 }
[sweep]
targets = [0.5]
batch_size = 4
"""


class Kill:
    """Raises at the n-th advance of a task."""

    def __init__(self, ending, after):
        self.ending, self.after = ending, after

    @contextmanager
    def task(self, label, *, total):
        if label.endswith(self.ending):
            yield self
        else:
            with NO_PROGRESS.task(label, total=total) as other:
                yield other

    def advance(self, _steps):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("recipe")
    save_dense_tiny(root / "dense", hidden_act="silu")
    rng = random.Random(0)
    for name, lines in (("train.txt", 60), ("other.txt", 20)):
        write_words(root / name, lines, rng=rng)
    (root / "r.toml").write_text(RECIPE)
    return root


def run(folder, out, *, settings=(), stage="sweep", progress=NO_PROGRESS):
    return run_recipe(read_recipe(folder / "r.toml", settings=settings), folder / out, stage=stage, progress=progress)


@pytest.fixture(scope="module")
def whole(folder):
    return run(folder, "whole")


def only(folder, pattern):
    (found,) = (folder / "whole/seed0").glob(pattern)
    return found


def test_the_variant_is_replaced_before_training_and_has_five_moe_layers_a_block_after_conversion(folder, whole):
    trained, _ = load_model(only(folder, "sparsify.all-*") / "model")
    assert len(replaced_projections(trained)) == 8
    converted, _ = load_model(only(folder, "convert.all-*") / "moe")
    assert sum(isinstance(moe, MoEProjection) for moe in moe_layers(converted).values()) == 8
    assert len(moe_layers(converted)) == 10
    plain, _ = load_model(only(folder, "convert.plain-*") / "moe")
    assert len(moe_layers(plain)) == 2
    result = whole["seed0/sparsify.all"]
    assert len(result["projection_errors"]) == 8 and len(result["regress_errors"]) == 2
    assert 512 <= result["projection_tokens"] < 1024
    assert whole["seed0/sparsify.plain"]["projection_errors"] is None
    nonzeros = whole["seed0/sparsify.all.quality"]["nonzeros"]
    assert len(nonzeros) == 10
    assert all(point["quality"] > 0 for point in whole["seed0/sweep.all.validation"]["points"])


def test_a_run_killed_in_distillation_goes_on_to_the_same_model(folder, whole, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(folder, "killed", stage="sparsify", progress=Kill("replace projections", after=3))
    real, calls = project.project_linear, []
    monkeypatch.setattr(project, "project_linear", lambda *args, **options: calls.append(1) or real(*args, **options))
    run(folder, "killed", stage="sparsify")
    assert 5 <= len(calls) <= 6  # of eight; the one that was told last may have been kept
    (again,) = (folder / "killed/seed0").glob("sparsify.all-*[!y]")
    expected, _ = load_model(only(folder, "sparsify.all-*") / "model")
    found, _ = load_model(again / "model")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_other_options_of_projections_train_that_variant_alone_again(folder, whole):
    before = {path.name for path in (folder / "whole/seed0").iterdir()}
    run(folder, "whole", settings=["variant.all.projections.lr=1e-3"], stage="sparsify")
    new = {path.name.rpartition("-")[0] for path in (folder / "whole/seed0").iterdir() if path.name not in before}
    assert new == {"sparsify.all", "sparsify.all.quality"}


def test_stages_of_variants_without_projections_keep_their_keys(folder, whole):
    inputs = json.loads((only(folder, "sparsify.plain-*[!y]") / "inputs.json").read_text())
    assert "projections" not in inputs.get("inputs", inputs)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("variant.all.projections.attention=[]", "both empty"),
        ("variant.all.projections.atention=['q']", "did you mean 'attention'"),
        ("variant.all.sparsify.distill={ffn_weight=1.0}", "ffn_weight"),
        ("variant.all.projections.epochs=0", "epochs"),
    ],
)
def test_what_is_wrong_with_projections_shows_when_the_recipe_is_read(folder, setting, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(folder / "r.toml", settings=[setting])


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_trained(folder):
    with pytest.raises(MoeifyError, match="matches no linear layer"):
        run(folder, "wrong", settings=["variant.all.projections.patterns=['re:.*nothing']"], stage="sparsify")


def test_a_smoke_run_shrinks_the_distillation(folder):
    variant = read_recipe(folder / "r.toml", settings=["variant.all.projections.tokens=100000"], smoke=True).variant[0]
    assert (variant.projections.tokens, variant.projections.epochs) == (2048, 1)
