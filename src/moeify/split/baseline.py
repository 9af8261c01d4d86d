"""Splits that look at no feature: what every other one has to beat.

Letters: F FFN width, K features.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .record import ExpertSplit


@dataclass(frozen=True, kw_only=True)
class RandomSplit:
    """A seeded random permutation cut into equal slices."""

    name: ClassVar[str] = "random"

    seed: int = 0
    """Seed of the permutation."""

    def __call__(self, features_FK: Tensor, *, num_experts: int, warm_start: ExpertSplit | None = None) -> ExpertSplit:
        """Only the number of rows of ``features_FK`` counts; a warm start is ignored."""
        generator = torch.Generator().manual_seed(self.seed)
        return ExpertSplit.from_order(torch.randperm(features_FK.shape[0], generator=generator), num_experts=num_experts)


@dataclass(frozen=True, kw_only=True)
class ContiguousSplit:
    """Slices of the neurons' present order: what MoEfication's code calls random, and what a converted checkpoint already has."""

    name: ClassVar[str] = "contiguous"

    def __call__(self, features_FK: Tensor, *, num_experts: int, warm_start: ExpertSplit | None = None) -> ExpertSplit:
        """Only the number of rows of ``features_FK`` counts; a warm start is ignored."""
        return ExpertSplit.from_order(torch.arange(features_FK.shape[0]), num_experts=num_experts)
