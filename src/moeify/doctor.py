"""What is installed here and what would run: the first thing to look at when something is slow or missing."""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import kernels
from ._cpu import cpu_field, cpu_name
from .evaluate import measure_ms
from .hf.save import library_versions
from .kernels import gpu_ffn, gpu_linear, gpu_routed
from .kernels.cpu_linear import LinearWeights, gated_refusal
from .kernels.cpu_neurons import MOST_TOKENS, NeuronRouterWeights, neurons_refusal
from .kernels.linear import explain_linear
from .sites import FFNWeights

_NOT_SHOWN = ("autoload", "bench", "dev", "docs")  # extras that nobody needs in order to use the library
_UNWRITABLE = " (cannot be written)"
_COMPILERS = ("c++", "g++", "clang++", "nvcc")

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def doctor() -> dict[str, Any]:
    """Versions, processor, threads, speed, kernels with the reason for each choice, extras and cache folders; JSON values only."""
    return {
        "versions": {"python": platform.python_version(), **library_versions(), **_optional_versions()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "triton": gpu_linear.unavailable() or f"{_version('triton') or 'unknown version'}{_interpreted()}",
        "compilers": _compilers(),
        "speed": _speed(),
        "compiled_kernels": kernels.cpu.describe(),
        "kernels": _kernels(),
        "linear_kernels": _linear_kernels(),
        "linear_ffn": _linear_ffn(),
        "neuron_ffn": _neuron_ffn(),
        "gpu_ffn": _gpu_ffn(),
        "extras": {extra: _missing(packages) or "installed" for extra, packages in extras().items()},
        "caches": _caches(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }


def _cpu() -> dict[str, Any]:
    return {
        "name": cpu_name(),
        "flags": sorted(set(cpu_field("flags", "Features").split()) & set(_CPU_FLAGS)),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if count := torch.cuda.device_count():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return f"{count} device(s), CUDA {torch.version.cuda}: {names}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
    driver = "" if Path("/proc/driver/nvidia/version").exists() else "; no NVIDIA driver is loaded"
    return f"no device (torch is built for CUDA {torch.version.cuda}{why}{driver})"


def _speed() -> dict[str, float]:
    """What this processor reaches in fp32, medians of a few runs: the peaks that `moeify.roofline_s` takes."""
    side, numbers = 512, 1 << 24  # 64 MiB do not fit a cache
    a, b = torch.rand(side, side), torch.rand(side, side)
    source, target = torch.zeros(numbers), torch.zeros(numbers)
    times = measure_ms({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=5, warmup=2)
    return {
        "matmul_flops_per_s": 2 * side**3 / times["matmul"].median_ms * 1e3,
        "copy_bytes_per_s": 2 * 4 * numbers / times["copy"].median_ms * 1e3,
    }


def _kernels() -> list[dict[str, Any]]:
    """What ``impl="auto"`` runs on each device here for one token and for a batch of them, at a tenth and at nine tenths of the experts
    active; and in training."""
    num_experts, size, width = 32, 8, 64
    cases = ((1, 0.1, False), (512, 0.1, False), (512, 0.9, False), (512, 0.25, True))
    rows = []
    for device, (num_tokens, active, training) in product(_devices(), cases):
        weights = FFNWeights(*(torch.zeros(num_experts * size, width, device=device) for _ in range(2)))
        mask_TE = (torch.arange(num_experts, device=device) < active * num_experts).expand(num_tokens, num_experts)
        plan = kernels.build_plan(mask_TE)
        x_TD = torch.zeros(num_tokens, width, device=device)
        candidates = kernels.explain(x_TD, weights, plan, activation="relu", training=training)
        labels = {"device": device, "tokens": num_tokens, "active": active, "training": training}
        rows += [{**labels, **dataclasses.asdict(candidate)} for candidate in candidates]
    return rows


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _linear_kernels() -> list[dict[str, Any]]:
    """What ``impl="auto"`` runs here for linear layers that skip input channels, on each device: one token, and a prompt."""
    rows = []
    for device in _devices():
        layer = LinearWeights(torch.zeros(64, 64, device=device), torch.zeros(64, device=device))
        for num_tokens in (1, 512):
            candidates = explain_linear(torch.zeros(num_tokens, 64, device=device), layer)
            rows += [{"device": device, "tokens": num_tokens, **dataclasses.asdict(candidate)} for candidate in candidates]
    return rows


def _linear_ffn() -> str:
    """Whether the layers of a gated FFN run as one native call while decoding."""
    layer = LinearWeights(torch.zeros(64, 64), torch.zeros(64))
    why_not = gated_refusal(layer, layer, layer, activation="silu", dtype=torch.float32)
    return why_not or f"gate, up and down are one call; activations: {', '.join(kernels.cpu.ACTIVATIONS)}"


def _neuron_ffn() -> str:
    """Whether FFNs that skip single neurons (cats, chess, predictor) run as one native call while decoding."""
    weights = FFNWeights(torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64))
    router = NeuronRouterWeights(scale_F=torch.zeros(64), rule="threshold", knob=0.0)
    why_not = neurons_refusal(weights, router, activation="silu", dtype=torch.float32)
    return why_not or f"router 'gate', 'lowrank' or 'oracle' (topk), rule and kept neurons are one call, up to {MOST_TOKENS} tokens"


def _gpu_ffn() -> str:
    """Whether experts run by Triton's kernels on the GPUs here, and else why not."""
    if not torch.cuda.is_available():
        return "no GPU that torch sees" if (missing := gpu_ffn.unavailable("cuda")) is None else f"no GPU that torch sees, and {missing}"
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    reasons = {str(gpu): gpu_ffn.device_refusal(gpu, dtype=torch.bfloat16, activation="silu") for gpu in gpus}
    runs = f"router 'norm', any rule and experts are four kernels and one call, up to {gpu_routed.MOST_TOKENS} tokens"
    return "; ".join(f"{gpu}: {why_not or runs}" for gpu, why_not in reasons.items())


def extras() -> dict[str, tuple[str, ...]]:
    """Packages that each optional extra of the distribution brings, as its metadata says; empty where it is not installed."""
    try:
        wanted = importlib.metadata.requires("moeify") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return {}
    found: dict[str, list[str]] = {}
    for line in wanted:
        name, extra = re.match(r"[A-Za-z0-9._-]+", line), re.search(r"""extra\s*==\s*['"]([^'"]+)""", line)
        if name and extra and extra[1] not in _NOT_SHOWN:
            found.setdefault(extra[1], []).append(name[0])
    return {extra: tuple(names) for extra, names in sorted(found.items())}


def _optional_versions() -> dict[str, str]:
    """Of the installed packages of all extras."""
    names = sorted({name for packages in extras().values() for name in packages})
    return {name: version for name in names if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(packages: tuple[str, ...]) -> str | None:
    missing = [name for name in packages if _version(name) is None]
    return f"missing: {', '.join(missing)}" if missing else None


def _interpreted() -> str:
    return ", kernels run in its interpreter (TRITON_INTERPRET)" if gpu_linear.is_interpreted() else ""


def _compilers() -> dict[str, str]:
    """First line of what each says of itself: those that an installation from source and torch.compile look for."""
    asked = {"CXX": os.environ["CXX"]} if os.environ.get("CXX") else {}
    return {name: _compiler(command) for name, command in {**asked, **{name: name for name in _COMPILERS}}.items()}


def _compiler(command: str) -> str:
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        return "not found"
    try:
        said = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run ({type(error).__name__})"
    return next((line for line in said if "release" in line), said[0]) if said else "says nothing of itself"


def _caches() -> dict[str, str]:
    """Folders that downloads and compiled kernels go to."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folders = {
        "hub": os.environ.get("HF_HUB_CACHE", hub / "hub"),
        "datasets": os.environ.get("HF_DATASETS_CACHE", hub / "datasets"),
        "triton": os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"),
    }
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        folders["inductor"] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    return {name: f"{path}{_state(Path(path))}" for name, path in folders.items()}


def _state(folder: Path) -> str:
    if not folder.exists():
        return " (not there yet)"
    return "" if folder.is_dir() and os.access(folder, os.W_OK) else _UNWRITABLE


def doctor_text(found: Mapping[str, Any]) -> str:
    """What `doctor` found in a screenful: what runs here, what is missing and how to get it."""
    versions, cpu, speed = found["versions"], found["cpu"], found["speed"]
    names = ("moeify", "python", "torch", "transformers")
    lines = [
        ", ".join(f"{name} {versions[name]}" for name in names if name in versions),
        f"processor: {cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} threads in use, {cpu['torch_capability']}",
        f"  {speed['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s in fp32, {speed['copy_bytes_per_s'] / 1e9:.1f} GB/s",
        f"GPU: {found['cuda']}",
        f"compiled CPU kernels: {found['compiled_kernels']}",
        "",
        "What runs here:",
    ]
    for device in dict.fromkeys(row["device"] for row in found["kernels"]):
        rows = [row for row in found["kernels"] if row["device"] == device and row["chosen"]]
        said = [f"{_case(row)} {row['name']}" for row in rows]
        lines.append(f"  experts on {device}: {'; '.join(said)}")
        rows = [row for row in found["linear_kernels"] if row["device"] == device and row["chosen"]]
        said = [f"{_tokens(row)} {row['name']}" for row in rows]
        lines.append(f"  skipped channels on {device}: {'; '.join(said)}")
    missing = {extra: state for extra, state in found["extras"].items() if state != "installed"}
    wanted = [f"  {extra}, {state}: pip install 'moeify[{extra}]'" for extra, state in missing.items()]
    if not found["extras"]:
        wanted.append("  extras: unknown, for moeify runs from a source tree; pip install .")
    if (why_not := kernels.cpu.unavailable()) is not None:
        wanted.append(f"  {why_not}")
    elif kernels.cpu.build_note():
        wanted.append("  instruction sets of the compiled CPU kernels; see there")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        wanted.append("  a GPU: torch is built for one and finds none; see GPU above")
    wanted += [f"  cache folder {path}: make it writable" for path in found["caches"].values() if path.endswith(_UNWRITABLE)]
    lines += ["", "Missing:" if wanted else "Nothing is missing.", *wanted]
    lines += ["", "moeify doctor --all: every kernel with its reason, compilers, caches"]
    return "\n".join(broken for line in lines for broken in _broken(line))


def _broken(line: str) -> list[str]:
    """A line as several of at most 80 columns, but for paths that are longer."""
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= 80:
        return [line]
    hanging = indent + "  "
    return textwrap.wrap(line.strip(), 80, initial_indent=indent, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _case(row: Mapping[str, Any]) -> str:
    return "training" if row["training"] else f"{_tokens(row)} at {row['active']:.0%}"


def _tokens(row: Mapping[str, Any]) -> str:
    return "1 token" if row["tokens"] == 1 else f"{row['tokens']} tokens"
