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
from .channels import SparseInput, all_channels, attach_channels, check_attachable, detach_channels
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

    skip_frac: float
    """Wanted share of skipped channels, in [0, 1): mean over layers, weighted by their parameters. With 'uniform' a layer that reads more
    zeros than that skips them all."""
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
        if not 0 <= self.skip_frac < 1:
            raise ConfigError(f"skip_frac must be in [0, 1), got {self.skip_frac}.")
        if self.allocate == "shared" and self.score != "sensitivity":
            raise ConfigError(
                f"allocate='shared' compares layers, and {self.score!r} is no measure for that; use 'sensitivity' or 'uniform'."
            )
        if not self.roles or (bad := next((role for role in self.roles if role not in ROLES), None)):
            raise ConfigError(f"roles must be some of {', '.join(ROLES)}, got {bad if self.roles else 'none'!r}.")
        for name, least in (("first_dense", 0), ("refine", 0), ("rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


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
        What each layer skips of the calibration sample, in [0, 1], by its name.

    Raises:
        ConfigError, DataError, UnsupportedModelError: no batch, or as `find_linear_sites`, `check_attachable`, `profile_channels` and the
            scores; nothing is changed then.

    Cost: a pass over ``batches`` (with 'sensitivity' a backward one, too), and ``refine`` forward passes.
    """
    if not batches:
        raise ConfigError("no batch to calibrate on.")
    first: dict[str, Any] = {key: value[:1] for key, value in batches[0].items() if key != "labels"}
    with all_channels(model):
        sites = [site for site in find_linear_sites(model, first, ffn_sites=ffn_sites) if site.role in config.roles]
    for site in sites:
        check_attachable(model, site.name)
    profile = partial(profile_channels, model, sites, batches, rows=config.rows, compute=compute, seed=config.seed, progress=progress)
    stats = profile(slopes=config.score == "sensitivity")
    levels, expected = plan_levels(model, sites, stats, config)
    executors = {site.name: SparseInput(site, first_dense=config.first_dense) for site in sites}
    for name, executor in executors.items():
        attach_channels(model, executor)
        executor.level_K.copy_(levels[name])
    try:
        for _ in range(config.refine if config.skip_frac else 0):
            stats = {name: replace(stats[name], rows_RK=found.rows_RK) for name, found in profile().items()}
            levels, expected = plan_levels(model, sites, stats, config)
            for name, executor in executors.items():
                executor.level_K.copy_(levels[name])
    except BaseException:  # Ctrl-C, too: half a calibration is none
        detach_channels(model, executors)
        raise
    stamp(model)
    return expected


def plan_levels(
    model: nn.Module, sites: Sequence[LinearSite], stats: Mapping[str, ChannelStats], config: ThinConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Levels of every layer's channels for a budget.

    Scores are taken over the root of a column's parameters, |x_k| weight_k / sqrt(N). With 'sensitivity' its square is what skipping costs
    of the loss for each parameter saved, so that one level for all layers is the best allocation; with 'uniform' the factor cancels.

    Args:
        model: whose layers they are.
        sites: layers to thin.
        stats: of each, from `profile_channels`.
        config: budget, score and allocation.

    Returns:
        level_K of each layer by name, in units of its input, and what the layer skips of its sample, in [0, 1].

    Raises:
        ConfigError, DataError: as `channel_weights` and `ScoreSample`.
    """
    weights, samples = {}, {}
    for site in sites:
        weight_K = channel_weights(config.score, linear_weight(model.get_submodule(site.name)).detach(), stats[site.name])
        weights[site.name] = weight_K / math.sqrt(site.d_out)
        samples[site.name] = ScoreSample(channel_scores(stats[site.name].rows_RK, weights[site.name]))
    costs = {site.name: float(site.d_in * site.d_out) for site in sites}
    if config.allocate == "shared":
        common = shared_level(samples, costs, skip_frac=config.skip_frac)
        chosen = dict.fromkeys(samples, common)
    else:
        chosen = {name: sample.level(config.skip_frac) for name, sample in samples.items()}
    levels = {name: channel_levels(chosen[name], weight_K) for name, weight_K in weights.items()}
    return levels, {name: sample.below(chosen[name]) for name, sample in samples.items()}
