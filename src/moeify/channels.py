"""The executor of training-free channel sparsity: linear layers that skip the input channels which matter little to a token.

Letters: B batch, S sequence, T tokens, K input channels, N outputs.

A `SparseInput` is a child named ``channels`` of the linear layer. It owns one buffer, ``level_K``; weight and bias stay where they are, so
that a checkpoint is a dense one with a few more numbers. What changes is the ``forward`` of that one instance:

    y = (x * keep) W^T + b,    keep_tk = rule(|x_tk| / level_k)

With the rule ``Threshold(theta=1)`` that is one comparison for each channel: |x_tk| >= level_k.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import ConfigError, UnsupportedModelError
from .select import Rule, Threshold
from .sites import LinearSite

CHILD = "channels"
"""Name of the executor in its layer."""
AT_LEVEL = Threshold(theta=1.0)
"""The rule that keeps what reaches its level."""


class SparseInput(nn.Module):
    """Skips input channels of one linear layer, or leaves it dense.

    Args:
        site: the layer.
        rule: selection rule on ``|x| / level``. `AT_LEVEL`, the default, keeps exactly the channels that reach their level, which may be
            none; any other keeps at least one.
        first_dense: positions at the start of each sequence that keep all channels, where the layer reads (B, S, K) with S > 1: the first
            tokens of a text have activations and consequences of their own. Padding on the left counts as positions; a forward of one
            token (decoding) is never the start.

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
        self.recorder: ChannelRecorder | None = None
        self.register_buffer("level_K", torch.zeros(site.d_in, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"{self.site.name!r}, {self.site.role}, {self.rule}, mode={self.mode!r}"

    def select(self, x: Tensor) -> Tensor:
        """Which channels of ``x`` (..., K) are kept; recorded if a recorder listens."""
        size = x.detach().abs().float()
        if self.rule == AT_LEVEL:
            keep = size >= self.level_K
        else:
            ratio = torch.where(self.level_K > 0, size / self.level_K, math.inf)
            keep = self.rule(ratio.reshape(-1, x.shape[-1])).view(x.shape)
        if self.first_dense and x.dim() == 3 and x.shape[1] > 1:
            keep[:, : self.first_dense] = True
        if self.recorder is not None:
            self.recorder.add(self.site, keep)
        return keep

    def _forward(self, linear: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "moe":
            x = torch.where(self.select(x), x, 0)
        return cast(Tensor, type(linear).forward(linear, x))


class ChannelRecorder:
    """Counts kept (token, channel) pairs of each layer, on the device, no host sync until asked; padding counts."""

    def __init__(self) -> None:
        self._kept: dict[LinearSite, Tensor] = {}
        self._all: dict[LinearSite, int] = {}

    def add(self, site: LinearSite, keep: Tensor) -> None:
        """Count one forward of one layer."""
        self._kept[site] = self._kept.get(site, 0) + keep.sum()
        self._all[site] = self._all.get(site, 0) + keep.numel()

    def per_layer(self) -> dict[str, float]:
        """Share of skipped channels of each layer that ran, in [0, 1]; by the layer's name."""
        return {site.name: 1 - int(kept) / self._all[site] for site, kept in self._kept.items()}

    def skipped_frac(self) -> float:
        """Share of the parameters whose channel was skipped, over all layers and tokens, in [0, 1].

        Raises:
            ValueError: no sparse layer ran.
        """
        shares = self.per_layer()
        if not shares:
            raise ValueError("no sparse layer ran while recording; is the model in dense mode?")
        costs = {site.name: site.d_in * site.d_out for site in self._kept}
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
    linear.add_module(CHILD, executor)
    linear.forward = partial(executor._forward, linear)


def detach_channels(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Remove the executors of the named layers, of all by default; the layers are what they were."""
    names = set(sparse_inputs(model) if names is None else names)
    for linear in [m for m in model.modules() if isinstance(e := m._modules.get(CHILD), SparseInput) and e.site.name in names]:
        del linear._modules[CHILD]
        if "_old_forward" in linear.__dict__:  # accelerate has put its hook around ours, and keeps it
            linear.__dict__["_old_forward"] = MethodType(type(linear).forward, linear)
        else:
            linear.__dict__.pop("forward", None)


def sparse_inputs(model: nn.Module) -> dict[str, SparseInput]:
    """The executors of a model by the layer's name, in module order."""
    return {m.site.name: m for m in model.modules() if isinstance(m, SparseInput)}


@contextmanager
def record_channels(model: nn.Module) -> Iterator[ChannelRecorder]:
    """Count what the sparse layers of ``model`` skip within the block."""
    recorder = ChannelRecorder()
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
