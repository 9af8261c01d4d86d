"""Where a dense FFN lives and how its weights are stored.

Letters: D model width, F FFN width, E experts, G expert size.

This file is the only place that knows how a module stores its weights (nn.Linear, Conv1D, fused gate and up); everybody else sees
`FFNWeights`, the canonical (F, D) view. The views alias the model's own Parameters: writing into them writes into the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ConfigError, UnsupportedModelError
from .int8 import Int8DownLinear, Int8Linear, dequantize, to_float, to_int8

# Classes whose forward is exactly x @ W^T + b although they are neither nn.Linear itself nor transposed like Conv1D. By name, so that
# nothing has to be imported; discovery's probe still proves the algebra for each site.
PLAIN_LINEAR_CLASSES = frozenset({"FalconLinear", "NonDynamicallyQuantizableLinear"})


class Named(Protocol):
    """Anything that has a module path."""

    @property
    def name(self) -> str:
        """Path from the model's root."""


@dataclass(frozen=True, kw_only=True)
class FFNSite:
    """One dense FFN of a model: ``y = down(act(up(x)))`` or ``y = down(act(gate(x)) * up(x))``.

    All paths are module paths from the model's root (`nn.Module.get_submodule`), never keys of a checkpoint file.
    """

    name: str
    """Path of the innermost module that contains every projection of the FFN (an MLP, or the whole layer for OPT or BERT)."""
    up: str
    """Path of the up projection; of the fused projection where ``fused`` is set."""
    down: str
    """Path of the down projection."""
    gate: str | None = None
    """Path of the gate projection of a GLU whose gate is a module of its own."""
    fused: Literal["gate_up", "up_gate"] | None = None
    """Order of the two halves where one projection computes gate and up together."""
    activation: str
    """Name of the elementwise function in `moeify.sites.formula.ACTIVATIONS`."""
    d_model: int
    """Width D of the FFN's input."""
    d_ff: int
    """Number F of neurons."""
    d_out: int
    """Width of the FFN's output; equal to ``d_model`` but for rare adapters."""
    explicit_width: bool = False
    """Whether the code between the projections works with explicit sizes (slices, reshapes), so that a stand-in needs the full width."""

    @property
    def is_gated(self) -> bool:
        """Whether the FFN is a GLU."""
        return self.gate is not None or self.fused is not None

    @property
    def first(self) -> tuple[str, ...]:
        """Paths of the projections that read the FFN's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class FFNWeights:
    """The weights of one FFN in canonical layout; a neuron is one index of F in every tensor.

    h = act(x up_FD^T + up_bias_F), or gated act(x gate_FD^T + gate_bias_F) * (x up_FD^T + up_bias_F);   y = h down_FD + down_bias_D

    The matrices are all floating, or all int8 with one fp32 scale for each of the projection's outputs:
    up = up_scale_F[:, None] * q_FD, gate likewise, down = q_FD * down_scale_D.
    """

    up_FD: Tensor
    down_FD: Tensor
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    up_scale_F: Tensor | None = None
    gate_scale_F: Tensor | None = None
    down_scale_D: Tensor | None = None

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    def per_neuron(self) -> Iterator[Tensor]:
        """The tensors whose first dimension is the neuron: all but the output's bias and scale."""
        for name, tensor in vars(self).items():
            if tensor is not None and name not in ("down_bias_D", "down_scale_D"):
                yield tensor

    def dequantized(self, dtype: torch.dtype) -> "FFNWeights":
        """The floating weights that int8 ones stand for, rounded to ``dtype``; floating weights as they are."""
        if self.up_scale_F is None:
            return self

        def floating(q_FD: Tensor | None, scale: Tensor | None) -> Tensor | None:
            return q_FD if q_FD is None or scale is None else dequantize(q_FD, scale, dtype=dtype)

        return FFNWeights(
            up_FD=cast(Tensor, floating(self.up_FD, self.up_scale_F[:, None])),
            down_FD=cast(Tensor, floating(self.down_FD, self.down_scale_D)),
            gate_FD=floating(self.gate_FD, None if self.gate_scale_F is None else self.gate_scale_F[:, None]),
            up_bias_F=self.up_bias_F,
            gate_bias_F=self.gate_bias_F,
            down_bias_D=self.down_bias_D,
        )


def site_weights(model: nn.Module, site: FFNSite) -> FFNWeights:
    """The canonical view of a site's weights; no copy, also on meta tensors.

    Raises:
        UnsupportedModelError: a projection is not a plain Linear or Conv1D (`not_plain_reason` says why).
    """
    up, up_bias, up_scale = _linear_view(model, site.up)
    down_DF, down_bias, down_scale = _linear_view(model, site.down)
    gate, gate_bias, gate_scale = (None, None, None) if site.gate is None else _linear_view(model, site.gate)
    if site.fused:
        gate_half = 0 if site.fused == "gate_up" else 1  # torch.compile of torch 2.11 takes no bool as an index
        halves = up.chunk(2)
        bias, scale = ((None, None) if both is None else both.chunk(2) for both in (up_bias, up_scale))
        gate, gate_bias, gate_scale = halves[gate_half], bias[gate_half], scale[gate_half]
        up, up_bias, up_scale = halves[1 - gate_half], bias[1 - gate_half], scale[1 - gate_half]
    return FFNWeights(up, down_DF.t(), gate, up_bias, gate_bias, down_bias, up_scale, gate_scale, down_scale)


