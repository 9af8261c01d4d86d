"""Loads a converted checkpoint inside ``from_pretrained``.

transformers calls a model that comes with its own structure "quantized" and lets a registered `HfQuantizer` change the skeleton before
weights are loaded. ``config.json`` holds ``quantization_config = {"quant_method": "moeify", **manifest}``; the model class, its parameters'
names and everything else stay the family's own, so auto classes, pipelines, Trainer, PEFT and generation need to know nothing.
"""

import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..channels import CHILD, lay_out_channels, sparse_inputs
from ..convert import check_levels, rebuild, rebuild_projections, to_dense
from ..errors import CheckpointError
from ..layers import moe_layers
from ..manifest import ChannelRecord, Manifest, SiteRecord, manifest_of
from ..presets import with_rules_of
from ..sites import FFNSite, ProjectionRecord, projection_mlps, replaced_projections
from ..sites.int8 import Int8Linear
from ..sparsity.activation import restore_activations
from .registration import AUTO, QUANT_METHOD, is_loading, register

_ROUTER = ".moe.router."
_SCALE = ".weight_scale"
_LEVEL = f".{CHILD}.level_K"
_MLP = (".up.weight", ".up.bias", ".down.weight", ".down.bias")
_Signature = tuple[tuple[str, ...], str, tuple[int, ...]]
_Record = SiteRecord | ChannelRecord | ProjectionRecord


