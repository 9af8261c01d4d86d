"""What a report shows of a checkpoint that it runs: executed experts, or kept channels, by layer, and the cost of each token of a text or
patch of an image.

Letters: B batch, S position, H and W rows and columns of pixels.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..data import DataConfig, Example, check_source, decode_image, image_batches
from ..errors import CheckpointError, ConfigError, DataError
from ..evaluate import ExecutedExperts, TokenCosts, channel_costs, executed_experts, kept_channels, token_costs
from ..hf.load import model_class, read_manifest
from ..layers import moe_layers
from ..report import (
    costliest_markdown,
    experts_markdown,
    plot_active_by_layer,
    plot_executed_experts,
    plot_patch_costs,
    token_costs_html,
)
from ..select import Rule
from .inputs import evaluation_batches, image_mode, positions_of

CALIBRATED = "calibrated"
"""Label of the checkpoint's own rules."""

SAMPLE_TEXT = (
    "Once upon a time there was a small town by the sea. In 1987 it had 2,431 inhabitants, three bakeries and no traffic lights.\n"
    "def area(width: float, height: float) -> float:\n    return width * height  # in square metres\n"
    'The theorem holds for every finite group; the proof is by induction on its order. "Why," she asked, "would anyone leave?"\n'
)
"""What a report paints by cost where it has data and no text: prose, numbers, code and quotes, and nobody's."""

_Settings = Mapping[str, Rule | Mapping[str, Rule]]


