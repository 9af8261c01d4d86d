"""Types and devices by the names that the command line uses."""

import torch

from .. import _config
from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of a model's weights; routers are fp32 in any of them."""


def torch_dtype(name: str) -> torch.dtype:
    """One of `DTYPES`; a `ConfigError` for another name."""
    return _config.lookup(DTYPES, name, where="--dtype")


def torch_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: another name, or a device that torch does not see.
    """
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdecimal()) or (kind == "cpu" and index):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"--device {name}: torch sees {count} CUDA devices here (`moeify doctor` tells why); leave the option out to run on the CPU."
        )
    return torch.device(name)
