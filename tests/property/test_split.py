from itertools import pairwise

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from moeify.sites.site import expert_bounds
from moeify.split import SPLITS, ExpertSplit, balanced_kmeans, split_neurons


@st.composite
def cases(draw):
    """Features with repeated and zero rows, and an expert count."""
    num_neurons = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x_FK = torch.randn(num_neurons, draw(st.integers(1, 6)), generator=generator)
    x_FK = x_FK[torch.randint(num_neurons, (num_neurons,), generator=generator)]  # about a third of the rows repeat others
    x_FK[torch.rand(num_neurons, generator=generator) < 0.1] = 0
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return x_FK * scale, draw(st.integers(1, num_neurons)), draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(sorted(SPLITS)))
def test_split_neurons_when_features_are_arbitrary_is_a_balanced_partition(case, name):
    x_FK, num_experts, _ = case
    split = split_neurons(x_FK, num_experts=num_experts, method=SPLITS[name]())
    assert split.order_F.sort().values.tolist() == list(range(len(x_FK)))
    sizes = torch.bincount(split.labels_F(), minlength=num_experts).tolist()
    bounds = expert_bounds(len(x_FK), num_experts)
    assert sizes == [b - a for a, b in pairwise(bounds)]
    for a, b in pairwise(bounds):
        assert (split.order_F[a:b].diff() > 0).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_balanced_kmeans_when_iterating_never_raises_the_inertia_and_repeats_exactly(case):
    x_FK, num_experts, seed = case
    found = balanced_kmeans(x_FK, num_experts=num_experts, seed=seed)
    assert all(a >= b for a, b in pairwise(found.history))
    again = balanced_kmeans(x_FK, num_experts=num_experts, seed=seed)
    assert torch.equal(found.split.order_F, again.split.order_F)
    assert found.history == again.history
    means = torch.stack([x_FK[found.split.labels_F() == e].mean(0) for e in range(num_experts)])
    torch.testing.assert_close(found.centroids_EK, means, atol=1e-5 * float(x_FK.abs().max()), rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_balanced_kmeans_when_warm_started_is_not_worse_than_its_start(case):
    x_FK, num_experts, seed = case
    order_F = torch.randperm(len(x_FK), generator=torch.Generator().manual_seed(seed))
    start = ExpertSplit.from_order(order_F, num_experts=num_experts)
    at_start = balanced_kmeans(x_FK, num_experts=num_experts, iterations=0, warm_start=start).split.inertia
    assert balanced_kmeans(x_FK, num_experts=num_experts, warm_start=start).split.inertia <= at_start
