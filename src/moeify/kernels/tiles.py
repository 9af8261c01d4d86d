"""How a GPU kernel cuts its work up. Tiles are arguments: no kernel looks for them while it runs, and the same call gives the same bits.

Letters: T tokens, K input channels, N outputs; of an FFN D input width, O output width, F neurons, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class RouterTiles:
    """Tiles of the first kernel in `triton_router`; powers of two, at least 16 where there are several tokens."""

    tokens: int
    """1, or `TOKENS`."""
    rows: int
    """Rows of the hidden layer of one program."""
    channels: int
    """Input channels that a program reads at a time."""
    channels_per_split: int
    """Input channels of one program, a multiple of ``channels``; the sums of the splits are added in order."""
    num_warps: int = 4


def router_tiles(*, d_model: int, width: int, num_tokens: int, num_units: int) -> RouterTiles:
    """Tiles of 16 KB of fp32 for one token, and a program for every unit of the GPU, but at most `ROUTER_SPLITS` splits.

    Args:
        width: of the hidden layer.
        num_units: multiprocessors of the GPU.
    """
    tokens, rows, channels = (1, 4, min(1024, 1 << (d_model - 1).bit_length())) if num_tokens == 1 else (TOKENS, 16, 64)
    num_tiles = -(-d_model // channels)
    whole = -(-width // rows) * -(-num_tokens // tokens)
    splits = max(1, min(num_tiles, -(-num_units // whole), ROUTER_SPLITS))
    return RouterTiles(tokens=tokens, rows=rows, channels=channels, channels_per_split=-(-num_tiles // splits) * channels)


ROUTER_SPLITS = 16
"""Splits whose sums one program of the second kernel reads at once."""

UNION_TOKENS = 512
"""Tokens up to which experts are computed for the union of what they select, in the order of the neurons, rather than by pairs."""
ATOMIC_NEURONS = 192
"""Neurons of an expert from which, unless `TUNED` has another number, its output is added to y by atomics, 4 O bytes for a pair; below, a
dense product over all neurons costs less. At 2.5 TB/s of atomics and 710 TFLOP/s both cost the same with 140 neurons at a quarter active,
280 at half: an estimate."""

TUNED: dict[tuple[str, str], Mapping[str, Any]] = {}
"""(architecture, regime) -> fields of `FFNTiles` that `bench.tune` found, for types of 2 bytes; not the size of groups, nor ``is_atomic``,
for what is faster for thin experts is not for thick ones: "ragged" may have ``atomic_neurons``, in the place of `ATOMIC_NEURONS`. Regimes:
"1", "16" and "512" tokens at most, "ragged". None has been measured yet."""
AMD_STAGES = 2
"""Stages of AMD's units: three of some tiles are 68 KB of shared memory, and they have 64."""

WAVES = 4
"""Programs of a single token's second product for each that runs at once; an estimate, too."""
FLOAT32_ROWS = 32
"""Rows of a tile in float32: from 64 on Triton 3.7 compiles its products for sm100 to TF32 instructions, whatever is asked for."""


@dataclass(frozen=True, kw_only=True)
class FFNTiles:
    """Tiles of the kernels in `triton_ffn`; all are powers of two, and at least 16 where a product has several tokens."""

    tokens: int
    """Tokens, or pairs, of one program."""
    neurons: int
    """Neurons of one program in products whose result is a neuron's."""
    channels: int
    """What such a program reads at a time of the inputs' width."""
    outputs: int
    """Outputs of one program in products that sum over neurons."""
    depth: int
    """Neurons that such a program reads at a time; pairs, where it sums over those."""
    neurons_per_split: int = 0
    """Neurons of one program that sums over them, a multiple of ``depth``; few tokens alone."""
    experts_per_group: int = 1
    """Neighbouring experts that many tokens run together, so that thin ones fill a tile."""
    is_atomic: bool = False
    """Whether pairs are added to y by atomics."""
    num_warps: int = 4
    num_stages: int = 3


