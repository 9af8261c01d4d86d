"""What is installed here and what would run: the first thing to look at when something is slow or missing."""

import dataclasses
import importlib.util
import os
import platform
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import kernels
from .evaluate import measure_ms
from .hf.checkpoint import library_versions
from .kernels import gpu_ffn, gpu_routed
from .kernels.cpu_linear import LinearWeights, gated_refusal
from .kernels.cpu_neurons import MOST_TOKENS, NeuronRouterWeights, neurons_refusal
from .kernels.linear import explain_linear
from .sites import FFNWeights

EXTRAS = {"data": ("pyarrow", "datasets"), "gguf": ("gguf", "accelerate"), "report": ("matplotlib",)}
"""Packages that each optional extra of the distribution brings."""

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def doctor() -> dict[str, Any]:
    """Versions, processor, threads, speed, kernels with the reason for each choice, extras and cache folders; JSON values only."""
    return {
        "versions": {"python": platform.python_version(), **library_versions()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "speed": _speed(),
        "compiled_kernels": kernels.cpu.describe(),
        "kernels": _kernels(),
        "linear_kernels": _linear_kernels(),
        "linear_ffn": _linear_ffn(),
        "neuron_ffn": _neuron_ffn(),
        "gpu_ffn": _gpu_ffn(),
        "extras": {extra: _missing(packages) or "installed" for extra, packages in EXTRAS.items()},
        "caches": {"hub": _cache("HF_HUB_CACHE", "hub"), "datasets": _cache("HF_DATASETS_CACHE", "datasets")},
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }


def _cpu() -> dict[str, Any]:
    return {
        "name": _cpu_field("model name") or platform.processor() or platform.machine(),
        "flags": sorted(set(_cpu_field("flags", "Features").split()) & set(_CPU_FLAGS)),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_field(*names: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() in names), "")


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    count = torch.cuda.device_count()
    return f"{count} device(s), CUDA {torch.version.cuda}" if count else f"no device (torch is built for CUDA {torch.version.cuda})"


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


def _missing(packages: tuple[str, ...]) -> str | None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"missing: {', '.join(missing)}" if missing else None


def _cache(variable: str, name: str) -> str:
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    return os.environ.get(variable, str(Path(home) / name))
