"""Linear layers onto MLPs: the start holds what matters, the fit falls below a random start's, and what a kill leaves is used."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from families.models import build
from torch.nn import functional as F

from moeify import _config
from moeify.convert import replace_projections
from moeify.errors import ConfigError, DataError
from moeify.sites import ACTIVATIONS, ProjectionPart, ProjectionRecord
from moeify.train import layerwise, project
from moeify.train.fit import held_out_tokens
from moeify.train.project import ProjectConfig, project_layers, project_linear

CONFIG = ProjectConfig(epochs=10, batch_tokens=32, lr=1e-2, holdout_frac=0.2)
T, K, N = 400, 24, 16


def batches(count=8, *, vocab=64):
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, vocab, (4, 16), generator=random)} for _ in range(count)]


def layer(rank=N, *, bias=True):
    """Inputs off the origin, a weight of some rank, and a bias."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(T, K, generator=random) + torch.linspace(-1, 1, K)
    w = torch.randn(N, rank, generator=random) @ torch.randn(rank, K, generator=random)
    return x.bfloat16(), w, torch.randn(N, generator=random) if bias else None


def apply(tensors, x, activation="relu"):
    hidden = ACTIVATIONS[activation](F.linear(x.float(), tensors["up.weight"], tensors.get("up.bias")))
    return hidden, F.linear(hidden, tensors["down.weight"], tensors.get("down.bias"))


def relative(y, target):
    energy = target.square().sum(1)
    return ((y - target).square().sum(1) / (energy + 0.01 * energy.mean())).mean().item()


def records(model, **options):
    """q, k, v and o of the first layer."""
    return [replace(record, **options) for record in tiny.projection_records(model)[:4]]


@pytest.mark.parametrize("bias", [pytest.param(True, id="biases"), pytest.param(False, id="none")])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_svd_start_when_half_the_neurons_hold_the_rank_is_exact(activation, bias):
    x, w, b = layer(rank=4, bias=bias)
    tensors, errors = project_linear(x, w, b, ProjectConfig(epochs=1, lr=1e-12, activation=activation, holdout_frac=0.2), width=8, name="a")
    assert errors["before"] < 1e-4  # bfloat16
    assert relative(apply(tensors, x, activation)[1], F.linear(x.float(), w, b)) < 1e-4


def test_svd_start_when_neurons_are_few_takes_those_that_are_worth_most():
    """Two strong directions and many weak ones: both signs of the strong ones come before any of the weak."""
    x, w, b = torch.randn(4000, K, generator=torch.Generator().manual_seed(2)), torch.zeros(N, K), torch.zeros(N)
    w[torch.arange(N), torch.arange(N)] = torch.tensor([10.0, 10.0] + [0.1] * (N - 2))
    tensors, _ = project_linear(x.bfloat16(), w, b, ProjectConfig(epochs=1, lr=1e-12, shift=0.0), width=6, name="a")
    up = tensors["up.weight"].abs()
    assert (up[:, :2].square().sum(1) > 0.99 * up.square().sum(1)).sum() == 4


def test_svd_start_with_a_shift_has_a_smaller_error_of_fewer_zeros():
    x, w, b = layer()
    found = {
        shift: project_linear(x, w, b, ProjectConfig(epochs=1, lr=1e-12, shift=shift, holdout_frac=0.2), width=10, name="a")[1]
        for shift in (0.0, 1.0, 2.0)
    }
    assert found[0.0]["after"] > found[1.0]["after"] > found[2.0]["after"]
    assert found[0.0]["nonzeros"] < found[1.0]["nonzeros"] < found[2.0]["nonzeros"]


def test_project_linear_with_more_neurons_than_directions_uses_all_and_stays_finite():
    x, w, b = layer(rank=2)
    tensors, errors = project_linear(x, w, b, CONFIG, width=40, name="a")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["up.weight"].norm(dim=1).min() > 0
    assert errors["after"] < 1e-3


def test_project_linear_of_a_layer_of_zeros_gives_zeros():
    x, w, b = layer()
    tensors, errors = project_linear(x, torch.zeros_like(w), torch.zeros_like(b), CONFIG, width=8, name="a")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert apply(tensors, x)[1].abs().max() < 0.05
    assert errors["after"] >= 0


