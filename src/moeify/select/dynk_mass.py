"""The fewest experts that together hold a share of the token's total score: the older dynamic-k rule.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rule import Rule, by_rank, check_scores


@dataclass(frozen=True, kw_only=True)
class DynKMass(Rule):
    """The shortest prefix of the sorted experts whose share of the token's total score reaches ``mass``."""

    name: ClassVar[str] = "dynk_mass"
    knob: ClassVar[str] = "mass"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    grows: ClassVar[bool] = True

    mass: float
    """Share of the sum of scores, in [0, 1]: 0 runs only the best expert, 1 all of them; larger is more."""

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise ConfigError(f"DynKMass.mass must be in [0, 1], got {self.mass}.")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Keep the best experts until their scores sum to a share of the total.

        p = scores / sum(scores), sorted descending; mask[t, e] = (sum of p before e) < mass

        Args:
            scores_TE: predicted output norm of each expert, >= 0 (below 0 counts as 0). Of equal scores the lowest expert comes first; in
                a row of zeros all experts are equal, so a share of them runs; a row with a NaN runs all.

        Returns:
            mask_TE; at least one True per row, all True at mass = 1 (rounding of the sum does not matter).

        Raises:
            ValueError: scores is not 2-D floating, or has no expert.

        Source: Szatkowski et al. 2023, arXiv:2310.04361v1-v3; the rule of the PyPI package ``d2dmoe``.
        Cost: a stable sort and a running sum, in fp32; no host sync.
        """
        if self.mass == 1:
            check_scores(scores_TE)
            return torch.ones_like(scores_TE, dtype=torch.bool)
        return self.critical(scores_TE) < self.mass

    @classmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """Share of the experts that come before."""

        def before(sorted_TE: Tensor) -> Tensor:
            sums_TE = sorted_TE.cumsum(dim=1)
            return sums_TE.roll(1, dims=1) / sums_TE[:, -1:]

        return by_rank(scores_TE, before)
