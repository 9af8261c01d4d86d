"""Fitting one layer at a time: split its neurons, then its router, from the inputs that `capture` stored.

Letters: T tokens, D model width, F FFN width, E experts, G expert size.

The dense model is frozen and every router sees the dense model's activations, so layers do not depend on each other: each is fitted alone,
in the memory of one layer, and a killed run continues with the next.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .._random import seeded
from ..convert import ConvertConfig
from ..errors import ConfigError, DataError
from ..manifest import SiteRecord
from ..routers import (
    CentreRouter,
    GateRouter,
    LinearRouter,
    LowRankRouter,
    MLPRouter,
    NormRouter,
    Router,
    RouterConfig,
    build_router,
    expert_grams,
    expert_norms,
    expert_sums,
)
from ..sites import FFNSite, FFNWeights, expert_bounds
from ..sites.formula import ACTIVATIONS, ffn_hidden
from ..split import Coactivation, ExpertSplit, coactivation_features, parameter_features, split_neurons
from .capture import fast_dtype

_CHUNK_TOKENS = 1024  # rows of x whose activations are in memory at once; larger is no faster
_SILENT_ENERGY = 1e-4  # of the mean energy of an expert's output; less is as good as none
_LEAST_STD = 0.1  # of the mean deviation of a channel: 0.001 captures as much (SmolLM2: .9325 / .9327, .8773 / .8768), and is brittle
_HOLDOUT_BLOCK = 512
_MOMENT_TOKENS = 8192  # tokens whose moments make the routers that are not trained
_SPLIT_TOKENS = 4096  # tokens whose activations make the features of a co-activation split


@dataclass(frozen=True, kw_only=True)
class RouterTrainConfig:
    """How a router is fitted to its targets."""

    epochs: int = 3
    """Passes over the calibration tokens."""
    batch_tokens: int = 512
    """Tokens per optimizer step."""
    lr: float = 1e-2
    """Largest learning rate of AdamW; decays to zero by a cosine."""
    holdout_frac: float = 0.1
    """Share of the tokens, spread over the data in blocks, that is never trained on: it scores the router and calibrates the rule."""
    seed: int = 0
    """Seed of the initial weights and of the order of tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout_frac < 1:
            raise ConfigError(f"holdout_frac must be inside (0, 1), got {self.holdout_frac}.")
        if self.epochs < 1 or self.batch_tokens < 1:
            raise ConfigError("epochs and batch_tokens must be at least 1.")


@dataclass(frozen=True)
class FittedSite:
    """What fitting one site gives; all that `convert.apply_site` and calibration need."""

    order_F: Tensor
    """Old neuron id of each new position."""
    router_state: dict[str, Tensor]
    scores_TE: Tensor
    """Router scores of the held-out tokens, fp32."""
    always_on: tuple[int, ...] = ()
    """Experts that are to run for every token; the record's, and the calibrator's."""
    captured: dict[str, float] = field(default_factory=dict)
    """Share of the held-out output norm that the router's top 10, 25, 50 and 75 % of the experts hold, and the oracle's ("oracle@0.25")."""


def fit_site(weights: FFNWeights, x_TD: Tensor, record: SiteRecord, options: ConvertConfig, train: RouterTrainConfig) -> FittedSite:
    """Split one FFN and fit its router.

    Args:
        weights: the site's weights in their present order; not changed.
        x_TD: FFN inputs of the dense model, any float dtype, on the CPU; ``holdout_frac`` of them, in blocks spread over the data,
            score the router.
        record: number of experts and router.
        options: split method, and how many experts are always on.
        train: router training.

    Returns:
        Permutation, router tensors, held-out scores and the experts that are always on.

    Raises:
        DataError: too few tokens to train on some and hold out others.
    """
    weights = cast_weights(weights, torch.float32, device=x_TD.device)  # of a model on another device, one layer at a time
    train_TD, held_out_TD = split_tokens(x_TD, train.holdout_frac, name=record.site.name)
    del x_TD  # the caller keeps no other reference: one copy of the inputs in memory, not two
    split = split_site(weights, train_TD, record, options)
    ordered = replace(
        weights,
        **{f.name: t[split.order_F] for f in fields(weights) if f.name != "down_bias_D" and (t := getattr(weights, f.name)) is not None},
    )
    state, scores_TE, captured = fit_new_router(record.router, train_TD, held_out_TD, ordered, record.site, record.num_experts, train)
    always_on = loudest_experts(
        train_TD, ordered, activation=record.site.activation, num_experts=record.num_experts, count=options.always_on
    )
    return FittedSite(order_F=split.order_F, router_state=state, scores_TE=scores_TE, always_on=always_on, captured=captured)


