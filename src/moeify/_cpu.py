"""What the processor says of itself."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """What the processor calls itself, with family and model, for virtual machines often give a brand alone."""
    name = cpu_field("model name") or platform.processor() or platform.machine()
    family, model = cpu_field("cpu family"), cpu_field("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def cpu_field(*names: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() in names), "")
