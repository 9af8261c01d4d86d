"""The result of a split: which neuron goes to which expert.

Letters: F FFN width, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..sites.site import expert_bounds


@dataclass(frozen=True)
class ExpertSplit:
    """A partition of F neurons into E experts, as the order that makes every expert a contiguous slice.

    Expert e owns the old neurons ``order_F[expert_bounds(F, E)[e] : expert_bounds(F, E)[e + 1]]``, ascending inside an expert, so that
    equal partitions with equally numbered experts are equal tensors.
    """

    order_F: Tensor
    """int64, a permutation of range(F), on the CPU: new neuron i is old neuron ``order_F[i]``; what `permute_neurons` takes."""
    num_experts: int
    """E."""
    inertia: float | None = None
    """Sum of squared distances of the features to their expert's mean; None where no features were clustered."""

    def __post_init__(self) -> None:
        order_F = self.order_F
        if order_F.dim() != 1 or order_F.dtype is not torch.int64:
            raise ConfigError(f"order_F must be a 1-D int64 tensor, got {tuple(order_F.shape)} {order_F.dtype}.")
        expert_bounds(order_F.numel(), self.num_experts)
        if not torch.equal(order_F.sort().values, torch.arange(order_F.numel(), device=order_F.device)):
            raise ConfigError(f"order_F is not a permutation of 0..{order_F.numel() - 1}.")

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.order_F.numel()

    def labels_F(self) -> Tensor:
        """int64: the expert of each old neuron."""
        labels_F = torch.empty_like(self.order_F)
        labels_F[self.order_F] = slice_labels(self.num_neurons, self.num_experts).to(self.order_F.device)
        return labels_F

    @classmethod
    def from_order(cls, order_F: Tensor, *, num_experts: int, inertia: float | None = None) -> "ExpertSplit":
        """The split whose experts are the consecutive slices of ``order_F``; sorts the neurons inside each expert."""
        num_neurons = order_F.numel()
        order_F = order_F.detach().to("cpu", torch.int64)
        key_F = slice_labels(num_neurons, num_experts) * num_neurons + order_F
        return cls(order_F=key_F.sort().values % num_neurons, num_experts=num_experts, inertia=inertia)


def slice_labels(num_neurons: int, num_experts: int) -> Tensor:
    """int64 (F,): the expert of each new neuron, 0...0 1...1 and so on by `expert_bounds`."""
    bounds = torch.tensor(expert_bounds(num_neurons, num_experts))
    return torch.repeat_interleave(torch.arange(num_experts), bounds.diff())


def check_features(features_FK: Tensor) -> None:
    """Refuse what cannot be clustered, before the first expensive step.

    Raises:
        DataError: not a 2-D floating-point tensor with at least one row, or not finite; names the shape, or the first bad neuron.
    """
    if features_FK.dim() != 2 or not features_FK.is_floating_point() or features_FK.shape[0] == 0:
        raise DataError(
            f"features_FK must be a 2-D floating-point tensor, one row a neuron; got {tuple(features_FK.shape)} {features_FK.dtype}."
        )
    finite_F = features_FK.isfinite().all(1)
    if not bool(finite_F.all()):
        bad = int((~finite_F).nonzero()[0])
        raise DataError(f"features_FK holds NaN or infinity in {int((~finite_F).sum())} neurons, the first is {bad}.")
