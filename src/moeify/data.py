"""Text, labelled text and images from files, folders, the Hub and Python itself, as windows and batches.

Letters: B batch, S sequence (or window) length, W windows.
"""

import difflib
import hashlib
import io
import json
import random
import re
import sysconfig
import tokenize
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ._progress import NO_PROGRESS, Progress
from .errors import DataError

Document = tuple[str, tuple[Any, ...]]
"""Stable name of a document, which decides its split, and the values of the columns that were asked for."""

TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".md", ".rst", ".tex", ".raw", ".tokens", ".html", ".py"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
BUILTINS = ("builtin:pydoc", "builtin:stdlib")
VALIDATION_SHARE = 0.1
"""Share of the documents that the stable hash sends to the validation split."""

_SPLIT_ALIASES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLIT_ALIASES)})(?=[-_.]|$)")
_BLOCK_CHARS = 1 << 24  # a longer text file comes as several texts
_SPLIT_PIECE_CHARS = 1 << 16  # unit in which one text file is dealt to train and validation
_ENCODE_CHARS = 1 << 18  # longest piece that the tokenizer sees at once
_SHUFFLE_BUFFER = 256


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
    """Shuffle files and documents by this seed; none keeps the source's order."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        if not self.data:
            raise DataError("data is empty; name a file, a folder, a Hub data set id or one of " + ", ".join(BUILTINS) + ".")
        if self.window < 2:
            raise DataError(f"window must be at least 2 tokens, got {self.window}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"max_tokens must be at least 1, got {self.max_tokens}.")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled text or image."""

    label: int | str
    """The class, as the source spells it."""
    text: str | None = None
    """The text, where the column holds text."""
    image: Any = None
    """A PIL image, where the column holds images."""


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


def check_source(config: DataConfig) -> None:
    """Open a source and read its first document, so that a wrong name, column or split is found before a model is loaded.

    Raises:
        DataError: as `read_texts` and the others would, as far as the first document shows it.
    """
    if next(_open(replace(config, seed=None), (config.column,), images=True), None) is None:
        raise DataError(f"'{config.data}' has no data{_of_split(config)}.")


def read_texts(config: DataConfig) -> Iterator[str]:
    """The documents of a source, one string each, lazily; the source itself is checked at once.

    Empty documents are left out. One text file above 16 MiB comes as several documents, cut at line ends.

    Raises:
        DataError: missing, empty, binary, unreadable, no such column or split; at the call where opening shows it, else while iterating.
    """
    documents = _open(config, (config.column,))

    def texts() -> Iterator[str]:
        found = False
        for name, (value,) in documents:
            text = _as_text(value, config, name)
            if text.strip():
                found = True
                yield text
        if not found:
            raise DataError(f"'{config.data}' has no text{_of_split(config)}: it is empty, or every document is.")

    return texts()


def read_examples(config: DataConfig) -> Iterator[Example]:
    """Labelled texts or images of a source, lazily.

    Images come from a folder of class folders (the folder's name is the label) or from a column of encoded bytes; Pillow is imported then.

    Raises:
        DataError: as in `read_texts`; also a row without a label.
    """
    documents = _open(config, (config.column, config.label_column))

    def examples() -> Iterator[Example]:
        found = False
        for name, (value, label) in documents:
            if isinstance(label, bool) or not isinstance(label, (int, str)):
                raise DataError(f"'{config.data}', {name}: label {label!r} is neither an integer nor a string.")
            found = True
            if isinstance(value, str):
                yield Example(label=label, text=value)
            else:
                yield Example(label=label, image=_as_image(value, config, name))
        if not found:
            raise DataError(f"'{config.data}' has no example{_of_split(config)}.")

    return examples()


