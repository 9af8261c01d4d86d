"""Which tokens of a forward begin their sequences, whoever is called and however."""

import copy

import pytest
import tiny
import torch
from transformers import DynamicCache

from moeify._positions import Positions
from moeify.channels import SparseInput, attach_channels, detach_channels, sparse_inputs
from moeify.sites import find_linear_sites

FIRST = 2


@pytest.fixture
def model():
    """All channels are skipped but those of the first two positions."""
    model = tiny.tiny_llama()
    for site in find_linear_sites(model, tiny.tiny_inputs()):
        executor = SparseInput(site, first_dense=FIRST)
        executor.level_K.fill_(1e9)
        attach_channels(model, executor)
    return model


@pytest.fixture
def starts(monkeypatch):
    """What the first layer that asked was told since the last call."""
    found = []
    real = Positions.start

    def start(self, num_tokens, first):
        answer = real(self, num_tokens, first)
        found.append(answer.tolist() if isinstance(answer, torch.Tensor) else answer)
        return answer

    monkeypatch.setattr(Positions, "start", start)

    def take():
        first = found[0]
        found.clear()
        return first

    return take


IDS = torch.arange(12).view(2, 6)


def whole(model, cache):
    return model(IDS[:, 3:], past_key_values=cache)


def base(model, cache):
    return model.model(input_ids=IDS[:, 3:], past_key_values=cache)


def positional(model, cache):
    return model(IDS[:, 3:], None, None, cache)


def positional_base(model, cache):
    return model.base_model(IDS[:, 3:], None, torch.arange(3, 6)[None], cache)


@pytest.mark.parametrize("call", [whole, base, positional, positional_base])
def test_a_chunk_that_follows_a_cache_begins_nothing(call, model, starts):
    cache = DynamicCache()
    with torch.no_grad():
        model.model(IDS[:, :3], past_key_values=cache)
        assert starts() == FIRST
        call(model, cache)
        assert starts() == 0
        copy.deepcopy(model).model(input_ids=IDS[:, 3:], past_key_values=cache)
        assert starts() == 0
        model(IDS)
        assert starts() == FIRST


def test_positions_may_be_positional(model, starts):
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        model(IDS[:1], None, packed)
    assert starts() == [[True, True, False, True, True, False]]


def test_a_forward_that_fails_inside_or_is_interrupted_leaves_nothing(model, starts, monkeypatch):
    for error in (RuntimeError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", lambda *_, error=error, **__: (_ for _ in ()).throw(error()))
            with pytest.raises(error), torch.no_grad():
                model(IDS, position_ids=torch.arange(5, 11)[None])
        starts()
        with torch.no_grad():
            model.model(IDS)
            assert starts() == FIRST
            model(IDS)
            assert starts() == FIRST


def test_detached_layers_leave_no_watcher(model):
    detach_channels(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks or module._forward_hooks_always_called for module in model.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_see_the_positions_of_their_own_forward(reentrant, model):
    """Two forwards before one backward: packed sequences, then a row that begins nothing."""
    forwards = [(IDS[:1], torch.tensor([[0, 1, 2, 0, 1, 2]])), (IDS[1:], torch.arange(7, 13)[None])]

    def gradients():
        model.zero_grad()
        loss = sum(model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss for ids, positions in forwards)
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    positions = next(iter(sparse_inputs(model).values())).positions
    assert positions.start(6, FIRST) == FIRST, "nothing is left of a backward that has ended"
