"""From a converted checkpoint to one that runs without moeify: ONNX, a dense model, or a native mixture of experts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..controls import set_mode, set_rule
from ..convert import to_dense
from ..data import DataConfig
from ..errors import CheckpointError, ConfigError, MoeifyError, UnsupportedModelError
from ..evaluate import perplexity
from ..export import NativeMoEConfig, OnnxConfig, check_exportable, fit_routing, routed_as, to_native_moe, to_onnx
from ..hf.folders import check_apart, check_output
from ..hf.load import load_model, read_calibration, read_manifest
from ..hf.save import exported_folder
from ..layers import moe_layers
from ..select import Threshold, TopK
from ..sites import replaced_projections
from ..train.calibration import recalibrate
from .inputs import calibration_batches, hold_out
from .names import torch_dtype

_MEASURED_TOKENS = 8192
_MEASURED_SHARE = 5  # one token of so many, where the data has not as many more as that

TARGETS = ("onnx", "dense", "qwen2-moe", "mixtral")
"""What `export_checkpoint` writes."""


def export_checkpoint(
    directory: str | Path,
    out: Path,
    *,
    to: str,
    k: int | None = None,
    shared: int | None = None,
    data: DataConfig | None = None,
    onnx: OnnxConfig | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write a converted or thinned checkpoint for those who have no moeify.

    Args:
        directory: folder that `moeify convert` or `moeify thin` wrote; never written to.
        out: new folder; written whole or not at all.
        to: "onnx", one file with dynamic k (`moeify.export.to_onnx`); "dense", the dense model; "qwen2-moe" or "mixtral", a fixed-k
            checkpoint of that architecture (`moeify.export.to_native_moe`).
        k: of a native mixture, experts per token; None takes that of the rule topk.
        shared: of qwen2-moe, experts among them that always run; None chooses by the calibration data.
        data: of a native mixture, what routers are fitted to, and 8192 tokens more that the result is measured on (at least a fifth of
            all, where there are not so many more); None takes what the checkpoint was converted with.
        onnx: how an ONNX file computes experts.
        dtype: of the weights, "float32", "bfloat16" or "float16"; "auto" as they are. ONNX files are float32.
        overwrite: replace an earlier export at ``out``.
        progress: told every stage.

    Returns:
        What ``export.json`` holds, without the versions.

    Raises:
        ConfigError: an unknown target, or options of another one.
        CheckpointError: no converted checkpoint, ``out`` is in the way, or a package is missing.
        UnsupportedModelError: the target has no place for something in the model; names it, and what works.
    """
    directory = Path(directory)
    if to not in TARGETS:
        _config.lookup(dict.fromkeys(TARGETS), to, where="--to")
    is_native = to in ("qwen2-moe", "mixtral")
    if not is_native and (k is not None or shared is not None or data is not None):
        raise ConfigError(f"--k, --shared and --data are of fixed-k checkpoints (qwen2-moe, mixtral), not of {to}.")
    check_apart(out, directory)
    read_manifest(directory)
    check_output(out, overwrite=overwrite)
    model, processor = load_model(directory, dtype="auto" if dtype == "auto" and to != "onnx" else _dtype(dtype), progress=progress)
    record: dict[str, Any] = {"source": str(directory), "to": to}
    if to == "onnx":
        with progress.task("trace and check", total=1) as task, exported_folder(out, overwrite=overwrite) as (folder, written):
            report = to_onnx(model, folder / "model.onnx", config=onnx)
            model.config.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
            record |= report.to_dict()
            written |= record
            task.advance(1)
        return record
    if to == "dense":
        return _save(_dense(model), processor, out, record, overwrite=overwrite)
    config = NativeMoEConfig(layout=cast(Any, to), k=k, shared=shared)
    k = check_exportable(model, config)
    config = NativeMoEConfig(layout=cast(Any, to), k=k, shared=shared)
    batches, held_out = _batches(model, processor, data or _own_data(directory), progress=progress)
    routings = fit_routing(model, batches, config, progress=progress)
    exported = to_native_moe(model, routings, config)
    num_shared = len(next(iter(routings.values())).shared)
    moe = next(iter(moe_layers(model).values()))
    record |= {
        "k": k,
        "shared": num_shared,
        "num_experts": moe.num_experts,
        "expert_size": moe.bounds[1],
        "active_fraction": k / moe.num_experts,
        "captured": _mean([routing.captured for routing in routings.values()]),
        "captured_before": _mean([routing.captured_before for routing in routings.values()]),
    }
    windows = [batch["input_ids"] for batch in held_out]
    record |= {"fitted_tokens": _num_tokens(batches), "held_out_tokens": _num_tokens(held_out)}
    if windows:
        with routed_as(model, routings, k), torch.no_grad():
            expected, found = (one(windows[0][:1]).logits.float() for one in (model, exported))
            record["max_error"] = float((expected - found).abs().max() / expected.abs().max())
            same = _perplexity(model, windows, progress)
        record["perplexity"] = {"exported": _perplexity(exported, windows, progress), "same_routing": same}
        record["perplexity"] |= _compared(model, windows, batches, k=k, progress=progress)
    return _save(exported, processor, out, record, overwrite=overwrite)


