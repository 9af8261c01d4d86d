import pytest
import torch

from moeify.errors import ConfigError
from moeify.sites.site import expert_bounds
from moeify.split import ExpertSplit


def test_from_order_when_sizes_differ_sorts_inside_experts():
    split = ExpertSplit.from_order(torch.tensor([6, 0, 3, 5, 1, 4, 2]), num_experts=3)
    assert expert_bounds(7, 3) == (0, 3, 5, 7)
    assert split.order_F.tolist() == [0, 3, 6, 1, 5, 2, 4]
    assert split.labels_F().tolist() == [0, 1, 2, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("order", "num_experts", "message"),
    [
        pytest.param(torch.tensor([0, 1, 1]), 1, "not a permutation", id="repeated neuron"),
        pytest.param(torch.tensor([0.0, 1.0]), 1, "int64", id="not integers"),
        pytest.param(torch.tensor([0, 1]), 3, "2 neurons into 3 experts", id="more experts than neurons"),
        pytest.param(torch.tensor([0, 1]), 0, "2 neurons into 0 experts", id="no expert"),
    ],
)
def test_expert_split_when_not_a_partition_raises(order, num_experts, message):
    with pytest.raises(ConfigError, match=message):
        ExpertSplit(order_F=order, num_experts=num_experts)
