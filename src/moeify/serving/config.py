"""Options of the server."""

import math
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's own makes the server, which knows no passwords, everybody's."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    presets: tuple[str, ...] = ()
    """Presets of the checkpoint that requests may name, the first for requests that name none; none given: all of them, and the
    checkpoint's own rules for requests that name none."""
    continuous_batching: bool = False
    """Run requests in one packed batch, each with its own preset, instead of one after the other."""
    temperature: float | None = None
    """Sampling temperature of requests that give none, with continuous batching of all; 0: always the likeliest token. None: as the
    checkpoint's generation config says."""
    top_p: float | None = None
    """Share of probability that tokens are sampled from, in (0, 1]; of the same requests as temperature. None: as the checkpoint says."""
    cb_block_size: int | None = None
    """Tokens of a block of the packed batches' cache; none: 32 on a CPU, else as transformers chooses."""
    cb_num_blocks: int | None = None
    """Blocks of that cache; none: a GiB of keys and values on a CPU, else as transformers chooses."""
    cb_max_batch_tokens: int | None = None
    """Most tokens of a packed batch; none: 256 on a CPU, else as transformers chooses."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}.")
        if len(set(self.presets)) < len(self.presets):
            raise ConfigError(f"presets name {next(p for p in self.presets if self.presets.count(p) > 1)!r} twice.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}.")
        for name in ("cb_block_size", "cb_num_blocks", "cb_max_batch_tokens"):
            if (value := getattr(self, name)) is not None and (value < 1 or not self.continuous_batching):
                raise ConfigError(f"{name} must be at least 1 and is for continuous_batching, got {value}.")
