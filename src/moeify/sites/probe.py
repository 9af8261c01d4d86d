"""One watched forward of a model: what enters and leaves every linear leaf, and what happens if other values leave it.

Letters: R sampled rows (tokens), D width of a leaf's input, F width of its output.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .formula import activation_names
from .site import PLAIN_LINEAR_CLASSES, is_transposed, not_plain_reason

_SAMPLED_ROWS = 32  # tokens kept per leaf: bounds the memory, whatever the size of the example

Edit = Callable[[Tensor, int], Tensor]
"""(output_RF, seed) -> what leaves the leaf instead."""


@dataclass(frozen=True)
class Leaf:
    """A module that multiplies the last dimension of its input (of a pointwise convolution: the channels) by a matrix."""

    module: nn.Module
    d_in: int
    d_out: int
    channel_dim: int
    problem: str | None
    """Why its weights must not be read directly."""


@dataclass
class Call:
    """First call of a leaf."""

    order: int
    x_RD: Tensor
    """Sampled input rows."""
    tokens: Tensor
    """A 64-bit key of every input row, sampled or not: equal for equal rows."""
    y_RF: Tensor | None = None
    """The sampled rows' output."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the whole input."""
        return len(self.tokens)


@dataclass
class Trace:
    """What one forward did."""

    calls: dict[str, Call] = field(default_factory=dict)
    """First call of every leaf, in execution order."""
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Whole outputs of every call of the leaves that were to be kept."""
    banks: set[str] = field(default_factory=set)
    """Modules that hold one matrix per expert and were called with a hidden state."""
    result: list[Tensor] = field(default_factory=list)
    """Every tensor in the model's own output."""
    activations: tuple[str, ...] = ()
    """Names of the functions that may stand between two leaves."""


