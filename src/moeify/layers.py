"""The executor: what joins router, selection rule and kernel inside a model that keeps its own modules.

Letters: T tokens, D model width, F FFN width, E experts, B batch, S sequence.

A `MoEFFN` is a child named ``moe`` of the module that holds the FFN (an MLP; the whole layer for OPT or BERT). It owns the router's
parameters and nothing else: projections stay where they are, under their own names. What changes is the ``forward`` of the projections of
that one instance:

    first projections (up, gate or fused)  remember the FFN's input, return a width-1 stand-in
    down projection                        ignores the stand-in, returns the sparse FFN of the remembered input

Everything between and around them (activation, product, dropout, reshapes, Bloom's residual, BERT's split in two modules) is the family's
own code, so one mechanism serves every layout. Where weights must not be read directly (adapters, offload hooks; decision D7) the
projections run as they are and the down projection's input is multiplied by the neuron mask: the same result, at dense cost.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ConfigError, UnsupportedModelError
from .kernels import build_plan, moe_ffn
from .routers import Router
from .select import Rule
from .sites import FFNSite, FFNWeights, expert_bounds, not_plain_reason, site_weights

Mode = Literal["dense", "moe"]


class _Call(NamedTuple):
    """One forward in flight: the FFN's input, the projection that began it, and whether a kernel computes it."""

    x: Tensor
    first: nn.Module
    use_kernel: bool


class _Wrapper(NamedTuple):
    """An adapter in the place of the down projection, and our hook on it."""

    module: nn.Module
    hook: RemovableHandle


