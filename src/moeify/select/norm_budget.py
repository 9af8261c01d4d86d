"""Experts whose joint norm comes nearest to a share of the token's total: the dynamic k of top-AFA.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule, by_rank, check_scores


@dataclass(frozen=True, kw_only=True)
class NormBudget(Rule):
    """The prefix of the sorted experts whose joint norm, root of the sum of squared scores, is nearest to ``beta`` times that of all.

    `DynKMass` adds scores up, which are norms; outputs of experts are nearly orthogonal, so that their squares add up to the square of the
    output's norm. On squared scores `DynKMass(mass=beta**2)` keeps the same experts, or one more: it reaches the share, this is nearest.
    """

    name: ClassVar[str] = "norm_budget"
    knob: ClassVar[str] = "beta"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    grows: ClassVar[bool] = True

    beta: float
    """Share of the norm of all experts together, in [0, 1]: 0 runs only the best expert, 1 all of them; larger is more."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"NormBudget.beta must be in [0, 1], got {self.beta}.")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Keep the best experts until their joint norm is as near to the budget as it gets.

        C_k = sum of the k largest squared scores;   k = argmin over k >= 1 of |sqrt(C_k) - beta sqrt(C_E)|, the smaller of two as near

        Args:
            scores_TE: predicted output norm of each expert, >= 0 (below 0 counts as 0). Of equal scores the lowest expert comes first; in
                a row of zeros all experts are equal; a row with a NaN runs all.

        Returns:
            mask_TE; at least one True per row, all True at beta = 1 (experts of score 0, too).

        Raises:
            ValueError: scores is not 2-D floating, or has no expert.

        Source: Lee et al. 2025, top-AFA (github.com/SewoongLee/top-afa-sae), whose budget is the norm of the layer's input; there the last
            sum is set to 1e8, so that a small token's last unit is never kept. The share of the norm of all is ours.
        Cost: a stable sort and a running sum, in fp32; no host sync.
        """
        if self.beta == 1:
            check_scores(scores_TE)
            return torch.ones_like(scores_TE, dtype=torch.bool)
        return self.critical(scores_TE) < self.beta

    @classmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """Half-way between the joint norms without and with the expert, over that of all."""

        def middle(sorted_TE: Tensor) -> Tensor:
            # over the largest: squares of small scores must not underflow
            norms_TE = (sorted_TE / sorted_TE[:, :1]).square().cumsum(dim=1).sqrt()
            return (norms_TE.roll(1, dims=1) + norms_TE) / (2 * norms_TE[:, -1:])

        return by_rank(scores_TE, middle)
