"""Models as ONNX files whose FFNs run the selected experts alone: router, rule and FFN in standard operators, for any runtime.

The model is traced as it is; where a converted FFN stands, router and rule are traced and the FFN becomes one node, which is then replaced
by the graph of `onnx_ffn`. Batch and sequence stay free.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..channels import kept, sparse_inputs
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..hf.inputs import example_inputs
from ..layers import MoEFFN, moe_layers
from ..routers import pad_experts

_SIZE_INSIDE = 3 << 29  # bytes of weights in the file itself: its format ends at 2 GB
_LOOP_SIZE = 32
_CLOSE = 1e-3
_NODE = "moeify::FFN"


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How selected experts are computed in an ONNX file."""

    few_tokens: int = 8
    """Up to so many tokens, in a batch together, run the experts that any of them selects as one smaller FFN."""
    many_tokens: Literal["auto", "loop", "shared"] = "auto"
    """More of them: "loop", expert by expert on the tokens that select it; "shared", as few tokens; "auto": "loop" where experts have 32
    neurons or more, for smaller ones a runtime takes longer to call its operators than to compute them."""
    batch_size: int = 2
    """Batch of the inputs that the model is traced with; another may be run."""

    def __post_init__(self) -> None:
        if self.few_tokens < 0:
            raise ConfigError(f"few_tokens must be at least 0, got {self.few_tokens}.")
        if self.batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2, for a tracer takes 1 for a constant; got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What was written."""

    file: str
    """Name of the ONNX file."""
    inputs: tuple[str, ...]
    """Names of its inputs."""
    outputs: tuple[str, ...]
    """Names of its outputs."""
    ffns: dict[str, str]
    """How each converted FFN runs for many tokens: "loop" or "shared", or "dense" in dense mode."""
    operators: int
    """Nodes of the graph, those of bodies counted once."""
    max_error: float | None
    """Largest difference of outputs between onnxruntime and PyTorch over the largest output, on other inputs than the traced ones; None
    where onnxruntime is not installed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@torch.no_grad()
def to_onnx(
    model: nn.Module, path: str | Path, *, inputs: Mapping[str, Tensor] | None = None, config: OnnxConfig | None = None
) -> OnnxReport:
    """Write a converted model, or one in dense mode, as an ONNX file, and compare it with PyTorch.

    Args:
        model: float32, on the CPU, in eval mode; int8 experts are written as the float32 weights that they stand for. Decoders are written
            without a cache.
        path: of the file; weights of more than 1.5 GB go into a second one beside it, ``<path>.data``.
        inputs: keyword arguments of one forward; None makes some up. Their first dimension is free, and of token ids and masks the second.
        config: how experts are computed.

    Returns:
        What was written, with the error that was found.

    Raises:
        CheckpointError: onnx or onnxscript is not installed; or the file gives other outputs than the model.
        UnsupportedModelError: the model trains, is not float32 on the CPU, skips input channels, has adapters or hooks on an FFN, or an
            activation that ONNX has no formula for; or the tracer does not get through it.
    """
    config = config or OnnxConfig()
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(f"ONNX needs the package '{package}'; pip install 'moeify[onnx]'.")
    from .onnx_ffn import OPSET

    _check(model)
    path = Path(path)
    inputs = dict(inputs) if inputs is not None else example_inputs(model, batch_size=config.batch_size)
    wrapper = _Tensors(model, list(inputs))
    outputs = wrapper.names_of(tuple(inputs.values()))
    dynamic = tuple(_free_dimensions(tensor) for tensor in inputs.values())
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with _graphs(model), _quiet():
        try:
            program = torch.onnx.export(
                wrapper,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=list(inputs),
                output_names=outputs,
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.sort.stable: _translate_sort},
                verbose=False,
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # what torch.export and its translation raise
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UnsupportedModelError(f"{type(model).__name__} cannot be traced for ONNX: {reason}") from error
        assert program is not None
        program.save(str(path), external_data=weights_bytes > _SIZE_INSIDE)
    operators = _put_graphs(path, config)
    ways = {name: _way(moe, config) if moe.mode == "moe" else "dense" for name, moe in moe_layers(model).items()}
    found = _error(model, path, wrapper, inputs)
    if found is not None and not found <= _CLOSE:
        raise CheckpointError(
            f"'{path}' gives outputs that differ by {found:.2g} of the largest from {type(model).__name__}: the tracer took something that "
            "depends on the inputs for a constant; give other inputs."
        )
    return OnnxReport(file=path.name, inputs=tuple(inputs), outputs=tuple(outputs), ffns=ways, operators=operators, max_error=found)


def _check(model: nn.Module) -> None:
    if model.training:
        raise UnsupportedModelError(f"this {type(model).__name__} is in training mode; call model.eval() first.")
    for name, parameter in model.named_parameters():
        if not parameter.is_cpu or (parameter.is_floating_point() and parameter.dtype is not torch.float32):
            raise UnsupportedModelError(f"'{name}' is {parameter.dtype} on {parameter.device}; load the model in float32 on the CPU.")
    if sparse_inputs(model):
        raise UnsupportedModelError("this model skips input channels (moeify thin), which ONNX has no operator for; export it --to dense.")
    for name, moe in moe_layers(model).items():
        if moe.mode == "moe" and (reason := moe.masked_reason()) is not None:
            raise UnsupportedModelError(f"'{name}' cannot be exported: {reason}; merge adapters and remove hooks and offload first.")


