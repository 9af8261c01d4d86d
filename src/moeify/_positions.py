"""Where the tokens of the forward in flight stand in their sequences, for layers that treat the first ones apart.

Letters: B batch, S tokens of the forward.

A linear layer sees (B, S, K) and not whether these are the first S tokens. The model does: it is told positions, or has a cache that holds
what came before.
"""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_moeify_positions"


class Positions:
    """Watches the forwards of one model, in each thread its own."""

    def __init__(self, model: nn.Module) -> None:
        self._now: dict[int, _Forward] = {}
        # no handles: that of a hook with keywords cannot be copied
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

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
        tables = (
            (model._forward_pre_hooks, (model._forward_pre_hooks_with_kwargs,)),
            (model._forward_hooks, (model._forward_hooks_with_kwargs, model._forward_hooks_always_called)),
        )
        for hooks, notes in tables:
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is old]:
                for table in (hooks, *notes):
                    table.pop(key, None)

    def start(self, num_tokens: int, first: int) -> "int | Tensor":
        """Which of the forward's S = ``num_tokens`` stand at the first ``first`` positions of their sequence: so many at the beginning of
        every row, or a mask (B, S) or (1, S). Where nothing is known the forward is taken for one of whole sequences.
        """
        now = None if torch.compiler.is_compiling() else self._now.get(threading.get_ident())
        return first if now is None else now.start(num_tokens, first)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._now.pop(threading.get_ident(), None)
        tokens = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if isinstance(t, Tensor)), None)
        if tokens is None or tokens.dim() < 2 or tokens.shape[1] == 1:
            return  # a layer that gets one token does not ask
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            self._now[threading.get_ident()] = _Forward(positions)
        elif cache is not None and hasattr(cache, "get_seq_length"):
            self._now[threading.get_ident()] = _Forward(int(cache.get_seq_length()))

    def _leave(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._now.pop(threading.get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": {}}  # of this process' threads


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