def linear_weight(linear: nn.Module) -> Tensor:
    """The (out, in) view of a plain layer's floating weight, no copy; of int8 weights the fp32 numbers that they stand for."""
    if isinstance(linear, Int8DownLinear):
        return linear.rows(torch.float32).t()
    weight = cast(Tensor, linear.weight)
    return weight.t() if is_transposed(linear) else weight


def is_transposed(linear: nn.Module) -> bool:
    """Whether ``linear`` stores (in, out): transformers' Conv1D."""
    return type(linear).__name__ == "Conv1D" and hasattr(linear, "nf")


def not_plain_reason(module: nn.Module, *, allow_meta: bool = False) -> str | None:
    """Why the executor must not read this projection's weights directly; None if it may (decision D7).

    Adapters (LoRA), offload hooks, quantised subclasses and user hooks change what the module computes: its weight is not the whole truth.
    """
    kind = type(module)
    is_int8 = kind in (Int8Linear, Int8DownLinear)
    if not (is_int8 or kind is nn.Linear or is_transposed(module) or kind.__name__ in PLAIN_LINEAR_CLASSES):
        name = f"{kind.__module__}.Linear" if kind.__name__ == "Linear" else kind.__name__  # an adapter's class may be called Linear, too
        return f"is a {name}, not a plain Linear or Conv1D"
    if hasattr(module, "_hf_hook"):
        return "has an accelerate hook (offload or device map)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if "weight" not in module._parameters:
        return "has no plain weight parameter (parametrised)"
    weight = module._parameters["weight"]
    assert weight is not None
    if type(weight) not in (nn.Parameter, Tensor) and not (torch.compiler.is_compiling() and isinstance(weight, FakeTensor)):
        return f"has a {type(weight).__name__} as its weight"
    if not weight.is_floating_point() and not is_int8:
        return f"has {weight.dtype} weights"
    if weight.is_meta and not allow_meta:
        return "is on the meta device"
    return None


def in_decoder(model: nn.Module, site: Named) -> bool:
    """Whether a site is in the decoder of an encoder-decoder, where padding is that of ``decoder_attention_mask``."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and "decoder" in site.name.split(".")


def mask_name(model: nn.Module, site: Named) -> str:
    """The argument of the model's forward that says which of a site's tokens are padding."""
    return "decoder_attention_mask" if in_decoder(model, site) else "attention_mask"


def token_mask_of(mask_BS: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The padding mask of tokens that have this shape, (B, S), or (T,) where the model has flattened them: bool (T,), True at real tokens.

    None where there is none or it is of other tokens: of an encoder-decoder's other half, of samples and not of frames, of pooled tokens.
    """
    fits = mask_BS is not None and mask_BS.dim() == 2 and tuple(shape) in (tuple(mask_BS.shape), (mask_BS.numel(),))
    return mask_BS.reshape(-1).bool() if fits and mask_BS is not None else None


def expert_bounds(num_neurons: int, num_experts: int) -> tuple[int, ...]:
    """Boundaries of the experts' contiguous slices: expert e owns neurons [bounds[e], bounds[e + 1]).

    Sizes differ by at most one; the first ``num_neurons % num_experts`` experts are the larger ones. Only E has to be stored.

    Raises:
        ConfigError: fewer than one neuron per expert, or no expert.
    """
    if not 1 <= num_experts <= num_neurons:
        raise ConfigError(f"cannot split {num_neurons} neurons into {num_experts} experts.")
    size, larger = divmod(num_neurons, num_experts)
    return tuple(e * size + min(e, larger) for e in range(num_experts + 1))


@torch.no_grad()
def permute_neurons(model: nn.Module, site: FFNSite, order_F: Tensor) -> None:
    """Reorder a site's neurons in place: new neuron i is old neuron ``order_F[i]``. The FFN's function does not change.

    Parameters keep their identity, storage and strides (decision D8).
    """
    for tensor in site_weights(model, site).per_neuron():
        tensor.copy_(tensor.index_select(0, order_F.to(tensor.device)))


