"""From a dense checkpoint to one that skips input channels of linear layers, or neurons of FFNs, without any training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..channels import all_channels, sparse_inputs
from ..controls import check_dense
from ..convert import ConvertConfig
from ..data import DataConfig, check_source
from ..hf.card import thinned_card
from ..hf.folders import check_apart, check_output, recover
from ..hf.inputs import example_inputs
from ..hf.load import load_model
from ..hf.save import library_versions, save_checkpoint
from ..routers import GateRouterConfig, LowRankRouterConfig, OracleRouterConfig, RouterConfig
from ..select import Rule, RuleConfig, Threshold, TopK
from ..sites import find_ffn_sites, find_linear_sites
from ..sparsity.channel import ScoreSample, shared_level
from ..sparsity.channel_profile import profile_channels
from ..split import ContiguousSplit
from ..thin import ThinConfig, check_costs, check_skip_frac, layer_seconds, thin
from ..train.calibration import TARGETS
from ..train.capture import fast_dtype
from .convert import CalibrationConfig, convert_checkpoint
from .heldout import card_rows, int8_rows, measure_converted
from .inputs import calibration_batches, hold_out
from .names import torch_device, torch_dtype

_KNOB_BATCHES = 8  # whose channels give the levels of other budgets


@dataclass(frozen=True, kw_only=True)
class ChannelMethod:
    """Input channels of linear layers are skipped (`moeify.thin`)."""

    score: str
    """`ThinConfig.score`."""
    allocate: str = "uniform"
    """`ThinConfig.allocate` where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class NeuronMethod:
    """Neurons of FFNs are skipped: a router over experts of one neuron each, of which nothing is trained."""

    router: RouterConfig
    """What a neuron's worth is read off."""
    rule: type[Rule] = Threshold
    """Rule that it is calibrated with."""


METHODS: dict[str, ChannelMethod | NeuronMethod] = {
    "sensitivity": ChannelMethod(score="sensitivity", allocate="shared"),
    "teal": ChannelMethod(score="magnitude"),
    "magnitude": ChannelMethod(score="magnitude"),  # what configs call it
    "wina": ChannelMethod(score="wina"),
    "cats": NeuronMethod(router=GateRouterConfig(scale="none")),
    "chess": NeuronMethod(router=GateRouterConfig(scale="up")),
    "predictor": NeuronMethod(router=LowRankRouterConfig(rank=128)),
    "topk": NeuronMethod(router=OracleRouterConfig(of="activation"), rule=TopK),
}
"""Methods without training by the name that the command line uses; one joins by a line."""


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """How many neurons of every FFN are skipped, and by which method."""

    method: str
    """Key of `METHODS` that is a `NeuronMethod`: 'cats', 'chess', 'predictor' or 'topk'."""
    skip_frac: float
    """Wanted share of skipped neurons, in [0, 1), the same in every FFN."""
    seed: int = 0
    """Recorded; nothing is drawn."""

    def __post_init__(self) -> None:
        check_skip_frac(self.skip_frac)
        self.chosen()

    def chosen(self) -> NeuronMethod:
        """The method's line of the table.

        Raises:
            ConfigError: there is none, or it is of channels.
        """
        return _config.lookup({name: one for name, one in METHODS.items() if isinstance(one, NeuronMethod)}, self.method, where="method")


