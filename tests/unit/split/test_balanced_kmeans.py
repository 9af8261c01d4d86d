import itertools

import pytest
import torch

from moeify.errors import ConfigError
from moeify.split import ExpertSplit, balanced_kmeans


def loop_inertia(x_FK, labels_F):
    """The plainest definition, in fp64."""
    total = 0.0
    for label in labels_F.unique():
        members = x_FK[labels_F == label].double()
        total += (members - members.mean(0)).square().sum().item()
    return total


def test_balanced_kmeans_when_groups_are_apart_finds_them():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(24) % 6
    x = torch.eye(6)[truth] + 0.01 * torch.randn(24, 6, generator=generator)
    found = balanced_kmeans(x, num_experts=6)
    labels = found.split.labels_F()
    assert all(len(labels[truth == group].unique()) == 1 for group in range(6))
    for e in range(6):
        torch.testing.assert_close(found.centroids_EK[e], x[labels == e].mean(0))


@pytest.mark.parametrize(
    ("num_neurons", "num_experts"), [pytest.param(6, 2, id="even"), pytest.param(7, 3, id="3 2 2"), pytest.param(5, 3, id="2 2 1")]
)
def test_balanced_kmeans_when_tiny_reaches_the_best_of_all_partitions(num_neurons, num_experts):
    x = torch.randn(num_neurons, 3, generator=torch.Generator().manual_seed(1))
    every = (
        ExpertSplit(order_F=torch.tensor(order), num_experts=num_experts).labels_F() for order in itertools.permutations(range(num_neurons))
    )
    best = min(loop_inertia(x, labels) for labels in every)
    found = balanced_kmeans(x, num_experts=num_experts, restarts=60, tolerance=0.0)
    assert found.split.inertia == pytest.approx(best, rel=1e-5)


def test_balanced_kmeans_when_compared_with_lloyd_alone_is_lower():
    x = torch.nn.functional.normalize(torch.randn(96, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    found = balanced_kmeans(x, num_experts=12)
    assert found.split.inertia == pytest.approx(loop_inertia(x, found.split.labels_F()), rel=1e-6)
    assert found.history[-1] < 0.97 * found.history[0]


def test_balanced_kmeans_when_a_swap_would_pay_has_made_it():
    x = torch.randn(18, 5, generator=torch.Generator().manual_seed(3))
    labels = balanced_kmeans(x, num_experts=3, tolerance=0.0).split.labels_F()
    reached = loop_inertia(x, labels)
    for i, j in itertools.combinations(range(18), 2):
        swapped = labels.clone()
        swapped[[i, j]] = labels[[j, i]]
        # the search ranks pairs without their overlap, so a small gain may be left
        assert loop_inertia(x, swapped) > 0.97 * reached


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(10, 3), id="all zero"),
        pytest.param(torch.ones(10, 3), id="all equal"),
        pytest.param(torch.eye(3)[torch.arange(10) % 2], id="two values"),
        pytest.param(torch.cat([torch.zeros(5, 3), torch.eye(3), torch.eye(3)[:2]]), id="half zero"),
        pytest.param(torch.ones(10, 3, dtype=torch.bfloat16), id="bfloat16"),
        pytest.param(torch.randn(3, 10).t(), id="not contiguous"),
    ],
)
@pytest.mark.parametrize("num_experts", [1, 3, 5, 10])
def test_balanced_kmeans_when_rows_are_degenerate_ends_with_a_partition(x, num_experts):
    found = balanced_kmeans(x, num_experts=num_experts)
    assert found.split.order_F.sort().values.tolist() == list(range(10))
    assert found.split.inertia >= 0
    assert found.split.inertia == pytest.approx(loop_inertia(x, found.split.labels_F()), abs=1e-4)


def test_balanced_kmeans_when_warm_start_has_another_shape_raises():
    start = ExpertSplit.from_order(torch.arange(8), num_experts=2)
    with pytest.raises(ConfigError, match="warm_start splits 8 neurons into 2 experts, not 8 into 4"):
        balanced_kmeans(torch.randn(8, 2), num_experts=4, warm_start=start)


def test_balanced_kmeans_when_no_iterations_are_allowed_returns_the_warm_start():
    start = ExpertSplit.from_order(torch.tensor([5, 1, 3, 0, 2, 4]), num_experts=3)
    found = balanced_kmeans(torch.randn(6, 4), num_experts=3, iterations=0, warm_start=start)
    assert torch.equal(found.split.order_F, start.order_F)


def test_balanced_kmeans_when_warm_started_from_its_own_result_keeps_it():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    first = balanced_kmeans(x, num_experts=8)
    again = balanced_kmeans(x, num_experts=8, warm_start=first.split)
    assert again.split.inertia <= first.split.inertia
