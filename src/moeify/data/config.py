"""Where data comes from and how much of it is read, and the words that errors about it share."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import DataError

BUILTINS = ("builtin:pydoc", "builtin:stdlib")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where data comes from and how much of it is read."""

    data: str
    """A text, .jsonl or .parquet file, a folder of them, a folder of class folders of images, a Hub data set id, builtin:pydoc or
    builtin:stdlib."""
    column: str = "text"
    """Column that holds the text, or the image."""
    label_column: str = "label"
    """Column that holds the class of labelled data."""
    split: str = "all"
    """Part to read: all, or train, validation, test. Sources without splits of their own are dealt 90 : 10 to train and validation by a
    hash of the document's name."""
    subset: str | None = None
    """Configuration name of a Hub data set that has several."""
    max_tokens: int | None = 100_000
    """Most tokens to use, rounded down to whole windows; none means all."""
    window: int = 1024
    """Tokens per window; windows do not overlap."""
    separator: str | None = None
    """Text between two documents; none means the tokenizer's end-of-text token. WikiText read as single lines wants a blank line."""
    seed: int | None = None
    """Shuffle by this seed; none keeps the source's order. Several tables (.parquet, .jsonl) then take turns, with as many characters each
    until one ends, and long texts are shuffled in pieces, so that any number of tokens is of all of them."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        if not self.data:
            raise DataError("data is empty; name a file, a folder, a Hub data set id or one of " + ", ".join(BUILTINS) + ".")
        if self.window < 2:
            raise DataError(f"window must be at least 2 tokens, got {self.window}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"max_tokens must be at least 1, got {self.max_tokens}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """End of a message about an unknown word: the known one most like it, or all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}."


def of_split(config: DataConfig) -> str:
    """Which part of the data a message is about; empty for all of it."""
    return "" if config.split == "all" else f" in split '{config.split}'"


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
