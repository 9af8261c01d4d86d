"""Layer-wise regression: the error falls, the rest of the model stays, and what a kill leaves is used."""

import copy
import json

import pytest
import tiny
import torch
from families.models import build

from moeify import _config
from moeify.errors import ConfigError
from moeify.sites import find_ffn_sites
from moeify.sparsity import set_activation
from moeify.train import layerwise, regress
from moeify.train.fit import held_out_tokens
from moeify.train.regress import RegressConfig, regress_layers

CONFIG = RegressConfig(epochs=20, batch_tokens=32, lr=1e-2, holdout_frac=0.2)


def batches(count=8, *, vocab=64):
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, vocab, (4, 16), generator=random)} for _ in range(count)]


def changed(family=None):
    """The teacher, the model with ReLU, and its sites."""
    teacher = tiny.tiny_llama(hidden_act="silu") if family is None else build(family)[0]
    model = copy.deepcopy(teacher)
    sites = find_ffn_sites(model, {"input_ids": batches(1)[0]["input_ids"][:1]})
    return teacher, model, set_activation(model, sites)


def watched(teacher, sites):
    """Input and output of each FFN over all tokens."""
    caught = {site.name: [] for site in sites}

    def keep(name):
        return lambda _m, args, y: caught[name].append((args[0].flatten(0, 1), y.flatten(0, 1)))

    handles = [teacher.get_submodule(site.name).register_forward_hook(keep(site.name)) for site in sites]
    with torch.no_grad():
        for batch in batches():
            teacher(**batch)
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for name, pairs in caught.items()}


def errors_of(teacher, model, sites):
    """Mean relative squared error of each FFN over the tokens that are held out."""
    found = {}
    for name, (x, y) in watched(teacher, sites).items():
        energy = y.square().sum(1)
        with torch.no_grad():
            error = (model.get_submodule(name)(x) - y).square().sum(1) / (energy + 0.01 * energy.mean())
        found[name] = error[held_out_tokens(len(x), 0.2)].mean().item()
    return found


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_regress_layers_brings_each_ffn_near_its_former_outputs_and_touches_nothing_else(tmp_path):
    teacher, model, sites = changed()
    start, kept, before = weights(model), weights(teacher), errors_of(teacher, model, sites)
    found = regress_layers(model, teacher, sites, batches(), CONFIG, work=tmp_path / "work")
    after = errors_of(teacher, model, sites)
    assert found.keys() == {site.name for site in sites}
    for name, error in found.items():
        assert after[name] < 0.5 * before[name]
        assert error["before"] == pytest.approx(before[name], rel=0.03)  # in bfloat16
        assert error["after"] == pytest.approx(after[name], rel=0.03)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "mlp" in name}
    assert all(torch.equal(value, kept[name]) for name, value in weights(teacher).items())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("family", [pytest.param("phi3", id="gate and up in one module"), pytest.param("gpt2", id="Conv1D, biases")])
def test_regress_layers_writes_into_every_layout(family, tmp_path):
    teacher, model, sites = changed(family)
    regress_layers(model, teacher, sites, batches(), CONFIG, work=tmp_path / "work")
    for name, (x_TD, y_TD) in watched(teacher, sites).items():
        with torch.no_grad():
            assert (model.get_submodule(name)(x_TD) - y_TD).square().sum() < 0.5 * y_TD.square().sum()


@pytest.mark.parametrize("workers", [1, 2])
def test_regress_layers_when_killed_goes_on_and_gives_equal_weights(workers, tmp_path, monkeypatch):
    teacher, expected, sites = changed()
    config = RegressConfig(epochs=2, batch_tokens=32, workers=workers)
    regress_layers(expected, teacher, sites, batches(), RegressConfig(epochs=2, batch_tokens=32), work=tmp_path / "a")
    real, calls = regress.write_tensors, []

    def dies(path, *args):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, *args)

    monkeypatch.setattr(regress, "write_tensors", dies)
    _, model, _ = changed()
    with pytest.raises(KeyboardInterrupt):
        regress_layers(model, teacher, sites, batches(), config, work=tmp_path / "b")
    _, model, _ = changed()
    regress_layers(model, teacher, sites, batches(), config, work=tmp_path / "b")
    assert len(calls) == 3
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())
    regress_layers(model, teacher, sites, batches(), config, work=tmp_path / "b")  # from other weights: another run
    assert len(calls) == 5


def test_regress_layers_fits_nothing_to_the_tokens_that_measure_it(tmp_path, monkeypatch):
    teacher, model, sites = changed()
    seen = []
    monkeypatch.setattr(
        layerwise, "minimise", lambda _leaves, loss_of, count, **_: seen.append(loss_of(torch.arange(count - 30, count)).item())
    )
    regress_layers(model, teacher, sites, batches(), CONFIG, work=tmp_path / "work")
    for name, (x, y) in watched(teacher, sites).items():
        energy = y.square().sum(1)
        error = (model.get_submodule(name)(x) - y).square().sum(1) / (energy + 0.01 * energy.mean())
        fitted = error[~held_out_tokens(len(x), 0.2)]
        assert seen.pop(0) == pytest.approx(fitted[-30:].mean().item(), rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"epochs": 0}, "epochs", id="no epoch"),
        pytest.param({"workers": 0}, "workers", id="no worker"),
        pytest.param({"lr": 0.0}, "lr", id="no learning rate"),
        pytest.param({"sparsity_weight": -1.0}, "sparsity_weight", id="negative weight"),
        pytest.param({"sparsity_loss": "hoyr"}, "did you mean 'hoyer'", id="unknown penalty"),
        pytest.param({"holdout_frac": 1.0}, "holdout_frac", id="nothing left"),
    ],
)
def test_regress_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        RegressConfig(**options)


def test_regress_config_when_written_as_json_reads_back_and_each_field_is_documented():
    config = RegressConfig(sparsity_weight=0.5)
    assert _config.from_dict(RegressConfig, json.loads(json.dumps(_config.to_dict(config)))) == config
    assert set(_config.field_docs(RegressConfig)) == set(_config.to_dict(config))
