"""Experts whose score is at least a fraction of the token's largest: the published dynamic-k rule.

Letters: T tokens, E experts.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule, check_scores


@dataclass(frozen=True, kw_only=True)
class DynKMax(Rule):
    """Experts whose predicted norm is at least ``tau`` times the token's largest one."""

    name: ClassVar[str] = "dynk_max"
    knob: ClassVar[str] = "tau"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    grows: ClassVar[bool] = False

    tau: float
    """Fraction of the largest score, in [0, 1]: 0 runs all experts, 1 only the best; larger is fewer."""

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"DynKMax.tau must be in [0, 1], got {self.tau}.")

    def runs_all(self, num_experts: int) -> bool:
        """At 0."""
        return self.tau == 0

    @classmethod
    def from_d2dmoe_tau(cls, tau: float) -> "DynKMax":
        """The rule for a ``tau`` of the released D2DMoE code, where larger is more experts: theirs is 1 - ours.

        Raises:
            ConfigError: out of [0, 1].
        """
        if not 0 <= tau <= 1:
            raise ConfigError(f"the D2DMoE code's tau must be in [0, 1], got {tau}.")
        return cls(tau=1 - tau)

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Keep experts by their share of the largest score.

        mask[t, e] = scores[t, e] >= tau * max_e' scores[t, e']

        Args:
            scores_TE: predicted output norm of each expert, >= 0 and finite (not checked: a check would synchronise the device).
                A row of zeros runs all experts (>= holds); a row with a NaN runs all; a row below zero runs its largest alone.

        Returns:
            mask_TE; at least one True per row.

        Raises:
            ValueError: scores is not 2-D floating, or has no expert.

        Source: Szatkowski et al. 2024, arXiv:2310.04361v4, eq. 4. Their code's tau is 1 - tau (`from_d2dmoe_tau`).
        Cost: two passes over T*E scores, in fp32; no host sync.
        """
        check_scores(scores_TE)
        if self.tau == 0:
            return torch.ones_like(scores_TE, dtype=torch.bool)
        scores_TE = scores_TE.float()
        max_T1 = scores_TE.amax(dim=1, keepdim=True)
        # negated, so that a comparison with NaN keeps the expert
        return ~(scores_TE < torch.minimum(self.tau * max_T1, max_T1))

    @classmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """Share of the row's largest score."""
        check_scores(scores_TE)
        scores_TE = scores_TE.float()
        max_T1 = scores_TE.amax(dim=1, keepdim=True)
        share_TE = (scores_TE.clamp(min=0) / max_T1).masked_fill_(scores_TE >= max_T1, math.inf)
        return share_TE.masked_fill_(max_T1.isnan(), math.inf)
