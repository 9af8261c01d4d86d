"""What tells runs apart, of batches and weights of any dtype."""

import pytest
import torch
from torch import nn

from moeify.train.work import fingerprint, weights_checksum

BATCH = {"input_ids": torch.arange(6).view(2, 3), "pixel_values": torch.linspace(0, 1, 8).view(2, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_is_of_values_names_and_shapes(dtype):
    batch = BATCH | {"pixel_values": BATCH["pixel_values"].to(dtype)}
    same = {key: value.t().contiguous().t() for key, value in batch.items()}  # lies otherwise in memory
    assert fingerprint([batch]) == fingerprint([same])
    others = [
        [batch | {"pixel_values": batch["pixel_values"].flip(0)}],
        [batch | {"input_ids": batch["input_ids"].view(3, 2)}],
        [{"input_ids": batch["input_ids"], "values": batch["pixel_values"]}],
        [batch, batch],
    ]
    assert len({fingerprint(other) for other in [[batch], *others]}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_checksum_is_of_the_values(dtype):
    def model_of(last):
        model = nn.Module()
        model.weight = nn.Parameter(torch.tensor([[1, 2], [3, last]], dtype=dtype), requires_grad=False)
        model.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        return model

    assert weights_checksum(model_of(4)) == weights_checksum(model_of(4)) != weights_checksum(model_of(5))