def union_tiles(
    *,
    d_in: int,
    d_out: int,
    num_neurons: int,
    num_experts: int,
    num_tokens: int,
    bytes_per_number: int,
    num_units: int,
    architecture: str = "none",
) -> FFNTiles:
    """Tiles of up to `UNION_TOKENS` tokens: small enough that the neurons of a few experts are work for every unit of the GPU.

    Args:
        bytes_per_number: of x.
        num_units: multiprocessors of the GPU.
        architecture: key of `TUNED`.
    """
    wide = 2 if bytes_per_number == 4 else 1
    if num_tokens <= 1:
        regime, tiles = "1", FFNTiles(tokens=1, neurons=8, channels=512 // wide, outputs=128, depth=64 // wide)
    elif num_tokens <= TOKENS:
        regime, tiles = "16", FFNTiles(tokens=TOKENS, neurons=16, channels=128 // wide, outputs=64, depth=64 // wide)
    else:
        regime, tokens = "512", FLOAT32_ROWS if num_tokens <= FLOAT32_ROWS or wide == 2 else 64
        tiles = FFNTiles(tokens=tokens, neurons=64 // wide, channels=64 // wide, outputs=64, depth=64 // wide)
    if architecture.startswith("gfx"):
        tiles = replace(tiles, num_stages=AMD_STAGES)
    if wide == 1:
        tiles = replace(tiles, **TUNED.get((architecture, regime), {}))
    size = max(1, num_neurons // num_experts)
    least = 4 if tiles.tokens == 1 else 16
    tiles = replace(tiles, neurons=max(least, min(tiles.neurons, _power_of_two(size))))  # a tile is read for its busiest expert
    whole = -(-d_out // tiles.outputs) * -(-max(num_tokens, 1) // tiles.tokens)
    num_depths = -(-num_neurons // tiles.depth)
    wanted = PROGRAMS_PER_UNIT * num_units
    if num_tokens <= 1:  # a split's work is what is selected of it: of few long ones the fullest would be waited for
        wanted *= WAVES
    splits = min(num_depths, -(-wanted // whole))
    return replace(tiles, neurons_per_split=-(-num_depths // splits) * tiles.depth)


def ragged_tiles(
    *, num_neurons: int, num_experts: int, num_tokens: int, bytes_per_number: int, by_expert: bool = False, architecture: str = "none"
) -> FFNTiles:
    """Tiles of many tokens, and of training.

    Args:
        bytes_per_number: of x.
        by_expert: no groups of several experts.
        architecture: key of `TUNED`.
    """
    size = max(1, num_neurons // num_experts)
    wide = 2 if bytes_per_number == 4 else 1
    many = num_tokens > UNION_TOKENS and wide == 1
    tuned = dict(TUNED.get((architecture, "ragged"), {})) if many else {}
    atomic_neurons = tuned.pop("atomic_neurons", ATOMIC_NEURONS)
    tiles = FFNTiles(
        tokens=128 if many else FLOAT32_ROWS,
        neurons=max(16, min(64 if wide == 1 else FLOAT32_ROWS, _power_of_two(size))),
        channels=64 // wide,
        outputs=128 if many else 64,
        depth=max(16, min(64 // wide, _power_of_two(size))),
        experts_per_group=1 if by_expert else experts_per_group(num_neurons, num_experts),
        is_atomic=size >= atomic_neurons,
        num_warps=8 if many else 4,
        num_stages=AMD_STAGES if architecture.startswith("gfx") else 3,
    )
    return replace(tiles, **tuned)


def experts_per_group(num_neurons: int, num_experts: int) -> int:
    """Neighbours that many tokens run together: experts of fewer neurons than a tile must have, as many as fill one."""
    return max(1, min(16 // (num_neurons // num_experts), num_experts))


def _power_of_two(number: int) -> int:
    """The largest that is not above ``number``."""
    return 1 << (number.bit_length() - 1)
