"""From a dense checkpoint to a sparse one on disk: what is recorded, what a kill leaves, what is refused before anything is trained."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import transformers

from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from moeify.pipeline import sparsify, sparsify_checkpoint
from moeify.pipeline.pretrain_log import has_tensorboard
from moeify.pipeline.tasks import load_for_task, measure_task, task_batches
from moeify.sparsity import EnforcementConfig
from moeify.train.distill import DistillConfig
from moeify.train.loop import TrainConfig
from moeify.train.sparsify import SparsifyConfig

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


class Stop(Exception):  # noqa: N818 - a kill
    pass


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny.save_dense_tiny(tmp_path_factory.mktemp("sparsify") / "llama", hidden_act="silu"))


@pytest.fixture
def text(tmp_path):
    """960 windows of training text."""
    for name, count in (("train", 850), ("validation", 20)):
        (tmp_path / f"{name}.txt").write_text("some words of text " * count)
    return DataConfig(data=str(tmp_path), split="train", window=16, max_tokens=None)


def options(data, **changes):
    """Ten steps of four windows."""
    train = {"steps": 10, "batch_sequences": 4, "lr": 1e-2, "compute": "float32"}
    enforcement = EnforcementConfig(weight=0.05, schedule="constant")
    config = {"config": SparsifyConfig(enforcement=enforcement), "train": TrainConfig(**(train | changes.pop("train", {})))}
    return {"data": data, **config, **changes}


# -- what it makes ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    (root / "train.txt").write_text("some words of text " * 850)
    (root / "validation.txt").write_text("some words of text " * 20)
    data = DataConfig(data=str(root), split="train", window=16, max_tokens=None)
    return root / "out", sparsify_checkpoint(llama, root / "out", **options(data, train={"eval_every": 5}))


def test_sparsify_writes_an_ordinary_dense_checkpoint_and_its_record(made, llama):
    out, record = made
    assert json.loads((out / "sparsify.json").read_text()) == json.loads(json.dumps(record))
    assert sorted(p.name for p in out.parent.iterdir() if p.suffix != ".txt") == ["out"], "no state of the run stays"
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert transformers.AutoTokenizer.from_pretrained(out)("a")["input_ids"]


def test_sparsify_records_quality_and_zeros_before_and_after(made):
    _, record = made
    assert (record["task"], record["metric"]) == ("causal-lm", "perplexity")
    assert record["quality"]["after"] < 0.7 * record["quality"]["before"]
    before, after = record["activations"]["before"], record["activations"]["after"]
    assert list(before) == list(after) == ["mean", *LAYERS]
    assert before["mean"]["zero_frac"] == 0  # of SiLU
    assert after["mean"]["zero_frac"] > 0.6
    for key in before["mean"]:
        assert after["mean"][key] == pytest.approx((after[LAYERS[0]][key] + after[LAYERS[1]][key]) / 2)
    assert after[LAYERS[0]]["nonzeros_per_token"] == pytest.approx(48 * (1 - after[LAYERS[0]]["zero_frac"]))


def test_sparsify_records_losses_tokens_and_evaluations(made):
    _, record = made
    assert [point["step"] for point in record["losses"]] == list(range(1, 11))
    assert record["losses"][-1]["loss"] < 0.9 * record["losses"][0]["loss"]
    assert [point["step"] for point in record["evals"]] == [5, 10]
    assert record["evals"][-1]["quality"] == record["quality"]["after"]
    assert [(reading["step"], reading["sparsity_weight"]) for reading in record["parts"]] == [(10, pytest.approx(0.05))]
    assert record["tokens"] == 10 * 4 * 16
    assert record["new_head"] is False
    assert record["train"]["lr"] == 0.01
    assert record["config"]["enforcement"]["weight"] == 0.05
    assert set(record["versions"]) == {"moeify", "torch", "transformers", "safetensors"}


def test_sparsify_writes_a_card_of_what_was_measured(made):
    out, record = made
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- moeify\n")
    quality, zeros = record["quality"], record["activations"]["after"]["mean"]["zero_frac"]
    assert f"| perplexity, before and after | {quality['before']:.4g}, {quality['after']:.4g} |" in card
    assert f"| zeros among activations, before and after | 0, {zeros:.4g} |" in card
    assert "| penalty | hoyer, weight 0.05 |" in card
    assert "an ordinary dense LlamaForCausalLM" in card


@pytest.mark.parametrize(("anneal_frac", "measured"), [(0.5, 1), (1.0, 2)])
def test_quality_after_is_that_of_the_saved_model_whenever_its_activation_arrives(
    llama, text, tmp_path, monkeypatch, anneal_frac, measured
):
    """With anneal_frac 1 the function is not ReLU yet in the evaluation after the last step."""
    arguments = options(text, train={"steps": 3})
    arguments["config"] = replace(arguments["config"], anneal_frac=anneal_frac)
    calls = []
    real = sparsify.measure_task
    monkeypatch.setattr(sparsify, "measure_task", lambda *a, **k: calls.append(1) or real(*a, **k))
    record = sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    validation = replace(text, split="validation")
    loaded = load_for_task(str(tmp_path / "out"), validation)
    assert loaded.model.config.hidden_act == "relu"
    assert record["quality"]["after"] == pytest.approx(real(loaded.model, "causal-lm", task_batches(loaded, validation)), rel=1e-5)
    assert len(calls) == 1 + measured


@pytest.mark.parametrize(("count", "points"), [(0, 0), (1, 1), (20, 20), (47, 20)])
def test_loss_points_are_means_of_parts_that_cover_the_run(count, points):
    losses = [float(i) for i in range(count)]
    found = sparsify._loss_points(losses)
    assert len(found) == points
    starts = [0, *(point["step"] for point in found)]
    for start, point in zip(starts, found, strict=False):
        assert point["loss"] == pytest.approx(sum(losses[start : point["step"]]) / (point["step"] - start))
    assert starts[-1] == count


def test_batch_tokens_are_whole_windows(llama, text, tmp_path):
    record = sparsify_checkpoint(llama, tmp_path / "out", **options(text, batch_tokens=50, train={"steps": 2}))
    assert record["tokens"] == 2 * 3 * 16
    assert record["train"]["batch_sequences"] == 3


def test_more_steps_than_the_data_has_say_how_many_epochs(llama, text, tmp_path):
    data = replace(text, max_tokens=16 * 8)
    with pytest.warns(UserWarning, match=r"has 8 sequences: 5 steps of 4 are 2\.5 epochs"):
        record = sparsify_checkpoint(llama, tmp_path / "out", **options(data, train={"steps": 5}))
    assert record["epochs"] == 2.5


def test_validation_is_measured_on_other_data_where_it_is_named(llama, text, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "digits.txt").write_text("0123456789" * 30)
    other = DataConfig(data=str(tmp_path / "other"), window=16)
    record = sparsify_checkpoint(llama, tmp_path / "out", **options(text, validation=other, train={"steps": 5}))
    loaded = load_for_task(str(tmp_path / "out"), other)
    assert record["quality"]["after"] == pytest.approx(measure_task(loaded.model, "causal-lm", task_batches(loaded, other)), rel=1e-5)
    assert record["quality"]["after"] > 5 * math.exp(record["losses"][-1]["loss"]), "digits are not what it learnt"


def test_a_base_model_learns_to_classify_with_a_new_head(tmp_path):
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, hidden_dropout_prob=0.0
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "bert")
    for split, count in (("train", 64), ("validation", 16)):
        rows = [json.dumps({"text": "aab" if i % 2 else "xyz", "label": "a" if i % 2 else "x"}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    data = DataConfig(data=str(tmp_path), split="train", max_tokens=None)
    out = tmp_path / "out"
    record = sparsify_checkpoint(str(tmp_path / "bert"), out, **options(data, task="sequence-classification", train={"steps": 12}))
    assert (record["metric"], record["new_head"]) == ("accuracy", True)
    assert record["quality"]["after"] == 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.label2id == {"a": 0, "x": 1}
    assert record["activations"]["after"]["mean"]["zero_frac"] > record["activations"]["before"]["mean"]["zero_frac"]


def test_distilling_loads_the_source_again_as_a_frozen_teacher(llama, text, tmp_path, monkeypatch):
    seen = {}

    def spy(model, sites, data, config, train, *, teacher, **more):
        seen.update(teacher=teacher, model=model)
        return real(model, sites, data, config, train, teacher=teacher, **more)

    real = sparsify.sparsify
    monkeypatch.setattr(sparsify, "sparsify", spy)
    arguments = options(text, train={"steps": 1})
    config = replace(arguments["config"], distill=DistillConfig())
    record = sparsify_checkpoint(llama, tmp_path / "out", **{**arguments, "config": config})
    assert seen["teacher"] is not seen["model"]
    assert not any(p.requires_grad for p in seen["teacher"].parameters())
    assert not seen["teacher"].training
    weights = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in seen["teacher"].state_dict().items())
    assert record["config"]["distill"]["temperature"] == 1.0
    assert "distill_kl" in record["parts"][0]
    assert "| distilled from the source | yes |" in (tmp_path / "out" / "README.md").read_text()


# -- a killed run ----------------------------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, steps):
    """Kill the next run in its step after ``steps``."""
    from moeify.train import loop

    real, left = loop._Order.micro_batches, [steps]

    def micro_batches(self, step):
        if left[0] == 0:
            left[0] = -1
            raise Stop
        left[0] -= 1
        return real(self, step)

    monkeypatch.setattr(loop._Order, "micro_batches", micro_batches)


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_killed_run_continues_at_its_step_to_the_same_result(made, llama, text, tmp_path, monkeypatch):
    board = {"tensorboard": tmp_path / "board"} if has_tensorboard() else {}
    arguments = options(text, train={"save_every": 2}, **board)
    stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "train" / "step-00000004").is_dir()
    measured = []
    real = sparsify.measure_task
    monkeypatch.setattr(sparsify, "measure_task", lambda *a, **k: measured.append(1) or real(*a, **k))
    arguments["train"] = replace(arguments["train"], micro_sequences=2, save_every=3)  # what may change
    record = sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    assert len(measured) == 1, "not the source again"
    whole = sparsify_checkpoint(llama, tmp_path / "whole", **options(text))
    losses = [[point["loss"] for point in found["losses"]] for found in (record, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert record["quality"] == pytest.approx(whole["quality"], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".txt" and p.name != "board") == ["out", "whole"]
    if board:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(board["tensorboard"])).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11)), "each step once"
        assert {"train/sparsity_loss", "validation/perplexity"} <= set(events.Tags()["scalars"])
        assert events.Scalars("validation/perplexity")[-1].value == pytest.approx(record["quality"]["after"], rel=1e-5)


def test_a_run_killed_while_it_deletes_its_state_is_finished(llama, text, tmp_path, monkeypatch):
    arguments = options(text, train={"steps": 2})
    monkeypatch.setattr(sparsify, "remove_work", lambda _: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    monkeypatch.undo()
    kept = weights_of(tmp_path / "out")
    monkeypatch.setattr(sparsify, "sparsify", None)  # nothing is trained again
    record = sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    assert record == json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert weights_of(tmp_path / "out") == kept
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(CheckpointError, match="exists and is not empty; --overwrite replaces it"):
        sparsify_checkpoint(llama, tmp_path / "out", **arguments)


@pytest.mark.parametrize("change", ["seed", "weights", "penalty", "data", "validation"])
def test_the_state_of_another_run_is_neither_used_nor_deleted(llama, text, tmp_path, monkeypatch, change):
    arguments = options(text, train={"steps": 4, "save_every": 1})
    source = str(shutil.copytree(llama, tmp_path / "llama"))
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        sparsify_checkpoint(source, tmp_path / "out", **arguments)
    kept = sorted((tmp_path / "out.work").rglob("*"))
    if change == "seed":
        arguments["train"] = replace(arguments["train"], seed=1)
    elif change == "weights":
        tiny.edit_tensors(tmp_path / "llama", lambda tensors: tensors["model.norm.weight"].mul_(2))  # under the same name
    elif change == "penalty":
        arguments["config"] = SparsifyConfig(enforcement=EnforcementConfig(weight=0.06, schedule="constant"))
    elif change == "data":
        arguments["data"] = replace(text, max_tokens=1600)
    else:
        arguments["validation"] = replace(text, split="validation", max_tokens=32)
    message = {"seed": "train.seed was 0, is 1", "penalty": r"config.enforcement.weight was 0.05, is 0.06"}.get(change, "was .*, is")
    with pytest.raises(CheckpointError, match=f"is the state of another run .*{message}.*another --out, or --overwrite"):
        sparsify_checkpoint(source, tmp_path / "out", **arguments)
    assert sorted((tmp_path / "out.work").rglob("*")) == kept
    assert not (tmp_path / "out").exists()
    record = sparsify_checkpoint(source, tmp_path / "out", **arguments, overwrite=True)
    assert len(record["losses"]) == 4


def test_a_run_that_kept_no_step_does_not_stand_in_the_way_of_another(llama, text, tmp_path, monkeypatch):
    arguments = options(text, train={"steps": 2})
    stop_after(monkeypatch, 0)
    with pytest.raises(Stop):
        sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    assert (tmp_path / "out.work" / "before.json").exists()
    arguments["train"] = replace(arguments["train"], seed=1)
    assert sparsify_checkpoint(llama, tmp_path / "out", **arguments)["train"]["seed"] == 1


def test_overwrite_continues_the_state_of_the_same_run(llama, text, tmp_path, monkeypatch):
    arguments = options(text, train={"steps": 4}, overwrite=True)
    stop_after(monkeypatch, 3)
    with pytest.raises(Stop):
        sparsify_checkpoint(llama, tmp_path / "out", **arguments)
    stop_after(monkeypatch, 1)  # one step is left: all others were saved, at least one in twenty
    sparsify_checkpoint(llama, tmp_path / "out", **arguments)


# -- what is refused -------------------------------------------------------------------------------------------------------------------


def refused(error, message, source, out, **arguments):
    """Nothing is trained, nothing is left."""
    before = {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")}
    with pytest.raises(error, match=message):
        sparsify_checkpoint(source, out, **arguments)
    assert {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")} == before


def test_a_penalty_on_activations_that_are_never_zero_is_refused(llama, text, tmp_path):
    config = SparsifyConfig(activation="keep", enforcement=EnforcementConfig(loss="l1", on="activations"))
    refused(ConfigError, "has the activation silu, which is never zero", llama, tmp_path / "out", **options(text) | {"config": config})


def test_a_penalty_on_activations_that_a_policy_keeps_and_are_never_zero_is_refused(llama, text, tmp_path):
    enforcement = EnforcementConfig(on="activations", layer_weights={LAYERS[1]: 2.0})
    config = SparsifyConfig(policy={LAYERS[0]: None}, enforcement=enforcement)
    refused(ConfigError, "has the activation silu, which is never zero", llama, tmp_path / "out", **options(text) | {"config": config})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"model.layers.7.mlp": None}, "policy 'model.layers.7.mlp' matches no FFN"),
        ({LAYERS[0]: {"activate": "relu2"}}, "unknown option 'activate' of ActivationConfig; did you mean 'activation'"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(llama, text, tmp_path, policy, message):
    config = SparsifyConfig(policy=policy)
    refused(ConfigError, message, llama, tmp_path / "out", **options(text) | {"config": config})


def test_a_converted_model_is_refused(text, tmp_path):
    source = str(tiny.save_converted_tiny(tmp_path / "moe"))
    refused(UnsupportedModelError, "is converted already; give the dense checkpoint", source, tmp_path / "out", **options(text))


def test_a_new_head_is_no_teacher(llama, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "a", "label": i % 2}) + "\n" for i in range(40)))
    data = DataConfig(data=str(tmp_path / "data.jsonl"), split="train")
    arguments = options(data, task="sequence-classification")
    arguments["config"] = SparsifyConfig(distill=DistillConfig())
    refused(ConfigError, "--distill: the head of .* is new and has nothing to teach", llama, tmp_path / "out", **arguments)


def test_fewer_tokens_than_a_window_in_a_batch_are_refused(llama, text, tmp_path):
    refused(ConfigError, "--batch-tokens 15 is less than one window of 16", llama, tmp_path / "out", **options(text, batch_tokens=15))


def test_data_without_the_validation_split_is_refused_before_loading(llama, tmp_path):
    (tmp_path / "train-0.jsonl").write_text('{"text": "a"}\n')
    data = DataConfig(data=str(tmp_path), split="train")
    refused(DataError, "has no split 'validation'; it has train", "nothing", tmp_path / "out", **options(data))


def test_an_output_that_is_in_the_way_is_refused_before_loading(text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(CheckpointError, "exists and is not empty; choose another --out", "nothing", tmp_path / "out", **options(text))