def neuron_parameters(model: nn.Module, site: FFNSite) -> list[tuple[nn.Parameter, Callable[[Tensor], tuple[Tensor, ...]]]]:
    """The parameters of a site that have a row, column or entry for every neuron: all but the output's bias.

    Returns:
        Each with a function that, of a tensor of the parameter's shape (an optimizer's moment), gives the views whose first dimension is
        the neuron; of a fused projection there are two.

    Raises:
        UnsupportedModelError: a projection is no plain Linear or Conv1D, or has int8 weights.
    """
    found: list[tuple[nn.Parameter, Callable[[Tensor], tuple[Tensor, ...]]]] = []
    for path in (*site.first, site.down):
        module: Any = model.get_submodule(path)
        reason = "has int8 weights" if isinstance(module, Int8Linear) else not_plain_reason(module, allow_meta=True)
        if reason and not reason.startswith(("has a forward hook", "has a DTensor")):  # a spread weight has its shape all the same
            raise UnsupportedModelError(f"'{path}' {reason}; its neurons cannot be permuted while it trains.")
        # Neurons are the outputs of the first projections and the inputs of the last; Conv1D stores (in, out).
        is_column = is_transposed(module) != (path == site.down)
        halves = 2 if site.fused and path != site.down else 1
        found.append((module.weight, partial(_neuron_rows, is_column=is_column, halves=halves)))
        if path != site.down and module.bias is not None:
            found.append((module.bias, partial(_neuron_rows, is_column=False, halves=halves)))
    return found


def _neuron_rows(tensor: Tensor, *, is_column: bool, halves: int) -> tuple[Tensor, ...]:
    return (tensor.t() if is_column else tensor).chunk(halves)


def store_by_neuron(model: nn.Module, site: FFNSite) -> None:
    """Change the strides of a site's matrices so that each neuron's row is contiguous in memory, in place.

    Names, shapes, values and the parameters' identity stay (decision D2, D8): ``nn.Linear`` keeps its down projection as (D, F), and only
    the order of its numbers in memory changes. Files hold the shape's own order, so this is done again after loading. Tensors on the meta
    device, and weights that share memory with others, are left alone.
    """
    weights = site_weights(model, site)
    for path, rows_F in ((site.up, weights.up_FD), (site.gate or site.up, weights.gate_FD), (site.down, weights.down_FD)):
        if rows_F is None or rows_F.is_meta or rows_F.stride(-1) == 1:
            continue
        parameter = cast(nn.Parameter, model.get_submodule(path).weight)
        if parameter.untyped_storage().nbytes() == parameter.nbytes:
            parameter.data = parameter.data.t().contiguous().t()


def store_by_input(linear: nn.Module) -> None:
    """Change the strides of a plain layer's weight so that the row of each input channel is contiguous in memory, in place.

    As `store_by_neuron`: names, shape, values and identity stay, and what is on the meta device or shares its memory is left alone.
    """
    rows_KN = linear_weight(linear).t()
    parameter = cast(nn.Parameter, linear.weight)
    if rows_KN.is_meta or rows_KN.is_contiguous() or parameter.untyped_storage().nbytes() != parameter.nbytes:
        return
    parameter.data = parameter.data.t().contiguous().t()


@torch.no_grad()
def quantize_linear(linear: nn.Module) -> None:
    """Give one plain layer int8 weights with one scale per output and a row for each input channel, in place."""
    to_int8(linear, linear_weight(linear), cls=Int8DownLinear)


def has_int8(model: nn.Module, site: FFNSite) -> bool:
    """Whether a site's projections hold int8 weights."""
    return isinstance(model.get_submodule(site.down), Int8Linear)


@torch.no_grad()
def quantize_site(model: nn.Module, site: FFNSite) -> None:
    """Give a site int8 weights with one scale per output of each projection (`int8.quantize_rows`), in place; names and biases stay.

    Raises:
        UnsupportedModelError: a projection is not a plain Linear or Conv1D.
    """
    weights = {path: _linear_view(model, path)[0] for path in (*site.first, site.down)}
    for path, weight in weights.items():
        to_int8(model.get_submodule(path), weight, cls=Int8DownLinear if path == site.down else Int8Linear)


@torch.no_grad()
def dequantize_site(model: nn.Module, site: FFNSite, *, dtype: torch.dtype) -> None:
    """Give a site of int8 weights its dense layers back, in place, with the weights that the integers stand for."""
    for path in (*site.first, site.down):
        to_float(cast(Int8Linear, model.get_submodule(path)), dtype=dtype)


def _linear_view(model: nn.Module, path: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, in) view of a projection's weight, its bias, and the scales of int8 outputs."""
    module: Any = model.get_submodule(path)
    reason = not_plain_reason(module, allow_meta=True)
    if reason and not reason.startswith("has a forward hook"):
        raise UnsupportedModelError(f"'{path}' {reason}; its weights cannot be read directly.")
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(module, Int8Linear):
        rows = weight[0]
        return (rows.t() if isinstance(module, Int8DownLinear) else rows), bias, module.weight_scale
    return (weight.t() if is_transposed(module) else weight), bias, None
