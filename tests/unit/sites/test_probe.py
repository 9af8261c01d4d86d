"""The watched forward: what it records, and that the model is as before."""

import pytest
import torch
from torch import nn

from moeify.sites.probe import Probe, eval_mode, linear_leaves


class Noisy(nn.Module):
    """Draws random numbers, and fails when told to."""

    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 4)
        self.frozen = nn.Dropout().eval()

    def forward(self, x, fail=False):
        h = self.drop(self.up(x)) + torch.rand(())
        if fail:
            raise RuntimeError("no")
        return {"y": [self.down(h)], "cache": object()}


def probe(model, **more):
    return Probe(model, {"x": torch.arange(24.0).view(2, 3, 4), **more}, linear_leaves(model))


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("fail", [False, True])
def test_run_leaves_hooks_flags_and_random_state_as_they_were(fail):
    model = Noisy()
    before = (hooks(model), [m.training for m in model.modules()], torch.get_rng_state())

    with pytest.raises(RuntimeError, match="no") if fail else eval_mode(model), eval_mode(model):
        probe(model, fail=fail).run()

    assert hooks(model) == before[0]
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_run_twice_on_a_model_that_draws_gives_the_same_values():
    watched = probe(Noisy())
    a, b = watched.run(), watched.run()
    assert torch.equal(a.result[0], b.result[0])


def test_run_records_first_calls_and_results():
    model = Noisy().eval()
    trace = probe(model).run(keep={"down"})
    assert list(trace.calls) == ["up", "down"]
    assert trace.calls["up"].num_rows == 6
    assert trace.calls["up"].x_RD.shape == (6, 4)
    assert trace.calls["up"].y_RF.shape == (6, 6)
    assert torch.equal(trace.result[0], trace.outputs["down"][0])
    assert set(trace.outputs) == {"down"}


def test_run_with_edits_and_pins_replaces_outputs():
    model = Noisy().eval()
    pinned = torch.full((2, 3, 4), 7.0)
    trace = probe(model).run(edit={"up": lambda y, seed: torch.ones_like(y)}, pins={"down": [pinned]})
    assert torch.equal(trace.calls["up"].y_RF, torch.ones(6, 6))
    assert (trace.calls["down"].x_RD >= 1).all()
    assert torch.equal(trace.result[0], pinned)


def test_run_on_a_pointwise_convolution_takes_channels_as_features():
    model = nn.Sequential(nn.Conv1d(4, 6, 1))
    trace = Probe(model, {"input": torch.randn(2, 4, 5)}, linear_leaves(model)).run()
    assert trace.calls["0"].x_RD.shape == (10, 4)
    assert trace.calls["0"].y_RF.shape == (10, 6)


def test_linear_leaves_skips_wide_convolutions_and_embeddings():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3), "embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 6)})
    assert list(linear_leaves(model)) == ["linear"]


def test_run_keys_equal_rows_equally_in_every_batch():
    model = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(100, 4)
    whole, part = (Probe(model, {"input": rows}, linear_leaves(model)).run().calls["0"] for rows in (x, x[37:41]))
    assert whole.num_rows == 100
    assert len(whole.x_RD) == 32
    assert torch.equal(whole.tokens[37:41], part.tokens)
    assert len(whole.tokens.unique()) == 100
