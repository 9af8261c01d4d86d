"""Linear layers replaced by two-layer MLPs of equal cost, which are FFNs like any other: y = down(act(up(x))).

Letters: K inputs, N outputs, P neurons.

A linear layer has no neurons that could be skipped; an MLP trained to compute the same (`moeify.train`) has. Its cost is that of the layer,
so that the replaced model, run dense, costs what the original did. No dense model equals it. Therefore each replacement holds a parameter
``weight`` of one element, the guard: a loader that does not know moeify finds a tensor of the layer's name and of another shape, and
stops (decision D2); and code that asks ``q_proj.weight.dtype`` is answered.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from .._config import LATER, lookup
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from .formula import ACTIVATIONS, ShiftedReLU
from .site import FFNSite, is_transposed, linear_weight, not_plain_reason

Attention = Literal["q", "k", "v", "o"]
"""What a linear layer gives attention (query, key, value), or makes of its output (o)."""
Runs = tuple[tuple[int, int, int, int], ...]
"""Rows of a layer's output, compactly: (start, length, step, count) is ``count`` runs of ``length`` rows, ``step`` apart."""


@dataclass(frozen=True, kw_only=True)
class ProjectionPart:
    """Some of a fused layer's outputs, that are computed by a module of their own."""

    name: Literal["q", "k", "v"]
    """What they are, and the name of the module inside the replacement."""
    rows: Runs
    """Which of the layer's outputs, in ascending order."""
    width: int | None
    """Neurons P of the MLP that computes them; None where they are kept, a plain linear layer of the original's rows."""

    @property
    def d_out(self) -> int:
        """Number of outputs."""
        return sum(length * count for _, length, _, count in self.rows)

    def index_N(self) -> Tensor:
        """The outputs' indices, on the CPU."""
        runs = [(start + i * step, length) for start, length, step, count in self.rows for i in range(count)]
        return torch.cat([torch.arange(first, first + length, device="cpu") for first, length in runs])  # also where "meta" is the default


@dataclass(frozen=True, kw_only=True)
class ProjectionRecord:
    """One replaced linear layer, as the manifest stores it."""

    name: str
    """Module path of the layer, and of what stands in its place."""
    role: Attention | None = None
    """What attention has of it; none for a fused layer (its parts say) and for one that was named by a pattern."""
    d_in: int
    """Inputs K."""
    d_out: int
    """Outputs N."""
    width: int | None = None
    """Neurons P of the MLP; none for a fused layer, whose parts have their own."""
    activation: str = "relu"
    """Function between the two layers, a name in `moeify.sites.ACTIVATIONS`."""
    bias: bool
    """Whether the layer had a bias; then up and down have one, too."""
    adds_bias: bool = field(default=False, metadata=LATER)
    """Whether up and down have biases although the layer had none: thresholds cost next to nothing, and save most of the error."""
    parts: tuple[ProjectionPart, ...] = ()
    """Of a fused layer: its outputs by part; together they are all, each once."""

    def __post_init__(self) -> None:
        lookup(ACTIVATIONS, self.activation, where=f"projection '{self.name}'")
        if self.bias and self.adds_bias:
            raise ConfigError(f"projection '{self.name}' had a bias; adds_bias is for layers without.")
        if (self.width is None) == (not self.parts):
            raise ConfigError(f"projection '{self.name}' must have a width, or parts, and not both.")
        if any(width is not None and width < 1 for width in (self.width, *(part.width for part in self.parts))):
            raise ConfigError(f"projection '{self.name}' must have at least 1 neuron.")
        if self.parts:
            names = [part.name for part in self.parts]
            # Their number first: a damaged record may name more rows than memory holds.
            fits = len(set(names)) == len(names) and sum(part.d_out for part in self.parts) == self.d_out
            indices = torch.cat([part.index_N() for part in self.parts]) if fits else torch.empty(0, device="cpu")
            if not fits or not torch.equal(indices.sort().values, torch.arange(self.d_out, device="cpu")):
                raise ConfigError(f"projection '{self.name}': its parts are not its {self.d_out} outputs, each once.")
            if all(part.width is None for part in self.parts):
                raise ConfigError(f"projection '{self.name}' keeps all its parts; leave it out.")

    @property
    def mlp_bias(self) -> bool:
        """Whether up and down have biases."""
        return self.bias or self.adds_bias

    @property
    def mlps(self) -> dict[str, ProjectionPart | None]:
        """Module path of each MLP -> the part of a fused layer that it computes; None where it computes the whole layer."""
        if not self.parts:
            return {self.name: None}
        return {f"{self.name}.{part.name}": part for part in self.parts if part.width is not None}


