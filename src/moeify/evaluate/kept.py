"""Where a thinned model computes: kept input channels by part of each block, and what each token costs there.

The counterpart of `executed_experts` and `token_costs`, with the same results, so that the same pictures and pages show them. A part is the
attention or the FFN of one block; its layers count by their parameters, as in `ChannelRecorder.skipped_frac`.

Letters: B batch, S sequence, T tokens, K input channels.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..channels import ChannelRecorder, SparseInput, record_channels, sparse_inputs
from ..controls import set_rule
from ..errors import ConfigError, DataError
from ..select import Rule
from ..sites import LinearSite, token_mask_of
from .analysis import Distribution, ExecutedExperts, TokenCosts, patch_grid, positions, sparse_mode
from .quality import Batch, run_batch

_MOST_COUNTS = 1 << 20  # of one histogram; finer shares are rounded to these


class _TokenRecorder(ChannelRecorder):
    """Kept parameters of every token of every part, of one forward; the layers of a part are added up."""

    def __init__(self, sites: Mapping[str, LinearSite]) -> None:
        super().__init__()
        self.part_of = {name: _part(site) for name, site in sites.items()}
        self.clear()

    def clear(self) -> None:
        """Forget the forward."""
        self.kept: dict[str, Tensor] = {}
        self.all: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.masks: dict[str, Tensor | None] = {}

    def add(self, site: LinearSite, keep: Tensor) -> None:
        part, shape = self.part_of[site.name], tuple(keep.shape[:-1])
        if self.shapes.setdefault(part, shape) != shape:
            raise ConfigError(f"the layers of '{part}' see different positions in one forward; its tokens have no cost each.")
        kept_T = keep.sum(-1).flatten() * site.d_out
        self.kept[part] = self.kept[part] + kept_T if part in self.kept else kept_T
        self.all[part] = self.all.get(part, 0) + site.d_in * site.d_out
        self.masks[part] = token_mask_of(self.token_masks.get(site.name), keep.shape[:-1])


class _Counts:
    """How many tokens keep n parameters of a part, for every n that its layers can make."""

    def __init__(self, recorder: _TokenRecorder, sites: Mapping[str, LinearSite]) -> None:
        self.recorder = recorder
        self.step = {
            part: math.gcd(*(s.d_out for n, s in sites.items() if recorder.part_of[n] == part)) for part in recorder.part_of.values()
        }
        self.tokens_F1: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}

    def add(self) -> None:
        """Count the forward that the recorder has, and forget it there."""
        for part, kept_T in self.recorder.kept.items():
            total = self.recorder.all[part] // self.step[part]
            most = min(total, _MOST_COUNTS)
            count_T = (kept_T // self.step[part]).to(torch.float64).mul(most / total).round().long()
            if part not in self.tokens_F1:
                self.tokens_F1[part] = torch.zeros(most + 1, dtype=torch.int64, device=kept_T.device)
                self.sizes[part] = total
            elif self.sizes[part] != total:
                raise ConfigError(f"other layers of '{part}' ran in one forward than in another; their shares are not comparable.")
            mask_T = self.recorder.masks[part]
            self.tokens_F1[part].index_add_(0, count_T, torch.ones_like(count_T) if mask_T is None else mask_T.to(count_T))
        self.recorder.clear()

    def distributions(self) -> dict[str, Distribution]:
        """By part; those that no token reached are left out, with one warning that names them."""
        found = {part: tokens_F1.cpu() for part, tokens_F1 in self.tokens_F1.items()}
        empty = [part for part, tokens_F1 in found.items() if not tokens_F1.any()]
        if len(empty) == len(found):
            raise DataError("no token reached a layer that skips channels: there is no batch, or nothing but padding.")
        if empty:
            warnings.warn(f"no token reached {', '.join(empty)}; it is left out.", stacklevel=3)
        return {part: Distribution.of_counts(tokens_F1) for part, tokens_F1 in found.items() if part not in empty}


@torch.no_grad()
def kept_channels(
    model: nn.Module,
    batches: Sequence[Batch],
    rules: Mapping[str, Rule | Mapping[str, Rule]] | None = None,
    *,
    progress: Progress = NO_PROGRESS,
) -> ExecutedExperts:
    """What share of its input channels a token keeps in the attention and in the FFN of each block, by setting of the rules; channels weigh
    as many parameters as they have.

    Args:
        model: a thinned model; rules, modes and recorders are restored, also after an error.
        batches: inputs, in memory; re-used for every setting. Padding is left out as `record_channels` does.
        rules: settings by label: a rule for all layers, or rules by layer; a layer that is not named keeps its own. None: one setting, "as
            it is".
        progress: told the number of batches of all settings.

    Returns:
        A distribution for each setting and part, named ``<block>: attention`` and ``<block>: FFN``.

    Raises:
        ConfigError: the model skips no channel, no setting, or a name that is none of its layers.
        DataError: no batch, or only padding.

    Cost: one forward per batch and setting.
    """
    executors = _executors(model)
    if not batches:
        raise DataError("there is no batch to run.")
    settings: Mapping[str, Rule | Mapping[str, Rule]] = {"as it is": {}} if rules is None else rules
    if not settings:
        raise ConfigError("there is no rule to run with; give at least one, or None for those of the model.")
    sites = {name: executor.site for name, executor in executors.items()}
    found = {}
    with sparse_mode(model), progress.task("kept channels", total=len(settings) * len(batches)) as task:
        own = {name: executor.rule for name, executor in executors.items()}
        for label, rule in settings.items():
            set_rule(model, {**own, **rule} if isinstance(rule, Mapping) else rule)
            recorder = _TokenRecorder(sites)
            counts = _Counts(recorder, sites)
            with record_channels(model, recorder):
                for batch in batches:
                    run_batch(model, batch)
                    counts.add()
                    task.advance(1)
            found[label] = counts.distributions()
    return ExecutedExperts(settings=found)


@torch.no_grad()
def channel_costs(model: nn.Module, batch: Batch) -> TokenCosts:
    """What each token, or patch of an image, costs in the layers that skip channels, with the model's present rules.

    FLOPs of a token in a part: 2 * sum over its layers of kept channels * outputs.

    Args:
        model: a thinned model; its modes and recorders are restored, also after an error.
        batch: inputs; padding, where a mask of the tokens' shape tells it, costs NaN.

    Returns:
        Costs by part (as `kept_channels` names them), sequence and position; no routers.

    Raises:
        ConfigError: the model skips no channel, or its layers see different positions (encoder and decoder, stages that pool).

    Cost: one forward.
    """
    recorder = _TokenRecorder({name: executor.site for name, executor in _executors(model).items()})
    with sparse_mode(model), record_channels(model, recorder):
        run_batch(model, batch)
    num_sequences = len(next(value for name, value in batch.items() if name != "labels"))
    shapes = {part: positions(shape, num_sequences) for part, shape in recorder.shapes.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"'{part}' {shape}" for part, shape in {shape: (part, shape) for part, shape in shapes.items()}.values())
        raise ConfigError(f"the layers see different positions: {found}; their tokens have no cost each.")
    shape_BS = next(iter(shapes.values()))
    flops = []
    for part, kept_T in recorder.kept.items():
        flops_T, mask_T = 2 * kept_T.double(), recorder.masks[part]
        flops.append((flops_T if mask_T is None else flops_T.masked_fill(~mask_T.to(flops_T.device), math.nan)).cpu().reshape(shape_BS))
    return TokenCosts(
        layers=tuple(recorder.kept),
        flops_LBS=torch.stack(flops),
        dense_flops=tuple(2.0 * recorder.all[part] for part in recorder.kept),
        router_flops=(0.0,) * len(flops),
        grid=patch_grid(model, batch, shape_BS[1]),
    )


def _executors(model: nn.Module) -> dict[str, SparseInput]:
    if not (executors := sparse_inputs(model)):
        raise ConfigError("the model skips no input channel; thin it first.")
    return executors


def _part(site: LinearSite) -> str:
    return f"{site.block}: {'FFN' if site.role.startswith('ffn') else 'attention'}"
