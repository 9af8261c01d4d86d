"""Projections replaced before conversion or training: what is made and recorded, what a kill leaves, what is refused."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from families.models import build

from moeify import CalibrationConfig, ConvertConfig, cli, convert_checkpoint, load_model, moe_layers
from moeify.data import DataConfig
from moeify.errors import ConfigError, MoeifyError, UnsupportedModelError
from moeify.layers import MoEProjection
from moeify.pipeline import ProjectionsConfig, sparsify_checkpoint
from moeify.routers import NormRouterConfig
from moeify.select import DynKMax
from moeify.sites import ProjectionMLP, find_ffn_sites, replaced_projections
from moeify.sparsity import EnforcementConfig
from moeify.train import project
from moeify.train.distill import DistillConfig
from moeify.train.fit import RouterTrainConfig
from moeify.train.loop import TrainConfig
from moeify.train.sparsify import SparsifyConfig

ALL = ProjectionsConfig(attention=("q", "k", "v", "o"), flops_factor=2.0, tokens=600, epochs=3, batch_tokens=64)
CONVERT = ConvertConfig(
    expert_size=8,
    projection_expert_size=4,
    router=NormRouterConfig(width=8),
    projection_router=NormRouterConfig(width=4),
    rule=DynKMax(tau=0.0),
)
CALIBRATION = CalibrationConfig(target_active=0.5, max_tokens=1200, window=16, router=RouterTrainConfig(epochs=1, batch_tokens=128))
NAMES = [f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in "qkvo"]


class Stop(Exception):  # noqa: N818 - a kill
    pass


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint and text of two splits."""
    root = tmp_path_factory.mktemp("project")
    tiny.save_dense_tiny(root / "dense")
    for split, count in (("train", 200), ("validation", 20)):
        (root / f"{split}.txt").write_text("some words of text " * count)
    return root


def data(folder, **changes):
    return DataConfig(data=str(folder), split="train", **{"window": 16, "max_tokens": 1200} | changes)


def converted(folder, out, **changes):
    options = {"data": data(folder), "config": CONVERT, "calibration": CALIBRATION, "projections": ALL}
    return convert_checkpoint(str(folder / "dense"), out, **(options | changes))


def sparsified(folder, out, **changes):
    options = {
        "data": data(folder, max_tokens=None),
        "config": SparsifyConfig(enforcement=EnforcementConfig(weight=0.01, schedule="constant")),
        "train": TrainConfig(steps=6, batch_sequences=4, lr=1e-3, compute="float32", save_every=2),
        "projections": ALL,
    }
    return sparsify_checkpoint(str(folder / "dense"), out, **(options | changes))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    return out, converted(folder, out / "moe"), sparsified(folder, out / "sparse")


def weights(out):
    model, _ = load_model(out)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_convert_checkpoint_with_projections_has_five_moe_layers_a_block(made):
    out, record, _ = made
    model, _ = load_model(out / "moe")
    layers = moe_layers(model)
    assert {name for name, moe in layers.items() if isinstance(moe, MoEProjection)} == set(NAMES)
    assert len(layers) == 2 * 5
    assert record["projections"]["layers"] == 8
    assert set(record["projections"]["errors"]) == set(NAMES)
    assert all(error["after"] < 0.1 for error in record["projections"]["errors"].values())
    assert 600 <= record["projections"]["tokens"] < 1200
    assert json.loads((out / "moe" / "moeify.json").read_text())["calibration"]["projections"] == json.loads(
        json.dumps(record["projections"])
    )
    card = (out / "moe" / "README.md").read_text()
    assert "there is no equal dense model" in card and "| linear layers replaced by MLPs | 8 (q, k, v, o), each of 2 times" in card
    assert not (out / "moe.work").exists()


