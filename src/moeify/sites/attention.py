"""Which linear layers give attention its queries, keys and values, and which read what it gives: told by data flow, not by names.

Letters: N outputs of a linear layer.

One forward runs with autograd, cut at every linear layer's output and at every attention's output: what enters an attention then leads
back to the nearest layers only, through norms, rotations, caches and reshapes. Attention is either torch's fused function, or a product
whose softmax enters another product: (q, k) and v are their operands. The gradient of q, k or v with respect to a layer's output says
which of its outputs they are made of; of a fused layer that is the layout of its parts, interleaved or not. The output projection is what
reads the cut at an attention's output.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._config import did_you_mean
from ..errors import ConfigError, UnsupportedModelError
from .int8 import Int8Linear
from .policy import check_patterns, matching_key
from .probe import eval_mode, linear_leaves
from .projection import (
    Attention,
    ProjectionPart,
    ProjectionRecord,
    check_replaceable,
    linear_sizes,
    projection_width,
    replaced_projections,
    runs_of,
)

_BY_PATTERN = "name the layers by pattern (patterns=...)"
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
_ORDER: tuple[Attention, ...] = get_args(Attention)


def find_projections(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    attention: Sequence[Attention] = (),
    patterns: Sequence[str] = (),
    flops_factor: float = 1.0,
    activation: str = "relu",
) -> list[ProjectionRecord]:
    """Linear layers to be replaced by MLPs, with the sizes of these; for `moeify.convert.replace_projections`.

    Args:
        model: dense model with materialised weights; left as it was.
        example_inputs: keyword arguments of one forward; a few tokens are enough. Only attention that runs in it is found.
        attention: which of q, k, v and o; of self-attention and cross-attention alike.
        patterns: other layers by module path, or by 're:' pattern on all of it; a fused layer is taken as one.
        flops_factor: cost of each MLP over that of its layer, see `projection_width`.
        activation: function of the MLPs, a name in `moeify.sites.ACTIVATIONS`.

    Returns:
        One record a layer, in execution order; those that did not run at the end. Layers that give several of q, k and v have parts.

    Raises:
        ConfigError: nothing is named, a pattern matches no linear layer, or an option is out of range.
        UnsupportedModelError: what was asked for does not come from linear layers or cannot be told apart, a fused layer's outputs cannot
            be split, or a layer is replaced, converted or thinned already, int8, or no plain linear layer. Names it.

    Cost: one forward with gradients; where only patterns are given, none.
    """
    if not attention and not patterns:
        raise ConfigError("no projection is named; give attention (q, k, v, o) or patterns.")
    if unknown := [role for role in attention if role not in _ORDER]:
        raise ConfigError(f"attention must name some of {', '.join(_ORDER)}, got {unknown[0]!r}.")
    check_patterns(dict.fromkeys(patterns))
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(f"{type(model).__name__} has parameters on the meta device: load its weights first.")
    named = _match(model, patterns)
    wanted = [role for role in _ORDER if role in attention]
    flow = watch_attention(model, example_inputs) if wanted else _Flow()
    if wanted:
        _check_found(model, flow, wanted)
    found = []
    for path in flow.order:
        roles = flow.roles.get(path, {})
        if not any(role in roles for role in wanted):
            continue
        d_in, d_out, bias = linear_sizes(check_replaceable(model, path))
        base = _base(path, d_in, d_out, bias=bias, activation=activation)
        if len(roles) == 1:
            width = projection_width(d_in, d_out, flops_factor)
            found.append(ProjectionRecord(role=next(iter(roles)), width=width, **base))
        else:
            found.append(ProjectionRecord(parts=_parts(path, roles, wanted, d_in, flops_factor), **base))
    taken = {record.name for record in found}
    for path in named:
        if path not in taken:
            d_in, d_out, bias = linear_sizes(check_replaceable(model, path))
            width = projection_width(d_in, d_out, flops_factor)
            found.append(ProjectionRecord(width=width, **_base(path, d_in, d_out, bias=bias, activation=activation)))
    return found


def _base(path: str, d_in: int, d_out: int, *, bias: bool, activation: str) -> dict[str, Any]:
    """What every record has; all MLPs have biases."""
    return {"name": path, "d_in": d_in, "d_out": d_out, "bias": bias, "adds_bias": not bias, "activation": activation}


# ---- what was asked for


def _match(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Paths of the linear layers that the patterns name, in module order; those that cannot be replaced are refused later, by name."""
    leaves, replaced = linear_leaves(model), replaced_projections(model)
    names = [name for name, module in model.named_modules() if name in leaves or name in replaced or isinstance(module, Int8Linear)]
    for pattern in patterns:
        if not any(matching_key({pattern: None}, name) for name in names):
            raise ConfigError(f"projection pattern {pattern!r} matches no linear layer{did_you_mean(pattern, names)}")
    keys = dict.fromkeys(patterns)
    return [name for name in names if matching_key(keys, name) is not None]