Replacement: TypeAlias = "ProjectionMLP | FusedProjection"
"""What stands in the place of a replaced layer."""


class Activation(nn.Module):
    """A function of `moeify.sites.ACTIVATIONS` as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        lookup(ACTIVATIONS, name, where="activation")

    def forward(self, z: Tensor) -> Tensor:
        """The function, elementwise."""
        return ACTIVATIONS[self.name](z)

    def extra_repr(self) -> str:
        return self.name


class ProjectionMLP(nn.Module):
    """Stands in the place of a linear layer: y = down(act(up(x))).

    Args:
        d_in: inputs K.
        d_out: outputs N.
        width: neurons P; `projection_width` gives that of equal cost.
        activation: name of the function in `moeify.sites.ACTIVATIONS`.
        bias: whether up and down have one.
        adds_bias: whether they have it although the layer had none.
        role: what attention has of it.
        device, dtype: of the parameters.

    Weights are drawn as `nn.Linear` draws them.

    Source: Szatkowski et al. 2024, arXiv:2310.04361, section 3.4 ("standalone dense layers").
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        width: int,
        activation: str = "relu",
        bias: bool = True,
        adds_bias: bool = False,
        role: Attention | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.role, self.adds_bias = role, adds_bias
        self.up = nn.Linear(d_in, width, bias=bias, device=device, dtype=dtype)
        self.act: nn.Module = nn.ReLU() if activation == "relu" else Activation(activation)
        self.down = nn.Linear(width, d_out, bias=bias, device=device, dtype=dtype)
        self.weight = _guard(device, dtype)

    @property
    def in_features(self) -> int:
        """K, as a linear layer says it."""
        return self.up.in_features

    @property
    def out_features(self) -> int:
        """N, as a linear layer says it."""
        return self.down.out_features

    @property
    def width(self) -> int:
        """Neurons P."""
        return self.up.out_features

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) of x (..., K)."""
        return cast(Tensor, self.down(self.act(self.up(x))))


class FusedProjection(nn.Module):
    """Stands in the place of a linear layer that computes query, key and value together; each part is a module of its own.

    y[parts[i]] = part_i(x): a `ProjectionMLP`, or a plain linear layer with the original's rows.

    Args:
        record: sizes and parts.
        device, dtype: of the parameters.
    """

    order_N: Tensor | None

    def __init__(self, record: ProjectionRecord, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.record = record
        for part in record.parts:
            self.add_module(part.name, _build_part(record, part.d_out, part.width, device=device, dtype=dtype))
        self.weight = _guard(device, dtype)
        # Where each output is among the parts' outputs one after the other. Made on the CPU even in a skeleton, and moved by the first
        # forward: as a buffer a loader would look for it in the file, or fill it.
        order_N = torch.cat([part.index_N() for part in record.parts]).argsort()
        self.order_N = None if torch.equal(order_N, torch.arange(record.d_out, device="cpu")) else order_N

    @property
    def in_features(self) -> int:
        """K, as a linear layer says it."""
        return self.record.d_in

    @property
    def out_features(self) -> int:
        """N, as a linear layer says it."""
        return self.record.d_out

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) of x (..., K), the outputs in the original's order."""
        y = torch.cat([self.get_submodule(part.name)(x) for part in self.record.parts], dim=-1)
        if self.order_N is None:
            return y
        if self.order_N.device != y.device:
            self.order_N = self.order_N.to(y.device)
        return y.index_select(-1, self.order_N)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def projection_width(d_in: int, d_out: int, flops_factor: float = 1.0) -> int:
    """Neurons of the MLP that costs ``flops_factor`` times the linear layer.

    P = round(flops_factor * K N / (K + N)), at least 1; halves up. Biases are not counted, as nowhere in `moeify.cost`; of square layers it
    is the authors' (K^2 + K) / (2 K + 1), which counts the parameters of a layer with bias, for K^2 / (2 K) differs by less than 1/4.

    Raises:
        ConfigError: ``flops_factor`` is not finite and above 0.

    Source: Szatkowski et al. 2024, arXiv:2310.04361, section 3.4.
    """
    if not 0 < flops_factor < math.inf:
        raise ConfigError(f"flops_factor must be finite and above 0, got {flops_factor}.")
    return max(1, math.floor(flops_factor * d_in * d_out / (d_in + d_out) + 0.5))


