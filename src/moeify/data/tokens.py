"""Texts as tokens: windows of consecutive ones, and pieces of texts that fit a model's input.

Letters: S window length, W windows.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._progress import NO_PROGRESS, Progress
from ..errors import DataError
from .config import DataConfig, of_split
from .read import read_texts

_ENCODE_CHARS = 1 << 18  # longest piece that the tokenizer sees at once


class Tokenizer(Protocol):
    """A transformers tokenizer, or any callable from a text to its token ids."""

    def __call__(self, text: str) -> Any:
        """Token ids of one text."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: a vocabulary of 256, no special tokens, nothing to download."""

    vocab_size = 256
    eos_token_id = None

    def __call__(self, text: str) -> list[int]:
        """The bytes of ``text``, each in [0, 255]."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")


class TooShortError(DataError):
    """The text gives less than one window."""


def text_windows(config: DataConfig, tokenizer: Tokenizer, *, progress: Progress = NO_PROGRESS) -> Tensor:
    """`token_windows` of `read_texts`, with the sizes of the config; the error of a too short source names it."""
    try:
        return token_windows(
            read_texts(config), tokenizer, window=config.window, max_tokens=config.max_tokens, separator=config.separator, progress=progress
        )
    except TooShortError as error:
        raise TooShortError(f"'{config.data}'{of_split(config)}: {error}") from None


def token_windows(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    window: int,
    max_tokens: int | None = None,
    separator: str | None = None,
    progress: Progress = NO_PROGRESS,
) -> Tensor:
    """Fixed windows of consecutive tokens: the same tokens for every model state that is compared.

    Documents are encoded without special tokens and joined in order, with the tokenizer's end-of-text token between two of them where there
    is one. So a corpus in one row (WikiText-2 raw) gives exactly the ids of its plain text, the usual basis of perplexities; read as single
    lines it needs ``separator="\\n\\n"``, which is inserted as text. The rest that does not fill a window is dropped.

    Args:
        texts: documents; consumed only as far as ``max_tokens`` needs.
        tokenizer: transformers tokenizer, or a callable text -> ids.
        window: tokens per window, >= 2.
        max_tokens: most tokens, rounded down to whole windows; None for all.
        separator: text between documents instead of the end-of-text token.
        progress: told the tokens made; the total is 0 where it is not known.

    Returns:
        int64 windows_WS, W >= 1.

    Raises:
        DataError: less than one window of text (`TooShortError`), or ``max_tokens`` below ``window``.

    Cost: pieces of about 256 Ki characters are encoded at once. A piece ends only where encoding its surroundings whole and cut gives the
    same ids, so cutting never changes a token; text without such a place is encoded whole.
    """
    if max_tokens is not None and max_tokens < window:
        raise DataError(f"max_tokens {max_tokens} is less than one window of {window}; raise max_tokens or lower the window.")
    limit = None if max_tokens is None else max_tokens // window * window
    end_id = None if separator is not None else getattr(tokenizer, "eos_token_id", None)
    ids = array("q")
    with progress.task("tokenise", total=limit or 0) as task:
        for chunk in token_chunks(texts, tokenizer, limit=limit, separator=separator, end_id=end_id):
            ids.extend(chunk)
            task.advance(len(chunk))
    count = len(ids) // window
    if count == 0:
        raise TooShortError(f"{len(ids)} tokens are less than one window of {window}; give more text or a smaller window.")
    return torch.frombuffer(ids, dtype=torch.int64)[: count * window].clone().view(count, window)


def token_chunks(
    texts: Iterable[str], tokenizer: Tokenizer, *, limit: int | None = None, separator: str | None = None, end_id: int | None = None
) -> Iterator["array[int]"]:
    """The ids of texts that are joined in order, about a million characters at once; nothing is kept.

    Args:
        texts: documents; consumed only as far as ``limit`` needs.
        tokenizer: transformers tokenizer, or a callable text -> ids.
        limit: most ids; None for all.
        separator: text between two documents.
        end_id: token between two documents; not together with a separator.
    """
    encode = _encoder(tokenizer)
    documents: Iterable[Iterable[str]] = ([text] for text in texts) if separator is None else [_interleave(texts, separator)]
    pieces = ((piece, i == 0) for chunks in documents for i, piece in enumerate(_pieces(chunks, encode)))
    count, exhausted = 0, False
    while not exhausted and (limit is None or count < limit):
        # text rarely has 8 characters a token: mostly one batch is enough, and little is encoded in vain
        batch, exhausted = _take(pieces, 4 * _ENCODE_CHARS if limit is None else min(4 * _ENCODE_CHARS, 8 * (limit - count)))
        chunk = array("q")
        for (_, starts_document), piece_ids in zip(batch, encode([piece for piece, _ in batch]), strict=True):
            if starts_document and (count or chunk) and end_id is not None:
                chunk.append(end_id)
            chunk.extend(piece_ids)
        chunk = chunk if limit is None else chunk[: limit - count]
        count += len(chunk)
        yield chunk


def text_pieces(texts: Iterable[str], tokenizer: Tokenizer, *, max_length: int) -> Iterator[str]:
    """Each text in consecutive pieces of at most ``max_length`` tokens, special ones included, cut at white space where there is some.

    Blank pieces are left out; nothing else is, whatever a token is worth: the length of a piece follows the one before it.

    Args:
        texts: documents of any length.
        tokenizer: transformers tokenizer, or a callable text -> ids.
        max_length: most tokens, at least 1 more than the tokenizer's special ones.

    Raises:
        DataError: a single character is more than ``max_length`` tokens.

    Cost: one encoding to count each piece, more where the length of a token changes within the text.
    """
    num_chars = float(4 * max_length)  # English: four characters a token
    for text in texts:
        start = 0
        while start < len(text):
            stop = _word_end(text, start, start + max(1, int(num_chars)))
            while (count := len(encode_example(tokenizer, text[start:stop]))) > max_length:
                if stop == start + 1:
                    raise DataError(f"the character {text[start]!r} is more than {max_length} tokens with its special tokens.")
                num_chars = max(1.0, 0.95 * (stop - start) * max_length / count)
                stop = min(stop - 1, _word_end(text, start, start + int(num_chars)))
            if text[start:stop].strip():
                yield text[start:stop]
                num_chars = 0.95 * (stop - start) * max_length / count
            start = stop


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text; none for a plain callable."""
    if not _is_transformers(tokenizer):
        return [], []
    whole, plain = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def encode_example(tokenizer: Any, text: str, *, max_length: int | None = None) -> list[int]:
    """ids with special tokens, cut to ``max_length``."""
    if _is_transformers(tokenizer):
        # verbose=False: nothing is said of a text that is longer than the model's context
        return list(tokenizer(text, truncation=max_length is not None, max_length=max_length, verbose=False)["input_ids"])
    return list(tokenizer(text))[:max_length]


