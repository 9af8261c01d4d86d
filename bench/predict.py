"""``python -m bench.predict [--compile]``: what arithmetic says that the Triton kernels of experts reach on an H200; needs no GPU.

A kernel takes the larger of its bytes over the bandwidth and its FLOPs over the rate that products reach, plus the time in which it starts
and drains; atomics and what one unit alone reads have rates of their own. Nothing overlaps. Sides are counted alike: dense is what
torch.compile makes of the FFN, three products and one elementwise kernel. The rates are assumptions (`CHIP`), not measurements of ours.

``--compile`` adds a row for each kernel: registers and shared memory from the machine code for sm90, and the blocks that a unit then
holds. For few tokens ``flight_kb`` is what these ask for at once; a bandwidth of 4.8 TB/s at 0.7 us takes 25 KB a unit.

Letters: T tokens, D model width, F FFN width, E experts, G expert size, W router width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import SHAPES, Shape
from bench.masks import recorded
from moeify.kernels.tiles import ATOMIC_NEURONS, UNION_TOKENS, FFNTiles, ragged_tiles, router_tiles, union_tiles


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates that kernels reach."""

    units: int = 132
    bytes_per_s: float = 4.8e12 * 0.9
    flops_per_s: float = 989e12
    dense_frac: float = 0.72
    """Of the peak: a large product of cuBLAS (790 TFLOP/s were seen elsewhere, the best shape)."""
    gathered_frac: float = 0.52
    """Of the peak: tiles of 128 that gather their tokens, two stages of shared memory."""
    summed_frac: float = 0.4
    """Of the peak: gradients of weights, tiles of 64 x 128 whose sum runs over the pairs."""
    atomic_bytes_per_s: float = 2.5e12
    """fp32 sums in the second-level cache."""
    unit_bytes_per_s: float = 110e9
    """What one unit reads from the second-level cache."""
    start_us: float = 2.5
    """Of a kernel within a graph or a full queue: start, first loads, tail."""
    sort_us: float = 2.0
    """Scores, maximum, comparison; for rules on sorted scores about twice that."""


CHIP = Chip()
WIDTH = 128


def product_us(T: int, inputs: int, outputs: int, *, share: float = 1.0, frac: float, union: float | None = None) -> float:
    """One product of T tokens in bf16; ``share`` of the pairs and ``union`` of the weights."""
    flops_us = 2 * T * inputs * outputs * share / (CHIP.flops_per_s * frac) * 1e6
    bytes_us = 2 * (inputs * outputs * (share if union is None else union) + T * (inputs + outputs)) / CHIP.bytes_per_s * 1e6
    return max(flops_us, bytes_us)


def stream_us(numbers: float, *, size: int = 2) -> float:
    """Numbers read or written once."""
    return numbers * size / CHIP.bytes_per_s * 1e6


def dense_us(shape: Shape, T: int, *, passes: int = 1) -> float:
    """FFN forward, or (3 passes) forward and backward."""
    D, F, firsts = shape.d_model, shape.d_ff, 2 if shape.gated else 1
    products = passes * (firsts * product_us(T, D, F, frac=CHIP.dense_frac) + product_us(T, F, D, frac=CHIP.dense_frac))
    kernels = passes * (firsts + 1) + (1 if passes == 1 else 2)
    return products + (1 if passes == 1 else 3) * stream_us((firsts + 1) * T * F) + kernels * CHIP.start_us


def router_us(shape: Shape, T: int, E: int) -> float:
    """Router of width 128 and rule: the two kernels of few tokens, or torch's for many."""
    if T <= UNION_TOKENS:
        return stream_us(shape.d_model * WIDTH, size=4) + E * WIDTH * 4 / CHIP.unit_bytes_per_s * 1e6 + CHIP.sort_us + 2 * CHIP.start_us
    hidden = 3 * product_us(T, shape.d_model, WIDTH, frac=CHIP.gathered_frac)  # each weight is three numbers
    scores = 2 * T * WIDTH * E / 50e12 * 1e6  # fp32 without tensor cores
    return hidden + scores + stream_us(T * (6 * WIDTH + 3 * E), size=4) + T / (8 * CHIP.units) * CHIP.sort_us / 8 + 5 * CHIP.start_us


