"""What operators with a backward of their own share: memory for the gradients that are wanted, and their places among the inputs."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

_Optional: TypeAlias = Tensor | None


def empty_gradients(inputs: Sequence[_Optional], wanted: Sequence[bool]) -> list[_Optional]:
    """Memory for gradients, None where none is wanted or there is no input.

    Args:
        inputs: x (T, D) first, then weights and biases, the router's probabilities (T, E) last.
        wanted: of each input.

    Returns:
        x's contiguous, weights' strided as they are, probabilities' in fp32, which sums need.
    """
    x_TD, *others = inputs
    assert x_TD is not None
    found: list[_Optional] = [torch.empty_like(x_TD, memory_format=torch.contiguous_format) if wanted[0] else None]
    for tensor, want in zip(others, wanted[1:], strict=True):
        if tensor is None or not want:
            found.append(None)
        elif tensor is inputs[-1]:
            found.append(tensor.new_empty(tensor.shape, dtype=torch.float32))
        else:
            found.append(torch.empty_like(tensor))
    return found


def in_place_of(inputs: Sequence[_Optional], wanted: Sequence[bool], found: Sequence[Tensor]) -> list[_Optional]:
    """The wanted gradients, given in order, each where its input stands; probabilities' in their dtype."""
    given = iter(found)
    gradients = [next(given) if want else None for want in wanted]
    if gradients[-1] is not None and inputs[-1] is not None:
        gradients[-1] = gradients[-1].to(inputs[-1].dtype)
    return gradients
