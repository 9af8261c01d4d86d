"""Which labels a model's loss counts: what micro-batches and positions must be weighted by.

Letters: B batch, S sequence.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

IGNORED = -100


@torch.no_grad()
def shifts_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether position s of ``batch["labels"]`` (B, S) is what position s - 1 is to predict, as causal language models do it.

    Seen from the model: where the first position alone has a label, a loss that shifts has nothing to average and is NaN.

    Cost: a forward of one sequence.
    """
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return False
    one = {key: value[:1] for key, value in batch.items()}
    one["labels"] = torch.full_like(one["labels"], IGNORED)
    one["labels"][0, 0] = 0
    was_training = model.training
    model.eval()
    try:
        loss = getattr(model(**one), "loss", None)
        return loss is not None and bool(loss.isnan())
    finally:
        model.train(was_training)


def counted_labels(batch: Mapping[str, Tensor], *, shifted: bool) -> int:
    """Number of labels that the loss of a batch is the mean over; of a batch without class labels, the number of its sequences."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return len(next(iter(batch.values())))
    return int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())