class _Tensors(nn.Module):
    """The model with tensors in and out, in order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        has_cache = getattr(getattr(model, "config", None), "use_cache", None) is not None
        self.options = {"use_cache": False} if has_cache else {}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the model's outputs."""
        return tuple(self._outputs(inputs).values())

    def names_of(self, inputs: Sequence[Tensor]) -> list[str]:
        """The names of what `forward` gives."""
        return list(self._outputs(inputs))

    def _outputs(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        found = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        named = found.items() if isinstance(found, Mapping) else enumerate(found if isinstance(found, tuple) else (found,))
        return {str(name): value for name, value in named if isinstance(value, Tensor)}


def _free_dimensions(tensor: Tensor) -> dict[int, Any]:
    is_tokens = tensor.dim() == 2 and not tensor.is_floating_point()
    return dict.fromkeys((0, 1) if is_tokens else (0,), torch.export.Dim.DYNAMIC)


def _translate_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX has no sort, but TopK, which of equal values takes the lower index first, as a stable sort does."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations take no Python lists
    size = op.Slice(op.Shape(self), [dim], [dim + 1] if dim != -1 else [2**31 - 1])
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


# -- one node a layer ------------------------------------------------------------------------------------------------------------------


@contextmanager
def _graphs(model: nn.Module) -> Iterator[None]:
    """Every FFN in moe mode is traced as router, rule and one node of `_NODE` inside the ``with``."""
    layers = list(moe_layers(model).values())
    with kept(layers, "graph"):
        for moe in layers:
            moe.graph = _Graph(moe)
        yield


class _Graph:
    """What a layer computes while it is traced."""

    def __init__(self, moe: MoEFFN) -> None:
        weights = moe.weights().dequantized(torch.float32)
        found = {
            "up_EGD": pad_experts(weights.up_FD, moe.bounds),
            "down_EGO": pad_experts(weights.down_FD, moe.bounds),
            "gate_EGD": None if weights.gate_FD is None else pad_experts(weights.gate_FD, moe.bounds),
            "up_bias_EG": _pad_bias(weights.up_bias_F, moe.bounds),
            "gate_bias_EG": _pad_bias(weights.gate_bias_F, moe.bounds),
            "down_bias_O": weights.down_bias_D,
        }
        self.moe, self.tensors = moe, {name: t.detach().contiguous() for name, t in found.items() if t is not None}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moe = self.moe
        x_TD = x.reshape(-1, x.shape[-1])
        mask_TE = moe.select(x)
        y_TO = torch.onnx.ops.symbolic(
            _NODE,
            (x_TD, mask_TE, *self.tensors.values()),
            {"inputs": ",".join(("x_TD", "mask_TE", *self.tensors)), "activation": moe.site.activation, "size": moe.bounds[1]},
            dtype=x.dtype,
            shape=(x_TD.shape[0], moe.site.d_out),
            version=1,
        )
        return y_TO, mask_TE


def _pad_bias(bias_F: Tensor | None, bounds: tuple[int, ...]) -> Tensor | None:
    return None if bias_F is None else pad_experts(bias_F[:, None], bounds).squeeze(2)


def _way(moe: MoEFFN, config: OnnxConfig) -> Literal["loop", "shared"]:
    return _way_of_size(moe.bounds[1], config)


def _way_of_size(size: int, config: OnnxConfig) -> Literal["loop", "shared"]:
    if config.many_tokens != "auto":
        return config.many_tokens
    return "loop" if size >= _LOOP_SIZE else "shared"


def _put_graphs(path: Path, config: OnnxConfig) -> int:
    """Replace the nodes of `_NODE` in a file by what they stand for; the number of nodes that are there then."""
    import onnx
    from onnx import helper, inliner

    from .onnx_ffn import DOMAIN, ffn_function, subgraphs

    file = onnx.load(path, load_external_data=False)
    functions: dict[tuple[Any, ...], Any] = {}
    for node in file.graph.node:
        if node.domain != DOMAIN:
            continue
        options: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs, activation, size = options["inputs"].decode(), options["activation"].decode(), options["size"]
        key = (inputs, activation, size)
        if key not in functions:
            many = _way_of_size(size, config)
            name, few = f"FFN_{len(functions)}", config.few_tokens
            functions[key] = ffn_function(name, inputs=inputs.split(","), activation=activation, size=size, few_tokens=few, many=many)
        node.op_type = functions[key].name
        del node.attribute[:]
    file.functions.extend(functions.values())
    if not any(entry.domain == DOMAIN for entry in file.opset_import):
        file.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    file = inliner.inline_local_functions(file)
    for entry in [entry for entry in file.opset_import if entry.domain == DOMAIN]:
        file.opset_import.remove(entry)
    onnx.save(file, path)
    onnx.checker.check_model(str(path))

    def count(nodes: Any) -> int:
        return sum(1 + sum(count(graph.node) for graph in subgraphs(node)) for node in nodes)

    return count(file.graph.node)


# -- the proof -------------------------------------------------------------------------------------------------------------------------


def _error(model: nn.Module, path: Path, wrapper: _Tensors, traced: Mapping[str, Tensor]) -> float | None:
    """Of inputs that differ from the traced ones in batch, length and content, where they can be made up."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    inputs = dict(traced)
    try:
        others = example_inputs(model, num_tokens=11, batch_size=3, seed=1)
        inputs = others if others.keys() == inputs.keys() else inputs
    except UnsupportedModelError:
        pass  # the caller's own are then the only ones
    expected = wrapper(*inputs.values())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in names})
    return max(
        float((torch.from_numpy(ours) - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        for ours, theirs in zip(found, expected, strict=True)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of what it lacks for other models."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