def union_us(shape: Shape, T: int, G: int, f: float, union: float) -> dict[str, float]:
    """Few tokens, by part."""
    D, F, firsts = shape.d_model, shape.d_ff, 2 if shape.gated else 1
    tiles = union_tiles(d_in=D, d_out=D, num_neurons=F, num_experts=F // G, num_tokens=T, bytes_per_number=2, num_units=CHIP.units)
    rows = -(-T // tiles.tokens) * tiles.tokens
    splits = -(-F // tiles.neurons_per_split)
    again = -(-T // tiles.tokens)  # every tile of tokens reads the weights, all but the first from the cache; as slow, to be careful
    weights = {"share": union, "frac": CHIP.gathered_frac, "union": union * again}
    return {
        "first": firsts * product_us(rows, D, F, **weights) + CHIP.start_us,
        "second": product_us(rows, F, D, **weights) + stream_us(2 * splits * T * D, size=4) + CHIP.start_us,
    }


def ragged_us(shape: Shape, T: int, G: int, f: float, *, passes: int = 1) -> dict[str, float]:
    """Many tokens, or a training step, by part."""
    D, F, firsts = shape.d_model, shape.d_ff, 2 if shape.gated else 1
    E, pairs = F // G, T * f * (F // G)
    sparse = {"share": f, "frac": CHIP.gathered_frac}
    is_atomic = G >= ATOMIC_NEURONS
    idle = E * (T / 128) * (1 - f) * 0.002  # programs that exit
    parts = {"plan": stream_us(6 * T * E, size=1) + 3 * CHIP.start_us + idle / CHIP.units}
    parts["first"] = firsts * product_us(T, D, F, **sparse) + CHIP.start_us
    if is_atomic:
        added = pairs * D * 4 / CHIP.atomic_bytes_per_s * 1e6
        parts["second"] = max(product_us(T, F, D, **sparse), added) + stream_us(3 * T * D, size=4) + 3 * CHIP.start_us
    else:
        parts["second"] = product_us(T, F, D, frac=CHIP.dense_frac) + stream_us(2 * T * F) + 2 * CHIP.start_us
    if passes == 3:
        parts["back through h"] = product_us(T, F, D, **sparse) + stream_us(4 * pairs * G) + CHIP.start_us
        parts["weights"] = (firsts + 1) * (product_us(T, F, D, share=f, frac=CHIP.summed_frac) + CHIP.start_us)
        back = firsts * product_us(T, F, D, **sparse) if is_atomic else firsts * product_us(T, F, D, frac=CHIP.dense_frac)
        added = pairs * D * 4 / CHIP.atomic_bytes_per_s * 1e6 if is_atomic else 0.0
        parts["inputs"] = max(back, added) + stream_us(3 * T * D, size=4) + 3 * CHIP.start_us
    return parts


def targets() -> Iterator[dict[str, Any]]:
    """A row for every target of the GPU kernels."""
    llama, vit = SHAPES["llama-8b"], SHAPES["vit-b"]
    for f in (0.5, 0.25):
        yield _row(f"decode, 1 token, llama-8b, f = {f}", 0.8 / f, llama, 1, 64, f, union=f, routed=True)
    for masks in ("recorded", "random"):
        union = recorded(32, 224, 0.25, device="cpu").any(0).float().mean().item() if masks == "recorded" else 1 - 0.75**32
        yield _row(f"batch 32, {masks} masks (union {union:.2f}), f = 0.25", 1.1, llama, 32, 64, 0.25, union=union, routed=True)
    for G, f, aim in (
        (64, 0.25, 2.4),
        (64, 0.5, 1.4),
        (256, 0.25, 2.4),
        (1792, 0.25, 2.4),
        (256, 0.5, 1.4),
        (1792, 0.5, 1.4),
        (16, 0.25, 1.5),
        (32, 0.25, 1.5),
    ):
        yield _row(f"prefill 4096, llama-8b, experts of {G}, f = {f}", aim, llama, 4096, G, f, routed=True)
    yield _row("training step, 8192 tokens, D 2048, 8 of 32 experts", 2.0, SHAPES["llama-1b"], 8192, 256, 0.25, passes=3)
    for f in (0.5, 0.25):
        yield _row(f"ViT-B, batch 256, 24 experts of 128, f = {f}", None, vit, 256 * 197, 128, f, routed=True)
    for T in (1, 32):
        yield _row(f"f = 1, {T} tokens, llama-8b", 0.95, llama, T, 64, 1.0, union=1.0, routed=True)
    dense = dense_us(llama, 4096)
    yield {"what": "target", "target": "f = 1 by the rule, llama-8b: no router, the dense products"} | _verdict(dense, dense, 0.95)


def _row(
    name: str,
    aim: float | None,
    shape: Shape,
    T: int,
    G: int,
    f: float,
    *,
    union: float | None = None,
    routed: bool = False,
    passes: int = 1,
) -> dict[str, Any]:
    parts = ragged_us(shape, T, G, f, passes=passes) if union is None else union_us(shape, T, G, f, union)
    if routed:
        parts = {"router": router_us(shape, T, shape.d_ff // G)} | parts
    return {"what": "target", "target": name, **_verdict(dense_us(shape, T, passes=passes), sum(parts.values()), aim), "parts_us": parts}


def _verdict(dense: float, ours: float, aim: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"dense_us": dense, "ours_us": ours, "ratio": dense / ours}
    return row | {"aim": aim, "reaches": aim is None or dense / ours >= aim}


# -- what the compiler says -----------------------------------------------------------------------------------------------------------


def resources() -> Iterator[dict[str, Any]]:
    """A row for each kernel of a llama-8b FFN in bf16, experts of 64, machine code for sm90."""
    from moeify.kernels import triton_backward, triton_pairs, triton_router, triton_union

    size = 64
    D, F = SHAPES["llama-8b"].d_model, SHAPES["llama-8b"].d_ff
    few = {
        T: union_tiles(d_in=D, d_out=D, num_neurons=F, num_experts=F // size, num_tokens=T, bytes_per_number=2, num_units=132)
        for T in (1, 8, 64)
    }
    many = ragged_tiles(num_neurons=F, num_experts=F // size, num_tokens=4096, bytes_per_number=2)
    router = router_tiles(d_model=D, width=WIDTH, num_tokens=1, num_units=CHIP.units)
    experts = {"SIZE": size, "LARGER": 0, "ACTIVATION": "silu", "THRESHOLD": 0.0}
    one = dict.fromkeys(("x_stride_d", "up_stride_d", "gate_stride_d", "mask_stride_e", "down_stride_f", "grad_stride_o", "w_stride_f"), 1)
    none = dict.fromkeys(("up_bias_ptr", "gate_bias_ptr", "up_scale_ptr", "gate_scale_ptr", "scale_ptr", "bias_ptr", "b_ptr", "v_ptr"))

    def firsts(t: FFNTiles) -> dict[str, Any]:
        return {"T_TILE": t.tokens, "N_TILE": t.neurons, "K_TILE": t.channels, "RUN": min(size, t.neurons)}

    def seconds(t: FFNTiles) -> dict[str, Any]:
        return {
            "T_TILE": t.tokens,
            "K_TILE": t.depth,
            "O_TILE": t.outputs,
            "S_TILE": triton_union.SPLITS_AT_ONCE,
            "RUN": min(size, t.depth),
        }

    sides = {"T_TILE": router.tokens, "W_TILE": router.rows, "K_TILE": router.channels}
    cases: list[tuple[str, Any, Mapping[str, Any], Any, int]] = [
        ("router's hidden layer, 1 token", triton_router.sum_hidden, sides, router, router.rows * router.channels * 4)
    ]
    for T, t in few.items():
        kernel = triton_union.hidden_of_one if T == 1 else triton_union.hidden_of_few
        stages = 1 if T == 1 else t.num_stages
        cases.append((f"first products, {T} tokens", kernel, firsts(t), t, 2 * t.neurons * t.channels * 2 * stages))
        cases.append((f"second products, {T} tokens", triton_union.outputs_of_few, seconds(t), t, t.depth * t.outputs * 2 * stages))
    cases.append(("first products, ragged", triton_pairs.hidden_of_pairs, firsts(many) | {"BY_TOKEN": False}, many, 0))
    added = {"R_TILE": many.tokens, "K_TILE": many.depth, "O_TILE": many.outputs}
    cases.append(("added by atomics", triton_pairs.add_products, added, many, 0))
    cases.append(("through the activation", triton_backward.through_activation, firsts(many) | {"BY_TOKEN": False}, many, 0))
    summed = {"R_TILE": many.depth, "N_TILE": many.neurons, "D_TILE": many.outputs, "BY_TOKEN": False, "out_stride_d": 1}
    cases.append(("gradients of weights", triton_backward.sum_pairs, summed, many, 0))
    for name, kernel, constants, tiles, flight in cases:
        known = {k: v for k, v in {**none, **one, **experts, **constants}.items() if k in kernel.arg_names}
        registers, shared, spilled = _compiled(kernel, known, num_warps=tiles.num_warps, num_stages=getattr(tiles, "num_stages", 3))
        blocks = occupancy(registers, shared, num_warps=tiles.num_warps)
        row = {"what": "kernel", "kernel": name, "registers": registers, "shared_kb": shared / 1024, "spilled_bytes": spilled}
        yield row | {"blocks": blocks} | ({"flight_kb": blocks * flight / 1024} if flight else {})


def occupancy(registers: int, shared: int, *, num_warps: int) -> int:
    """Blocks that a unit of an H200 holds: 64 K registers, handed out by 8 a thread; 227 KB of shared memory, 1 KB of it the system's."""
    by_registers = (1 << 16) // (-(-registers // 8) * 8 * 32 * num_warps)
    return min(by_registers, 227 * 1024 // (shared + 1024), 64 // num_warps, 32)


def _compiled(kernel: Any, constants: Mapping[str, Any], *, num_warps: int, num_stages: int) -> tuple[int, int, int]:
    """Registers of a thread, shared bytes of a block, bytes spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("sums_ptr", "energy_ptr", "hidden_ptr"), "*fp32") | {"mask_ptr": "*u8"}
    types |= dict.fromkeys(("offset_ptr", "token_ptr", "done_ptr"), "*i32")
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") if n.endswith("_ptr") else "i32" for n in names}
    odd = ("num_tokens", "token_tiles", "num_done", "num_experts", "experts_per_group", "row_tiles", "n_tiles", "o_tiles", "d_tiles")
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in (*constants, *odd, "mask_stride_t")}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=even)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(word.split(":", 1) for word in said.split() if word.startswith(("REG:", "LOCAL:", "STACK:")))
    return int(used["REG"]), found.metadata.shared, int(used["LOCAL"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here, one JSON object a line")
    parser.add_argument("--compile", action="store_true", help="also compile the kernels for sm90 and report what they use (a minute)")
    options = parser.parse_args(argv)
    rows = [*targets(), *(resources() if options.compile else ())]
    for row in rows:
        if row["what"] == "target":
            parts = ", ".join(f"{name} {us:.0f}" for name, us in row.get("parts_us", {}).items())
            aim = "" if row["aim"] is None else f" (aim {row['aim']:.2f}{'' if row['reaches'] else ': missed'})"
            print(f"{row['target']}: dense {row['dense_us']:.0f} us, ours {row['ours_us']:.0f}: {row['ratio']:.2f}x{aim}; {parts}")
        else:
            print(json.dumps(row))
    if options.json is not None:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
