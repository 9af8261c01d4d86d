"""What a recipe of pre-training says: a TOML file as frozen dataclasses."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._config import from_dict, to_dict
from ..data import DataConfig, SpanConfig
from ..errors import ConfigError
from ..hf.tokenizer import TokenizerTrainConfig
from ..ssd import SSDConfig
from ..train.loop import TrainConfig
from .recipe import is_name, read_toml

Objective = Literal["causal-lm", "masked-lm", "span-corruption"]

VALIDATION_TOKENS = 100_000
"""Of the validation split, where nobody says."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer that is made for the run."""

    train: TokenizerTrainConfig
    """How it is trained."""


@dataclass(frozen=True, kw_only=True)
class PretrainModelConfig:
    """A model with random weights."""

    architecture: dict[str, Any]
    """model_type and fields of its transformers config; sizes of the vocabulary and special tokens are the tokenizer's."""
    tokenizer: TokenizerConfig | str = "bytes"
    """'bytes', the folder or Hub id of one, or a table ``train``: trained on the training data."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture.get("model_type"), str):
            raise ConfigError("[model] architecture needs a model_type, such as 'gpt2'.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Who is told of every ``train.log_every`` steps, besides the console and log.jsonl."""

    tensorboard: bool = True
    """TensorBoard, where it is installed."""
    wandb: str | None = None
    """Project at Weights & Biases, which must be installed then; none leaves it out."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training run: dense, or with SSD."""

    name: str
    """Of the output folder, where none is named."""
    task: Objective
    """'causal-lm' for decoders, 'masked-lm' for encoders, 'span-corruption' for encoder-decoders."""
    model: PretrainModelConfig
    """What is trained."""
    data: DataConfig
    """Training data; ``window`` is what the model reads at once, special tokens included. All of it unless max_tokens says otherwise."""
    validation: DataConfig
    """What is measured on, and what SSD watches; what the table does not say is taken from [data], but for the split (validation) and
    max_tokens (100000)."""
    train: TrainConfig
    """Optimizer, schedule, batches, seed; the weights are drawn by that seed. States are saved every save_every steps, 20 times where that
    is not given."""
    ssd: SSDConfig | None = None
    """Switchable sparse-dense pre-training; none trains dense."""
    mask_frac: float = 0.15
    """Share of the tokens that a masked language model predicts, in (0, 1]."""
    spans: SpanConfig = field(default_factory=SpanConfig)
    """Of span corruption."""
    probe_sequences: int | None = None
    """Sequences that SSD measures on; none takes as many as keep that below 1 % of the training's FLOPs, at least 4 and at most those of a
    step."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(f"name {self.name!r} must be letters, digits, '_', '-' and '.', to name files.")
        if self.data.window != self.validation.window:
            raise ConfigError(f"[validation] window {self.validation.window} must be that of [data], {self.data.window}.")
        if not 0 < self.mask_frac <= 1:
            raise ConfigError(f"mask_frac must be in (0, 1], got {self.mask_frac}.")
        if self.probe_sequences is not None and self.probe_sequences < 1:
            raise ConfigError(f"probe_sequences must be at least 1, got {self.probe_sequences}.")

    @property
    def probe_size(self) -> int:
        """Sequences that SSD measures on. 100 measurements of P cost P / (0.03 steps) sequences' training, twice that in sparse phases."""
        if self.probe_sequences is not None:
            return self.probe_sequences
        return max(4, min(self.train.batch_sequences, self.train.steps * self.train.batch_sequences // 6700))

    def decisive(self) -> dict[str, Any]:
        """JSON values of everything that decides the outcome, but for the content of the data."""
        left_out = ("log", "name")
        return {**{k: v for k, v in to_dict(self).items() if k not in left_out}, "train": self.train.decisive()}


def read_pretrain(path: str | Path, *, settings: Iterable[str] = ()) -> PretrainConfig:
    """Read a recipe of pre-training.

    Args:
        path: TOML file; a path in it that exists relative to the file's folder is meant so.
        settings: "dotted.path=value" each, as `read_recipe` takes them; "ssd=none" leaves SSD out.

    Raises:
        ConfigError: not a file, not TOML, or an option that is unknown, missing, of the wrong type or out of range.
    """
    raw = read_toml(path, settings, places=(("model", "tokenizer"), ("data", "data"), ("validation", "data")))
    if raw.get("ssd") == "none":  # TOML has no word for it
        raw["ssd"] = None
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(raw.setdefault("validation", {}), dict):
        data.setdefault("max_tokens", None)
        raw["validation"] = {**data, "split": "validation", "max_tokens": VALIDATION_TOKENS, **raw["validation"]}
    return from_dict(PretrainConfig, raw, where=str(path))