@dataclass(frozen=True)
class Probe:
    """The model under examination, and the forward that all passes repeat."""

    model: nn.Module
    inputs: Mapping[str, Any]
    leaves: Mapping[str, Leaf]

    def run(
        self, *, keep: Set[str] = frozenset(), edit: Mapping[str, Edit] | None = None, pins: Mapping[str, list[Tensor]] | None = None
    ) -> Trace:
        """One forward. Every call starts from the same random state and leaves it untouched; hooks are removed whatever happens.

        Args:
            keep: leaves whose whole outputs are kept.
            edit: leaf -> function that gives its output instead.
            pins: leaf -> outputs of its calls in turn, given instead of what it computes.
        """
        edit, pins, trace = edit or {}, pins or {}, Trace(activations=activation_names(self.model))
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(self.model)))
            for seed, (path, leaf) in enumerate(self.leaves.items()):
                before, after = _leaf_hooks(
                    trace, path, leaf, keep=path in keep, edit=edit.get(path), pins=pins.get(path), cast=bool(edit), seed=seed
                )
                stack.callback(leaf.module.register_forward_pre_hook(before).remove)
                stack.callback(leaf.module.register_forward_hook(after).remove)
            for path, module in self.model.named_modules():
                if widths := _bank_widths(module):
                    stack.callback(module.register_forward_pre_hook(_bank_hook(trace, path, widths), with_kwargs=True).remove)
            trace.result = list(_tensors(self.model(**self.inputs)))
        return trace

    def run_narrow(self, widths: Mapping[str, int], *, pins: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """One forward, as in a converted model: some leaves give zeros of another width, others what is pinned, whatever they get.

        Args:
            widths: leaf -> width of the zeros.
            pins: leaf -> outputs of its calls in turn.

        Returns:
            Every tensor in the model's own output.

        Raises:
            ValueError: another number of rows than the pinned ones reaches a leaf; or whatever the model's code raises.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(self.model)))
            for path, width in widths.items():
                stack.enter_context(_forward_of(self.leaves[path].module, partial(_zeros, width)))
            for path, outputs in pins.items():
                stack.enter_context(_forward_of(self.leaves[path].module, partial(_pinned, [*outputs])))
            return list(_tensors(self.model(**self.inputs)))


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    old = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if old is not None:
            module.forward = old


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros((*x.shape[:-1], width))


def _pinned(outputs: list[Tensor], h: Tensor) -> Tensor:
    y = outputs.pop(0).clone()  # models add the residual in place
    if h.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"rows {tuple(h.shape[:-1])} instead of {tuple(y.shape[:-1])}.")
    return y


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; afterwards each has its own training flag again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def linear_leaves(model: nn.Module) -> dict[str, Leaf]:
    """Every linear leaf of the model by path, those whose weights must not be read included."""
    leaves = {}
    for path, module in model.named_modules():
        shape = _leaf_shape(module)
        if shape is None:
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        problem = not_plain_reason(module)
        if getattr(parent, "base_layer", None) is module:
            problem = f"is inside a {type(parent).__name__} (an adapter: merge it first)"
        leaves[path] = Leaf(module, *shape, problem)
    return leaves


def sampled_rows(num_rows: int) -> Tensor:
    """Indices of the rows that `Call` keeps."""
    return torch.linspace(0, num_rows - 1, min(num_rows, _SAMPLED_ROWS)).round().long()


def _leaf_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """Input width, output width, channel dimension; None if the module is not a linear leaf."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, -1
    if is_transposed(module):
        return weight.shape[0], weight.shape[1], -1
    if type(module).__name__ in PLAIN_LINEAR_CLASSES and weight.dim() == 2:
        return weight.shape[1], weight.shape[0], -1
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and {*module.kernel_size, *module.stride} == {1}:
        return module.in_channels, module.out_channels, 1
    return None


def _leaf_hooks(
    trace: Trace, path: str, leaf: Leaf, *, keep: bool, edit: Edit | None, pins: list[Tensor] | None, cast: bool, seed: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    pinned = iter(pins or ())

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return None
        x = args[0]
        if path not in trace.calls:
            rows = _rows(x, leaf)
            trace.calls[path] = Call(len(trace.calls), _sample(rows), row_keys(rows))
        # an edit may send fp32 through the neurons of a 16-bit model, so that rounding hides no difference
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (x.to(weight.dtype), *args[1:]) if cast and x.dtype != weight.dtype and weight.is_floating_point() else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if path not in trace.calls or not isinstance(output, Tensor):
            return None
        if edit is not None:
            output = edit(output, seed)
        elif pins is not None:
            output = next(pinned, output).clone()
        if keep:
            trace.outputs[path].append(output.clone())  # models add the residual in place
        call = trace.calls[path]
        if call.y_RF is None:
            call.y_RF = _sample(_rows(output, leaf))
        return output

    return before, after


def _bank_hook(trace: Trace, path: str, widths: frozenset[int]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if x is not None and x.is_floating_point() and x.shape[-1] in widths:
            trace.banks.add(path)

    return before


def _bank_widths(module: nn.Module) -> frozenset[int]:
    """Sides of the matrices of a module that holds one matrix per expert, (E, a, b); empty for every other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return frozenset()
    return frozenset(n for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1 for n in p.shape[1:])


def _rows(x: Tensor, leaf: Leaf) -> Tensor:
    return x.movedim(leaf.channel_dim, -1).flatten(0, -2)


def _sample(rows: Tensor) -> Tensor:
    """A copy of some rows: the original may be written over before it is looked at."""
    return rows.index_select(0, sampled_rows(rows.shape[0]).to(rows.device))


def row_keys(rows: Tensor) -> Tensor:
    """Sums of the rows' bits times odd numbers, modulo 2^64: exact, so that a row has the same key in whatever batch it stands."""
    bits = rows.float().contiguous().view(torch.int32).long()
    odd = torch.arange(rows.shape[1], device=rows.device) * 0x5851F42D4C957F2E + 1
    return (bits * odd).sum(dim=1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in a model's output, whatever it nests; caches and other objects are skipped."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
