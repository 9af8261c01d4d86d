"""A recipe with early exit: heads on the dense model, points beside the variants', nothing done twice."""

import json
import random
from contextlib import contextmanager

import pytest
import transformers
from data_files import write_jsonl
from tiny import byte_tokenizer

from moeify._progress import NO_PROGRESS
from moeify.baselines import ztw
from moeify.errors import UnsupportedModelError
from moeify.hf.load import load_model
from moeify.pipeline.recipe import read_recipe
from moeify.pipeline.run_recipe import run_recipe

RECIPE = """
name = "exits"
metric = "accuracy"
[model]
source = "dense"
[data]
data = "train.jsonl"
window = 32
[validation]
data = "other.jsonl"
window = 32
[[extra_evaluation]]
name = "again"
data = { data = "train.jsonl", window = 32, max_tokens = 200 }
[train]
steps = 6
batch_sequences = 8
lr = 1e-3
compute = "float32"
[[variant]]
name = "plain"
finetune = false
[convert]
config = { expert_size = 8, router = { name = "norm", width = 8 } }
calibration = { max_tokens = 1024, window = 32, router = { epochs = 1 } }
[sweep]
targets = [0.5, 1.0]
[ztw]
points = 5
config = { hidden = 8, train = { steps = 1, batch_sequences = 4, compute = "float32" } }
"""


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(num_labels=2, max_position_embeddings=64, pad_token_id=0, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer(pad_token="<|pad|>").save_pretrained(tmp_path / "dense")
    rng = random.Random(0)
    for name, count in (("train", 60), ("other", 20)):
        rows = [{"text": "".join(rng.choices("abc" if i % 2 else "xyz", k=rng.randint(6, 20))), "label": i % 2} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


class Overall:
    """Counts finished stages, and nothing within them."""

    total = done = 0

    @contextmanager
    def task(self, label, *, total):
        if label.endswith(": stages"):
            self.total = total
            yield self
        else:
            with NO_PROGRESS.task(label, total=total) as task:
                yield task

    def advance(self, steps):
        self.done += steps


def test_a_recipe_has_points_of_early_exit(folder):
    overall = Overall()
    found = run_recipe(read_recipe(folder / "r.toml"), folder / "out", progress=overall)
    assert overall.done == overall.total, "stages are counted before they run"
    stored = json.loads((folder / "out/exits.json").read_text())
    assert found["ztw_points"] == stored["ztw_points"]
    points = [ztw.ExitPoint(**point) for point in stored["ztw_points"]]
    assert len(points) == 5
    assert [p.flops_fraction for p in points] == sorted(p.flops_fraction for p in points)
    assert points[0].flops_fraction < 0.5
    assert points[-1].quality == stored["dense"], "who leaves by no head gets the dense model's answer"
    assert len(stored["extra_evaluations"]["again"]["ztw_points"]) == 5
    assert "| ZTW" in (folder / "out/exits.md").read_text()
    assert "ZTW" in (folder / "out/exits_curves.svg").read_text()
    (record,) = ((json.loads(path.read_text()), path.parent) for path in (folder / "out/seed0").glob("ztw-*/record.json"))
    heads, ensemble = (record[0]["result"][stage] for stage in ("heads", "ensemble"))
    read = heads["steps"] * 4 + ensemble["steps"] * 256
    (control,) = (json.loads(path.read_text()) for path in (folder / "out/seed0").glob("control-*/record.json"))
    examples = control["result"]["steps"] * 8
    assert examples <= read < examples + 4 + 256, "as many examples as the control, rounded up to a step each"
    (dense,) = (folder / "out/seed0").glob("dense-*/model")
    assert len(ztw.load(record[1] / "heads", load_model(str(dense))[0]).places) == 2
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("seed*/*/record.json")}
    said = []
    changed = read_recipe(folder / "r.toml", settings=["ztw.config.hidden=4"])
    run_recipe(changed, folder / "out", stage="sweep", say=said.append)
    assert {line.partition(":")[0] for line in said} == {"seed0/ztw", "seed0/sweep.ztw.validation", "seed0/sweep.ztw.again"}
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_what_cannot_be_left_early_is_refused_before_training(folder):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AlbertConfig(num_labels=2, embedding_size=16, max_position_embeddings=64, pad_token_id=0, **sizes)
    transformers.AlbertForSequenceClassification(config).save_pretrained(folder / "dense")
    with pytest.raises(UnsupportedModelError, match="early exit needs separate blocks"):
        run_recipe(read_recipe(folder / "r.toml"), folder / "out")
    assert not list((folder / "out").glob("seed0/dense-*/model"))
