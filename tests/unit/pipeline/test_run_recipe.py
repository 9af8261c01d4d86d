"""What the stages of a recipe are made from: starting models, identities, tokens, non-zeros."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from moeify._config import from_dict
from moeify._files import locked
from moeify._progress import NO_PROGRESS
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, MoeifyError
from moeify.hf.inputs import example_inputs
from moeify.pipeline.content import data_id, model_id
from moeify.pipeline.recipe import RecipeConfig
from moeify.pipeline.run_recipe import run_recipe, run_stages
from moeify.pipeline.seed_run import SeedRun, count_nonzeros
from moeify.pipeline.stages import Stage, Stages, StageTakenError, open_folder
from moeify.pipeline.start import start_model
from moeify.sites import find_ffn_sites

GPT = {"model_type": "gpt2", "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}


def recipe(**changes):
    data = {"data": "builtin:pydoc"}
    base = {"name": "r", "metric": "perplexity", "task": "causal-lm", "model": {"architecture": GPT, "tokenizer": "bytes"}}
    rest = {"data": data, "validation": data, "train": {"steps": 10}, "variant": [{"name": "a"}]}
    return from_dict(RecipeConfig, {**base, **rest, **changes})


def test_start_model_of_an_architecture_takes_its_vocabulary_from_the_tokenizer():
    loaded = start_model(recipe(), seed=3)
    assert (loaded.model.config.vocab_size, loaded.processor.model_max_length, loaded.task) == (256, 32, "causal-lm")
    assert loaded.model.config.bos_token_id is None
    assert torch.equal(loaded.model.transformer.wte.weight, start_model(recipe(), seed=3).model.transformer.wte.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "from scratch needs a task"),
        ({"model": {"architecture": GPT}}, "needs a tokenizer: 'bytes'"),
    ],
)
def test_start_model_without_a_task_or_tokenizer_says_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        start_model(recipe(**changes), seed=0)


def test_start_model_of_a_checkpoint_with_a_head_of_another_metric_is_refused(tmp_path):
    tiny.save_dense_tiny(tmp_path / "dense")
    model = {"source": str(tmp_path / "dense")}
    assert start_model(recipe(model=model, task=None), seed=0).task == "causal-lm"
    with pytest.raises(ConfigError, match="the metric of a recipe for causal-lm is perplexity, not accuracy"):
        start_model(recipe(model=model, task=None, metric="accuracy"), seed=0)


def test_identities_are_of_the_content_and_not_of_the_place(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/file.txt").write_text(text)
    ids = [data_id(DataConfig(data=str(tmp_path / name))) for name in "abc"]
    assert ids[0] == ids[1] != ids[2]
    (tmp_path / "b/sub/file.txt").rename(tmp_path / "b/sub/other.txt")
    assert data_id(DataConfig(data=str(tmp_path / "b"))) != ids[0], "names of files decide splits"
    assert data_id(DataConfig(data=str(tmp_path / "a"), window=7)) != ids[0]
    assert data_id(DataConfig(data="org/set"))["data"] == "org/set"
    assert "python" in data_id(DataConfig(data="builtin:pydoc"))
    models = [model_id(recipe(model={"source": str(tmp_path / name)})) for name in "ac"]
    assert models[0] != models[1]
    assert model_id(recipe()) != model_id(recipe(model={"architecture": {**GPT, "n_layer": 2}, "tokenizer": "bytes"}))


@pytest.mark.parametrize(
    ("train", "validation", "shared"),
    [("all", "validation", True), ("train", "train", True), ("train", "validation", False), ("train", "all", True)],
)
def test_validation_on_training_data_is_said(tmp_path, train, validation, shared):
    data = {"data": "builtin:pydoc"}
    chosen = recipe(data={**data, "split": train}, validation={**data, "split": validation}, model={"source": str(tmp_path / "none")})
    said = []
    with pytest.raises(CheckpointError):  # the model is read next
        run_recipe(chosen, tmp_path / "out", stage="dense", say=said.append)
    assert said == ["[validation] has data that [data] trains on; give them different splits."] * shared


def test_count_nonzeros_counts_images_by_their_patches(monkeypatch):
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2, num_channels=1
        )
    )
    monkeypatch.setattr(importlib.import_module("moeify.pipeline.seed_run"), "_PROFILE_TOKENS", 12)
    read = []

    def batches():
        for _ in range(5):
            read.append(2)
            yield {"pixel_values": torch.rand(2, 1, 4, 4), "labels": torch.zeros(2)}

    assert set(count_nonzeros(model, batches())["neurons"].values()) == {16.0}
    assert sum(read) == 4, "12 tokens are three images, and so two batches"


def test_count_nonzeros_is_the_mean_over_real_tokens_of_each_ffn():
    model = tiny.tiny_llama()
    batch = {**tiny.tiny_inputs(), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["attention_mask"][1, 4:] = 0
    found = count_nonzeros(model, [batch])
    seen = {}
    for i in range(2):
        down = model.model.layers[i].mlp.down_proj
        down.register_forward_pre_hook(lambda _module, args, i=i: seen.__setitem__(i, args[0].detach().clone()))
    model(**batch)
    mask = batch["attention_mask"].bool()
    for i in range(2):
        h_TF = seen[i][mask]
        name = f"model.layers.{i}.mlp"
        assert found["nonzeros"][name] == pytest.approx((h_TF != 0).sum(1).double().mean().item())
        assert found["active"][name] == pytest.approx((h_TF.abs() > 1e-3).sum(1).double().mean().item())
    assert set(found["neurons"].values()) == {48.0}


def seed_run(tmp_path, chosen, **tokens):
    """A run whose stages have read so many tokens in so many seconds."""
    with NO_PROGRESS.task("", total=1) as overall:
        stages = Stages(tmp_path, owner="r", total=1, progress=NO_PROGRESS, overall=overall, say=print)
    run = SeedRun(chosen, stages, seed=0, device="cpu")
    for name, count in tokens.items():
        name = name.replace("__", ".")
        result = {"tokens": count, "steps": 10, "regress_tokens": 7 if name == "sparsify.a" else 0}
        run.done[name] = Stage(label=name, key=name, folder=Path(), result=result, seconds=1.0)
    return run


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        pytest.param({}, 16, id="all that the main variant read: (100 + 7 + 31 + 15) / 10 tokens a step"),
        pytest.param({"control": {"tokens": "train"}}, 10, id="the dense model is the control"),
        pytest.param(
            {"variant": [{"name": "a", "teacher": "dense", "sparsify": {"distill": {}}}]}, 26, id="a trained teacher was read for, too"
        ),
        pytest.param({"variant": [{"name": "a", "teacher": "dense", "sparsify": {}}]}, 16, id="no distillation, no teacher"),
        pytest.param({"train": {"steps": 50}}, 50, id="never less than the dense model"),
    ],
)
def test_the_control_gets_the_tokens_of_the_main_variant(tmp_path, changes, steps):
    read = {"dense": 100, "sparsify__a": 100, "convert__a": 31, "finetune__a": 15, "routers__a": 0, "sparsify__b": 999}
    run = seed_run(tmp_path, recipe(finetune={}, **changes), **read)
    assert run._control_steps() == steps


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        pytest.param({}, 16, id="as the control"),
        pytest.param({"control": {"tokens": "train"}}, 13, id="(100 + 7 + 15) / 10: its own conversion reads tokens, too"),
    ],
)
def test_the_baseline_is_trained_for_what_the_main_variant_is_trained_for(tmp_path, monkeypatch, changes, steps):
    chosen = recipe(moefication={}, finetune={}, **changes)
    run = seed_run(tmp_path, chosen, dense=100, sparsify__a=100, convert__a=31, finetune__a=15, routers__a=0)
    trained = []
    monkeypatch.setattr(run, "_train", lambda name, config, _variant: (trained.append(config.steps), run.done.update({name: None})))
    for rest in ("_measure", "_convert"):
        monkeypatch.setattr(run, rest, lambda *_: None)
    run.moefication()
    assert trained == [steps]


@pytest.mark.parametrize(("tokens", "steps"), [("recipe", (38, 1)), ("config", (7, 3))])
def test_heads_for_early_exit_read_as_many_examples_as_the_other_baseline(tmp_path, monkeypatch, tokens, steps):
    stage = {"batch_sequences": 4}
    config = {"train": {"steps": 7, **stage}, "ensemble": {"steps": 3, "batch_sequences": 8}}
    chosen = recipe(
        metric="accuracy",
        task="sequence-classification",
        train={"steps": 10, "batch_sequences": 10},
        finetune={},
        ztw={"config": config, "tokens": tokens},
    )
    run = seed_run(tmp_path, chosen, dense=100, sparsify__a=100, convert__a=31, finetune__a=15, routers__a=0)
    asked = []
    monkeypatch.setattr(run, "_run", lambda _name, inputs, _work, *, timed: asked.append((inputs["config"], timed)))
    run.ztw()
    ((found, timed),) = asked
    # 16 steps of 10 examples as MoEfication: 95 % by 4, 5 % by 8
    assert ((found["train"]["steps"], found["ensemble"]["steps"]), timed) == (steps, True)


def test_a_rule_to_sweep_is_the_variants_and_not_the_baselines(tmp_path, monkeypatch):
    run = seed_run(tmp_path, recipe(moefication={}, sweep={"rule": "dynk_max"}), convert__a=1, convert__moefication=1)
    rules = {}
    monkeypatch.setattr(run, "_sweep", lambda name, _converted, _data, *, rule: rules.update({name: rule}))
    run.sweep()
    assert rules == {"sweep.a.validation": "dynk_max", "sweep.moefication.validation": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({}, None, id="fine"),
        pytest.param({"sparsify": {"activation": "keep", "enforcement": {"on": "activations"}}}, "never zero", id="GELU, activations"),
        pytest.param({"sparsify": {"enforcement": {"layer_weights": {"x": 1.0}}}}, "'x' matches no FFN", id="layer weight"),
        pytest.param({"sparsify": {"distill": {}}}, "variant a: .* nothing to teach; set its teacher to 'dense'", id="drawn teacher"),
        pytest.param({"sparsify": {"distill": {}}, "teacher": "dense"}, None, id="trained teacher"),
        pytest.param({"convert": {"config": {"expert_size": 99}}}, "expert_size 99 is larger than the 32 neurons", id="experts"),
        pytest.param({"convert": {"calibration": {"window": 64}}}, "window 64 is more than the 32 positions", id="calibration's window"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_any_training(tmp_path, changes, message):
    chosen = recipe(variant=[{"name": "a", **changes}], convert={"config": {"expert_size": 4}, "calibration": {"window": 32}})
    start = start_model(chosen, seed=0)
    sites = find_ffn_sites(start.model, example_inputs(start.model))
    run = seed_run(tmp_path, chosen)
    if message is None:
        run._check_stages(start, sites)
        return
    with pytest.raises(MoeifyError, match=message):
        run._check_stages(start, sites)


def test_seeds_are_added_to_those_of_the_recipe(tmp_path):
    chosen = recipe(train={"steps": 40, "seed": 5})
    with NO_PROGRESS.task("", total=1) as overall:
        stages = Stages(tmp_path, owner="r", total=1, progress=NO_PROGRESS, overall=overall, say=print)
    config = SeedRun(chosen, stages, seed=2, device="cpu")._seeded(chosen.train)
    assert (config.seed, config.save_every) == (7, 2)
    assert SeedRun(chosen, stages, seed=2, device="cpu")._seeded(replace(chosen.train, save_every=9)).save_every == 9


def test_stages_of_another_seed_have_other_keys_the_starting_model_too(tmp_path):
    made = []
    for seed in (0, 1):
        with NO_PROGRESS.task("", total=1) as overall:
            stages = Stages(tmp_path, owner="r", total=1, progress=NO_PROGRESS, overall=overall, say=print)
        run, inputs = SeedRun(recipe(), stages, seed=seed, device="cpu"), {}

        def remember(label, found, _work, inputs=inputs):
            inputs[label.partition("/")[2]] = json.dumps(found)
            return Stage(label=label, key=label, folder=Path(), result={}, seconds=0.0)

        stages.run = remember
        run.dense()
        made.append(inputs)
    assert list(made[0]) == ["start", "dense", "dense.quality"], "all that is measured is read before anything is trained"
    assert all(made[0][name] != made[1][name] for name in made[0])


def test_run_stages_gives_the_folders_of_every_seed_and_runs_nothing_twice(tmp_path):
    data = {"data": "builtin:pydoc", "window": 16, "max_tokens": 256}
    config = recipe(
        seeds=[0, 1],
        data=data,
        validation={**data, "split": "validation"},
        train={"steps": 1, "batch_sequences": 2, "warmup_steps": 0},
        convert={"calibration": {"window": 16}},
    )
    one, two = run_stages(config, tmp_path / "out", stage="dense")
    assert set(one) == {"start", "dense", "dense.quality"}
    assert one["dense"].key != two["dense"].key
    assert all((seed["dense"].folder / "model" / "config.json").is_file() for seed in (one, two))
    again = run_stages(config, tmp_path / "out", stage="dense")
    assert [seed["dense"] for seed in again] == [one["dense"], two["dense"]]
    with pytest.raises(ConfigError, match="--stage 'dens' is unknown; did you mean 'dense'"):
        run_stages(config, tmp_path / "out", stage="dens")


def test_what_another_process_works_on_is_left_with_what_needs_it(tmp_path):
    data = {"data": "builtin:pydoc", "window": 16, "max_tokens": 256}
    config = recipe(
        data=data,
        validation={**data, "split": "validation"},
        train={"steps": 1, "batch_sequences": 2, "warmup_steps": 0},
        variant=[{"name": "a", "sparsify": {}}],
        convert={"calibration": {"window": 16}},
    )

    def made(root):
        found = [json.loads(path.read_text()) for path in root.glob("seed0/*/record.json")]
        return {record["label"].partition("/")[2]: record["key"] for record in found}

    run_stages(config, tmp_path / "alone", stage="sparsify")
    keys = made(tmp_path / "alone")
    for taken, left in (
        ("dense", {"dense", "dense.quality"}),
        ("sparsify.a", {"sparsify.a", "sparsify.a.quality"}),
        ("sparsify.a.quality", {"sparsify.a.quality"}),
    ):
        shared = tmp_path / taken
        open_folder(shared, owner="r")
        with locked(shared / f"{keys[taken]}.lock"), pytest.raises(StageTakenError, match=f"{taken}: another process works on it"):
            run_stages(config, shared, stage="convert", wait=False)
        others = {"convert.a"} if taken != "sparsify.a" else set()
        assert set(made(shared)) == set(keys) - left | others
