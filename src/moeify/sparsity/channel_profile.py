"""What enters the linear layers of a model on calibration data, and how much its loss depends on what they give.

Letters: B batch, S sequence, T tokens, R sampled tokens, K input channels, N outputs, V classes or vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, DataError, UnsupportedModelError
from ..sites import LinearSite, mask_name, token_mask_of
from ..sites.probe import eval_mode
from .channel import ChannelStats


def profile_channels(
    model: nn.Module,
    sites: Sequence[LinearSite],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    rows: int = 1024,
    slopes: bool = False,
    below: Mapping[str, Tensor] | None = None,
    compute: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> dict[str, ChannelStats]:
    """Run the dense model over ``batches`` and keep a sample of every layer's input; with ``slopes`` also differentiate the loss.

    The loss is that of labels drawn from the model's own logits, token by token: its squared slopes have the Fisher matrix as their mean,
    which stands for the Hessian of any loss that the model was trained on, and no labels are needed.

    Args:
        model: put into eval mode for the time of the call; parameters, their gradients and flags are left as they were.
        sites: from `find_linear_sites`.
        batches: keyword arguments of the model; padding is left out where the attention mask fits a layer's tokens.
        rows: tokens in the sample, drawn evenly from all; 2 K bytes each for a layer's input, layers that read the same share it.
        slopes: take `ChannelStats.slope_K`, too.
        below: level_K of every layer by name: slopes are those of the tokens that skip a channel, |x_k| < level_k, each counted x_k^2. A
            channel that fewer than 64 tokens skip has the mean of all. None: that of all for every channel.
        compute: dtype of the model's matrix products (autocast); None leaves the model's own.
        seed: of the sample and of the labels.
        progress: told of every batch.

    Returns:
        The statistics of every site by name.

    Raises:
        ConfigError: no site, no batch, or rows below 1.
        DataError: a layer saw no token, or NaN or infinity.
        UnsupportedModelError: slopes of a model whose output has no logits.

    Cost: a forward of each batch; with slopes a backward as well, of activations alone.
    """
    if not sites or not batches:
        raise ConfigError("no layer to calibrate; find_linear_sites lists them." if not sites else "no batch to calibrate on.")
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, got {rows}.")
    device = next(model.parameters()).device
    watch = _Watch(model, sites, rows=rows, below=below or {}, seed=seed)
    labels_of = torch.Generator(device).manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(watch.attached(slopes=slopes))
        if slopes:
            stack.enter_context(_no_parameter_gradients(model))
        task = stack.enter_context(progress.task("calibrate channels", total=len(batches)))
        for batch in batches:
            watch.batch = {key: value.to(device) for key, value in batch.items()}
            inputs = {key: value for key, value in watch.batch.items() if key != "labels"}
            with torch.set_grad_enabled(slopes):
                with nullcontext() if compute is None else torch.autocast(device.type, dtype=compute):
                    outputs = model(**inputs)
                if slopes:
                    watch.differentiate(_sampled_loss(outputs, watch.batch, labels_of))
            task.advance(1)
    return watch.stats(slopes=slopes)


class _Watch:
    """Hooks that sample inputs and add up squared slopes."""

    def __init__(self, model: nn.Module, sites: Sequence[LinearSite], *, rows: int, below: Mapping[str, Tensor], seed: int) -> None:
        self.batch: dict[str, Tensor] = {}
        self._model, self._sites, self._rows = model, sites, rows
        self._draw = torch.Generator().manual_seed(seed)
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}
        """By the layer that reads first: (random keys, rows); of all tokens those of the smallest keys stay."""
        self._below = below
        self._slopes = {site.name: _SlopeSums(site.d_in) for site in sites}
        self._starts: list[Tensor] = []
        """Inputs of layers that no other layer comes before, in this forward: gradients end there."""

    @contextmanager
    def attached(self, *, slopes: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self._sites:
                linear = self._model.get_submodule(site.name)
                if site.reads == site.name:
                    stack.callback(linear.register_forward_pre_hook(partial(self._sample, site)).remove)
                if slopes:
                    stack.callback(linear.register_forward_pre_hook(partial(self._follow, site)).remove)
            yield

    def _kept(self, site: LinearSite, shape: torch.Size) -> Tensor | None:
        return token_mask_of(self.batch.get(mask_name(self._model, site)), shape)

    def _sample(self, site: LinearSite, _linear: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        keep_T = self._kept(site, x.shape[:-1])
        x_TK = x.reshape(-1, x.shape[-1])
        x_TK = x_TK if keep_T is None else x_TK[keep_T.to(x.device)]
        if not bool(x_TK.isfinite().all()):
            raise DataError(f"the input of '{site.name}' holds NaN or infinity; the weights or the data are damaged.")
        keys_T = torch.rand(len(x_TK), generator=self._draw)
        old_keys, old_rows = self._samples.get(site.name, (keys_T[:0], x_TK[:0].to(torch.bfloat16)))
        new = keys_T.argsort()[: self._rows]
        keys = torch.cat([old_keys, keys_T[new]])
        rows = torch.cat([old_rows, x_TK[new.to(x_TK.device)].to(torch.bfloat16)])
        best = keys.argsort()[: self._rows]
        self._samples[site.name] = keys[best], rows[best.to(rows.device)]

    def _follow(self, site: LinearSite, _linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)  # others read x, too: their slopes are not this layer's
        if own.is_leaf:
            self._starts.append(own)
        keep_T = self._kept(site, x.shape[:-1])

        def add(grad: Tensor) -> None:
            grad_TK, size_TK = (t.detach().reshape(-1, t.shape[-1]).float() for t in (grad, x))
            if keep_T is not None:
                kept = keep_T.to(grad_TK.device)
                grad_TK, size_TK = grad_TK[kept], size_TK[kept]
            self._slopes[site.name].add(grad_TK.square(), size_TK, self._below.get(site.name))

        own.register_hook(add)
        return (own, *args[1:])

    def differentiate(self, loss: Tensor) -> None:
        """Backward from ``loss`` to every layer's input that it depends on."""
        if loss.requires_grad:
            torch.autograd.grad(loss, self._starts, allow_unused=True)
        self._starts.clear()

    def stats(self, *, slopes: bool) -> dict[str, ChannelStats]:
        found = {}
        for site in self._sites:
            keys, rows_RK = self._samples.get(site.reads, (None, None))
            if keys is None or not len(keys):
                raise DataError(f"no token reached '{site.reads}'; give more calibration data.")
            stats = ChannelStats(rows_RK=cast(Tensor, rows_RK))
            if slopes:
                sums = self._slopes[site.name]
                if not sums.tokens:
                    raise DataError(f"the loss does not depend on '{site.name}', so it has no slope; use another score, or leave it out.")
                stats = replace(stats, slope_K=sums.slope_K().float().to(stats.rows_RK.device))
            found[site.name] = stats
        return found


