"""Changes of a dense model's weights that leave its function alone and suit skipped channels better, applied before calibration."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._config import lookup
from ..errors import UnsupportedModelError
from ..sites import LinearSite
from ..sites.probe import eval_mode
from .rotation import rotate, tying_configs

Transform = Callable[[nn.Module, Mapping[str, Any], Sequence[LinearSite]], None]
"""(model in fp32 or better, example_inputs, all its linear layers) -> None. It gives parameters other data, never writes into the old."""

TRANSFORMS: dict[str, Transform | None] = {
    "none": None,
    "orthogonal": rotate,
}
"""Transforms by the name that configs store; a new one joins by a function and a line here."""

MOST_ERROR = 1e-4
"""Largest change of a logit in fp32, relative to the largest logit, that passes for rounding."""


@contextmanager
def transformed(model: nn.Module, name: str, example_inputs: Mapping[str, Any], sites: Sequence[LinearSite]) -> Iterator[None]:
    """Transform the weights, in place, for good if the block ends; whatever fails, here or in the block, the model is as before.

    Weights of 16 bits are transformed in fp32, where the logits are compared, and rounded afterwards.

    Args:
        model: dense model whose output has logits.
        name: key of `TRANSFORMS`.
        example_inputs: keyword arguments of one forward in which every part of the model runs.
        sites: all of `find_linear_sites`.

    Raises:
        ConfigError: unknown name.
        UnsupportedModelError: as the transform; or the output has no logits, or they changed by more than `MOST_ERROR`.

    Cost: the transform's, two forwards, and a second copy of the weights until the block ends.
    """
    transform = lookup(TRANSFORMS, name, where="transform")
    if transform is None:
        yield
        return
    before = _Before(model)
    try:
        before.in_fp32()
        wanted = _logits(model, example_inputs)
        transform(model, example_inputs, sites)
        error = float((_logits(model, example_inputs) - wanted).abs().max() / wanted.abs().max())
        if not error <= MOST_ERROR:
            raise UnsupportedModelError(
                f"transform='{name}' changes the logits of this {type(model).__name__} by {error:.1g} of the largest (at most "
                f"{MOST_ERROR:g} is rounding): something between its linear layers depends on the channels as they are; "
                "use transform='none'."
            )
        before.give_dtypes()
        yield
    except BaseException:  # Ctrl-C, too
        before.restore()
        raise


class _Before:
    """A model's parameters, buffers and tied head as they are now; the tensors are kept, not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        owners: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
        self._slots = [(own, name, tensor, tensor.data) for own in owners for name, tensor in own.items() if tensor is not None]
        self._tied = [(config, config.tie_word_embeddings) for config in tying_configs(model)]
        self._tied_keys = getattr(model, "all_tied_weights_keys", None)

    def in_fp32(self) -> None:
        """Give what has 16 bits fp32 data."""
        for _, _, tensor, data in self._slots:
            if data.dtype in (torch.bfloat16, torch.float16):
                tensor.data = data.float()

    def give_dtypes(self) -> None:
        """Round what is there now to the dtypes from before."""
        for own, name, _, data in self._slots:
            own[name].data = own[name].data.to(data.dtype)

    def restore(self) -> None:
        """Everything as it was."""
        for own, name, tensor, data in self._slots:
            tensor.data = data
            own[name] = tensor
        for config, tied in self._tied:
            config.tie_word_embeddings = tied
        if self._tied_keys is not None:
            cast(Any, self._model).all_tied_weights_keys = self._tied_keys


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with eval_mode(model):
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            "a transform of the weights is checked by the logits, which this model's output has not; load it with a head."
        )
    return logits.double()
