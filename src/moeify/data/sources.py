"""Documents of files, folders, the Hub and Python itself, as the values of the columns that are asked for, split and shuffled."""

import difflib
import hashlib
import json
import random
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from .config import BUILTINS, DataConfig, first_line, nearest

Document = tuple[str, tuple[Any, ...]]
"""Stable name of a document, which decides its split, and the values of the columns that were asked for."""
TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".md", ".rst", ".tex", ".raw", ".tokens", ".html", ".py"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
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
_SHUFFLE_BUFFER = 256
_SHUFFLE_PIECE_CHARS = 1 << 14  # a longer text is shuffled in pieces: a book must not be all that a small budget of tokens reads
_OPEN_AT_ONCE = 16  # tables that take turns; others wait until one is read


def open_documents(config: DataConfig, columns: tuple[str, ...], *, images: bool = False) -> Iterator[Document]:
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
    if config.seed is None:
        return documents
    return _shuffled(_in_pieces(documents) if columns == (config.column,) else documents, config.seed)


def is_validation(name: str) -> bool:
    """Whether the stable hash deals the document of this name to validation; the same on every Python and machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < VALIDATION_SHARE * 2**64


def _builtin(config: DataConfig, columns: tuple[str, ...]) -> Iterator[Document]:
    if config.data not in BUILTINS:
        raise DataError(f"unknown corpus '{config.data}'{nearest(config.data, BUILTINS)}")
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
    if kind in ("parquet", "jsonl"):
        read = _parquet if kind == "parquet" else _jsonl
        if config.seed is None:
            return read(files, columns), bool(own_splits)
        tables = [read({name: file}, columns) for name, file in files.items()]
        return _dealt([_in_pieces(table) for table in tables] if columns == (config.column,) else tables), bool(own_splits)
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
        raise DataError(f"cannot read '{path}': {error.strerror or first_line(error)}.") from None


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
            raise DataError(f"'{path}' is not a readable parquet file: {first_line(error)}") from None

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
        raise DataError(f"{missing}it could not be opened (offline, or no such id or subset): {first_line(error)}") from None
    if config.split != "all" and config.split not in splits:
        raise DataError(f"'{config.data}' has no split {config.split!r}{nearest(config.split, splits)}")
    chosen = splits if config.split == "all" else {config.split: splits[config.split]}

    def rows() -> Iterator[Document]:
        try:
            for split, stream in chosen.items():
                for index, row in enumerate(stream):
                    if index == 0:
                        _check_columns(row, columns, f"'{config.data}'")
                    yield f"{split}:{index}", tuple(row[column] for column in columns)
        except OSError as error:
            raise DataError(f"reading '{config.data}' from the Hub failed: {first_line(error)}") from None

    return rows()


def _dealt(tables: Iterable[Iterator[Document]]) -> Iterator[Document]:
    """Documents of several tables in turn, from each as many characters as from any other until it ends."""
    waiting = iter(tables)
    given: dict[Iterator[Document], int] = {}
    while True:
        for table in islice(waiting, _OPEN_AT_ONCE - len(given)):
            given[table] = min(given.values(), default=0)
        if not given:
            return
        table = min(given, key=given.__getitem__)
        document = next(table, None)
        if document is None:
            del given[table]
            continue
        given[table] += 1 + sum(len(value) for value in document[1] if isinstance(value, (str, bytes)))
        yield document


def _in_pieces(documents: Iterable[Document]) -> Iterator[Document]:
    """Long texts cut at line ends; a piece has its document's name, so that all of it is dealt to one split."""
    for name, values in documents:
        text = values[0]
        if not isinstance(text, str):
            yield name, values
            continue
        start = 0
        while (line_end := text.find("\n", start + _SHUFFLE_PIECE_CHARS)) >= 0:
            yield name, (text[start : line_end + 1],)
            start = line_end + 1
        if start < len(text) or not text:
            yield name, (text[start:],)


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
