"""From a dense checkpoint to one whose activations are sparse: trained on its task with the penalty on."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..controls import check_dense
from ..convert import tried_projections
from ..data import AugmentConfig, DataConfig, check_source
from ..errors import CheckpointError, ConfigError
from ..hf.card import trained_card
from ..hf.folders import check_output, recover
from ..hf.inputs import example_inputs
from ..hf.save import library_versions, save_trained
from ..sites import FFNSite, find_ffn_sites
from ..sparsity import enforce_sparsity, profile_activations
from ..train.loop import TrainConfig, TrainingData, TrainRecord
from ..train.sparsify import SparsifyConfig, sparsify
from .inputs import calibration_batches, take_tokens, tokens_per_image
from .names import torch_device, torch_dtype
from .pretrain_log import Board, check_tensorboard
from .project import ProjectionsConfig, check_teaching, distil_and_replace, projection_records
from .tasks import TASKS, Loaded, load_for_task, measure_task, task_batches, training_data, window_tokens
from .work import DISTILLATION, TRAINING_STATE, fingerprint, finished_training, open_training, remove_work, run_id, weights_checksum

VALIDATION_TOKENS = 100_000
"""Of the validation split, where nobody says."""

_MEASURED, _REPLACED = "before.json", "replaced.json"
_PROFILE_TOKENS = 8192  # zeros of 8192 tokens: a standard error of under 0.1 points in every layer
_FORWARD_TOKENS = 2048  # of an evaluation, as far as windows allow; short texts and images come in batches of 32
_POINTS = 20  # of a long run, in the record


def sparsify_checkpoint(
    source: str,
    out: Path,
    *,
    data: DataConfig,
    config: SparsifyConfig,
    train: TrainConfig,
    task: str | None = None,
    validation: DataConfig | None = None,
    augment: AugmentConfig | None = None,
    batch_tokens: int | None = None,
    projections: ProjectionsConfig | None = None,
    tensorboard: Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Train a checkpoint towards sparse activations: read, measure, train, measure, save.

    Args:
        source: Hub id, folder or ``.gguf`` file of a dense model; never written to.
        out: new folder for an ordinary dense checkpoint, with ``sparsify.json``. A run that was killed continues from the state in
            ``<out>.work``, where ``train.save_every`` steps are the most that are lost (None: a twentieth of the run, or
            more where states are so large that saving them would take much of its time).
        data: what to train on; with the split "all", all of it.
        config: activation function, penalty, distillation (from the source, loaded a second time).
        train: optimizer, schedule, batches, seed.
        task: key of `TASKS`; None takes that of the source's head. Another one gives it a new head, drawn by ``train.seed``.
        validation: what to measure on, before, at the end and every ``train.eval_every`` steps; None takes the validation split of
            ``data``, up to `VALIDATION_TOKENS`.
        augment: variations of images.
        batch_tokens: tokens of an optimizer step instead of ``train.batch_sequences``, rounded down to whole windows.
        projections: linear layers to replace by MLPs first, distilled on the training data; the penalty is then on FFNs and MLPs, a mean
            over each (``mean_over``). The result loads with moeify only. None replaces none.
        tensorboard: folder for TensorBoard's events: loss, penalties and evaluations by step. None writes none.
        dtype: of the weights, "float32", "bfloat16" or "float16"; ``train.compute`` says what matrix products take.
        device: "cpu", "cuda" or "cuda:1".
        overwrite: replace an earlier result at ``out``, and the state of another run in ``<out>.work``.
        progress: told every stage.

    Returns:
        What ``sparsify.json`` holds: ``task``, ``metric``, ``quality`` and ``activations`` (shares of zeros, by FFN and their mean), each
        "before" and "after", ``losses`` (means over a twentieth of the run each), ``evals``, ``parts`` (twenty readings of the penalties),
        ``tokens``, ``epochs``, ``seconds``, ``config`` and ``versions``. With ``projections`` also ``projections``: their config,
        what `distil_and_replace` returns, and the "quality" before training.

    Raises:
        MoeifyError: see `errors`; whatever goes wrong, ``source`` and an existing ``out`` are untouched.
    """
    if tensorboard is not None:
        check_tensorboard()
    work = out.with_name(out.name + ".work")
    recover(out)
    finished = finished_training(out, work)
    if finished is None:
        check_output(out, overwrite=overwrite)
    place = torch_device(device)
    validation = validation or replace(data, split="validation", max_tokens=VALIDATION_TOKENS, seed=None)
    check_source(data)
    check_source(validation)
    options: dict[str, Any] = {"task": task, "dtype": torch_dtype(dtype), "seed": train.seed, "progress": progress}
    loaded = load_for_task(source, data, **options)
    model = loaded.model
    check_dense(model, source)
    if config.distill is not None and config.distill.logits_weight and loaded.has_new_head:
        raise ConfigError(f"--distill: the head of '{source}' for {loaded.task} is new and has nothing to teach; train it first without.")
    if batch_tokens is not None:
        train = replace(train, batch_sequences=_sequences(batch_tokens, window_tokens(loaded, data)))
    train = train.saving()
    model.to(place)
    sites = find_ffn_sites(model, example_inputs(model))
    if projections is None:
        check_enforcement(model, sites, config)
    else:
        records = projection_records(model, projections)
        check_teaching(config.distill)
        with tried_projections(model, records):
            check_enforcement(model, find_ffn_sites(model, example_inputs(model)), config)
    examples = training_data(loaded, data, augment=augment, progress=progress)
    batch_size = max(1, _FORWARD_TOKENS // validation.window) if TASKS[loaded.task].has_windows else 32
    batches = task_batches(loaded, validation, batch_size=batch_size, progress=progress)
    _say_epochs(examples, train, data)

    run = _run_of(loaded, examples, batches, source=source, config=config, train=train, augment=augment, dtype=dtype)
    if projections is not None:
        run["projections"] = _config.to_dict(replace(projections, workers=1))
    if finished is not None:
        if finished.get("run") == run_id(run):
            remove_work(work)
            return finished
        check_output(out, overwrite=overwrite)
    open_training(work, run, overwrite=overwrite)
    before = _kept(work / _MEASURED, lambda: _measured(loaded, sites, batches, progress))
    extra = {}
    if projections is not None:
        lessons = calibration_batches(model, loaded.processor, replace(data, max_tokens=projections.tokens), progress=progress)
        replaced = distil_and_replace(model, records, lessons, projections, work=work / DISTILLATION, progress=progress)
        sites = find_ffn_sites(model, example_inputs(model))
        found = _kept(work / _REPLACED, lambda: {"quality": measure_task(model, loaded.task, batches, progress=progress)})
        extra = {"projections": {"config": run["projections"], **replaced, **found}}
    teacher = None
    if config.distill is not None:
        teacher = load_for_task(source, data, **options).model.to(place).requires_grad_(False)
    with ExitStack() as stack:
        watch = None
        if tensorboard is not None:
            watch = stack.enter_context(closing(Board(tensorboard, metric=TASKS[loaded.task].metric))).watch
        record = sparsify(
            model,
            sites,
            examples,
            config,
            train,
            teacher=teacher,
            state=work / TRAINING_STATE,
            run=run,
            evaluate=lambda model: measure_task(model, loaded.task, batches),
            watch=watch,
            progress=progress,
        )
    del teacher
    # The last evaluation is of the model that is saved, unless its activations were still between two functions then.
    is_final = config.anneal_frac * train.steps <= train.steps - 1
    after = _measured(loaded, sites, batches, progress, quality=record.evals[-1][1] if is_final else None)
    report = _report(loaded, record, before, after, run) | {
        "source": source,
        "data": data.data,
        "config": run["config"],
        "train": run["train"],
        **extra,
    }
    card = trained_card(model, name=out.name, base_model=source, record=report)
    save_trained(model, loaded.processor, out, record=report, card=card, overwrite=overwrite, progress=progress)
    remove_work(work)
    return report


def check_enforcement(model: nn.Module, sites: Sequence[FFNSite], config: SparsifyConfig) -> None:
    """Refuse, before anything is read or trained, enforcement that these FFNs cannot have, or exceptions for FFNs that are not there.

    Raises:
        ConfigError, UnsupportedModelError: as `enforce_sparsity`, and as `set_activation` of its policy.
    """
    enforced, functions = config.enforcement.enforced(sites), config.functions()
    changes = functions.by_site(sites) if functions is not None else {}
    if kept := [site for site in enforced if changes.get(site.name) is None]:
        enforce_sparsity(model, kept, replace(config.enforcement, layer_weights={})).remove()


def _sequences(batch_tokens: int, window: int) -> int:
    if batch_tokens < window:
        raise ConfigError(f"--batch-tokens {batch_tokens} is less than one window of {window}; raise it or lower --window.")
    return batch_tokens // window


def _say_epochs(examples: TrainingData, train: TrainConfig, data: DataConfig) -> None:
    epochs = train.epochs(len(examples))
    if epochs > 1:
        warnings.warn(
            f"'{data.data}' has {len(examples)} sequences: {train.steps} steps of {train.batch_sequences} are {epochs:.1f} epochs.",
            stacklevel=3,
        )


def _run_of(
    loaded: Loaded,
    examples: TrainingData,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    source: str,
    config: SparsifyConfig,
    train: TrainConfig,
    augment: AugmentConfig | None,
    dtype: str,
) -> dict[str, Any]:
    """Everything that decides the outcome; not what may change between a kill and the next start."""
    rows = sorted({0, len(examples) // 2, len(examples) - 1})
    sample = [examples.batch([row], generator=torch.Generator().manual_seed(0)) for row in rows]
    return {
        "source": source,
        "task": loaded.task,
        "weights": weights_checksum(loaded.model),
        "sequences": len(examples),
        "sample": fingerprint(sample),
        "validation": fingerprint(batches),
        "config": _config.to_dict(config),
        "train": train.decisive(),
        "augment": _config.to_dict(augment or AugmentConfig()),
        "dtype": dtype,
    }


def _kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before training; kept, so that a run that goes on need not measure it again."""
    if path.exists():
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured
    measured = measure()
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps(measured))
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror}; free space or choose another --out.") from error
    temporary.replace(path)
    return measured


def _measured(
    loaded: Loaded, sites: Sequence[FFNSite], batches: Sequence[Mapping[str, Tensor]], progress: Progress, *, quality: float | None = None
) -> dict[str, Any]:
    """Quality, and what the neurons do: shares of zeros by FFN, and their mean."""
    # without labels: nobody reads the loss
    inputs = ({key: value for key, value in batch.items() if key != "labels"} for batch in batches)
    few = take_tokens(inputs, _PROFILE_TOKENS, tokens_per_image=tokens_per_image(loaded.model.config))
    summaries = {name: profile.summary() for name, profile in profile_activations(loaded.model, sites, few, progress=progress).items()}
    layers = {
        name: {
            "zero_frac": summary["zero_frac"],
            "near_zero_frac": summary["near_zero_frac"],
            "nonzeros_per_token": summary["nonzeros_per_token"]["mean"],
        }
        for name, summary in summaries.items()
    }
    mean = {key: math.fsum(layer[key] for layer in layers.values()) / len(layers) for key in next(iter(layers.values()))}
    if quality is None:
        quality = measure_task(loaded.model, loaded.task, batches, progress=progress)
    return {"quality": quality, "activations": {"mean": mean, **layers}}


def _report(
    loaded: Loaded, record: TrainRecord, before: Mapping[str, Any], after: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "task": loaded.task,
        "metric": TASKS[loaded.task].metric,
        "quality": {"before": before["quality"], "after": after["quality"]},
        "activations": {"before": before["activations"], "after": after["activations"]},
        "losses": _loss_points(record.losses),
        "evals": [{"step": step, "quality": value} for step, value in record.evals],
        "parts": [record.parts[stop - 1] for stop in _ends(len(record.parts))],
        "tokens": record.tokens,
        "epochs": record.epochs,
        "seconds": record.seconds,
        "new_head": loaded.has_new_head,
        "versions": library_versions(),
        "run": run_id(run),
    }


def _loss_points(losses: Sequence[float]) -> list[dict[str, float]]:
    """Means over equal parts of the run, by the step that ends each."""
    ends = _ends(len(losses))
    return [{"step": stop, "loss": math.fsum(losses[start:stop]) / (stop - start)} for start, stop in zip([0, *ends], ends, strict=False)]


def _ends(count: int) -> list[int]:
    """Where equal parts of so many steps end, at most `_POINTS` of them."""
    parts = min(_POINTS, count)
    return [count * (i + 1) // parts for i in range(parts)]
