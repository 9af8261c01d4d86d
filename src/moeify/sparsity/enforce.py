"""Sparsity enforcement: the gradient of a penalty on activations, added where they are, while any training loop runs.

Letters: T tokens, F FFN width, L enforced FFNs, B batch, S sequence.

Nothing is added to the loss. A hook on each FFN's activation passes the tensor through and adds ``d term / d a`` to its gradient on the way
back, so whatever happens between forward and backward happens to the term as well: checkpointed layers inject when they are recomputed,
and only then; wrappers of the model see ordinary gradients.

    term = weight / L * sum_l layer_weight_l * mean over real tokens of penalty(a_l)

Where attention projections were replaced by MLPs, that is one such term for the FFNs and one for the MLPs, each with the L of its own.

What multiplies the model's loss before ``backward`` must multiply the term: see `inflight`.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._config import lookup
from ..errors import ConfigError, UnsupportedModelError
from ..sites.formula import ShiftedReLU
from ..sites.policy import check_patterns, check_policy, matching_key
from ..sites.projection import projection_mlps
from ..sites.site import FFNSite, mask_name, token_mask_of
from .activation import BlendedActivation, find_activation, put_module
from .inflight import InFlight, Removable, read_scale
from .losses import EPS, LOSSES, Schedule, scheduled_weight

Target = Literal["auto", "activations", "preactivations", "products"]
_EXACT_ZEROS = ("relu", "relu2", "relu6", "shifted_relu:")


@dataclass(frozen=True, kw_only=True)
class EnforcementConfig:
    """How strongly, and on what, activations are pushed to zero."""

    loss: str = "hoyer"
    """Penalty of a token's activations: 'hoyer' (square-Hoyer, sum|a|^2 / sum a^2) or 'l1' (sum|a|)."""
    weight: float = 1e-3
    """Final weight of the mean penalty beside the model's loss, at least 0. Square-Hoyer counts neurons: F / 3 is common at the start."""
    on: Target = "auto"
    """What is penalised: 'activations' act(z) (of a gated FFN act(gate)); 'preactivations' max(z, delta) - delta; 'products', what the down
    projection reads (gated: act(gate) * up). 'auto': activations of ReLU-like functions, pre-activations of all others."""
    delta: float = -10.0
    """Displacement of pre-activations: below it GELU and SiLU are zero up to rounding. As published; but square-Hoyer hardly moves values
    that far above it, and -2.5, where GELU is -0.016, makes sparser models (docs/log)."""
    schedule: Schedule = "warmup"
    """Weight over the run: 'constant'; 'linear' from 0; 'warmup' linear from 0 over warmup_frac of the run, then constant."""
    warmup_frac: float = 0.5
    """Share of the run over which 'warmup' grows, in (0, 1]."""
    layer_weights: dict[str, float] = field(default_factory=dict)
    """Factors on the weight by site name, or by 're:' pattern on it; 0 leaves an FFN out, others have 1. An exact name wins, then the first
    matching pattern."""
    mean_over: Literal["kinds", "all"] = "kinds"
    """Replaced projections beside FFNs: a mean over each of the 'kinds', both added, so that the FFNs' share does not depend on how many
    projections there are (as in the authors' code); or one mean over 'all' (as in the paper's equation)."""
    eps: float = EPS
    """Added to sum a^2: a token whose activations are below it counts less and less. Greater than 0."""

    def __post_init__(self) -> None:
        lookup(LOSSES, self.loss, where="loss")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"weight must be finite and >= 0, got {self.weight}.")
        if not 0 < self.warmup_frac <= 1:
            raise ConfigError(f"warmup_frac must be in (0, 1], got {self.warmup_frac}.")
        if not self.eps > 0:
            raise ConfigError(f"eps must be greater than 0, got {self.eps}.")
        for key, factor in self.layer_weights.items():
            if not 0 <= factor < float("inf"):
                raise ConfigError(f"layer_weights[{key!r}] must be finite and >= 0, got {factor}.")
        check_patterns(self.layer_weights)

    def layer_weight(self, name: str) -> float:
        """Factor of one site."""
        key = matching_key(self.layer_weights, name)
        return 1.0 if key is None else self.layer_weights[key]

    def enforced(self, sites: Sequence[FFNSite]) -> list[FFNSite]:
        """The sites whose factor is not 0.

        Raises:
            ConfigError: there is none, or a key of ``layer_weights`` matches none.
        """
        if not sites:
            raise ConfigError("no sites to enforce sparsity on; find_ffn_sites lists them.")
        check_policy(self.layer_weights, sites)
        enforced = [site for site in sites if self.layer_weight(site.name)]
        if not enforced:
            raise ConfigError("layer_weights leaves no FFN to enforce sparsity on.")
        return enforced