def thin_checkpoint(
    source: str,
    out: Path,
    *,
    data: DataConfig,
    config: ThinConfig | NeuronConfig,
    dtype: str = "float32",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Make a checkpoint skip input channels of linear layers, or neurons of FFNs: read, calibrate, measure, save; no weight changes, but
    for ``config.transform``.

    Args:
        source: Hub id, folder or ``.gguf`` file of a dense model; never written to.
        out: new folder: a valid dense checkpoint, with the levels of the channels, or the routers, beside the weights.
        data: calibration data; one sequence of 50 is kept to measure the result.
        config: what to skip: channels, or neurons, which gives the checkpoint that `convert_checkpoint` makes of experts of one neuron.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        overwrite: replace an earlier result at ``out``.
        progress: told every stage.

    Returns:
        What ``moeify.json`` holds under "calibration": ``method``, ``skips`` (what is skipped), ``config``, ``skipped`` (share of each
        layer's channels on calibration data), ``knobs`` (factors of the levels for other budgets, which `sweep_checkpoint` reads),
        ``untied_head`` (whether the transform gave a tied head a matrix of its own), ``measured`` (`measure_converted`); of neurons
        ``method``, ``skips``, ``skip_frac`` and what `convert_checkpoint` returns.

    Raises:
        MoeifyError: see `errors`; whatever goes wrong, ``source`` and an existing ``out`` are untouched.
    """
    if isinstance(config, NeuronConfig):
        return _thin_neurons(source, out, data=data, config=config, dtype=dtype, device=device, overwrite=overwrite, progress=progress)
    check_apart(out, source)
    recover(out)
    check_output(out, overwrite=overwrite)
    place = torch_device(device)
    check_source(data)
    model, processor = load_model(source, dtype=torch_dtype(dtype), progress=progress)
    check_dense(model, source)
    model.to(place)
    batches, held_out = hold_out(model, calibration_batches(model, processor, data, progress=progress))
    record = thin_model(model, batches, config=config, progress=progress)
    record |= {
        "source": source,
        "data": data.data,
        "versions": library_versions(),
        "measured": measure_converted(model, held_out, progress=progress),
    }
    card = thin_card_of(model, record, name=out.name)
    save_checkpoint(model, processor, out, calibration=record, card=card, overwrite=overwrite, progress=progress)
    return record


def thin_card_of(model: nn.Module, record: Mapping[str, Any], *, name: str) -> str:
    """The model card of a model that skips input channels, with its calibration record."""
    results = {**card_rows(record["measured"]), **int8_rows(record)}
    return thinned_card(model, name=name, record=record, results=results)


def _thin_neurons(source: str, out: Path, *, data: DataConfig, config: NeuronConfig, **options: Any) -> dict[str, Any]:
    method = config.chosen()
    experts = ConvertConfig(
        expert_size=1,
        router=method.router,
        split=ContiguousSplit(),
        rule=cast(RuleConfig, method.rule.all_on()),
        seed=config.seed,
    )
    calibration = CalibrationConfig(target_active=1 - config.skip_frac, max_tokens=data.max_tokens, window=data.window, seed=config.seed)
    notes = {"method": config.method, "skips": "neurons of FFNs", "skip_frac": config.skip_frac}
    return convert_checkpoint(source, out, data=data, config=experts, calibration=calibration, notes=notes, **options)


def thin_model(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, config: ThinConfig, progress: Progress = NO_PROGRESS
) -> dict[str, Any]:
    """Thin a model in memory, in place, and record how; what `thin_checkpoint` does between loading and measuring.

    Args:
        model: dense model.
        batches: calibration inputs.
        config: what to skip.
        progress: told of every batch.

    Returns:
        JSON values: all of `thin_checkpoint`'s but those of data, source and measurement.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `moeify.thin`; the model is unchanged then.
    """
    from ..hf.quantizer import adopt  # here, and not on top: it imports transformers' model code, which takes seconds

    compute = fast_dtype(next(model.parameters()).device)
    with all_channels(model):
        ffn_sites = find_ffn_sites(model, batches[0] if not hasattr(model, "config") else example_inputs(model)) if batches else None
    was_tied = _has_tied_head(model)
    costs = None
    if config.cost == "time" and batches:  # here, so that the record and the knobs have the times that the levels were set with
        device = next(model.parameters()).device
        example = {key: value[:1].to(device) for key, value in batches[0].items() if key != "labels"}
        with all_channels(model):
            sites = [site for site in find_linear_sites(model, example, ffn_sites=ffn_sites) if site.role in config.roles]
        costs = layer_seconds(model, sites)
    skipped = thin(model, batches, config, ffn_sites=ffn_sites, costs=costs, compute=compute, progress=progress)
    few = batches[:: max(1, len(batches) // _KNOB_BATCHES)]
    knobs = level_knobs(model, few, uniform=config.allocate == "uniform", costs=costs, compute=compute, seed=config.seed)
    adopt(model)
    return {
        "method": config.score,
        "skips": "input channels of linear layers",
        "config": _config.to_dict(config),
        "tokens": sum(next(iter(batch.values())).shape[:2].numel() for batch in batches),  # positions, padding among them
        "skipped": skipped,
        **({} if costs is None else {"costs": costs}),
        "untied_head": was_tied and not _has_tied_head(model),
        "scope": "layer" if config.allocate == "uniform" else "global",
        "targets": list(TARGETS),
        "knobs": {"threshold": knobs} if knobs else {},
        "most_experts": 1,
    }


def _has_tied_head(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def level_knobs(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    uniform: bool = False,
    costs: Mapping[str, float] | None = None,
    compute: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Factors of a thinned model's levels at which its layers keep other shares of their channels.

    Args:
        model: thinned model; its layers read what they read at their present levels, so other budgets come out near, not exactly.
        batches: inputs.
        costs: what a layer counts by its name; None: its parameters.
        uniform: a factor for each layer, which keeps the same share as all; else one factor for all, which keeps it on average.
        compute: dtype of matrix products; None leaves the model's own.
        seed: of the sample of tokens.

    Returns:
        Of each layer the factors for the kept shares `TARGETS`; nothing where a level is 0, which no factor raises.
    """
    executors = sparse_inputs(model)
    sites = {name: executor.site for name, executor in executors.items()}
    if any(not bool(executor.level_K.any()) for executor in executors.values()):
        return {}
    stats = profile_channels(model, list(sites.values()), batches, compute=compute, seed=seed)
    samples = {}
    for name, executor in executors.items():
        ratio_RK = stats[name].rows_RK.abs().float() / executor.level_K
        samples[name] = ScoreSample(ratio_RK.nan_to_num(posinf=torch.finfo(torch.float32).max))  # 0 / 0 is never kept, x / 0 always
    if uniform:
        return {name: [sample.level(1 - target) for target in TARGETS] for name, sample in samples.items()}
    costs = check_costs(list(sites.values()), costs)
    shared = [shared_level(samples, costs, skip_frac=1 - target) for target in TARGETS]
    return dict.fromkeys(samples, shared)
