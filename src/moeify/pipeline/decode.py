"""Text of a checkpoint, with what it took: of one as it is, or one that drafts for itself."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _config
from .._random import seeded
from ..channels import record_channels
from ..controls import record_active, set_rule
from ..errors import ConfigError
from ..hf.draft import self_draft
from ..hf.load import load_model
from ..hf.presets import read_presets
from ..hf.speculate import Speculation
from ..layers import moe_layers
from ..presets import pick
from ..select import RULES, Rule
from .measure import rules_at
from .names import torch_device, torch_dtype


def generate_text(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    preset: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> str:
    """Continue ``prompt``; greedy at temperature 0, with the checkpoint's own rules or those of a preset. ``dtype`` and ``device`` as in
    `sweep_checkpoint`.

    Raises:
        ConfigError: no such preset, the model does not generate text, or the temperature is negative or not finite.
    """
    model, tokenizer, inputs = _load(directory, prompt, temperature=temperature, preset=preset, dtype=dtype, device=device)
    with seeded(seed, torch_device(device)):
        ids = model.generate(**inputs, **_options(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature))
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class TimedText:
    """What a model wrote, and what it took."""

    text: str
    """Prompt and continuation."""
    new_tokens: int
    """Tokens of the continuation."""
    seconds: float
    """Of the whole call, reading the prompt included."""
    active_fraction: float
    """Executed / all neurons, of a model without MoE layers kept / all input channels, of one forward over the whole text: counting while
    it is written would slow it down."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens by the seconds of the whole call."""
        return self.new_tokens / self.seconds

    def line(self) -> str:
        """For people."""
        return f"{self.new_tokens} tokens, {self.tokens_per_s:.3g} tokens/s, {self.active_fraction:.1%} active"


def timed_text(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    preset: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> TimedText:
    """`generate_text` with what it took; arguments and errors are its."""
    model, tokenizer, inputs = _load(directory, prompt, temperature=temperature, preset=preset, dtype=dtype, device=device)
    with seeded(seed, torch_device(device)):
        start = time.perf_counter()
        ids = model.generate(**inputs, **_options(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature))
        seconds = time.perf_counter() - start
    # An encoder-decoder's ids are the continuation alone, which follows a start token.
    is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
    with torch.no_grad(), record_active(model) as executed, record_channels(model) as skipped:
        model(**(inputs | {"decoder_input_ids": ids} if is_pair else {"input_ids": ids}))
    return TimedText(
        text=str(tokenizer.decode(ids[0], skip_special_tokens=True)),
        new_tokens=ids.shape[1] - (1 if is_pair else inputs["input_ids"].shape[1]),
        seconds=seconds,
        active_fraction=executed.active_fraction() if moe_layers(model) else 1 - skipped.skipped_frac(),
    )


@dataclass(frozen=True, kw_only=True)
class DraftedText:
    """What a model wrote with its own draft."""

    text: str
    """Prompt and continuation."""
    new_tokens: int
    """Tokens of the continuation."""
    seconds: float
    """Of the whole call, reading the prompt included."""
    drafted: int
    """Tokens that the draft proposed."""
    accepted: int
    """Of these, tokens that the model agreed with."""
    rounds: int
    """Verifying forwards."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens by the seconds of the whole call."""
        return self.new_tokens / self.seconds

    def line(self) -> str:
        """For people."""
        share = f"{self.accepted} of {self.drafted} drafted tokens accepted"
        share += f" ({self.accepted / self.drafted:.0%})" if self.drafted else ""
        rounds = f"{1 + self.accepted / self.rounds:.2g} tokens a verification" if self.rounds else "nothing verified"
        return f"{share}, {rounds}, {self.tokens_per_s:.3g} tokens/s"


def read_draft(directory: str | Path, text: str) -> Rule | Mapping[str, Rule] | str:
    """What a draft runs, from one word.

    Args:
        directory: the checkpoint.
        text: an active fraction whose rules the checkpoint's calibration stored ("0.1"); a rule and its knob ("threshold=0.5"); else the
            name of a preset.

    Raises:
        ConfigError: unknown rule, knob out of range, or no rules stored for the fraction.
        CheckpointError: as `rules_at`.
    """
    name, has_knob, knob = text.partition("=")
    if has_knob:
        rule_type = _config.lookup(RULES, name, where="--draft")
        try:
            return rule_type.at(float(knob))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"--draft {text!r}: {knob!r} is no number.") from error
    try:
        fraction = float(text)
    except ValueError:
        return text
    return rules_at(directory, fraction, option="--draft")


def speculate_text(
    directory: str | Path,
    prompt: str,
    *,
    draft: str,
    draft_tokens: int = 8,
    confidence: float = 0.0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    preset: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> DraftedText:
    """Continue ``prompt`` as `generate_text` does, with the checkpoint as its own draft.

    Args:
        directory: converted or thinned checkpoint.
        prompt: text to continue.
        draft: as `read_draft`.
        draft_tokens, confidence: as `Speculation`.
        max_new_tokens: most tokens to add.
        temperature: 0 always takes the likeliest token.
        seed: of sampling.
        preset: whose rules verify; None: the checkpoint's own.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as `generate_text`, `read_draft`, `self_draft` and `Speculation`.
    """
    rules = read_draft(directory, draft)
    model, tokenizer, inputs = _load(directory, prompt, temperature=temperature, preset=preset, dtype=dtype, device=device)
    speculation = Speculation(self_draft(model, rules), draft_tokens=draft_tokens, confidence=confidence)
    options = _options(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    with seeded(seed, torch_device(device)):
        start = time.perf_counter()
        ids = model.generate(**inputs, custom_generate=speculation, **options)
        seconds = time.perf_counter() - start
    counts = speculation.counts
    return DraftedText(
        text=str(tokenizer.decode(ids[0], skip_special_tokens=True)),
        new_tokens=counts.new_tokens,
        seconds=seconds,
        drafted=counts.drafted,
        accepted=counts.accepted,
        rounds=counts.rounds,
    )


def _load(
    directory: str | Path, prompt: str, *, temperature: float, preset: str | None, dtype: str, device: str
) -> tuple[Any, Any, dict[str, Tensor]]:
    """The model on its device, its rules set, its tokenizer and the prompt as the model reads it; errors as `generate_text`."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be at least 0 and finite, got {temperature}.")
    place = torch_device(device)
    if preset is not None:
        pick(read_presets(Path(directory)), preset)
    model, tokenizer = load_model(directory, dtype=torch_dtype(dtype))
    model.to(place)
    if preset is not None:
        set_rule(model, preset)
    if tokenizer is None or not model.can_generate():
        raise ConfigError(f"{type(model).__name__} at '{directory}' does not generate text.")
    tokens = tokenizer(prompt, return_tensors="pt")
    inputs = {key: tokens[key].to(place) for key in ("input_ids", "attention_mask") if key in tokens}
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one token to continue.")
    return model, tokenizer, inputs


def _options(tokenizer: Any, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """What ``generate`` is called with: greedy at temperature 0."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # 0 is an id, too
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature}
        if temperature
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    return {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, **sampling}
