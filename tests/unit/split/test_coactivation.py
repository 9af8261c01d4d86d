import pytest
import torch

from moeify.errors import ConfigError, MoeifyError
from moeify.split import Coactivation, coactivation_features, graph_features, log_energy_features, split_neurons


def energies(num_tokens, num_neurons=12, seed=0):
    """Neuron j fires with group j % 3; one of the groups fires on each token."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (num_tokens, 1), generator=generator)
    fires = (torch.arange(num_neurons) % 3) == group
    return (fires + 0.05) * (0.5 + torch.rand(num_tokens, num_neurons, generator=generator))


@pytest.mark.parametrize("transform", ["log_energy", "amplitude", "share", "log"])
@pytest.mark.parametrize("centring", ["mean", "none"])
@pytest.mark.parametrize("num_tokens", [pytest.param(9, id="T < F: tokens"), pytest.param(200, id="T > F: Gram factor")])
def test_coactivation_split_when_groups_fire_together_finds_them(transform, centring, num_tokens):
    method = Coactivation(transform=transform, centring=centring)
    features = coactivation_features(energies(num_tokens), method=method)
    labels = split_neurons(features, num_experts=3, method=method).labels_F()
    for group in range(3):
        assert len(labels[group::3].unique()) == 1


def test_coactivation_features_when_neurons_are_proportional_are_equal():
    # shares of two tokens: (1/4, 1/4, 1/2) and (1/10, 1/10, 4/5)
    energy = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 8.0]])
    x = coactivation_features(energy, method=Coactivation(transform="share"))
    torch.testing.assert_close(x @ x.t(), torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]))


def test_graph_features_when_sums_come_from_the_same_tokens_have_the_same_inner_products():
    energy = energies(50)
    amplitude = (energy / energy.sum(1, keepdim=True)).sqrt()
    for centring in ("mean", "none"):
        method = Coactivation(transform="amplitude", centring=centring)
        x = coactivation_features(energy[:50], method=method)
        g = graph_features(amplitude.t() @ amplitude, amplitude_sum_F=amplitude.sum(0), num_tokens=50, method=method)
        torch.testing.assert_close(g @ g.t(), x @ x.t(), atol=1e-3, rtol=0)


def test_coactivation_features_when_neurons_never_fire_have_zero_rows():
    energy = energies(40)
    energy[:, 4] = 0
    energy[7] = 0  # a token without energy
    method = Coactivation(transform="amplitude")
    assert not coactivation_features(energy, method=method)[4].any()
    amplitude = (energy / energy.sum(1, keepdim=True).clamp(min=1e-9)).sqrt()
    assert not graph_features(amplitude.t() @ amplitude, amplitude_sum_F=amplitude.sum(0), num_tokens=39)[4].any()
    assert not coactivation_features(torch.zeros(3, 5), method=method).any()


def test_level_weight_when_large_groups_by_mean_energy():
    energy = energies(30) * torch.tensor([1.0, 100.0, 1e4]).repeat_interleave(4)
    method = Coactivation(transform="amplitude", level_weight=100.0)
    labels = split_neurons(coactivation_features(energy, method=method), num_experts=3, method=method).labels_F()
    for level in labels.view(3, 4):
        assert len(level.unique()) == 1


def test_coactivation_when_input_is_bad_raises():
    with pytest.raises(MoeifyError, match="NaN, infinity or negative"):
        coactivation_features(torch.full((2, 2), torch.nan))
    with pytest.raises(MoeifyError, match="2-D"):
        coactivation_features(torch.ones(3))
    with pytest.raises(MoeifyError, match="NaN or infinity"):
        graph_features(torch.full((2, 2), torch.nan), amplitude_sum_F=torch.ones(2), num_tokens=1)
    with pytest.raises(MoeifyError, match="must be"):
        graph_features(torch.ones(2, 3), amplitude_sum_F=torch.ones(2), num_tokens=1)
    with pytest.raises(MoeifyError, match="'log'"):
        graph_features(torch.ones(2, 2), amplitude_sum_F=torch.ones(2), num_tokens=1, method=Coactivation(transform="log"))
    with pytest.raises(ConfigError, match="level_weight"):
        Coactivation(level_weight=-1.0)


def test_log_energy_features_when_levels_and_patterns_differ_groups_by_both():
    # four groups of four neurons: two patterns over tokens times two levels, a factor e^8 apart
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(400, 2, generator=generator)
    group = torch.arange(16) % 4
    log_energy = 2 * pattern[:, group % 2] + 8.0 * (group // 2) + 0.1 * torch.randn(400, 16, generator=generator)
    features = log_energy_features(log_energy.exp(), dimensions=4)
    split = split_neurons(features, num_experts=4, method=Coactivation())
    labels = split.labels_F()
    assert all(len(set(labels[group == g].tolist())) == 1 for g in range(4))


def test_log_energy_features_when_exact_equal_the_singular_directions():
    energy = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) + 0.1
    z = energy.double().log().t()
    z = z - z.mean(0)
    features = log_energy_features(energy, dimensions=6)
    torch.testing.assert_close((features @ features.t()).double(), z @ z.t(), rtol=1e-3, atol=1e-3)


def test_log_energy_features_when_all_zero_are_finite():
    assert log_energy_features(torch.zeros(5, 4)).isfinite().all()