class MoEFFN(nn.Module):
    """Executes one FFN as a mixture of experts, or leaves it dense.

    y = sum over selected experts of y_e + b_down,   y_e = act(x W_up[e]) W_down[e]   (gated: act(x W_gate[e]) * (x W_up[e]))

    Expert e is the contiguous slice ``expert_bounds(d_ff, num_experts)[e : e + 2]`` of the neurons.

    Args:
        site: the FFN that is executed.
        num_experts: E, in [1, d_ff].
        router: module ``(x_TD, weights) -> scores_TE``.
        rule: selection rule ``scores_TE -> mask_TE``.
        always_on: experts that run for every token whatever their score.

    Source: Szatkowski et al. 2024, arXiv:2310.04361; Zhang et al. 2022, arXiv:2110.01786 (expert split).
    """

    def __init__(self, site: FFNSite, *, num_experts: int, router: Router, rule: Rule, always_on: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.site = site
        self.num_experts = num_experts
        self.bounds = expert_bounds(site.d_ff, num_experts)
        if any(not 0 <= e < num_experts for e in always_on):
            raise ConfigError(f"'{site.name}': always_on must name experts in [0, {num_experts}), got {always_on}.")
        self.router = router
        self.rule = rule
        self.always_on = tuple(always_on)
        self.mode: Mode = "moe"
        self.impl = "auto"
        self.recorder: ActiveRecorder | None = None
        # Input of the call in flight, one a thread: the same model may be called from several.
        self._calls: dict[int, _Call] = {}

    def extra_repr(self) -> str:
        return f"{self.site.name!r}, {self.num_experts} experts of {self.bounds[1]}, {self.rule}, mode={self.mode!r}, impl={self.impl!r}"

    # -- selection ------------------------------------------------------------------------------------------------------------------

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores, fp32."""
        return cast(Tensor, self.router(x_TD, self.weights() if getattr(self.router, "needs_weights", False) else None))

    def select(self, x_TD: Tensor) -> Tensor:
        """mask_TE: which experts run for which token; records it if a recorder listens."""
        mask_TE = self.rule(self.scores(x_TD))
        if self.always_on:
            mask_TE = mask_TE.index_fill(1, torch.tensor(self.always_on, device=mask_TE.device), True)
        if self.recorder is not None:
            self.recorder.add(self, mask_TE)
        return mask_TE

    def neuron_mask(self, mask_TE: Tensor) -> Tensor:
        """mask_TF: the mask of each expert repeated over its neurons."""
        sizes_E = torch.tensor(self.bounds, device=mask_TE.device).diff()
        return mask_TE.repeat_interleave(sizes_E, dim=1, output_size=self.site.d_ff)

    # -- the model's modules --------------------------------------------------------------------------------------------------------

    def bind(self, host: nn.Module) -> None:
        """Redirect the projections of ``host``; called by `attach` only."""
        self.__dict__["_host"] = host  # not registered: the host owns us, not we the host
        cut = len(self.site.name) + 1 if self.site.name else 0
        self._first_paths = tuple(path[cut:] for path in self.site.first)
        self._down_path = self.site.down[cut:]
        # The site as seen from the host, so that the weights are found without the model.
        self._local = FFNSite(
            name="",
            up=self.site.up[cut:],
            down=self._down_path,
            gate=None if self.site.gate is None else self.site.gate[cut:],
            fused=self.site.fused,
            activation=self.site.activation,
            d_model=self.site.d_model,
            d_ff=self.site.d_ff,
            d_out=self.site.d_out,
        )
        *firsts, down = self.__dict__["_leaves"] = tuple(host.get_submodule(path) for path in (*self._first_paths, self._down_path))
        for leaf in firsts:
            leaf.forward = partial(self._forward_first, leaf)
        down.forward = partial(self._forward_down, down)
        self.__dict__["_wrapper"] = None

    def unbind(self) -> None:
        """Give the projections their own forward back; called by `detach` only."""
        self._unhook_wrapper()
        for leaf in self.__dict__["_leaves"]:
            if "_old_forward" in leaf.__dict__:  # accelerate has put its hook around ours, and keeps it
                leaf._old_forward = MethodType(type(leaf).forward, leaf)
            else:
                leaf.__dict__.pop("forward", None)
        del self.__dict__["_host"], self.__dict__["_leaves"], self.__dict__["_wrapper"]

    @property
    def host(self) -> nn.Module:
        """The module that holds the FFN's projections."""
        return cast(nn.Module, self.__dict__["_host"])

    def weights(self) -> FFNWeights:
        """Canonical views of the projections' weights."""
        return site_weights(self.host, self._local)

    def masked_reason(self) -> str | None:
        """Why the kernels may not run now and the FFN is computed dense and masked; None if they may."""
        leaves = [self.host.get_submodule(path) for path in (*self._first_paths, self._down_path)]
        for path, leaf in zip((*self._first_paths, self._down_path), leaves, strict=True):
            if reason := not_plain_reason(leaf):
                return f"'{path}' {reason}"
        if len({leaf.weight.dtype for leaf in leaves}) > 1:
            return "projections differ in dtype"
        if self.host.training and _drops_activations(self.host):
            return "dropout inside the FFN while training"
        return None

    # -- forward --------------------------------------------------------------------------------------------------------------------

    def _forward_first(self, leaf: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "dense":
            return cast(Tensor, type(leaf).forward(leaf, x))
        call = self._calls.get(_thread())
        # Of a GLU's two projections the second continues the call. The first never does: an error may have left a call behind.
        if call is None or call.x is not x or call.first is leaf:
            call = self._calls[_thread()] = _Call(x, leaf, self.masked_reason() is None)
        if call.use_kernel:
            # Any tensor of width 1 (2 where it will be cut in two halves) does: the down projection never looks at what becomes of it.
            # Of its own memory, so that an activation in place does not write into x.
            return x.detach()[..., : 2 if self.site.fused else 1].clone()
        self._follow_wrapped_down()
        return cast(Tensor, type(leaf).forward(leaf, x))

    def _forward_down(self, leaf: nn.Module, h: Tensor) -> Tensor:
        call = self._calls.pop(_thread(), None)
        if self.mode == "dense" or call is None:  # None: a wrapper around this leaf has masked h already
            return cast(Tensor, type(leaf).forward(leaf, h))
        if not call.use_kernel:
            return cast(Tensor, type(leaf).forward(leaf, self._masked(h, call.x)))
        x_TD = call.x.reshape(-1, call.x.shape[-1])
        y_TD = moe_ffn(x_TD, self.weights(), build_plan(self.select(x_TD)), activation=self.site.activation, impl=self.impl)
        return y_TD.reshape(*h.shape[:-1], self.site.d_out)

    def _masked(self, h: Tensor, x: Tensor) -> Tensor:
        mask_TF = self.neuron_mask(self.select(x.reshape(-1, x.shape[-1])))
        return h.masked_fill(~mask_TF.reshape(h.shape), 0)  # not a product: an overflow in an unselected neuron stays unseen

    def _follow_wrapped_down(self) -> None:
        """If an adapter has replaced the down projection, mask the wrapper's input too, or its own branch would see every neuron."""
        down, wrapper = self.host.get_submodule(self._down_path), self.__dict__["_wrapper"]
        if wrapper is None or wrapper.module is not down:
            self._unhook_wrapper()  # an adapter that was taken off, or changed for another
            if down is not self.__dict__["_leaves"][-1]:
                self.__dict__["_wrapper"] = _Wrapper(down, down.register_forward_pre_hook(partial(_mask_input, self)))

    def _unhook_wrapper(self) -> None:
        if self.__dict__["_wrapper"] is not None:
            self.__dict__["_wrapper"].hook.remove()
            self.__dict__["_wrapper"] = None


class ActiveRecorder:
    """Counts executed (token, expert) pairs of each MoE layer; on the device, no host sync until asked.

    Neurons, not experts, are counted, so that experts of unequal size weigh what they cost.
    """

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None
        self._active: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._neurons: dict[str, int] = {}

    def add(self, layer: MoEFFN, mask_TE: Tensor) -> None:
        """Count one forward of one layer; tokens outside ``token_mask`` are left out where it fits the number of tokens."""
        name = layer.site.name
        sizes_E = torch.tensor(layer.bounds, device=mask_TE.device).diff()
        active_T = (mask_TE.detach() * sizes_E).sum(1)
        keep = self.token_mask
        if keep is not None and keep.numel() == active_T.numel():
            keep_T = keep.reshape(-1).to(active_T.device, torch.bool)
            active, tokens = (active_T * keep_T).sum(), keep_T.sum()
        else:
            active, tokens = active_T.sum(), torch.tensor(active_T.numel(), device=active_T.device)
        self._active[name] = self._active.get(name, 0) + active
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        self._neurons[name] = layer.site.d_ff

    def per_layer(self) -> dict[str, float]:
        """Active fraction of each layer that ran, in [0, 1]; nan for a layer that saw no token."""
        return {n: (self._active[n].double() / (self._tokens[n].double() * self._neurons[n])).item() for n in self._active}

    def active_fraction(self) -> float:
        """Executed / all neurons over all layers and tokens, in [0, 1].

        Raises:
            ValueError: no MoE layer ran, or all tokens were padding.
        """
        if not self._active:
            raise ValueError("no MoE layer ran while recording; is the model in dense mode?")
        active = sum(int(self._active[n]) for n in self._active)
        all_neurons = sum(int(self._tokens[n]) * self._neurons[n] for n in self._active)
        if not all_neurons:
            raise ValueError("no token was counted while recording; the token mask leaves none.")
        return active / all_neurons


def attach(model: nn.Module, moe: MoEFFN) -> None:
    """Make ``moe`` the executor of its site in ``model``, in place; parameters keep their names and identity.

    Raises:
        UnsupportedModelError: the site's host already has a ``moe``.
    """
    host = model.get_submodule(moe.site.name)
    if hasattr(host, "moe"):
        raise UnsupportedModelError(f"'{moe.site.name}' has an attribute 'moe' already (converted before?); use to_dense(model) first.")
    moe.bind(host)
    moe.train(host.training)
    host.moe = moe


def detach(model: nn.Module, name: str) -> None:
    """Remove the executor at site ``name``; the dense FFN is what it was."""
    host = model.get_submodule(name)
    cast(MoEFFN, host.moe).unbind()
    del host.moe


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The executors of a converted model by site name, in module order; empty for a dense model."""
    return {m.site.name: m for m in model.modules() if isinstance(m, MoEFFN)}


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Run every converted FFN dense, or as a mixture of experts. No weight is copied.

    Raises:
        ConfigError: the mode is neither "dense" nor "moe".
    """
    if mode not in ("dense", "moe"):
        raise ConfigError(f"mode must be 'dense' or 'moe', got {mode!r}.")
    for layer in moe_layers(model).values():
        layer.mode = mode


def set_rule(model: nn.Module, rule: Rule | Mapping[str, Rule]) -> None:
    """Set the selection rule of every MoE layer, or of the named ones.

    Raises:
        ConfigError: a name is not a MoE layer of the model.
    """
    layers = moe_layers(model)
    rules = rule if isinstance(rule, Mapping) else dict.fromkeys(layers, rule)
    if unknown := set(rules) - set(layers):
        raise ConfigError(f"no MoE layer {min(unknown)!r} in this model; layers: {', '.join(layers)}.")
    for name, one in rules.items():
        layers[name].rule = one


def set_impl(model: nn.Module, impl: str) -> None:
    """Choose the kernel of every MoE layer: "auto" or a key of `moeify.kernels.IMPLS`; an explicit one never falls back."""
    for layer in moe_layers(model).values():
        layer.impl = impl


@contextmanager
def record_active(model: nn.Module) -> Iterator[ActiveRecorder]:
    """Count the active fraction of every forward inside the ``with``."""
    recorder, layers = ActiveRecorder(), list(moe_layers(model).values())
    before = [layer.recorder for layer in layers]
    for layer in layers:
        layer.recorder = recorder
    try:
        yield recorder
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.recorder = old


@contextmanager
def token_mask(model: nn.Module, mask_BS: Tensor | None) -> Iterator[None]:
    """Leave padding (False or 0 in ``mask_BS``) out of what `record_active` counts inside the ``with``."""
    recorders = {id(r): r for layer in moe_layers(model).values() if (r := layer.recorder) is not None}.values()
    for recorder in recorders:
        recorder.token_mask = mask_BS
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.token_mask = None


def _thread() -> int:
    # A traced graph has one caller, and the tracer cannot call get_ident.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _drops_activations(host: nn.Module) -> bool:
    """Whether a dropout with p > 0 may sit between the projections; on the safe side: whatever in the host looks like one."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in host.modules()):
        return True
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(host).items())


def _mask_input(layer: MoEFFN, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    call = layer._calls.pop(_thread(), None)
    if layer.mode == "dense" or call is None:
        return None
    return (layer._masked(args[0], call.x), *args[1:])
