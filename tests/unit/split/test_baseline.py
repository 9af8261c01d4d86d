import torch

from moeify.split import ContiguousSplit, RandomSplit, split_neurons


def test_contiguous_split_when_called_keeps_the_order():
    split = split_neurons(torch.zeros(7, 1), num_experts=3, method=ContiguousSplit())
    assert split.order_F.tolist() == list(range(7))
    assert split.inertia is None


def test_random_split_when_seed_changes_differs():
    features = torch.zeros(64, 1)
    orders = [split_neurons(features, num_experts=8, method=RandomSplit(seed=seed)).order_F for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
