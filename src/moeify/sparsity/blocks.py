"""The blocks of a model run alone, on what entered them in one forward of the whole.

Letters: B batch, S sequence, D model width.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..sites.probe import eval_mode

_NO_BLOCK = "'{}' is not run as one module from hidden states to hidden states; use allocate='uniform' or 'shared'."
_SEQUENCES, _POSITIONS = 2, 128
"""Of the batch that are kept: every measurement runs a block on them, and a search makes thousands."""


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


class BlockCalls:
    """What enters and leaves each block of a model; the model runs when the first question comes.

    Args:
        model: runs in eval mode, without a cache.
        names: module paths of the blocks.
        batch: keyword arguments of the model; of texts the first positions of a few sequences are used.
        compute: dtype of matrix products (autocast); None leaves the model's own.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batch: Mapping[str, Tensor], *, compute: torch.dtype | None = None) -> None:
        self._model, self._names, self._compute = model, list(dict.fromkeys(names)), compute
        self._batch = {key: value[:_SEQUENCES] for key, value in batch.items() if key != "labels"}
        if "input_ids" in batch and all(value.dim() == 2 for value in self._batch.values()):
            self._batch = {key: value[:, :_POSITIONS] for key, value in self._batch.items()}
        self._calls: dict[str, _Call] = {}
        self._entered: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def error(self, name: str) -> float:
        """Squared distance of what a block gives now from what it gave when it was watched.

        Raises:
            UnsupportedModelError: the block is not run as one module, or gives nothing of its input's shape.
        """
        call = self._call(name)
        return (self._run(name, call).float() - call.output.float()).square().sum().item()

    @torch.no_grad()
    def _run(self, name: str, call: _Call) -> Tensor:
        kwargs = dict(zip(call.kwargs, _copied(tuple(call.kwargs.values())), strict=True))
        with eval_mode(self._model), self._autocast():
            return hidden_of(self._model.get_submodule(name)(*_copied(call.args), **kwargs))

    def _call(self, name: str) -> _Call:
        if not self._calls:
            self._watch()
        if name not in self._calls:
            raise UnsupportedModelError(_NO_BLOCK.format(name))
        return self._calls[name]

    @torch.no_grad()
    def _watch(self) -> None:
        device = next(self._model.parameters()).device
        config = getattr(self._model, "config", None)
        cache = getattr(config, "use_cache", None)
        with ExitStack() as stack:
            if cache:  # a cache would grow with every call of a block
                stack.callback(setattr, config, "use_cache", cache)
                cast(Any, config).use_cache = False
            stack.enter_context(eval_mode(self._model))
            for name in self._names:
                block = self._model.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(partial(self._leave, name)).remove)
            stack.enter_context(self._autocast())
            self._model(**{key: value.to(device) for key, value in self._batch.items()})

    def _enter(self, name: str, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered[name] = _copied(args), dict(zip(kwargs, _copied(tuple(kwargs.values())), strict=True))

    def _leave(self, name: str, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        after, (args, kwargs) = hidden_of(output), self._entered.pop(name)
        before = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape == after.shape), None)
        if before is not None and name not in self._calls:
            self._calls[name] = _Call(args, kwargs, after.clone())

    def _autocast(self) -> Any:
        device = next(self._model.parameters()).device.type
        return nullcontext() if self._compute is None else torch.autocast(device, dtype=self._compute)


@torch.no_grad()
def block_influence(
    model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]], *, compute: torch.dtype | None = None
) -> dict[str, float]:
    """Mean angle between each block's input and output over pi, over all tokens: arccos(cos(h_in, h_out)) / pi, in [0, 1]; by name.

    Args:
        model: runs in eval mode.
        names: module paths of the blocks.
        batches: keyword arguments of the model; padding counts.
        compute: dtype of matrix products (autocast); None leaves the model's own.

    Raises:
        UnsupportedModelError: a block is not run as one module from hidden states to hidden states.
    """
    device = next(model.parameters()).device
    entered: dict[str, list[Tensor]] = {}
    sums = dict.fromkeys(names, 0.0)
    tokens = dict.fromkeys(names, 0)

    def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        entered[name] = [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]

    def leave(_block: nn.Module, _args: tuple[Any, ...], output: Any, name: str) -> None:
        after = hidden_of(output)
        before = next((value for value in entered.pop(name) if value.shape == after.shape), None)
        if before is not None:
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[name] += cosine.clamp(-1, 1).acos().sum().item() / math.pi
            tokens[name] += cosine.numel()

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for name in sums:
            block = model.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(partial(enter, name=name), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(leave, name=name)).remove)
        if compute is not None:
            stack.enter_context(torch.autocast(device.type, dtype=compute))
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    if missing := next((name for name in sums if not tokens[name]), None):
        raise UnsupportedModelError(_NO_BLOCK.format(missing))
    return {name: sums[name] / tokens[name] for name in sums}


def _copied(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors as copies: a block may add to its input in place."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block gives: itself, or what it begins with."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