def test_convert_checkpoint_with_projections_fits_what_it_puts_in(made, folder):
    """Dense mode of the result against the source: near, and nearer than with random replacements."""
    dense, tokenizer = load_model(folder / "dense")
    model, _ = load_model(made[0] / "moe")
    from moeify import set_mode

    set_mode(model, "dense")
    ids = tokenizer("some words of text some words of", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, logits = dense(ids).logits, model(ids).logits
        for mlp in (m for m in model.modules() if isinstance(m, ProjectionMLP)):
            mlp.up.reset_parameters()
        random = model(ids).logits
    assert (logits - expected).norm() < 0.5 * (random - expected).norm()


def test_sparsify_checkpoint_with_projections_trains_all_sites_and_loads_with_moeify(made, folder):
    out, _, record = made
    model, _ = load_model(out / "sparse")
    assert set(replaced_projections(model)) == set(NAMES)
    assert not moe_layers(model)
    sites = find_ffn_sites(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert set(record["activations"]["after"]) == {"mean", *(site.name for site in sites)} >= set(NAMES)
    assert record["projections"]["quality"] > 0
    assert set(record["parts"][0]) >= {"sparsity_loss", "sparsity_weight"}
    card = (out / "sparse" / "README.md").read_text()
    assert "loads with `moeify` only" in card and "ordinary dense" not in card and "quality with them, before training" in card
    assert json.loads((out / "sparse" / "sparsify.json").read_text())["projections"]["config"]["attention"] == ["q", "k", "v", "o"]


def test_sparsify_checkpoint_enforces_sparsity_on_projections(made, folder, tmp_path):
    strong = SparsifyConfig(enforcement=EnforcementConfig(weight=3.0, schedule="constant"))
    train = TrainConfig(steps=30, batch_sequences=4, lr=1e-2, compute="float32", save_every=30)
    record = sparsified(folder, tmp_path / "strong", config=strong, train=train)
    weak = made[2]["activations"]["after"]
    few = [record["activations"]["after"][name]["nonzeros_per_token"] < weak[name]["nonzeros_per_token"] for name in NAMES]
    assert sum(few) >= 7


def test_convert_checkpoint_takes_a_sparsified_replaced_checkpoint(made, folder, tmp_path):
    convert_checkpoint(str(made[0] / "sparse"), tmp_path / "moe", data=data(folder), config=CONVERT, calibration=CALIBRATION)
    model, _ = load_model(tmp_path / "moe")
    assert len(moe_layers(model)) == 2 * 5
    assert "there is no equal dense model" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["convert", "sparsify"])
def test_killed_while_projections_are_distilled_goes_on_and_gives_equal_weights(kind, made, folder, tmp_path, monkeypatch):
    real, calls = project.write_tensors, []

    def dies(path, *args):
        calls.append(path.name)
        if len(calls) == 4:
            raise Stop
        real(path, *args)

    monkeypatch.setattr(project, "write_tensors", dies)
    make, name = (converted, "moe") if kind == "convert" else (sparsified, "sparse")
    with pytest.raises(Stop):
        make(folder, tmp_path / name)
    record = make(folder, tmp_path / name)
    assert len(calls) == 4 + 5  # of eight layers three were whole
    expected = weights(made[0] / name)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / name).items())
    assert record["projections"] == (made[1] if kind == "convert" else made[2])["projections"]
    assert not (tmp_path / f"{name}.work").exists()


def test_convert_killed_after_distillation_does_not_distil_again(made, folder, tmp_path, monkeypatch):
    from moeify.pipeline import convert

    real, calls = convert.write_fitted, []

    def dies(path, site):
        calls.append(path)
        if len(calls) == 3:
            raise Stop
        real(path, site)

    monkeypatch.setattr(convert, "write_fitted", dies)
    with pytest.raises(Stop):
        converted(folder, tmp_path / "moe")
    monkeypatch.setattr(project, "project_linear", lambda *_args, **_options: pytest.fail("distilled twice"))
    converted(folder, tmp_path / "moe")
    assert len(calls) == 3 + 8
    expected = weights(made[0] / "moe")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "moe").items())


