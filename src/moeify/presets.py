"""Named operating points of a converted or thinned model: a rule for each layer, and what was measured there.

They are part of the manifest, so a checkpoint carries them; a model keeps them where its manifest is, in
``model.config.quantization_config``: as the JSON that `moeify.manifest.stamp` wrote, or in the object that ``from_pretrained`` put there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from . import _config
from .errors import ConfigError
from .select import RuleConfig

MOST = 64
"""Presets of one model."""

RESERVED = "default"
"""The checkpoint's own rules, where presets are named: of a server, say."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One operating point. Fractions are of the dense model; what was not measured is None."""

    name: str
    """Letters, digits, '.', '_' and '-', 64 at most, a letter or digit first; no number, and not "default", the model's own rules."""
    rules: dict[str, RuleConfig]
    """Rule by layer: FFNs by the names of their sites, linear layers that skip input channels by theirs."""
    active_fraction: float
    """Executed / all neurons on the tokens of ``quality``; of a model without MoE layers, kept / all input channels."""
    asked: dict[str, float] = field(default_factory=dict)
    """What it was made for, such as {"active_fraction": 0.5} or {"latency": 0.7}."""
    metric: str | None = None
    """Name of what ``quality`` measures, a key of `moeify.evaluate.METRICS`."""
    quality: float | None = None
    """On data that no knob was set on."""
    dense_quality: float | None = None
    """The dense mode on the same data."""
    kl: float | None = None
    """Mean KL(dense || preset) per token or example, nats."""
    ffn_flops_fraction: float | None = None
    """(experts + routers + kept channels) / dense FFNs."""
    flops_fraction: float | None = None
    """Whole model."""
    bytes_fraction: float | None = None
    """Bytes of weights that decoding one token reads / those of the dense model."""
    latency_fraction: float | None = None
    """Measured time / dense time, both on ``machine``."""
    machine: str | None = None
    """Where ``latency_fraction`` was measured, on how many threads and tokens."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.rules:
            raise ConfigError(f"preset {self.name!r} has no rule.")
        if not 0 <= self.active_fraction <= 1:
            raise ConfigError(f"active_fraction of preset {self.name!r} must be in [0, 1], got {self.active_fraction}.")


def check_name(name: str) -> None:
    """Refuse what cannot be a preset's name.

    Raises:
        ConfigError: other characters than letters, digits, '.', '_' and '-', none, or more than 64; "default", or a number.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"a preset cannot be named {name[:80]!r}: letters, digits, '.', '_' and '-' only, at most 64, a letter or digit first."
        )
    if name == RESERVED:
        raise ConfigError(f"a preset cannot be named {name!r}, which names the checkpoint's own rules; choose another name.")
    try:
        float(name)
    except ValueError:
        return
    raise ConfigError(f"a preset cannot be named {name!r}: where a preset may stand, a number is an active fraction; add a letter.")


def check_presets(presets: Iterable[Preset], layers: Iterable[str]) -> None:
    """Refuse presets that one manifest cannot hold.

    Raises:
        ConfigError: more than `MOST`, two of one name, or a rule for a layer that is not among ``layers``.
    """
    seen, layers = set[str](), set(layers)
    for preset in presets:
        if preset.name in seen:
            raise ConfigError(f"there are two presets named {preset.name!r}.")
        if unknown := set(preset.rules) - layers:
            raise ConfigError(f"preset {preset.name!r} has a rule for {min(unknown)!r}, which is no layer of the manifest.")
        seen.add(preset.name)
    if len(seen) > MOST:
        raise ConfigError(f"there are {len(seen)} presets; a model has at most {MOST}.")


def presets(model: nn.Module) -> dict[str, Preset]:
    """The presets of a converted or thinned model by name, as its checkpoint stores them; empty where there are none."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(stored, Mapping):
        if stored.get("quant_method") != "moeify":
            return {}
        kept = [_config.from_dict(Preset, entry, where="config.quantization_config") for entry in stored.get("presets", ())]
    else:
        kept = list(getattr(getattr(stored, "manifest", None), "presets", ()))
    return {preset.name: preset for preset in kept}


def find_preset(model: nn.Module, name: str) -> Preset:
    """One preset of a model.

    Raises:
        ConfigError: there is none of that name; names the nearest, and those there are.
    """
    return pick(presets(model), name)


def pick(known: Mapping[str, Preset], name: str) -> Preset:
    """``known[name]``; errors as in `find_preset`."""
    if name in known:
        return known[name]
    if not known:
        raise ConfigError(f"no preset {name!r}: this model has none; `moeify preset DIR --data ...` measures and stores them.")
    near = _config.did_you_mean(name, known)
    there = "" if near.startswith("; known") else f" There are: {', '.join(known)}."
    raise ConfigError(f"this model has no preset {name!r}{near}{there}")


def with_rules_of(preset: Preset, names: Mapping[str, str]) -> Preset | None:
    """The preset with its layers renamed, those that ``names`` lacks left out; None where none is left."""
    rules = {names[old]: rule for old, rule in preset.rules.items() if old in names}
    return replace(preset, rules=rules) if rules else None


def store(model: nn.Module, kept: Iterable[Preset]) -> bool:
    """Put ``kept`` in the place of the presets in the model's config; whether there is a manifest of ours to put them in."""
    stored: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "moeify":
        stored.pop("presets", None)
        if entries := [_config.to_dict(preset) for preset in kept]:
            stored["presets"] = entries
    elif (manifest := getattr(stored, "manifest", None)) is not None:
        stored.manifest = replace(manifest, presets=tuple(kept))
    else:
        return False
    return True
