"""Where the tokens of the forward in flight stand in their sequences, for layers that treat the first ones apart.

Letters: B batch, S tokens of the forward.

A linear layer sees (B, S, K) and not whether these are the first S tokens. The model does: it is told positions, or has a cache that holds
what came before. Backward passes that run layers again (gradient checkpointing) find what their forward knew.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_moeify_positions"


class Positions:
    """Watches the forwards of one model, in each thread its own; also of the models within it, which may be called alone."""

    def __init__(self, model: nn.Module) -> None:
        self._now: dict[int, list[tuple[nn.Module, _Forward | None]]] = {}
        self._again: _Forward | None = None
        for module in model.modules():
            if module is model or _is_watched(type(module)):
                # no handles: that of a hook with keywords cannot be copied
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, always_call=True)

    @classmethod
    def of(cls, model: nn.Module) -> "Positions | None":
        """The one of ``model``, made at the first call; None where its forward knows neither positions nor a cache."""
        known = inspect.signature(model.forward).parameters
        if "position_ids" not in known and "past_key_values" not in known:
            return None
        if _ATTRIBUTE not in model.__dict__:
            model.__dict__[_ATTRIBUTE] = cls(model)
        found: Positions = model.__dict__[_ATTRIBUTE]
        return found

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Watch ``model`` no more."""
        if (old := model.__dict__.pop(_ATTRIBUTE, None)) is None:
            return
        for module in model.modules():
            tables = (
                (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
                (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            )
            for hooks, notes in tables:
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is old]:
                    for table in (hooks, *notes):
                        table.pop(key, None)

    def start(self, num_tokens: int, first: int) -> "int | Tensor":
        """Which of the forward's S = ``num_tokens`` stand at the first ``first`` positions of their sequence: so many at the beginning of
        every row, or a mask (B, S) or (1, S). Where nothing is known, as in compiled code, the forward is taken for one of whole sequences.
        """
        if torch.compiler.is_compiling():
            return first
        stack = self._now.get(threading.get_ident())
        now = stack[-1][1] if stack else self._again
        return first if now is None else now.start(num_tokens, first)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._now.setdefault(threading.get_ident(), [])
        # An interrupt (no Exception) leaves forwards behind that have ended.
        del stack[next((i for i, (other, _) in enumerate(stack) if other is module), len(stack)) :]
        stack.append((module, _forward_of(dict(zip(_names(type(module).forward), args, strict=False)) | kwargs)))

    def _leave(self, module: nn.Module, _args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._now.get(threading.get_ident())
        if not stack or stack[-1][0] is not module:  # a hook before ours has failed
            return
        _, now = stack.pop()
        if not stack:
            del self._now[threading.get_ident()]
        if torch.is_grad_enabled():
            # Checkpointing runs layers again while gradients flow back from here, maybe in a thread of autograd's.
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(partial(self._recall, now))

    def _recall(self, forward: "_Forward | None", _grad: Tensor) -> None:
        self._again = forward
        torch.autograd.Variable._execution_engine.queue_callback(self._forget)

    def _forget(self) -> None:
        self._again = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": {}, "_again": None}  # of this process' threads


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Parameters of a class' forward, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _is_watched(kind: type[nn.Module]) -> bool:
    """Whether modules of a class read tokens and are told where these stand."""
    names = _names(kind.forward)
    return ("input_ids" in names or "inputs_embeds" in names) and ("position_ids" in names or "past_key_values" in names)


def _forward_of(given: Mapping[str, Any]) -> "_Forward | None":
    """What is known of a forward with these arguments."""
    tokens = next((t for name in ("input_ids", "inputs_embeds") if isinstance(t := given.get(name), Tensor)), None)
    if tokens is None:  # some family's own name, in front
        tokens = next((t for t in given.values() if isinstance(t, Tensor)), None)
    if tokens is None or tokens.dim() < 2 or tokens.shape[1] == 1:
        return None  # a layer that gets one token does not ask
    positions, before = given.get("position_ids"), given.get("past_key_values")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return _Forward(positions)
    if before is not None and hasattr(before, "get_seq_length"):
        return _Forward(int(before.get_seq_length()))
    return None


def _tensors(output: object) -> Iterator[Tensor]:
    """Of what a model returns: a tensor, or fields or a tuple of such; not of caches."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


class _Forward:
    """Positions (B, S) or (1, S), or how many tokens came before."""

    def __init__(self, known: "Tensor | int") -> None:
        self._known = known
        self._starts: dict[int, int | Tensor] = {}

    def start(self, num_tokens: int, first: int) -> "int | Tensor":
        if isinstance(self._known, int):
            return max(0, first - self._known)
        if self._known.shape[1] != num_tokens:  # a part of the model that reads something else
            return first
        if first not in self._starts:
            self._starts[first] = self._find(self._known < first)
        return self._starts[first]

    @staticmethod
    def _find(mask_BS: Tensor) -> "int | Tensor":
        # one sync a forward, not one a layer; in the plain cases a slice is cheaper than a mask
        count_B = mask_BS.sum(1).tolist()
        if min(count_B) == max(count_B) and bool(mask_BS[:, : count_B[0]].all()):
            return int(count_B[0])
        return mask_BS
