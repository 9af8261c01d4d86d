"""The graph of one FFN, run by onnxruntime, against the reference kernel; and what it leaves out."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from moeify.errors import UnsupportedModelError
from moeify.export.onnx_ffn import DOMAIN, INPUTS, OPSET, ffn_function
from moeify.kernels import build_plan
from moeify.kernels.reference import moe_ffn
from moeify.sites import FFNWeights
from moeify.sites.formula import ACTIVATIONS

DIMS = {"TD": 2, "TE": 2, "EGD": 3, "EGO": 3, "EG": 2, "O": 1}


def tensors(*, E=5, G=4, D=6, width=7, gated=False, biases=True):
    make = torch.Generator().manual_seed(0)
    shapes = {"up_EGD": (E, G, D), "down_EGO": (E, G, width)}
    if gated:
        shapes["gate_EGD"] = (E, G, D)
    if biases:
        shapes |= {"up_bias_EG": (E, G), "down_bias_O": (width,)} | ({"gate_bias_EG": (E, G)} if gated else {})
    return {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}


def session(given, *, profile=None, **options):
    inputs = [name for name in INPUTS if name in ("x_TD", "mask_TE", *given)]
    function = ffn_function("FFN", inputs=inputs, size=given["up_EGD"].shape[1], **options)
    kinds = {"mask_TE": TensorProto.BOOL}
    values = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), [None] * DIMS[name.rpartition("_")[2]]) for name in inputs
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph([helper.make_node("FFN", inputs, ["y"], domain=DOMAIN)], "test", values, [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = onnx.inliner.inline_local_functions(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9))
    onnx.checker.check_model(model)
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    if profile is not None:
        chosen.enable_profiling, chosen.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])


def run(made, x_TD, mask_TE, given):
    feed = {name: tensor.numpy() for name, tensor in {"x_TD": x_TD, "mask_TE": mask_TE, **given}.items()}
    return torch.from_numpy(made.run(None, feed)[0])


def expected(x_TD, mask_TE, given, activation):
    flat = {name: t.flatten(0, 1).double() for name, t in given.items() if name != "down_bias_O"}
    bias = given.get("down_bias_O")
    weights = FFNWeights(
        up_FD=flat["up_EGD"],
        down_FD=flat["down_EGO"],
        gate_FD=flat.get("gate_EGD"),
        up_bias_F=flat.get("up_bias_EG"),
        gate_bias_F=flat.get("gate_bias_EG"),
        down_bias_D=None if bias is None else bias.double(),
    )
    return moe_ffn(x_TD.double(), weights, build_plan(mask_TE), activation=activation)


WAYS = {
    "one token": (1, 8, "loop"),
    "few tokens": (5, 8, "loop"),
    "many by a loop": (40, 8, "loop"),
    "many at once": (40, 8, "shared"),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_graph_equals_the_reference(way, gated):
    tokens, few, many = WAYS[way]
    given = tensors(gated=gated, biases=not gated)
    x_TD, mask_TE = torch.randn(tokens, 6), torch.rand(tokens, 5) < 0.4
    mask_TE[:, 0] = True
    y_TO = run(session(given, activation="gelu", few_tokens=few, many=many), x_TD, mask_TE, given)
    torch.testing.assert_close(y_TO.double(), expected(x_TD, mask_TE, given, "gelu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "shifted_relu:0.25"])
def test_activations_are_those_of_pytorch(activation):
    given = tensors(gated=True)
    x_TD, mask_TE = 3 * torch.randn(3, 6), torch.ones(3, 5, dtype=torch.bool)
    y_TO = run(session(given, activation=activation, few_tokens=8, many="loop"), x_TD, mask_TE, given)
    torch.testing.assert_close(y_TO.double(), expected(x_TD, mask_TE, given, activation), rtol=1e-5, atol=1e-4)


def test_an_activation_without_a_formula_is_refused():
    with pytest.raises(UnsupportedModelError, match="'xielu' has no ONNX formula"):
        ffn_function("FFN", inputs=INPUTS[:4], activation="xielu", size=4, few_tokens=8, many="loop")


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_no_token_selects_are_not_read(way):
    tokens, few, many = WAYS[way]
    given = tensors(gated=True)
    mask_TE = torch.zeros(tokens, 5, dtype=torch.bool)
    mask_TE[:, 1] = True
    for name in given.keys() - {"down_bias_O"}:
        given[name][torch.arange(5) != 1] = torch.nan
    y_TO = run(session(given, activation="silu", few_tokens=few, many=many), torch.randn(tokens, 6), mask_TE, given)
    assert y_TO.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_products_are_those_of_the_selected_pairs(way, tmp_path):
    """onnxruntime's own record of the shapes that went into its matrix products."""
    tokens, few, many = WAYS[way]
    E, G, D, width = 5, 4, 6, 7
    given = tensors(gated=True)
    mask_TE = torch.rand(tokens, E, generator=torch.Generator().manual_seed(1)) < 0.3
    mask_TE[:, 2] = False
    made = session(given, activation="silu", few_tokens=few, many=many, profile=tmp_path / "ffn")
    run(made, torch.randn(tokens, D), mask_TE, given)
    events = json.loads(Path(made.end_profiling()).read_text())
    multiplied = 0
    for event in events:
        kind = event.get("args", {}).get("op_name")
        if event["name"].endswith("_kernel_time") and kind in ("Gemm", "FusedGemm", "MatMul"):
            left, right = (next(iter(shape.values())) for shape in event["args"]["input_type_shape"][:2])
            multiplied += left[0] * right[0] * right[1]
    experts = int(mask_TE.any(0).sum())
    pairs = int(mask_TE.sum()) if way == "many by a loop" else tokens * experts
    assert experts <= 4
    assert multiplied == pairs * G * (2 * D + width)


def test_overflow_in_an_unselected_neuron_stays_unseen():
    given = tensors(biases=False)
    given["up_EGD"][1] = 1e38
    mask_TE = torch.tensor([[True, False, False, False, False], [True, True, False, False, False]])
    y_TO = run(session(given, activation="relu", few_tokens=8, many="loop"), torch.ones(2, 6), mask_TE, given)
    assert y_TO[0].isfinite().all()
    assert not np.isfinite(y_TO[1].numpy()).all()
