"""The FFN formula against loops over neurons."""

import math

import pytest
import torch

from moeify.sites import ACTIVATIONS, FFNWeights, ffn_dense, ffn_hidden


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("relu", -1.0, 0.0),
        ("gelu", 1.0, 0.5 * (1 + math.erf(1 / math.sqrt(2)))),
        ("gelu_tanh", 1.0, 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("silu", 2.0, 2 / (1 + math.exp(-2))),
        ("quick_gelu", 1.0, 1 / (1 + math.exp(-1.702))),
        ("relu2", 3.0, 9.0),
        ("relu6", 8.0, 6.0),
        ("leaky_relu", -2.0, -0.02),
        ("mish", 1.0, math.tanh(math.log1p(math.e))),
        ("hardswish", 1.0, 4 / 6),
        ("gelu_10", 11.0, 10.0),
    ],
)
def test_activation_at_a_point_equals_its_definition(name, x, expected):
    assert float(ACTIVATIONS[name](torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12)


def test_every_activation_is_covered_above():
    (mark,) = test_activation_at_a_point_equals_its_definition.pytestmark
    assert {row[0] for row in mark.args[1]} == set(ACTIVATIONS)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_ffn_dense_equals_a_loop_over_neurons(gated, biased):
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x_TD, up, down, gate = draw(3, 4), draw(5, 4), draw(5, 4), draw(5, 4)
    b_up, b_gate, b_down = (draw(5), draw(5), draw(4)) if biased else (torch.zeros(5), torch.zeros(5), torch.zeros(4))
    weights = FFNWeights(
        up, down, gate if gated else None, b_up if biased else None, b_gate if biased and gated else None, b_down if biased else None
    )

    expected = torch.zeros(3, 4, dtype=torch.float64) + b_down
    for t in range(3):
        for f in range(5):
            u = up[f] @ x_TD[t] + b_up[f]
            g = gate[f] @ x_TD[t] + b_gate[f]
            h = torch.relu(g) * u if gated else torch.relu(u)
            expected[t] += h * down[f]

    torch.testing.assert_close(ffn_dense(x_TD, weights, activation="relu"), expected)
    assert ffn_hidden(x_TD, weights, activation="relu").shape == (3, 5)
