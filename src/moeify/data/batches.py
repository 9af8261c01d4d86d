"""What a model takes: windows, padded texts and images as batches of tensors.

Letters: B batch, S sequence (or window) length, W windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .config import nearest
from .read import Example
from .tokens import Tokenizer, encode_example


def lm_batches(windows_WS: Tensor, *, batch_size: int, seed: int | None = None) -> list[dict[str, Tensor]]:
    """Windows as batches of ``input_ids``, in order or shuffled by ``seed``; the last batch may be smaller."""
    if seed is not None:
        windows_WS = windows_WS[torch.randperm(len(windows_WS), generator=torch.Generator().manual_seed(seed))]
    return [{"input_ids": batch_BS} for batch_BS in windows_WS.split(batch_size)]


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
    max_tokens: int | None = None,
    by_length: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Short texts for encoders: ``input_ids`` with special tokens, and ``attention_mask``, padded on the right to the longest of the batch.

    Args:
        texts: one example each.
        tokenizer: transformers tokenizer, or a callable text -> ids (padded with 0).
        max_length: longest example in tokens; longer ones are cut.
        batch_size: examples per batch; the last may be smaller.
        labels: class ids, one per text; added as ``labels``.
        max_tokens: texts are taken up to the one that reaches so many tokens, whatever the batch size; None for all.
        by_length: texts of like length share a batch, so that little is padded (posts in batches of 32: half of the positions otherwise);
            batches come in the order of their first texts. All texts are held as ids at once; else they are read as they are needed.

    Raises:
        DataError: no text at all.
        ValueError: labels and texts of different number.
    """
    pad_id = padding_id(tokenizer)
    pairs = zip(texts, repeat(0), strict=False) if labels is None else zip(texts, labels, strict=True)
    rows = _up_to(((encode_example(tokenizer, text, max_length=max_length), label) for text, label in pairs), max_tokens)
    groups = _groups(rows, batch_size)
    if by_length:
        ordered = sorted(enumerate(rows), key=lambda row: len(row[1][0]))  # stable
        by_first = sorted(_groups(ordered, batch_size), key=lambda group: min(i for i, _ in group))
        groups = iter([row for _, row in group] for group in by_first)
    empty = True
    for group in groups:
        empty = False
        batch = padded([ids for ids, _ in group], pad_id=pad_id)
        if labels is not None:
            batch["labels"] = torch.tensor([label for _, label in group])
        yield batch
    if empty:
        raise DataError("there is no text to make a batch of.")


def _up_to(rows: Iterable[tuple[list[int], int]], max_tokens: int | None) -> Iterator[tuple[list[int], int]]:
    """Rows up to the one that reaches ``max_tokens``."""
    tokens = 0
    for ids, label in rows:
        yield ids, label
        tokens += len(ids)
        if max_tokens is not None and tokens >= max_tokens:
            return


def padding_id(tokenizer: Any) -> int:
    """What short texts are filled up with: padding, the end of text, or 0."""
    return next((i for i in (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")) if i is not None), 0)


def padded(rows: Sequence[Sequence[int] | Tensor], *, pad_id: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of token ids, padded on the right to the longest."""
    length = max([1, *map(len, rows)])
    ids_BS = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_BS = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BS[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        mask_BS[i, : len(row)] = 1
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


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


def class_ids(
    labels: Iterable[int | str], *, known: Mapping[str, int] | None = None, num_classes: int | None = None
) -> dict[int | str, int]:
    """Class id of each label that occurs: integers are their own, names are numbered in sorted order or as ``known``, a head's label2id.

    Raises:
        DataError: a name that ``known`` lacks, or an integer outside of ``num_classes``; integers mixed with names.
    """
    distinct = set(labels)
    if all(isinstance(label, int) for label in distinct):
        for label in sorted(distinct, key=int):
            if num_classes is not None and not 0 <= int(label) < num_classes:
                raise DataError(f"label {label} is not a class of the model's head, whose {num_classes} are 0 to {num_classes - 1}.")
        return {label: int(label) for label in sorted(distinct, key=int)}
    if not all(isinstance(label, str) for label in distinct):
        raise DataError(f"labels mix integers and names: {sorted(map(str, distinct))[:6]}.")
    names = sorted(map(str, distinct))
    if known is None:
        return {name: i for i, name in enumerate(names)}
    for name in names:
        if name not in known:
            raise DataError(f"label {name!r} is not a class of the model's head{nearest(name, known)}")
    return {name: known[name] for name in names}


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
