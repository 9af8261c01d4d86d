"""Tokenizers without their models: of bytes, trained on text with the special tokens that a kind of model needs, or loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError, DataError

SPECIALS: Mapping[str, Mapping[str, str]] = {
    "plain": {},
    "causal-lm": {"eos_token": "<|endoftext|>"},
    "masked-lm": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "span-corruption": {"pad_token": "<pad>", "eos_token": "</s>"},
}
"""Special tokens by what a model is trained for; those of span corruption are followed by the sentinels, "plain" has none."""

_AROUND = {"masked-lm": "[CLS] $A [SEP]", "span-corruption": "$A </s>"}


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """A tokenizer that is trained on the training data."""

    kind: Literal["bpe"] = "bpe"
    """Byte-level BPE: any text, and back without loss."""
    vocab_size: int = 4096
    """Tokens, the special ones included."""
    characters: int = 100_000_000
    """Most characters of the data to train on, from its beginning."""

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise ConfigError(f"vocab_size must be at least 300: 256 bytes, special tokens and some merges; got {self.vocab_size}.")
        if self.characters < 1:
            raise ConfigError(f"characters must be at least 1, got {self.characters}.")


def byte_tokenizer(*, context: int) -> Any:
    """A transformers tokenizer of the 256 bytes and nothing else, so that a checkpoint is an ordinary one.

    Args:
        context: longest text of the model, in bytes.
    """
    return byte_level("plain", context=context)


def byte_level(task: str, *, context: int, sentinels: int = 0) -> Any:
    """A transformers tokenizer of the 256 bytes, the special tokens of a task behind them.

    Args:
        task: key of `SPECIALS`.
        context: longest text of the model, in tokens.
        sentinels: number of sentinels, for span corruption.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return _finished(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), task, context=context, sentinels=sentinels, use_regex=False)


def train_tokenizer(config: TokenizerTrainConfig, texts: Iterable[str], task: str, *, context: int, sentinels: int = 0) -> Any:
    """A transformers tokenizer, trained; the same texts give the same one.

    Args:
        config: kind and size.
        texts: documents; consumed only as far as ``config.characters`` needs.
        task, context, sentinels: as in `byte_level`.

    Raises:
        DataError: the text gives fewer tokens than ``vocab_size``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=_specials(task, sentinels),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, config.characters), trainer)
    if (size := tokenizer.get_vocab_size()) < config.vocab_size:
        raise DataError(f"the training data gives {size} different tokens only; set vocab_size ({config.vocab_size}) to that, or less.")
    return _finished(tokenizer, task, context=context, sentinels=sentinels, use_regex=True)


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a folder or of a Hub id, without a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{source}': no tokenizer can be loaded: {' '.join(str(error).split())[:200]}") from error


def _finished(tokenizer: Any, task: str, *, context: int, sentinels: int, use_regex: bool) -> Any:
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_specials(task, sentinels))
    if around := _AROUND.get(task):
        names = [word for word in around.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(n, tokenizer.token_to_id(n)) for n in names]
        )
    extra = {"extra_special_tokens": _sentinels(sentinels)} if sentinels else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **SPECIALS[task], **extra)


def _specials(task: str, sentinels: int) -> list[str]:
    return [*SPECIALS[task].values(), *_sentinels(sentinels)]


def _sentinels(count: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(count)]


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return
