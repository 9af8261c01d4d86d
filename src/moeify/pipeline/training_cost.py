"""What pre-training costs in FLOPs, before it begins and after it has ended; nothing is measured here but one forward.

Convention: that of `moeify.cost`; a training step is three forwards (forward, and the gradients of inputs and of weights).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..cost import CostBreakdown, MoECost, estimate_flops
from ..layers import moe_layers
from ..ssd import Fallback, SSDConfig
from ..ssd.controller import Phase
from ..train.loop import TrainConfig

_FORWARDS_OF_A_STEP = 3.0


@dataclass(frozen=True, kw_only=True)
class SequenceCost:
    """FLOPs of one forward of one sequence."""

    dense_flops: float
    """All neurons."""
    sparse_flops: float
    """Routers and the selected experts; as dense without SSD."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """What a run took, or is expected to."""

    dense_steps: int
    """Steps of all neurons, of the run that came out."""
    sparse_steps: int
    """Steps of the selected experts."""
    dense_flops: float
    """Of the dense steps."""
    sparse_flops: float
    """Of the sparse steps, routers included."""
    probe_flops: float
    """SSD's measurements. Clusterings and comparisons are not counted."""
    lost_flops: float
    """Steps that fallbacks threw away. What a killed process did after its last state is not known."""
    all_dense_flops: float
    """The same steps, all dense."""

    @property
    def total_flops(self) -> float:
        """All of it."""
        return self.dense_flops + self.sparse_flops + self.probe_flops + self.lost_flops

    @property
    def gain(self) -> float:
        """How many times fewer FLOPs than dense training of as many steps."""
        return self.all_dense_flops / self.total_flops

    def to_dict(self) -> dict[str, float]:
        """JSON values, the derived ones included."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "total_flops": self.total_flops, "gain": self.gain}


def sequence_cost(model: nn.Module, batch: Mapping[str, Any], config: SSDConfig | None) -> SequenceCost:
    """FLOPs of a forward of the first sequence of ``batch``, watched in one dense forward.

    Args:
        model: dense, or with SSD attached, in dense mode.
        batch: what the model trains on; all sequences of a run are of the same lengths.
        config: of SSD.
    """
    one = {key: value[:1] for key, value in batch.items()}
    if getattr(model.config, "is_encoder_decoder", False):
        one["decoder_input_ids"] = one["labels"]  # as many, and cost knows no values
    layers = moe_layers(model)
    moe = {name: MoECost(num_experts=moe.num_experts, router_flops=float(moe.router.flops_per_token)) for name, moe in layers.items()}
    cost: CostBreakdown = estimate_flops(model, one, sites=[layer.site for layer in layers.values()], moe=moe)
    share = 1.0 if config is None else config.selected / config.num_experts
    sparse = cost.dense_flops if config is None else cost.dense_flops * cost.flops_fraction(share)
    return SequenceCost(dense_flops=cost.dense_flops, sparse_flops=sparse)


def sequences_of_steps(sequences: int, config: TrainConfig) -> list[int]:
    """How many sequences each step takes of so many: ``batch_sequences``, and what is left at the end of an epoch."""
    per_epoch = math.ceil(sequences / config.batch_sequences)
    last = sequences - (per_epoch - 1) * config.batch_sequences
    return [last if step % per_epoch == per_epoch - 1 else config.batch_sequences for step in range(config.steps)]


def training_flops(
    cost: SequenceCost,
    *,
    modes: Sequence[Phase],
    sequences: Sequence[int],
    probe_steps: Sequence[int] = (),
    probe_sequences: int = 0,
    fallbacks: Sequence[Fallback] = (),
) -> TrainingFlops:
    """FLOPs of a run from what it did: a pure function.

    Args:
        cost: of a sequence.
        modes: of each step.
        sequences: of each step.
        probe_steps: steps before which was measured; a forward in dense phases, a dense and a sparse one in sparse phases.
        probe_sequences: of each measurement.
        fallbacks: what was lost; each lost step is taken for one of the mean size.
    """
    dense, sparse = _FORWARDS_OF_A_STEP * cost.dense_flops, _FORWARDS_OF_A_STEP * cost.sparse_flops
    by_mode = {mode: sum(n for n, m in zip(sequences, modes, strict=True) if m == mode) for mode in ("dense", "sparse")}
    mean = sum(sequences) / len(sequences) if sequences else 0.0
    # What is measured before a step is measured in the mode of the step before it.
    measured = [modes[step - 1] if 0 < step <= len(modes) else "dense" for step in probe_steps]
    probe = sum(cost.dense_flops + (cost.sparse_flops if mode == "sparse" else 0.0) for mode in measured)
    return TrainingFlops(
        dense_steps=sum(mode == "dense" for mode in modes),
        sparse_steps=sum(mode == "sparse" for mode in modes),
        dense_flops=dense * by_mode["dense"],
        sparse_flops=sparse * by_mode["sparse"],
        probe_flops=probe * probe_sequences,
        lost_flops=mean * sum(f.dense_steps * dense + f.sparse_steps * sparse for f in fallbacks),
        all_dense_flops=dense * sum(sequences),
    )


def expected_modes(config: SSDConfig | None, steps: int, *, sparse_share: float = 0.5) -> list[Phase]:
    """The mode of each step: as a fixed schedule says it, else so many of them sparse, as if without SSD none."""
    kinds: tuple[Phase, Phase] = ("dense", "sparse")
    if config is None:
        return [kinds[0]] * steps
    if config.schedule == "fixed":
        starts = [round(at * steps) for at in config.switches]
        return [kinds[sum(at <= step for at in starts) % 2] for step in range(steps)]
    return [kinds[step >= steps - round(sparse_share * steps)] for step in range(steps)]
