"""What a model is trained for and measured by: the task of its own head, or of one that it is given.

Letters: B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..data import (
    AugmentConfig,
    DataConfig,
    LabelledImageData,
    LabelledTextData,
    MaskedData,
    WindowData,
    class_ids,
    padding_id,
    read_examples,
    read_labels,
    special_ids,
    text_windows,
)
from ..errors import ConfigError, DataError, UnsupportedModelError
from ..evaluate import measure_quality
from ..hf.load import load_model, model_class
from ..train.loop import TrainingData
from .inputs import check_window, head_classes, image_mode, most_images, most_positions

_MASK_SEED = 0  # of evaluation: always the same positions


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of head: what it reads and what it is measured by."""

    heads: tuple[str, ...]
    """Ends of the class names of models that have it."""
    auto_class: str
    """Name of transformers' class that gives a base model such a head."""
    metric: str
    """Key of `moeify.evaluate.METRICS`."""
    read: Callable[[nn.Module, Any, DataConfig, AugmentConfig | None, Progress], TrainingData]
    """(model, tokenizer or processor, data, augmentation, progress) -> its data."""
    has_windows: bool = False
    """Whether sequences are all as long as a window, so that a number of tokens is one of sequences."""
    has_labels: bool = False
    """Whether the data has a column of classes."""


class Loaded(NamedTuple):
    """A model ready for its task."""

    model: Any
    """In eval mode, on the CPU."""
    processor: Any
    """Its tokenizer or image processor."""
    task: str
    """Key of `TASKS`."""
    has_new_head: bool
    """Whether the head was drawn, not read."""