def test_project_linear_reports_the_relative_error_and_nonzeros_of_held_out_tokens():
    x, w, b = layer()
    for error in ("relative", "mse"):
        tensors, errors = project_linear(
            x, w, b, ProjectConfig(epochs=3, batch_tokens=64, error=error, holdout_frac=0.2), width=10, name="a"
        )
        hidden, y = apply(tensors, x)
        target, held_out = F.linear(x.float(), w, b), held_out_tokens(T, 0.2)
        energy = target.square().sum(1)
        expected = ((y - target).square().sum(1) / (energy + 0.01 * energy.mean()))[held_out].mean().item()
        assert errors["after"] == pytest.approx(expected, rel=0.05)
        assert errors["nonzeros"] == pytest.approx(hidden[held_out].count_nonzero().item() / held_out.sum().item(), rel=0.02)
        assert errors["after"] < errors["before"]


def test_project_linear_from_the_svd_start_needs_at_most_half_the_steps_of_a_random_one():
    x, w, b = layer()
    curves = {}
    for init in ("svd", "random"):
        seen = curves.setdefault(init, [])
        config = ProjectConfig(epochs=20, batch_tokens=32, init=init, holdout_frac=0.2)
        project_linear(x, w, b, config, width=10, name="a", watch=lambda _step, error, _penalty, seen=seen: seen.append(error))
    final = sum(curves["random"][-10:]) / 10
    means = [sum(curves["svd"][i : i + 10]) / 10 for i in range(0, len(curves["svd"]) - 10, 10)]
    assert next(i for i, mean in enumerate(means) if mean <= final) * 10 <= len(curves["random"]) / 2


