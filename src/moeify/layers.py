"""The executor: what joins router, selection rule and kernel inside a model that keeps its own modules.

Letters: T tokens, D model width, F FFN width, E experts, B batch, S sequence.

A `MoEFFN` is a child named ``moe`` of the module that holds the FFN (an MLP; the whole layer for OPT or BERT). It owns the router's
parameters and nothing else: projections stay where they are, under their own names. What changes is the ``forward`` of the projections of
that one instance:

    first projections (up, gate or fused)  remember the FFN's input, return a width-1 stand-in
    down projection                        ignores the stand-in, returns the sparse FFN of the remembered input

Everything between and around them (activation, product, dropout, reshapes, Bloom's residual, BERT's split in two modules) is the family's
own code, so one mechanism serves every layout. Where weights must not be read directly (adapters, offload hooks; decision D7) the
projections run as they are and the down projection's input is multiplied by the neuron mask: the same result, at dense cost. Training with
hard selection (`MoEFFN.selector`) runs that way, too.

Others may put a module of theirs in a projection's place (PEFT, quantisers), which calls ours or does not. A pre-hook of the host looks
before every forward, and such a module gets hooks that remember x and mask h from outside. A down projection that runs in moe mode while
nobody has remembered x is an error: nothing ever runs dense in silence.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ConfigError, UnsupportedModelError
from .kernels import DispatchPlan, build_plan, cpu_always, gpu_routed, moe_ffn, reads_rows
from .kernels.cpu import RULES as ROUTED_RULES
from .kernels.cpu import Routed, RouterWeights, is_recorded, routed_refusal, wants_tangents
from .kernels.cpu_neurons import MOST_TOKENS as NEURON_TOKENS
from .kernels.cpu_neurons import LowRankWeights, NeuronRouterWeights, RoutedNeurons, neurons_refusal
from .kernels.plan import neuron_mask, straight_through
from .kernels.routed_op import routed_ffn
from .routers import GateRouter, LowRankRouter, NormRouter, OracleRouter, Router
from .select import RULES, Rule
from .sites import FFNSite, FFNWeights, expert_bounds, has_int8, not_plain_reason, site_weights, store_by_neuron, token_mask_of

Mode = Literal["dense", "moe"]
Selector = Callable[["MoEFFN", Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, x (..., D), h (..., F)) -> h with the unselected neurons at zero, and the mask_TE that this was, for the record."""


class Dispatch(Protocol):
    """Computes selected experts as `kernels.moe_ffn` does, somewhere else."""

    def __call__(self, x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str) -> Tensor:
        """y_TD."""


class _Call(NamedTuple):
    """One forward in flight; what computes it is decided once, when it begins."""

    x: Tensor
    """The FFN's input."""
    first: nn.Module
    """The projection that began it."""
    stand_in: Tensor | None
    """What the first projections return where a kernel computes the FFN; None where the projections run as they are, masked."""
    whole: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """y and mask_TE of x: router, rule and FFN as one native call, where it does what the pieces do."""
    select: Callable[[Tensor], Tensor] | None = None
    """mask_TE of x: router and rule as one native call, where they do what the pieces do and `whole` would not be faster."""


class _Native(NamedTuple):
    """The native call of one layer, and everything that it was made for."""

    routed: "Routed | RoutedNeurons | gpu_routed.Routed | None"
    """None where no kernel can do it; then the pieces do, and `native_refusal` says why."""
    on_gpu: bool
    """Whether it is `gpu_routed`'s."""
    always_numel: float
    """Elements of x up to which router, rule and FFN are one call; for experts, where the compiled kernels run whatever is selected."""
    rule: Rule
    always_on: tuple[int, ...]
    dtype: torch.dtype
    places: tuple[tuple[nn.Module, str, nn.Module], ...]
    """(parent, name, the module that was there)."""
    modules: tuple[tuple[nn.Module, type], ...]
    """(one whose weights are read, its class)."""
    tensors: tuple[tuple[nn.Module, str, str, Tensor | None, int, tuple[int, ...]], ...]
    """(module, its table of parameters or of buffers, name, the tensor that was there, where its values lay, and its strides)."""

    def fits(self, moe: "MoEFFN", dtype: torch.dtype, on_gpu: bool) -> bool:
        """Whether it is for such a forward; of the same rule object, for comparing rules costs more than a decoded token has to spare."""
        return self.rule is moe.rule and self.always_on is moe.always_on and self.dtype is dtype and self.on_gpu is on_gpu

    def holds(self) -> bool:
        """Whether nothing of it has changed. Flat loops, for every token of every layer asks, and calls of our own cost as much again."""
        for parent, name, module in self.places:
            if parent._modules.get(name) is not module:
                return False
        for module, kind in self.modules:
            if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__:
                return False
        for module, table, name, tensor, pointer, strides in self.tensors:
            now = module.__dict__[table].get(name)
            if now is not tensor or (now is not None and (now.data_ptr() != pointer or now.stride() != strides)):
                return False
        return True