@dataclass(frozen=True, kw_only=True)
class PanelRequest:
    """What to run a checkpoint on, beside its curve; nothing by default."""

    data: DataConfig | None = None
    """Data for the executed experts, or kept channels."""
    text: str | None = None
    """A text whose tokens' costs are shown."""
    image: Path | None = None
    """An image whose patches' costs are shown."""

    def __bool__(self) -> bool:
        return (self.data, self.text, self.image) != (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """What was measured for a report; None where it was not asked for."""

    experts: ExecutedExperts | None = None
    """Executed experts, by setting and layer; of a thinned model kept channels, by setting and part of each block."""
    tokens: tuple[str, ...] | None = None
    """The text of each position."""
    text_costs: TokenCosts | None = None
    """Of these tokens."""
    pixels_HW: tuple[tuple[float, ...], ...] | None = None
    """Mean over channels of the image as the model got it."""
    image_costs: TokenCosts | None = None
    """Of its patches."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object, without the image."""
        found: dict[str, Any] = {} if self.experts is None else {"experts": self.experts.to_json()}
        if self.text_costs is not None:
            found["text"] = {"tokens": list(self.tokens or ()), "costs": self.text_costs.to_json()}
        return found if self.image_costs is None else found | {"image": {"costs": self.image_costs.to_json()}}


def check_request(directory: Path, request: PanelRequest) -> None:
    """Refuse, before any weight is read, what the checkpoint cannot be run on.

    Raises:
        ConfigError: nothing in it is skipped, a text for a model that reads images or the reverse, or an empty text.
        DataError: the data or the image cannot be read. CheckpointError: a dense checkpoint.
    """
    manifest = read_manifest(directory)
    if not manifest.sites and not manifest.channels:
        raise ConfigError(f"'{directory}' skips nothing; leave --data, --text and --image out, which are about what is skipped.")
    cls = model_class(directory)
    reads_images = cls.main_input_name == "pixel_values"
    if request.text is not None:
        if reads_images:
            raise ConfigError(f"{cls.__name__} reads images; give --image in place of --text.")
        if not request.text.strip():
            raise ConfigError("--text is empty; give at least one word.")
    if request.image is not None:
        if not reads_images:
            raise ConfigError(f"{cls.__name__} does not read images; give --text in place of --image.")
        _open_image(request.image)
    if request.data is not None:
        check_source(request.data)


def run_panels(
    model: nn.Module,
    processor: Any,
    request: PanelRequest,
    settings: _Settings,
    *,
    batch_size: int = 1,
    progress: Progress = NO_PROGRESS,
) -> Panels:
    """Measure what a request asks for.

    Args:
        model: converted or thinned, on its device; rules and modes are restored.
        processor: its tokenizer or image processor; None where it came without.
        request: checked by `check_request`. With data and no text, `SAMPLE_TEXT` is run, too, where the model reads a text in one pass.
        settings: of `executed_experts`.
        batch_size: sequences per forward, for the data.
        progress: told every batch.

    Raises:
        DataError: no tokenizer or processor, the data does not fit the model, or a text longer than the model's positions.
        ConfigError: the cost by token of an encoder-decoder, or an image whose patches have no grid.
    """
    if processor is None:
        raise DataError(f"{type(model).__name__} came without a tokenizer or processor; put its files beside the weights.")
    found: dict[str, Any] = {}
    costs_of, spread_of = (token_costs, executed_experts) if moe_layers(model) else (channel_costs, kept_channels)
    if request.text is not None:
        inputs, found["tokens"] = tokens_of(model, processor, request.text)
        found["text_costs"] = costs_of(model, inputs)
    elif request.data is not None and (sample := _sample(model, processor)):
        try:
            inputs, tokens = tokens_of(model, processor, sample)
            found |= {"text_costs": costs_of(model, inputs), "tokens": tokens}
        except ConfigError as error:  # nobody asked for it
            warnings.warn(f"no sample text is shown: {error}", stacklevel=2)
    if request.image is not None:
        example = Example(label=0, image=_open_image(request.image))
        (batch,) = image_batches([example], processor, batch_size=1, mode=image_mode(model))
        found["image_costs"] = costs_of(model, {"pixel_values": batch["pixel_values"]})
        if found["image_costs"].grid is None:
            raise ConfigError(f"the positions of {type(model).__name__} are not the patches of an image in a grid; leave --image out.")
        found["pixels_HW"] = tuple(map(tuple, batch["pixel_values"][0].mean(0).tolist()))
    if request.data is not None:
        batches = evaluation_batches(model, processor, request.data, batch_size=batch_size, progress=progress)
        found["experts"] = spread_of(model, batches, settings, progress=progress)
    return Panels(**found)


def write_panels(panels: Panels, out: Path, *, title: str, skips_channels: bool = False) -> tuple[dict[str, str], str]:
    """Draw what was measured into an existing folder, with the numbers in ``analysis.json``.

    Args:
        panels: what `run_panels` found.
        out: the folder.
        title: above the pictures.
        skips_channels: whether it is of kept channels, not of executed experts.

    Returns:
        Paths by kind, and the sections of the page in markdown.

    Raises:
        DataError, CheckpointError: a file cannot be written, or matplotlib is missing.
    """
    files = {"analysis": out / "analysis.json"}
    page = ""
    if panels.experts is not None:
        files |= {"experts": out / "experts.png", "active": out / "active.png"}
        what = "kept channels" if skips_channels else "executed experts"
        plot_executed_experts(panels.experts, files["experts"], title=title, what=what)
        plot_active_by_layer(panels.experts.active_fraction(), files["active"], title=title)
        page += f"## {what.capitalize()}\n\n![{what}](experts.png)\n\n![active fraction](active.png)\n\n"
        page += experts_markdown(panels.experts) + "\n"
    if panels.tokens is not None and panels.text_costs is not None:
        files["tokens"] = out / "tokens.html"
        of = "layers that skip channels" if skips_channels else "MoE layers"
        token_costs_html(panels.tokens, panels.text_costs, files["tokens"], title=title, of=of)
        page += "## Cost of a text\n\n[Its tokens by cost](tokens.html).\n\n"
        page += costliest_markdown(panels.tokens, panels.text_costs) + "\n"
    if panels.image_costs is not None and panels.pixels_HW is not None:
        files["patches"] = out / "patches.png"
        plot_patch_costs(panels.image_costs, [panels.pixels_HW], files["patches"], title=title)
        page += "## Cost of an image\n\n![cost of patches](patches.png)\n\n"
    try:
        files["analysis"].write_text(json.dumps(panels.to_json(), allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write '{files['analysis']}': {error.strerror}; choose another --out.") from error
    return {kind: str(path) for kind, path in files.items()}, page


def tokens_of(model: nn.Module, tokenizer: Any, text: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A text as one sequence for the model, and what each position stands for.

    Characters that the tokenizer drops between two tokens (spaces) belong to the latter; a character of several tokens is shown for each.

    Raises:
        DataError: no token, or more tokens than the model has positions. ConfigError: an encoder-decoder.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} reads a text and continues it with other layers; leave --text out.")
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_tensors="pt", **({"return_offsets_mapping": True} if has_offsets else {}))
    ids = encoded["input_ids"][0].tolist()
    if not ids:
        raise DataError("--text has no token; give at least one word.")
    if (most := _most_tokens(model, tokenizer)) and len(ids) > most:
        raise DataError(f"--text has {len(ids)} tokens, {type(model).__name__} takes {most}; give a shorter one.")
    offsets = encoded["offset_mapping"][0].tolist() if has_offsets else [(0, 0)] * len(ids)
    pieces, before = [], 0
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        pieces.append(text[min(start, before) : end] if end > start else tokenizer.decode([token_id]))
        before = max(before, end)
    return {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}, tuple(pieces)


def _most_tokens(model: nn.Module, tokenizer: Any) -> int | None:
    """Positions that a text may have; None where nothing says."""
    return min((limit for limit in (positions_of(model), getattr(tokenizer, "model_max_length", None)) if limit), default=None)


def _sample(model: nn.Module, tokenizer: Any) -> str:
    """`SAMPLE_TEXT`, cut to what the model surely takes; empty for models that do not read a text in one pass."""
    config: Any = model.config
    if getattr(model, "main_input_name", "") != "input_ids" or getattr(config, "is_encoder_decoder", False):
        return ""
    most = _most_tokens(model, tokenizer)
    return SAMPLE_TEXT if most is None else SAMPLE_TEXT[: max(0, most - 8)]  # at least a character a token, but for its special ones


def _open_image(path: Path) -> Any:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}.") from None
    return decode_image(raw, what=f"'{path}'")
