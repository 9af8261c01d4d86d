"""Small random inputs for one forward of a transformers model, built from its config alone.

Letters: B batch, S sequence.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "image_token_ids")  # its placeholders and pixel_values would have to agree


def example_inputs(model: nn.Module, *, num_tokens: int = 8, batch_size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one forward that runs every layer: random tokens, pixels or sound.

    Text models get ``input_ids`` and ``attention_mask``, encoder-decoders ``decoder_input_ids`` too, vision models ``pixel_values``, speech
    models ``input_values`` or ``input_features``, two-tower models text and pixels. Models that read images through placeholder tokens get
    text alone.

    Args:
        model: a transformers model (anything with ``config`` and ``main_input_name``).
        num_tokens: S, positions of a text input; the least number of frames of a speech input whose length is free.
        batch_size: B.
        seed: of the random values; the same arguments give the same inputs.

    Returns:
        Tensors on the model's device; floating-point ones in its dtype.

    Raises:
        UnsupportedModelError: the model takes an input that is not known here; pass one of your own to what asked for it.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        raise _unknown(model, "it has no config or main_input_name")
    build = _Builder(config, num_tokens, batch_size, torch.Generator().manual_seed(seed))
    takes = inspect.signature(model.forward).parameters
    if main == "input_ids" or ("input_ids" in takes and "pixel_values" in takes):
        inputs = build.text(_part(config, "text_config") if "pixel_values" in takes else config)
        if "pixel_values" in takes and not any(_field(config, name) is not None for name in _IMAGE_TOKEN_FIELDS):
            inputs["pixel_values"] = build.pixels(_part(config, "vision_config"))
    elif main == "pixel_values":
        inputs = {"pixel_values": build.pixels(_part(config, "vision_config"))}
    elif main == "input_values":
        inputs = {"input_values": build.sound(config)}
    elif main == "input_features":
        inputs = {"input_features": build.features(_part(config, "audio_config"))}
    else:
        raise _unknown(model, f"its main input is '{main}'")
    if "decoder_input_ids" in takes and _field(config, "is_encoder_decoder"):
        inputs["decoder_input_ids"] = build.ids(_part(config, "decoder"))
    if inputs.get(main) is None:
        raise _unknown(model, f"its config does not say the shape of '{main}'")
    like = next(model.parameters())
    return {name: t.to(like.device, like.dtype if t.is_floating_point() else None) for name, t in inputs.items() if t is not None}


class _Builder:
    """Random values of the shapes that a config asks for; None where it does not say."""

    def __init__(self, config: Any, num_tokens: int, batch_size: int, random: torch.Generator) -> None:
        self.config, self.num_tokens, self.batch_size, self.random = config, num_tokens, batch_size, random

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.random)

    def ids(self, config: Any) -> Tensor | None:
        """Tokens that no config field gives a meaning: padding, end of text and placeholders change what a model does."""
        vocab_size = _field(config, "vocab_size")
        if vocab_size is None:
            return None
        special = _special_ids(self.config) | _special_ids(config)
        plain = torch.tensor([i for i in range(min(vocab_size, 4096)) if i not in special] or [0])
        return plain[torch.randint(len(plain), (self.batch_size, self.num_tokens), generator=self.random)]

    def text(self, config: Any) -> dict[str, Tensor | None]:
        input_ids = self.ids(config)
        return {"input_ids": input_ids, "attention_mask": None if input_ids is None else torch.ones_like(input_ids)}

    def pixels(self, config: Any) -> Tensor | None:
        size = _field(config, "image_size")
        if size is None:
            return None
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = _field(config, "num_channels", default=3)
        frames = _field(config, "num_frames")
        return self.normal(channels, height, width) if frames is None else self.normal(frames, channels, height, width)

    def sound(self, config: Any) -> Tensor | None:
        """A waveform long enough for ``num_tokens`` frames of the strided convolutions; a spectrogram where the config gives its length."""
        bins, length = _field(config, "num_mel_bins"), _field(config, "max_length")
        if bins is not None and isinstance(length, int):
            return self.normal(length, bins)
        strides, kernels = _field(config, "conv_stride"), _field(config, "conv_kernel")
        if strides is None or kernels is None:
            strides, kernels = (64, 3, 2), (127, 7, 3)  # the convolutions of moonshine, which no config field gives
        samples = self.num_tokens
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return self.normal(samples)

    def features(self, config: Any) -> Tensor | None:
        bins, positions = _field(config, "num_mel_bins"), _field(config, "max_source_positions")
        per_channel = _field(config, "input_feat_per_channel")
        if per_channel is not None:
            return self.normal(4 * self.num_tokens, per_channel)  # two convolutions of stride 2 follow
        if bins is not None and positions is not None:
            return self.normal(bins, 2 * positions)
        width = _field(config, "feature_projection_input_dim")
        return None if width is None else self.normal(self.num_tokens, width)


def _part(config: Any, name: str) -> Any:
    part = getattr(config, name, None)
    return config if part is None or isinstance(part, (str, int)) else part


def _field(config: Any, name: str, *, default: Any = None) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for name in dir(config):
        if name.endswith(("token_id", "token_index", "token_ids")):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value] if isinstance(value, int) else [])
    return found


def _unknown(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot make up inputs for {type(model).__name__}: {why}. Pass example inputs of your own (a dict of its forward's arguments)."
    )
