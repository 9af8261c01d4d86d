"""Hard selection while a converted model trains, and the gradients that reach its routers.

Letters: T tokens, D model width, F FFN width, E experts, G expert size, S sampled tokens.

In training, selection is by budget: the share of (token, expert) pairs that a layer's rule would run at some value of its knob, set for
every batch on the batch's own scores, so that no budget drifts while routers and experts change. The forward pass is exactly that of the
converted model, unselected experts contribute nothing; the backward pass may reach routers in two ways:

    straight_through  each pair's factor is 1 or 0, and its gradient that of a sigmoid around the token's boundary b_t:
                      f = m + sigmoid((log s - log b_t) / temperature) - [the same, without gradient]
                      d loss / d f_e = <d loss / d y, y_e>, for every expert, selected or not
    norms             the regression that routers are fitted by, of their raw scores to the present experts' output norms

Neither sends anything into the FFN's input: a router learns from the model, the model does not move to please it. The regression's gradient
is injected on the way back (see `sparsity.inflight`), so that it survives checkpointing and is multiplied by what multiplies the loss.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, UnsupportedModelError
from ..kernels.plan import neuron_mask
from ..layers import MoEFFN, moe_layers
from ..routers import NormRouter, expert_grams, expert_norms
from ..select import Rule
from ..sites import mask_name, token_mask_of
from ..sparsity.inflight import InFlight, Removable
from .fit import router_loss, router_targets

_MOST_PAIRS = 1 << 20  # scores that set a batch's threshold; more are sampled by token: 0.1 points of active fraction
_MOST_RATIO = 100.0  # true over predicted squared norm, beyond which a pair pulls its router no harder


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which experts run in training, and what teaches the routers."""

    target_active: tuple[float, float] = (0.5, 0.5)
    """Active fraction of a step, drawn uniformly between the two, in (0, 1]; every layer has it in every batch. Evaluation in between takes
    the middle."""
    routers: Literal["frozen", "norms", "straight_through", "both"] = "norms"
    """What routers learn from: nothing; the output norms of the present experts; the task's loss through the selection; or both."""
    router_weight: float = 1.0
    """Weight of the mean over layers of the routers' regression, beside the model's loss; greater than 0. It moves nothing but routers."""
    router_tokens: int = 512
    """Tokens of a batch, evenly spaced, that the routers' regression is made on."""
    temperature: float = 0.5
    """Width of the straight-through sigmoid in units of log score; greater than 0."""

    def __post_init__(self) -> None:
        low, high = self.target_active
        if not 0 < low <= high <= 1:
            raise ConfigError(f"target_active must be two fractions with 0 < low <= high <= 1, got {list(self.target_active)}.")
        for name in ("router_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and greater than 0, got {getattr(self, name)}.")
        if self.router_tokens < 1:
            raise ConfigError(f"router_tokens must be at least 1, got {self.router_tokens}.")