def _check_found(model: nn.Module, flow: "_Flow", wanted: Sequence[Attention]) -> None:
    """Every attention must have every layer that was asked for; one that has none of its own at all is left out with a warning."""
    if not flow.seen:
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} was seen in this forward (neither torch's nor a softmax between two products); "
            f"{_BY_PATTERN}."
        )
    reason = "is made of no linear layers that run on their own"
    without = [place for place, roles in flow.seen.items() if not roles]
    if len(without) == len(flow.seen):
        raise UnsupportedModelError(f"attention of {type(model).__name__} ('{without[0]}') {reason}; {_BY_PATTERN}.")
    for place, roles in flow.seen.items():
        if roles and (missing := next((role for role in wanted if role not in roles), None)):
            what = "reads its output" if missing == "o" else f"gives its {missing}"
            raise UnsupportedModelError(f"the attention in '{place}' has no linear layer that {what}; {_BY_PATTERN}.")
    if without:
        warnings.warn(f"the attention in '{without[0]}' is left as it is: it {reason}.", stacklevel=3)


def _parts(
    path: str, roles: Mapping[Attention, Tensor], wanted: Sequence[Attention], d_in: int, flops_factor: float
) -> tuple[ProjectionPart, ...]:
    away = f"; {_BY_PATTERN}, which takes it as one, or leave its attention out"
    if "o" in roles:
        raise UnsupportedModelError(f"'{path}' reads one attention's output and gives {', '.join(r for r in roles if r != 'o')}{away}.")
    for one, other in ((a, b) for a in roles for b in roles if _ORDER.index(a) < _ORDER.index(b)):
        if shared := int((roles[one] & roles[other]).sum()):
            raise UnsupportedModelError(f"'{path}' cannot be split: {shared} of its outputs are both {one} and {other}{away}.")
    if loose := int((~torch.stack(list(roles.values())).any(0)).sum()):
        raise UnsupportedModelError(f"'{path}' cannot be split: {loose} of its outputs are none of {', '.join(roles)}{away}.")
    parts = []
    for role in _ORDER[:3]:
        if role in roles:
            rows = runs_of(roles[role].nonzero().flatten())
            width = projection_width(d_in, int(roles[role].sum()), flops_factor) if role in wanted else None
            parts.append(ProjectionPart(name=cast(Any, role), rows=rows, width=width))
    return tuple(parts)


# ---- one watched forward


@dataclass
class _Flow:
    """What one forward showed."""

    order: list[str] = field(default_factory=list)
    """Linear leaves in execution order."""
    roles: dict[str, dict[Attention, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """Leaf -> what attention has of it, and which of its outputs these are: bool (N,)."""
    seen: dict[str, set[Attention]] = field(default_factory=dict)
    """Path of a module that computes attention -> what linear leaves give it, and "o" where one reads its output."""

    def add(self, path: str, role: Attention, mask_N: Tensor) -> None:
        roles = self.roles[path]
        roles[role] = roles[role] | mask_N if role in roles else mask_N


@torch.enable_grad()
def watch_attention(model: nn.Module, example_inputs: Mapping[str, Any]) -> _Flow:
    """Run the model once and tell which outputs of which linear leaves are q, k and v, and which leaves read attention's output."""
    watch = _Watch()
    leaves = linear_leaves(model)
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(eval_mode(model))
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.enter(path)).remove)
            if path in leaves:
                is_last = leaves[path].channel_dim == -1
                stack.callback(module.register_forward_pre_hook(watch.reads(path)).remove)
                stack.callback(module.register_forward_hook(watch.cuts(path, channel_dim=-1 if is_last else 1)).remove)
            stack.callback(module.register_forward_hook(watch.leave, always_call=True).remove)
        stack.enter_context(watch)
        model(**example_inputs)
    for place in watch.open.values():
        watch.flow.seen.setdefault(place, set())
    return watch.flow


