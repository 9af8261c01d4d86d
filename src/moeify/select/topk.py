"""The k experts of largest score.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule, check_scores


@dataclass(frozen=True, kw_only=True)
class TopK(Rule):
    """The same number of experts for every token."""

    name: ClassVar[str] = "topk"
    knob: ClassVar[str] = "k"
    bounds: ClassVar[tuple[float, float]] = (1, float("inf"))
    grows: ClassVar[bool] = True

    k: int
    """Experts per token, at least 1; above E all of them run."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"TopK.k must be at least 1, got {self.k}.")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Keep exactly min(k, E) experts per token.

        Args:
            scores_TE: any sign. Of equal scores the lowest expert wins; NaN counts as the largest score.

        Returns:
            mask_TE.

        Raises:
            ValueError: scores is not 2-D floating, or has no expert.

        Source: Zhang et al. 2022 (MoEfication), arXiv:2110.01786, section 3.2.
        Cost: a stable sort of T rows of E; no host sync.
        """
        check_scores(scores_TE)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        chosen_TK = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        return mask_TE.scatter_(1, chosen_TK, True)

    def most_experts(self, num_experts: int) -> int:
        """k, or all of them."""
        return min(self.k, num_experts)

    @classmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """Rank of each expert, from 0."""
        check_scores(scores_TE)
        order_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
        rank_TE = torch.arange(scores_TE.shape[1], dtype=torch.float32, device=scores_TE.device).expand(order_TE.shape)
        return torch.empty_like(scores_TE, dtype=torch.float32).scatter_(1, order_TE, rank_TE)
