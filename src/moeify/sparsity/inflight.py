"""What hooks that inject gradients must know of the forward and backward pass in flight: its padding, and what multiplies its loss.

A gradient that is added inside the model stands for a term beside the loss. What multiplies the loss before ``backward`` (a gradient
scaler, 1 / accumulation steps, a share of tokens) must multiply the term. That factor is read from where it can be seen: the gradient that
arrives at the loss, the first thing a backward pass computes.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SHIFTED = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
"""Loss types of transformers models of which Trainer counts the labels from the second on."""


R = TypeVar("R", bound="Removable")


class Removable(ABC):
    """What hangs on a model until it is removed, or its ``with`` block ends."""

    @abstractmethod
    def remove(self) -> None:
        """Take it off."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class InFlight:
    """Hooks of a model, `begin` before its forward and `end` after it, and what they find."""

    def __init__(self, model: nn.Module) -> None:
        # Tensors, so that compiled code reads them.
        device = next(model.parameters()).device
        self.scale = torch.ones((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        """Factor that multiplies the loss in this backward pass."""
        self.masks: dict[str, Tensor | None] = {"attention_mask": None, "decoder_attention_mask": None}
        self.inputs: dict[str, Any] = {}
        """Arguments of the forward by name, while it runs and outside of compiled code."""
        is_seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._first_label = int(getattr(model, "loss_type", None) in _SHIFTED and not is_seq2seq)
        self._names = list(inspect.signature(model.forward).parameters)
        self.share: Tensor | None = None
        """What the forward's labels are of all that its loss is divided by; None: it is their mean."""
        self._followed: RemovableHandle | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: remember padding. It stays after the forward, because checkpointed layers run again."""
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        for name in self.masks:
            mask = inputs.get(name)
            self.masks[name] = mask if isinstance(mask, Tensor) else None
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._followed = None
        self.inputs = inputs
        device = next(model.parameters()).device
        if self.scale.device != device:
            self.scale = self.scale.to(device)
        total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
        # The loss is then a sum over this micro-batch's labels, divided by the number of all micro-batches' labels.
        given = total is not None and isinstance(labels, Tensor)
        self.share = (labels[..., self._first_label :] != -100).sum() / total if given and labels is not None else None

    def end(self, _model: nn.Module, _args: tuple[Any, ...], outputs: Any) -> None:
        """Hook of the model: follow its loss."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.inputs = {}
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        self.scale.data.fill_(1)
        if isinstance(loss, Tensor) and loss.requires_grad:
            self.follow(loss, share=self.share)

    def follow(self, loss: Tensor, *, share: Tensor | None = None) -> None:
        """Take the factor from this loss, times ``share``, in place of the one before."""
        if self._followed is not None:
            self._followed.remove()
        self._followed = loss.register_hook(partial(self._set_scale, share=share))

    def _set_scale(self, grad: Tensor, *, share: Tensor | None) -> None:
        value = grad.detach() if share is None else grad.detach() * share
        self.scale.data.copy_(value)  # .data: compiled code has saved this very tensor for its backward, and is to find it changed


@torch.library.custom_op("moeify::read_scale", mutates_args=())
def read_scale(scale: Tensor, grad: Tensor) -> Tensor:
    """The factor as it is now: needs ``grad``, so that no compiler reads it before the backward pass that sets it."""
    return scale.clone()


@read_scale.register_fake
def _(scale: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(scale)
