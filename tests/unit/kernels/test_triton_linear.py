"""The Triton kernels: compiled for GPUs that are not here, and interpreted on the CPU.

Triton reads TRITON_INTERPRET when it is first imported, and what compiles cannot be interpreted: the tests of interpreted_linear.py run in
a process of their own.
"""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from moeify.kernels import gpu_linear
from moeify.kernels.tiles import linear_tiles

pytestmark = pytest.mark.skipif(gpu_linear.unavailable() is not None, reason=str(gpu_linear.unavailable()))
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1}
SHARED_BYTES = 99 << 10  # of a block of threads on the smallest GPU in question (sm86, sm89)


def test_in_the_interpreter_the_kernels_compute_what_the_definition_says():
    tests = Path(__file__).with_name("interpreted_linear.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("x", "weight", "num_tokens", "capability"),
    [
        *product(("bf16", "fp16", "fp32"), (None,), (1, 5), (80, 90)),
        *(("bf16", "i8", num_tokens, capability) for num_tokens, capability in ((1, 80), (5, 90), (1, 100), (5, 80))),
        ("bf16", None, 1, 100),
    ],
)
def test_sums_compile_to_wide_loads_and_fit_any_gpu(compiled, capability, num_tokens, x, weight):
    from moeify.kernels import triton_linear

    weight = weight or x
    tiles = linear_tiles(2048, 8192, num_tokens=num_tokens, weight_bytes=BYTES[weight], num_units=132)
    constants = {"x_stride_k": 1, "T_TILE": tiles.tokens, "K_TILE": tiles.channels, "N_TILE": tiles.outputs}
    pointers = {"x_ptr": f"*{x}", "weight_ptr": f"*{weight}", "level_ptr": "*fp32", "sums_ptr": "*fp32"}
    found = compiled(triton_linear.sum_kept, capability, pointers=pointers, constants=constants, odd=("num_tokens",))
    ptx = found.asm["ptx"]
    assert f".target sm_{capability}" in ptx and found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES
    assert not re.search(r"\b(atom|red)\.", ptx), "sums by atomics would differ from run to run"
    assert ".local" not in ptx, "registers are spilled"
    comparisons = re.findall(r"arith\.cmpf (\w+)", found.asm["ttir"])
    assert comparisons == ["une", "olt"], "what is no number is kept: it differs from zero, and is not below its level"
    if num_tokens == 1:
        loads = re.findall(r"(.*)ld\.global\.v4\.b32", ptx)
        assert len(loads) == tiles.channels * tiles.outputs * BYTES[weight] // 16 // 128, "weights are not read 16 bytes at a time"
        assert all("@" in predicate for predicate in loads), "rows of skipped channels are read"
    else:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(?:8|10)(.*);", ptx)
        assert copies and all("%r" in bytes_read for bytes_read in copies), "rows of skipped channels are read"
        assert ("mma.sync" in ptx) == (x != "fp32"), "float32 would be rounded to TF32, or other types run without matrix instructions"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("y", ["bf16", "fp16", "fp32"])
def test_the_sum_of_splits_compiles(compiled, capability, y):
    from moeify.kernels import triton_linear

    pointers = {"sums_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": f"*{y}", "y_ptr": f"*{y}"}
    odd = ("num_tokens", "num_splits")
    found = compiled(triton_linear.add_splits, capability, pointers=pointers, constants={"N_TILE": 128, "S_TILE": 8}, odd=odd, num_warps=1)
    assert found.asm["cubin"] and "st.global" in found.asm["ptx"]