def enforce_sparsity(
    model: nn.Module, sites: Sequence[FFNSite], config: EnforcementConfig | None = None, *, total_steps: int = 1
) -> "Enforcement":
    """Add the gradient of a sparsity loss to every backward pass of ``model``, until the result is removed or its ``with`` block ends.

        with enforce_sparsity(model, sites, EnforcementConfig(weight=1e-3), total_steps=1000) as enforcement:
            for step in range(1000):
                enforcement.set_step(step)
                model(**batch, labels=labels).loss.backward()
                ...

    The gradients are those of ``loss + term`` (term: the head of this file), exactly, also under both kinds of gradient checkpointing,
    ``torch.compile`` (call this first), DDP, FSDP2, autocast and accumulation. Tokens that the forward's ``attention_mask`` masks do not
    count. Forwards without gradients are untouched.

    The term is multiplied by what multiplies the loss: ``outputs.loss`` is followed by itself; a loss of your own, a sum with other losses,
    or any loss of a compiled model is named by `Enforcement.follow`. So accumulate means over micro-batches weighted by their share of
    tokens, and the term is the mean over all tokens of the step. Trainer's ``num_items_in_batch`` is understood.

    Args:
        model: dense model.
        sites: FFNs, as `find_ffn_sites` or `set_activation` returned them.
        config: None: the defaults.
        total_steps: optimizer steps of the run, for the schedule; at least 1.

    Raises:
        ConfigError: no site, a layer weight that matches none, or a penalty on activations that are never zero (GELU, SiLU).
        UnsupportedModelError: an FFN is converted, or its function is no module where it has to be.

    Cost: reads a (T, F) tensor twice in forward, and reads and writes it three times in backward; no host sync; no memory of that size is
        kept (with pre-activations of a ReLU model: one).
    """
    return Enforcement(model, sites, config or EnforcementConfig(), total_steps=total_steps)


