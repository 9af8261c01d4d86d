"""An FFN of selected experts in standard ONNX operators: the graph that `moeify.export.onnx` puts where a layer was traced.

Letters: T tokens, D model width, E experts, G neurons of the largest expert, A experts that some token selected, N tokens of one expert,
O output width.

Two ways, both of which read nothing of experts that no token selected:

    shared  the selected experts' weights are gathered into one smaller FFN, whose hidden values are zeroed token by token
    loop    one iteration of a Loop per selected expert: gather its tokens, two products, add the rows back

`shared` is exact in FLOPs for one token, and for a few it computes what any of them needs; `loop` computes the selected pairs alone, but
every iteration costs some ten calls of operators and a copy of y, so that it pays for experts of some size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper

from ..errors import UnsupportedModelError
from ..sites.formula import shift_of

OPSET = 18
DOMAIN = "moeify"
"""Of the function while it stands in a model; it is inlined, so that no file has it."""
INPUTS = ("x_TD", "mask_TE", "up_EGD", "down_EGO", "gate_EGD", "up_bias_EG", "gate_bias_EG", "down_bias_O")
"""Of the function; of those a layer has not, none is given."""

Way = Literal["shared", "loop"]


@dataclass
class _Nodes:
    """Nodes of a graph in the making."""

    prefix: str = ""
    nodes: list[NodeProto] = field(default_factory=list)

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; the name of its first output."""
        names = [f"{self.prefix}{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{self.prefix}{op}_{len(self.nodes)}", **attributes))
        return names[0]

    def ints(self, *values: int) -> str:
        """A 1-D constant."""
        return self("Constant", value_ints=list(values))

    def number(self, value: float) -> str:
        """A scalar constant."""
        return self("Constant", value_float=value)


def ffn_function(name: str, *, inputs: Sequence[str], activation: str, size: int, few_tokens: int, many: Way) -> FunctionProto:
    """y_TO of one layer.

    Args:
        name: of the function.
        inputs: those of `INPUTS` that the layer has, in that order.
        activation: key of `moeify.sites.formula.ACTIVATIONS`.
        size: G.
        few_tokens: up to so many tokens run the way "shared".
        many: the way that more of them run.

    Raises:
        UnsupportedModelError: the activation has no formula here.
    """
    make = _Nodes()
    if activation not in ACTIVATIONS and shift_of(activation) is None:
        raise UnsupportedModelError(f"the activation '{activation}' has no ONNX formula; known: {', '.join(ACTIVATIONS)}.")
    any_E = make("ReduceMax", make("Cast", "mask_TE", to=TensorProto.INT32), make.ints(0), keepdims=0)
    ids_A = make("Squeeze", make("NonZero", any_E), make.ints(0))
    if many == "shared":
        y_TO = _shared(make, ids_A, inputs=inputs, activation=activation, size=size)
    else:
        tokens = make("Squeeze", make("Shape", "x_TD", start=0, end=1), make.ints(0))
        is_few = make("LessOrEqual", tokens, make("Squeeze", make.ints(few_tokens), make.ints(0)))
        branches = {}
        for branch, way in (("then_branch", _shared), ("else_branch", _loop)):
            nodes = _Nodes(prefix=f"{branch}_")
            y = way(nodes, ids_A, inputs=inputs, activation=activation, size=size)
            branches[branch] = helper.make_graph(nodes.nodes, branch, [], [_value(y)])
        y_TO = make("If", is_few, **branches)
    make.nodes.append(helper.make_node("Identity", [y_TO], ["y_TO"], name="y_TO"))
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, list(inputs), ["y_TO"], make.nodes, imports)


def _shared(make: _Nodes, ids_A: str, *, inputs: Sequence[str], activation: str, size: int) -> str:
    """All tokens through the FFN that the selected experts make together."""

    def rows(name: str) -> str:
        """(A * G, width) of weights, (A * G,) of biases."""
        taken = make("Gather", name, ids_A, axis=0)
        if "bias" in name:
            return make("Reshape", taken, make.ints(-1))
        width = make("Shape", name, start=2, end=3)
        return make("Reshape", taken, make("Concat", make.ints(-1), width, axis=0))

    def linear(name: str) -> str:
        bias = f"{name}_bias_EG"
        return make("Gemm", "x_TD", rows(f"{name}_EGD"), *([rows(bias)] if bias in inputs else []), transB=1)

    h_TF = _hidden(make, linear, inputs=inputs, activation=activation)
    h_TAG = make("Reshape", h_TF, make("Concat", make("Shape", "x_TD", start=0, end=1), make.ints(-1, size), axis=0))
    mask_TA1 = make("Unsqueeze", make("Gather", "mask_TE", ids_A, axis=1), make.ints(2))
    # not a product: an overflow in an unselected neuron stays unseen
    kept = make("Where", mask_TA1, h_TAG, make.number(0.0))
    h_TF = make("Reshape", kept, make("Concat", make("Shape", "x_TD", start=0, end=1), make.ints(-1), axis=0))
    return make("Gemm", h_TF, rows("down_EGO"), *(["down_bias_O"] if "down_bias_O" in inputs else []))


