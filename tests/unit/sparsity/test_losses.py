import pytest
import torch

from moeify.errors import ConfigError
from moeify.sparsity import LOSSES, displace, scheduled_weight, sparsity_loss

ROWS = torch.tensor([[3.0, 0.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        pytest.param("hoyer", (49 / 25 + 4 + 0) / 3, id="hoyer"),
        pytest.param("l1", (7 + 4 + 0) / 3, id="l1"),
    ],
)
def test_sparsity_loss_when_counted_by_hand_agrees(loss, expected):
    assert sparsity_loss(ROWS, loss=loss, eps=1e-12).item() == pytest.approx(expected, rel=1e-9)
    assert sparsity_loss(-ROWS.view(1, 3, 4), loss=loss, eps=1e-12).item() == pytest.approx(expected, rel=1e-9)


def test_losses_table_is_tested_as_a_whole():
    assert set(LOSSES) == {"hoyer", "l1"}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_when_differentiated_have_the_slopes_they_state(loss):
    s, q = (torch.tensor([1.5, 7.0, 0.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    value, slope_s, slope_q = LOSSES[loss](s, q, 1e-3)
    found = torch.autograd.grad(value.sum(), (s, q), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, (slope_s, slope_q))


@pytest.mark.parametrize("loss", LOSSES)
def test_sparsity_loss_when_a_row_is_zero_has_no_gradient_there(loss):
    a = ROWS.float().requires_grad_()
    sparsity_loss(a, loss=loss).backward()
    assert torch.equal(a.grad[2], torch.zeros(4))
    assert a.grad.isfinite().all()
    assert a.grad[0].abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_sparsity_loss_when_masked_equals_the_real_tokens_alone(loss):
    padded = torch.cat([ROWS, torch.full((2, 4), torch.nan, dtype=torch.float64)])
    mask = torch.tensor([1, 1, 1, 0, 0])
    assert sparsity_loss(padded, loss=loss, mask_T=mask) == sparsity_loss(ROWS, loss=loss)
    assert sparsity_loss(padded, loss=loss, mask_T=mask * 0) == 0


def test_sparsity_loss_when_activations_are_half_precision_sums_in_fp32():
    a = torch.full((1, 4096), 40.0, dtype=torch.float16)  # sum 163840: beyond fp16
    assert sparsity_loss(a, loss="l1").item() == 163840
    assert sparsity_loss(a).item() == pytest.approx(4096, rel=1e-5)


def test_square_hoyer_when_scaled_stays_and_lies_between_one_and_the_nonzeros():
    a = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).relu()
    values = torch.stack([sparsity_loss(row[None]) for row in a])
    nonzeros = torch.count_nonzero(a, dim=1)
    assert ((values >= 1 - 1e-5) & (values <= nonzeros + 1e-5)).all()
    assert sparsity_loss(a * 7).item() == pytest.approx(sparsity_loss(a).item(), rel=1e-5)


def test_displace_when_below_delta_is_zero():
    z = torch.tensor([-12.0, -10.0, -9.5, 0.0, 2.0])
    assert displace(z, delta=-10).tolist() == [0, 0, 0.5, 10, 12]
    assert torch.equal(displace(z, delta=0.0), z.relu())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param("constant", [2.0] * 9, id="constant"),
        pytest.param("linear", [i / 4 for i in range(9)], id="linear: full at the last step"),
        pytest.param("warmup", [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2], id="warmup: full at half of the run"),
    ],
)
def test_scheduled_weight_follows_its_formula(schedule, expected):
    found = [scheduled_weight(2.0, schedule=schedule, step=step, total_steps=9) for step in range(9)]
    assert found == pytest.approx(expected)
    assert scheduled_weight(2.0, schedule=schedule, step=99, total_steps=9) == 2.0
    assert scheduled_weight(2.0, schedule=schedule, step=0, total_steps=1) == 2.0


def test_scheduled_weight_when_warmup_is_shorter_ends_earlier():
    assert scheduled_weight(1.0, schedule="warmup", step=2, total_steps=21, warmup_frac=0.2) == 0.5
    with pytest.raises(ConfigError, match="'cosine'"):
        scheduled_weight(1.0, schedule="cosine", step=0, total_steps=2)
