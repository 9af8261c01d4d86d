"""The executor of training-free channel sparsity: linear layers that skip the input channels which matter little to a token.

Letters: B batch, S sequence, T tokens, K input channels, N outputs.

A `SparseInput` is a child named ``channels`` of the linear layer. It owns one buffer, ``level_K``; weight and bias stay where they are, so
that a checkpoint is a dense one with a few more numbers. What changes is the ``forward`` of that one instance:

    y = (x * keep) W^T + b,    keep_tk = rule(|x_tk| / level_k)

With the rule ``Threshold(theta=1)`` that is one comparison for each channel: |x_tk| >= level_k.

A few tokens (decoding) run by a compiled kernel, the CPU's or a GPU's, that reads the kept channels' weights alone; for that the weight's
memory is ordered by input channel (`SparseInput.lay_out`), while its name, shape and values stay. Anything else runs as the layer's own
forward on a masked input, at dense cost: many tokens, gradients, autocast, training, and weights that must not be read directly (decision
D7). `SparseInput.masked_reason` says which of these.

The layers of a gated FFN run as one native call where each would run by the kernel and nobody looks in between (`GatedFFN`).
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._positions import Positions
from .errors import ConfigError, KernelError, UnsupportedModelError
from .kernels import cpu_linear
from .kernels.cpu import ACTIVATIONS, is_recorded
from .kernels.cpu_linear import LinearWeights, SparseGated, gated_refusal
from .kernels.linear import call_objection, compiled_for, keeps, reads_rows, skip
from .select import PerToken, Rule, Threshold
from .sites import FFNSite, Int8DownLinear, LinearSite, linear_weight, not_plain_reason, store_by_input, token_mask_of

_log = logging.getLogger(__name__)

_FEW_TOKENS = 16  # that count as decoding in a dtype which no kernel takes

CHILD = "channels"
"""Name of the executor in its layer."""
AT_LEVEL = Threshold(theta=1.0)
"""The rule that keeps what reaches its level."""


class _Native(NamedTuple):
    """The native calls of one layer, and everything that they were made for."""

    at_level: Callable[[Tensor], Tensor]
    """Of x as it comes."""
    of_masked: Callable[[Tensor], Tensor]
    """Of x whose skipped channels are zero already: zeros are not read."""
    dtype: torch.dtype
    kernel: ModuleType
    kind: type[nn.Module]
    tensors: tuple[tuple[Tensor | None, int, tuple[int, ...]], ...]
    """Weight, its scales, bias and levels that were there, where their values lay, and their strides."""

    def holds(self, linear: nn.Module, level_K: Tensor | None, dtype: torch.dtype, kernel: ModuleType) -> bool:
        """Whether nothing of it has changed. Every layer asks for every token."""
        if self.dtype is not dtype or self.kernel is not kernel or type(linear) is not self.kind:
            return False
        parameters = linear._parameters
        now = (parameters.get("weight"), parameters.get("weight_scale"), parameters.get("bias"), level_K)
        for tensor, (was, pointer, strides) in zip(now, self.tensors, strict=True):
            if tensor is not was or (tensor is not None and (tensor.data_ptr() != pointer or tensor.stride() != strides)):
                return False
        return True


class SparseInput(nn.Module):
    """Skips input channels of one linear layer, or leaves it dense.

    Args:
        site: the layer.
        rule: selection rule on ``|x| / level``. A `Threshold` keeps exactly the channels that reach theta times their level, which may be
            none; theta is 1 by default. Any other rule keeps at least one.
        first_dense: positions at the start of each sequence that keep all channels, where the layer reads (B, S, K) with S > 1: the first
            tokens of a text have activations and consequences of their own. Positions are those that the model is told (``position_ids``)
            or that follow its cache; where neither is known, every forward begins its sequences, and padding on the left counts. A forward
            of one token (decoding) is never the start.

    Raises:
        ConfigError: ``first_dense`` below 0.
    """

    level_K: Tensor

    def __init__(self, site: LinearSite, *, rule: Rule | None = None, first_dense: int = 0) -> None:
        super().__init__()
        if first_dense < 0:
            raise ConfigError(f"first_dense must be at least 0, got {first_dense}.")
        self.site = site
        self.rule: Rule = AT_LEVEL if rule is None else rule
        self.first_dense = first_dense
        self.mode: Literal["dense", "moe"] = "moe"
        """In "dense" nothing is skipped; `moeify.set_mode` sets it, with that of the converted FFNs."""
        self.impl = "auto"
        """What computes it: a key of `moeify.kernels.linear.IMPLS`, or "auto"; `moeify.set_impl` sets it."""
        self.recorder: ChannelRecorder | None = None
        self.gated: GatedFFN | None = None
        """The FFN whose layers may run as one, this one among them; `attach_channels` sets it."""
        self.positions: Positions | None = None
        """What knows where a forward's tokens stand; `attach_channels` sets it."""
        self.start_T: Tensor | None = None
        """In a batch of sequences packed into one: which of its tokens are within ``first_dense`` of their own sequence's start, empty if
        none is. The packing's owner sets it, for one forward; None: the layer reads ``first_dense`` off the input's shape."""
        self._native: _Native | None = None
        self._scaled: tuple[float, Tensor, int, Tensor] | None = None
        self.register_buffer("level_K", torch.zeros(site.d_in, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"{self.site.name!r}, {self.site.role}, {self.rule}, mode={self.mode!r}, impl={self.impl!r}"

    def select(self, x: Tensor) -> Tensor:
        """Which channels of ``x`` (..., K) are kept; recorded if a recorder listens."""
        if isinstance(self.rule, Threshold):
            keep = keeps(x, self.levels())
        elif isinstance(rule := cast(object, self.rule), PerToken):
            x_TK = x.reshape(-1, x.shape[-1])
            rule.check(len(x_TK))
            keep = torch.empty(x_TK.shape, dtype=torch.bool, device=x.device)
            for one, rows_N in rule.parts:
                keep[rows_N] = self._keeps(one, x_TK[rows_N])
            keep = keep.view(x.shape)
        else:
            keep = self._keeps(self.rule, x.reshape(-1, x.shape[-1])).view(x.shape)
        start = self._start(x)
        if isinstance(start, Tensor):
            keep = keep | start[..., None]
        elif start:
            keep[:, :start] = True
        if self.recorder is not None:
            self.recorder.add(self.site, keep)
        return keep

    def levels(self) -> Tensor:
        """What |x_k| is compared with by a `Threshold`: ``theta * level_K`` (K,), the same tensor until one of the two changes."""
        level_K, theta = cast(Tensor, self._buffers["level_K"]), cast(Threshold, self.rule).theta
        if theta == 1:
            return level_K
        if torch.compiler.is_compiling():
            return level_K * theta
        version = 0 if level_K.is_inference() else level_K._version
        if (made := self._scaled) is None or made[:1] + made[2:3] != (theta, version) or made[1] is not level_K:
            made = self._scaled = theta, level_K, version, level_K * theta
        return made[3]

    def _skip(self, x: Tensor) -> Tensor:
        """``x`` with what is not kept at zero."""
        if self.recorder is not None or not isinstance(self.rule, Threshold):
            return torch.where(self.select(x), x, 0)
        kept = skip(x, self.levels())
        start = self._start(x)
        if isinstance(start, Tensor):
            return torch.where(start[..., None], x, kept)
        if start:
            kept[:, :start] = x[:, :start]
        return kept

    def _start(self, x: Tensor) -> int | Tensor:
        """Tokens of ``x`` that keep all channels: so many at the beginning of each row, or a mask (B, S) or (1, S)."""
        if self.start_T is not None:
            return self.start_T[None] if self.start_T.numel() else 0
        if not self.first_dense or x.dim() != 3 or x.shape[1] == 1:
            return 0
        return self.first_dense if self.positions is None else self.positions.start(x.shape[1], self.first_dense)

    def _has_start(self, x: Tensor) -> bool:
        start = self._start(x)
        return isinstance(start, Tensor) or start > 0

    def _keeps(self, rule: Rule, x_TK: Tensor) -> Tensor:
        """Which channels one rule keeps of each token."""
        if isinstance(rule, Threshold):
            return keeps(x_TK, self.level_K if rule.theta == 1 else self.level_K * rule.theta)
        ratio_TK = torch.where(self.level_K > 0, x_TK.detach().abs().float() / self.level_K, math.inf)
        return rule(ratio_TK)

    def _forward(self, linear: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "dense":
            return cast(Tensor, type(linear).forward(linear, x))
        if self.gated is not None and (y := self.gated.run(self, x)) is not None:
            return y
        if self.impl != "masked":
            kernel = compiled_for(x, impl=self.impl)
            why_not = self._call_objection(linear, x, kernel)
            if why_not is None and not (recorded := is_recorded(x)):
                native = self._native
                if native is not None and native.holds(linear, self._level_of_kernel(), x.dtype, kernel):
                    return self._by_kernel(x, native.at_level, native.of_masked)
            if why_not is None and (why_not := self._layer_objection(linear, x, kernel)) is None:
                if recorded:  # an operator takes the tensors themselves
                    layer = self._layer(linear)
                    operators = (partial(kernel.sparse_linear, layer=one) for one in (layer, layer._replace(level_K=None)))
                    return self._by_kernel(x, *operators)
                native = self._make_native(linear, kernel, x.dtype)
                return self._by_kernel(x, native.at_level, native.of_masked)
            if self.impl != "auto":
                raise KernelError(f"'{self.site.name}': impl {self.impl!r}: {why_not}.")
            if not torch.compiler.is_compiling():
                is_prompt = x.numel() > kernel.MOST_TOKENS.get(x.dtype, _FEW_TOKENS) * self.site.d_in
                _tell_once(why_not, is_decoding=not is_prompt and not torch.is_grad_enabled())
        return cast(Tensor, type(linear).forward(linear, self._skip(x)))

    # -- the compiled kernel ------------------------------------------------------------------------------------------------------------

    def masked_reason(self, linear: nn.Module, x: Tensor) -> str | None:
        """Why an input like ``x`` would run masked, at dense cost; None if the compiled kernel computes it. Runs nothing."""
        if self.impl == "masked":
            return "asked for by name"
        kernel = compiled_for(x, impl=self.impl)
        return self._call_objection(linear, x, kernel) or self._layer_objection(linear, x, kernel)

    def lay_out(self, linear: nn.Module) -> None:
        """Order the layer's weight in memory by input channel, as the compiled kernel reads it; nothing where that need not, or cannot, be.

        `attach_channels` does this; after loading into a skeleton, moving to another device or changing the dtype, it is done again.
        """
        self._native = None
        if self.gated is not None:
            self.gated.forget()
        if isinstance(linear, Int8DownLinear):  # lies so already
            return
        if not_plain_reason(linear) is None and reads_rows(linear_weight(linear)):
            store_by_input(linear)

    def _call_objection(self, linear: nn.Module, x: Tensor, kernel: ModuleType) -> str | None:
        tensors = (linear._parameters.get("weight"), linear._parameters.get("bias"))
        return call_objection(x, tensors, kernel, training=linear.training, named=self.impl != "auto")

    def _layer_objection(self, linear: nn.Module, x: Tensor, kernel: ModuleType) -> str | None:
        if why_not := not_plain_reason(linear):
            return f"it {why_not}"
        return cast("str | None", kernel.refusal(self._layer(linear), dtype=x.dtype))

    def _layer(self, linear: nn.Module) -> LinearWeights:
        bias = linear._parameters.get("bias")
        bias_N = None if bias is None else bias.detach()
        level_K = self._level_of_kernel()
        if isinstance(linear, Int8DownLinear):
            return LinearWeights(linear.weight.detach()[0], level_K, bias_N, linear.weight_scale.detach())
        return LinearWeights(linear_weight(linear).detach().t(), level_K, bias_N)

    def _level_of_kernel(self) -> Tensor:
        return self.levels() if isinstance(self.rule, Threshold) else cast(Tensor, self._buffers["level_K"])

    def _make_native(self, linear: nn.Module, kernel: ModuleType, dtype: torch.dtype) -> _Native:
        layer = self._layer(linear)
        at_level, of_masked = (kernel.SparseLinear(one, dtype=dtype) for one in (layer, layer._replace(level_K=None)))
        tensors = (*(linear._parameters.get(name) for name in ("weight", "weight_scale", "bias")), layer.level_K)
        places = tuple((t, *((0, ()) if t is None else (t.data_ptr(), t.stride()))) for t in tensors)
        self._native = _Native(at_level, of_masked, dtype, kernel, type(linear), places)
        return self._native

    def _by_kernel(self, x: Tensor, at_level: Callable[[Tensor], Tensor], of_masked: Callable[[Tensor], Tensor]) -> Tensor:
        if self.recorder is None and isinstance(self.rule, Threshold) and not self._has_start(x):
            return at_level(x)
        return of_masked(self._skip(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseInput":
        # Seen as integers, levels are moved with the model and never rounded: a change of dtype is for floating tensors only.
        self._native = None
        if self.gated is not None:
            self.gated._native = None  # it would keep the weights from before the move or cast in memory
        self.level_K = self.level_K.view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            self.level_K = self.level_K.view(torch.float32)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_scaled": None}  # pointers are of this process and these tensors


class _Part(NamedTuple):
    """What hangs in the place of one projection."""

    path: str
    linear: nn.Module
    executor: SparseInput | None


class GatedFFN:
    """Runs the layers of one gated FFN as one native call: ``y = down(act(gate(x)) * up(x))``, each with its own levels.

    As in `moeify.layers`: the first projections remember x and return a stand-in of width 1, the down projection ignores what became of it
    and returns the FFN of x, so that the code between and around stays the family's own. That begins with the forward of the host and
    happens once in it: a projection that somebody calls by itself computes itself.

    Args:
        host: the module that holds the projections.
        site: the FFN.
    """

    def __init__(self, host: nn.Module, site: FFNSite) -> None:
        self._host, self._site = host, site
        cut = len(site.name) + 1 if site.name else 0
        self._paths = tuple(path[cut:] for path in (*site.first, site.down))
        self._find_parts()
        leaves = [part.linear for part in self._parts]
        # What was between the projections when the FFN was found; another activation in its place is another function.
        self._others = tuple(
            (parent, name, child)
            for parent in host.modules()
            for name, child in parent.named_children()
            if not isinstance(child, SparseInput) and all(child is not leaf for leaf in leaves)
        )
        # One a thread: None from when the host's forward begins, then x, the call that it will be, and what stands in for its parts.
        self._calls: dict[int, tuple[Tensor, SparseGated, Tensor] | None] = {}
        self._native: tuple[SparseGated, tuple[_Native, ...]] | None = None
        self._hooks = host.register_forward_pre_hook(self._enter), host.register_forward_hook(self._leave, always_call=True)

    def remove(self) -> None:
        """Leave the layers to themselves."""
        for hook in self._hooks:
            hook.remove()
        self._find_parts()
        for part in self._parts:
            if part.executor is not None and part.executor.gated is self:
                part.executor.gated = None

    def join(self) -> None:
        """Make this the FFN of the executors that its layers have now."""
        self._find_parts()
        for part in self._parts:
            if part.executor is not None:
                part.executor.gated = self

    def forget(self) -> None:
        """Drop the native call, which holds the weights that it was made for."""
        self._native = None

    def separate_reason(self, x: Tensor) -> str | None:
        """Why the layers of an FFN that reads ``x`` (..., D) run one by one; None if as one. Runs nothing."""
        self._find_parts()
        return self._call_objection(x) or self._layer_objection(x.dtype)

    def run(self, executor: SparseInput, x: Tensor) -> Tensor | None:
        """What the layer of ``executor`` returns for its input; None where it computes itself."""
        if torch.compiler.is_compiling() or (thread := threading.get_ident()) not in self._calls:
            return None
        call, is_down = self._calls.pop(thread), executor.site.ffn is not None
        if is_down:
            return None if call is None else call[1](call[0]).reshape(*x.shape[:-1], self._site.d_out)
        if call is None:
            if (native := self._ready(x)) is None:
                return None
            width = self._site.d_ff if self._site.explicit_width else 1
            call = x, native, x.new_zeros((*x.shape[:-1], 2 * width if self._site.fused else width))
        self._calls[thread] = call
        return call[2]

    def _enter(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._calls[threading.get_ident()] = None

    def _leave(self, *_: object) -> None:
        """Whatever happened in the forward: a call that nobody took is not for the next one."""
        if not torch.compiler.is_compiling():
            self._calls.pop(threading.get_ident(), None)

    def _find_parts(self) -> None:
        parts, places = [], []
        for path in self._paths:
            module = self._host
            for name in path.split("."):
                parent, module = module, getattr(module, name)
                places.append((parent, name, module))
            executor = module._modules.get(CHILD)
            places.append((module, CHILD, executor))
            parts.append(_Part(path, module, executor if isinstance(executor, SparseInput) else None))
        self._parts, self._places = tuple(parts), tuple(places)

    def _ready(self, x: Tensor) -> SparseGated | None:
        """The native call; None where the layers run one by one. Flat loops, for every FFN asks for every token."""
        for parent, name, child in self._places:
            if parent._modules.get(name) is not child:
                self._find_parts()
                self._native = None
                break
        if self._call_objection(x) is not None:
            return None
        if self._native is not None:
            call, made_for = self._native
            for native, (_, linear, executor) in zip(made_for, self._parts, strict=True):
                if not native.holds(linear, cast(SparseInput, executor).levels(), x.dtype, cpu_linear):
                    break
            else:
                return call
        if self._layer_objection(x.dtype) is not None:
            return None
        call = SparseGated(*self._weights(), activation=self._site.activation, dtype=x.dtype)
        self._native = call, tuple(cast(SparseInput, part.executor)._make_native(part.linear, cpu_linear, x.dtype) for part in self._parts)
        return call

    def _call_objection(self, x: Tensor) -> str | None:
        if not x.is_cpu:
            return f"it runs on the CPU, x is on {x.device}"
        if is_recorded(x):
            return "a tracer must see what each layer computes"
        tensors: list[Tensor | None] = []
        for path, linear, executor in self._parts:
            if executor is None or executor.gated is not self:
                return f"'{path}' skips no input channels, or another module stands in its place"
            if executor.mode == "dense":
                return f"'{path}' runs dense"
            if not isinstance(executor.rule, Threshold):
                return f"'{path}' has the rule {executor.rule}"
            if executor.recorder is not None:
                return "somebody records what is skipped"
            if executor.impl not in ("auto", "cpu"):
                return f"impl {executor.impl!r} was asked for by name"
            if executor._has_start(x):
                return "the first positions keep all channels"
            if linear.training or linear._forward_hooks or linear._forward_pre_hooks or "_hf_hook" in linear.__dict__:
                return f"'{path}' trains or has a hook"
            tensors += (linear._parameters.get("weight"), linear._parameters.get("bias"))
        if self._host.training or len(self._host._forward_pre_hooks) > 1:
            return "the FFN trains or has another hook"
        for parent, name, module in self._others:
            if parent._modules.get(name) is not module:
                return f"'{name}' beside the projections is not the module that was there"
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return f"'{name}' beside the projections trains or has a hook"
        if self._site.activation not in ACTIVATIONS:
            return f"it does not know the activation {self._site.activation!r}"
        return call_objection(x, tuple(tensors), cpu_linear, training=False)

    def _layer_objection(self, dtype: torch.dtype) -> str | None:
        for path, linear, _ in self._parts:
            if why_not := not_plain_reason(linear):
                return f"'{path}' {why_not}"
        return gated_refusal(*self._weights(), activation=self._site.activation, dtype=dtype)

    def _weights(self) -> tuple[LinearWeights, LinearWeights, LinearWeights]:
        """Of gate, up and down."""
        *first, down = (cast(SparseInput, part.executor)._layer(part.linear) for part in self._parts)
        if self._site.fused is not None:
            both, num_neurons = first[0], self._site.d_ff
            first = [
                LinearWeights(both.weight_KN[:, half], both.level_K, *(None if t is None else t[half] for t in (both.bias_N, both.scale_N)))
                for half in (slice(num_neurons), slice(num_neurons, None))
            ]
            if self._site.fused == "up_gate":
                first.reverse()
        return first[0], first[1], down

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_calls": {}}  # of this process, and of its threads


_told: set[bool] = set()


def _tell_once(why_not: str, *, is_decoding: bool) -> None:
    """Once a process of prompts, gradients and training, which is as it should be, and once of decoding, which is slower than it could."""
    if is_decoding not in _told:
        _told.add(is_decoding)
        level = logging.WARNING if is_decoding else logging.INFO
        _log.log(level, "sparse linear layers run masked, at dense cost, where the compiled kernel does not: %s", why_not)


class ChannelRecorder:
    """Counts kept (token, channel) pairs of each layer, on the device, no host sync until asked."""

    def __init__(self) -> None:
        self.token_masks: Mapping[str, Tensor | None] = {}
        """Padding by layer name; set by `moeify.controls.token_mask`."""
        self._kept: dict[LinearSite, Tensor] = {}
        self._all: dict[LinearSite, int | Tensor] = {}

    def add(self, site: LinearSite, keep: Tensor) -> None:
        """Count one forward of one layer; padding is left out where the layer's mask fits its tokens."""
        keep_T = token_mask_of(self.token_masks.get(site.name), keep.shape[:-1])
        counted = keep if keep_T is None else keep & keep_T.to(keep.device).view(*keep.shape[:-1], 1)
        tokens = keep.shape[:-1].numel() if keep_T is None else keep_T.sum()
        self._kept[site] = self._kept.get(site, 0) + counted.sum()
        self._all[site] = self._all.get(site, 0) + tokens * site.d_in

    def per_layer(self) -> dict[str, float]:
        """Share of skipped channels of each layer that ran, in [0, 1], by the layer's name; nan for a layer that saw no token."""
        return {site.name: 1 - int(kept) / total if (total := int(self._all[site])) else math.nan for site, kept in self._kept.items()}

    def skipped_frac(self) -> float:
        """Share of the parameters whose channel was skipped, over all layers and tokens, in [0, 1].

        Raises:
            ValueError: no sparse layer ran, or all tokens were padding.
        """
        shares = {name: share for name, share in self.per_layer().items() if not math.isnan(share)}
        if not self._kept:
            raise ValueError("no sparse layer ran while recording; is the model in dense mode?")
        if not shares:
            raise ValueError("no token was counted while recording; the token mask leaves none.")
        costs = {site.name: site.d_in * site.d_out for site in self._kept if site.name in shares}
        return sum(costs[name] * share for name, share in shares.items()) / sum(costs.values())


def check_attachable(model: nn.Module, name: str) -> None:
    """Refuse a layer that cannot get an executor.

    Raises:
        UnsupportedModelError: it has one already, or another forward of its own.
    """
    linear = model.get_submodule(name)
    if hasattr(linear, CHILD):
        raise UnsupportedModelError(f"'{name}' is sparse already; use to_dense(model) first.")
    if "forward" in linear.__dict__:
        raise UnsupportedModelError(f"'{name}' has a forward of its own already (a converted FFN, or an offload hook).")


def attach_channels(model: nn.Module, executor: SparseInput) -> None:
    """Make ``executor`` skip the inputs of its layer in ``model``, in place.

    Raises:
        UnsupportedModelError: as `check_attachable`.
    """
    check_attachable(model, executor.site.name)
    linear = model.get_submodule(executor.site.name)
    executor.to(next(linear.parameters()).device)
    executor.positions = Positions.of(model)
    linear.add_module(CHILD, executor)
    linear.forward = partial(executor._forward, linear)
    executor.lay_out(linear)
    if (ffn := executor.site.ffn) is not None:
        executor.gated = GatedFFN(model.get_submodule(ffn.name), ffn)
        executor.gated.join()
    elif executor.site.role == "ffn_in":  # whose down projection may have been first
        for other in sparse_inputs(model).values():
            if other.gated is not None and other.site.ffn is not None and executor.site.name in other.site.ffn.first:
                other.gated.join()


def lay_out_channels(model: nn.Module) -> None:
    """`SparseInput.lay_out` of every layer of a model that has an executor."""
    for linear in model.modules():
        if isinstance(executor := linear._modules.get(CHILD), SparseInput):
            executor.lay_out(linear)


def detach_channels(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove the executors of the named layers, of all by default; the layers are what they were."""
    names = set(sparse_inputs(model) if names is None else names)
    for linear in [m for m in model.modules() if isinstance(e := m._modules.get(CHILD), SparseInput) and e.site.name in names]:
        executor = cast(SparseInput, linear._modules[CHILD])
        if executor.site.ffn is not None and executor.gated is not None:
            executor.gated.remove()
        del linear._modules[CHILD]
        if "_old_forward" in linear.__dict__:  # accelerate has put its hook around ours, and keeps it
            linear.__dict__["_old_forward"] = MethodType(type(linear).forward, linear)
        else:
            linear.__dict__.pop("forward", None)
        if (weight := linear._parameters.get("weight")) is not None:
            weight.data = weight.data.contiguous()  # the order of its shape, which it was made in
    if not sparse_inputs(model):
        Positions.remove(model)


def sparse_inputs(model: nn.Module) -> dict[str, SparseInput]:
    """The executors of a model by the layer's name, in module order."""
    return {m.site.name: m for m in model.modules() if isinstance(m, SparseInput)}


@contextmanager
def record_channels(model: nn.Module, recorder: ChannelRecorder | None = None) -> Iterator[ChannelRecorder]:
    """Count what the sparse layers of ``model`` skip within the block, or whatever ``recorder`` counts; padding too, but inside a
    `moeify.controls.token_mask`."""
    recorder = recorder or ChannelRecorder()
    with kept(sparse_inputs(model).values(), "recorder"):
        for executor in sparse_inputs(model).values():
            executor.recorder = recorder
        yield recorder


@contextmanager
def all_channels(model: nn.Module) -> Iterator[None]:
    """Nothing is skipped within the block: what looks for layers must see what they compute with their own weights."""
    executors = sparse_inputs(model).values()
    with kept(executors, "mode"):
        for executor in executors:
            executor.mode = "dense"
        yield


@contextmanager
def kept(layers: Iterable[nn.Module], *names: str) -> Iterator[None]:
    """Give attributes of modules their old values back when the block ends."""
    before: list[tuple[nn.Module, str, Any]] = [(layer, name, getattr(layer, name)) for layer in layers for name in names]
    try:
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)
