"""Models with random weights, and image processors without a model: what an experiment from scratch starts from."""

from collections.abc import Mapping
from typing import Any

import torch

from .._config import did_you_mean
from .._random import seeded
from ..errors import ConfigError


def random_model(architecture: Mapping[str, Any], *, auto_class: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model with weights drawn by ``seed``, in eval mode.

    Args:
        architecture: ``model_type`` and fields of its config.
        auto_class: name of the automatic class that builds it, such as "AutoModelForCausalLM".
        seed: of the weights.
        dtype: of the weights.

    Raises:
        ConfigError: an unknown model type or field, or values that make no model.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    fields = dict(architecture)
    family = fields.pop("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"transformers does not know the model type {family!r}{did_you_mean(family, transformers.CONFIG_MAPPING)}")
    cls = transformers.CONFIG_MAPPING[family]
    try:
        known = (
            set(cls().to_dict())
            | ({"decoder_start_token_id"} if cls().is_encoder_decoder else set())
            | {"id2label", "label2id", "num_labels"}
            | set(getattr(cls, "attribute_map", {}))
        )
        if unknown := next((name for name in fields if name not in known), None):
            raise ConfigError(f"unknown field {unknown!r} of {cls.__name__}{did_you_mean(unknown, sorted(known))}")
        config = cls(**fields)
        with seeded(seed):
            model: Any = getattr(transformers, auto_class).from_config(config, dtype=dtype)
    except ConfigError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"the architecture makes no model: {' '.join(str(error).split())}") from error
    if getattr(model, "loss_type", "") is None:  # transformers takes this one then, with a warning that no compiled forward can give
        model.loss_type = "ForCausalLM"
    return model.eval()


def image_processor(config: Any) -> Any:
    """Pixels of a vision model's own size to [-1, 1]: images of another size are resized, and nothing else is done."""
    import transformers

    cls = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    half = [0.5] * config.num_channels
    return cls(size={"height": height, "width": width}, image_mean=half, image_std=half)
