"""What pre-training reads: a tokenizer and files of ids, made once in the folder of the run, for each kind of model."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._config import to_dict
from .._files import sync
from .._progress import NO_PROGRESS, Progress
from ..data import DataConfig, MaskedData, SpanCorruptionData, WindowData, Windows, pack_tokens, read_texts, sentinel_ids, special_ids
from ..errors import CheckpointError, ConfigError, DataError
from ..hf.tokenizer import byte_level, load_tokenizer, train_tokenizer
from ..train.loop import TrainingData
from .content import data_id
from .inputs import positions_of
from .pretrain_recipe import PretrainConfig, TokenizerConfig
from .stages import key_of

_TOKENIZER, _KEY = "tokenizer", "key.txt"
_LEAST_SENTINELS = 100  # as T5's own tokenizers have
_MOST_BYTES_READ = 1 << 30  # of a source, to tell it by its content


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A kind of pre-training."""

    auto_class: str
    """Name of transformers' class that builds the model."""
    needs: tuple[str, ...]
    """Special tokens that a tokenizer must have."""
    text_length: Callable[[PretrainConfig, Any], int]
    """(recipe, tokenizer) -> tokens of text in a sequence."""
    data: Callable[[Windows, Any, PretrainConfig], TrainingData]
    """(windows of such lengths, tokenizer, recipe) -> sequences."""

    def token_fields(self, tokenizer: Any) -> dict[str, Any]:
        """Fields of the model's config that the tokenizer decides."""
        fields = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        if self.auto_class == "AutoModelForSeq2SeqLM":  # T5's config has no beginning of text
            fields = {name: value for name, value in fields.items() if value is not None}
            fields["decoder_start_token_id"] = tokenizer.pad_token_id
        return {"vocab_size": len(tokenizer), **fields}

    def check(self, model: Any, tokenizer: Any, recipe: PretrainConfig) -> None:
        """Refuse, before data is read, a tokenizer or window that the model cannot have.

        Raises:
            ConfigError: fewer embeddings than tokens.
            DataError: special tokens are missing, or the window is longer than the model's positions.
        """
        for name in self.needs:
            if getattr(tokenizer, f"{name}_id", None) is None:
                raise DataError(f"the tokenizer has no {name}, which {recipe.task} needs; take another, 'bytes', or train one.")
        if (size := getattr(model.config, "vocab_size", None)) is not None and size < len(tokenizer):
            raise ConfigError(f"[model] architecture: vocab_size {size} is less than the tokenizer's {len(tokenizer)}; leave it out.")
        limit = positions_of(model)
        if limit is not None and recipe.data.window > limit:
            raise DataError(f"[data] window {recipe.data.window} is more than the {limit} positions of {type(model).__name__}.")
        self.text_length(recipe, tokenizer)


def _whole(recipe: PretrainConfig, _tokenizer: Any) -> int:
    return recipe.data.window


def _without_specials(recipe: PretrainConfig, tokenizer: Any) -> int:
    inner = recipe.data.window - sum(map(len, special_ids(tokenizer)))
    if inner < 2:
        raise DataError(f"[data] window {recipe.data.window} leaves {inner} tokens of text beside the special ones; give more.")
    return inner


def _corrupted(recipe: PretrainConfig, tokenizer: Any) -> int:
    length = recipe.spans.text_length(recipe.data.window)
    sentinel_ids(tokenizer, recipe.spans.spans(length)[1])
    return length


OBJECTIVES: dict[str, Objective] = {
    "causal-lm": Objective(
        auto_class="AutoModelForCausalLM", needs=(), text_length=_whole, data=lambda windows, _tokenizer, _recipe: WindowData(windows)
    ),
    "masked-lm": Objective(
        auto_class="AutoModelForMaskedLM",
        needs=("mask_token",),
        text_length=_without_specials,
        data=lambda windows, tokenizer, recipe: MaskedData(windows, tokenizer, frac=recipe.mask_frac),
    ),
    "span-corruption": Objective(
        auto_class="AutoModelForSeq2SeqLM",
        needs=("eos_token", "pad_token"),
        text_length=_corrupted,
        data=lambda windows, tokenizer, recipe: SpanCorruptionData(windows, tokenizer, recipe.spans),
    ),
}
"""By the name that recipes use."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data that is ready to be trained on."""

    training: TrainingData
    """Sequences."""
    validation: TrainingData
    """Of the other split."""
    text_length: int
    """Tokens of text in a sequence; special tokens and sentinels are not among them."""
    tokens: int
    """Of the training data."""