def test_project_linear_with_a_penalty_that_grows_from_zero_leaves_fewer_nonzeros(monkeypatch):
    x, w, b = layer()
    plain = project_linear(x, w, b, ProjectConfig(epochs=10, batch_tokens=32, shift=1.0), width=10, name="a")[1]
    weights = []
    original = layerwise.fit_outputs

    def watched(*args, penalty_weight, **options):
        weights.extend(penalty_weight(step) for step in range(3))
        return original(*args, penalty_weight=penalty_weight, **options)

    monkeypatch.setattr(project, "fit_outputs", watched)
    sparse = project_linear(x, w, b, ProjectConfig(epochs=10, batch_tokens=32, shift=1.0, sparsity_weight=0.5), width=10, name="a")[1]
    assert sparse["nonzeros"] < 0.8 * plain["nonzeros"]
    steps = 10 * -(-380 // 32)
    assert weights == pytest.approx([0.0, 0.5 / (steps - 1), 1.0 / (steps - 1)])


def test_project_layers_gives_tensors_that_make_the_replaced_model_near_the_original(tmp_path):
    model = tiny.tiny_llama()
    chosen = [replace(record, width=2 * record.d_out) for record in records(model)]  # random weights have no directions that matter less
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = batches(1)[0]
    with torch.no_grad():
        expected = model(**inputs).logits
    found = project_layers(model, chosen, batches(), CONFIG, work=tmp_path / "work")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [*found] == [record.name for record in chosen]
    for record in chosen:
        (errors,) = found[record.name]["errors"].values()
        assert errors["after"] < 0.01
        assert 0 < errors["nonzeros"] <= record.width

    def distance(tensors):
        replaced = tiny.tiny_llama()
        replace_projections(replaced, chosen, tensors)
        with torch.no_grad():
            return (replaced(**inputs).logits - expected).norm().item()

    assert distance({name: parts["tensors"] for name, parts in found.items()}) < 0.1 * distance(None)


def test_project_layers_gives_mlps_of_layers_without_a_bias_biases_and_a_smaller_error(tmp_path):
    model = tiny.tiny_llama()
    plain = records(model)[1]  # k, narrow
    found = {}
    for record in (plain, replace(plain, adds_bias=True)):
        parts = project_layers(model, [record], batches(), CONFIG, work=tmp_path / str(record.adds_bias))[record.name]
        found[record.adds_bias] = parts["errors"][record.name]["after"]
        assert ("up.bias" in parts["tensors"]) == ("down.bias" in parts["tensors"]) == record.adds_bias
        replace_projections(tiny.tiny_llama(), [record], {record.name: parts["tensors"]})
    assert found[True] < 0.7 * found[False], found


def test_project_layers_stores_once_what_several_layers_read(tmp_path):
    model = tiny.tiny_llama()
    project_layers(model, records(model), batches(), ProjectConfig(epochs=1), work=tmp_path / "work")
    assert len([*(tmp_path / "work" / "inputs").glob("*.bf16")]) == 2  # q, k and v; o


def test_project_layers_of_a_fused_layer_fits_its_parts_to_their_rows(tmp_path):
    model, _ = build("gpt2")
    name = "transformer.h.0.attn.c_attn"
    d = model.config.n_embd
    parts = (
        ProjectionPart(name="q", rows=((0, d, d, 1),), width=d),
        ProjectionPart(name="k", rows=((d, d, d, 1),), width=None),
        ProjectionPart(name="v", rows=((2 * d, d, d, 1),), width=d // 2),
    )
    record = ProjectionRecord(name=name, d_in=d, d_out=3 * d, bias=True, parts=parts)
    found = project_layers(model, [record], batches(), CONFIG, work=tmp_path / "work")[name]
    assert set(found["errors"]) == {f"{name}.q", f"{name}.v"}
    caught = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, y: caught.append((args[0].flatten(0, 1), y.flatten(0, 1))))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    x, y = (torch.cat(part) for part in zip(*caught, strict=True))
    for part in (parts[0], parts[2]):
        tensors = {key.removeprefix(f"{part.name}."): t for key, t in found["tensors"].items() if key.startswith(f"{part.name}.")}
        assert relative(apply(tensors, x)[1], y[:, part.index_N()]) < 2 * found["errors"][f"{name}.{part.name}"]["after"] + 0.01
    replace_projections(model, [record], {name: found["tensors"]})


@pytest.fixture
def threads():
    """Sets torch's threads; afterwards they are as they were."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("workers", [1, 2])
def test_project_layers_when_killed_goes_on_and_gives_equal_tensors(workers, init, threads, tmp_path, monkeypatch):
    model = tiny.tiny_llama()
    alone = ProjectConfig(epochs=2, batch_tokens=32, init=init)
    chosen, config = records(model), replace(alone, workers=workers)
    threads(1)
    expected = project_layers(model, chosen, batches(), alone, work=tmp_path / "a")
    threads(workers)  # one for each layer, too: with other numbers sums differ in the last bit
    real, calls = project.write_tensors, []

    def dies(path, *args):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, *args)

    monkeypatch.setattr(project, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        project_layers(model, chosen, batches(), config, work=tmp_path / "b")
    before = len(calls)
    found = project_layers(model, chosen, batches(), config, work=tmp_path / "b")
    assert len(calls) - before == 4 - (before - 1)  # what was written whole is not fitted again
    for name, parts in expected.items():
        assert found[name]["errors"] == parts["errors"]
        assert all(torch.equal(found[name]["tensors"][key], tensor) for key, tensor in parts["tensors"].items())
    project_layers(model, chosen, batches(), ProjectConfig(epochs=1, batch_tokens=32), work=tmp_path / "b")  # another run
    assert len(calls) - before == 4 - (before - 1) + 4


def test_project_linear_draws_from_numbers_of_its_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    x, w, b = layer()
    project_linear(x, w, b, ProjectConfig(epochs=1, init="random"), width=4, name="a")
    assert torch.equal(torch.rand(3), expected)


def test_project_layers_refuses_what_it_cannot_do(tmp_path):
    model = tiny.tiny_llama()
    with pytest.raises(ConfigError, match="no linear layer"):
        project_layers(model, [], batches(), work=tmp_path / "work")
    with pytest.raises(DataError, match="no batch"):
        project_layers(model, records(model), [], work=tmp_path / "work")
    with pytest.raises(ConfigError, match="no exact zeros"):
        project_layers(model, records(model, activation="gelu"), batches(), ProjectConfig(sparsity_weight=1.0), work=tmp_path / "work")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"flops_factor": 0.0}, "flops_factor", id="no width"),
        pytest.param({"init": "svdd"}, "init must be one of", id="unknown start"),
        pytest.param({"error": "l1"}, "error must be one of", id="unknown error"),
        pytest.param({"shift": -1.0}, "shift", id="negative shift"),
        pytest.param({"activation": "rellu"}, "did you mean 'relu'", id="unknown function"),
        pytest.param({"activation": "silu", "sparsity_weight": 1.0}, "no exact zeros", id="penalty without zeros"),
        pytest.param({"epochs": 0}, "epochs", id="no epoch"),
        pytest.param({"sparsity_weight": -1.0}, "sparsity_weight", id="negative weight"),
    ],
)
def test_project_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        ProjectConfig(**options)


def test_project_config_when_written_as_json_reads_back_and_each_field_is_documented():
    config = ProjectConfig(sparsity_weight=0.5, init="random")
    assert _config.from_dict(ProjectConfig, json.loads(json.dumps(_config.to_dict(config)))) == config
    assert set(_config.field_docs(ProjectConfig)) == set(_config.to_dict(config))
