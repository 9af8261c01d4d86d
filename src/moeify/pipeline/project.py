"""Attention projections, or any linear layers, distilled and replaced: the step that comes before training or conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._config import did_you_mean
from .._progress import NO_PROGRESS, Progress
from ..convert import replace_projections
from ..errors import ConfigError
from ..hf.inputs import example_inputs
from ..sites import Attention, ProjectionRecord, check_patterns, find_projections
from ..train.distill import DistillConfig
from ..train.project import ProjectConfig, project_layers
from .heldout import before_replacing
from .inputs import num_tokens, take_tokens, tokens_per_image

_ATTENTION: tuple[Attention, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True)
class ProjectionsConfig(ProjectConfig):
    """Which linear layers are replaced by MLPs of equal cost, and how these are distilled."""

    attention: tuple[Attention, ...] = ()
    """Projections of every attention: any of q, k, v and o."""
    patterns: tuple[str, ...] = ()
    """Further linear layers by name, or by 're:' pattern on it."""
    tokens: int = 40_000
    """Most tokens to distil on, rounded up to whole batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attention and not self.patterns:
            raise ConfigError("attention and patterns are both empty: no projection is replaced.")
        if unknown := next((role for role in self.attention if role not in _ATTENTION), None):
            raise ConfigError(f"attention has no projection {unknown!r}{did_you_mean(unknown, _ATTENTION)}")
        if len(set(self.attention)) < len(self.attention):
            raise ConfigError(f"attention names a projection twice: {','.join(self.attention)}.")
        check_patterns(dict.fromkeys(self.patterns))
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}.")

    @property
    def distillation(self) -> ProjectConfig:
        """What `project_layers` takes."""
        return ProjectConfig(**{f.name: getattr(self, f.name) for f in fields(ProjectConfig)})


def projection_records(model: nn.Module, config: ProjectionsConfig) -> list[ProjectionRecord]:
    """The layers of a transformers model that are to be replaced.

    Raises:
        ConfigError, UnsupportedModelError: as `find_projections`.
    """
    return find_projections(
        model,
        example_inputs(model),
        attention=config.attention,
        patterns=config.patterns,
        flops_factor=config.flops_factor,
        activation=config.activation,
    )


def check_teaching(distill: DistillConfig | None) -> None:
    """Refuse what a teacher whose projections are not replaced cannot teach.

    Raises:
        ConfigError: outputs of FFNs are to be compared, and the teacher has none in the projections' places.
    """
    if distill is not None and distill.ffn_weight:
        raise ConfigError("ffn_weight compares each FFN with the teacher's, which has none where projections are replaced; set it to 0.")


def distil_and_replace(
    model: nn.Module,
    records: Sequence[ProjectionRecord],
    batches: Sequence[dict[str, Tensor]],
    config: ProjectionsConfig,
    *,
    work: Path,
    run: Mapping[str, Any] | None = None,
    held_out: Sequence[Mapping[str, Tensor]] = (),
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Fit an MLP to each layer and put it in the layer's place, in place; the model saves and loads as one that moeify replaced.

    Args:
        model: dense transformers model.
        records: from `projection_records`.
        batches: inputs of one forward each; the first of them, up to ``config.tokens``.
        config: which layers and how.
        work: folder that a killed call continues from; removed by the caller.
        run: what else tells this run from another.
        held_out: batches to measure the model on before and after (`before_replacing`); none measures nothing.
        progress: told every batch and layer.

    Returns:
        JSON values: "layers" (number of them), "tokens" distilled on, "errors" as `project_layers` gives them, by module path, and with
        ``held_out`` "measured".

    Raises:
        ConfigError, DataError: as `project_layers`; the model is unchanged then.
    """
    from ..hf.quantizer import adopt  # here, and not on top: it imports transformers' model code, which takes seconds

    size = tokens_per_image(getattr(model, "config", None))
    taken = take_tokens(batches, config.tokens, tokens_per_image=size)
    found = project_layers(model, records, taken, config.distillation, work=work, run=run, progress=progress)
    original = before_replacing(model, held_out, progress=progress)
    replace_projections(model, records, {name: parts["tensors"] for name, parts in found.items()})
    adopt(model)
    errors = {path: numbers for parts in found.values() for path, numbers in parts["errors"].items()}
    tokens = sum(num_tokens(batch, tokens_per_image=size) for batch in taken)
    measured = {"measured": original(model)} if held_out else {}
    return {"layers": len(records), "tokens": tokens, "errors": errors, **measured}
