"""Random numbers of one's own: torch's generators seeded for a while, and for whoever called as if nothing had been drawn.

`torch.manual_seed` seeds the generators of all devices, also those that nobody restores afterwards; here only what is used is touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def restored(device: torch.device | None = None) -> Iterator[None]:
    """Random numbers go on afterwards as they were before: those of the CPU, and of ``device`` where that is a GPU.

    Args:
        device: where is drawn, besides the CPU; None: where tensors are made by default.
    """
    device = torch.get_default_device() if device is None else device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """`restored`, with the same generators seeded; on the CPU the numbers are those after ``torch.manual_seed(seed)``."""
    device = torch.get_default_device() if device is None else device
    with restored(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