def runs_of(index_N: Tensor) -> Runs:
    """Ascending indices as `Runs`; one entry for any regular layout."""
    indices = [int(i) for i in index_N]
    blocks: list[tuple[int, int]] = []
    for i in indices:
        if blocks and sum(blocks[-1]) == i:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + 1)
        else:
            blocks.append((i, 1))
    runs: list[tuple[int, int, int, int]] = []
    for start, length in blocks:
        if runs:
            first, n, step, count = runs[-1]
            if n == length and (count == 1 or start == first + step * count):
                runs[-1] = (first, n, start - first if count == 1 else step, count + 1)
                continue
        runs.append((start, length, length, 1))
    return tuple(runs)


def replacement_of(record: ProjectionRecord, *, device: torch.device | None, dtype: torch.dtype | None) -> Replacement:
    """A new module for a record, its weights as `nn.Linear` draws them; for `moeify.convert`, which puts it in place."""
    if record.parts:
        return FusedProjection(record, device=device, dtype=dtype)
    assert record.width is not None
    mlp = cast(ProjectionMLP, _build_part(record, record.d_out, record.width, device=device, dtype=dtype))
    mlp.role = record.role
    return mlp


def keep_rows(module: FusedProjection, linear: nn.Module) -> None:
    """Give the parts that are kept the rows of the layer whose place is taken, copied."""
    weight_NK, bias_N = linear_weight(linear), cast(Tensor | None, getattr(linear, "bias", None))
    for part in module.record.parts:
        if part.width is not None or weight_NK.is_meta:
            continue
        kept = cast(nn.Linear, module.get_submodule(part.name))
        index_N = part.index_N().to(weight_NK.device)
        with torch.no_grad():
            kept.weight.copy_(weight_NK.index_select(0, index_N))
            if bias_N is not None and kept.bias is not None:
                kept.bias.copy_(bias_N.index_select(0, index_N))


def replaced_projections(model: nn.Module) -> dict[str, Replacement]:
    """What stands in the places of replaced layers by module path, in module order; parts of fused ones are not listed."""
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedProjection)}
    alone = {name: mlp for name, mlp in projection_mlps(model).items() if name.rpartition(".")[0] not in fused}
    return {name: found for name, _ in model.named_modules() if (found := fused.get(name) or alone.get(name)) is not None}


def projection_mlps(model: nn.Module) -> dict[str, ProjectionMLP]:
    """Every `ProjectionMLP` of a model by module path, those within fused ones included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ProjectionMLP)}


def inside_projection(model: nn.Module, path: str) -> str | None:
    """Path of the replaced layer that a module is, or is a part of; None where it is of none."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        outer = ".".join(parts[:i])
        if isinstance(model.get_submodule(outer), (ProjectionMLP, FusedProjection)):
            return outer
    return None


def projection_site(name: str, mlp: ProjectionMLP) -> FFNSite:
    """The FFN that a replacement is, known by construction.

    Raises:
        UnsupportedModelError: its function is none of `moeify.sites.ACTIVATIONS`.
    """
    activation = activation_name(mlp.act)
    if activation is None:
        raise UnsupportedModelError(f"'{name}.act' is a {type(mlp.act).__name__}, which computes no function that moeify knows.")
    return FFNSite(
        name=name,
        up=f"{name}.up",
        down=f"{name}.down",
        activation=activation,
        d_model=mlp.in_features,
        d_ff=mlp.width,
        d_out=mlp.out_features,
    )


def activation_name(module: nn.Module) -> str | None:
    """Name in `ACTIVATIONS` of the function that a module without parameters computes, told by calling it; None where it has none."""
    if isinstance(module, nn.ReLU):
        return "relu"
    if isinstance(module, ShiftedReLU):
        return module.activation
    if isinstance(module, Activation):
        return module.name
    grid = torch.linspace(-12, 12, 241, device="cpu")
    with torch.no_grad():
        values = module.forward(grid)
        return next((name for name, function in ACTIVATIONS.items() if torch.allclose(values, function(grid), rtol=1e-5, atol=1e-6)), None)


