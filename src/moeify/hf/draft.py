"""A checkpoint as its own draft: the same weights under other selection rules, as a second model object that costs no memory."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..channels import sparse_inputs
from ..controls import set_mode, set_rule, with_modes
from ..errors import UnsupportedModelError
from ..layers import moe_layers
from ..select import Rule

M = TypeVar("M", bound=nn.Module)

_OF_ONE_MODEL = ("_compiled_call", "_compiled_call_impl")
"""What transformers and torch keep of a compiled forward: it would run the model that it was made from."""


def self_draft(model: M, draft: Rule | Mapping[str, Rule] | str) -> M:
    """A view of ``model`` that runs with other rules: its own drafter for speculative decoding.

    The view has modules of its own and the very parameters and buffers of ``model``, so it takes no memory beside Python objects, and both
    may run at the same time, in any threads: no rule is switched. It is in eval mode and skips what its rules skip, even where ``model``
    runs dense. Give it to `Speculation`, or to ``model.generate(..., assistant_model=...)``.

    Made for the model as it is: adapters that are added, modules that are replaced and moves to another device afterwards need a new view.

    Args:
        model: converted or thinned model; left as it is.
        draft: what `set_rule` takes: one rule, rules by layer, or the name of a preset. The cheaper, the more tokens can be drafted; the
            nearer to the model's own, the more of them stay.

    Returns:
        A model of the same class.

    Raises:
        UnsupportedModelError: the model is dense, or its weights are not in memory (offloaded, meta).
        ConfigError: as `set_rule`.
    """
    if not with_modes(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} is dense and has no rules to draft with; convert it (moeify convert) or thin it (moeify thin)."
        )
    if name := next((name for name, tensor in model.named_parameters() if tensor.is_meta), None):
        raise UnsupportedModelError(
            f"'{name}' is not in memory (offloaded or never loaded), so a draft cannot share it; load the model whole."
        )
    view = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in view.modules():
        for name in _OF_ONE_MODEL:
            module.__dict__.pop(name, None)
    for moe in moe_layers(view).values():
        moe.recorder = moe.selector = moe.dispatch = None
        moe.is_taught = False
        moe._calls = {}  # of forwards of ``model`` that are in flight
    for executor in sparse_inputs(view).values():
        executor.recorder = None
    set_mode(view, "moe")
    set_rule(view, draft)
    return view.eval()


def check_draft(draft: Any, model: nn.Module) -> None:
    """Refuse a draft that was not made from ``model`` as it is now.

    Raises:
        UnsupportedModelError: some parameter is not the same object in both.
    """
    ours, theirs = dict(model.named_parameters()), dict(draft.named_parameters())
    if ours.keys() != theirs.keys() or any(ours[name] is not theirs[name] for name in ours):
        raise UnsupportedModelError(
            f"the draft is of another {type(draft).__name__}, or the model has changed since; make it again: self_draft(model, ...)."
        )