class SelectionTraining(Removable):
    """Selects by budget in every forward of a converted model until it is removed, or its ``with`` block ends; a `Part` of training.

    Gradients are exact under accumulation, autocast, gradient scalers and both kinds of checkpointing, as those of `enforce_sparsity`: the
    routers' regression is multiplied by what multiplies ``outputs.loss``. FFNs run dense and masked; ``torch.compile`` is not supported.

    Args:
        model: converted model; put into moe mode. Parameters that are not to change have ``requires_grad`` unset by the caller.
        config: None: the defaults.
        seed: of the active fractions; a step's is a function of (seed, step) alone.

    Raises:
        ConfigError: the model is dense, or a router cannot learn what ``routers`` asks for.
        UnsupportedModelError: another is attached already, or norms are asked for of experts whose weights cannot be read (adapters).

    Cost: the dense step, a pass over (T, F) each way for the mask, the routers, and a selection of the n-th of T * E scores.
    """

    def __init__(self, model: nn.Module, config: SelectionConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or SelectionConfig()
        layers = list(moe_layers(model).values())
        if not layers:
            raise ConfigError(f"this {type(model).__name__} has no experts to select; convert it first.")
        for layer in layers:
            self._check(layer)
        self.active = 1.0
        """Active fraction of the present step."""
        self._seed = seed
        self._state = InFlight(model)
        self._layers = {layer: _Layer(self, layer, share=1 / len(layers), mask_name=mask_name(model, layer.site)) for layer in layers}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._state.begin, with_kwargs=True),
            model.register_forward_hook(self._state.end),
        ]
        for layer, part in self._layers.items():
            layer.mode = "moe"
            layer.selector = part.select
        self.set_step(0)

    def _check(self, layer: MoEFFN) -> None:
        name, router, wanted = layer.site.name, layer.router, self.config.routers
        if layer.selector is not None:
            raise UnsupportedModelError(f"'{name}' is under another selection already; remove that one first.")
        if wanted in ("norms", "both"):
            if not isinstance(router, NormRouter):
                raise ConfigError(
                    f"'{name}' has a {router.config.name} router, which predicts no norms; use routers='straight_through' or 'frozen'."
                )
            layer.weights()
        if wanted in ("straight_through", "both") and not any(True for _ in router.parameters()):
            raise ConfigError(f"'{name}' has a {router.config.name} router, which has nothing to learn; use routers='frozen'.")

    def set_step(self, step: int) -> None:
        """Draw the active fraction of an optimizer step."""
        self.active = random.Random(f"{self._seed}:{step}").uniform(*self.config.target_active)

    def follow(self, loss: Tensor) -> Tensor:
        """Multiply the routers' regression by whatever multiplies this loss, where it is not ``outputs.loss``; see `Enforcement.follow`."""
        self._state.follow(loss)
        return loss

    def values(self) -> Mapping[str, Tensor]:
        """Of the last forward, means over layers: ``active_fraction``, and ``router_deviance`` where norms teach the routers: for "exp" the
        mean of t exp(-z) + z - log t - 1, >= 0, of the squared norms t; for "abs" the squared error over the mean squared norm.
        """
        found: dict[str, list[Tensor]] = {"active_fraction": [], "router_deviance": []}
        for part in self._layers.values():
            for name, values in found.items():
                if (value := part.values.get(name)) is not None:
                    values.append(value.float())
        return {name: torch.stack([v.to(values[0].device) for v in values]).mean() for name, values in found.items() if values}

    def remove(self) -> None:
        """Give the layers their rules back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer, part in self._layers.items():
            if layer.selector == part.select:
                layer.selector = None


class _Layer:
    """The selection of one FFN."""

    def __init__(self, training: SelectionTraining, layer: MoEFFN, *, share: float, mask_name: str) -> None:
        self.values: dict[str, Tensor] = {}
        self._config, self._training, self._state, self._layer = training.config, training, training._state, layer
        self._share = share
        self._mask_name = mask_name

    def select(self, layer: MoEFFN, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's `Selector`."""
        config = self._config
        x_TD, h_TF = x.detach().reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
        keep_T = token_mask_of(self._state.masks[self._mask_name], x.shape[:-1])
        if keep_T is not None:
            keep_T = keep_T.to(x.device)
        learns = torch.is_grad_enabled() and layer.training and any(p.requires_grad for p in layer.router.parameters())
        through = learns and config.routers in ("straight_through", "both")
        with torch.set_grad_enabled(through):
            scores_TE = layer.scores(x_TD)
        active = self._training.active if layer.training else sum(config.target_active) / 2
        mask_TE = select_share(layer.rule, scores_TE.detach(), active, keep_T=keep_T, always_on=layer.always_on)
        real_TE = mask_TE if keep_T is None else mask_TE[keep_T]
        self.values["active_fraction"] = real_TE.float().mean()
        if through:
            h_TF = _times(h_TF, straight_through(scores_TE, mask_TE, temperature=config.temperature, always_on=layer.always_on))
        else:
            h_TF = h_TF.masked_fill(~neuron_mask(mask_TE, h_TF.shape[1]), 0)
        if learns and config.routers in ("norms", "both"):
            h_TF = self._regress(x_TD, h.detach().reshape(h_TF.shape), h_TF, keep_T)
        return h_TF.view_as(h), mask_TE

    def _regress(self, x_TD: Tensor, hidden_TF: Tensor, h_TF: Tensor, keep_T: Tensor | None) -> Tensor:
        """``h_TF``, with the gradient of the router's regression hung on."""
        rows_S = _spread(keep_T, len(x_TD), self._config.router_tokens, device=x_TD.device)
        if not len(rows_S):
            return h_TF
        layer, router = self._layer, cast(NormRouter, self._layer.router)
        output = router.config.output
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            grams_EGG = expert_grams(layer.weights().dequantized(torch.float32).down_FD, layer.bounds)
            targets_SE, scale = router_targets(expert_norms(hidden_TF[rows_S], grams_EGG, layer.bounds), output=output)
        raw_SE = router.raw_scores(x_TD[rows_S])
        with torch.enable_grad():
            z_SE = raw_SE.detach().requires_grad_()
            loss = router_loss(z_SE - 2 * scale.log() if output == "exp" else z_SE / scale, targets_SE, output=output)
            (slope_SE,) = torch.autograd.grad(loss, z_SE)
        if output == "exp":  # an expert that was predicted silent and fires must not be all that Adam remembers
            slope_SE = slope_SE.clamp_min(-_MOST_RATIO / slope_SE.numel())
        loss = loss.detach()
        self.values["router_deviance"] = loss - (targets_SE.log() + 1).mean() if output == "exp" else loss
        return cast(Tensor, _Carry.apply(h_TF, raw_SE, slope_SE * (self._config.router_weight * self._share), self._state))