def record_of(name: str, module: Replacement) -> ProjectionRecord:
    """The record of what stands at ``name``, as it is now.

    Raises:
        UnsupportedModelError: a function is none of `ACTIVATIONS`, or the parts of a fused layer differ in theirs.
    """
    mlps = [module] if isinstance(module, ProjectionMLP) else [m for m in module.children() if isinstance(m, ProjectionMLP)]
    names = {activation_name(mlp.act) for mlp in mlps}
    if None in names or len(names) > 1:
        kinds = ", ".join(sorted({type(mlp.act).__name__ for mlp in mlps}))
        raise UnsupportedModelError(f"no manifest can name the function of '{name}' ({kinds}); finish or undo the change of activations.")
    activation = cast(str, names.pop())
    if isinstance(module, FusedProjection):
        return replace(module.record, name=name, activation=activation)
    mlp = mlps[0]
    return ProjectionRecord(
        name=name,
        role=mlp.role,
        d_in=mlp.in_features,
        d_out=mlp.out_features,
        width=mlp.width,
        activation=activation,
        bias=mlp.down.bias is not None and not mlp.adds_bias,
        adds_bias=mlp.adds_bias,
    )


def check_replaceable(model: nn.Module, name: str) -> nn.Module:
    """The linear layer at ``name``, if a replacement may take its place.

    Raises:
        UnsupportedModelError: it is replaced, converted or thinned already, int8, or no plain linear layer, or stands in several places.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(f"'{name}' is no module of this {type(model).__name__}: {error}") from error
    if outer := inside_projection(model, name):
        what = "is" if outer == name else f"is a part of '{outer}', which is"
        raise UnsupportedModelError(f"'{name}' {what} replaced already.")
    if hasattr(layer, "channels"):
        raise UnsupportedModelError(f"'{name}' skips input channels; replace layers before thinning (to_dense(model) removes it).")
    if site := next((site for site in _converted_sites(model) if name in (*site.first, site.down)), None):
        raise UnsupportedModelError(f"'{name}' belongs to the converted FFN '{site.name}'; call to_dense(model) first.")
    reason = not_plain_reason(layer, allow_meta=True)
    if reason is None and layer._parameters["weight"].dtype is torch.int8:  # type: ignore[union-attr]
        reason = "has int8 weights"
    if reason is not None:
        raise UnsupportedModelError(f"'{name}' {reason}; it cannot be replaced.")
    shared = [path for path, m in model.named_modules() if m is not layer and any(p is layer.weight for p in m._parameters.values())]
    if shared:
        raise UnsupportedModelError(f"'{name}' shares its weight with '{shared[0]}'; it cannot be replaced.")
    places = [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]
    owners = {(id(model.get_submodule(path.rpartition(".")[0])), path.rpartition(".")[2]) for path in places}
    if len(owners) > 1:
        raise UnsupportedModelError(f"'{name}' is one module in several places ({', '.join(places)}); it cannot be replaced.")
    return layer


def linear_sizes(linear: nn.Module) -> tuple[int, int, bool]:
    """Inputs K, outputs N, and whether there is a bias."""
    weight = cast(Tensor, linear.weight)
    d_out, d_in = weight.shape[::-1] if is_transposed(linear) else weight.shape
    return d_in, d_out, getattr(linear, "bias", None) is not None


@torch.no_grad()
def load_tensors(name: str, module: Replacement, tensors: Mapping[str, Tensor]) -> None:
    """Copy the MLPs' weights into a replacement; the guard, and parts that are kept, need not be among them.

    Raises:
        CheckpointError: one is missing, of another shape, or not known.
    """
    known = dict(module.named_parameters())
    kept = {"weight"}
    if isinstance(module, FusedProjection):
        for part in module.record.parts:
            kept |= {f"{part.name}.weight"} | ({f"{part.name}.bias"} if part.width is None else set())
    if unknown := set(tensors) - set(known):
        raise CheckpointError(f"'{name}' has no tensor '{min(unknown)}'; it has {', '.join(known)}.")
    if missing := set(known) - set(tensors) - kept:
        raise CheckpointError(f"'{name}' lacks the tensor '{min(missing)}'.")
    for key, tensor in tensors.items():
        if tensor.shape != known[key].shape:
            raise CheckpointError(f"'{name}.{key}' has shape {tuple(tensor.shape)}, its record says {tuple(known[key].shape)}.")
        known[key].copy_(tensor)


def _guard(device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, device=device, dtype=dtype), requires_grad=False)


def _build_part(
    record: ProjectionRecord, d_out: int, width: int | None, *, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if width is None:
        return nn.Linear(record.d_in, d_out, bias=record.bias, **where)
    where |= {"bias": record.mlp_bias, "adds_bias": record.adds_bias}
    return ProjectionMLP(record.d_in, d_out, width=width, activation=record.activation, **where)


def _converted_sites(model: nn.Module) -> Iterator[FFNSite]:
    """The sites of a model's executors, which this layer of the library does not know."""
    for module in model.modules():
        if isinstance(site := getattr(getattr(module, "moe", None), "site", None), FFNSite):
            yield site
