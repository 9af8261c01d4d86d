"""The Triton kernels of experts: compiled for GPUs that are not here, and interpreted on the CPU.

Triton reads TRITON_INTERPRET when it is first imported, and what compiles cannot be interpreted: the tests of interpreted_ffn.py run in a
process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeify.kernels import gpu_ffn, gpu_linear, gpu_routed
from moeify.kernels.tiles import TUNED, ragged_tiles, router_tiles, union_tiles

pytestmark = pytest.mark.skipif(gpu_linear.unavailable() is not None, reason=str(gpu_linear.unavailable()))
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SHARED_BYTES = 99 << 10  # of a block of threads on the smallest GPU in question (sm86, sm89)
SPLITS = 32  # `triton_union.SPLITS_AT_ONCE`, which is not imported here: it would import triton
F, D, SIZE = 14336, 4096, 64  # llama-8b
EXPERTS = {"SIZE": SIZE, "LARGER": 0}
FUNCTION = {"ACTIVATION": "silu", "THRESHOLD": 0.0}
# Sizes that need not be multiples of 16.
ODD = (
    "num_tokens",
    "token_tiles",
    "num_done",
    "num_experts",
    "num_groups",
    "experts_per_group",
    "row_tiles",
    "n_tiles",
    "o_tiles",
    "d_tiles",
    "mask_stride_t",
    "room",
)
MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async|mma.sync", 100: "tcgen05.mma|mma.sync"}

# A compiler's choices depend on the size of a type and on the target: not every pair is worth the time of every kernel.
TARGETS = pytest.mark.parametrize(("dtype", "capability"), [("bf16", 80), ("bf16", 90), ("bf16", 100), ("fp16", 90), ("fp32", 100)])


@pytest.mark.slow
def test_in_the_interpreter_the_kernels_compute_what_the_definition_says():
    tests = [str(Path(__file__).with_name(name)) for name in ("interpreted_ffn.py", "interpreted_routed.py", "device_ffn.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_kernels_compute_what_the_definition_says():
    tests = str(Path(__file__).with_name("device_ffn.py"))
    done = subprocess.run([sys.executable, "-m", "pytest", "-qx", tests], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def pointers(dtype):
    floats = ("x", "up", "gate", "h", "kept", "a", "w", "b", "v", "down", "grad", "rows", "out", "y", "up_bias", "gate_bias", "bias")
    numbers = {"mask_ptr": "*u8", "offset_ptr": "*i32", "token_ptr": "*i32", "done_ptr": "*i32", "pair_ptr": "*i32", "count_ptr": "*i32"}
    numbers["start_ptr"] = "*i32"
    return {f"{name}_ptr": f"*{dtype}" for name in floats} | numbers | dict.fromkeys(("sums_ptr", "energy_ptr"), "*fp32")


def check(found, *, capability, dtype, products, asynchronous=False, wide=0):
    ptx = found.asm["ptx"]
    assert f".target sm_{capability}" in ptx and found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES, "it does not fit any GPU"
    assert ".local" not in ptx, "registers are spilled"
    if products:
        matrix = re.search(MATRIX_INSTRUCTIONS[capability], ptx)
        assert bool(matrix) == (dtype != "fp32"), "float32 would be rounded to TF32, or other types run without matrix instructions"
    if asynchronous:
        assert re.search(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x10", ptx), "no copy of 16 bytes runs ahead"
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= wide, "weights are not read 16 bytes at a time"


def without(*names):
    return dict.fromkeys(names)


def tiles_of(T, dtype, architecture="none"):
    sizes = {"num_neurons": F, "num_experts": F // SIZE, "num_tokens": T, "bytes_per_number": BYTES[dtype], "architecture": architecture}
    return ragged_tiles(**sizes) if T > 512 else union_tiles(d_in=D, d_out=D, num_units=132, **sizes)


@TARGETS
@pytest.mark.parametrize("T", [1, 8, 64])
def test_kernels_of_few_tokens_compile_to_wide_loads_and_fit_any_gpu(compiled, capability, T, dtype):
    from moeify.kernels import triton_union

    t = tiles_of(T, dtype)
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "pointers": pointers(dtype), "odd": ODD}
    none = without("up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr")
    one = dict.fromkeys(("x_stride_d", "up_stride_d", "gate_stride_d", "mask_stride_e"), 1)
    sides = {"T_TILE": t.tokens, "N_TILE": t.neurons, "K_TILE": t.channels, "RUN": min(SIZE, t.neurons), **EXPERTS}
    first = {**none, **one, **sides, **FUNCTION}
    expected = {"capability": capability, "dtype": dtype, "products": T > 1, "asynchronous": T > 1}
    weights = 2 * t.neurons * t.channels * BYTES[dtype] // 16 // 128
    kernel = triton_union.hidden_of_one if T == 1 else triton_union.hidden_of_few
    check(compiled(kernel, capability, constants=first, **options), **expected, wide=weights if T == 1 else 0)
    sides = {"T_TILE": t.tokens, "K_TILE": t.depth, "O_TILE": t.outputs, "S_TILE": SPLITS, "RUN": min(SIZE, t.depth), **EXPERTS}
    weights = t.depth * t.outputs * BYTES[dtype] // 16 // 128
    for contiguous in ("down_stride_f", "down_stride_o"):  # as nn.Linear stores it, and by neuron
        second = {contiguous: 1, "mask_stride_e": 1, **sides, **without("scale_ptr", "bias_ptr")}
        found = compiled(triton_union.outputs_of_few, capability, constants=second, **options)
        check(found, **expected, wide=weights if T == 1 else 0)
        stored, _, rest = found.asm["ptx"].rpartition("atom.")
        assert re.match(r"global\.gpu\.acq_rel\.add|acq_rel\.gpu\.global\.add|global\.acq_rel\.gpu\.add", rest), (
            "it counts before its sums are seen"
        )
        assert "bar.sync" in stored[stored.rindex("st.global") :], "one thread counts before the others have stored"
        assert "ld.global.cg" in rest, "other units' sums come from a cache that does not know them"


@TARGETS
def test_kernels_of_many_tokens_and_of_training_compile_to_copies_that_run_ahead(compiled, capability, dtype):
    from moeify.kernels import triton_backward, triton_pairs

    t = tiles_of(4096, dtype)
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "pointers": pointers(dtype), "odd": ODD}
    expected = {"capability": capability, "dtype": dtype, "products": True, "asynchronous": True}
    common = {**EXPERTS, "BY_TOKEN": False}
    none = without("up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr")
    one = dict.fromkeys(("x_stride_d", "up_stride_d", "gate_stride_d", "mask_stride_e"), 1)
    sides = {"T_TILE": t.tokens, "N_TILE": t.neurons, "K_TILE": t.channels}
    first = {**none, **one, **sides, **common, **FUNCTION, "RUN": t.neurons}
    check(compiled(triton_pairs.hidden_of_pairs, capability, constants=first, **options), **expected)
    through = {"grad_stride_o": 1, "down_stride_f": 1, "mask_stride_e": 1, **sides, **common, **FUNCTION}
    check(compiled(triton_backward.through_activation, capability, constants=through, **options), **expected)
    sides = {"R_TILE": t.tokens, "K_TILE": t.depth, "O_TILE": t.outputs, **EXPERTS}
    found = compiled(triton_pairs.add_products, capability, constants={"w_stride_f": 1, **without("b_ptr", "v_ptr"), **sides}, **options)
    check(found, **expected)
    assert re.search(r"(atom|red)\.global\S*add\S*\.f32", found.asm["ptx"])
    both = {"w_stride_o": 1, "v_stride_o": 1, **sides, "K_TILE": max(16, t.depth // 2)}
    check(compiled(triton_pairs.add_products, capability, constants=both, **options), **expected)
    sides = {"R_TILE": t.depth, "N_TILE": t.neurons, "D_TILE": t.outputs, **common}
    for bias in ({}, without("bias_ptr")):
        total = {"x_stride_d": 1, "out_stride_d": 1, **sides, **bias}
        check(compiled(triton_backward.sum_pairs, capability, constants=total, **options), **expected)


@pytest.mark.parametrize(("dtype", "capability"), [("fp16", 80), ("fp16", 100), ("fp32", 80), ("fp32", 90)])
def test_the_other_types_and_targets_compile(compiled, capability, dtype):
    from moeify.kernels import triton_backward, triton_pairs, triton_union

    few, many = tiles_of(8, dtype), tiles_of(4096, dtype)
    none = without("up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr", "scale_ptr", "bias_ptr")
    one = dict.fromkeys(("x_stride_d", "up_stride_d", "gate_stride_d", "mask_stride_e", "down_stride_f", "out_stride_d"), 1)
    second = {"T_TILE": few.tokens, "K_TILE": few.depth, "O_TILE": few.outputs, "S_TILE": SPLITS, "RUN": min(SIZE, few.depth)}
    first = {"T_TILE": many.tokens, "N_TILE": many.neurons, "K_TILE": many.channels, "RUN": many.neurons, **FUNCTION}
    summed = {"R_TILE": many.depth, "N_TILE": many.neurons, "D_TILE": many.outputs}
    for kernel, sides, t in (
        (triton_union.outputs_of_few, second, few),
        (triton_pairs.hidden_of_pairs, first, many),
        (triton_backward.sum_pairs, summed, many),
    ):
        given = {**none, **one, **sides, **EXPERTS, "BY_TOKEN": True}
        constants = {name: value for name, value in given.items() if name in kernel.arg_names}
        options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "pointers": pointers(dtype), "odd": ODD}
        found = compiled(kernel, capability, constants=constants, **options)
        check(found, capability=capability, dtype=dtype, products=True, asynchronous=True)


@TARGETS
@pytest.mark.parametrize("T", [1, 8])
def test_the_routers_hidden_layer_compiles_and_is_not_rounded_to_tf32(compiled, capability, T, dtype):
    from moeify.kernels import triton_router

    t = router_tiles(d_model=D, width=128, num_tokens=T, num_units=132)
    sides = {"T_TILE": t.tokens, "W_TILE": t.rows, "K_TILE": t.channels, "x_stride_d": 1}
    options = {"pointers": {**pointers("fp32"), "x_ptr": f"*{dtype}", "hidden_ptr": "*fp32"}, "odd": ODD}
    found = compiled(triton_router.sum_hidden, capability, constants=sides, **options)
    check(found, capability=capability, dtype="fp32", products=True, wide=t.rows * t.channels // 4 // 128 if T == 1 else 0)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_hidden_layer_of_many_tokens_compiles_to_matrix_instructions(compiled, capability):
    from moeify.kernels import triton_router

    given = {"pointers": {"x_ptr": "*bf16", "hidden_ptr": "*fp32", "sums_ptr": "*fp32"}, "odd": ODD, "num_warps": 8}
    found = compiled(triton_router.sum_hidden_of_many, capability, constants={**triton_router.MANY, "x_stride_d": 1}, **given)
    check(found, capability=capability, dtype="bf16", products=True)
    assert "tf32" not in found.asm["ptx"]


@pytest.mark.parametrize(("rule", "capability"), list(zip(gpu_routed.RULES, (80, 90, 100, 90, 100), strict=True)))
def test_every_rule_compiles(compiled, rule, capability):
    from moeify.kernels import triton_router

    always = (3, 100) if rule == "topk" else None
    sides = {
        "IS_EXP": True,
        "RULE": rule,
        "ALWAYS": always,
        "E_ALL": 256 if rule == "norm_budget" else 128,
        "S_ALL": 4,
        "W_ALL": 128,
        "W_TILE": 32,
    }
    floats = dict.fromkeys(("sums_ptr", "hidden_bias_ptr", "out_ptr", "out_bias_ptr"), "*fp32")
    given = {"pointers": {**floats, "mask_ptr": "*u8", "knob": "fp32"}, "odd": (*ODD, "splits", "knob"), "num_warps": 8}
    check(compiled(triton_router.choose_experts, capability, constants=sides, **given), capability=capability, dtype="fp32", products=False)


def test_int8_weights_of_many_tokens_compile(compiled):
    from moeify.kernels import triton_pairs

    t = tiles_of(4096, "bf16")
    given = {
        **pointers("bf16"),
        **dict.fromkeys(("up_ptr", "gate_ptr", "w_ptr"), "*i8"),
        **dict.fromkeys(("up_scale_ptr", "gate_scale_ptr"), "*fp32"),
    }
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages, "pointers": given, "odd": ODD}
    one = dict.fromkeys(("x_stride_d", "up_stride_d", "gate_stride_d", "mask_stride_e"), 1)
    sides = {"T_TILE": t.tokens, "N_TILE": t.neurons, "K_TILE": t.channels, "BY_TOKEN": False, "RUN": t.neurons, **EXPERTS, **FUNCTION}
    first = {**one, **sides, **without("kept_ptr", "up_bias_ptr", "gate_bias_ptr")}
    check(compiled(triton_pairs.hidden_of_pairs, 90, constants=first, **options), capability=90, dtype="bf16", products=True)
    sides = {"R_TILE": t.tokens, "K_TILE": t.depth, "O_TILE": t.outputs, **EXPERTS, **without("b_ptr", "v_ptr"), "w_stride_f": 1}
    check(compiled(triton_pairs.add_products, 90, constants=sides, **options), capability=90, dtype="bf16", products=True)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", ["count_pairs", "place_pairs"])
def test_the_plan_on_the_device_compiles(compiled, capability, name):
    from moeify.kernels import triton_plan

    constants = {"T_TILE": 128, "G_TILE": 32, "mask_stride_e": 1}
    found = compiled(getattr(triton_plan, name), capability, pointers=pointers("fp32"), constants=constants, odd=(*ODD, "chunks"))
    check(found, capability=capability, dtype="fp32", products=False)
    assert not re.search(r"\b(atom|red)\.", found.asm["ptx"]), "the order of pairs would differ from run to run"


def test_no_stride_is_multiplied_in_32_bits(compiled):
    """Of a view of something large the last token or channel may lie beyond 2^31 elements, however small the view is."""
    from moeify.kernels import triton_backward, triton_pairs, triton_plan, triton_router, triton_union

    small = {"T_TILE": 16, "N_TILE": 16, "K_TILE": 16, "O_TILE": 16, "R_TILE": 16, "D_TILE": 16, "W_TILE": 16, "G_TILE": 16, "S_TILE": 4}
    given = {**small, **EXPERTS, **FUNCTION, "RUN": 16, "BY_TOKEN": True, **without("up_scale_ptr", "gate_scale_ptr", "scale_ptr")}
    for module, names in (
        (triton_union, {"hidden_of_few": (16,), "outputs_of_few": (1,)}),
        (triton_router, {"sum_hidden": (1, 16), "sum_hidden_of_many": (16,)}),
        (triton_plan, {"count_pairs": (16,)}),
        (triton_pairs, {"hidden_of_pairs": (16,)}),
        (triton_backward, {"through_activation": (16,)}),
    ):
        for name, sizes in names.items():
            for tokens in sizes:
                kernel = getattr(module, name)
                constants = {key: value for key, value in (given | {"T_TILE": tokens}).items() if key in kernel.arg_names}
                types = pointers("fp16") | ({"hidden_ptr": "*fp32"} if module is triton_router else {})
                ir = compiled(kernel, 80, pointers=types, constants=constants, odd=ODD).asm["ttir"]
                strides = [arg for arg in kernel.arg_names if "stride" in arg]
                assert all(f"%{arg}: i32" in ir for arg in strides), "the names are not those of the compiler's text"
                narrow = [arg for arg in strides if re.search(rf"(splat %{arg} : i32|muli [^:]*%{arg}\b[^:]*: i32)", ir)]
                assert not narrow, f"{name}, {tokens} tokens: {narrow}"


@pytest.mark.parametrize("function", gpu_ffn.FUNCTIONS)
def test_every_activation_compiles_forward_and_backward(compiled, function):
    from moeify.kernels import triton_backward, triton_neurons, triton_pairs

    assert gpu_ffn.FUNCTIONS == triton_neurons.FUNCTIONS
    named = {"ACTIVATION": function, "THRESHOLD": 0.5 if function == "shifted_relu" else 0.0}
    sides = {"T_TILE": 16, "N_TILE": 16, "K_TILE": 16, "BY_TOKEN": False, **EXPERTS, **named}
    options = {"pointers": pointers("bf16"), "odd": ODD}
    none = without("gate_ptr", "up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr")
    first = {**none, **sides, "RUN": 16}
    assert compiled(triton_pairs.hidden_of_pairs, 90, constants=first, **options).asm["cubin"]
    assert compiled(triton_backward.through_activation, 90, constants={**without("gate_ptr", "energy_ptr"), **sides}, **options).asm[
        "cubin"
    ]


def test_nothing_is_of_one_vendor(compiled):
    """Kernels of each kind compile for AMD's GPUs, and none has inline assembly; nobody has run them there."""
    from moeify.kernels import triton_pairs, triton_router, triton_union

    for file in Path(triton_union.__file__).parent.glob("triton_*.py"):
        assert not re.search(r"inline_asm|tl\.extra|libdevice", file.read_text()), file
    few, many = tiles_of(8, "bf16", "gfx942"), tiles_of(4096, "bf16", "gfx1100")
    none = without("up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr")
    sides = {"T_TILE": many.tokens, "N_TILE": many.neurons, "K_TILE": many.channels, "BY_TOKEN": True, "RUN": many.neurons}
    second = {"T_TILE": few.tokens, "K_TILE": few.depth, "O_TILE": few.outputs, "S_TILE": SPLITS, "RUN": 64, **EXPERTS, "down_stride_f": 1}
    added = {"R_TILE": many.tokens, "K_TILE": many.depth, "O_TILE": many.outputs, **EXPERTS, "w_stride_f": 1}
    chosen = {"IS_EXP": True, "RULE": "topk", "ALWAYS": None, "E_ALL": 32, "S_ALL": 4, "W_ALL": 128, "W_TILE": 32}
    floats = dict.fromkeys(("hidden_bias_ptr", "out_ptr", "out_bias_ptr"), "*fp32") | {"knob": "fp32"}
    for target, kernel, constants, t in (
        ("gfx942", triton_union.outputs_of_few, {**second, **without("scale_ptr", "bias_ptr")}, few),
        ("gfx1100", triton_pairs.hidden_of_pairs, {**none, **sides, **EXPERTS, **FUNCTION}, many),
        ("gfx1100", triton_pairs.add_products, {**added, **without("b_ptr", "v_ptr")}, many),
        ("gfx942", triton_router.choose_experts, chosen, few),
    ):
        types = pointers("bf16") | (floats if kernel is triton_router.choose_experts else {})
        launch = {"num_warps": t.num_warps, "num_stages": t.num_stages}  # as they are launched
        found = compiled(kernel, target, pointers=types, constants=constants, odd=(*ODD, "splits", "knob"), **launch)
        assert found.asm["hsaco"] and found.metadata.shared <= 64 << 10


def test_tuned_tiles_name_known_fields():
    known = {"tokens", "neurons", "channels", "outputs", "depth", "atomic_neurons", "num_warps", "num_stages"}
    assert all(set(found) <= known for found in TUNED.values())
