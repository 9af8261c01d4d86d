"""Where a classifier can be left before its end, and what a head reads there. No names are involved: FFNs tell the blocks.

Letters: B batch, S sequence, D model width, C classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import DataError, UnsupportedModelError
from ..sites import find_ffn_sites
from ..sites.linear import block_paths
from ..sites.probe import eval_mode

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model; ``labels`` are not passed on."""
Token = Literal["first", "mean"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A point of the forward at which the hidden state of every token is known."""

    module: str
    """Path of a block, or of the first linear layer of its FFN."""
    reads: Literal["output", "input"]
    """Which side of the module: what the block gives, or what attention gave to its FFN."""
    d_model: int
    """Width D of the hidden state."""


class Left(Exception):  # noqa: N818 - control flow: nothing after this place is needed
    """Raised by a visitor to end the forward where it stands."""


def find_places(model: nn.Module, batch: Batch, *, half_blocks: bool = False) -> list[Place]:
    """Every place of a classifier, in the order in which they are reached.

    Args:
        model: with a classification head; left as it was.
        batch: keyword arguments of one forward.
        half_blocks: the inputs of FFNs, too. Where the norm comes after attention (BERT) that is the hidden state; where it comes before
            the FFN (ViT), the normalised one.

    Returns:
        Places after blocks, the last included; with ``half_blocks`` two a block.

    Raises:
        UnsupportedModelError: no head, a language model, no FFN, blocks that share their weights, or hidden states that are not (B, S, D).

    Cost: `find_ffn_sites`, and two forwards.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    num_classes(model, inputs)
    sites = find_ffn_sites(model, inputs)
    # An FFN in no element of a list belongs to the head: pooler and classifier have the form of one.
    blocks = [(path, site) for path, site in zip(block_paths(sites), sites, strict=True) if any(p.isdigit() for p in path.split("."))]
    wanted: list[Place] = []
    for path, site in blocks:
        wanted += [Place(module=site.first[0], reads="input", d_model=0)] * half_blocks + [Place(module=path, reads="output", d_model=0)]
    if not wanted:
        raise UnsupportedModelError(f"no FFN of {type(model).__name__} lies in an element of a list, so there are no blocks to exit after.")
    order: list[int] = []
    shapes: dict[int, torch.Size] = {}

    def visit(i: int, hidden: Tensor) -> None:
        order.append(i)
        shapes[i] = hidden.shape

    with torch.no_grad(), eval_mode(model), visited(model, wanted, visit):
        model(**to_device(inputs, model))
    shared = [wanted[i].module for i, count in Counter(order).items() if count > 1]
    if shared or len(set(wanted)) < len(wanted):
        raise UnsupportedModelError(
            f"'{(shared or [wanted[0].module])[0]}' runs several times in a forward; early exit needs separate blocks."
        )
    num_rows = len(next(iter(inputs.values())))
    for i, place in enumerate(wanted):
        if i not in shapes or len(shapes[i]) != 3 or shapes[i][0] != num_rows:
            found = tuple(shapes[i]) if i in shapes else "nothing"
            raise UnsupportedModelError(f"the {place.reads} of '{place.module}' is no hidden state (batch, tokens, width): got {found}.")
    return [replace(wanted[i], d_model=shapes[i][2]) for i in order]


@contextmanager
def visited(model: nn.Module, places: Sequence[Place], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """``visit(number of the place, hidden_BSD)`` whenever a forward comes by one; it may raise `Left`."""

    def leave(i: int, _module: nn.Module, _args: Any, output: Any) -> None:
        visit(i, first_tensor(output))

    def enter(i: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(i, first_tensor(args or tuple(kwargs.values())))

    with ExitStack() as stack:
        for i, place in enumerate(places):
            module = model.get_submodule(place.module)
            if place.reads == "output":
                handle = module.register_forward_hook(partial(leave, i))
            else:
                handle = module.register_forward_pre_hook(partial(enter, i), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def pooled(hidden_BSD: Tensor, mask_BS: Tensor | None, token: Token) -> Tensor:
    """The vector (B, D) that a head reads, fp32: of the first token, or the mean over those that are not padding."""
    if token == "first":
        return hidden_BSD[:, 0].float()
    if mask_BS is None or mask_BS.shape != hidden_BSD.shape[:2]:  # an image has no padding
        return hidden_BSD.float().mean(1)
    weight_BS1 = mask_BS.to(hidden_BSD.device).float()[..., None]
    return (hidden_BSD.float() * weight_BS1).sum(1) / weight_BS1.sum(1).clamp_min(1.0)


def own_token(model: nn.Module, batch: Batch, last: Place) -> Token:
    """How the model's own head pools what its last block gives, seen from where its logits have a gradient.

    Only at the first token, or the first two (class and distillation token): "first"; at most of the tokens: "mean".

    Raises:
        UnsupportedModelError: neither.
        DataError: the example has fewer than four tokens, which tell nothing.
    """
    inputs = {name: value[:1] for name, value in to_device(batch, model).items() if name != "labels"}
    cut: list[Tensor] = []

    def replace_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        cut.append(first_tensor(output).detach().clone().requires_grad_())
        return cut[0] if isinstance(output, Tensor) else type(output)((cut[0], *output[1:]))

    block = model.get_submodule(last.module)
    with torch.enable_grad(), eval_mode(model):
        handle = block.register_forward_hook(replace_output)
        try:
            (grad_1SD,) = torch.autograd.grad(model(**inputs).logits.float().square().sum(), cut)
        finally:
            handle.remove()
    read_S = grad_1SD[0].abs().amax(-1) > 0
    mask_1S = inputs.get("attention_mask")
    if mask_1S is not None and mask_1S.shape == read_S[None].shape:
        read_S = read_S[mask_1S[0].bool()]
    if len(read_S) < 4:
        raise DataError(f"the first example has {len(read_S)} tokens, too few to see how the model's head pools; set token.")
    if read_S[0] and not read_S[2:].any():
        return "first"
    if 2 * int(read_S.sum()) > len(read_S):
        return "mean"
    raise UnsupportedModelError(
        f"the head of {type(model).__name__} reads neither the first token nor all of them (a decoder's reads the last);"
        " set token to choose."
    )


def num_classes(model: nn.Module, inputs: Batch) -> int:
    """C of a classification head.

    Raises:
        UnsupportedModelError: the model gives no logits (B, C).
    """
    with torch.no_grad(), eval_mode(model):
        logits = getattr(model(**to_device(inputs, model)), "logits", None)
    name, num_rows = type(model).__name__, len(next(iter(inputs.values())))
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"{name} gives no logits; early exit is for sequence and image classifiers.")
    if logits.dim() != 2 or len(logits) != num_rows or logits.shape[1] < 2:
        raise UnsupportedModelError(
            f"{name} gives logits {tuple(logits.shape)} for {num_rows} inputs; early exit is for sequence and image classifiers,"
            " whose logits are (batch, classes)."
        )
    return int(logits.shape[1])


def to_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def first_tensor(value: Any) -> Tensor:
    """The hidden state in what a module takes or gives."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value