class _SlopeSums:
    """Adds up squared slopes of one layer."""

    _FEWEST = 64

    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self._all_K, self._skipped_K, self._weight_K, self._number_K = torch.zeros(4, channels, dtype=torch.float64)

    def add(self, square_TK: Tensor, x_TK: Tensor, level_K: Tensor | None) -> None:
        """Squared slopes of some tokens, and what the layer reads from them."""
        self.tokens += len(square_TK)
        self._all_K += square_TK.sum(0).cpu()
        if level_K is not None:
            skipped_TK = x_TK.abs() < level_K.to(x_TK.device)
            weight_TK = x_TK.square() * skipped_TK
            self._number_K += skipped_TK.sum(0).cpu()
            self._weight_K += weight_TK.sum(0).cpu()
            self._skipped_K += weight_TK.mul_(square_TK).sum(0).cpu()

    def slope_K(self) -> Tensor:
        """Root of the mean."""
        enough_K = (self._number_K >= self._FEWEST) & (self._weight_K > 0)
        return torch.where(enough_K, self._skipped_K / self._weight_K, self._all_K / self.tokens).sqrt()


def _sampled_loss(outputs: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Sum over tokens (or sequences) of the loss of labels drawn from the logits."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError("the sensitivity score needs a model with a head (its output has no logits); use another score.")
    logits_TV = logits.reshape(-1, logits.shape[-1]).float()
    mask_BS = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    keep_T = token_mask_of(mask_BS, logits.shape[:-1])
    if keep_T is not None:
        logits_TV = logits_TV[keep_T.to(logits_TV.device)]
    labels_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """No gradient goes to a parameter within the block: `_Watch` starts its own where the first layers are."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