def load_for_task(
    source: str,
    data: DataConfig,
    *,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> Loaded:
    """Load a model with a head for a task.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        data: what it will be trained on; the classes of a new head are those of its labels.
        task: key of `TASKS`; None takes that of the head which is there. Another one than that gives the base model a new head.
        dtype: of the weights.
        seed: of a new head's weights.
        progress: as in `load_model`.

    Raises:
        ConfigError: no such task.
        UnsupportedModelError: no head of a known kind and no task named, or transformers has no such head for the family.
        DataError: no tokenizer or processor; for a new head, labels that make no classes.
        CheckpointError: as `load_model`.
    """
    if task is not None:
        _config.lookup(TASKS, task, where="--task")
    cls = model_class(source)
    own = next((name for name, kind in TASKS.items() if cls.__name__.endswith(kind.heads)), None)
    if own is None and task is None:
        raise UnsupportedModelError(f"'{source}': {cls.__name__} has no head for a known task; name one: --task {', '.join(TASKS)}.")
    has_new_head = task not in (None, own)
    name = task or own
    assert name is not None
    if has_new_head:
        new_head = _new_classes(data) if TASKS[name].has_labels else {}
        model, processor = load_model(
            source, dtype=dtype, auto_class=_class_with_head(cls, name, source), new_head=new_head, seed=seed, progress=progress
        )
    else:
        model, processor = load_model(source, dtype=dtype, progress=progress)
    if processor is None:
        raise DataError(f"{type(model).__name__} came without a tokenizer or processor; put its files beside the weights.")
    if TASKS[name].has_labels and getattr(model, "main_input_name", "") == "input_ids" and model.config.pad_token_id is None:
        model.config.pad_token_id = padding_id(processor)  # decoders read the class off the last token that is not padding
    return Loaded(model, processor, name, has_new_head)


def training_data(
    loaded: Loaded, data: DataConfig, *, augment: AugmentConfig | None = None, progress: Progress = NO_PROGRESS
) -> TrainingData:
    """What the model reads, with labels.

    Args:
        loaded: from `load_for_task`.
        data: the source; ``split`` and ``max_tokens`` count. Texts and windows are as long as ``window``, or as model and tokenizer allow
            if that is less.
        augment: variations of images.
        progress: told of tokenising and decoding.

    Raises:
        DataError: no data, none of the model's kind, no such column, or a class that the head does not know.
        ConfigError: augmentation of texts.
    """
    task = TASKS[loaded.task]
    if augment is not None and augment != AugmentConfig() and task.read is not _images:
        raise ConfigError(f"--flip and --crop vary images; {type(loaded.model).__name__} reads text.")
    try:
        return task.read(loaded.model, loaded.processor, data, augment, progress)
    except DataError as error:
        where = f"'{data.data}'"
        raise error if where in str(error) else DataError(f"{where}: {error}") from None


def task_batches(loaded: Loaded, data: DataConfig, *, batch_size: int = 8, progress: Progress = NO_PROGRESS) -> list[dict[str, Tensor]]:
    """Fixed batches to measure the task's metric on; masks are always the same.

    Args:
        loaded: from `load_for_task`.
        data: as in `training_data`, of another split.
        batch_size: sequences per batch.
        progress: as in `training_data`.
    """
    examples = training_data(loaded, data, progress=progress)
    generator = torch.Generator().manual_seed(_MASK_SEED)
    rows = range(len(examples))
    return [examples.batch(rows[i : i + batch_size], generator=generator) for i in range(0, len(rows), batch_size)]


def measure_task(model: nn.Module, task: str, batches: Sequence[Mapping[str, Tensor]], *, progress: Progress = NO_PROGRESS) -> float:
    """The task's metric on `task_batches`."""
    return measure_quality(model, batches, metric=TASKS[task].metric, progress=progress).value


def window_tokens(loaded: Loaded, data: DataConfig) -> int:
    """Tokens of one sequence of windows, special ones included.

    Raises:
        ConfigError: the task's sequences are of many lengths.
    """
    if not TASKS[loaded.task].has_windows:
        raise ConfigError(f"--batch-tokens is for windows of text; give --batch-sequences for {loaded.task}.")
    if loaded.task == "causal-lm":
        return data.window
    return most_positions(loaded.model, loaded.processor, data.window)


def _windows(model: nn.Module, tokenizer: Any, data: DataConfig, _augment: AugmentConfig | None, progress: Progress) -> TrainingData:
    check_window(model, data.window)
    return WindowData(text_windows(data, tokenizer, progress=progress))


def _masked(model: nn.Module, tokenizer: Any, data: DataConfig, _augment: AugmentConfig | None, progress: Progress) -> TrainingData:
    around = sum(map(len, special_ids(tokenizer)))
    inner = most_positions(model, tokenizer, data.window) - around
    if inner < 2:
        raise DataError(f"--window {data.window} leaves {inner} tokens of text beside {around} special ones; give more.")
    return MaskedData(text_windows(replace(data, window=inner), tokenizer, progress=progress), tokenizer)


def _texts(model: nn.Module, tokenizer: Any, data: DataConfig, _augment: AugmentConfig | None, progress: Progress) -> TrainingData:
    return LabelledTextData(
        read_examples(data),
        tokenizer,
        max_length=most_positions(model, tokenizer, data.window),
        max_tokens=data.max_tokens,
        progress=progress,
        **head_classes(model),
    )


def _images(model: nn.Module, processor: Any, data: DataConfig, augment: AugmentConfig | None, progress: Progress) -> TrainingData:
    return LabelledImageData(
        read_examples(data),
        processor,
        mode=image_mode(model),
        augment=augment,
        max_images=most_images(model.config, data.max_tokens),
        progress=progress,
        **head_classes(model),
    )


TASKS: dict[str, Task] = {
    "causal-lm": Task(
        heads=("ForCausalLM", "LMHeadModel"), auto_class="AutoModelForCausalLM", metric="perplexity", read=_windows, has_windows=True
    ),
    "masked-lm": Task(
        heads=("ForMaskedLM",), auto_class="AutoModelForMaskedLM", metric="pseudo_perplexity", read=_masked, has_windows=True
    ),
    "sequence-classification": Task(
        heads=("ForSequenceClassification",),
        auto_class="AutoModelForSequenceClassification",
        metric="accuracy",
        read=_texts,
        has_labels=True,
    ),
    "image-classification": Task(
        heads=("ForImageClassification",), auto_class="AutoModelForImageClassification", metric="accuracy", read=_images, has_labels=True
    ),
}
"""Tasks by the name that the command line uses."""


def _new_classes(data: DataConfig) -> dict[str, Any]:
    """Config entries of a head with the classes of the labels."""
    labels = set(read_labels(data))
    numbers = [label for label in labels if isinstance(label, int)]
    ids = class_ids(labels, num_classes=max(numbers, default=0) + 1)
    if len(ids) < 2:
        raise DataError(f"'{data.data}': every label is {next(iter(labels), None)!r}; a head needs two classes at least.")
    if numbers:
        return {"num_labels": max(numbers) + 1}
    return {"id2label": {i: str(label) for label, i in ids.items()}, "label2id": {str(label): i for label, i in ids.items()}}


def _class_with_head(cls: Any, task: str, source: str) -> Any:
    """transformers' automatic class of a task, if it knows one for the family."""
    import transformers

    auto_class = getattr(transformers, TASKS[task].auto_class)
    config_class = getattr(cls, "config_class", None)
    if config_class is not None and config_class not in auto_class._model_mapping:
        raise UnsupportedModelError(
            f"'{source}': transformers has no head for {task} in the family '{config_class.model_type}'; leave --task out, or name another."
        )
    return auto_class
