"""Training-free channel sparsity: a dense model whose linear layers skip input channels, from a few thousand tokens of calibration.

Letters: K input channels, N outputs, R sampled tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._config import lookup
from ._latency import measure_ms
from ._progress import NO_PROGRESS, Progress
from .channels import SparseInput, all_channels, attach_channels, check_attachable, detach_channels, sparse_inputs
from .errors import ConfigError, DataError, UnsupportedModelError
from .layers import moe_layers
from .manifest import stamp
from .sites import ROLES, FFNSite, LinearSite, Role, find_linear_sites, linear_weight
from .sparsity.allocation import ALLOCATIONS, Budget
from .sparsity.blocks import BlockCalls, block_influence
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
from .sparsity.transform import TRANSFORMS, transformed

COSTS = ("parameters", "time")
"""What a layer may count."""
_SOME = 8  # one batch of so many


@dataclass(frozen=True, kw_only=True)
class ThinConfig:
    """How much of which layers' inputs is skipped."""

    skip_frac: float
    """Wanted share of skipped channels, in [0, 1): mean over layers, weighted by their parameters. With 'uniform' a layer that reads more
    zeros than that skips them all."""
    score: str = "sensitivity"
    """What a channel is worth: 'magnitude' (TEAL), 'wina', or 'sensitivity', which differentiates the loss."""
    allocate: str = "shared"
    """How layers share the budget: 'shared', one level for all, with 'sensitivity' only; 'uniform', the same share in each; 'greedy', in
    each block by the error of the block's output; 'block_influence', more is kept in blocks that change their input more."""
    cost: str = "parameters"
    """What a layer counts in the budget: its 'parameters', or the 'time' that it takes for one token on this machine, measured."""
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
    transform: str = "none"
    """What is done to the weights first: 'none', or 'orthogonal': residual stream and values are rotated so that columns of weights come
    nearer to orthogonal, which 'wina' takes for granted. The model's function stays; RMSNorm models only."""

    def __post_init__(self) -> None:
        lookup(SCORES, self.score, where="score")
        lookup(ALLOCATIONS, self.allocate, where="allocate")
        lookup(TRANSFORMS, self.transform, where="transform")
        check_skip_frac(self.skip_frac)
        if self.allocate == "shared" and self.score != "sensitivity":
            raise ConfigError(
                f"allocate='shared' compares layers, and {self.score!r} is no measure for that; use 'sensitivity' or 'uniform'."
            )
        lookup(dict.fromkeys(COSTS), self.cost, where="cost")
        if not self.roles or (bad := next((role for role in self.roles if role not in ROLES), None)):
            raise ConfigError(f"roles must be some of {', '.join(ROLES)}, got {bad if self.roles else 'none'!r}.")
        if self.transform != "none" and set(self.roles) == {"ffn_hidden"}:
            raise ConfigError(f"transform={self.transform!r} does nothing for 'ffn_hidden' alone: neurons of FFNs are not rotated.")
        for name, least in (("first_dense", 0), ("refine", 0), ("rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def thin(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: ThinConfig,
    *,
    ffn_sites: Sequence[FFNSite] | None = None,
    costs: Mapping[str, float] | None = None,
    compute: torch.dtype | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, float]:
    """Make the linear layers of a dense model skip input channels, in place; no weight changes, but for ``config.transform``.

    The manifest is written into ``model.config``, so that ``save_pretrained`` keeps it; `to_dense` gives the dense model back, with the
    transformed weights where they were.

    Args:
        model: dense model.
        batches: calibration data, keyword arguments of the model.
        config: what to skip.
        ffn_sites: what `find_ffn_sites` found; None looks.
        costs: what a layer counts in the budget by its name, > 0: bytes or time; None: what ``config.cost`` says.
        compute: dtype of the model's matrix products during calibration (autocast); None leaves the model's own.
        progress: told of every calibration batch.

    Returns:
        What each layer skips of the calibration sample, in [0, 1], by its name.

    Raises:
        ConfigError, DataError, UnsupportedModelError: no batch, or as `find_linear_sites`, `check_attachable`, `transformed`,
            `profile_channels` and the scores; nothing is changed then.

    Cost: a pass over ``batches`` (with 'sensitivity' forward and backward, and over an eighth of them before), and ``refine`` forward
    passes; with 'greedy' ten forwards of its block for each layer, over 256 tokens.
    """
    if not batches:
        raise ConfigError("no batch to calibrate on.")
    device = next(model.parameters()).device
    first: dict[str, Any] = {key: value[:1].to(device) for key, value in batches[0].items() if key != "labels"}
    with all_channels(model):
        all_sites = find_linear_sites(model, first, ffn_sites=ffn_sites)
    sites = [site for site in all_sites if site.role in config.roles]
    for site in sites:
        check_attachable(model, site.name)
    costs = check_costs(sites, layer_seconds(model, sites) if costs is None and config.cost == "time" else costs)
    if config.transform != "none" and (sparse_inputs(model) or moe_layers(model)):
        raise UnsupportedModelError("levels and routers are for the weights as they are; transform a dense model, see to_dense(model).")
    with transformed(model, config.transform, first, all_sites):
        expected = _attach_levels(model, batches, config, sites, costs, compute=compute, progress=progress)
    stamp(model)
    return expected


def _attach_levels(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: ThinConfig,
    sites: Sequence[LinearSite],
    costs: Mapping[str, float],
    *,
    compute: torch.dtype | None,
    progress: Progress,
) -> dict[str, float]:
    """Calibrate and attach executors; none stay where that fails. Returns as `thin`."""
    profile = partial(profile_channels, model, sites, rows=config.rows, compute=compute, seed=config.seed, progress=progress)
    below = None
    if has_slopes := config.score == "sensitivity":
        # what skipping costs is asked of the tokens that skip; which these are, roughly, a few batches tell
        some = score_samples(model, sites, profile(batches[::_SOME], slopes=True), costs, config)
        shares = None if config.allocate == "shared" else dict.fromkeys(costs, config.skip_frac)
        below, _ = plan_levels(*some, costs, config, shares=shares)
    stats = profile(batches, slopes=has_slopes, below=below)
    executors = {site.name: SparseInput(site, first_dense=config.first_dense) for site in sites}

    def set_levels(levels: Mapping[str, Tensor]) -> None:
        for name, level_K in levels.items():
            executors[name].level_K.copy_(level_K)

    try:
        for executor in executors.values():
            attach_channels(model, executor)
        weights, samples = score_samples(model, sites, stats, costs, config)
        block_of = {site.name: site.block for site in sites}
        calls = BlockCalls(model, list(block_of.values()), batches[0], compute=compute)

        def error(name: str, share: float) -> float:
            level_K = executors[name].level_K
            level_K.copy_(channel_levels(samples[name].level(share), weights[name]))
            found = calls.error(block_of[name])
            level_K.zero_()
            return found

        influence = partial(block_influence, model, list(block_of.values()), batches, compute=compute)
        budget = Budget(skip_frac=config.skip_frac, costs=costs, blocks=block_of, error=error, influence=influence)
        shares = ALLOCATIONS[config.allocate](budget)
        levels, expected = plan_levels(weights, samples, costs, config, shares=shares)
        set_levels(levels)
        for _ in range(config.refine if config.skip_frac else 0):
            stats = {name: replace(stats[name], rows_RK=found.rows_RK) for name, found in profile(batches).items()}
            levels, expected = plan_levels(*score_samples(model, sites, stats, costs, config), costs, config, shares=shares)
            set_levels(levels)
    except BaseException:  # Ctrl-C, too: half a calibration is none
        detach_channels(model, executors)
        raise
    return expected


def check_skip_frac(skip_frac: float) -> None:
    """Refuse a share that cannot be skipped.

    Raises:
        ConfigError: not in [0, 1), or NaN.
    """
    if not 0 <= skip_frac < 1:
        raise ConfigError(f"skip_frac (--target) must be in [0, 1), got {skip_frac}.")


@torch.no_grad()
def layer_seconds(model: nn.Module, sites: Sequence[LinearSite], *, rounds: int = 20) -> dict[str, float]:
    """Time of each dense layer for one token, by name: the median of ``rounds`` turns, in each of which all layers run once."""
    calls: dict[str, Callable[[], object]] = {}
    for site in sites:
        layer = model.get_submodule(site.name)
        calls[site.name] = partial(layer, linear_weight(layer).new_ones(1, site.d_in))
    on_gpu = next(model.parameters()).device.type == "cuda"
    with all_channels(model):
        times = measure_ms(calls, rounds=rounds, sync=torch.cuda.synchronize if on_gpu else None)
    return {name: time.median_ms / 1e3 for name, time in times.items()}


def check_costs(sites: Sequence[LinearSite], costs: Mapping[str, float] | None) -> dict[str, float]:
    """The cost of every layer; parameters where none are given.

    Raises:
        ConfigError: one is missing or not above 0.
    """
    if costs is None:
        return {site.name: float(site.d_in * site.d_out) for site in sites}
    if bad := next((site.name for site in sites if not 0 < costs.get(site.name, 0) < math.inf), None):
        raise ConfigError(f"the cost of '{bad}' must be finite and greater than 0, got {costs.get(bad)}.")
    return {site.name: costs[site.name] for site in sites}


def score_samples(
    model: nn.Module, sites: Sequence[LinearSite], stats: Mapping[str, ChannelStats], costs: Mapping[str, float], config: ThinConfig
) -> tuple[dict[str, Tensor], dict[str, ScoreSample]]:
    """weight_K of every layer's channels, and its scores on the sample, by name.

    Scores are taken over the root of a column's cost (its parameters, N, by default), |x_k| weight_k / sqrt(cost / K). With 'sensitivity'
    the square is what skipping costs of the loss for each parameter saved, so that one level for all layers is the best allocation;
    elsewhere the factor cancels.

    Raises:
        ConfigError, DataError: as `channel_weights` and `ScoreSample`.
    """
    weights, samples = {}, {}
    for site in sites:
        try:
            weight_K = channel_weights(config.score, linear_weight(model.get_submodule(site.name)).detach(), stats[site.name])
            weights[site.name] = weight_K / math.sqrt(costs[site.name] / site.d_in)
            samples[site.name] = ScoreSample(channel_scores(stats[site.name].rows_RK, weights[site.name]))
        except DataError as error:
            raise DataError(f"'{site.name}': {error}") from error
    return weights, samples


def plan_levels(
    weights: Mapping[str, Tensor],
    samples: Mapping[str, ScoreSample],
    costs: Mapping[str, float],
    config: ThinConfig,
    *,
    shares: Mapping[str, float] | None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Levels of every layer's channels for a budget.

    Args:
        weights, samples: from `score_samples`.
        costs: of each layer.
        config: budget.
        shares: what each layer is to skip; None: one level for all.

    Returns:
        level_K of each layer by name, in units of its input, and what the layer skips of its sample, in [0, 1].
    """
    if shares is None:
        chosen = dict.fromkeys(samples, shared_level(samples, costs, skip_frac=config.skip_frac))
    else:
        chosen = {name: sample.level(shares[name]) for name, sample in samples.items()}
    levels = {name: channel_levels(chosen[name], weight_K) for name, weight_K in weights.items()}
    return levels, {name: sample.below(chosen[name]) for name, sample in samples.items()}
