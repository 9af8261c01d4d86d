"""What a source holds: texts, labelled examples, images."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError
from .config import DataConfig, first_line, of_split
from .sources import open_documents


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled text or image."""

    label: int | str
    """The class, as the source spells it."""
    text: str | None = None
    """The text, where the column holds text."""
    image: Any = None
    """A PIL image, where the column holds images."""


def check_source(config: DataConfig) -> None:
    """Open a source and read its first document, so that a wrong name, column or split is found before a model is loaded.

    Raises:
        DataError: as `read_texts` and the others would, as far as the first document shows it.
    """
    if next(open_documents(replace(config, seed=None), (config.column,), images=True), None) is None:
        raise DataError(f"'{config.data}' has no data{of_split(config)}.")


def read_texts(config: DataConfig) -> Iterator[str]:
    """The documents of a source, one string each, lazily; the source itself is checked at once.

    Empty documents are left out. One text file above 16 MiB comes as several documents, cut at line ends.

    Raises:
        DataError: missing, empty, binary, unreadable, no such column or split; at the call where opening shows it, else while iterating.
    """
    documents = open_documents(config, (config.column,))

    def texts() -> Iterator[str]:
        found = False
        for name, (value,) in documents:
            text = _as_text(value, config, name)
            if text.strip():
                found = True
                yield text
        if not found:
            raise DataError(f"'{config.data}' has no text{of_split(config)}: it is empty, or every document is.")

    return texts()


def read_examples(config: DataConfig) -> Iterator[Example]:
    """Labelled texts or images of a source, lazily.

    Images come from a folder of class folders (the folder's name is the label) or from a column of encoded bytes; Pillow is imported then.

    Raises:
        DataError: as in `read_texts`; also a row without a label.
    """
    documents = open_documents(config, (config.column, config.label_column))

    def examples() -> Iterator[Example]:
        found = False
        for name, (value, label) in documents:
            label = _as_label(label, config, name)
            found = True
            if isinstance(value, str):
                yield Example(label=label, text=value)
            else:
                yield Example(label=label, image=_as_image(value, config, name))
        if not found:
            raise DataError(f"'{config.data}' has no example{of_split(config)}.")

    return examples()


def read_labels(config: DataConfig) -> Iterator[int | str]:
    """The label of every example of a source, lazily; nothing is decoded.

    Raises:
        DataError: as in `read_examples`.
    """
    documents = open_documents(config, (config.column, config.label_column))
    return (_as_label(label, config, name) for name, (_, label) in documents)


def read_images(config: DataConfig) -> Iterator[Any]:
    """PIL images of a source without their labels, lazily: a folder of images, or a column of encoded bytes.

    Raises:
        DataError: as in `read_texts`; also a row that holds no image.
    """
    documents = open_documents(config, (config.column,), images=True)

    def images() -> Iterator[Any]:
        found = False
        for name, (value,) in documents:
            found = True
            yield _as_image(value, config, name)
        if not found:
            raise DataError(f"'{config.data}' has no image{of_split(config)}.")

    return images()


def _as_label(label: Any, config: DataConfig, name: str) -> int | str:
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(f"'{config.data}', {name}: label {label!r} is neither an integer nor a string.")
    return label


def _as_text(value: Any, config: DataConfig, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"'{config.data}', {name}: column '{config.column}' holds {type(value).__name__}, not text; name another column.")
    return value


def decode_image(raw: bytes, *, what: str) -> Any:
    """The PIL image of an encoded one; ``what`` it is, in errors.

    Raises:
        DataError: not a readable image, or Pillow is missing.
    """
    image = _pillow(what)
    try:
        decoded = image.open(io.BytesIO(raw))
        decoded.load()
    except (image.UnidentifiedImageError, OSError) as error:
        raise DataError(f"{what}: not a readable image ({first_line(error)}).") from None
    return decoded


def _pillow(what: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"reading {what} needs Pillow; pip install 'moeify[data]'.") from None
    return Image


def _as_image(value: Any, config: DataConfig, name: str) -> Any:
    if isinstance(value, _pillow(f"the images of '{config.data}'").Image):
        return value
    raw = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(raw, bytes):
        raise DataError(f"'{config.data}', {name}: column '{config.column}' holds {type(value).__name__}, neither text nor image bytes.")
    return decode_image(raw, what=f"'{config.data}', {name}")
