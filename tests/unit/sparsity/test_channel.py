"""Scores of channels, and levels below which they are skipped."""

import math

import pytest
import torch

from moeify.errors import ConfigError, DataError
from moeify.select import TopK
from moeify.sparsity.channel import (
    SCORES,
    ChannelStats,
    ScoreSample,
    channel_levels,
    channel_scores,
    channel_weights,
    shared_level,
)

T, K, N = 200, 24, 16


@pytest.fixture
def layer(rng):
    W_NK = torch.randn(N, K, generator=rng) * torch.logspace(-1, 1, K)
    x_TK = torch.randn(T, K, generator=rng)
    stats = ChannelStats(rows_RK=x_TK, slope_K=torch.rand(K, generator=rng) + 0.1)
    return W_NK, x_TK, stats


@pytest.mark.parametrize("score", SCORES)
def test_levels_skip_the_wanted_share_of_the_sample_and_nothing_else(layer, score):
    W_NK, x_TK, stats = layer
    weight_K = channel_weights(score, W_NK, stats)
    scores_TK = channel_scores(x_TK, weight_K)
    for sparsity in (0.0, 0.25, 0.5, 0.9):
        level = ScoreSample(scores_TK).level(sparsity)
        kept_TK = x_TK.abs() >= channel_levels(level, weight_K)
        assert 1 - kept_TK.float().mean().item() == pytest.approx(sparsity, abs=1.5 / x_TK.numel())
        if sparsity > 0:
            assert scores_TK[kept_TK].min() >= scores_TK[~kept_TK].max() * (1 - 1e-6)


def test_column_norms_lose_less_of_the_output_than_magnitudes_where_columns_are_uneven(layer):
    W_NK, x_TK, stats = layer

    def error(score):
        keep_TK = TopK(k=K // 2)(channel_scores(x_TK, channel_weights(score, W_NK, stats)))
        return ((x_TK * ~keep_TK) @ W_NK.T).square().mean()

    assert error("wina") < 0.2 * error("magnitude")


def test_sensitivity_loses_less_of_the_loss_where_it_depends_on_few_outputs(layer, rng):
    W_NK, x_TK, _ = layer
    g_TN = torch.randn(T, N, generator=rng) * (torch.arange(N) < 2)  # the loss sees two outputs
    stats = ChannelStats(rows_RK=x_TK, slope_K=(g_TN @ W_NK).square().mean(0).sqrt())

    def loss(score):
        keep_TK = TopK(k=K // 2)(channel_scores(x_TK, channel_weights(score, W_NK, stats)))
        return (((x_TK * ~keep_TK) @ W_NK.T) * g_TN).sum(1).square().mean()

    assert loss("sensitivity") < 0.9 * loss("wina")


def test_a_channel_without_weight_is_kept_only_at_level_zero():
    weight_K = torch.tensor([0.0, 2.0])
    assert channel_levels(1.0, weight_K).tolist() == [math.inf, 0.5]
    assert channel_levels(0.0, weight_K).tolist() == [0, 0]


def test_shared_level_reaches_the_weighted_share_and_takes_more_where_scores_are_small(rng):
    scores = {"quiet": torch.rand(100, 10, generator=rng), "loud": 10 * torch.rand(100, 10, generator=rng)}
    samples = {name: ScoreSample(value) for name, value in scores.items()}
    costs = {"quiet": 1.0, "loud": 3.0}
    level = shared_level(samples, costs, skip_frac=0.4)
    shares = {name: sample.below(level) for name, sample in samples.items()}
    assert (shares["quiet"] + 3 * shares["loud"]) / 4 == pytest.approx(0.4, abs=1e-3)
    assert shares["quiet"] > 2 * shares["loud"] > 0
    assert shared_level(samples, costs, skip_frac=0) == 0


def test_zeros_are_skipped_as_soon_as_anything_is():
    sample = ScoreSample(torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 3.0]]))
    assert sample.level(0.0) == 0
    assert 0 < sample.level(0.2) <= 1
    assert sample.below(sample.level(0.2)) == 5 / 8


def test_errors_say_what_is_wrong(layer):
    W_NK, x_TK, _ = layer
    bare = ChannelStats(rows_RK=x_TK)
    with pytest.raises(ConfigError, match="unknown name 'wino'; did you mean 'wina'"):
        channel_weights("wino", W_NK, bare)
    with pytest.raises(ConfigError, match="'sensitivity' needs gradients of the loss"):
        channel_weights("sensitivity", W_NK, bare)
    with pytest.raises(DataError, match="all channels are 0"):
        channel_weights("wina", torch.zeros(N, K), bare)
    with pytest.raises(DataError, match="NaN or infinity"):
        channel_weights("wina", W_NK * math.nan, bare)
    with pytest.raises(DataError, match="only zeros"):
        ScoreSample(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"\[0, 1\), got 1"):
        ScoreSample(x_TK.abs()).level(1.0)
    with pytest.raises(ConfigError, match="no layer"):
        shared_level({}, {}, skip_frac=0.5)
    with pytest.raises(ConfigError, match="cost of 'a' must be greater than 0, got None"):
        shared_level({"a": ScoreSample(x_TK.abs())}, {}, skip_frac=0.5)
