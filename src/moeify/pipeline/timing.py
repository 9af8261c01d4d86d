"""What of a checkpoint is timed: a few short forwards, in turns with the dense model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._cpu import cpu_name
from ..errors import ConfigError

LATENCY_TOKENS = 1
"""Of a timed forward of a model that generates: the step that decoding repeats. Others run one sequence of the data."""

_TIMED = 4  # forwards of one run, so that no single token's experts decide


def check_latency_tokens(tokens: int | None) -> None:
    """Refuse a length that no forward has.

    Raises:
        ConfigError: below 1.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--latency-tokens must be at least 1, got {tokens}.")


def timed_inputs(
    model: Any, batches: Sequence[Mapping[str, Tensor]], *, tokens: int | None, dtype: str
) -> tuple[list[dict[str, Tensor]], str]:
    """What is timed of the batches, and the name of the place where: processor, device, threads, type of the weights, tokens.

    Args:
        model: on its device.
        batches: on the same; at least one.
        tokens: of each timed forward; None: `LATENCY_TOKENS` of a model that generates, else one sequence.
        dtype: of the weights, for the name.
    """
    is_decoder = model.can_generate() and set(batches[0]) == {"input_ids"}
    tokens = tokens or (LATENCY_TOKENS if is_decoder else None)
    inputs = [_short(batch, tokens) for batch in batches[:: max(1, len(batches) // _TIMED)][:_TIMED]]
    first = next(iter(inputs[0].values()))
    threads = torch.get_num_threads()
    return inputs, f"{cpu_name()}, {first.device.type}, {threads} thread{'s' * (threads != 1)}, {dtype}, 1 x {first.shape[1]}"


def _short(batch: Mapping[str, Tensor], tokens: int | None) -> dict[str, Tensor]:
    """One sequence, cut where it is text and a length is given."""
    return {key: value[:1, :tokens] if tokens and value.dim() == 2 else value[:1] for key, value in batch.items() if key != "labels"}
