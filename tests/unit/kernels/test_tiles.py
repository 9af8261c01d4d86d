"""How work is cut up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.kernels.tiles import TOKENS, linear_tiles

sizes = st.integers(1, 40_000)


@given(K=sizes, N=sizes, num_tokens=st.integers(0, 100), weight_bytes=st.sampled_from([1, 2, 4]), num_units=st.integers(1, 300))
def test_splits_cover_all_channels_and_none_is_empty(K, N, num_tokens, weight_bytes, num_units):
    tiles = linear_tiles(K, N, num_tokens=num_tokens, weight_bytes=weight_bytes, num_units=num_units)
    assert tiles.tokens == (1 if num_tokens == 1 else TOKENS)
    assert tiles.channels_per_split % tiles.channels == 0
    splits = -(-K // tiles.channels_per_split)
    assert (splits - 1) * tiles.channels_per_split < K <= splits * tiles.channels_per_split
    for side in (tiles.channels, tiles.outputs):
        assert side >= 16 and side.bit_count() == 1


@pytest.mark.parametrize(("N", "least"), [(192, 54), (8192, 528)])
def test_a_layer_with_few_outputs_is_split_until_the_gpu_is_full_or_the_channels_are_used_up(N, least):
    tiles = linear_tiles(576 if N == 192 else 2048, N, num_tokens=1, weight_bytes=4, num_units=132)
    assert -(-N // tiles.outputs) * -(-(576 if N == 192 else 2048) // tiles.channels_per_split) >= 0.9 * least