class _Replacement(NamedTuple):
    """A module that others have put in the place of a projection, and our hook on it."""

    module: nn.Module
    hook: RemovableHandle


_MOST_NATIVES = 16
"""Native calls that a layer keeps: one for each preset in use."""
_FOLLOW = threading.Lock()
"""Held while hooks are moved: two threads must not put two of them on one module."""


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
        self.selector: Selector | None = None
        """In training: takes the place of router and rule in every forward in moe mode, and zeroes neurons itself, so that gradients can
        reach the router. The projections then run as they are, at dense cost; not for torch.compile."""
        self.dispatch: Dispatch | None = None
        """In training: takes the place of `kernels.moe_ffn` where the kernels would run (`train.expert_parallel`)."""
        self.fetch: Callable[[DispatchPlan], None] | None = None
        """Told what will run, before it does, where weights are read from somewhere first (`hf.offload`)."""
        self.graph: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        """While the model is traced for a format that knows no kernels of ours: y and mask_TE of x, in what that format has
        (`moeify.export`)."""
        self.is_taught = False
        """In training: whether the router learns from the selected experts alone, through 1 + p - stopgrad(p) with p = s / (sum of the
        selected s); see `DispatchPlan.probs_TE`. By the kernels; x gets no gradient by way of the router."""
        # Input of the call in flight, one a thread: the same model may be called from several.
        self._calls: dict[int, _Call] = {}
        self._native: _Native | None = None
        """Of the last forward."""
        self._natives: dict[tuple[object, ...], _Native] = {}
        """By what it was made for, so that requests which take turns with other presets find theirs again."""

    def extra_repr(self) -> str:
        return f"{self.site.name!r}, {self.num_experts} experts of {self.bounds[1]}, {self.rule}, mode={self.mode!r}, impl={self.impl!r}"

    # -- selection ------------------------------------------------------------------------------------------------------------------

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores, fp32."""
        needs_weights = getattr(self.router, "needs_weights", False)
        return cast(Tensor, self.router(x_TD, self.weights().dequantized(x_TD.dtype) if needs_weights else None))

    def select(self, x: Tensor) -> Tensor:
        """mask_TE: which experts run for which token of ``x`` (..., D); records it if a recorder listens."""
        return self._record(self._mask(self.scores(x.reshape(-1, x.shape[-1]))), x)

    def _mask(self, scores_TE: Tensor) -> Tensor:
        mask_TE = self.rule(scores_TE)
        if self.always_on:
            e_E = torch.arange(mask_TE.shape[1], device=mask_TE.device)
            for e in self.always_on:  # a list of them would be copied to the device, for which the host waits
                mask_TE = mask_TE | (e_E == e)
        return mask_TE

    def _plan(self, x: Tensor) -> DispatchPlan:
        """`select` as a plan, with the probabilities by which the router is taught where it is."""
        if not (self.is_taught and self.host.training):
            if self._needs_no_router(x):
                mask_TE = torch.ones(x.numel() // max(1, x.shape[-1]), self.num_experts, dtype=torch.bool, device=x.device)
                return build_plan(self._record(mask_TE, x), is_full=True)
            return build_plan(self.select(x), most_pairs=self._most_pairs(x))
        scores_TE = self.scores(x.detach().reshape(-1, x.shape[-1]))
        mask_TE = self._mask(scores_TE.detach())
        kept_TE = scores_TE.masked_fill(~mask_TE, 0)
        floor = torch.finfo(kept_TE.dtype).tiny  # a token whose experts are all predicted silent
        probs_TE = kept_TE / kept_TE.sum(1, keepdim=True).clamp_min(floor)
        return build_plan(self._record(mask_TE, x), probs_TE, most_pairs=self._most_pairs(x))

    def _most_pairs(self, x: Tensor) -> int | None:
        """How many pairs there are at most, where the rule says so whatever the scores; kernels of a GPU alone ask."""
        if not (x.is_cuda or self.impl.startswith("triton")):
            return None
        most = self.rule.most_experts(self.num_experts)
        if most is None:
            return None
        return x.numel() // max(1, x.shape[-1]) * min(self.num_experts, most + len(self.always_on))

    def _needs_no_router(self, x: Tensor) -> bool:
        """Whether every expert runs whatever its score; on a GPU, where router and mask cost a visible share of a dense FFN."""
        is_watched = bool(self.router._forward_hooks or self.router._forward_pre_hooks)
        return gpu_routed.is_for(x, impl=self.impl) and self.rule.runs_all(self.num_experts) and not is_watched

    def _record(self, mask_TE: Tensor, x: Tensor) -> Tensor:
        if self.recorder is not None:
            self.recorder.add(self, mask_TE, shape=x.shape[:-1])
        return mask_TE

    # -- the model's modules --------------------------------------------------------------------------------------------------------

    def bind(self, host: nn.Module) -> None:
        """Redirect the projections of ``host``; called by `attach` only."""
        site, cut = self.site, len(self.site.name) + 1 if self.site.name else 0
        gate = None if site.gate is None else site.gate[cut:]
        # The site as seen from the host, so that the weights are found without the model.
        self._local = replace(site, name="", up=site.up[cut:], down=site.down[cut:], gate=gate)
        leaves = {path: host.get_submodule(path) for path in (*self._local.first, self._local.down)}
        for path, leaf in leaves.items():
            leaf.forward = partial(self._forward_down if path == self._local.down else self._forward_first, path, leaf)
        self.__dict__["_host"] = host  # not registered: the host owns us, not we the host
        self._leaves = leaves
        self._dropouts = _dropout_names(host)
        self._places = [place for path in leaves for place in _places_on(host, path)]
        self._replacements: dict[str, _Replacement] = {}
        self._host_hook = host.register_forward_pre_hook(self._follow)

    def unbind(self) -> None:
        """Give the projections their own forward back; called by `detach` only."""
        for hook in (self._host_hook, *(r.hook for r in self._replacements.values())):
            hook.remove()
        for leaf in self._leaves.values():
            if "_old_forward" in leaf.__dict__:  # accelerate has put its hook around ours, and keeps it
                leaf.__dict__["_old_forward"] = MethodType(type(leaf).forward, leaf)
            else:
                leaf.__dict__.pop("forward", None)
            if (weight := leaf._parameters.get("weight")) is not None:
                weight.data = weight.data.contiguous()  # dense layers are faster in the order of their shape
        del self.__dict__["_host"], self._leaves, self._dropouts, self._places, self._replacements, self._host_hook

    def lay_out(self) -> None:
        """Order the weights in memory as this machine's kernels read them (`store_by_neuron`); nothing where they need not, or cannot, be.

        `attach` does this; after loading into a skeleton, moving to another device or changing the weights' type, it is done again.
        """
        self._forget_natives()  # they would keep the weights that were there in memory
        if self.masked_reason() is None and reads_rows(self.weights().up_FD):
            store_by_neuron(self.host, self._local)

    @property
    def host(self) -> nn.Module:
        """The module that holds the FFN's projections."""
        return cast(nn.Module, self.__dict__["_host"])

    def projections(self) -> tuple[nn.Module, nn.Module]:
        """The modules in the places of the first projection that reads x and of the down projection."""
        return _module_at(self.host, self._local.first[0]), _module_at(self.host, self._local.down)

    def leaves(self) -> list[nn.Module]:
        """The projections themselves, whatever others have put around them."""
        return list(self._leaves.values())

    @property
    def is_int8(self) -> bool:
        """Whether the experts' weights are int8."""
        return has_int8(self.host, self._local)

    def weights(self) -> FFNWeights:
        """Canonical views of the projections' weights."""
        return site_weights(self.host, self._local)

    def masked_reason(self) -> str | None:
        """Why the kernels may not run now and the FFN is computed dense and masked; None if they may."""
        dtypes = set()
        for path, leaf in self._leaves.items():
            module = _module_at(self.host, path)
            if reason := not_plain_reason(module):
                return f"'{path}' {reason}"
            if module is not leaf:
                return f"'{path}' was replaced by another {type(module).__name__}"
            dtypes.add(leaf.weight.dtype)
        if len(dtypes) > 1:
            return "projections differ in dtype"
        if self.host.training:
            names = self._dropouts if torch.compiler.is_compiling() else _dropout_names(self.host)
            if _drops_activations(self.host, names):
                return "dropout inside the FFN while training"
        return None

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise UnsupportedModelError(
            f"'{self.site.name}' is a mixture of experts, which nn.DataParallel cannot copy to other devices; start one process per device "
            "(torchrun, DistributedDataParallel), or let one device be visible."
        )

    # -- forward --------------------------------------------------------------------------------------------------------------------

    def _forward_first(self, path: str, leaf: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "dense" or self._is_replaced(path):
            return cast(Tensor, type(leaf).forward(leaf, x))
        call = self._begin(leaf, x)
        if call.stand_in is not None:
            return call.stand_in
        self._follow()
        return cast(Tensor, type(leaf).forward(leaf, x))

    def _forward_down(self, path: str, leaf: nn.Module, h: Tensor) -> Tensor:
        if self.mode == "dense" or self._is_replaced(path):
            return cast(Tensor, type(leaf).forward(leaf, h))
        call = self._end()
        if call.stand_in is None:
            return cast(Tensor, type(leaf).forward(leaf, self._masked(h, call.x)))
        x = call.x
        if call.whole is not None:
            y, mask_TE = call.whole(x)
            self._record(mask_TE, x)
        else:
            plan = self._plan(x) if call.select is None else build_plan(self._record(call.select(x), x))
            x_TD, training = x.reshape(-1, x.shape[-1]), self.host.training
            if self.fetch is not None:
                self.fetch(plan)
            if training and self.dispatch is not None:
                y = self.dispatch(x_TD, self.weights(), plan, activation=self.site.activation, impl=self.impl)
            else:
                y = moe_ffn(x_TD, self.weights(), plan, activation=self.site.activation, impl=self.impl, training=training)
        return y.reshape(*h.shape[:-1], self.site.d_out)

    def _decide(self, first: nn.Module, x: Tensor) -> _Call:
        """What computes the forward that begins with ``x``."""
        if self.selector is not None:
            return _Call(x, first, None)
        if self.graph is not None:
            return _Call(x, first, self._stand_in(x), self.graph)
        is_native = self._is_native(x)
        if is_recorded(x):
            if self.masked_reason() is not None:
                return _Call(x, first, None)
            return _Call(x, first, self._stand_in(x), self._operator(x) if is_native else None)
        native = self._native if is_native else None
        if native is None or not native.fits(self, x.dtype, gpu_routed.is_for(x, impl=self.impl)) or not native.holds():
            native = self._find_native(x) if is_native else None
            if native is None and self.masked_reason() is not None:
                return _Call(x, first, None)
            if native is None and is_native:
                native = self._add_native(x)
        if native is None or native.routed is None:
            return _Call(x, first, self._stand_in(x))
        if self.fetch is not None:  # between selection and computation
            return _Call(x, first, self._stand_in(x), None, None if isinstance(native.routed, RoutedNeurons) else native.routed.select)
        if isinstance(native.routed, RoutedNeurons):
            return _Call(x, first, self._stand_in(x), native.routed if x.numel() <= native.always_numel else None)
        if x.numel() <= native.always_numel or self.impl == "cpu":
            return _Call(x, first, self._stand_in(x), native.routed)
        return _Call(x, first, self._stand_in(x), None, native.routed.select)

    def _stand_in(self, x: Tensor) -> Tensor:
        # Any tensor does, for the down projection never looks at what becomes of it: of width 1 (2 where it will be cut in two halves), but
        # where the code between works with explicit sizes.
        width = self.site.d_ff if self.site.explicit_width else 1
        return x.new_zeros((*x.shape[:-1], 2 * width if self.site.fused else width))

    def _is_native(self, x: Tensor) -> bool:
        """Whether a native call would do what the pieces do for such an input, and faster."""
        if not (x.is_cpu and self.impl in ("auto", "cpu")) and not gpu_routed.is_for(x, impl=self.impl):
            return False
        if self._needs_no_router(x):
            return False
        if self.host.training or torch.is_autocast_enabled(x.device.type) or wants_tangents():  # training: see `moe_ffn`
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.projection_parameters()))

    def projection_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the FFN itself; the router's are not among them."""
        return (p for leaf in self._leaves.values() for p in leaf._parameters.values() if p is not None)

    def _native_key(self, x: Tensor) -> tuple[object, ...]:
        return self.rule, self.always_on, x.dtype, gpu_routed.is_for(x, impl=self.impl)

    def _find_native(self, x: Tensor) -> _Native | None:
        """The native call that was made for such a forward, where it still holds."""
        if not self._is_rule_known():
            return None
        found = self._natives.get(self._native_key(x))
        if found is None or not found.holds():
            return None
        self._native = found = found._replace(rule=self.rule, always_on=self.always_on)  # equal, maybe other objects
        return found

    def _add_native(self, x: Tensor) -> _Native | None:
        """`_make_native`, kept; what no longer holds goes, for it keeps weights in memory."""
        if not self._is_rule_known():
            return None  # a rule for one forward, say: the others' calls stay
        kept = [(key, native) for key, native in self._natives.items() if native.holds()]
        self._natives = dict(kept[-_MOST_NATIVES + 1 :])
        self._native = made = self._make_native(x)
        if made is not None:
            self._natives[self._native_key(x)] = made
        return made

    def _is_rule_known(self) -> bool:
        return type(self.rule) is RULES.get(self.rule.name)

    def _forget_natives(self) -> None:
        self._native, self._natives = None, {}

    def _make_native(self, x: Tensor) -> _Native | None:
        """The native call for the modules and tensors that are there now; None where the router or the rule is not one that it knows."""
        router, rule, dtype, on_gpu = self.router, self.rule, x.dtype, gpu_routed.is_for(x, impl=self.impl)
        if self._unknown(router, rule, on_gpu=on_gpu) is not None:
            return None
        parts = list(router.named_children())
        modules = (*self._leaves.values(), router, *(child for _, child in parts))
        routed = self._make_routed(dtype, on_gpu=on_gpu)
        if on_gpu or isinstance(routed, RoutedNeurons):
            always: float = gpu_routed.MOST_TOKENS if on_gpu else NEURON_TOKENS
        else:
            always = 0 if routed is None else cpu_always(dtype, is_int8=has_int8(self.host, self._local))
        return _Native(
            routed,
            on_gpu,
            always * self.site.d_model,
            *(rule, self.always_on, dtype),
            places=(*self._places, (self, "router", router), *((router, name, child) for name, child in parts)),
            modules=tuple((module, type(module)) for module in modules),
            tensors=tuple(
                (m, table, name, t, *((0, ()) if t is None else (t.data_ptr(), t.stride())))
                for m in modules
                for table in ("_parameters", "_buffers")
                for name, t in m.__dict__[table].items()
            ),
        )

    def _unknown(self, router: nn.Module, rule: Rule, *, on_gpu: bool) -> str | None:
        """Why no native call may take the place of router and rule, or read what is in the projections' places; None if one may."""
        if type(router) not in ((NormRouter,) if on_gpu else (NormRouter, GateRouter, LowRankRouter, OracleRouter)):
            return f"no native call knows the router {type(router).__name__}"
        if isinstance(router, OracleRouter) and router.config.of != "activation":
            return "no native call knows the true norms of outputs"
        if type(router) is not NormRouter and self.num_experts != self.site.d_ff:
            return f"the router {type(router).__name__} has a native call for experts of one neuron alone"
        if rule.name not in (gpu_routed.RULES if on_gpu else ROUTED_RULES) or type(rule) is not RULES[rule.name]:
            return f"no native call knows the rule {rule}"
        if router._forward_hooks or router._forward_pre_hooks or hasattr(router, "_hf_hook"):
            return "the router has hooks"
        for name, child in router.named_children():
            if reason := not_plain_reason(child):
                return f"the router's '{name}' {reason}"
        # else something around a projection passes its name on, and cannot be watched
        return None if self._in_place() else "other modules stand around a projection"

    def native_refusal(self, x: Tensor) -> str | None:
        """Why router, rule and FFN would not be one native call for such an input in eager mode; None if they would. Runs nothing.

        Where they would not, the router, the rule and the kernel that `kernels.explain` names run one by one.

        Args:
            x: (..., D).
        """
        if self.mode == "dense":
            return "the layer runs dense"
        if self.selector is not None or self.host.training:
            return "the layer trains"
        if not self._is_native(x):
            if self._needs_no_router(x):
                return "every expert runs whatever its score: no router, and dense products"
            return "it is for the CPU or a GPU, for impl 'auto', 'cpu' or 'triton', and neither for gradients nor for autocast"
        on_gpu = gpu_routed.is_for(x, impl=self.impl)
        if (why_not := self.masked_reason() or self._unknown(self.router, self.rule, on_gpu=on_gpu)) is not None:
            return why_not
        if (why_not := self._routed_refusal(x.dtype, on_gpu=on_gpu)) is not None:
            return why_not
        num_tokens = x.numel() // max(1, x.shape[-1])
        if on_gpu:
            return f"{num_tokens} tokens are more than {gpu_routed.MOST_TOKENS}" if num_tokens > gpu_routed.MOST_TOKENS else None
        if type(self.router) is not NormRouter:
            return f"{num_tokens} tokens are more than {NEURON_TOKENS}" if num_tokens > NEURON_TOKENS else None
        always = cpu_always(x.dtype, is_int8=self.is_int8)
        return f"{num_tokens} tokens are more than {always}" if num_tokens > always and self.impl == "auto" else None

    def _routed_refusal(self, dtype: torch.dtype, *, on_gpu: bool) -> str | None:
        weights, activation = self.weights(), self.site.activation
        if on_gpu:
            return gpu_routed.refusal(weights, self._router_weights(), activation=activation, dtype=dtype)
        if type(self.router) is NormRouter:
            return routed_refusal(weights, self._router_weights(), activation=activation, dtype=dtype)
        return neurons_refusal(weights, self._neuron_weights(), activation=activation, dtype=dtype)

    def _make_routed(self, dtype: torch.dtype, *, on_gpu: bool) -> "Routed | RoutedNeurons | gpu_routed.Routed | None":
        if self._routed_refusal(dtype, on_gpu=on_gpu) is not None:
            return None  # the pieces do it, and `native_refusal` says why
        if on_gpu:
            return gpu_routed.Routed(self.weights(), self._router_weights(), activation=self.site.activation, dtype=dtype)
        if type(self.router) is NormRouter:
            return Routed(self.weights(), self._router_weights(), activation=self.site.activation, dtype=dtype)
        return RoutedNeurons(self.weights(), self._neuron_weights(), activation=self.site.activation, dtype=dtype)

    def _operator(self, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """The native call as an operator; None where there is none."""
        on_gpu = gpu_routed.is_for(x, impl=self.impl)
        if type(self.router) is not NormRouter or self._unknown(self.router, self.rule, on_gpu=on_gpu) is not None:
            return None  # of single neurons there is none: graphs hold the pieces
        if self._routed_refusal(x.dtype, on_gpu=on_gpu) is not None:
            return None
        if on_gpu:
            return partial(gpu_routed.routed_ffn, weights=self.weights(), router=self._router_weights(), activation=self.site.activation)
        return partial(routed_ffn, weights=self.weights(), router=self._router_weights(), activation=self.site.activation, impl=self.impl)

    def _router_weights(self) -> RouterWeights:
        router = cast(NormRouter, self.router)
        return RouterWeights(
            hidden_WD=router.hidden.weight.detach(),
            hidden_bias_W=router.hidden.bias.detach(),
            out_EW=router.out.weight.detach(),
            out_bias_E=router.out.bias.detach(),
            output=router.config.output,
            rule=self.rule.name,
            knob=self.rule.value,
            always_on=self.always_on,
        )

    def _neuron_weights(self) -> NeuronRouterWeights:
        router = cast(GateRouter | LowRankRouter | OracleRouter, self.router)
        low_rank, scale_F = None, None if isinstance(router, OracleRouter) else router.scale_F
        if isinstance(router, LowRankRouter):
            gate = router.gate
            low_rank = LowRankWeights(
                project_RD=router.project.weight.detach(),
                up_FR=router.up.weight.detach(),
                up_bias_F=router.up.bias.detach(),
                up_std_F=router.up_std_F,
                gate_FR=None if gate is None else gate.weight.detach(),
                gate_bias_F=None if gate is None else gate.bias.detach(),
                gate_std_F=router.gate_std_F,
            )
        return NeuronRouterWeights(scale_F=scale_F, rule=self.rule.name, knob=self.rule.value, low_rank=low_rank, always_on=self.always_on)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoEFFN":
        self._forget_natives()  # they would keep the weights from before the move or cast in memory
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_natives": {}}  # pointers are of this process and these tensors

    def _begin(self, first: nn.Module, x: Tensor) -> _Call:
        thread = _thread()
        call = self._calls.get(thread)
        # Of a GLU's two projections the second continues the call. The first never does: an error may have left a call behind.
        if call is None or call.x is not x or call.first is first:
            call = self._calls[thread] = self._decide(first, x)
        return call

    def _end(self) -> _Call:
        call = self._calls.pop(_thread(), None)
        if call is None:
            raise UnsupportedModelError(
                f"'{self.site.down}' ran without '{self.site.first[0]}': something goes around the converted FFN, so that its input is not "
                "known; run it dense (set_mode(model, 'dense'), to_dense(model))."
            )
        return call

    def _masked(self, h: Tensor, x: Tensor) -> Tensor:
        if self.selector is not None:
            h, mask_TE = self.selector(self, x, h)
            self._record(mask_TE, x)
            return h
        plan = self._plan(x)
        mask_TF = neuron_mask(plan.mask_TE, self.site.d_ff)
        h = h.masked_fill(~mask_TF.reshape(h.shape), 0)  # not a product: an overflow in an unselected neuron stays unseen
        if plan.probs_TE is not None:
            h = h * neuron_mask(straight_through(plan.probs_TE).to(h.dtype), self.site.d_ff).reshape(h.shape)
        return h

    # -- modules that others put in a projection's place --------------------------------------------------------------------------------

    def _follow(self, *_: object) -> None:
        """Keep a hook on every module that stands in the place of one of our projections, and on no other."""
        if not self._replacements and self._in_place():
            return
        for path, leaf in self._leaves.items():
            if self._hooked(path, leaf) is not _module_at(self.host, path):
                with _FOLLOW:
                    self._move_hook(path, leaf)

    def _in_place(self) -> bool:
        """Whether our projections hang where they were. In doubt, where something passes on the names of what it wraps, False."""
        return all(parent._modules.get(name) is child for parent, name, child in self._places)

    def _hooked(self, path: str, leaf: nn.Module) -> nn.Module:
        """The module that we take for the one in this projection's place."""
        replacement = self._replacements.get(path)
        return leaf if replacement is None else replacement.module

    def _move_hook(self, path: str, leaf: nn.Module) -> None:
        module = _module_at(self.host, path)
        if self._hooked(path, leaf) is module:  # another thread was faster
            return
        if (old := self._replacements.pop(path, None)) is not None:
            old.hook.remove()
        if module is not leaf:
            watch = self._mask_input if path == self._local.down else self._remember_input
            self._replacements[path] = _Replacement(module, module.register_forward_pre_hook(watch))

    def _is_replaced(self, path: str) -> bool:
        """Whether the module in this projection's place has our hook; the projection inside it then does what it always did."""
        replacement = self._replacements.get(path)
        return replacement is not None and replacement.module is _module_at(self.host, path)

    def _remember_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.mode == "moe":
            self._begin(module, args[0])

    def _mask_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.mode == "dense" else (self._masked(args[0], self._end().x), *args[1:])


class MoEProjection(MoEFFN):
    """Executes the MLP in the place of a linear layer (`moeify.sites.ProjectionMLP`) as a mixture of experts, or leaves it dense.

    A `MoEFFN` in all it does, and wherever one is asked for; the class says of which kind a layer is.

    Source: Szatkowski et al. 2024, arXiv:2310.04361, section 3.4.
    """


class ActiveRecorder:
    """Counts executed (token, expert) pairs of each MoE layer; on the device, no host sync until asked.

    Neurons, not experts, are counted, so that experts of unequal size weigh what they cost.
    """

    def __init__(self) -> None:
        self.token_masks: Mapping[str, Tensor | None] = {}
        """Padding by layer name; set by `token_mask`."""
        self._active: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._neurons: dict[str, int] = {}

    def add(self, layer: MoEFFN, mask_TE: Tensor, *, shape: Sequence[int]) -> None:
        """Count one forward of one layer over tokens of this shape, (B, S) or (T,); padding is left out where the layer's mask fits it."""
        sizes_E = torch.tensor(layer.bounds, device=mask_TE.device).diff()
        active_T = (mask_TE.detach() * sizes_E).sum(1)
        keep_T = token_mask_of(self.token_masks.get(layer.site.name), shape)
        self.add_tokens(layer, active_T, None if keep_T is None else keep_T.to(active_T.device), shape=shape)

    def add_tokens(self, layer: MoEFFN, active_T: Tensor, keep_T: Tensor | None, *, shape: Sequence[int]) -> None:
        """What `add` counts, token by token; a recorder that keeps more than sums has its own.

        Args:
            layer: which ran.
            active_T: int64, executed neurons of each token, in [0, F].
            keep_T: bool, False at padding; None where nothing is known of it.
            shape: of the tokens, (B, S) or (T,).
        """
        name = layer.site.name
        if keep_T is not None:
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
    moe.lay_out()


def detach(model: nn.Module, name: str) -> None:
    """Remove the executor at site ``name``; the dense FFN is what it was."""
    host = model.get_submodule(name)
    cast(MoEFFN, host.moe).unbind()
    del host.moe


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The executors of a converted model by site name, in module order; empty for a dense model."""
    return {m.site.name: m for m in model.modules() if isinstance(m, MoEFFN)}


def _thread() -> int:
    # A traced graph has one caller, and the tracer cannot call get_ident.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _module_at(host: nn.Module, path: str) -> nn.Module:
    # get_submodule, which checks more, takes twice as long; every forward of every layer asks several times.
    for name in path.split("."):
        host = getattr(host, name)
    return host


def _places_on(host: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every name on the path."""
    for name in path.split("."):
        child = getattr(host, name)
        yield host, name, child
        host = child


def _dropout_names(host: nn.Module) -> tuple[str, ...]:
    """Attributes that may be a dropout's p; torch.compile of torch 2.11 cannot trace this, and takes those of when the layer was made."""
    return tuple(name for name in vars(host) if "drop" in name)


def _drops_activations(host: nn.Module, names: Sequence[str]) -> bool:
    """Whether a dropout with p > 0 may sit between the projections; on the safe side: whatever in the host looks like one."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in host.modules()):
        return True
    return any(isinstance(value := getattr(host, name, None), float) and value > 0 for name in names)
