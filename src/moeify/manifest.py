"""The manifest: what a checkpoint says of its converted layers, and what it is of a model as it is now.

Letters: F FFN width, D model width, N outputs and K inputs of a linear layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import _config
from ._bounds import check_bounds
from .channels import SparseInput, sparse_inputs
from .errors import CheckpointError, ConfigError, UnsupportedModelError
from .layers import MoEFFN, moe_layers
from .presets import Preset, check_presets, presets, store, with_rules_of
from .routers import RouterConfig
from .select import RuleConfig, Threshold
from .sites import FFNSite, Int8Linear, LinearSite, ProjectionRecord, has_int8, linear_weight, record_of, replaced_projections

SCHEMA = 1
"""Schema of the manifest; a reader refuses a newer one and migrates an older one."""


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One converted FFN, as the manifest stores it."""

    site: FFNSite
    """Where its weights are."""
    num_experts: int
    """E; the experts' slices follow from it (`expert_bounds`)."""
    router: RouterConfig
    """Router whose tensors are ``<site>.moe.router.*``."""
    rule: RuleConfig
    """Selection rule with its calibrated knob."""
    always_on: tuple[int, ...] = ()
    """Experts that run for every token."""
    weights: Literal["float", "int8"] = "float"
    """Type of the projections' weights: the model's own, or int8 with a scale for each output."""
    weight_norms: tuple[tuple[float, float], ...] = field(default=(), metadata=_config.LATER)
    """Where the router reads its scores off the FFN's own weights: of gate (if there is one), up and down the norm and the signed sum that
    they were saved with, as a `ChannelRecord` has them."""


