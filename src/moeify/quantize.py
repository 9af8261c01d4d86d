"""Int8 weights for the experts of a converted model: a quarter of fp32's bytes, half of bf16's, and bytes are what decoding waits for.

Symmetric, one scale for each output of a projection: w = scale * q with scale = max|w of that output| / 127. Activations, biases and
routers stay as they are.
"""

from collections import Counter

import torch
from torch import nn

from .errors import UnsupportedModelError
from .layers import moe_layers
from .sites import FFNWeights, has_int8, quantize_site, site_weights


@torch.no_grad()
def quantize(model: nn.Module) -> dict[str, float]:
    """Give every converted FFN of ``model`` int8 weights, in place; FFNs that stayed dense are left as they are.

    The dense mode runs the same weights, dequantised at every call. There is no equal dense checkpoint any more: without moeify, the saved
    files are refused. The weights do not train; gradients go through them to what comes before.

    Args:
        model: converted model, its weights in memory and of any floating dtype.

    Returns:
        |scale * q - w| / |w| of each FFN's matrices together (Frobenius norms), by site name.

    Raises:
        UnsupportedModelError: the model is dense or has int8 weights already; an FFN's projections are not its own any more (adapters,
            hooks, offload, a weight tied to another module's), or hold NaN or infinity. Nothing has been changed then.

    Cost: two passes over the weights; fp32 copies of one FFN at a time.
    """
    layers = moe_layers(model)
    if not layers:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
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
    errors = {}
    for name, moe in layers.items():
        before = site_weights(model, moe.site)
        quantize_site(model, moe.site)
        moe.lay_out()
        errors[name] = _relative_error(before, site_weights(model, moe.site).dequantized(torch.float32))
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
