"""Int8 weights for experts, and for layers that skip input channels: a quarter of fp32's bytes, half of bf16's; decoding waits for bytes.

Symmetric, one scale for each output of a projection: w = scale * q with scale = max|w of that output| / 127. Activations, biases and
routers stay as they are.
"""

from collections import Counter

import torch
from torch import nn

from .channels import lay_out_channels, sparse_inputs
from .errors import UnsupportedModelError
from .layers import moe_layers
from .sites import (
    FFNWeights,
    Int8Linear,
    has_int8,
    linear_weight,
    not_plain_reason,
    quantize_linear,
    quantize_site,
    site_weights,
)


@torch.no_grad()
def quantize(model: nn.Module) -> dict[str, float]:
    """Give every converted FFN of ``model``, and every layer that skips input channels, int8 weights, in place; all others stay.

    The dense mode runs the same weights, dequantised at every call. There is no equal dense checkpoint any more: without moeify, the saved
    files are refused. The weights do not train; gradients go through them to what comes before.

    Args:
        model: converted or thinned model, its weights in memory and of any floating dtype.

    Returns:
        |scale * q - w| / |w| (Frobenius norms) of each FFN's matrices together, and of each layer's, by name.

    Raises:
        UnsupportedModelError: the model is dense or has int8 weights already; an FFN's projections are not its own any more (adapters,
            hooks, offload, a weight tied to another module's), or hold NaN or infinity. Nothing has been changed then.

    Cost: two passes over the weights; fp32 copies of one FFN at a time.
    """
    layers, linears = moe_layers(model), {name: model.get_submodule(name) for name in sparse_inputs(model)}
    if not layers and not linears:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it, or thin it, first.")
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, moe in layers.items():
        if (reason := moe.masked_reason()) is not None:
            raise UnsupportedModelError(
                f"'{name}' cannot have int8 weights: {reason}; merge adapters, remove hooks and offload, and call model.eval() first."
            )
        if has_int8(model, moe.site):
            raise UnsupportedModelError(f"'{name}' has int8 weights already.")
        if tied := next((p for p in (*moe.site.first, moe.site.down) if uses[id(model.get_submodule(p).weight)] > 1), None):
            raise UnsupportedModelError(f"'{name}' cannot have int8 weights: '{tied}' shares its weight with another module.")
        if not all(torch.isfinite(tensor).all() for tensor in site_weights(model, moe.site).per_neuron()):
            raise UnsupportedModelError(f"'{name}' has NaN or infinite weights; the checkpoint is damaged.")
    for name, linear in linears.items():
        if isinstance(linear, Int8Linear):
            raise UnsupportedModelError(f"'{name}' has int8 weights already.")
        if (reason := not_plain_reason(linear)) is not None:
            raise UnsupportedModelError(f"'{name}' cannot have int8 weights: it {reason}; merge adapters, remove hooks and offload first.")
        if uses[id(linear.weight)] > 1:
            raise UnsupportedModelError(f"'{name}' cannot have int8 weights: it shares its weight with another module.")
        if not bool(torch.isfinite(linear_weight(linear)).all()):
            raise UnsupportedModelError(f"'{name}' has NaN or infinite weights; the checkpoint is damaged.")
    errors = {}
    for name, moe in layers.items():
        before = site_weights(model, moe.site)
        quantize_site(model, moe.site)
        moe.lay_out()
        errors[name] = _relative_error(before, site_weights(model, moe.site).dequantized(torch.float32))
    for name, linear in linears.items():
        weight_NK = linear_weight(linear).detach().float()
        quantize_linear(linear)
        errors[name] = float((linear_weight(linear) - weight_NK).norm() / weight_NK.norm().clamp(min=torch.finfo(torch.float32).tiny))
    lay_out_channels(model)
    if hasattr(model, "save_pretrained"):
        from .hf.quantizer import adopt  # here, and not on top: it imports transformers' model code, which takes seconds

        adopt(model)
    return errors


def _relative_error(weights: FFNWeights, quantized: FFNWeights) -> float:
    error = norm = 0.0
    for name in ("up_FD", "gate_FD", "down_FD"):
        if (w := getattr(weights, name)) is not None:
            error += (getattr(quantized, name) - w.float()).square().sum().item()
            norm += w.float().square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0