def fit_new_router(
    config: RouterConfig,
    train_TD: Tensor,
    held_out_TD: Tensor,
    weights: FFNWeights,
    site: FFNSite,
    num_experts: int,
    train: RouterTrainConfig,
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """A router of this config fitted to one layer's inputs: its tensors, and what `score_router` says of it on held-out ones.

    Args:
        config: of the router.
        train_TD: inputs to fit it to.
        held_out_TD: inputs to score it on.
        weights: fp32 weights of the FFN, neurons in expert order.
        site: the FFN.
        num_experts: E.
        train: optimizer settings and seed; torch's own generators are left as they were.

    Raises:
        DataError: scores that are read off the FFN's own weights are all 0, so that no rule can be calibrated on them.
    """
    with seeded(train.seed, train_TD.device):
        router = build_router(config, site=site, num_experts=num_experts)
        fit_router(router, train_TD, weights, activation=site.activation, num_experts=num_experts, config=train)
    scores_TE, captured = score_router(router, held_out_TD, weights, activation=site.activation, num_experts=num_experts)
    if router.is_of_weights and not bool(scores_TE.any()):
        raise DataError(f"'{site.name}': calibration saw only zeros at this FFN; give other data, or leave it dense by the policy.")
    return {name: tensor.detach().contiguous() for name, tensor in router.state_dict().items()}, scores_TE, captured


def split_tokens(x_TD: Tensor, holdout_frac: float, *, name: str) -> tuple[Tensor, Tensor]:
    """Tokens to fit to, and those held out.

    Raises:
        DataError: too few of them, of the FFN ``name``.
    """
    num_tokens = x_TD.shape[0]
    held_out_T = held_out_tokens(num_tokens, holdout_frac) if num_tokens else torch.zeros(0, dtype=torch.bool)
    num_train = num_tokens - int(held_out_T.sum())
    if num_train < 2:  # the spread of a single one is not defined
        raise DataError(
            f"'{name}' saw {num_tokens} calibration tokens, {num_train} of them to train on; a router needs at least 2, and "
            "thousands to be good."
        )
    return x_TD[~held_out_T], x_TD[held_out_T]


def held_out_tokens(num_tokens: int, share: float) -> Tensor:
    """bool (T,): blocks of consecutive tokens at even distances; at least one token on either side.

    Blocks, because neighbouring tokens resemble each other; spread, because the last tenth of a corpus is one topic, and activity differs
    by several points between topics.
    """
    block = max(1, min(_HOLDOUT_BLOCK, int(num_tokens * share / 4)))
    held_out_T = (torch.arange(num_tokens, dtype=torch.float64) // block + 1) * share % 1 < share - 1e-9
    held_out_T[0], held_out_T[-1] = False, True
    return held_out_T


def split_site(weights: FFNWeights, x_TD: Tensor, record: SiteRecord, options: ConvertConfig) -> ExpertSplit:
    """The split of one FFN by ``options.split``; co-activation reads its features off ``x_TD``. Experts of one neuron keep their order."""
    if record.num_experts == record.site.d_ff:
        return ExpertSplit.from_order(torch.arange(record.site.d_ff), num_experts=record.num_experts)
    method = options.split_method(default=Coactivation())
    if isinstance(method, Coactivation):
        features_FK = coactivation_features(_energies(weights, x_TD, record.site.activation), method=method)
    else:
        features_FK = parameter_features(weights)
    return split_neurons(features_FK, num_experts=record.num_experts, method=method)


def fit_router(router: Router, x_TD: Tensor, weights: FFNWeights, *, activation: str, num_experts: int, config: RouterTrainConfig) -> None:
    """Fit a router in place to one layer's stored inputs; a router without parameters to train returns at once.

    Norm router: Gamma deviance ``t exp(-z) + z`` of the squared norms t (``output="exp"``) or the squared error of the norms (``"abs"``).
    MoEfication's classifier: binary cross-entropy against each expert's summed activation over the largest of the batch. Centres are
    means, the gate's scales and the factors of low rank come from the weights and from moments of the inputs: not trained.

    Args:
        router: fresh router.
        x_TD: training inputs.
        weights: fp32 weights, neurons in expert order.
        activation: of the FFN.
        num_experts: E.
        config: optimizer settings; the order of tokens comes from torch's generator, which the caller seeds.
    """
    bounds = expert_bounds(weights.num_neurons, num_experts)
    if isinstance(router, CentreRouter | LinearRouter):
        router.set_centres(weights, bounds)
    elif isinstance(router, GateRouter):
        router.set_scales(weights, _mean_sizes(x_TD, weights, activation)[1])
    elif isinstance(router, LowRankRouter):
        mean_gate_F, mean_up_F = _mean_sizes(x_TD, weights, activation)
        x_SD = some_rows(x_TD, most=_MOMENT_TOKENS).float()
        router.set_factors(weights, x_SD.t() @ x_SD / len(x_SD), mean_gate_F=mean_gate_F, mean_up_F=mean_up_F)
    elif isinstance(router, NormRouter):
        grams_EGG = expert_grams(weights.down_FD, bounds)
        targets_TE = _per_chunk(x_TD, weights, activation, lambda h_TF: expert_norms(h_TF, grams_EGG, bounds))
        _fit_norm_router(router, x_TD, targets_TE, config)
    elif isinstance(router, MLPRouter):
        router.set_centres(weights, bounds)
        targets_TE = _per_chunk(x_TD, weights, activation, lambda h_TF: expert_sums(h_TF, bounds))
        _fit_classifier(router, x_TD, targets_TE, config)


@torch.no_grad()
def loudest_experts(x_TD: Tensor, weights: FFNWeights, *, activation: str, num_experts: int, count: int) -> tuple[int, ...]:
    """The ``count`` experts that give the largest output norm on any one token, ascending; of equal ones the lower numbers.

    A few neurons write outliers that all later layers rely on, on few tokens: a router that misses them once costs more than running them
    always.

    Cost: one pass over the activations; none for 0.
    """
    if count == 0:
        return ()
    bounds = expert_bounds(weights.num_neurons, num_experts)
    grams_EGG = expert_grams(weights.down_FD, bounds)
    norms_TE = _per_chunk(x_TD, weights, activation, lambda h_TF: expert_norms(h_TF, grams_EGG, bounds))
    return tuple(sorted(norms_TE.amax(0).sort(descending=True, stable=True).indices[:count].tolist()))


@torch.no_grad()
def score_router(
    router: Router, x_TD: Tensor, weights: FFNWeights, *, activation: str, num_experts: int
) -> tuple[Tensor, dict[str, float]]:
    """Scores of held-out tokens, and how much of the true output norm the best-scored experts hold.

    captured@f = sum over tokens of |y_e|^2 over the top f*E experts by score / sum over all experts;   oracle@f the same by the true norms.

    Returns:
        scores_TE in fp32, and captured and oracle shares in [0, 1] for f = 0.1, 0.25, 0.5, 0.75.
    """
    bounds = expert_bounds(weights.num_neurons, num_experts)
    grams_EGG = expert_grams(weights.down_FD, bounds)
    energy_TE = _per_chunk(x_TD, weights, activation, lambda h_TF: expert_norms(h_TF, grams_EGG, bounds)).square()
    scores_TE = torch.cat([router(x, weights) for x in x_TD.float().split(_CHUNK_TOKENS)])
    total = energy_TE.sum().clamp_min(torch.finfo(torch.float32).tiny)
    captured = {}
    for frac in (0.1, 0.25, 0.5, 0.75):
        k = max(1, round(frac * num_experts))
        captured[f"captured@{frac}"] = (energy_TE.gather(1, scores_TE.topk(k, dim=1).indices).sum() / total).item()
        captured[f"oracle@{frac}"] = (energy_TE.topk(k, dim=1).values.sum() / total).item()
    return scores_TE, captured


def router_targets(norms_TE: Tensor, *, output: str) -> tuple[Tensor, Tensor]:
    """What a norm router is regressed to, in place of ``norms_TE``, and the scale that it is in: the root mean square of the norms.

    t = max((norm / scale)^2, 1e-4) for "exp", norm / scale for "abs"
    """
    # The largest norm decides the scale of the squared error. The Gamma deviance has none, but needs a floor: towards an expert that is
    # silent (ReLU: exactly) z falls without end, and where it then fires t exp(-z) explodes; scores came out up to 20x too large.
    scale = (norms_TE.norm() / norms_TE.numel() ** 0.5).clamp_min(1e-12)
    targets_TE = norms_TE.div_(scale)  # in place: T * E numbers are the largest thing here beside the inputs
    return targets_TE.square_().clamp_min_(_SILENT_ENERGY) if output == "exp" else targets_TE, scale


def router_loss(z_TE: Tensor, targets_TE: Tensor, *, output: str) -> Tensor:
    """Mean over tokens and experts of the Gamma deviance ``t exp(-z) + z`` ("exp"), or of the squared error ``(|z| - t)^2`` ("abs").

    Args:
        z_TE: raw scores in units of `router_targets`' scale.
        targets_TE: from `router_targets`.
        output: `NormRouterConfig.output`.
    """
    if output == "exp":
        return (targets_TE * torch.exp(-z_TE.clamp(-30, 30)) + z_TE).mean()
    return (z_TE.abs() - targets_TE).square().mean()


def _fit_norm_router(router: NormRouter, x_TD: Tensor, norms_TE: Tensor, config: RouterTrainConfig) -> None:
    log_link = router.config.output == "exp"
    mean_D, std_D = _mean_and_std(x_TD)
    # A channel that hardly varies must not be blown up: bfloat16 may have rounded its variation away, which the deployed router would see,
    # and a later change of what was constant (the gain of a norm, of which some are 1e-4 of others) would be multiplied by thousands.
    std_D = std_D.maximum(2**-8 * mean_D.abs()).maximum(_LEAST_STD * std_D.mean()).clamp_min(1e-6)
    targets_TE, scale = router_targets(norms_TE, output=router.config.output)
    with torch.no_grad():  # start from what is known without looking at x: each expert's mean
        mean_E = targets_TE.mean(0)
        router.out.bias.copy_(mean_E.clamp_min(1e-8).log() if log_link else mean_E)
        router.out.weight.normal_(0, 0.01)
        router.hidden.weight.normal_(0, x_TD.shape[1] ** -0.5)
        router.hidden.bias.zero_()

    def loss_of(rows: Tensor) -> Tensor:
        z_TE = router.raw_scores((x_TD[rows].float() - mean_D) / std_D)
        return router_loss(z_TE, targets_TE[rows], output=router.config.output)

    minimise(router.parameters(), loss_of, x_TD.shape[0], epochs=config.epochs, batch_tokens=config.batch_tokens, lr=config.lr)
    with torch.no_grad():  # fold standardisation and scale into the weights: the deployed router reads x as it is
        router.hidden.weight.div_(std_D)
        router.hidden.bias.sub_(router.hidden.weight @ mean_D)
        if log_link:
            router.out.bias.add_(2 * scale.log())
        else:
            router.out.weight.mul_(scale)
            router.out.bias.mul_(scale)


def _mean_and_std(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample deviation of each channel, in fp32 accuracy, without an fp32 copy of all tokens."""
    chunks = x_TD.split(_CHUNK_TOKENS)
    # One tensor made before: small results between large temporaries keep the heap from giving these back (400 MB at 90,000 tokens).
    parts_KD = torch.empty(len(chunks), x_TD.shape[1], dtype=torch.float64)
    for part_D, x in zip(parts_KD, chunks, strict=True):
        torch.sum(x.double(), 0, out=part_D)
    mean_D = parts_KD.sum(0) / x_TD.shape[0]
    for part_D, x in zip(parts_KD, chunks, strict=True):
        torch.sum(x.double().sub_(mean_D).square_(), 0, out=part_D)
    variance_D = parts_KD.sum(0) / max(1, x_TD.shape[0] - 1)
    return mean_D.float(), variance_D.sqrt().float()


def _fit_classifier(router: MLPRouter, x_TD: Tensor, sums_TE: Tensor, config: RouterTrainConfig) -> None:
    def loss_of(rows: Tensor) -> Tensor:
        labels = sums_TE[rows]
        return F.binary_cross_entropy_with_logits(router.raw_scores(x_TD[rows]), labels / labels.max().clamp_min(1e-12))

    minimise(router.parameters(), loss_of, x_TD.shape[0], epochs=config.epochs, batch_tokens=config.batch_tokens, lr=config.lr)


def minimise(
    parameters: Iterable[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    num_tokens: int,
    *,
    epochs: int,
    batch_tokens: int,
    lr: float,
    generator: torch.Generator | None = None,
) -> None:
    """Minimise ``loss_of(rows)`` by AdamW over random batches of the rows [0, num_tokens), in place.

    Args:
        parameters: leaves that require a gradient.
        loss_of: a scalar of some rows.
        num_tokens: number of rows.
        epochs: passes over them.
        batch_tokens: rows a step.
        lr: largest learning rate; it warms up over a tenth of the steps and falls to nearly 0 by a cosine.
        generator: of the order of rows; None: torch's own.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0, fused=True)
    total_steps = epochs * -(-num_tokens // batch_tokens) + 1
    warmup = max(0.1, 1.5 / total_steps)  # torch divides by total_steps * warmup - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps, pct_start=warmup)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(num_tokens, generator=generator).split(batch_tokens):
                loss_of(rows).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()


@torch.no_grad()
def _per_chunk(x_TD: Tensor, weights: FFNWeights, activation: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of the activations, a chunk of tokens at a time: (T, F) numbers never exist together.

    In bfloat16 where that is native: the inputs are stored in it, and a target needs no more.
    """
    dtype = fast_dtype(x_TD.device)
    low = cast_weights(weights, dtype)
    result = torch.empty(0)
    for start in range(0, x_TD.shape[0], _CHUNK_TOKENS):
        part = function(ffn_hidden(x_TD[start : start + _CHUNK_TOKENS].to(dtype), low, activation=activation).float())
        if start == 0:  # filled, not concatenated: T * E numbers would exist twice for a moment
            result = part.new_empty(x_TD.shape[0], part.shape[1])
        result[start : start + len(part)] = part
    return result


@torch.no_grad()
def _mean_sizes(x_TD: Tensor, weights: FFNWeights, activation: str) -> tuple[Tensor | None, Tensor]:
    """Means of |act(gate)|, None where there is no gate, and of |up|, each (F,)."""
    x_SD, act = some_rows(x_TD, most=_MOMENT_TOKENS).float(), ACTIVATIONS[activation]
    up_F = F.linear(x_SD, weights.up_FD, weights.up_bias_F).abs_().mean(0)
    if weights.gate_FD is None:
        return None, up_F
    return act(F.linear(x_SD, weights.gate_FD, weights.gate_bias_F)).abs_().mean(0), up_F


def some_rows(rows_TK: Tensor, *, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    return rows_TK[torch.linspace(0, len(rows_TK) - 1, min(most, len(rows_TK))).long()]


@torch.no_grad()
def _energies(weights: FFNWeights, x_TD: Tensor, activation: str) -> Tensor:
    """(h_j * |w_down_j|)^2 of `_SPLIT_TOKENS` tokens spread evenly over the calibration data: energy_TF."""
    down_norm_F = weights.down_FD.norm(dim=1)
    return _per_chunk(some_rows(x_TD, most=_SPLIT_TOKENS), weights, activation, lambda h_TF: (h_TF * down_norm_F).square())


def cast_weights(weights: FFNWeights, dtype: torch.dtype, *, device: torch.device | None = None) -> FFNWeights:
    """The weights in another dtype, and on another device if one is given, without gradients; themselves where they are so."""
    tensors = {f.name: t for f in fields(weights) if (t := getattr(weights, f.name)) is not None}
    return replace(weights, **{name: tensor.detach().to(device=device, dtype=dtype) for name, tensor in tensors.items()})
