"""The executor of channel sparsity in real models."""

import pytest
import torch
from tiny import tiny_inputs, tiny_llama

from moeify.channels import SparseInput, attach_channels, detach_channels, record_channels, sparse_inputs
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.layers import set_mode
from moeify.select import TopK
from moeify.sites import find_linear_sites


def thinned(*, level=0.0, rule=None, first_dense=0):
    model, inputs = tiny_llama().eval(), tiny_inputs()
    for site in find_linear_sites(model, inputs):
        executor = SparseInput(site, rule=rule, first_dense=first_dense)
        executor.level_K.fill_(level)
        attach_channels(model, executor)
    return model, inputs


@torch.no_grad()
def test_at_level_zero_the_model_is_bit_equal_and_nothing_is_skipped():
    model, inputs = thinned()
    with record_channels(model) as recorder:
        found = model(**inputs).logits
    assert recorder.skipped_frac() == 0
    assert torch.equal(found, tiny_llama().eval()(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("rule", [None, TopK(k=5)])
def test_a_sparse_layer_is_the_dense_one_on_a_masked_input(rule):
    model, _ = thinned(level=0.05, rule=rule)
    executor = next(iter(sparse_inputs(model).values()))
    linear = model.get_submodule(executor.site.name)
    x = torch.randn(2, 7, executor.site.d_in)
    keep = x.abs() >= 0.05
    if rule is not None:
        keep = torch.zeros_like(keep).scatter_(-1, x.abs().topk(5, dim=-1).indices, True)
    with record_channels(model) as recorder:
        found = linear(x)
    torch.testing.assert_close(found, torch.nn.functional.linear(x * keep, linear.weight, linear.bias))
    assert recorder.per_layer() == {executor.site.name: pytest.approx(1 - keep.float().mean().item())}
    set_mode(model, "dense")
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    set_mode(model, "moe")
    torch.testing.assert_close(linear(x), found)


@torch.no_grad()
def test_the_first_positions_stay_dense_but_a_single_one_is_no_start():
    model, _ = thinned(level=1e9, first_dense=2)
    executor = next(iter(sparse_inputs(model).values()))
    x = torch.randn(3, 5, executor.site.d_in)
    assert executor.select(x).any(-1).tolist() == [[True, True, False, False, False]] * 3
    assert not executor.select(x[:, :1]).any()


def test_gradients_reach_the_weights_and_the_kept_channels():
    model, inputs = thinned(level=0.05)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_the_buffer_is_all_that_a_checkpoint_gets_and_detach_takes_it_away():
    model, inputs = thinned(level=0.05)
    dense = tiny_llama().eval()
    extra = set(model.state_dict()) - set(dense.state_dict())
    assert {key.rpartition(".channels.")[2] for key in extra} == {"level_K"}
    assert len(extra) == len(sparse_inputs(model))
    detach_channels(model)
    assert set(model.state_dict()) == set(dense.state_dict()) and not sparse_inputs(model)
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)


def test_errors_say_what_is_wrong():
    model, _ = thinned()
    site = next(iter(sparse_inputs(model).values())).site
    with pytest.raises(UnsupportedModelError, match="is sparse already"):
        attach_channels(model, SparseInput(site))
    with pytest.raises(ConfigError, match="first_dense must be at least 0"):
        SparseInput(site, first_dense=-1)
    with record_channels(model) as recorder, pytest.raises(ValueError, match="no sparse layer ran"):
        recorder.skipped_frac()
    other = tiny_llama()
    other.get_submodule(site.name).forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        attach_channels(other, SparseInput(site))