def encode_examples(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """`encode_example` of many texts, at once where the tokenizer can."""
    if _is_transformers(tokenizer) and texts:
        return list(tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"])
    return [encode_example(tokenizer, text, max_length=max_length) for text in texts]


def _is_transformers(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "convert_ids_to_tokens")


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """texts -> ids without special tokens."""
    if _is_transformers(tokenizer):
        # verbose=False: pieces are longer than the model's context on purpose
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return lambda texts: [list(tokenizer(text)) for text in texts]


def _word_end(text: str, start: int, stop: int) -> int:
    """``stop``, or the white space before it where there is some after ``start``; the end of the text where that comes first."""
    if stop >= len(text):
        return len(text)
    space = max(text.rfind(c, start + 1, stop + 1) for c in " \n\t")
    return space if space > 0 else stop


def _interleave(texts: Iterable[str], separator: str) -> Iterator[str]:
    for i, text in enumerate(texts):
        yield separator + text if i else text


def _pieces(chunks: Iterable[str], encode: Callable[[list[str]], list[list[int]]]) -> Iterator[str]:
    """Cut the concatenation of ``chunks`` where cutting does not change the ids."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > 2 * _ENCODE_CHARS:
            cut = _safe_cut(rest, start, encode)
            if cut is None:
                break
            yield rest[start : cut[0]]
            start = cut[1]
        rest = rest[start:]
    if rest:
        yield rest


def _safe_cut(text: str, start: int, encode: Callable[[list[str]], list[list[int]]]) -> tuple[int, int] | None:
    """(end of this piece, start of the next) at a blank between two words after ``start + _ENCODE_CHARS``, proven by encoding it both ways.

    The blank stays with the next word (byte-level BPE, WordPiece) or is dropped (SentencePiece, which puts one before every text).
    """
    context = 200
    near = re.compile(r"(?<=\S)\s(?=\S)").finditer(text, start + _ENCODE_CHARS, start + _ENCODE_CHARS + 4096)
    for match, _ in zip(near, range(16), strict=False):
        at = match.start()
        left, right = text[max(start, at - context) : at], text[at : at + context]
        whole, first, kept, dropped = encode([left + right, left, right, right[1:]])
        if whole == first + kept:
            return at, at
        if whole == first + dropped:
            return at, at + 1
    return None


def _take(pieces: Iterator[tuple[str, bool]], num_chars: int) -> tuple[list[tuple[str, bool]], bool]:
    """The next pieces of about ``num_chars`` characters together, at least one; and whether there are no more."""
    batch: list[tuple[str, bool]] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece[0])
        if chars >= num_chars:
            return batch, False
    return batch, True