def _loop(make: _Nodes, ids_A: str, *, inputs: Sequence[str], activation: str, size: int) -> str:
    """The selected pairs, expert by expert."""
    shape = make("Concat", make("Shape", "x_TD", start=0, end=1), make("Shape", "down_EGO", start=2, end=3), axis=0)
    y_TO = make("Expand", "down_bias_O" if "down_bias_O" in inputs else make.number(0.0), shape)
    trips = make("Squeeze", make("Shape", ids_A), make.ints(0))
    mask_ET = make("Transpose", "mask_TE", perm=[1, 0])
    return make("Loop", trips, "", y_TO, body=_expert(ids_A, mask_ET, inputs=inputs, activation=activation))


def _expert(ids_A: str, mask_ET: str, *, inputs: Sequence[str], activation: str) -> GraphProto:
    make = _Nodes(prefix="expert_")
    expert = make("Gather", ids_A, "expert_step", axis=0)
    token_N = make("Squeeze", make("NonZero", make("Gather", mask_ET, expert, axis=0)), make.ints(0))
    x_ND = make("Gather", "x_TD", token_N, axis=0)

    def linear(name: str) -> str:
        bias = f"{name}_bias_EG"
        weight_GD = make("Gather", f"{name}_EGD", expert, axis=0)
        return make("Gemm", x_ND, weight_GD, *([make("Gather", bias, expert, axis=0)] if bias in inputs else []), transB=1)

    h_NG = _hidden(make, linear, inputs=inputs, activation=activation)
    y_NO = make("MatMul", h_NG, make("Gather", "down_EGO", expert, axis=0))
    y_TO = make("ScatterND", "expert_y", make("Unsqueeze", token_N, make.ints(1)), y_NO, reduction="add")
    going = make("Identity", "expert_going")
    return helper.make_graph(
        make.nodes,
        "expert",
        [
            helper.make_tensor_value_info("expert_step", TensorProto.INT64, []),
            helper.make_tensor_value_info("expert_going", TensorProto.BOOL, []),
            _value("expert_y"),
        ],
        [helper.make_tensor_value_info(going, TensorProto.BOOL, []), _value(y_TO)],
    )


def _value(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])


def _hidden(make: _Nodes, linear: Callable[[str], str], *, inputs: Sequence[str], activation: str) -> str:
    """act(up), or act(gate) * up."""
    up = linear("up")
    if "gate_EGD" not in inputs:
        return _activate(make, activation, up)
    return make("Mul", _activate(make, activation, linear("gate")), up)


def _activate(make: _Nodes, activation: str, z: str) -> str:
    shift = shift_of(activation)
    if shift is not None:
        return make("Relu", make("Sub", z, make.number(shift)))
    return ACTIVATIONS[activation](make, z)


def _silu(make: _Nodes, z: str, *, scale: float | None = None) -> str:
    return make("Mul", z, make("Sigmoid", z if scale is None else make("Mul", z, make.number(scale))))


def _gelu(make: _Nodes, z: str) -> str:
    erf = make("Erf", make("Mul", z, make.number(0.5**0.5)))
    return make("Mul", make("Mul", z, make.number(0.5)), make("Add", erf, make.number(1.0)))


def _gelu_tanh(make: _Nodes, z: str) -> str:
    cube = make("Mul", make("Mul", z, z), z)
    inner = make("Add", z, make("Mul", cube, make.number(0.044715)))
    tanh = make("Tanh", make("Mul", inner, make.number(0.7978845608028654)))  # sqrt(2 / pi)
    return make("Mul", make("Mul", z, make.number(0.5)), make("Add", tanh, make.number(1.0)))


def _relu2(make: _Nodes, z: str) -> str:
    relu = make("Relu", z)
    return make("Mul", relu, relu)


ACTIVATIONS: dict[str, Callable[[_Nodes, str], str]] = {
    "relu": lambda make, z: make("Relu", z),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "quick_gelu": lambda make, z: _silu(make, z, scale=1.702),
    "relu2": _relu2,
    "relu6": lambda make, z: make("Clip", z, make.number(0.0), make.number(6.0)),
    "leaky_relu": lambda make, z: make("LeakyRelu", z, alpha=0.01),
    "mish": lambda make, z: make("Mul", z, make("Tanh", make("Softplus", z))),
    "hardswish": lambda make, z: make("HardSwish", z),
    "gelu_10": lambda make, z: make("Clip", _gelu(make, z), make.number(-10.0), make.number(10.0)),
}
"""The formulas of `moeify.sites.formula.ACTIVATIONS`; ``shifted_relu:t`` belongs to it, too."""


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The bodies of an If or a Loop."""
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