class Enforcement(Removable):
    """What `enforce_sparsity` attached: a context manager that removes it."""

    def __init__(self, model: nn.Module, sites: Sequence[FFNSite], config: EnforcementConfig, *, total_steps: int) -> None:
        enforced = config.enforced(sites)
        if total_steps < 1:
            raise ConfigError(f"total_steps must be at least 1, got {total_steps}.")
        places = [_place(model, site, config) for site in enforced]
        mlps = projection_mlps(model) if config.mean_over == "kinds" else {}
        kinds = [site.name in mlps for site in enforced]
        self.config = config
        self.total_steps = total_steps
        self.weight = 0.0
        """Weight of the present step."""
        state = self._state = _State(model)
        self._terms = {
            site.name: _Term(state, config, place, config.layer_weight(site.name) / kinds.count(kind), mask_name=mask_name(model, site))
            for site, place, kind in zip(enforced, places, kinds, strict=True)
        }
        seen: set[nn.Module] = set()
        for place in places:  # one object in several layers: a hook could not tell them apart
            if (module := model.get_submodule(place.path)) in seen:
                put_module(model, place.path, module := copy.deepcopy(module))
            seen.add(module)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(state.begin, with_kwargs=True),
            model.register_forward_hook(state.end),
        ]
        for term, place in zip(self._terms.values(), places, strict=True):
            module = model.get_submodule(place.path)
            self._handles.append(
                module.register_forward_pre_hook(term.on_input) if place.is_input else module.register_forward_hook(term.on_output)
            )
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Set the weight that the schedule gives after ``step`` optimizer steps."""
        config = self.config
        self.weight = scheduled_weight(
            config.weight, schedule=config.schedule, step=step, total_steps=self.total_steps, warmup_frac=config.warmup_frac
        )
        self._state.weight.fill_(self.weight)

    def follow(self, loss: Tensor) -> Tensor:
        """Multiply the term by whatever multiplies this loss before ``backward``; returns it.

        For a loss that is not ``outputs.loss`` of the last forward; takes the place of that one. Call it outside of compiled code.
        """
        self._state.follow(loss)
        return loss

    def values(self) -> dict[str, Tensor]:
        """Each site's mean penalty in its latest forward with gradients, detached and unweighted, on its device; reading one synchronises.

        A site called several times in a forward (shared layers) shows the last call; a site never called is absent.
        """
        return {name: term.value for name, term in self._terms.items() if term.value is not None}

    def value(self) -> Tensor:
        """Weighted mean over layers of `values`, or the sum of two: what ``weight`` multiplies. NaN before the first forward."""
        found = [term.value * term.factor for term in self._terms.values() if term.value is not None]
        return torch.stack([v.float().to(found[0].device) for v in found]).sum() if found else torch.tensor(float("nan"))

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(frozen=True)
class _Place:
    """Where one FFN's penalised tensor passes by."""

    path: str
    is_input: bool
    """Whether it is the module's input, not its output."""
    delta: float | None = None
    """Displacement; None: the tensor itself."""
    is_signed: bool = False
    """Whether it may be negative."""


def _place(model: nn.Module, site: FFNSite, config: EnforcementConfig) -> _Place:
    if hasattr(model.get_submodule(site.name), "moe"):
        raise UnsupportedModelError(f"'{site.name}' is converted: enforce sparsity before, or call to_dense(model) first.")
    has_zeros = site.activation.startswith(_EXACT_ZEROS)
    on = config.on if config.on != "auto" else "activations" if has_zeros else "preactivations"
    if on != "preactivations" and not has_zeros:
        raise ConfigError(
            f"'{site.name}' has the activation {site.activation}, which is never zero: a penalty on {on} would shrink it and make nothing "
            "sparse. Penalise pre-activations (on='preactivations'), or change the activation to relu first."
        )
    path = find_activation(model, site)
    blended = model.get_submodule(path) if path is not None else None
    if isinstance(blended, BlendedActivation) and on == "activations":
        # Until mix = 1 it is no ReLU; relu(z - t) is what it becomes.
        return _Place(cast(str, path), is_input=True, delta=blended.end.threshold if isinstance(blended.end, ShiftedReLU) else 0.0)
    if on == "products":
        return _Place(site.down, is_input=True, is_signed=True)
    if path is not None:
        return _Place(path, is_input=True, delta=config.delta) if on == "preactivations" else _Place(path, is_input=False)
    if on == "activations" and not site.is_gated:
        return _Place(site.down, is_input=True, is_signed=True)
    if on == "preactivations" and site.fused is None:
        return _Place(site.gate or site.up, is_input=False, delta=config.delta)
    raise UnsupportedModelError(
        f"'{site.name}': no module computes its {site.activation}, so its {on} cannot be reached; try on='products'."
    )