@pytest.mark.parametrize("kind", ["convert", "sparsify"])
def test_killed_after_distillation_and_run_with_other_options_does_not_distil_again(kind, folder, tmp_path, monkeypatch):
    from moeify.pipeline import convert, sparsify

    make, name = (converted, "moe") if kind == "convert" else (sparsified, "sparse")
    module, step = (convert, "write_fitted") if kind == "convert" else (sparsify, "sparsify")
    with monkeypatch.context() as patch:
        patch.setattr(module, step, lambda *_args, **_options: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            make(folder, tmp_path / name)
    other = {"config": replace(CONVERT, expert_size=4)} if kind == "convert" else {"train": TrainConfig(steps=2, lr=1e-3)}
    monkeypatch.setattr(project, "project_linear", lambda *_args, **_options: pytest.fail("distilled again"))
    record = make(folder, tmp_path / name, **other)
    assert record["projections"]["layers"] == 8
    assert not (tmp_path / f"{name}.work").exists()
    with pytest.raises(pytest.fail.Exception):  # but other options of distillation do
        make(folder, tmp_path / f"{name}2", projections=replace(ALL, lr=1e-3))


def test_killed_in_distillation_and_run_without_it_leaves_nothing(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(project, "project_linear", lambda *_args, **_options: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            converted(folder, tmp_path / "moe")
    converted(folder, tmp_path / "moe", projections=None)
    assert not (tmp_path / "moe.work").exists()


@pytest.mark.parametrize("kind", ["convert", "sparsify"])
def test_what_is_wrong_after_distillation_is_refused_before_it(kind, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(project, "project_linear", lambda *_args, **_options: pytest.fail("distilled first"))
    if kind == "convert":
        cases = [
            (replace(CONVERT, projection_expert_size=400), "projection_expert_size|larger than the"),
            (replace(CONVERT, policy={"re:.*nothing": None}), "matches no"),
            (replace(CONVERT, policy={NAMES[1]: {"rule": {"name": "topk", "k": 1}}}), "one rule is calibrated"),
        ]
        for config, message in cases:
            with pytest.raises(ConfigError, match=message):
                converted(folder, tmp_path / "moe", config=config)
        return
    for config in (
        SparsifyConfig(enforcement=EnforcementConfig(layer_weights={"re:.*nothing": 0.0})),
        SparsifyConfig(policy={"re:.*nothing": None}),
    ):
        with pytest.raises(ConfigError, match="matches no"):
            sparsified(folder, tmp_path / "sparse", config=config)
    named = SparsifyConfig(enforcement=EnforcementConfig(layer_weights={NAMES[1]: 0.0}))
    with pytest.raises(pytest.fail.Exception, match="distilled first"):  # a name that the replaced model has is none of these
        sparsified(folder, tmp_path / "sparse", config=named)


def test_convert_checkpoint_records_what_replacing_cost_against_the_source(made, folder):
    """The result's own dense mode is the replaced model, which says nothing of that."""
    measured, after = made[1]["projections"]["measured"], made[1]["measured"]
    assert (measured["metric"], measured["sequences"]) == (after["metric"], after["sequences"])
    assert measured["quality"] == pytest.approx(after["dense_quality"], rel=1e-5)
    assert measured["quality_ratio"] == pytest.approx(measured["quality"] / measured["dense_quality"])
    assert measured["dense_quality"] != pytest.approx(measured["quality"], rel=1e-4)
    assert measured["kl"] > 0
    assert "with replaced layers, before conversion" in (made[0] / "moe" / "README.md").read_text()


def test_convert_killed_when_complete_is_found_finished_only_for_the_same_projections(folder, tmp_path, monkeypatch):
    from moeify.pipeline import convert

    with monkeypatch.context() as patch:
        patch.setattr(convert, "remove_work", lambda _work: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            converted(folder, tmp_path / "moe")
    other = replace(ALL, epochs=4)
    with pytest.raises(MoeifyError, match="overwrite"):
        converted(folder, tmp_path / "moe", projections=other)
    monkeypatch.setattr(project, "project_linear", lambda *_args, **_options: pytest.fail("distilled again"))
    assert converted(folder, tmp_path / "moe")["projections"]["layers"] == 8
    assert not (tmp_path / "moe.work").exists()


def test_a_subset_of_attention_and_a_pattern_are_what_is_replaced(folder, tmp_path):
    chosen = replace(ALL, attention=("o",), patterns=("model.layers.0.self_attn.v_proj",))
    record = sparsified(folder, tmp_path / "sparse", projections=chosen)
    assert set(record["projections"]["errors"]) == {NAMES[2], NAMES[3], NAMES[7]}


def test_sparsify_checkpoint_when_a_teacher_has_no_such_ffns_is_refused(folder, tmp_path):
    config = SparsifyConfig(distill=DistillConfig(ffn_weight=1.0))
    with pytest.raises(ConfigError, match="ffn_weight"):
        sparsified(folder, tmp_path / "sparse", config=config)


def test_convert_checkpoint_of_projections_that_are_replaced_already_is_refused(made, folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match="replaced already"):
        convert_checkpoint(
            str(made[0] / "sparse"), tmp_path / "moe", data=data(folder), config=CONVERT, calibration=CALIBRATION, projections=ALL
        )
    assert not (tmp_path / "moe.work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"attention": ()}, "both empty", id="nothing"),
        pytest.param({"attention": ("q", "w")}, "no projection 'w'", id="unknown role"),
        pytest.param({"attention": ("q", "q")}, "twice", id="twice"),
        pytest.param({"attention": ("q",), "tokens": 0}, "tokens", id="no token"),
        pytest.param({"patterns": ("re:(",)}, "re:", id="no pattern"),
    ],
)
def test_projections_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        ProjectionsConfig(**options)


# -- the command line ------------------------------------------------------------------------------------------------------------------


def run(capsys, *words):
    """Exit code, and what was printed to stdout and stderr."""
    code = cli.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


COMMON = ("--window", 16, "--projection-tokens", 300, "--projection-epochs", 1)


def test_convert_command_replaces_and_converts(folder, tmp_path, capsys):
    words = ("convert", folder / "dense", "--data", folder, "--out", tmp_path / "moe", "--attention", "q,o", "--json", "--max-tokens", 1200)
    code, out, err = run(
        capsys,
        *words,
        *COMMON,
        "--data-split",
        "train",
        "--router-epochs",
        1,
        "--projection-expert-size",
        4,
        "--projection-router-width",
        4,
    )
    assert code == 0, err
    assert json.loads(out)["projections"]["config"]["attention"] == ["q", "o"]
    model, _ = load_model(tmp_path / "moe")
    layers = moe_layers(model)
    assert sum(isinstance(moe, MoEProjection) for moe in layers.values()) == 4
    assert layers[NAMES[0]].num_experts == 4  # 16 neurons
    assert layers[NAMES[0]].router.config.width == 4


def test_sparsify_command_takes_patterns(folder, tmp_path, capsys):
    words = ("sparsify", folder / "dense", "--data", folder, "--out", tmp_path / "sparse", "--json", "--steps", 2, "--lr", 1e-4)
    patterns = ("--projections", r"re:.*\.0\.self_attn\.[qk]_proj", "--projections", NAMES[7])
    code, out, err = run(capsys, *words, *patterns, *COMMON, "--batch-sequences", 2)
    assert code == 0, err
    assert set(json.loads(out)["projections"]["errors"]) == {NAMES[0], NAMES[1], NAMES[7]}


def test_convert_command_of_attention_that_cannot_be_split_says_so_in_a_line(folder, tmp_path, capsys):
    for family in ("jetmoe", "rwkv"):
        model, _ = build(family)
        model.save_pretrained(tmp_path / family)
        tiny.byte_tokenizer().save_pretrained(tmp_path / family)
        code, _, err = run(
            capsys, "convert", tmp_path / family, "--data", folder, "--window", 8, "--out", tmp_path / "moe", "--attention", "q"
        )
        assert code == 2, err
        assert "by pattern" in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("--projections", "re:.*nothing"), "matches no linear layer", id="matches nothing"),
        pytest.param(("--attention", "q,w"), "must be one of 'q', 'k', 'v', 'o', got 'w'", id="unknown role"),
        pytest.param(("--attention", ""), "must be one of 'q', 'k', 'v', 'o', got ''", id="empty"),
        pytest.param(("--projection-epochs", 2), "--projection-epochs needs --attention", id="options alone"),
        pytest.param(("--attention", "q", "--projection-init", "svdd"), "init must be one of", id="unknown start"),
    ],
)
def test_convert_command_when_projections_are_wrong_says_so_in_a_line(words, message, folder, tmp_path, capsys):
    code, _, err = run(capsys, "convert", folder / "dense", "--data", folder, "--window", 16, "--out", tmp_path / "moe", *words)
    assert code == 2
    assert message in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "moe.work").exists()


@pytest.mark.parametrize("command", ["convert", "sparsify"])
def test_command_of_a_source_that_is_converted_or_replaced_already_says_so_in_a_line(command, made, folder, tmp_path, capsys):
    rest = ("--steps", 1, "--lr", 1e-4) if command == "sparsify" else ()
    for name, message in (("moe", "converted already"), ("sparse", "replaced already")):
        words = (command, made[0] / name, "--data", folder, "--window", 16, "--out", tmp_path / "out", "--attention", "q", *rest)
        code, _, err = run(capsys, *words)
        assert code == 2
        assert message in err and err.count("error:") == 1 and "Traceback" not in err
        assert not (tmp_path / "out").exists()
