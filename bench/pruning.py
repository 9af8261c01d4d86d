"""Structured pruning of FFNs without training: the same neurons leave for every token. The baseline that is always as fast as it is small.

Source: Wang et al. 2024, arXiv:2409.13199 (CFSP): how much each block keeps is `moeify.sparsity.allocation.block_influence`. Which neurons:
the paper's score multiplies weights and activations, but in the released code its bracket of weights is normalised over the axis that it is
averaged over, a constant, so that the ranking is that of ||X_j||, the norm of what the down projection reads from neuron j. That is
"activation" here; "weights" normalises over neurons instead, so that weights count.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeify.errors import UnsupportedModelError
from moeify.sites import FFNSite
from moeify.sparsity.allocation import block_keeps
from moeify.sparsity.blocks import block_influence


@torch.no_grad()
def prune(
    model: nn.Module,
    sites: Sequence[FFNSite],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    keep_frac: float,
    score: Literal["activation", "weights"] = "activation",
) -> "Pruned":
    """Keep the neurons of each FFN that score best, a share of ``keep_frac`` in the mean; smaller matrices, until `Pruned.undo`.

    Raises:
        UnsupportedModelError: an FFN whose projections are not plain linear layers of their own.
    """
    for site in sites:
        if not all(type(model.get_submodule(path)) is nn.Linear for path in (*site.first, site.down)):
            raise UnsupportedModelError(f"'{site.name}' cannot be pruned: its projections are not linear layers of their own.")
    blocks = {site.name: site.name.rpartition(".")[0] for site in sites}
    of_blocks = block_influence(model, list(blocks.values()), batches)
    influence = {name: of_blocks[block] for name, block in blocks.items()}
    keeps = block_keeps(influence, {site.name: float(site.d_ff) for site in sites}, keep_frac=keep_frac)
    norms = _hidden_norms(model, sites, batches)
    pruned = Pruned(model)
    for site in sites:
        scores_F = norms[site.name]
        if score == "weights":
            down_DF = model.get_submodule(site.down).weight.abs() * scores_F
            parts = [_shares(down_DF), *(_shares(model.get_submodule(path).weight.abs().t()) for path in site.first)]
            scores_F = torch.stack([part.mean(0) for part in parts]).sum(0) * scores_F
        kept_K = scores_F.topk(max(1, round(keeps[site.name] * site.d_ff))).indices.sort().values
        pruned.keep(site, kept_K)
    return pruned


class Pruned:
    """A model whose FFNs were made smaller, and what they were."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[nn.Linear, Tensor, Tensor | None]] = []
        self.neurons = [0, 0]
        """Kept, and all."""

    def keep(self, site: FFNSite, kept_K: Tensor) -> None:
        """Leave these neurons of an FFN."""
        for path, by_row in (*((path, True) for path in site.first), (site.down, False)):
            linear: Any = self._model.get_submodule(path)
            self._before.append((linear, linear.weight.data, None if linear.bias is None else linear.bias.data))
            linear.weight.data = (linear.weight.data[kept_K] if by_row else linear.weight.data[:, kept_K]).contiguous()
            if by_row and linear.bias is not None:
                linear.bias.data = linear.bias.data[kept_K]
            self._count(linear)
        self.neurons[0] += len(kept_K)
        self.neurons[1] += site.d_ff

    def undo(self) -> None:
        """Give the model its matrices back."""
        for linear, weight, bias in self._before:
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias
            self._count(linear)

    @staticmethod
    def _count(linear: nn.Linear) -> None:
        linear.out_features, linear.in_features = linear.weight.shape


def _shares(size: Tensor) -> Tensor:
    return size / size.sum(-1, keepdim=True)


def _hidden_norms(model: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """||X_j||_2 over all tokens of what the down projection reads from neuron j, by FFN."""
    squares: dict[str, Tensor] = {}

    def add(_linear: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        squares[name] = squares.get(name, torch.zeros(())) + args[0].flatten(0, -2).double().square().sum(0)

    with _hooked((model.get_submodule(site.down), partial(add, name=site.name)) for site in sites):
        for batch in batches:
            model(**batch)
    return {name: square.sqrt().float() for name, square in squares.items()}


@contextmanager
def _hooked(hooks: Iterator[tuple[nn.Module, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