def _batches(
    model: nn.Module, processor: Any, data: DataConfig, *, progress: Progress
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Windows to fit to, and those to measure on: `_MEASURED_TOKENS` beyond ``max_tokens``, or a share of what there is."""
    fitted = None if data.max_tokens is None else data.max_tokens // data.window * data.window
    if fitted:
        data = replace(data, max_tokens=fitted + _MEASURED_TOKENS)
    batches = calibration_batches(model, processor, data, progress=progress)
    sequences, tokens = sum(len(batch["input_ids"]) for batch in batches), _num_tokens(batches)
    measured = min(_MEASURED_TOKENS, max(tokens - (fitted or tokens), tokens // _MEASURED_SHARE))
    return hold_out(model, batches, least=max(1, math.ceil(measured * sequences / tokens)))


def _num_tokens(batches: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "auto" else torch_dtype(name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _own_data(directory: Path) -> DataConfig:
    name = read_calibration(directory).get("data")
    if not isinstance(name, str):
        raise CheckpointError(f"'{directory}' does not say what data it was converted with; give --data.")
    return DataConfig(data=name)


def _dense(model: Any) -> Any:
    """The model, dense, in place.

    Raises:
        UnsupportedModelError: there is no dense model of its architecture.
    """
    if replaced := next(iter(replaced_projections(model)), None):
        raise UnsupportedModelError(f"'{replaced}' was replaced by an MLP, so there is no dense model of this architecture; use --to onnx.")
    to_dense(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the FFNs' activations are such as config.json has no word for, so that only moeify loads them; use --to onnx."
        )
    model.hf_quantizer = None
    return model


def _compared(
    model: nn.Module, windows: Sequence[Tensor], batches: Sequence[Mapping[str, Tensor]], *, k: int, progress: Progress
) -> dict[str, float | None]:
    """Perplexity of the same weights dense, with k experts by our routers, and with a dynamic number that is k on average."""
    layers = moe_layers(model)
    set_mode(model, "dense")
    found: dict[str, float | None] = {"dense": _perplexity(model, windows, progress)}
    set_mode(model, "moe")
    kinds = {type(moe.rule) for moe in layers.values()}
    set_rule(model, {name: TopK(k=max(1, k - len(moe.always_on))) for name, moe in layers.items()})
    found["ours_fixed_k"] = _perplexity(model, windows, progress)
    kind = kinds.pop() if len(kinds) == 1 and TopK not in kinds else Threshold
    share = k / next(iter(layers.values())).num_experts
    try:
        recalibrate(model, batches, target_active=share, rule=kind, progress=progress)
        found["ours_dynamic_k"] = _perplexity(model, windows, progress)
    except MoeifyError:  # k experts of which all always run
        found["ours_dynamic_k"] = None
    return found


def _perplexity(model: nn.Module, windows: Sequence[Tensor], progress: Progress) -> float:
    return perplexity(model, torch.cat(list(windows)), progress=progress)


def _save(model: Any, processor: Any, out: Path, record: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    with exported_folder(out, overwrite=overwrite) as (folder, written):
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        written |= record
    return record
