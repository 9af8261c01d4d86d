"""The only writer of a model's structure: dense -> mixture of experts, back, and again from a manifest.

Letters: D model width, F FFN width, E experts, K feature width.

A conversion permutes neurons in place so that each expert is a contiguous slice, and attaches a `MoEFFN` (router, rule, kernel) to each
FFN. Names and shapes of the model's own parameters do not change: a converted checkpoint is a valid, equal dense checkpoint with extra
router tensors (decision D2).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _config
from ._random import seeded
from .channels import CHILD, SparseInput, attach_channels, detach_channels, sparse_inputs
from .errors import CheckpointError, ConfigError, UnsupportedModelError
from .layers import MoEFFN, MoEProjection, attach, detach, moe_layers
from .manifest import Manifest, SiteRecord, fingerprint, stamp, weight_norms_of
from .presets import store
from .routers import NormRouterConfig, RouterConfig, build_router, check_router
from .select import RuleConfig, Threshold
from .sites import (
    ACTIVATIONS,
    FFNSite,
    FusedProjection,
    Int8Linear,
    ProjectionMLP,
    ProjectionRecord,
    check_patterns,
    check_policy,
    check_replaceable,
    dequantize_site,
    has_int8,
    keep_rows,
    linear_sizes,
    linear_weight,
    load_tensors,
    matching_key,
    options_for,
    permute_neurons,
    quantize_linear,
    quantize_site,
    record_of,
    replaced_projections,
    replacement_of,
    site_weights,
    to_float,
)
from .sparsity.activation import mark, put_module
from .split import BalancedKMeans, Coactivation, ContiguousSplit, ExpertSplit, SplitConfig, parameter_features, split_neurons


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How every FFN of a model becomes a mixture of experts."""

    expert_size: int = 8
    """Neurons per expert (G); where it does not divide the FFN's width, sizes differ by one and none is larger."""
    router: RouterConfig = field(default_factory=NormRouterConfig)
    """Router that predicts which experts matter."""
    projection_expert_size: int = field(default=8, metadata=_config.LATER)
    """Neurons per expert in a replaced projection, which has far fewer of them than an FFN."""
    projection_router: RouterConfig = field(default_factory=lambda: NormRouterConfig(width=16), metadata=_config.LATER)
    """Router of a replaced projection. Its width decides what may be saved: of a 768 x 768 layer in experts of 8, a router of width 128
    costs 18 %, of width 16 2 %."""
    split: SplitConfig | None = None
    """How neurons are grouped into experts; none means co-activation where activations are at hand, else k-means of the weights."""
    rule: RuleConfig = field(default_factory=lambda: Threshold(theta=0.0))
    """Selection rule before calibration; theta = 0 runs every expert."""
    always_on: int = 0
    """Experts of each FFN that run for every token: those with the largest peak output norm on the calibration tokens."""
    policy: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Exceptions by site name, or by 're:' pattern on it: options to change there, or null to leave the FFN dense. An exact name wins, then
    the first matching pattern."""
    seed: int = 0
    """Seed of the routers' initial weights; added to the split's own seed."""

    def __post_init__(self) -> None:
        if self.expert_size < 1:
            raise ConfigError(f"expert_size must be at least 1, got {self.expert_size}.")
        if self.projection_expert_size < 1:
            raise ConfigError(f"projection_expert_size must be at least 1, got {self.projection_expert_size}.")
        if self.always_on < 0:
            raise ConfigError(f"always_on must be at least 0, got {self.always_on}.")
        check_patterns(self.policy)

    def split_method(self, *, default: SplitConfig) -> SplitConfig:
        """The split, or ``default`` where none is set, with ``seed`` added to its own."""
        method = self.split or default
        return method if isinstance(method, ContiguousSplit) else replace(method, seed=method.seed + self.seed)

    def for_site(self, name: str, *, is_projection: bool = False) -> "ConvertConfig | None":
        """The options at one site, the policy applied; None where it stays dense.

        At a replaced projection ``expert_size`` and ``router`` are those of projections, but where the policy's entry names them.

        Raises:
            ConfigError: a policy entry has an unknown option.
        """
        options = options_for(self, self.policy, name)
        if options is None or not is_projection:
            return options
        key = matching_key(self.policy, name)
        named = (self.policy[key] if key else None) or {}
        if "expert_size" not in named:
            options = replace(options, expert_size=options.projection_expert_size)
        return options if "router" in named else replace(options, router=options.projection_router)


def plan_conversion(model: nn.Module, sites: Sequence[FFNSite], config: ConvertConfig) -> list[tuple[SiteRecord, ConvertConfig]]:
    """Decide and check everything before anything is touched.

    Args:
        model: dense model, weights loaded.
        sites: what `find_ffn_sites` found.
        config: options and per-name policy.

    Returns:
        The record and the effective options of each site that will be converted. Which experts are always on is not known yet.

    Raises:
        ConfigError: a policy entry matches no site, an option is unknown, an expert is larger than the FFN, more are always on than exist,
            or the router is not for such an FFN.
        UnsupportedModelError: nothing is left to convert, a site is converted already or its weights cannot be permuted, or they hold NaN
            or infinity.
    """
    check_policy(config.policy, sites)
    plan = []
    for site in sites:
        options = config.for_site(site.name, is_projection=isinstance(model.get_submodule(site.name), ProjectionMLP))
        if options is None:
            continue
        if options.expert_size > site.d_ff:
            raise ConfigError(
                f"expert_size {options.expert_size} is larger than the {site.d_ff} neurons of '{site.name}'; choose at most {site.d_ff}."
            )
        check_router(options.router, site)
        if hasattr(model.get_submodule(site.name), "moe"):
            raise UnsupportedModelError(f"'{site.name}' is converted already; call to_dense(model) first.")
        if thin := next((path for path in (*site.first, site.down) if hasattr(model.get_submodule(path), CHILD)), None):
            raise UnsupportedModelError(f"'{thin}' skips input channels; convert first, or thin the layers of attention alone.")
        weights = site_weights(model, site)
        for tensor in weights.per_neuron():
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise UnsupportedModelError(f"'{site.name}' has NaN or infinite weights; the checkpoint is damaged.")
        num_experts = -(-site.d_ff // options.expert_size)
        if options.always_on > num_experts:
            raise ConfigError(f"always_on {options.always_on} is more than the {num_experts} experts of '{site.name}'.")
        record = SiteRecord(site=site, num_experts=num_experts, router=options.router, rule=options.rule)
        plan.append((record, options))
    if not plan:
        raise UnsupportedModelError("the policy leaves no FFN to convert.")
    return plan


def apply_site(model: nn.Module, record: SiteRecord, *, order_F: Tensor | None, router_state: Mapping[str, Tensor] | None = None) -> MoEFFN:
    """Permute one site's neurons (``None``: they are in order) and attach its executor; in place.

    Args:
        model: model that owns the site.
        record: what to attach.
        order_F: old neuron id of each new position.
        router_state: router tensors; None leaves them as built.

    Raises:
        CheckpointError: ``router_state`` does not fit the router.
    """
    if order_F is not None:
        permute_neurons(model, record.site, order_F)
    router = build_router(record.router, site=record.site, num_experts=record.num_experts)
    if router_state is not None:
        try:
            router.load_state_dict(dict(router_state))
        except RuntimeError as error:
            raise CheckpointError(f"'{record.site.name}': router tensors do not fit: {error}") from error
    kind = MoEProjection if isinstance(model.get_submodule(record.site.name), ProjectionMLP) else MoEFFN
    moe = kind(record.site, num_experts=record.num_experts, router=router, rule=record.rule, always_on=record.always_on)
    moe.to(_device_of(model, record.site))
    attach(model, moe)
    return moe


def convert(
    model: nn.Module, config: ConvertConfig, *, sites: Sequence[FFNSite], splits: Mapping[str, ExpertSplit] | None = None
) -> Manifest:
    """Turn the dense FFNs of ``model`` into mixtures of experts, in place.

    Routers come out as their config builds them: train them (`moeify.train.train_routers`) and calibrate the rule before use.

    Args:
        model: dense model.
        config: options; the default rule runs every expert, so the model's function is unchanged.
        sites: FFNs to convert, from `find_ffn_sites`.
        splits: ready-made splits by site name (co-activation needs a profile); the others are made from the weights.

    Returns:
        The manifest, also written into ``model.config`` so that ``save_pretrained`` keeps it; `set_rule` keeps it current.

    Raises:
        ConfigError, UnsupportedModelError: see `plan_conversion`; or a split is missing (co-activation), of another size, or of no site; or
            ``always_on`` asks for activations. Nothing has been changed then.
    """
    plan = plan_conversion(model, sites, config)
    splits = splits or {}
    if unknown := set(splits) - {record.site.name for record, _ in plan}:
        raise ConfigError(f"splits name {min(unknown)!r}, which is not converted.")
    orders = {}
    for record, options in plan:
        if options.always_on:
            raise ConfigError(
                f"'{record.site.name}': which experts are always on is read off activations; use convert_model, or leave always_on at 0."
            )
        split = splits.get(record.site.name)
        if split is None:
            if isinstance(options.split, Coactivation):
                raise ConfigError(
                    f"'{record.site.name}': a co-activation split needs activations; give it in splits, or use convert_model."
                )
            features_FK = parameter_features(site_weights(model, record.site))
            default = BalancedKMeans() if record.num_experts < record.site.d_ff else ContiguousSplit()  # of one neuron each: as they are
            split = split_neurons(features_FK, num_experts=record.num_experts, method=options.split_method(default=default))
        if (split.num_neurons, split.num_experts) != (record.site.d_ff, record.num_experts):
            raise ConfigError(
                f"the split of '{record.site.name}' has {split.num_neurons} neurons in {split.num_experts} experts, "
                f"the conversion {record.site.d_ff} in {record.num_experts}."
            )
        orders[record.site.name] = split.order_F
    for record, options in plan:
        with seeded(options.seed):
            apply_site(model, record, order_F=orders[record.site.name])
    return stamp(model)


def replace_projections(
    model: nn.Module,
    records: Sequence[ProjectionRecord],
    tensors: Mapping[str, Mapping[str, Tensor]] | None,
    *,
    seed: int = 0,
) -> None:
    """Put an MLP in the place of each named linear layer, in place; parts of fused layers that are kept get the original's rows.

    The model computes something else afterwards, unless the MLPs were fitted. Its manifest is written into ``model.config``.

    Args:
        model: dense model, on any device, meta included; every replacement is made with the layer's dtype, on its device.
        records: which layers, from `find_projections`; with them the sizes.
        tensors: weights of each replacement by the layer's name: ``up.weight``, ``up.bias``, ``down.weight``, ``down.bias``, in a fused
            layer with the part's name in front (``q.up.weight``). None draws all as `nn.Linear` does, from ``seed``.
        seed: of those draws; random numbers of others go on as they were.

    Raises:
        CheckpointError: a layer has other sizes than its record, or ``tensors`` do not fit. Nothing has been changed then.
        UnsupportedModelError: a layer is replaced, converted or thinned already, int8, or no plain linear layer.
    """
    _put_projections(model, records, tensors, seed=seed)
    stamp(model)


def _put_projections(
    model: nn.Module, records: Sequence[ProjectionRecord], tensors: Mapping[str, Mapping[str, Tensor]] | None, *, seed: int
) -> None:
    if unknown := set(tensors or {}) - {record.name for record in records}:
        raise CheckpointError(f"tensors name '{min(unknown)}', which is not among the projections to replace.")
    ready = []
    for i, record in enumerate(records):
        layer = check_replaceable(model, record.name)
        if (found := linear_sizes(layer)) != (record.d_in, record.d_out, record.bias):
            raise CheckpointError(
                f"the record of '{record.name}' has (inputs, outputs, bias) = {(record.d_in, record.d_out, record.bias)}, "
                f"the layer {found}."
            )
        weight = cast(nn.Parameter, layer.weight)
        with seeded(seed + i, weight.device):
            module = replacement_of(record, device=weight.device, dtype=weight.dtype)
        if tensors is not None:
            if record.name not in tensors:
                raise CheckpointError(f"tensors lack '{record.name}', which is to be replaced.")
            load_tensors(record.name, module, tensors[record.name])
        ready.append((record.name, module, layer))
    if len({name for name, _, _ in ready}) < len(ready):
        raise CheckpointError("a layer is named twice among the projections to replace.")
    for name, module, layer in ready:
        if isinstance(module, FusedProjection):
            keep_rows(module, layer)
        put_module(model, name, module.train(layer.training))


@contextmanager
def tried_projections(model: nn.Module, records: Sequence[ProjectionRecord]) -> Iterator[None]:
    """Random MLPs in the places of linear layers inside the ``with``, the layers themselves again afterwards: to see what the replaced
    model has (`find_ffn_sites`) and takes (`plan_conversion`) before anything is fitted.

    Raises:
        CheckpointError, UnsupportedModelError: as `replace_projections`.
    """
    layers = {record.name: model.get_submodule(record.name) for record in records}
    _put_projections(model, records, None, seed=0)
    try:
        yield
    finally:
        for name, layer in layers.items():
            put_module(model, name, layer)


def rebuild_projections(model: nn.Module, manifest: Manifest) -> None:
    """The first half of `rebuild`: replaced layers only. What is replaced as the manifest says is left alone.

    Raises:
        CheckpointError: a layer is not in the model, or has other sizes.
    """
    there = replaced_projections(model)
    for record in manifest.projections:
        if record.name in there and (found := record_of(record.name, there[record.name])) != record:
            raise CheckpointError(f"'{record.name}' is replaced already, and differently: {found}.")
    try:
        _put_projections(model, [r for r in manifest.projections if r.name not in there], None, seed=0)
    except UnsupportedModelError as error:
        raise CheckpointError(f"the manifest's projections do not fit this {type(model).__name__}: {error}") from error


def rebuild(model: nn.Module, manifest: Manifest) -> None:
    """Replace linear layers and attach executors to a dense skeleton, on any device, meta included; weights are in order already; the
    replacements' weights, routers and int8 weights are loaded by the caller.

    Raises:
        CheckpointError: a site or layer of the manifest is not in the model, or has other shapes.
    """
    rebuild_projections(model, manifest)
    modules = {name for name, _ in model.named_modules()}
    for record in manifest.sites:
        site = record.site
        try:
            weights = site_weights(model, site)
        except (AttributeError, UnsupportedModelError) as error:
            raise CheckpointError(f"manifest names '{site.name}', which this {type(model).__name__} has not: {error}") from error
        _check_paths(model, modules, site.name, (*site.first, site.down), inside=site.name)
        found = (weights.num_neurons, weights.up_FD.shape[1])
        if found != (site.d_ff, site.d_model):
            raise CheckpointError(f"manifest says '{site.name}' has (F, D) = {(site.d_ff, site.d_model)}, the model has {found}.")
        if weights.down_FD.shape[1] != site.d_out:
            raise CheckpointError(f"manifest says '{site.name}' has {site.d_out} outputs, the model has {weights.down_FD.shape[1]}.")
        if site.activation not in ACTIVATIONS:
            raise CheckpointError(f"manifest says '{site.name}' has the activation {site.activation!r}, which is not known.")
        if not 1 <= record.num_experts <= site.d_ff or any(not 0 <= e < record.num_experts for e in record.always_on):
            raise CheckpointError(
                f"manifest says '{site.name}' has {record.num_experts} experts, of which {record.always_on} always run; "
                f"that is no split of {site.d_ff} neurons."
            )
    for layer in manifest.channels:
        try:
            shape = tuple(linear_weight(model.get_submodule(layer.site.name)).shape)
            for path in () if layer.site.ffn is None else (layer.site.ffn.name, *layer.site.ffn.first):
                model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(f"manifest names '{layer.site.name}', which this {type(model).__name__} has not: {error}") from error
        ffn = layer.site.ffn
        _check_paths(model, modules, layer.site.name, () if ffn is None else (ffn.name, *ffn.first, ffn.down))
        if shape != (layer.site.d_out, layer.site.d_in):
            raise CheckpointError(
                f"manifest says '{layer.site.name}' has (N, K) = {(layer.site.d_out, layer.site.d_in)}, the model has {shape}."
            )
    for record in manifest.sites:
        if record.weights == "int8":
            quantize_site(model, record.site)
        apply_site(model, record, order_F=None)
    for layer in manifest.channels:
        if layer.weights == "int8":
            quantize_linear(model.get_submodule(layer.site.name))
        attach_channels(model, SparseInput(layer.site, rule=layer.rule, first_dense=layer.first_dense))
    if manifest.presets and hasattr(model, "config") and not store(model, manifest.presets):
        cast(Any, model).config.quantization_config = {"quant_method": "moeify", **manifest.to_dict()}


def _check_paths(model: nn.Module, modules: Container[str], name: str, paths: Sequence[str], *, inside: str | None = None) -> None:
    """Refuse a record whose paths are not modules of this model, or not within its own host: attributes are followed by name."""
    for path in (name, *paths):
        if path not in modules:
            raise CheckpointError(f"manifest names '{path[:200]}', which this {type(model).__name__} has not.")
        if inside and path != inside and not path.startswith(f"{inside}."):
            raise CheckpointError(f"manifest says '{name[:200]}' has the projection '{path[:200]}', which lies outside it.")


def check_levels(model: nn.Module, manifest: Manifest) -> None:
    """Refuse levels, and rules on scores that are read off an FFN's weights, that belong to other weights than the model's: norm or signed
    sum differ by more than 1 % of the norm.

    Rounding to another dtype, or to int8, moves neither by as much.

    Raises:
        CheckpointError: names the first layer.

    Cost: reads the weights of the manifest's layers once, those of FFNs where the router needs it; two host syncs a weight.
    """
    for record in manifest.channels:
        weight_NK = linear_weight(model.get_submodule(record.site.name))
        if weight_NK.is_meta:
            continue
        _check_fingerprint(f"levels of '{record.site.name}'", (record.weight_norm, record.weight_projection), fingerprint(weight_NK))
    for name, moe in moe_layers(model).items():
        stored = next((record.weight_norms for record in manifest.sites if record.site.name == name), ())
        for was, found in zip(stored, weight_norms_of(moe), strict=False):
            _check_fingerprint(f"router and rule of '{name}'", was, found)


def _check_fingerprint(what: str, was: tuple[float, float], found: tuple[float, float]) -> None:
    room = 0.01 * was[0]
    if any(abs(now - then) > room for now, then in zip(found, was, strict=True)):
        raise CheckpointError(
            f"the {what} were calibrated for other weights (of norm {was[0]:.4g}, these have {found[0]:.4g}); calibrate this model itself, "
            "or load the weights that they belong to."
        )


def to_dense(model: nn.Module) -> None:
    """Remove every executor and router, in place; the model is dense again and equal (its neurons stay permuted).

    Replaced linear layers stay replaced, and the manifest names them: their originals are gone.

    Int8 weights become floating ones of the model's dtype: the numbers that they stood for, not those from before they were quantised.
    """
    sites = [moe.site for moe in moe_layers(model).values()]
    linears = [model.get_submodule(name) for name in sparse_inputs(model)]
    for site in sites:
        detach(model, site.name)
    detach_channels(model)
    int8 = [site for site in sites if has_int8(model, site)]
    int8_linears = [linear for linear in linears if isinstance(linear, Int8Linear)]
    dtype = _float_dtype(model)
    for site in int8:
        dequantize_site(model, site, dtype=dtype)
    for linear in int8_linears:
        to_float(linear, dtype=dtype)
    if (int8 or int8_linears) and hasattr(model, "is_quantized"):
        cast(Any, model).is_quantized = False
    if replaced_projections(model):
        stamp(model)
    elif getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del cast(Any, model).config.quantization_config
        mark(model)


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights: of the first that floats and is no scale of int8 ones."""
    named = model.named_parameters()
    return next((p.dtype for name, p in named if p.is_floating_point() and not name.endswith("weight_scale")), torch.float32)


def _device_of(model: nn.Module, site: FFNSite) -> torch.device:
    return next(model.get_submodule(site.down).parameters()).device
