"""What cases share: lists as options, and the spread of their times."""

from collections.abc import Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types that the CPU kernels compute in, by their name in rows and options."""


def words(text: str) -> tuple[str, ...]:
    """Value of an option that takes names: ``a,b``."""
    return tuple(text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """Value of an option that takes whole numbers: ``1,8``."""
    return tuple(map(int, text.split(",")))


def numbers(text: str) -> tuple[float, ...]:
    """Value of an option that takes numbers: ``0.5,0.25``."""
    return tuple(map(float, text.split(",")))


def p80_over_p20(times: Sequence[float]) -> float:
    """How far apart repeated times are, >= 1."""
    ordered, last = sorted(times), len(times) - 1
    return ordered[round(0.8 * last)] / ordered[round(0.2 * last)]