def read_images(config: DataConfig) -> Iterator[Any]:
    """PIL images of a source without their labels, lazily: a folder of images, or a column of encoded bytes.

    Raises:
        DataError: as in `read_texts`; also a row that holds no image.
    """
    documents = _open(config, (config.column,), images=True)

    def images() -> Iterator[Any]:
        found = False
        for name, (value,) in documents:
            found = True
            yield _as_image(value, config, name)
        if not found:
            raise DataError(f"'{config.data}' has no image{_of_split(config)}.")

    return images()


def text_windows(config: DataConfig, tokenizer: Tokenizer, *, progress: Progress = NO_PROGRESS) -> Tensor:
    """`token_windows` of `read_texts`, with the sizes of the config; the error of a too short source names it."""
    try:
        return token_windows(
            read_texts(config), tokenizer, window=config.window, max_tokens=config.max_tokens, separator=config.separator, progress=progress
        )
    except TooShortError as error:
        raise TooShortError(f"'{config.data}'{_of_split(config)}: {error}") from None


class TooShortError(DataError):
    """The text gives less than one window."""


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
    encode = _encoder(tokenizer)
    eos = None if separator is not None else getattr(tokenizer, "eos_token_id", None)
    documents: Iterable[Iterable[str]] = ([text] for text in texts) if separator is None else [_interleave(texts, separator)]
    pieces = ((piece, i == 0) for chunks in documents for i, piece in enumerate(_pieces(chunks, encode)))

    ids = array("q")
    exhausted = False
    with progress.task("tokenise", total=limit or 0) as task:
        while not exhausted and (limit is None or len(ids) < limit):
            before = len(ids)
            # text rarely has 8 characters a token: mostly one batch is enough, and little is encoded in vain
            batch, exhausted = _take(pieces, 4 * _ENCODE_CHARS if limit is None else min(4 * _ENCODE_CHARS, 8 * (limit - before)))
            for (_, starts_document), piece_ids in zip(batch, encode([piece for piece, _ in batch]), strict=True):
                if starts_document and ids and eos is not None:
                    ids.append(eos)
                ids.extend(piece_ids)
            task.advance((len(ids) if limit is None else min(len(ids), limit)) - before)
    count = min(len(ids), limit or len(ids)) // window
    if count == 0:
        raise TooShortError(f"{len(ids)} tokens are less than one window of {window}; give more text or a smaller window.")
    return torch.frombuffer(ids, dtype=torch.int64)[: count * window].clone().view(count, window)


def lm_batches(windows_WS: Tensor, *, batch_size: int, seed: int | None = None) -> list[dict[str, Tensor]]:
    """Windows as batches of ``input_ids``, in order or shuffled by ``seed``; the last batch may be smaller."""
    if seed is not None:
        windows_WS = windows_WS[torch.randperm(len(windows_WS), generator=torch.Generator().manual_seed(seed))]
    return [{"input_ids": batch_BS} for batch_BS in windows_WS.split(batch_size)]


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
            while (count := len(_encode_example(tokenizer, text[start:stop]))) > max_length:
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


def seq2seq_batches(
    windows_WS: Tensor, *, batch_size: int, start_id: int, specials: tuple[list[int], list[int]] = ([], [])
) -> list[dict[str, Tensor]]:
    """Windows for encoder-decoders: the encoder reads the first half of each, the decoder continues with the second.

    Args:
        windows_WS: windows of text.
        batch_size: windows per batch; the last batch may be smaller.
        start_id: token that the decoder starts with; each position then predicts the next token of ``decoder_input_ids``.
        specials: tokens around the encoder's text, from `special_ids`.
    """
    num_windows, half = len(windows_WS), windows_WS.shape[1] // 2
    before, after = (torch.tensor(ids, dtype=torch.int64).expand(num_windows, -1) for ids in specials)
    encoder_WS = torch.cat([before, windows_WS[:, :half], after], dim=1)
    decoder_WS = torch.cat([torch.full((num_windows, 1), start_id), windows_WS[:, half:]], dim=1)
    pairs = zip(encoder_WS.split(batch_size), decoder_WS.split(batch_size), strict=True)
    return [{"input_ids": encoder_BS, "decoder_input_ids": decoder_BS} for encoder_BS, decoder_BS in pairs]


