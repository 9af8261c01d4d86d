"""Batches of each kind of model, to calibrate with and to measure on.

Letters: B batch, S sequence length, W windows.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, tee
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..data import (
    DataConfig,
    Example,
    class_ids,
    image_batches,
    lm_batches,
    padded_text_batches,
    read_examples,
    read_images,
    read_texts,
    seq2seq_batches,
    special_ids,
    text_pieces,
    text_windows,
)
from ..errors import DataError

_MOST_POSITIONS = 512  # of an encoder, and of each half of an encoder-decoder's window
_HELD_OUT_SHARE = 50  # one sequence of so many
_HELD_OUT_TOKENS = 8192
_LEAST_SEQUENCES = 4


def calibration_batches(
    model: nn.Module, processor: Any, data: DataConfig, *, progress: Progress = NO_PROGRESS, batch_tokens: int = 2048
) -> list[dict[str, Tensor]]:
    """Batches of the kind that the model reads: windows of text for decoders, padded texts for encoders, images for vision models.

    An encoder sees a document longer than its input in consecutive pieces. An encoder-decoder sees windows whose first half its encoder
    reads and whose second half its decoder continues. Images need no labels, and count as many tokens as they have patches (one, where the
    config does not tell).

    Raises:
        DataError: the model has no tokenizer or processor, its positions are fewer than the window, or the data is not of its kind.
    """
    main_input = getattr(model, "main_input_name", "input_ids")
    if processor is None:
        raise DataError(f"{type(model).__name__} came without a tokenizer or processor; put its files beside the weights.")
    if main_input == "pixel_values":
        return _image_batches(model, processor, data, batch_size=max(1, batch_tokens // 256))
    if main_input != "input_ids":
        raise DataError(
            f"{type(model).__name__} reads {main_input!r}; only text and images are read so far. Call convert_model with your own batches."
        )
    if _is_seq2seq(model):
        return _seq2seq_batches(model, processor, data, batch_tokens=batch_tokens, progress=progress)
    if _is_decoder(model):
        check_window(model, data.window)
        windows_WS = text_windows(data, processor, progress=progress)
        return lm_batches(windows_WS, batch_size=max(1, batch_tokens // data.window))
    limit = most_positions(model, processor, data.window)
    pieces = text_pieces(read_texts(data), processor, max_length=limit)
    size = max(1, batch_tokens // limit)
    return list(padded_text_batches(pieces, processor, max_length=limit, batch_size=size, max_tokens=data.max_tokens, by_length=True))


def evaluation_batches(
    model: nn.Module, processor: Any, data: DataConfig, *, batch_size: int, progress: Progress = NO_PROGRESS
) -> list[dict[str, Tensor]]:
    """Batches to measure quality on: with labels where the model's head predicts classes, else as for calibration.

    Labelled examples are read up to the one that reaches ``max_tokens``, whatever the batch size, in the source's order (from class
    folders one of each in turn) unless the data has a seed; texts are cut to ``window``, or to what model and tokenizer take if that is
    less, and those of like length share a batch.

    Raises:
        DataError: as in `calibration_batches`; also a label that the head does not know.
    """
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        return calibration_batches(model, processor, data, progress=progress, batch_tokens=batch_size * data.window)
    examples = _numbered(read_examples(data), **head_classes(model))
    if getattr(model, "main_input_name", "") == "pixel_values":
        few = islice(examples, most_images(model.config, data.max_tokens))
        return list(image_batches(few, processor, batch_size=batch_size, mode=image_mode(model)))
    length = most_positions(model, processor, data.window)
    for_texts, for_labels = tee(examples)  # read in step
    texts, labels = (e.text or "" for e in for_texts), (cast(int, e.label) for e in for_labels)
    return list(
        padded_text_batches(
            texts, processor, max_length=length, batch_size=batch_size, labels=labels, max_tokens=data.max_tokens, by_length=True
        )
    )


def head_classes(model: nn.Module) -> dict[str, Any]:
    """What `class_ids` needs to know of a model's head: ``known`` names and ``num_classes``."""
    config: Any = model.config
    return {"known": {k: int(i) for k, i in (getattr(config, "label2id", None) or {}).items()}, "num_classes": config.num_labels}


def image_mode(model: nn.Module) -> str:
    """PIL mode with as many channels as the model reads."""
    return "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"


def _numbered(examples: Iterable[Example], *, known: Mapping[str, int], num_classes: int) -> Iterator[Example]:
    """The examples with class ids as labels, one at a time: images are large."""
    first = None
    for example in examples:
        first = example.label if first is None else first
        yield replace(example, label=class_ids([first, example.label], known=known, num_classes=num_classes)[example.label])


