"""Experts whose score reaches an absolute level.

Letters: T tokens, E experts.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from .rule import Rule, check_scores


@dataclass(frozen=True, kw_only=True)
class Threshold(Rule):
    """Experts whose predicted norm is at least ``theta``, and always the best one: tokens of small norm run fewer experts."""

    name: ClassVar[str] = "threshold"
    knob: ClassVar[str] = "theta"
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)
    grows: ClassVar[bool] = False

    theta: float
    """Smallest score that runs, in the score's own unit, >= 0; larger is fewer. Comparable between layers only if their scores are."""

    def __post_init__(self) -> None:
        if not 0 <= self.theta < math.inf:
            raise ConfigError(f"Threshold.theta must be finite and at least 0, got {self.theta}.")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Keep experts at or above the level.

        mask[t, e] = scores[t, e] >= min(theta, max_e' scores[t, e'])

        Args:
            scores_TE: predicted output norm of each expert, >= 0. A row with a NaN runs all experts.

        Returns:
            mask_TE; at least one True per row: experts that share the largest score all run.

        Raises:
            ValueError: scores is not 2-D floating, or has no expert.

        Cost: two passes over T*E scores, in fp32; no host sync.
        """
        check_scores(scores_TE)
        scores_TE = scores_TE.float()
        # negated, so that a comparison with NaN keeps the expert
        return ~(scores_TE < scores_TE.amax(dim=1, keepdim=True).clamp(max=self.theta))

    @classmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """The score; infinite for a row's largest."""
        check_scores(scores_TE)
        scores_TE = scores_TE.float()
        max_T1 = scores_TE.amax(dim=1, keepdim=True)
        return scores_TE.masked_fill((scores_TE == max_T1) | max_T1.isnan(), math.inf)