class _State(InFlight):
    """What all terms of one enforcement share: the forward in flight, and the weight, a tensor so that compiled code reads it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.weight = torch.zeros((), dtype=torch.float64, device="cpu")  # a number of no dimension goes with any device
        self.unmasked = False


class _Term:
    """The penalty of one FFN."""

    def __init__(self, state: _State, config: EnforcementConfig, place: _Place, factor: float, *, mask_name: str) -> None:
        self.factor = factor
        """layer_weight / L."""
        self.value: Tensor | None = None
        self._state, self._place = state, place
        self._penalty, self._eps = LOSSES[config.loss], config.eps
        self._mask_name = mask_name

    def on_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (self._inject(args[0]), *args[1:])

    def on_output(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._inject(output)

    def _inject(self, a: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and a.requires_grad):
            return a
        with torch.no_grad():
            slope_s, slope_q = self._slopes(a.detach())
        return cast(Tensor, _Inject.apply(a, slope_s, slope_q, self._state.scale, self._place.delta, self._place.is_signed))

    def _slopes(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the term by each token's sum |a| and sum a^2, (..., 1); the mean penalty is remembered."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        if self._place.delta is not None:
            a = _displaced(a.to(dtype), self._place.delta)  # in bf16 numbers around 10 are 1/16 apart
        s = (a.abs() if self._place.is_signed else a).sum(-1, keepdim=True, dtype=dtype)  # a norm of order 1 takes 13 times as long
        q = torch.linalg.vector_norm(a, 2, dim=-1, keepdim=True, dtype=dtype).square()
        value, slope_s, slope_q = self._penalty(s, q, self._eps)
        mask_BS = self._state.masks[self._mask_name]
        mask_T = token_mask_of(mask_BS, a.shape[:-1])
        if mask_T is None:
            share = torch.full_like(value, 1 / max(value.numel(), 1))
            self._warn(mask_BS)
        else:
            mask_T = mask_T.to(value.dtype)
            share = (mask_T / mask_T.sum().clamp_min(1)).view_as(value)
        # A padded row may hold anything, NaN included; 0 * NaN is NaN.
        self.value = torch.where(share > 0, value * share, 0).sum()
        share = share * (self._state.weight * self.factor)
        return torch.where(share > 0, slope_s * share, 0), torch.where(share > 0, 2 * slope_q * share, 0)

    def _warn(self, mask_BS: Tensor | None) -> None:
        if mask_BS is not None and not self._state.unmasked and not torch.compiler.is_compiling():
            self._state.unmasked = True
            warnings.warn("the attention mask does not fit the tokens of the FFNs: padding is counted by the sparsity loss.", stacklevel=2)


class _Inject(torch.autograd.Function):
    """Identity whose backward adds ``scale * (slope_s * d sum|a| + slope_q / 2 * d sum a^2)``."""

    @staticmethod
    def forward(a: Tensor, slope_s: Tensor, slope_q: Tensor, scale: Tensor, delta: float | None, is_signed: bool) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, slope_s, slope_q, scale, ctx.delta, ctx.is_signed = inputs
        ctx.save_for_backward(a, slope_s, slope_q, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, slope_s, slope_q, scale = ctx.saved_tensors
        scale = read_scale(scale, grad)
        slope_s, slope_q = slope_s * scale, slope_q * scale
        if ctx.delta is not None:
            u = _displaced(a.to(slope_q.dtype), ctx.delta)
            # Where u is 0, nothing. This way takes a quarter of the time of `addcmul(slope_s, u, slope_q) * (u > 0)`.
            term = torch.ops.aten.threshold_backward(torch.mul(u, slope_q).add_(slope_s), u, 0)
            if term.dtype == grad.dtype:
                return term.add_(grad), None, None, None, None, None
        elif ctx.is_signed:
            term = torch.addcmul(slope_s * a.sign(), a, slope_q)
        else:
            # Where a is 0, sign(a) is too, but whatever is given there the ReLU's own backward drops.
            if a.dtype == grad.dtype == slope_q.dtype:
                return torch.addcmul(grad, a, slope_q).add_(slope_s), None, None, None, None, None
            term = torch.addcmul(slope_s, a, slope_q)
        return (grad + term).to(grad.dtype), None, None, None, None, None


def _displaced(z: Tensor, delta: float) -> Tensor:
    """`displace`, without a second temporary: memory that is new to the process takes longer than the arithmetic."""
    return (z - delta).clamp_min_(0)
