"""Which labels count, seen from the model."""

import pytest
import torch
from families.models import build
from training import text, tiny_classifier

from moeify.train.labels import counted_labels, shifts_labels

LABELS = torch.tensor([[5, 6, -100], [-100, 7, 8]])


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt2", True), ("bert", False)])
def test_shifts_labels_is_seen_from_the_loss_and_leaves_the_model(family, expected):
    model = build(family)[0].train()
    batch = {key: value for key, value in text().tensors.items() if family != "gpt2" or key != "attention_mask"}
    kept = batch["labels"].clone()
    assert shifts_labels(model, batch) is expected
    assert model.training
    assert torch.equal(batch["labels"], kept)
    assert all(p.grad is None for p in model.parameters())


def test_shifts_labels_of_classes_numbers_and_no_labels_is_false_without_a_forward():
    def fails(*_args):
        raise AssertionError("a forward")

    model = tiny_classifier()
    model.register_forward_pre_hook(fails)
    for labels in (torch.tensor([0, 1]), torch.tensor([[0.5, 1.0]]), torch.tensor([[1]])):
        assert not shifts_labels(model, {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels})
    assert not shifts_labels(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    ("batch", "shifted", "expected"),
    [
        pytest.param({"labels": LABELS}, False, 4, id="every position"),
        pytest.param({"labels": LABELS}, True, 3, id="the first predicts nothing"),
        pytest.param({"labels": torch.tensor([0, -100, 2])}, False, 2, id="classes"),
        pytest.param({"labels": torch.rand(3, 2)}, False, 3, id="numbers: sequences"),
        pytest.param({"input_ids": torch.ones(5, 2)}, False, 5, id="no labels: sequences"),
    ],
)
def test_counted_labels_is_what_the_mean_is_over(batch, shifted, expected):
    assert counted_labels(batch, shifted=shifted) == expected
