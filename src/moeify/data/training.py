"""What training reads: sequences with random access, so that a resumed run needs nothing but the number of its step.

Each class has ``len`` and ``batch(rows, generator=...)``, the keyword arguments of the model with its labels; the generator draws masks and
augmentation, nothing else.

Letters: B batch, S sequence (or window) length, W windows, N examples, C channels, H height, W width of an image.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, DataError
from .batches import class_ids, padded, padding_id
from .read import Example
from .tokens import Tokenizer, encode_examples, special_ids

_GROUP = 256  # texts or images that the tokenizer or processor sees at once


class Windows(Protocol):
    """Windows of token ids (W, S): a tensor, or a file."""

    @property
    def shape(self) -> Sequence[int]:
        """(W, S)."""

    def __len__(self) -> int:
        """W."""

    def __getitem__(self, rows_B: Tensor, /) -> Tensor:
        """(B, S), int64."""


class WindowData:
    """Windows of text for causal language models.

    Args:
        windows_WS: from `text_windows`, or `PackedWindows`.
    """

    def __init__(self, windows_WS: Windows) -> None:
        self._windows_WS = windows_WS

    def __len__(self) -> int:
        return len(self._windows_WS)

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, the same; the model shifts them."""
        ids_BS = self._windows_WS[torch.as_tensor(rows)]
        return {"input_ids": ids_BS, "labels": ids_BS}


