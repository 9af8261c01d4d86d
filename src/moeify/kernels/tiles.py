"""How a GPU kernel cuts its work up. Tiles are arguments: no kernel looks for them while it runs, and the same call gives the same bits.

Letters: T tokens, K input channels, N outputs.
"""

from dataclasses import dataclass

TOKENS = 16
"""Tokens of one tile where there are several; the side of a matrix instruction's operand."""
PROGRAMS_PER_UNIT = 4  # blocks of threads that a multiprocessor holds at once; an estimate: no GPU has timed it


@dataclass(frozen=True, kw_only=True)
class LinearTiles:
    """Tiles of the kernels in `triton_linear`."""

    tokens: int
    """1, or `TOKENS`."""
    channels: int
    """Input channels that a program reads at a time; a power of two, at least 16."""
    outputs: int
    """Outputs of one program; a power of two, at least 16."""
    channels_per_split: int
    """Input channels of one program, a multiple of ``channels``; the sums of the splits are added in order."""
    num_warps: int = 4


def linear_tiles(K: int, N: int, *, num_tokens: int, weight_bytes: int, num_units: int) -> LinearTiles:
    """Tiles of 4 to 16 KB, and enough splits of the channels for every unit of the GPU to have work.

    Args:
        weight_bytes: of one weight.
        num_units: multiprocessors of the GPU.
    """
    tokens = 1 if num_tokens == 1 else TOKENS
    channels, outputs = 32 if weight_bytes == 4 else 64, 128 if N > 1024 else 64
    whole = max(1, -(-N // outputs) * -(-num_tokens // tokens))
    num_tiles = -(-K // channels)
    splits = min(num_tiles, -(-PROGRAMS_PER_UNIT * num_units // whole))
    return LinearTiles(tokens=tokens, channels=channels, outputs=outputs, channels_per_split=-(-num_tiles // splits) * channels)