class MoeifyConfig(QuantizationConfigMixin):
    """The manifest, in the clothes that transformers wants.

    Args:
        manifest: structure of the converted model.
        quant_method: the tag in ``config.json``.
        fields: the manifest's JSON fields, in place of ``manifest``.

    Raises:
        CheckpointError: newer schema, unknown or malformed field; names it.
    """

    def __init__(self, manifest: Manifest | None = None, *, quant_method: str = QUANT_METHOD, **fields: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment] # transformers' own methods are an enum
        self.manifest = Manifest.from_dict(fields, where="config.json: quantization_config") if manifest is None else manifest

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` stores."""
        return {"quant_method": self.quant_method, **self.manifest.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class MoeifyQuantizer(HfQuantizer):
    """Attaches the executors of the manifest to the skeleton; transformers then loads dense and router tensors by their names."""

    quantization_config: MoeifyConfig
    requires_calibration = True  # a dense checkpoint is converted by `moeify convert`, not while it loads

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: object
    ) -> nn.Module:
        stored = self.quantization_config.manifest
        manifest = _resolve(model, stored)
        self.quantization_config = MoeifyConfig(manifest)
        if hasattr(model, "config"):  # its presets then name the layers of this class
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        rebuild_projections(model, manifest)
        restore_activations(model)
        rebuild(model, manifest)
        for moe in moe_layers(model).values():
            moe.router.float()  # stays fp32 whatever dtype the model is loaded in: the loader keeps a parameter's own dtype
        if checkpoint_files:
            is_whole = all(
                len(ours) == len(theirs)
                for ours, theirs in (
                    (manifest.sites, stored.sites),
                    (manifest.channels, stored.channels),
                    (manifest.projections, stored.projections),
                )
            )
            _check_own_tensors(model, checkpoint_files, is_whole=is_whole)
        self._int8_shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, Int8Linear)}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: object) -> nn.Module:
        _mark(model, has_int8=self.quantization_config.manifest.has_int8)
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                module.weight_scale.requires_grad_(False)  # what is loaded is made a trainable parameter
                # Older transformers take any shape for a quantised model's parameters.
                if module.weight.dtype is not torch.int8 or module.weight.shape != self._int8_shapes[name]:
                    raise CheckpointError(
                        f"'{name}.weight' has shape {tuple(module.weight.shape)} and type {module.weight.dtype}, its manifest says "
                        f"{tuple(self._int8_shapes[name])} and int8; restore the file, or quantise the model again."
                    )
        for projection in (*replaced_projections(model).values(), *projection_mlps(model).values()):
            projection.weight.requires_grad_(False)
        for moe in moe_layers(model).values():
            moe.lay_out()
        lay_out_channels(model)
        check_levels(model, self.quantization_config.manifest)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        """No change of the tensors; ``save_pretrained`` asks this before it writes ``config.json``, so rules set since are saved."""
        if moe_layers(model) or sparse_inputs(model) or replaced_projections(model):
            self.quantization_config = MoeifyConfig(manifest_of(model))
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        to_dense(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *_: object, **__: object) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, all parameters but the routers': a loss of the model's output gives these no gradient, because which experts run is not
        differentiable. DDP needs ``find_unused_parameters=True`` therefore, or routers with ``requires_grad_(False)``."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer takes the model without adapters: yes, but with int8 weights, most of which it could not train."""
        return not self.quantization_config.manifest.has_int8

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def adopt(model: nn.Module) -> None:
    """Treat a model that was converted in memory like one that ``from_pretrained`` rebuilt: ``save_pretrained`` writes its rules."""
    if hasattr(model, "save_pretrained"):
        config = MoeifyConfig(manifest_of(model))
        model.config.quantization_config = config  # type: ignore[union-attr]
        model.hf_quantizer = MoeifyQuantizer(config)  # type: ignore[assignment]
        _mark(model, has_int8=config.manifest.has_int8)


def _mark(model: nn.Module, *, has_int8: bool) -> None:
    """Without int8 weights nothing is quantised: .half(), .float() and Trainer are to treat it as the plain model that it is."""
    model.is_quantized = has_int8  # type: ignore[assignment]


def _resolve(model: nn.Module, manifest: Manifest) -> Manifest:
    """The manifest with module paths of this model class: a checkpoint of LlamaForCausalLM also loads as LlamaModel, and the reverse.

    Raises:
        CheckpointError: no site is in the model, or one is missing in the class that wrote the checkpoint.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".lstrip(".")
    names = {name for name, _ in model.named_modules()}
    found: list[SiteRecord] = []
    channels: list[ChannelRecord] = []
    projections: list[ProjectionRecord] = []
    lost = []
    names_now: dict[str, str] = {}
    records: list[_Record] = [*manifest.projections, *manifest.sites, *manifest.channels]
    for record in records:
        moved = (_moved(record, drop=drop, add=add) for drop, add in (("", ""), (prefix, ""), ("", prefix)))
        match = next((r for r in moved if r is not None and _place(r) in names), None)
        if match is not None:
            names_now[_name(record)] = _name(match)
        if match is None:
            lost.append(("FFN" if isinstance(record, SiteRecord) else "linear layer", _name(record)))
        elif isinstance(match, SiteRecord):
            found.append(match)
        elif isinstance(match, ChannelRecord):
            channels.append(match)
        else:
            projections.append(match)
            names |= {f"{path}.{part}" for path in match.mlps for part in ("up", "down")}  # there after `rebuild_projections`
    wrote = getattr(getattr(model, "config", None), "architectures", None) or ()
    if lost and (not (found or channels or projections) or type(model).__name__ in wrote):
        raise CheckpointError(
            f"config.json: quantization_config names the {lost[0][0]} '{lost[0][1]}', which this {type(model).__name__} has not; "
            "the manifest is of another model."
        )
    if lost:  # the decoder's, where only the encoder of an encoder-decoder is loaded
        warnings.warn(
            f"{type(model).__name__} has no place for {len(lost)} layers of the checkpoint: {', '.join(name for _, name in lost)}.",
            stacklevel=2,
        )
    presets = [renamed for preset in manifest.presets if (renamed := with_rules_of(preset, names_now)) is not None]
    return replace(manifest, sites=tuple(found), channels=tuple(channels), projections=tuple(projections), presets=tuple(presets))


def _name(record: _Record) -> str:
    return record.name if isinstance(record, ProjectionRecord) else record.site.name


def _place(record: _Record) -> str:
    """A module path that a model has if it has the record's site."""
    return record.site.down if isinstance(record, SiteRecord) else _name(record)


def _moved(record: _Record, *, drop: str, add: str) -> _Record | None:
    """The record with ``drop`` cut off in front of its paths and ``add`` put there; None where they do not start with ``drop``."""

    def move(path: str) -> str:
        return (add + f"{path}.".lstrip(".")[len(drop) :]).rstrip(".")

    def move_ffn(site: FFNSite) -> FFNSite:
        gate = None if site.gate is None else move(site.gate)
        return replace(site, name=move(site.name), up=move(site.up), down=move(site.down), gate=gate)

    if not f"{_name(record)}.".startswith(drop):
        return None
    if isinstance(record, ProjectionRecord):
        return replace(record, name=move(record.name))
    if isinstance(record, ChannelRecord):
        linear = record.site
        ffn = None if linear.ffn is None else move_ffn(linear.ffn)
        moved = replace(linear, name=move(linear.name), reads=move(linear.reads), block=move(linear.block), ffn=ffn)
        return replace(record, site=moved)
    return replace(record, site=move_ffn(record.site))


def _check_own_tensors(model: nn.Module, checkpoint_files: Iterable[str], *, is_whole: bool) -> None:
    """Refuse a checkpoint whose routers, int8 scales, levels or replaced layers are not the skeleton's; transformers would fill gaps with
    random numbers.

    Reads the files' headers only. Of replaced layers only what is missing can be told: a family may have names like theirs of its own.

    Raises:
        CheckpointError: such tensors are missing, have other shapes, or (with ``is_whole``) there are more of them; names the first.
    """
    state = model.state_dict()
    guards = {f"{name}.weight" for name in (*replaced_projections(model), *projection_mlps(model))}
    mlps = guards | {f"{name}{tail}" for name in projection_mlps(model) for tail in _MLP if f"{name}{tail}" in state}
    expected = {name: _signature(name, tuple(tensor.shape)) for name, tensor in state.items() if _is_own(name) or name in mlps}
    found: dict[str, _Signature] = {}
    for path in map(str, checkpoint_files):
        if not path.endswith(".safetensors"):
            raise CheckpointError(f"'{path}' is not a safetensors file; moeify reads no pickled weights.")
        try:
            with safe_open(path, framework="pt") as file:
                found |= {
                    key: _signature(key, tuple(file.get_slice(key).get_shape()))
                    for key in file.keys()  # noqa: SIM118
                    if _is_own(key) or (mlps and (key.endswith(_MLP) or list(file.get_slice(key).get_shape()) == [1]))
                }
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' is truncated or not a safetensors file ({error}).") from error
    missing = Counter(expected.values()) - Counter(found.values())
    extra = Counter(signature for key, signature in found.items() if _is_own(key)) - Counter(expected.values())
    if missing:
        like_missing = [(name, signature) for name, signature in expected.items() if signature in missing]
        # Several may be alike; one that the file does not have under this very name, or in another shape, is it.
        first, (*_, shape) = next((pair for pair in like_missing if found.get(pair[0]) != pair[1]), like_missing[0])
        raise CheckpointError(
            f"the checkpoint lacks {missing.total()} {_kind(first, mlps)} tensors that its manifest asks for, first '{first}' of shape "
            f"{shape}; restore the file, or convert the model again."
        )
    if extra and is_whole:
        first = next(key for key, signature in found.items() if _is_own(key) and signature in extra)
        raise CheckpointError(
            f"the checkpoint has {extra.total()} {_kind(first, mlps)} tensors that its manifest does not name, first '{first}'."
        )


def _signature(key: str, shape: tuple[int, ...]) -> _Signature:
    """What a tensor's key in a file and its name in the model share: the numbers in the path, what follows the router or module, the shape.

    The rest of the path may differ: files of ViT-like models say "vit.encoder.layer.0" for the module "layers.0".
    """
    if _ROUTER in f".{key}":
        path, _, tail = f".{key}".partition(_ROUTER)
    else:
        tail = next((tail for tail in _MLP if key.endswith(tail)), key.rpartition(".")[2])
        path = key.removesuffix(tail)
    return tuple(part for part in path.split(".") if part.isdigit()), tail, shape


def _is_own(key: str) -> bool:
    """Whether no dense model has such a tensor. Integers without scales, and scales without integers, fail by their shapes."""
    return _ROUTER in f".{key}" or key.endswith((_SCALE, _LEVEL))


def _kind(key: str, mlps: Container[str]) -> str:
    if key in mlps:
        return "projection"
    return "router" if _ROUTER in f".{key}" else "level" if key.endswith(_LEVEL) else "scale"


if not is_loading(AUTO):  # this module was imported before transformers' model code, and the hook found it half made
    register()
