"""One plain training loop.

Letters: B batch, S sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer and schedule: AdamW, linear warm-up, cosine to a tenth."""

    steps: int
    """Optimizer steps."""
    lr: float = 1e-3
    """Largest learning rate."""
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors and embeddings of one dimension have none."""
    clip: float = 1.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.")


def train_lm(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    config: TrainConfig,
    *,
    compute: torch.dtype = torch.float32,
    progress: Progress = NO_PROGRESS,
) -> list[float]:
    """Train a causal language model in place on ``batches`` of ``input_ids`` (B, S).

    Args:
        model: a transformers model that returns a loss for ``labels``.
        batches: endless, or at least ``config.steps`` long.
        config: optimizer and schedule.
        compute: dtype of matrix products (autocast); weights and optimizer keep theirs. See `fast_dtype`.
        progress: told every step.

    Returns:
        The loss of each step, in nats per token.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, config))
    device = next(model.parameters()).device.type
    losses = []
    model.train()
    with progress.task("train", total=config.steps) as task:
        for step in range(config.steps):
            batch = next(batches)
            with torch.autocast(device, dtype=compute, enabled=compute is not torch.float32):
                loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; lower the learning rate ({config.lr}).")
            task.advance(1)
    model.eval()
    return losses


def _warmup_cosine(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
