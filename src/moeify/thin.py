"""Training-free channel sparsity: a dense model whose linear layers skip input channels, from a few thousand tokens of calibration.

Letters: K input channels, N outputs, R sampled tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._config import lookup
from ._progress import NO_PROGRESS, Progress
from .channels import SparseInput, attach_channels, sparse_inputs
from .convert import stamp
from .errors import ConfigError
from .sites import ROLES, FFNSite, LinearSite, Role, find_linear_sites, linear_weight
from .sparsity.channel import (
    SCORES,
    ChannelStats,
    ScoreSample,
    channel_levels,
    channel_scores,
    channel_weights,
    shared_level,
)
from .sparsity.channel_profile import profile_channels


@dataclass(frozen=True, kw_only=True)
class ThinConfig:
    """How much of which layers' inputs is skipped."""

    sparsity: float
    """Wanted share of skipped channels, in [0, 1): mean over layers, weighted by their parameters."""
    score: str = "sensitivity"
    """What a channel is worth: 'magnitude' (TEAL), 'wina', or 'sensitivity', which differentiates the loss once."""
    allocate: Literal["shared", "uniform"] = "shared"
    """How layers share the budget: 'shared', one level for all, with 'sensitivity' only; 'uniform', the same share in each."""
    roles: tuple[Role, ...] = ROLES
    """Which inputs: 'attn_in' (q, k, v), 'attn_out' (o), 'ffn_in' (gate, up), 'ffn_hidden' (down)."""
    first_dense: int = 1
    """Positions at the start of a sequence that keep all channels."""
    rows: int = 1024
    """Tokens whose inputs decide the levels, drawn from all of calibration."""
    refine: int = 1
    """How often levels are set again on what the layers read in the sparse model; what comes before a layer changes its inputs."""
    seed: int = 0
    """Of that draw, and of the labels that 'sensitivity' draws."""

    def __post_init__(self) -> None:
        lookup(SCORES, self.score, where="score")
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), got {self.sparsity}.")
        if self.allocate == "shared" and self.score != "sensitivity":
            raise ConfigError(
                f"allocate='shared' compares layers, and {self.score!r} is no measure for that; use 'sensitivity' or 'uniform'."
            )
        if not self.roles or (bad := next((role for role in self.roles if role not in ROLES), None)):
            raise ConfigError(f"roles must be some of {', '.join(ROLES)}, got {bad if self.roles else 'none'!r}.")
        for name in ("first_dense", "refine"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")


def thin(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: ThinConfig,
    *,
    ffn_sites: Sequence[FFNSite] | None = None,
    compute: torch.dtype | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, float]:
    """Make the linear layers of a dense model skip input channels, in place; no weight changes.

    The manifest is written into ``model.config``, so that ``save_pretrained`` keeps it; `to_dense` gives the dense model back.

    Args:
        model: dense model.
        batches: calibration data, keyword arguments of the model.
        config: what to skip.
        ffn_sites: what `find_ffn_sites` found; None looks.
        compute: dtype of the model's matrix products during calibration (autocast); None leaves the model's own.
        progress: told of every calibration batch.

    Returns:
        Expected sparsity by layer, on the calibration sample.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `find_linear_sites`, `profile_channels` and the scores; nothing is changed then.
    """
    if not batches:
        raise ConfigError("no batch to calibrate on.")
    first: dict[str, Any] = {key: value[:1] for key, value in batches[0].items() if key != "labels"}
    sites = [site for site in find_linear_sites(model, first, ffn_sites=ffn_sites) if site.role in config.roles]
    profile = partial(profile_channels, model, sites, batches, rows=config.rows, compute=compute, seed=config.seed, progress=progress)
    stats = profile(slopes=config.score == "sensitivity")
    levels, expected = plan_levels(model, sites, stats, config)
    for site in sites:
        executor = SparseInput(site, first_dense=config.first_dense)
        executor.level_K.copy_(levels[site.name])
        attach_channels(model, executor)
    for _ in range(config.refine if config.sparsity else 0):
        stats = {name: replace(stats[name], rows_RK=found.rows_RK) for name, found in profile().items()}
        levels, expected = plan_levels(model, sites, stats, config)
        for name, executor in sparse_inputs(model).items():
            executor.level_K.copy_(levels[name])
    stamp(model)
    return expected


def plan_levels(
    model: nn.Module, sites: Sequence[LinearSite], stats: Mapping[str, ChannelStats], config: ThinConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Levels of every layer's channels for a budget, and the sparsity that each layer gets of them on the sample.

    With 'shared' a score is the loss's root per root of a column's parameters, sqrt(x_k^2 slope_k^2 / N), and one level holds everywhere.

    Args:
        model: whose layers they are.
        sites: layers to thin.
        stats: of each, from `profile_channels`.
        config: budget, score and allocation.
    """
    weights, samples = {}, {}
    for site in sites:
        weight_K = channel_weights(config.score, linear_weight(model.get_submodule(site.name)).detach(), stats[site.name])
        weights[site.name] = weight_K / math.sqrt(site.d_out)
        samples[site.name] = ScoreSample(channel_scores(stats[site.name].rows_RK, weights[site.name]))
    costs = {site.name: float(site.d_in * site.d_out) for site in sites}
    if config.allocate == "shared":
        common = shared_level(samples, costs, sparsity=config.sparsity)
        chosen = dict.fromkeys(samples, common)
    else:
        chosen = {name: sample.level(config.sparsity) for name, sample in samples.items()}
    levels = {name: channel_levels(chosen[name], weight_K) for name, weight_K in weights.items()}
    return levels, {name: sample.below(chosen[name]) for name, sample in samples.items()}
