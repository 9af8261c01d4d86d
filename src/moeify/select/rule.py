"""What every selection rule is: a frozen config with one knob that turns scores into a mask.

Letters: T tokens, E experts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from .._config import from_dict

R = TypeVar("R", bound="Rule")


class Selection(Protocol):
    """All that a forward asks of what stands in the place of a layer's rule: a `Rule`, or for one forward `PerToken`."""

    @property
    def name(self) -> str:
        """Key of native calls that know it."""

    def __call__(self, scores_TE: Tensor, /) -> Tensor:
        """mask_TE of ``scores_TE``."""

    def runs_all(self, num_experts: int) -> bool:
        """Whether every expert of every token runs whatever the scores."""

    def most_experts(self, num_experts: int) -> int | None:
        """How many experts a token runs at most whatever the scores, None where scores decide."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Which experts run for a token. At least one per token, always; a row with a NaN runs all of them (`TopK` excepted: it runs k)."""

    name: ClassVar[str]
    """Key in `moeify.select.RULES` and in manifests."""
    knob: ClassVar[str]
    """The one field; each rule owns its name and direction (decision D10)."""
    bounds: ClassVar[tuple[float, float]]
    """Allowed values of the knob, both included."""
    grows: ClassVar[bool]
    """Whether a larger knob runs more experts."""

    @abstractmethod
    def __call__(self, scores_TE: Tensor) -> Tensor:
        """mask_TE of ``scores_TE``."""

    @classmethod
    @abstractmethod
    def critical(cls, scores_TE: Tensor) -> Tensor:
        """Where the knob switches each pair: the pair runs iff ``knob <= critical`` (``knob > critical`` where the rule `grows`).

        Returns:
            fp32 (T, E); an infinity where every knob runs the pair. Calibration counts these: the same as the rule, up to rounding.
        """

    def runs_all(self, num_experts: int) -> bool:
        """Whether every expert of every token runs whatever the scores, so that nobody need compute them."""
        return self.grows and self.value >= min(self.bounds[1], num_experts)

    def most_experts(self, num_experts: int) -> int | None:
        """How many experts a token runs at most whatever the scores; None where scores decide. Room for pairs is cut by it."""
        return None

    @property
    def value(self) -> float:
        """The knob's value."""
        return float(getattr(self, self.knob))

    def with_value(self: R, value: float) -> R:
        """The same rule with its knob at ``value``; a `ConfigError` where that is out of range."""
        return self.at(value)

    @classmethod
    def at(cls: type[R], value: Any) -> R:
        """The rule with its knob at ``value``; a whole float counts as an integer where the knob is one."""
        is_whole = isinstance(value, float) and value.is_integer() and cls.__annotations__[cls.knob] is int
        return from_dict(cls, {cls.knob: int(value) if is_whole else value})

    @classmethod
    def all_on(cls: type[R]) -> R:
        """The rule with every expert running: where its calibration starts."""
        return cls.at(min(cls.bounds[1] if cls.grows else cls.bounds[0], float(2**31)))


def by_rank(scores_TE: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """What `Rule.critical` of a rule on sorted scores is: a number for each expert, made from its row in descending order.

    Args:
        scores_TE: as the rule got them; in a row of zeros all experts are equal, and of equal scores the lowest expert comes first.
        value: scores, sorted in each row, fp32 and >= 0 -> a number for each place, (T, E).

    Returns:
        fp32 (T, E) in the experts' order; -inf, which every knob runs, for each row's best expert and wherever the number is NaN.

    Raises:
        ValueError: as `check_scores`.
    """
    check_scores(scores_TE)
    scores_TE = scores_TE.float().clamp(min=0)
    scores_TE = torch.where(scores_TE.amax(dim=1, keepdim=True) == 0, 1.0, scores_TE)
    sorted_TE, order_TE = scores_TE.sort(dim=1, descending=True, stable=True)
    found_TE = value(sorted_TE)
    found_TE[:, 0] = -math.inf
    # a NaN sorts first, so it reaches every later sum of its row
    found_TE.masked_fill_(found_TE.isnan(), -math.inf)
    return torch.empty_like(found_TE).scatter_(1, order_TE, found_TE)


def check_scores(scores_TE: Tensor) -> None:
    """Border check of every rule: shape only, values would synchronise the device.

    Raises:
        ValueError: not 2-D, no expert, or not floating; names the shape and dtype it got.
    """
    if scores_TE.dim() != 2 or scores_TE.shape[1] == 0 or not scores_TE.is_floating_point():
        raise ValueError(
            f"scores_TE must be a 2-D floating tensor with at least one expert, got {tuple(scores_TE.shape)} {scores_TE.dtype}."
        )
