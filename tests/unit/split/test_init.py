import pytest
import torch

from moeify._config import from_tagged, to_dict
from moeify.errors import ConfigError, MoeifyError
from moeify.sites.site import FFNWeights
from moeify.split import SPLITS, parameter_features, split_neurons


@pytest.mark.parametrize("name", SPLITS)
def test_split_config_when_written_as_json_comes_back_equal(name):
    config = SPLITS[name]()
    assert to_dict(config)["name"] == name
    assert from_tagged(SPLITS, to_dict(config)) == config


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(
    ("num_neurons", "num_experts"),
    [
        pytest.param(12, 3, id="even"),
        pytest.param(7, 3, id="sizes 3 2 2"),
        pytest.param(5, 5, id="one neuron an expert"),
        pytest.param(5, 4, id="sizes 2 1 1 1"),
        pytest.param(6, 1, id="one expert"),
        pytest.param(1, 1, id="one neuron"),
    ],
)
def test_split_neurons_when_sizes_are_awkward_is_a_partition(name, num_neurons, num_experts):
    features = torch.randn(num_neurons, 4, generator=torch.Generator().manual_seed(0))
    split = split_neurons(features, num_experts=num_experts, method=SPLITS[name]())
    assert split.order_F.sort().values.tolist() == list(range(num_neurons))
    sizes = torch.bincount(split.labels_F(), minlength=num_experts)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(
    ("features", "num_experts", "message"),
    [
        pytest.param(torch.full((4, 2), torch.nan), 2, "NaN or infinity in 4 neurons, the first is 0", id="nan"),
        pytest.param(torch.ones(4), 2, "2-D", id="one dimension"),
        pytest.param(torch.ones(4, 2, dtype=torch.int64), 2, "floating-point", id="integers"),
        pytest.param(torch.ones(4, 2), 5, "4 neurons into 5 experts", id="too many experts"),
        pytest.param(torch.ones(0, 2), 1, "one row a neuron", id="no neuron"),
    ],
)
def test_split_neurons_when_input_is_bad_raises(name, features, num_experts, message):
    with pytest.raises(MoeifyError, match=message):
        split_neurons(features, num_experts=num_experts, method=SPLITS[name]())


@pytest.mark.parametrize("name", ["kmeans", "coactivation"])
@pytest.mark.parametrize("options", [{"iterations": -1}, {"tolerance": 1.0}, {"restarts": 0}], ids=["iterations", "tolerance", "restarts"])
def test_split_config_when_option_is_out_of_range_raises(name, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SPLITS[name](**options)


def test_parameter_features_when_gated_uses_gate_rows_and_keeps_zero_rows():
    gate = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-20]])
    weights = FFNWeights(torch.ones(3, 2), torch.ones(3, 2), gate)
    torch.testing.assert_close(parameter_features(weights), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    plain = FFNWeights(gate, torch.ones(3, 2))
    torch.testing.assert_close(parameter_features(plain), parameter_features(weights))
