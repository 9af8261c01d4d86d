"""What is measured, against plain loops; and that measuring changes nothing."""

import itertools

import pytest
import torch
from pretraining import PROBE, sites_of, tiny_gpt
from tiny import tiny_llama

from moeify.controls import set_mode
from moeify.errors import CheckpointError, DataError
from moeify.layers import moe_layers
from moeify.sites import permute_neurons
from moeify.ssd import SIMILARITIES, SSD, Monitor, SSDConfig
from moeify.ssd.monitor import adjusted_rand_index, correlation

CONFIG = SSDConfig(num_experts=8, selected=3, probe_neurons=12)


def attached(config=CONFIG, model=None):
    model = model or tiny_gpt()
    return model, SSD(model, sites_of(model), config, total_steps=100, probe=PROBE)


def inputs_and_activations(model):
    """x and h of every FFN over the probe, by one's own hooks."""
    found = {name: ([], []) for name in moe_layers(model)}
    handles = []
    for name, layer in moe_layers(model).items():
        for module, kept in zip(layer.projections(), found[name], strict=True):
            handles.append(module.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0].flatten(0, 1))))
    with torch.no_grad():
        losses = [model(**batch).loss for batch in PROBE]
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, both)) for name, both in found.items()}, torch.stack(losses).mean()


def coactivation(h_TF, neurons):
    """c_ij of all pairs, one pair at a time."""
    fires = (h_TF > 0).double()
    together = {(i, j): (fires[:, i] * fires[:, j]).sum() for i in neurons for j in neurons}
    return torch.stack(
        [
            together[i, j] / (together[i, i] * together[j, j]).sqrt() if together[i, j] else torch.tensor(0.0).double()
            for i, j in itertools.combinations(neurons, 2)
        ]
    )


def test_monitor_measures_what_the_formulas_say():
    model, ssd = attached()
    model.eval()
    ssd.begin(torch.optim.SGD(model.parameters(), lr=0.1))
    ssd.set_step(100)  # routers from centres
    found = ssd.monitor.measure(2, sparse=True)
    after, dense_loss = inputs_and_activations(model)
    for i, (name, layer) in enumerate(moe_layers(model).items()):
        x_TD, h_TF = after[name]
        assert found.sparsity[i] == pytest.approx((h_TF == 0).float().mean().item())
        mask_TE = layer.scores(x_TD).topk(3, dim=1).indices
        sums = [[h_TF[t, layer.bounds[e] : layer.bounds[e + 1]].sum().item() for e in row] for t, row in enumerate(mask_TE.tolist())]
        assert found.captured[i] == pytest.approx(sum(map(sum, sums)) / h_TF.sum().item(), rel=1e-4)
    assert found.signals.dense_loss == pytest.approx(dense_loss.item(), rel=1e-5)
    set_mode(model, "moe")
    with torch.no_grad():
        sparse_loss = torch.stack([model(**batch).loss for batch in PROBE]).mean().item()
    assert found.signals.sparse_loss == pytest.approx(sparse_loss, rel=1e-5)
    assert found.signals.sparse_loss != pytest.approx(dense_loss.item(), rel=1e-5)
    assert found.signals.sparsity == pytest.approx(sum(found.sparsity) / 2)


def test_coactivation_similarity_is_the_correlation_over_pairs():
    model, _ = attached()
    model.eval()
    monitor = Monitor(model, PROBE, CONFIG)
    assert monitor.measure(0, sparse=False).similarity == ()
    before, _ = inputs_and_activations(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = monitor.measure(1, sparse=False).similarity
    after, _ = inputs_and_activations(model)
    for i, name in enumerate(before):
        neurons = monitor.tensors()[f"{name}/neurons"].tolist()
        assert len(neurons) == 12
        pair = torch.stack([coactivation(h[name][1], neurons) for h in (before, after)])
        assert found[i] == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-5)
        assert found[i] < 0.999
    assert monitor.measure(2, sparse=False).similarity == pytest.approx([1.0, 1.0])  # nothing has changed


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_follow_permuted_neurons(similarity):
    """Where nothing but the neurons' numbers changes the similarity is 1; where the pattern is another one it is less."""
    config = SSDConfig(num_experts=8, selected=3, probe_neurons=12, similarity=similarity)
    model, _ = attached(config)
    monitor = Monitor(model, PROBE, config)
    assert monitor.measure(0, sparse=False).signals.similarity is None
    kept = monitor.tensors()
    for name, layer in moe_layers(model).items():
        order_F = torch.randperm(50, generator=torch.Generator().manual_seed(3))
        permute_neurons(model, layer.site, order_F)
        monitor.permute(name, order_F)
    assert monitor.measure(1, sparse=False).signals.similarity == pytest.approx(
        1.0, abs=0.03 if similarity == "inertia" else 1e-3
    )  # another start may be better
    forgetful = Monitor(model, PROBE, config)
    forgetful.load(kept)  # as if nobody had been told of the permutation
    assert forgetful.measure(1, sparse=False).signals.similarity < 0.95


def test_measuring_leaves_the_model_and_random_numbers_alone():
    model, ssd = attached()
    model.train()
    model.transformer.h[0].eval()
    training = [module.training for module in model.modules()]
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    ssd.monitor.measure(0, sparse=True)
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert {layer.mode for layer in moe_layers(model).values()} == {"dense"}
    assert not any(m._forward_pre_hooks for layer in moe_layers(model).values() for m in layer.projections())


def test_padding_is_left_out():
    model, _ = attached()
    ids = PROBE[0]["input_ids"]
    padded = {"input_ids": torch.cat([ids, ids], 1)[:, :16], "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    padded["attention_mask"][:, 10:] = 0
    short = {"input_ids": ids[:, :10], "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    a, b = (Monitor(model, [batch], CONFIG).measure(0, sparse=True) for batch in (padded, short))
    assert a.sparsity == pytest.approx(b.sparsity)
    assert a.captured == pytest.approx(b.captured)
    assert a.signals.loss_gap is None  # there are no labels


def test_state_of_another_model_or_similarity_is_refused():
    model, _ = attached()
    monitor = Monitor(model, PROBE, CONFIG)
    with pytest.raises(CheckpointError, match="another model or similarity"):
        monitor.load({"model.layers.0.mlp/neurons": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="another model or similarity"):
        monitor.load({})
    with pytest.raises(DataError, match="probe has no batch"):
        Monitor(model, [], CONFIG)


def test_adjusted_rand_index_by_hand():
    a = torch.tensor([0, 0, 0, 1, 1, 1])
    b = torch.tensor([0, 0, 1, 1, 2, 2])
    # pairs together in both: 2 (of 0 0) + 1 (of the last two); in a 6, in b 3, of 15
    assert adjusted_rand_index(a, b) == pytest.approx((2 - 6 * 3 / 15) / ((6 + 3) / 2 - 6 * 3 / 15))
    assert adjusted_rand_index(a, 1 - a) == 1.0  # names do not count
    random = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 8, (4000,), generator=random) for _ in range(2))
    assert abs(adjusted_rand_index(one, other)) < 0.01


def test_correlation_without_variance():
    flat = torch.full((5,), 0.3)
    assert correlation(flat, flat.clone()) == 1
    assert correlation(flat, torch.rand(5)) == 0


def test_gated_models_are_measured():
    model = tiny_llama()
    sites = sites_of(model)
    ssd = SSD(model, sites, CONFIG, total_steps=10, probe=PROBE)
    found = ssd.monitor.measure(0, sparse=True)
    assert 0.3 < found.signals.sparsity < 0.7
    assert 3 / 8 * 0.7 < found.signals.captured < 1
