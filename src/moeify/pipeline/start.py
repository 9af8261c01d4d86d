"""The model that a recipe starts from: a checkpoint with a head for the task, or an architecture with random weights."""

from typing import Any

from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError
from ..hf.random import image_processor, random_model
from ..hf.tokenizer import byte_tokenizer, load_tokenizer
from .names import torch_dtype
from .recipe import RecipeConfig
from .tasks import TASKS, Loaded, load_for_task


def start_model(recipe: RecipeConfig, *, seed: int, progress: Progress = NO_PROGRESS) -> Loaded:
    """Load or build it, in eval mode on the CPU; the same for the same seed.

    Raises:
        MoeifyError: as `load_for_task` and `random_model`; for an architecture also a task or tokenizer that is missing.
    """
    model = recipe.model
    dtype = torch_dtype(model.dtype)
    if model.source is not None:
        loaded = load_for_task(model.source, recipe.data, task=recipe.task, dtype=dtype, seed=seed, progress=progress)
        recipe.check_task(loaded.task)
        return loaded
    if recipe.task is None:
        raise ConfigError(f"a model from scratch needs a task: one of {', '.join(TASKS)}.")
    architecture = dict(model.architecture)
    processor: Any = None
    if recipe.task != "image-classification":
        if model.tokenizer is None:
            raise ConfigError("[model] needs a tokenizer: 'bytes', or the folder or Hub id of one.")
        context = next((architecture[key] for key in ("n_positions", "max_position_embeddings") if key in architecture), 1024)
        processor = byte_tokenizer(context=context) if model.tokenizer == "bytes" else load_tokenizer(model.tokenizer)
        of_tokenizer = {"vocab_size": len(processor)}
        of_tokenizer |= {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        architecture = {**of_tokenizer, **architecture}
    built = random_model(architecture, auto_class=TASKS[recipe.task].auto_class, seed=seed, dtype=dtype)
    return Loaded(built, processor or image_processor(built.config), recipe.task, True)