def hold_out(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], *, least: int = 1
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Take one sequence of 50 out of calibration batches, at even distances, at least ``least`` and otherwise together at most 8192 tokens.

    Spread, because the end of a corpus is one topic.

    Args:
        model: tells what an image counts.
        batches: as `calibration_batches` makes them.
        least: sequences, fewer than there are.

    Returns:
        Batches to calibrate with, and the batches held out; of fewer than four sequences, none.
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    total = sum(sizes)
    if total < _LEAST_SEQUENCES:
        return list(batches), []
    tokens = sum(num_tokens(batch, tokens_per_image=tokens_per_image(model.config)) for batch in batches)
    count = max(least, min(total // _HELD_OUT_SHARE, _HELD_OUT_TOKENS * total // max(1, tokens)))
    chosen_N = torch.zeros(total, dtype=torch.bool)
    chosen_N[[(i + 1) * total // count - 1 for i in range(count)]] = True
    parts = [(batch, chosen_B) for batch, chosen_B in zip(batches, chosen_N.split(sizes), strict=True)]
    kept = [{k: v[~chosen_B] for k, v in batch.items()} for batch, chosen_B in parts if not chosen_B.all()]
    return kept, [{k: v[chosen_B] for k, v in batch.items()} for batch, chosen_B in parts if chosen_B.any()]


def _image_batches(model: nn.Module, processor: Any, data: DataConfig, *, batch_size: int) -> list[dict[str, Tensor]]:
    examples = (Example(label=0, image=image) for image in read_images(data))  # whatever the classes are, nothing is fitted to them
    images = (
        {"pixel_values": b["pixel_values"]} for b in image_batches(examples, processor, batch_size=batch_size, mode=image_mode(model))
    )
    return take_tokens(images, data.max_tokens, tokens_per_image=tokens_per_image(model.config))


def _seq2seq_batches(
    model: nn.Module, tokenizer: Any, data: DataConfig, *, batch_tokens: int, progress: Progress
) -> list[dict[str, Tensor]]:
    specials = special_ids(tokenizer)
    half = min(data.window // 2, most_positions(model, tokenizer, data.window) - sum(map(len, specials)))
    if half < 1:
        raise DataError(
            f"{type(model).__name__} has too few positions for a token of text; see max_position_embeddings in its config.json."
        )
    windows_WS = text_windows(replace(data, window=2 * half), tokenizer, progress=progress)
    ids = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id"))
    start_id = next((i for i in ids if isinstance(i, int)), 0)
    return seq2seq_batches(windows_WS, batch_size=max(1, batch_tokens // (2 * half)), start_id=start_id, specials=specials)


def _is_seq2seq(model: nn.Module) -> bool:
    is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
    return is_pair and "decoder_input_ids" in inspect.signature(model.forward).parameters  # the encoder alone has such a config, too


def _is_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_decoder", False)) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def most_positions(model: nn.Module, processor: Any, window: int) -> int:
    """Longest input of an encoder: what model, tokenizer and window allow, at most 512."""
    sizes = (getattr(model.config, "max_position_embeddings", None), getattr(processor, "model_max_length", None))
    return int(min(window, _MOST_POSITIONS, *(size for size in sizes if size)))


def check_window(model: nn.Module, window: int) -> None:
    """Refuse windows with more tokens than the model has positions; a config that gives no number has no limit."""
    limit = positions_of(model)
    if limit is not None and window > limit:
        raise DataError(f"--window {window} is more than the {limit} positions of {type(model).__name__}; give at most {limit}.")


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model's config gives it; None where it gives no number."""
    config: Any = model.config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        limit = getattr(config, name, None)
        if limit is None and (text := getattr(config, "text_config", None)) is not None:
            limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def most_images(config: Any, max_tokens: int | None) -> int | None:
    """Images that ``max_tokens`` are, the last one whole; None for all."""
    return None if max_tokens is None else -(-max_tokens // tokens_per_image(config))


def tokens_per_image(config: Any) -> int:
    """Patches of an image; 1 where the config has no such sizes."""
    config = getattr(config, "vision_config", None) or config
    patches = 1
    for side in (0, 1):
        image, patch = (_side(getattr(config, name, None), side) for name in ("image_size", "patch_size"))
        patches *= max(1, image // patch) if image and patch else 1
    return patches


def _side(size: Any, side: int) -> int:
    """Height (0) or width (1) of a size that is a number, a pair or a dictionary; 0 if it is neither."""
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, (list, tuple)):
        size = size[side] if len(size) == 2 else None
    return size if isinstance(size, int) else 0


def take_tokens(batches: Iterable[dict[str, Tensor]], max_tokens: int | None, *, tokens_per_image: int = 1) -> list[dict[str, Tensor]]:
    """Batches up to the one that reaches ``max_tokens``."""
    taken, tokens = [], 0
    for batch in batches:
        taken.append(batch)
        tokens += num_tokens(batch, tokens_per_image=tokens_per_image)
        if max_tokens is not None and tokens >= max_tokens:
            break
    return taken


def num_tokens(batch: Mapping[str, Tensor], *, tokens_per_image: int) -> int:
    """Tokens of a batch, padding left out; of an encoder-decoder those of both sides."""
    if "pixel_values" in batch:
        return batch["pixel_values"].shape[0] * tokens_per_image
    mask = batch.get("attention_mask")
    return sum(ids.numel() for key, ids in batch.items() if key.endswith("input_ids")) if mask is None else int(mask.sum())