@dataclass(frozen=True, kw_only=True)
class ChannelRecord:
    """One linear layer that skips input channels, as the manifest stores it; its levels are the tensor ``<layer>.channels.level_K``."""

    site: LinearSite
    """The layer."""
    rule: RuleConfig = field(default_factory=lambda: Threshold(theta=1.0))
    """Selection rule on |x| / level."""
    first_dense: int = 0
    """Positions at the start of a sequence that keep all channels."""
    weight_norm: float
    """Norm of the weight that the levels were saved with."""
    weight_projection: float
    """Its entries summed up with fixed signs: with the norm, tells other weights from these, rounded."""
    weights: Literal["float", "int8"] = field(default="float", metadata=_config.LATER)
    """Type of the weight: the model's own, or int8 with a scale for each output."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is needed to build the same structure around a dense skeleton again."""

    schema: int = SCHEMA
    """Schema of this record."""
    sites: tuple[SiteRecord, ...]
    """Converted FFNs in module order."""
    channels: tuple[ChannelRecord, ...] = field(default=(), metadata=_config.LATER)
    """Linear layers that skip input channels, in module order."""
    projections: tuple[ProjectionRecord, ...] = field(default=(), metadata=_config.LATER)
    """Linear layers that were replaced by MLPs, in module order; then no equal dense checkpoint exists (decision D2)."""
    presets: tuple[Preset, ...] = field(default=(), metadata=_config.LATER)
    """Named operating points: rules of these layers, and what was measured with them."""

    def __post_init__(self) -> None:
        check_presets(self.presets, self.layer_names)

    @property
    def layer_names(self) -> list[str]:
        """All layers that have a rule."""
        return [record.site.name for record in self.sites] + [layer.site.name for layer in self.channels]

    @property
    def has_int8(self) -> bool:
        """Whether any FFN or layer has int8 weights; then no equal dense checkpoint exists (decision D2)."""
        kinds = [record.weights for record in self.sites] + [record.weights for record in self.channels]
        return "int8" in kinds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        return _config.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "manifest") -> "Manifest":
        """Read a JSON value.

        Raises:
            CheckpointError: newer schema, sizes out of bounds (`moeify._bounds`), or anything that `_config.from_dict` refuses.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise CheckpointError(f"{where}: schema {schema} is newer than this moeify reads (up to {SCHEMA}); upgrade moeify.")
        check_bounds(data, where=where)
        try:
            return _config.from_dict(cls, data, where=where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error


def manifest_of(model: nn.Module) -> Manifest:
    """The manifest of a converted model as it is now, rules included.

    Raises:
        UnsupportedModelError: the model has no MoE layer, none that skips channels and none that was replaced.
    """
    layers, inputs, replaced = moe_layers(model), sparse_inputs(model), replaced_projections(model)
    if not layers and not inputs and not replaced:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
    return Manifest(
        sites=tuple(record_of_site(model, layer) for layer in layers.values()),
        channels=tuple(_channel_record(model, m) for m in inputs.values()),
        projections=tuple(record_of(name, module) for name, module in replaced.items()),
        presets=_presets_of(model, (*inputs, *layers)),
    )


def stamp(model: nn.Module) -> Manifest:
    """Write the current manifest into ``model.config.quantization_config``, where ``save_pretrained`` and ``from_pretrained`` look for
    it."""
    manifest = manifest_of(model)
    if hasattr(model, "config"):
        cast(Any, model).config.quantization_config = {"quant_method": "moeify", **manifest.to_dict()}
    return manifest


def record_of_site(model: nn.Module, layer: MoEFFN) -> SiteRecord:
    """What the manifest of ``model`` says of one of its layers as it is now."""
    return SiteRecord(
        site=layer.site,
        num_experts=layer.num_experts,
        router=layer.router.config,
        rule=cast(RuleConfig, layer.rule),
        always_on=layer.always_on,
        weights="int8" if has_int8(model, layer.site) else "float",
        weight_norms=weight_norms_of(layer),
    )


def set_presets(model: nn.Module, kept: Iterable[Preset]) -> None:
    """Give a model these presets in the place of those it has; ``save_pretrained`` writes them.

    Args:
        model: converted or thinned model with a ``config``, which keeps them.
        kept: the presets, in the order in which they are to be listed.

    Raises:
        ConfigError: two of one name, a rule for a layer that the model has not, too many, or nowhere to keep them.
        UnsupportedModelError: the model is dense.
    """
    kept = tuple(kept)
    if not hasattr(model, "config"):
        raise ConfigError(f"{type(model).__name__} has no config to keep presets in; set rules by set_rule(model, preset.rules).")
    check_presets(kept, (*sparse_inputs(model), *moe_layers(model)))
    if not store(model, kept):
        stamp(model)
        store(model, kept)


def with_rules(manifest: Manifest, rules: Mapping[str, RuleConfig]) -> Manifest:
    """The manifest with other rules at the named sites."""
    return replace(manifest, sites=tuple(replace(r, rule=rules.get(r.site.name, r.rule)) for r in manifest.sites))


@torch.no_grad()
def fingerprint(weight_NK: Tensor) -> tuple[float, float]:
    """Norm, and the sum of s_n s_k W_nk with signs s that a multiplicative hash gives the indices."""
    weight_NK = weight_NK.detach().float()
    rows_N, columns_K = (torch.arange(size, device=weight_NK.device) for size in weight_NK.shape)
    signs_N, signs_K = (1 - 2 * ((index * 2654435761 >> 7) & 1) for index in (rows_N, columns_K))
    return float(weight_NK.norm()), float(signs_N.float() @ weight_NK @ signs_K.float())


def weight_norms_of(moe: MoEFFN) -> tuple[tuple[float, float], ...]:
    """What `SiteRecord.weight_norms` holds of an FFN as it is now; nothing where it must not, or need not, be read."""
    if not getattr(moe.router, "is_of_weights", False) or moe.masked_reason() is not None:
        return ()
    weights = moe.weights().dequantized(torch.float32)
    matrices = (weights.gate_FD, weights.up_FD, weights.down_FD)
    return tuple(fingerprint(W_FD) for W_FD in matrices if W_FD is not None and not W_FD.is_meta)


def _presets_of(model: nn.Module, layers: Iterable[str]) -> tuple[Preset, ...]:
    """The presets in the model's config, without layers that the model has no more."""
    names = {name: name for name in layers}
    found = (with_rules_of(preset, names) for preset in presets(model).values())
    return tuple(preset for preset in found if preset is not None)


def _channel_record(model: nn.Module, executor: SparseInput) -> ChannelRecord:
    linear = model.get_submodule(executor.site.name)
    norm, projection = fingerprint(linear_weight(linear))
    return ChannelRecord(
        site=executor.site,
        rule=cast(RuleConfig, executor.rule),
        first_dense=executor.first_dense,
        weight_norm=norm,
        weight_projection=projection,
        weights="int8" if isinstance(linear, Int8Linear) else "float",
    )