def padded_text_batches(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    batch_size: int,
    labels: Iterable[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Short texts for encoders: ``input_ids`` with special tokens, and ``attention_mask``, padded on the right to the longest of the batch.

    Args:
        texts: one example each.
        tokenizer: transformers tokenizer, or a callable text -> ids (padded with 0).
        max_length: longest example in tokens; longer ones are cut.
        batch_size: examples per batch; the last may be smaller.
        labels: class ids, one per text; added as ``labels``.

    Raises:
        DataError: no text at all.
        ValueError: labels and texts of different number.
    """
    pad_id = next((i for i in (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")) if i is not None), 0)
    pairs = zip(texts, repeat(0), strict=False) if labels is None else zip(texts, labels, strict=True)
    empty = True
    for group in _groups(pairs, batch_size):
        empty = False
        rows = [_encode_example(tokenizer, text, max_length=max_length) for text, _ in group]
        length = max([1, *map(len, rows)])
        ids_BS = torch.full((len(rows), length), pad_id, dtype=torch.int64)
        mask_BS = torch.zeros((len(rows), length), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids_BS[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask_BS[i, : len(row)] = 1
        batch = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if labels is not None:
            batch["labels"] = torch.tensor([label for _, label in group])
        yield batch
    if empty:
        raise DataError("there is no text to make a batch of.")


def image_batches(
    examples: Iterable[Example],
    processor: Callable[..., Any],
    *,
    batch_size: int,
    class_ids: Mapping[int | str, int] | None = None,
    mode: str = "RGB",
) -> Iterator[dict[str, Tensor]]:
    """Images as ``pixel_values`` and ``labels``.

    Args:
        examples: from `read_examples`.
        processor: transformers image processor, or a callable from a PIL image to a (C, H, W) tensor.
        batch_size: images per batch; the last may be smaller.
        class_ids: label -> class id (`class_ids`); None takes integer labels as they are.
        mode: PIL mode that every image is converted to first.
    """
    for group in _groups(examples, batch_size):
        images = [example.image.convert(mode) for example in group]
        if hasattr(processor, "image_mean") or hasattr(processor, "preprocess"):
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.stack([processor(image) for image in images])
        labels = [_class_id(example.label, class_ids) for example in group]
        yield {"pixel_values": pixels, "labels": torch.tensor(labels)}


def class_ids(labels: Iterable[int | str], *, known: Mapping[str, int] | None = None) -> dict[int | str, int]:
    """Class id of each label that occurs: integers are their own, names are numbered in sorted order or as ``known``, a head's label2id.

    Raises:
        DataError: a name that ``known`` lacks; integers mixed with names.
    """
    distinct = set(labels)
    if all(isinstance(label, int) for label in distinct):
        return {label: int(label) for label in sorted(distinct, key=int)}
    if not all(isinstance(label, str) for label in distinct):
        raise DataError(f"labels mix integers and names: {sorted(map(str, distinct))[:6]}.")
    names = sorted(map(str, distinct))
    if known is None:
        return {name: i for i, name in enumerate(names)}
    for name in names:
        if name not in known:
            raise DataError(f"label {name!r} is not a class of the model's head{_nearest(name, known)}")
    return {name: known[name] for name in names}


def is_validation(name: str) -> bool:
    """Whether the stable hash deals the document of this name to validation; the same on every Python and machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < VALIDATION_SHARE * 2**64


def _open(config: DataConfig, columns: tuple[str, ...], *, images: bool = False) -> Iterator[Document]:
    """Documents of the split that the config asks for, with the values of ``columns``; a source of images needs labels or ``images``."""
    path = Path(config.data).expanduser()
    if config.data.startswith("builtin:"):
        documents, has_split = _builtin(config, columns), False
    elif path.exists():
        documents, has_split = _files(config, path, columns, images=images)
    elif _looks_like_path(config.data):
        raise DataError(f"no such file or folder: '{config.data}'{_near_file(path)}")
    else:
        documents, has_split = _hub(config, columns), True
    if config.split != "all" and not has_split:
        if config.split not in ("train", "validation"):
            raise DataError(
                f"'{config.data}' has no split {config.split!r}: without splits of its own it has train and validation, or all."
            )
        wanted = config.split == "validation"
        documents = (document for document in documents if is_validation(document[0]) == wanted)
    return documents if config.seed is None else _shuffled(documents, config.seed)


def _builtin(config: DataConfig, columns: tuple[str, ...]) -> Iterator[Document]:
    if config.data not in BUILTINS:
        raise DataError(f"unknown corpus '{config.data}'{_nearest(config.data, BUILTINS)}")
    if columns != (config.column,):
        raise DataError(f"'{config.data}' has no labels; name labelled data.")
    if config.data == "builtin:pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError("this Python was installed without pydoc_data.topics; use builtin:stdlib or a file.") from None
        return ((name, (topics[name],)) for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(f"this Python has no standard library sources at '{root}'; use builtin:pydoc or a file.")
    return ((name, (_source_text(root / name),)) for name in _stdlib_names(root))


def _stdlib_names(root: Path) -> list[str]:
    """The library's own modules: no tests, no installed packages, nothing generated for the machine."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(p.as_posix() for p in found if skipped.isdisjoint(p.parts) and not p.name.startswith(("_sysconfigdata", "sitecustomize")))


def _source_text(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _files(config: DataConfig, path: Path, columns: tuple[str, ...], *, images: bool) -> tuple[Iterator[Document], bool]:
    """Documents of a file or folder, and whether its files are named by split."""
    kind, files = _list_files(config, path)
    own_splits = {name: split for name in files if (split := _split_of(name)) is not None}
    if len(own_splits) < len(files) and not {"train", "validation"} & set(own_splits.values()):
        own_splits = {}  # 'test_io.py' among other sources is not a split
    if config.split != "all" and own_splits:
        wanted = _SPLIT_ALIASES.get(config.split, config.split)
        files = {name: file for name, file in files.items() if own_splits.get(name) == wanted}
        if not files:
            raise DataError(f"'{config.data}' has no split {config.split!r}; it has {', '.join(sorted(set(own_splits.values())))}.")
    if config.seed is not None:
        files = dict(random.Random(config.seed).sample(sorted(files.items()), len(files)))
    if kind == "parquet":
        return _parquet(files, columns), bool(own_splits)
    if kind == "jsonl":
        return _jsonl(files, columns), bool(own_splits)
    if kind == "image":
        if columns == (config.column,) and not images:
            raise DataError(f"'{config.data}' holds images, not text.")
        return ((name, (file.read_bytes(), file.parent.name)[: len(columns)]) for name, file in files.items()), bool(own_splits)
    if columns != (config.column,):
        raise DataError(f"'{config.data}' is plain text and has no labels; use .jsonl or .parquet with a label column.")
    return _text_files(files, deal_pieces=path.is_file() and config.split != "all" and not own_splits), bool(own_splits)


def _list_files(config: DataConfig, path: Path) -> tuple[str, dict[str, Path]]:
    """The kind of the source and its files by relative name, sorted.

    In a folder, tables win over text (a data set's README is not data): only .parquet files are read where there are any, else .jsonl, else
    text, else images. Hidden files are ignored.
    """
    if path.is_file():
        kind = _kind(path)
        if kind is None or kind == "image":
            known = ", ".join(sorted(TEXT_SUFFIXES - {""} | {".jsonl", ".parquet"}))
            raise DataError(f"'{config.data}' has the unknown extension '{path.suffix}'; known: {known}. Rename the file or convert it.")
        if path.stat().st_size == 0:
            raise DataError(f"'{config.data}' is empty.")
        return kind, {path.name: path}
    if not path.is_dir():
        raise DataError(f"'{config.data}' is neither a file nor a folder; write the data to a file.")
    by_kind: dict[str | None, dict[str, Path]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            by_kind.setdefault(_kind(file), {})[relative.as_posix()] = file
    for kind in ("parquet", "jsonl", "text", "image"):
        files = {name: file for name, file in by_kind.get(kind, {}).items() if file.stat().st_size}
        if files:
            return kind, _in_turn(files) if kind == "image" else files
    raise DataError(f"folder '{config.data}' has no data: no non-empty text, .jsonl, .parquet or image file in it.")


def _in_turn(files: Mapping[str, Path]) -> dict[str, Path]:
    """One file of each folder after the other: the first images of a folder of classes are of all classes, not of the first one."""
    seen: Counter[Path] = Counter()
    ranks = {}
    for name, file in files.items():
        ranks[name] = seen[file.parent]
        seen[file.parent] += 1
    return {name: files[name] for name in sorted(files, key=lambda name: (ranks[name], name))}


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".jsonl"):
        return suffix[1:]
    if suffix in TEXT_SUFFIXES:
        return "text"
    return "image" if suffix in IMAGE_SUFFIXES else None


def _split_of(name: str) -> str | None:
    """The split that a relative file name says: 'train-00000.parquet', 'validation_tokenised.parquet', 'test/a.txt'."""
    parts = Path(name).parts
    for part in (*parts[:-1], Path(parts[-1]).stem):
        match = _SPLIT_NAME.match(part.lower())
        if match:
            return _SPLIT_ALIASES[match[1]]
    return None


def _text_files(files: Mapping[str, Path], *, deal_pieces: bool) -> Iterator[Document]:
    """One document per file; one file that is to be split is dealt in pieces of 64 Ki characters."""
    size = _SPLIT_PIECE_CHARS if deal_pieces else _BLOCK_CHARS
    for name, path in files.items():
        with _reading(path), path.open(encoding="utf-8-sig") as file:
            index = 0
            while block := file.read(size):
                if not block.endswith("\n"):
                    block += file.readline()
                if "\0" in block:
                    raise DataError(f"'{path}' is binary, not text (it holds NUL bytes); name text, .jsonl or .parquet.")
                yield (f"{name}#{index}" if deal_pieces else name), (block,)
                index += 1


def _jsonl(files: Mapping[str, Path], columns: tuple[str, ...]) -> Iterator[Document]:
    for name, path in files.items():
        with _reading(path), path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{name}:{number}", _json_values(line, f"'{path}' line {number}", columns)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading ``path`` may raise into a `DataError`."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is binary or not UTF-8; convert it to UTF-8 text, .jsonl or .parquet.") from None
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or _first_line(error)}.") from None


def _json_values(line: str, where: str, columns: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}, not an object with columns.")
    _check_columns(row, columns, where)
    return tuple(row[column] for column in columns)


def _parquet(files: Mapping[str, Path], columns: tuple[str, ...]) -> Iterator[Document]:
    """Rows of parquet files in small batches, only the columns that are asked for; every schema is checked first."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"reading '{next(iter(files.values()))}' needs pyarrow; pip install 'moeify[data]'.") from None

    @contextmanager
    def reading(path: Path) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"'{path}' is not a readable parquet file: {_first_line(error)}") from None

    for path in files.values():
        with reading(path):
            names = pq.read_schema(path).names
        _check_columns(names, columns, f"'{path}'")

    def rows() -> Iterator[Document]:
        for name, path in files.items():
            index = 0
            with reading(path), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                    values = [batch.column(column).to_pylist() for column in columns]
                    for row in zip(*values, strict=True):
                        yield f"{name}:{index}", row
                        index += 1

    return rows()


def _hub(config: DataConfig, columns: tuple[str, ...]) -> Iterator[Document]:
    """Rows of a Hub data set, streamed."""
    missing = f"'{config.data}' is no file or folder here, and as a Hub data set "
    try:
        import datasets
    except ImportError:
        raise DataError(missing + "it needs the 'datasets' package; pip install 'moeify[data]'.") from None
    try:
        splits = datasets.load_dataset(config.data, config.subset, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{missing}it could not be opened (offline, or no such id or subset): {_first_line(error)}") from None
    if config.split != "all" and config.split not in splits:
        raise DataError(f"'{config.data}' has no split {config.split!r}{_nearest(config.split, splits)}")
    chosen = splits if config.split == "all" else {config.split: splits[config.split]}

    def rows() -> Iterator[Document]:
        try:
            for split, stream in chosen.items():
                for index, row in enumerate(stream):
                    if index == 0:
                        _check_columns(row, columns, f"'{config.data}'")
                    yield f"{split}:{index}", tuple(row[column] for column in columns)
        except OSError as error:
            raise DataError(f"reading '{config.data}' from the Hub failed: {_first_line(error)}") from None

    return rows()


def _shuffled(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    """Shuffle through a bounded buffer: each document leaves it at a random moment."""
    rng = random.Random(seed)
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) > _SHUFFLE_BUFFER:
            yield buffer.pop(rng.randrange(len(buffer)))
    rng.shuffle(buffer)
    yield from buffer


def _as_text(value: Any, config: DataConfig, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"'{config.data}', {name}: column '{config.column}' holds {type(value).__name__}, not text; name another column.")
    return value


def _as_image(value: Any, config: DataConfig, name: str) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"reading the images of '{config.data}' needs Pillow; pip install pillow.") from None
    if isinstance(value, Image.Image):
        return value
    raw = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(raw, bytes):
        raise DataError(f"'{config.data}', {name}: column '{config.column}' holds {type(value).__name__}, neither text nor image bytes.")
    try:
        image = Image.open(io.BytesIO(raw))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"'{config.data}', {name}: not a readable image ({_first_line(error)}).") from None
    return image


def _check_columns(present: Iterable[str], columns: tuple[str, ...], where: str) -> None:
    present = list(present)
    for column in columns:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise DataError(f"{where} has no column '{column}'; it has {', '.join(map(repr, present)) or 'none'}{hint}")


def _looks_like_path(data: str) -> bool:
    """Whether a name that does not exist was meant as a path: not of the form 'name' or 'owner/name' without a known file extension."""
    suffix = Path(data).suffix.lower()
    return suffix in (TEXT_SUFFIXES - {""}) | IMAGE_SUFFIXES | {".jsonl", ".parquet", ".json", ".csv", ".gz"} or not re.fullmatch(
        r"\w[\w.-]*(/[\w.-]+)?", data
    )


def _near_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean '{path.parent / near[0]}'?" if near else "."


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}."


def _of_split(config: DataConfig) -> str:
    return "" if config.split == "all" else f" in split '{config.split}'"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_transformers(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "convert_ids_to_tokens")


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """texts -> ids without special tokens."""
    if _is_transformers(tokenizer):
        # verbose=False: pieces are longer than the model's context on purpose
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return lambda texts: [list(tokenizer(text)) for text in texts]


def _encode_example(tokenizer: Any, text: str, *, max_length: int | None = None) -> list[int]:
    """ids with special tokens, cut to ``max_length``."""
    if _is_transformers(tokenizer):
        # verbose=False: nothing is said of a text that is longer than the model's context
        return list(tokenizer(text, truncation=max_length is not None, max_length=max_length, verbose=False)["input_ids"])
    return list(tokenizer(text))[:max_length]


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


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _class_id(label: int | str, ids: Mapping[int | str, int] | None) -> int:
    if ids is None:
        if isinstance(label, int):
            return label
        raise DataError(f"label {label!r} is a name; pass class_ids.")
    if label not in ids:
        raise DataError(f"label {label!r} is unknown; known: {', '.join(map(str, ids))}.")
    return ids[label]