def select_share(rule: Rule, scores_TE: Tensor, active: float, *, keep_T: Tensor | None = None, always_on: tuple[int, ...] = ()) -> Tensor:
    """What the rule selects at the value of its knob where a share of the pairs runs.

    Args:
        rule: its kind decides; its own knob does not matter.
        scores_TE: router scores of one batch.
        active: share of the real (token, expert) pairs, in (0, 1].
        keep_T: True at real tokens; the knob is set on these. None: all are.
        always_on: experts that run whatever their score; they count.

    Returns:
        mask_TE of all tokens. Exactly ``round(active * pairs)`` of the real ones are selected, but where scores tie, or where more always
        run (one expert of a token, ``always_on``), or of more than 2^20 pairs, where the knob is set on evenly spaced tokens.

    Cost: a selection of the n-th, no sort (but the rule's own); the host waits for the number of real tokens where ``keep_T`` is given.
    """
    # Smaller is sooner, whatever the rule's direction.
    order_TE = rule.critical(scores_TE) if rule.grows else rule.critical(scores_TE).neg()
    if always_on:
        order_TE[:, list(always_on)] = -math.inf
    real_TE = order_TE if keep_T is None else order_TE[keep_T]
    if real_TE.numel() > _MOST_PAIRS:
        real_TE = real_TE[_spread(None, len(real_TE), max(1, _MOST_PAIRS // real_TE.shape[1]), device=real_TE.device)]
    if not real_TE.numel():
        return torch.ones_like(scores_TE, dtype=torch.bool)
    count = max(1, round(active * real_TE.numel()))
    return order_TE <= real_TE.flatten().kthvalue(count).values


def straight_through(scores_TE: Tensor, mask_TE: Tensor, *, temperature: float, always_on: tuple[int, ...] = ()) -> Tensor:
    """The mask as numbers 0 and 1, with the gradient of sigmoid((log s - log b_t) / temperature).

    b_t is the geometric mean of the token's least selected and greatest unselected score (of the one there is), and a constant. Experts
    that are always on have no gradient.

    Source: the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.
    """
    log_TE = scores_TE.clamp_min(torch.finfo(scores_TE.dtype).tiny).log()
    free_E = torch.ones(mask_TE.shape[1], dtype=torch.bool, device=mask_TE.device)
    free_E[list(always_on)] = False
    with torch.no_grad():
        least_T1 = log_TE.masked_fill(~(mask_TE & free_E), math.inf).amin(1, keepdim=True)
        greatest_T1 = log_TE.masked_fill(mask_TE | ~free_E, -math.inf).amax(1, keepdim=True)
        one_T1 = torch.where(least_T1.isfinite(), least_T1, greatest_T1).nan_to_num(neginf=0.0)
        boundary_T1 = torch.where(least_T1.isfinite() & greatest_T1.isfinite(), (least_T1 + greatest_T1) / 2, one_T1)
    soft_TE = torch.sigmoid((log_TE - boundary_T1) / temperature) * free_E
    return (soft_TE - soft_TE.detach()) + mask_TE  # in this order: the difference is exactly 0


def _times(h_TF: Tensor, factors_TE: Tensor) -> Tensor:
    """Each expert's neurons times its factor."""
    factors_TE = factors_TE.to(h_TF.dtype)
    num_tokens, num_experts = factors_TE.shape
    if h_TF.shape[1] % num_experts == 0:
        return (h_TF.view(num_tokens, num_experts, -1) * factors_TE.unsqueeze(2)).view_as(h_TF)
    return h_TF * neuron_mask(factors_TE, h_TF.shape[1])


def _spread(keep_T: Tensor | None, num_tokens: int, most: int, *, device: torch.device) -> Tensor:
    """Indices of at most ``most`` real tokens at even distances."""
    real = None if keep_T is None else keep_T.nonzero().flatten()
    count = num_tokens if real is None else len(real)
    index = torch.arange(count, device=device) if count <= most else torch.arange(most, device=device) * count // most
    return index if real is None else real[index]


class _Carry(torch.autograd.Function):
    """Identity of ``h``, whose backward gives ``raw`` the gradient ``scale * slope``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, raw: Tensor, slope: Tensor, state: InFlight) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.state = state
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad, slope * ctx.state.scale.to(slope), None, None