class _Watch(TorchFunctionMode):
    """Sees every product, softmax and attention, and cuts the graph between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = _Flow()
        self.places: list[str] = [""]
        self.cut: dict[int, tuple[str, Tensor, int]] = {}  # id of the tensor that stands for a leaf's output -> leaf, tensor, channels
        self.ends: dict[int, tuple[str, Tensor]] = {}  # id of the tensor that stands for an attention's output -> place, tensor
        self.readers: set[str] = set()  # leaves that read an attention's output
        self.products: dict[Any, tuple[Tensor, Tensor]] = {}  # node -> operands
        self.open: dict[Any, str] = {}  # softmaxes that have met no value -> where they are computed
        self.softmaxes: dict[Any, list[tuple[Tensor, Tensor]]] = {}  # node -> operands of the products that its scores are made of

    # -- hooks

    def enter(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.places.append(path)

        return hook

    def leave(self, *_: Any) -> None:
        self.places.pop()

    def reads(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if path not in self.flow.order:
                self.flow.order.append(path)
            if not args or not isinstance(args[0], Tensor):
                return
            for variable in _variables(args[0]):
                if id(variable) in self.ends:
                    self.flow.seen[self.ends[id(variable)][0]].add("o")
                    self.readers.add(path)

        return hook

    def cuts(self, path: str, *, channel_dim: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            cut = output.detach().requires_grad_()
            self.cut[id(cut)] = (path, cut, channel_dim)
            if path in self.readers:
                self.flow.add(path, "o", torch.ones(cut.shape[channel_dim], dtype=torch.bool))
            return cut.clone()  # what follows may work in place

        return hook

    # -- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            operands = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[:3]
            return self._attention([(operands[0], operands[1])], operands[2], result)
        if name == "multi_head_attention_forward":
            self.flow.seen.setdefault(self.places[-1], set())  # its weights are parameters, and no layer runs
        elif name in _PRODUCTS and isinstance(result, Tensor) and result.requires_grad:
            return self._product(*_operands(name, args, kwargs), result)
        elif name == "softmax" and isinstance(result, Tensor) and result.requires_grad:
            scores = args[0] if args else kwargs["input"]
            products = [self.products[node] for node in _nodes(scores, stop=self.products)]
            if products:
                self.softmaxes[result.grad_fn] = products
                self.open[result.grad_fn] = self.places[-1]
        return result

    def _product(self, one: Tensor, other: Tensor, result: Tensor) -> Tensor:
        stop = {**self.products, **self.softmaxes}
        for probs, value in ((one, other), (other, one)):
            for node in _nodes(probs, stop=stop):
                if node in self.softmaxes:
                    self.open.pop(node, None)
                    return self._attention(self.softmaxes[node], value, result)
        result = result.clone()  # of a view, what is added in place would take the node away from its tensor
        self.products[result.grad_fn] = (one, other)
        return result

    def _attention(self, scores: Sequence[tuple[Tensor, Tensor]], value: Tensor, result: Tensor) -> Tensor:
        place = self.places[-1]
        found = self.flow.seen.setdefault(place, set())
        v = self._sources(value)
        q, k = ([self._sources(pair[i]) for pair in scores] for i in (0, 1))
        rows = {cut.numel() // cut.shape[dim] for _, cut, dim, _ in v}
        for role, sources in (("q", q), ("k", k), ("v", [v])):
            for path, cut, dim, mask_N in (source for one in sources for source in one):
                # Of several score products some are of positions (DeBERTa): their layers see no tokens.
                if len(scores) > 1 and role == "k" and cut.numel() // cut.shape[dim] not in rows:
                    continue
                self.flow.add(path, cast(Attention, role), mask_N)
                found.add(cast(Attention, role))
        end = result.detach().requires_grad_()
        self.ends[id(end)] = (place, end)
        return end.clone()

    def _sources(self, tensor: Tensor) -> list[tuple[str, Tensor, int, Tensor]]:
        """Leaves whose output a tensor is made of: path, output, channel dimension, and which channels."""
        cuts = [self.cut[id(v)] for v in _variables(tensor) if id(v) in self.cut]
        if not cuts:
            return []
        random = torch.Generator().manual_seed(0)
        cotangent = torch.randn(tensor.shape, generator=random).to(tensor.device, tensor.dtype)
        grads = torch.autograd.grad(tensor, [cut for _, cut, _ in cuts], cotangent, retain_graph=True, allow_unused=True)
        found = []
        for (path, cut, dim), grad in zip(cuts, grads, strict=True):
            if grad is not None and bool(grad.any()):
                found.append((path, cut, dim, grad.movedim(dim, -1).flatten(0, -2).ne(0).any(0).cpu()))
        return found


def _operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
    return (tensors[1], tensors[2]) if name == "baddbmm" else (tensors[0], tensors[1 if len(tensors) > 1 else 0])


def _nodes(tensor: Tensor, *, stop: Mapping[Any, object]) -> list[Any]:
    """Nearest nodes of a tensor's graph that are in ``stop``."""
    return [node for node in _walk(tensor, stop) if node in stop]


def _variables(tensor: Tensor) -> list[Tensor]:
    """Leaf tensors of a tensor's graph."""
    return [node.variable for node in _walk(tensor, {}) if hasattr(node, "variable")]


def _walk(tensor: Tensor, stop: Mapping[Any, object]) -> Iterator[Any]:
    waiting, done = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in done:
            continue
        done.add(node)
        yield node
        if node not in stop:
            waiting += [following for following, _ in node.next_functions]