def prepare_tokenizer(recipe: PretrainConfig, work: Path, *, run: Mapping[str, Any], progress: Progress = NO_PROGRESS) -> Any:
    """The recipe's tokenizer; one that is trained is kept in ``work``.

    Args:
        recipe: which.
        work: folder of the run.
        run: what tells the run's data from others.
        progress: told of training one.

    Raises:
        CheckpointError: there is none of that name, or it cannot be kept.
        DataError: the data cannot be read, or is too little for the vocabulary.
    """
    chosen, window = recipe.model.tokenizer, recipe.data.window
    needed = 0
    if recipe.task == "span-corruption":
        needed = max(_LEAST_SENTINELS, recipe.spans.spans(recipe.spans.text_length(window))[1])
    if chosen == "bytes":
        return byte_level(recipe.task, context=window, sentinels=needed)
    if not isinstance(chosen, TokenizerConfig):
        return load_tokenizer(chosen)
    key = key_of({"train": to_dict(chosen), "data": run["data"], "task": recipe.task, "sentinels": needed, "window": window})
    folder, temporary = work / _TOKENIZER, work / f"{_TOKENIZER}.new"
    if not (folder / _KEY).is_file() or (folder / _KEY).read_text() != key:
        with progress.task("train the tokenizer", total=1) as task:
            texts = read_texts(replace(recipe.data, seed=None))
            tokenizer = train_tokenizer(chosen.train, texts, recipe.task, context=window, sentinels=needed)
            task.advance(1)
        try:
            for old in (folder, temporary):
                shutil.rmtree(old, ignore_errors=True)
            tokenizer.save_pretrained(temporary)
            (temporary / _KEY).write_text(key)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            temporary.rename(folder)
        except Exception as error:  # tokenizers says "No space left on device" by a bare Exception
            said = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointError(f"cannot write '{folder}': {said}; free space or choose another --out.") from error
    return load_tokenizer(str(folder))


def prepare_data(
    recipe: PretrainConfig, tokenizer: Any, work: Path, *, run: Mapping[str, Any], progress: Progress = NO_PROGRESS
) -> Prepared:
    """Both splits as files of ids in ``work``, and the sequences that the model reads of them.

    Args:
        recipe: what is read.
        tokenizer: from `prepare_tokenizer`.
        work: folder of the run.
        run: what tells the run's data and tokenizer from others.
        progress: told the tokens.

    Raises:
        DataError: as `pack_tokens`.
    """
    objective = OBJECTIVES[recipe.task]
    length = objective.text_length(recipe, tokenizer)
    parts, tokens = {}, {}
    for name, data in (("training", recipe.data), ("validation", recipe.validation)):
        made_from = {"source": run["data" if name == "training" else "validation"], "tokenizer": tokenizer_id(tokenizer)}
        windows = pack_tokens(
            replace(data, window=length),
            tokenizer,
            work / f"tokens-{name}.bin",
            vocab_size=len(tokenizer),
            made_from=made_from,
            progress=progress,
        )
        parts[name], tokens[name] = objective.data(windows, tokenizer, recipe), windows.tokens
    return Prepared(training=parts["training"], validation=parts["validation"], text_length=length, tokens=tokens["training"])


def tokenizer_id(tokenizer: Any) -> str:
    """What tells a tokenizer from others that give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_id(source: DataConfig | TokenizerConfig | str) -> Any:
    """What tells data, or a tokenizer, from others: of files here their content; of more than 1 GiB names, sizes and times of change."""
    if isinstance(source, TokenizerConfig):
        return to_dict(source)
    name = source.data if isinstance(source, DataConfig) else source
    path = Path(name).expanduser()
    files = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    if sum(stat.st_size for _, stat in stats) > _MOST_BYTES_READ:
        found: Any = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    else:
        found = data_id(DataConfig(data=name))["data"]
    if not isinstance(source, DataConfig):
        return found
    # what Python has of itself differs from version to version
    version = list(sys.version_info[:3]) if name.startswith("builtin:") else None
    return {**to_dict(source), "data": found, "python": version}
