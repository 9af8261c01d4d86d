"""Different rules for different tokens of one forward: a batch of requests that asked for different presets.

Letters: T tokens, E experts.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .rule import Rule


class PerToken:
    """A rule in the place of a layer's own, for one forward; never in a manifest.

    mask[t] = rules[choice_T[t]](scores[t])

    Every rule reads rows alone, so each token gets the mask that it would get in a forward of its own.

    Args:
        rules: those that occur.
        choice_T: whole numbers, which of them each token has.
    """

    name: ClassVar[str] = "per_token"

    def __init__(self, rules: Sequence[Rule], choice_T: Tensor) -> None:
        self.num_tokens = len(choice_T)
        self.parts = tuple((rule, torch.nonzero(choice_T == i).flatten()) for i, rule in enumerate(rules))
        """(rule, the tokens that have it)."""

    def __repr__(self) -> str:
        return f"PerToken({', '.join(str(rule) for rule, _ in self.parts)})"

    def check(self, num_tokens: int) -> None:
        """Raises:
        ValueError: a forward of another number of tokens than the rules are for.
        """
        if num_tokens != self.num_tokens:
            raise ValueError(f"the rules are for {self.num_tokens} tokens, the layer got {num_tokens}.")

    def runs_all(self, num_experts: int) -> bool:
        """Whether every token's rule does."""
        return all(rule.runs_all(num_experts) for rule, rows_N in self.parts if len(rows_N))

    def most_experts(self, num_experts: int) -> int | None:
        """None: tokens differ."""
        return None

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """mask_TE.

        Raises:
            ValueError: another number of tokens.
        """
        self.check(len(scores_TE))
        mask_TE = torch.empty_like(scores_TE, dtype=torch.bool)
        for rule, rows_N in self.parts:
            mask_TE[rows_N] = rule(scores_TE[rows_N])
        return mask_TE
