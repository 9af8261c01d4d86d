"""What one sets on a converted or thinned model as a whole, and counts in it: mode, rules, kernels, executed neurons.

Letters: B batch, S tokens of a sequence.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from . import _config
from .channels import SparseInput, kept, sparse_inputs
from .errors import ConfigError, UnsupportedModelError
from .kernels.linear import IMPLS as LINEAR_IMPLS
from .layers import ActiveRecorder, Mode, MoEFFN, moe_layers
from .presets import find_preset
from .select import Rule
from .sites import in_decoder


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Run every converted FFN dense, or as a mixture of experts; linear layers with all input channels, or without those they skip.

    No weight is copied.

    Raises:
        ConfigError: the mode is neither "dense" nor "moe".
    """
    if mode not in ("dense", "moe"):
        raise ConfigError(f"mode must be 'dense' or 'moe', got {mode!r}.")
    for layer in with_modes(model):
        layer.mode = mode


def with_modes(model: nn.Module) -> list[MoEFFN | SparseInput]:
    """All that `set_mode` sets: what whoever changes modes for a while must give back (`moeify.channels.kept`)."""
    return [*moe_layers(model).values(), *sparse_inputs(model).values()]


def check_dense(model: nn.Module, source: str) -> None:
    """Refuse a model that was made from a dense one, where that is wanted.

    Raises:
        UnsupportedModelError: it has a MoE layer, or a layer that skips channels; names ``source``, where it came from.
    """
    if with_modes(model):
        what = "converted" if moe_layers(model) else "thinned"
        raise UnsupportedModelError(f"'{source}' is {what} already; give the dense checkpoint that it was made from.")


class SetRules:
    """What `set_rule` returns. The rules are set already; used with ``with``, the earlier ones come back when the block ends."""

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule], before: Mapping[str, Rule]) -> None:
        self.model = model
        self.rules = dict(rules)
        """What was set, by layer."""
        self.before = dict(before)
        """What the same layers had until then."""

    def restore(self) -> None:
        """Put back what the layers had before, in the model and in the manifest in its config; layers that are gone are left out."""
        _put_rules(self.model, self.before)

    def __enter__(self) -> "SetRules":
        _put_rules(self.model, self.rules)  # nothing new the first time; a handle that is used again sets its rules again
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def set_rule(model: nn.Module, rule: Rule | Mapping[str, Rule] | str) -> SetRules:
    """Set the selection rule of every MoE layer, or of the named ones, or what a preset says; ``save_pretrained`` writes it.

    At once, and until another call; or for a ``with`` block, after which the layers have the rules from before again, nested as deep as
    wanted. Rules are the model's: threads that share it share them.

        moeify.set_rule(model, "fast")
        with moeify.set_rule(model, "quality"):
            model.generate(**inputs)

    Linear layers that skip channels have rules, too, on ``|x| / level``: ``Threshold(theta)`` multiplies their levels by theta. A mapping
    or a preset may name them; a rule for all goes to them where the model has no MoE layer.

    Args:
        model: converted or thinned model; a part of one has its own layers set.
        rule: one for all, one for each named layer, or the name of a preset (`moeify.presets`).

    Returns:
        A handle that, used with ``with`` or by ``restore()``, puts back the rules that the layers had before this call.

    Raises:
        ConfigError: a name is neither a MoE layer of the model nor a layer that skips channels; or there is no such preset. Nothing has
            been changed then.
    """
    layers = _ruled_layers(model)
    rules: Mapping[str, Rule]
    if isinstance(rule, str):
        preset = find_preset(model, rule)
        rules = {name: one for name, one in preset.rules.items() if name in layers}
        if not rules:
            raise ConfigError(f"preset {rule!r} is for other layers than this {type(model).__name__} has: {', '.join(preset.rules)}.")
    else:
        rules = rule if isinstance(rule, Mapping) else dict.fromkeys(moe_layers(model) or layers, rule)
    if unknown := set(rules) - set(layers):
        raise ConfigError(f"no MoE layer {min(unknown)!r} in this model; layers: {', '.join(layers)}.")
    before = {name: layers[name].rule for name in rules}
    _put_rules(model, rules)
    return SetRules(model, rules, before)


def set_impl(model: nn.Module, impl: str) -> None:
    """Choose the kernel of every MoE layer: "auto" or a key of `moeify.kernels.IMPLS`; an explicit one never falls back.

    Layers that skip input channels take it, too, where it is "auto" or a key of `moeify.kernels.linear.IMPLS`; of a model that has no
    others it must be.

    Raises:
        ConfigError: no layer of the model knows such a kernel.
    """
    layers, inputs = moe_layers(model), sparse_inputs(model)
    for layer in layers.values():
        layer.impl = impl
    if inputs and not layers:
        _config.lookup(dict.fromkeys(("auto", *LINEAR_IMPLS)), impl, where="impl")
    if impl in ("auto", *LINEAR_IMPLS):
        for executor in inputs.values():
            executor.impl = impl


def store_by_shape(model: nn.Module) -> None:
    """Give every parameter the order in memory of its shape, in place: what ``fully_shard`` (FSDP2) asks for; values and identity stay.

    A converted model's down projections lie by neuron, as the kernels read them (`MoEFFN.lay_out`). Loading and ``convert`` order them so
    again; ``moeify.train`` calls this itself.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


@contextmanager
def record_active(model: nn.Module, recorder: ActiveRecorder | None = None) -> Iterator[ActiveRecorder]:
    """Count the active fraction of every forward inside the ``with``, or whatever ``recorder`` counts."""
    recorder, layers = recorder or ActiveRecorder(), list(moe_layers(model).values())
    with kept(layers, "recorder"):
        for layer in layers:
            layer.recorder = recorder
        yield recorder


@contextmanager
def token_mask(model: nn.Module, mask_BS: Tensor | None, *, decoder_mask_BS: Tensor | None = None) -> Iterator[None]:
    """Leave padding out of what `record_active` and `record_channels` count inside the ``with``.

    Args:
        model: converted or thinned model.
        mask_BS: ``attention_mask``; False or 0 at padding. A layer whose tokens are neither (B, S) nor flattened to (B * S,) counts all.
        decoder_mask_BS: ``decoder_attention_mask`` of an encoder-decoder: its decoder's layers take this mask, and never the encoder's.
    """
    executors: list[MoEFFN | SparseInput] = [*moe_layers(model).values(), *sparse_inputs(model).values()]
    layers = [layer for layer in executors if layer.recorder is not None]
    masks = {layer.site.name: decoder_mask_BS if in_decoder(model, layer.site) else mask_BS for layer in layers}
    recorders = {id(r): r for layer in layers if (r := layer.recorder) is not None}.values()
    for recorder in recorders:
        recorder.token_masks = masks
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.token_masks = {}


def _ruled_layers(model: nn.Module) -> dict[str, MoEFFN | SparseInput]:
    return {**sparse_inputs(model), **moe_layers(model)}


def _put_rules(model: nn.Module, rules: Mapping[str, Rule]) -> None:
    """The rules at those of the named layers that the model has, and what its config says of them."""
    layers = _ruled_layers(model)
    for name, one in rules.items():
        if name in layers:
            layers[name].rule = one
    # What `convert` wrote into the config; of a model from from_pretrained it is an object, which asks the model when it is saved.
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    for record in (*stored["sites"], *stored.get("channels", ())) if isinstance(stored, dict) else ():
        if record["site"]["name"] in rules:
            record["rule"] = _config.to_dict(rules[record["site"]["name"]])
