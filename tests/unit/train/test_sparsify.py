"""Training for sparse activations: fewer are active, the model stays a plain one, and what makes no sense is refused before any work."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import convert_tiny, tiny_inputs, tiny_llama
from training import F32, Dies, DyingData, text
from transformers import AutoModelForCausalLM

from moeify import _config
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.sites import find_ffn_sites
from moeify.sparsity import EnforcementConfig
from moeify.train.distill import Distillation, DistillConfig
from moeify.train.loop import TrainConfig, train
from moeify.train.sparsify import Sparsification, SparsifyConfig, sparsify

LAYER = "model.layers.0.mlp"
STEPS = TrainConfig(steps=30, lr=1e-2, log_every=1, **F32)


def silu():
    model = tiny_llama(hidden_act="silu")
    return model, find_ffn_sites(model, tiny_inputs())


@pytest.mark.parametrize("anneal", [0.0, 0.5, 1.0])
def test_sparsify_makes_fewer_neurons_active_and_saves_a_plain_relu_checkpoint(anneal, tmp_path):
    model, sites = silu()
    data = text(vocab=200)
    config = SparsifyConfig(anneal_frac=anneal, enforcement=EnforcementConfig(weight=0.1, schedule="constant"))
    record = sparsify(model, sites, data, config, STEPS)
    mixes = [entry["activation_mix"] for entry in record.parts]
    assert mixes[-1] == 1
    assert (mixes[0] == 1) == (anneal == 0)
    assert mixes == sorted(mixes)
    assert mixes.index(1) == int(anneal * (STEPS.steps - 1))
    penalties = [entry["sparsity_loss"] for entry in record.parts]
    assert penalties[-1] < 0.7 * penalties[0]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model.save_pretrained(tmp_path)
    assert '"hidden_act": "relu"' in (tmp_path / "config.json").read_text()
    assert "moeify" not in (tmp_path / "config.json").read_text()
    inputs = {key: value for key, value in data.tensors.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        pytest.param({"activation": "relu2"}, ["relu2", "relu2"], id="relu2"),
        pytest.param({"policy": {LAYER: None}}, ["silu", "relu"], id="one layer kept"),
        pytest.param({"activation": "relu2", "policy": {"re:.*1.mlp": {"activation": "relu"}}}, ["relu2", "relu"], id="two functions"),
        pytest.param({"policy": {LAYER: None}, "anneal_frac": 0.5}, ["silu", "relu"], id="one layer kept, the other annealed"),
        pytest.param({"policy": {LAYER: {"threshold": 0.5}}}, ["shifted_relu:0.5", "relu"], id="two thresholds"),
    ],
)
def test_sparsify_with_a_policy_gives_each_ffn_its_function(options, found):
    model, sites = silu()
    record = sparsify(model, sites, text(vocab=200), SparsifyConfig(**options), replace(STEPS, steps=3))
    assert [site.activation for site in find_ffn_sites(model, tiny_inputs())] == found
    assert record.parts[-1]["activation_mix"] == 1


def test_sparsify_config_without_a_policy_is_written_as_before_there_was_one():
    """Stages on disk are found by what is written."""
    assert _config.to_dict(SparsifyConfig()).keys() == {"activation", "threshold", "anneal_frac", "enforcement", "distill"}
    config = SparsifyConfig(policy={LAYER: None, "re:.*": {"activation": "relu2"}})
    assert _config.from_dict(SparsifyConfig, _config.to_dict(config)) == config


def test_sparsify_without_weight_and_activation_is_train():
    model, sites = silu()
    other = copy.deepcopy(model)
    config = SparsifyConfig(activation="keep", enforcement=EnforcementConfig(weight=0.0))
    record = sparsify(model, sites, text(), config, TrainConfig(steps=3, **F32))
    assert record.losses == train(other, text(), TrainConfig(steps=3, **F32)).losses
    assert model.config.hidden_act == "silu"


def test_sparsify_with_a_teacher_stays_nearer_to_it():
    kls = []
    for weight in (0.0, 3.0):
        model, sites = silu()
        distill = DistillConfig(logits_weight=weight, ffn_weight=1e-9, task_weight=1.0)
        record = sparsify(model, sites, text(vocab=200), SparsifyConfig(distill=distill), STEPS, teacher=silu()[0])
        with Distillation(model, silu()[0], DistillConfig()) as part:
            model(**text(vocab=200).tensors)
            kls.append(part.values()["distill_kl"].item())
        assert {"task_loss", "distill_ffn", "sparsity_loss", "sparsity_weight", "activation_mix"} <= record.parts[-1].keys()
    assert kls[1] < 0.5 * kls[0]


def test_sparsify_when_it_died_while_annealing_goes_on_as_if_it_had_not(tmp_path):
    config = SparsifyConfig(anneal_frac=0.9, enforcement=EnforcementConfig(weight=0.03))
    options = {"steps": 6, "batch_sequences": 4, "lr": 1e-2, "save_every": 2, "log_every": 1} | F32
    whole = sparsify(*silu(), text(), config, TrainConfig(**options))
    with pytest.raises(Dies):
        sparsify(*silu(), DyingData(text(), at=6), config, TrainConfig(**options), state=tmp_path)
    model, sites = silu()
    again = sparsify(model, sites, text(), config, TrainConfig(**options), state=tmp_path)
    assert again.losses == whole.losses
    assert again.parts == whole.parts
    fresh, sites = silu()
    assert sparsify(fresh, sites, text(), config, TrainConfig(**options), state=tmp_path).losses == whole.losses
    assert fresh.config.hidden_act == "relu", "a finished run's model is finished, too"
    with torch.no_grad():
        assert torch.equal(fresh(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


def test_sparsify_of_a_model_that_computes_relu_already_has_nothing_to_anneal():
    config = SparsifyConfig(anneal_frac=0.5, enforcement=EnforcementConfig(weight=0.03))
    records = []
    for one in (config, replace(config, anneal_frac=0.0)):
        model = tiny_llama()
        records.append(sparsify(model, find_ffn_sites(model, tiny_inputs()), text(), one, replace(STEPS, steps=3)))
    assert records[0].losses == records[1].losses
    assert [entry["activation_mix"] for entry in records[0].parts] == [1, 1, 1]


class Unread:
    """Data that must not be touched."""

    def __len__(self):
        raise AssertionError("work began")


@pytest.mark.parametrize("loss", ["l1", "hoyer"])
def test_sparsify_when_raw_activations_are_never_zero_refuses_before_any_work(loss):
    model, sites = silu()
    config = SparsifyConfig(activation="keep", enforcement=EnforcementConfig(loss=loss, on="activations"))
    with pytest.raises(ConfigError, match=r"silu, which is never zero.*change the activation to relu"):
        sparsify(model, sites, Unread(), config, STEPS, state=None)


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        pytest.param(SparsifyConfig(distill=DistillConfig()), False, "distill is given without a teacher", id="no teacher"),
        pytest.param(SparsifyConfig(), True, "a teacher is given without distill", id="teacher for nothing"),
        pytest.param(
            SparsifyConfig(enforcement=EnforcementConfig(layer_weights={"x": 1.0})), False, "layer_weights|matches no", id="layer"
        ),
        pytest.param(SparsifyConfig(enforcement=EnforcementConfig(layer_weights={"re:.*": 0.0})), False, "leaves no FFN", id="no layer"),
        pytest.param(SparsifyConfig(policy={"model.layers.7.mlp": None}), False, "matches no FFN; did you mean", id="policy of no layer"),
    ],
)
def test_sparsify_when_options_do_not_fit_refuses_and_leaves_the_model(config, teacher, message):
    model, sites = silu()
    with pytest.raises(ConfigError, match=message):
        sparsify(model, sites, Unread(), config, STEPS, teacher=silu()[0] if teacher else None)
    assert model.config.hidden_act == "silu"
    assert not model._forward_pre_hooks


def test_sparsify_of_a_converted_model_is_refused_and_leaves_no_hook():
    model = tiny_llama()
    sites = find_ffn_sites(model, tiny_inputs())
    convert_tiny(model)
    config = SparsifyConfig(distill=DistillConfig())
    with pytest.raises(UnsupportedModelError, match="is converted"):
        sparsify(model, sites, Unread(), config, STEPS, teacher=tiny_llama())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal_frac": 1.5}, "anneal_frac must be in"),
        ({"activation": "keep", "anneal_frac": 0.5}, "belong to activation 'relu'"),
        ({"activation": "keep", "threshold": 0.5}, "belong to activation 'relu'"),
        ({"activation": "keep", "policy": {"a": None}}, "belong to activation 'relu'"),
        ({"activation": "relu2", "threshold": 0.5}, "threshold is for the activation 'relu'"),
        ({"policy": {"re:(": None}}, "is not a regular expression"),
        ({"threshold": float("inf")}, "threshold must be finite"),
    ],
)
def test_sparsify_config_when_it_makes_no_sense_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        SparsifyConfig(**options)


def test_sparsification_when_its_length_is_told_later_follows_it():
    model, sites = silu()
    with Sparsification(
        model, sites, SparsifyConfig(anneal_frac=1.0, enforcement=EnforcementConfig(schedule="linear", weight=2.0))
    ) as part:
        assert part.values()["activation_mix"] == 0
        part.total_steps = 11
        part.set_step(5)
        assert part.values()["activation_mix"] == 0.5
        assert part.values()["sparsity_weight"] == 1
    assert [site.activation for site in part.sites] == ["relu", "relu"]