class MaskedData:
    """Windows of text for masked language models, masked anew whenever they are asked for.

    Of the tokens that are not special each is predicted with probability ``frac``, and at least one a window. 80 % of those are shown
    as the mask token, 10 % as any token, 10 % as they are.

    Args:
        windows_WS: from `text_windows`, or `PackedWindows`, without special tokens; they are put around each window.
        tokenizer: transformers tokenizer with a mask token.
        frac: share of the tokens to predict, in (0, 1].

    Raises:
        DataError: the tokenizer has no mask token.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1 and appendix A.1.
    """

    def __init__(self, windows_WS: Windows, tokenizer: Any, *, frac: float = 0.15) -> None:
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise DataError(
                f"the tokenizer ({type(tokenizer).__name__}) has no mask token, so no masked language model can be trained on it."
            )
        if not 0 < frac <= 1:
            raise ConfigError(f"frac must be in (0, 1], got {frac}.")
        self._before, self._after = (torch.tensor(ids, dtype=torch.int64) for ids in special_ids(tokenizer))
        self._windows_WS = windows_WS
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self._mask_id, self._vocab_size, self._frac = int(mask_id), len(tokenizer), frac

    def __len__(self) -> int:
        return len(self._windows_WS)

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """``input_ids`` with masks, ``attention_mask``, and ``labels``: -100 but at the positions to predict."""
        ids_BS = _between(self._before, self._windows_WS[torch.as_tensor(rows)], self._after)
        draw_BS = torch.rand(ids_BS.shape, generator=generator).masked_fill(torch.isin(ids_BS, self._special), 2.0)
        # A window without a label has no mean loss: the one with the smallest draw is always predicted, unless all are special.
        chosen_BS = (draw_BS < self._frac) | ((draw_BS == draw_BS.amin(1, keepdim=True)) & (draw_BS < 2))
        shown_BS = torch.rand(ids_BS.shape, generator=generator)
        other_BS = torch.randint(self._vocab_size, ids_BS.shape, generator=generator)
        masked_BS = torch.where(chosen_BS & (shown_BS < 0.8), self._mask_id, ids_BS)
        masked_BS = torch.where(chosen_BS & (shown_BS >= 0.9), other_BS, masked_BS)
        labels_BS = ids_BS.masked_fill(~chosen_BS, -100)
        return {"input_ids": masked_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """How text is corrupted for encoder-decoders."""

    noise_frac: float = 0.15
    """Share of the tokens that the encoder does not see, in (0, 1)."""
    mean_span: float = 3.0
    """Mean number of tokens in a row that one sentinel stands for, at least 1."""

    def __post_init__(self) -> None:
        if not 0 < self.noise_frac < 1:
            raise ConfigError(f"noise_frac must be in (0, 1), got {self.noise_frac}.")
        if not 1 <= self.mean_span < math.inf:
            raise ConfigError(f"mean_span must be finite and at least 1, got {self.mean_span}.")

    def spans(self, text: int) -> tuple[int, int]:
        """Of a text of so many tokens, at least 2: how many are noise, and in how many spans."""
        noise = min(max(1, round(text * self.noise_frac)), text - 1)
        return noise, min(max(1, round(noise / self.mean_span)), noise, text - noise)

    def lengths(self, text: int) -> tuple[int, int]:
        """Tokens that the encoder reads and that the decoder writes of a text of so many, the end of the sequence included."""
        noise, spans = self.spans(text)
        return text - noise + spans + 1, noise + spans + 1

    def text_length(self, inputs: int) -> int:
        """The longest text of which the encoder reads at most ``inputs`` tokens.

        Raises:
            DataError: not even two tokens fit.
        """
        if self.lengths(2)[0] > inputs:
            raise DataError(f"a window of {inputs} tokens is too short for span corruption; give at least {self.lengths(2)[0]}.")
        text = 2
        while self.lengths(text + 1)[0] <= inputs:
            text += 1
        return text


class SpanCorruptionData:
    """Windows of text for encoder-decoders, corrupted anew whenever they are asked for: all to the same two lengths.

    Spans of noise are drawn at random, of random lengths, none at the beginning. The encoder sees one sentinel in the place of each; the
    decoder is to write each sentinel and what stood there, and the end of the sequence. The model makes the decoder's inputs of the labels.

    Args:
        windows_WS: from `text_windows`, or `PackedWindows`, without special tokens, each of `SpanConfig.text_length` tokens.
        tokenizer: transformers tokenizer with an end of sequence and sentinels ``<extra_id_0>``, ``<extra_id_1>``, ...
        config: how much is noise.

    Raises:
        DataError: the tokenizer has no end of sequence, or too few sentinels.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; the lengths of spans are compositions drawn uniformly.
    """

    def __init__(self, windows_WS: Windows, tokenizer: Any, config: SpanConfig | None = None) -> None:
        self._windows_WS, self._length = windows_WS, int(windows_WS.shape[1])
        self._noise, self._spans = (config or SpanConfig()).spans(self._length)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            raise DataError(f"the tokenizer ({type(tokenizer).__name__}) has no end of sequence, which span corruption needs.")
        self._end = torch.tensor([end])
        self._sentinels = torch.tensor(sentinel_ids(tokenizer, self._spans))

    def __len__(self) -> int:
        return len(self._windows_WS)

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """``input_ids`` with sentinels, and ``labels``."""
        ids_BS = self._windows_WS[torch.as_tensor(rows)]
        is_noise_BS = _noise(len(ids_BS), self._length, num_noise=self._noise, num_spans=self._spans, generator=generator)
        before_BS = torch.nn.functional.pad(is_noise_BS[:, :-1], (1, 0), value=True)  # the text before the first span begins a pair, too
        noise_begins_BS, text_begins_BS = is_noise_BS & ~before_BS, ~is_noise_BS & before_BS
        sentinels_BS = self._sentinels[text_begins_BS.cumsum(1) - 1]  # of the pair of text and noise that a token is in
        nothing = ids_BS.new_empty(0)
        inputs_BI = torch.where(is_noise_BS, sentinels_BS, ids_BS)[~is_noise_BS | noise_begins_BS].view(len(ids_BS), -1)
        labels_BO = torch.where(is_noise_BS, ids_BS, sentinels_BS)[is_noise_BS | text_begins_BS].view(len(ids_BS), -1)
        return {"input_ids": _between(nothing, inputs_BI, self._end), "labels": _between(nothing, labels_BO, self._end)}


def sentinel_ids(tokenizer: Any, count: int) -> list[int]:
    """Ids of the first sentinels of a tokenizer.

    Raises:
        DataError: it has fewer.
    """
    vocabulary = tokenizer.get_vocab()
    names = [f"<extra_id_{i}>" for i in range(count)]
    if missing := next((name for name in names if name not in vocabulary), None):
        raise DataError(f"the tokenizer lacks the sentinel {missing}: windows of this length need {count}; take shorter ones.")
    return [int(vocabulary[name]) for name in names]


class LabelledTextData:
    """Texts with a class each, tokenised once, padded to the longest of a batch.

    Args:
        examples: from `read_examples`, in the order of the rows.
        tokenizer: transformers tokenizer, or a callable text -> ids (padded with 0).
        max_length: longest text in tokens; longer ones are cut.
        max_tokens: texts are taken up to the one that reaches so many tokens; None for all.
        known: class id by name, a head's label2id; None numbers names in sorted order.
        num_classes: of the head; None takes any integer.
        progress: told the texts; their number is not known before.

    Raises:
        DataError: images, no text at all, or a label that the head does not know.

    Cost: 4 bytes a token in memory.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        max_tokens: int | None = None,
        known: Mapping[str, int] | None = None,
        num_classes: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        ids, stops, labels = array("i"), [0], []
        with progress.task("tokenise", total=0) as task:
            for group in _groups(examples):
                for row, example in zip(encode_examples(tokenizer, [_text(e) for e in group], max_length=max_length), group, strict=True):
                    if max_tokens is None or len(ids) < max_tokens:
                        ids.extend(row)
                        stops.append(len(ids))
                        labels.append(example.label)
                task.advance(len(group))
                if max_tokens is not None and len(ids) >= max_tokens:
                    break
        self._labels_N = _numbers(labels, known=known, num_classes=num_classes)
        self._ids, self._stops = torch.tensor(ids, dtype=torch.int32), stops
        self._pad_id = padding_id(tokenizer)

    def __len__(self) -> int:
        return len(self._labels_N)

    @property
    def lengths(self) -> list[int]:
        """Of each text, in tokens."""
        return [stop - start for start, stop in pairwise(self._stops)]

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (padding on the right) and ``labels``."""
        texts = [self._ids[self._stops[row] : self._stops[row + 1]] for row in rows]
        return {**padded(texts, pad_id=self._pad_id), "labels": self._labels_N[torch.as_tensor(rows)]}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied."""

    flip: bool = False
    """Mirror every other image, left to right."""
    crop: int = 0
    """Shift images by up to so many pixels up or down, left or right; the edge is repeated."""

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ConfigError(f"crop must be at least 0 pixels, got {self.crop}.")


class LabelledImageData:
    """Images with a class each, decoded once and kept at the size that the model reads.

    Args:
        examples: from `read_examples`, in the order of the rows.
        processor: transformers image processor, or a callable from a PIL image to a (C, H, W) tensor.
        mode: PIL mode that every image is converted to first; "L" has one channel.
        augment: variations for training; None shows every image as it is.
        max_images: most images; None for all.
        known: as in `LabelledTextData`.
        num_classes: as in `LabelledTextData`.
        progress: told the images; their number is not known before.

    Raises:
        DataError: texts, no image at all, or a label that the head does not know.

    Cost: a byte a pixel and channel where the processor only resizes, scales and normalises, which the first images prove; else four.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        processor: Any,
        *,
        mode: str = "RGB",
        augment: AugmentConfig | None = None,
        max_images: int | None = None,
        known: Mapping[str, int] | None = None,
        num_classes: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        self._augment = augment or AugmentConfig()
        self._groups: list[Tensor] = []
        labels: list[int | str] = []
        finish: _Finish | None = None
        with progress.task("decode images", total=0) as task:
            for group in _groups(islice(examples, max_images)):
                images = [_image(example).convert(mode) for example in group]
                if not self._groups:
                    finish = _Finish.of(processor, images)
                self._groups.append(_pixels(processor, images) if finish is None else finish.raw(images))
                labels += [example.label for example in group]
                task.advance(len(group))
        self._finish = finish
        self._labels_N = _numbers(labels, known=known, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self._labels_N)

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """``pixel_values`` and ``labels``."""
        pixels_BCHW = torch.stack([self._groups[row // _GROUP][row % _GROUP] for row in rows])
        pixels_BCHW = _augmented(pixels_BCHW, self._augment, generator)
        pixels_BCHW = pixels_BCHW if self._finish is None else self._finish(pixels_BCHW)
        return {"pixel_values": pixels_BCHW, "labels": self._labels_N[torch.as_tensor(rows)]}


class _Finish:
    """Scaling and normalisation of uint8 pixels, as the processor does them."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self._mean, self._std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))

    @classmethod
    def of(cls, processor: Any, images: Sequence[Any]) -> "_Finish | None":
        """None where that is not all that the processor does to these images after resizing them."""
        processor = getattr(processor, "image_processor", processor)
        if not all(hasattr(processor, name) for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")):
            return None
        finish = cls(processor)
        raw_BCHW, whole_BCHW = finish.raw(images), _pixels(processor, images)
        if raw_BCHW.dtype != torch.uint8 or raw_BCHW.shape != whole_BCHW.shape:
            return None
        return finish if torch.allclose(finish(raw_BCHW), whole_BCHW, rtol=1e-4, atol=1e-5) else None

    def raw(self, images: Sequence[Any]) -> Tensor:
        """Resized only."""
        return _pixels(self._processor, images, do_rescale=False, do_normalize=False)

    def __call__(self, raw_BCHW: Tensor) -> Tensor:
        return (raw_BCHW.float() * self._factor - self._mean) / self._std


def _between(before: Tensor, rows_BS: Tensor, after: Tensor) -> Tensor:
    """Each row with the same tokens before and after it."""
    return torch.cat([before.expand(len(rows_BS), -1), rows_BS, after.expand(len(rows_BS), -1)], dim=1)


def _noise(num_rows: int, length: int, *, num_noise: int, num_spans: int, generator: torch.Generator) -> Tensor:
    """(B, S) where noise is: ``num_spans`` pairs of text and noise a row, none empty."""
    text, noise = (_parts(num_rows, total, num_spans, generator) for total in (length - num_noise, num_noise))
    ends = torch.stack([text, noise], dim=2).flatten(1).cumsum(1)  # of text, noise, text, ...
    return torch.searchsorted(ends, torch.arange(length).expand(num_rows, -1).contiguous(), right=True) % 2 == 1


def _parts(num_rows: int, total: int, parts: int, generator: torch.Generator) -> Tensor:
    """(B, parts) numbers of at least 1 that add up to ``total``, uniform over all ways to do so."""
    cuts = torch.rand(num_rows, total - 1, generator=generator).argsort(1)[:, : parts - 1].sort(1).values + 1
    edges = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=total)
    return edges.diff(dim=1)


def _pixels(processor: Any, images: Sequence[Any], **options: Any) -> Tensor:
    """What a processor makes of images of one mode, (B, C, H, W)."""
    if hasattr(processor, "image_mean") or hasattr(processor, "preprocess"):
        return torch.as_tensor(processor(images=list(images), return_tensors="pt", **options)["pixel_values"])
    return torch.stack([processor(image) for image in images])


def _augmented(pixels_BCHW: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    num_images, _, height, width = pixels_BCHW.shape
    if config.flip:
        flips_B = torch.rand(num_images, generator=generator) < 0.5
        pixels_BCHW = torch.where(flips_B.view(-1, 1, 1, 1), pixels_BCHW.flip(-1), pixels_BCHW)
    if config.crop:
        shifts_B2 = torch.randint(-config.crop, config.crop + 1, (num_images, 2), generator=generator)
        ys_BH1 = (torch.arange(height) + shifts_B2[:, :1]).clamp(0, height - 1)[:, :, None]
        xs_B1W = (torch.arange(width) + shifts_B2[:, 1:]).clamp(0, width - 1)[:, None, :]
        # indices of the first and the last two dimensions: torch puts the channels between them last
        pixels_BCHW = pixels_BCHW[torch.arange(num_images)[:, None, None], :, ys_BH1, xs_B1W].movedim(-1, 1)
    return pixels_BCHW


def _groups(examples: Iterable[Example]) -> Iterator[list[Example]]:
    examples = iter(examples)
    while group := list(islice(examples, _GROUP)):
        yield group


def _text(example: Example) -> str:
    if example.text is None:
        raise DataError("the data holds images, and the model reads text; name a column of text.")
    return example.text


def _image(example: Example) -> Any:
    if example.image is None:
        raise DataError("the data holds text, and the model reads images; name a column of images.")
    return example.image


def _numbers(labels: Sequence[int | str], *, known: Mapping[str, int] | None, num_classes: int | None) -> Tensor:
    if not labels:
        raise DataError("there is no labelled example to train on.")
    ids: Callable[[int | str], int] = class_ids(labels, known=known, num_classes=num_classes).__getitem__
    return torch.tensor([ids(label) for label in labels])
