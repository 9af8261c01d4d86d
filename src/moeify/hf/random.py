"""Models with random weights, and tokenizers and image processors without a model: what an experiment from scratch starts from."""

from collections.abc import Mapping
from typing import Any

import torch

from .._config import did_you_mean
from .._random import seeded
from ..errors import CheckpointError, ConfigError


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
            | {"decoder_start_token_id"}
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
    return model.eval()


def byte_tokenizer(*, context: int) -> Any:
    """A transformers tokenizer of the 256 bytes, so that the checkpoint is an ordinary one.

    Args:
        context: longest text of the model, in bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context)


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a folder or of a Hub id, without a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{source}': no tokenizer can be loaded: {' '.join(str(error).split())[:200]}") from error


def image_processor(config: Any) -> Any:
    """Pixels of a vision model's own size to [-1, 1]: images of another size are resized, and nothing else is done."""
    import transformers

    cls = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    half = [0.5] * config.num_channels
    return cls(size={"height": height, "width": width}, image_mean=half, image_std=half)
