"""Runs of the whole: what a sparse step computes and whom it teaches, resume after a kill, Trainer."""

import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from pretraining import PROBE, Counting, sites_of, tiny_gpt
from tiny import tiny_llama
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from training import F32, Dies, DyingData, trainer_losses, trainer_of

from moeify._dist import Ranks
from moeify.controls import record_active, set_mode
from moeify.errors import CheckpointError, ConfigError
from moeify.layers import moe_layers
from moeify.manifest import manifest_of
from moeify.ssd import SSD, SSDConfig
from moeify.train.hf_callbacks import SSDCallback
from moeify.train.loop import KeptPart, TrainConfig, train

CONFIG = SSDConfig(num_experts=8, selected=3, schedule="fixed", switches=(0.25, 0.5, 0.75), probe_frac=0.1)
STEPS = TrainConfig(steps=12, batch_sequences=4, micro_sequences=2, lr=3e-3, weight_decay=0.1, save_every=2, log_every=1, **F32)


def attached(config=CONFIG, *, steps=12, seed=0):
    model = tiny_gpt(seed=seed)
    return model, SSD(model, sites_of(model), config, total_steps=steps, probe=PROBE)


def run(config=CONFIG, training=STEPS, data=None, **options):
    model, ssd = attached(config, steps=training.steps)
    with ssd:
        record = train(model, data or Counting(), training, parts=[ssd], run={"ssd": 1}, **options)
        ssd.set_step(training.steps)
    return model, ssd, record


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


def in_sparse_phase(model, ssd):
    ssd.begin(torch.optim.AdamW(model.parameters()))
    ssd._regroup(0, warm=False)
    set_mode(model, "moe")
    return model.train()


# -- the sparse step -------------------------------------------------------------------------------------------------------------------


def by_hand(layer, x_TD, k):
    """The FFN by one's own loop: output unweighted, gradient to the router through 1 + p - p.detach()."""
    weights = layer.weights()
    logits_TE = x_TD.detach() @ layer.router.out.weight.t()
    chosen_TK = logits_TE.topk(k, dim=1).indices
    probs_TK = logits_TE.gather(1, chosen_TK).softmax(1)
    rows = []
    for t, chosen in enumerate(chosen_TK.tolist()):
        y_D = weights.down_bias_D
        for j, e in enumerate(chosen):
            s = slice(layer.bounds[e], layer.bounds[e + 1])
            h = F.relu(weights.up_FD[s] @ x_TD[t] + weights.up_bias_F[s])
            y_D = y_D + (1 + probs_TK[t, j] - probs_TK[t, j].detach()) * (h @ weights.down_FD[s])
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["auto", "grouped", "masked", "reference"])
def test_a_sparse_step_computes_the_selected_experts_and_teaches_the_router(impl):
    model = in_sparse_phase(*attached())
    (layer, *_) = moe_layers(model).values()
    layer.impl = impl
    mlp = model.get_submodule(layer.site.name)
    x_BSD, upstream = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    wanted = {}
    for name, function in (("hand", lambda x: by_hand(layer, x.flatten(0, 1), 3).view_as(x)), ("model", mlp)):
        x = x_BSD.clone().requires_grad_()
        leaves = [x, *mlp.parameters()]
        out = function(x)
        wanted[name] = (out, *torch.autograd.grad(out, leaves, upstream))
    for got, expected in zip(wanted["model"], wanted["hand"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert wanted["hand"][-1].abs().max() > 1e-4  # the router's


def test_dropout_in_the_ffn_runs_masked_and_teaches_as_well():
    model = in_sparse_phase(*attached())
    (layer, *_) = moe_layers(model).values()
    mlp = model.get_submodule(layer.site.name)
    x = torch.randn(2, 9, 32)
    expected = torch.autograd.grad(mlp(x).square().sum(), layer.router.out.weight)[0]
    layer._leaves[layer._local.down].register_forward_hook(lambda *_: None)  # weights that others look at are not read
    assert layer.masked_reason() is not None
    torch.testing.assert_close(torch.autograd.grad(mlp(x).square().sum(), layer.router.out.weight)[0], expected, rtol=1e-4, atol=1e-6)


def test_experts_that_nobody_selected_get_no_gradient():
    model = in_sparse_phase(*attached())
    with record_active(model) as recorder:
        model(**{key: value[:1, :2] for key, value in PROBE[0].items()}).loss.backward()
    assert recorder.active_fraction() == pytest.approx(3 / 8, abs=0.02)  # of neurons, and experts have 6 or 7
    silent = 0
    for layer in moe_layers(model).values():
        grads = [p.grad for name, p in model.get_submodule(layer.site.name).named_parameters() if name == "c_proj.weight"]
        silent += sum(bool((grads[0][a:b] == 0).all()) for a, b in zip(layer.bounds, layer.bounds[1:], strict=False))
    assert silent >= 2 * (8 - 6)  # two tokens select at most 6 of 8


def test_gradient_checkpointing_and_autocast_run():
    config = TrainConfig(steps=3, batch_sequences=4, lr=1e-3, compute="bfloat16", gradient_checkpointing=True)
    sparse = replace(CONFIG, switches=(0.0,))
    model, _, record = run(sparse, config)
    plain_model, _, plain = run(sparse, replace(config, gradient_checkpointing=False))
    assert record.losses == pytest.approx(plain.losses, rel=1e-3)
    assert plain.losses == pytest.approx(run(sparse, replace(config, compute="float32"))[2].losses, rel=1e-2)
    assert all(torch.isfinite(p).all() for m in (model, plain_model) for p in m.parameters())


# -- runs ------------------------------------------------------------------------------------------------------------------------------


def test_a_run_switches_learns_and_serves_both_modes(uninterrupted):
    model, ssd, record = uninterrupted
    assert isinstance(ssd, KeptPart)
    assert [(d.step, d.after) for d in ssd.decisions if d.before != d.after] == [(3, "sparse"), (6, "dense"), (9, "sparse")]
    assert [s.step for s in ssd.switches] == [3, 9]
    assert [p.signals.step for p in ssd.probes] == list(range(12))
    assert [bool(row["ssd_sparse"]) for row in record.parts] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert record.losses[-1] < record.losses[0] - 0.3
    losses = {}
    for mode in ("dense", "moe"):
        set_mode(model, mode)
        with torch.no_grad():
            losses[mode] = model(**PROBE[0]).loss.item()
    assert max(losses.values()) < record.losses[0] - 0.2
    assert [site.rule.k for site in manifest_of(model).sites] == [3, 3]
    assert not any(layer.is_taught for layer in moe_layers(model).values())


def test_an_adaptive_run_follows_its_rules():
    config = SSDConfig(num_experts=8, selected=3, probe_frac=0.1, min_sparsity=0.3, min_similarity=0.5, sparse_frac=0.2, probe_neurons=50)
    model, ssd, _ = run(config)
    changes = [(d.step, d.after, d.reason) for d in ssd.decisions if d.before != d.after]
    assert changes[0][1:] == ("sparse", "sparse and stable")
    assert changes[1] == (changes[0][0] + 2, "dense", "the phase has had its length")
    assert [layer.mode for layer in moe_layers(model).values()] == ["dense", "dense"]
    assert ssd.switches[-1].step == 12  # grouped once more, so that it serves as a mixture


def test_without_a_switch_training_is_the_dense_models():
    losses = run(replace(CONFIG, switches=(0.99,)))[2].losses
    assert losses == pytest.approx(train(tiny_gpt(), Counting(), STEPS).losses, rel=1e-6)


def test_random_experts_are_an_ablation_with_random_routers():
    (model, ssd, _), other = run(replace(CONFIG, experts="random")), run(replace(CONFIG, experts="random"))[0]
    assert [s.inertia for s in ssd.switches] == [(), ()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("at", "kept", "similarity"),
    [
        pytest.param(9, 4, "coactivation", id="in a sparse phase"),
        pytest.param(12, 4, "coactivation", id="before a switch"),
        pytest.param(14, 6, "coactivation", id="in a dense phase"),
        pytest.param(21, 10, "rand", id="in the second sparse phase"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, uninterrupted, at, kept, similarity):
    config = replace(CONFIG, similarity=similarity)
    wanted, whole, record = uninterrupted if similarity == "coactivation" else run(config)
    with pytest.raises(Dies):
        run(config, data=DyingData(Counting(), at=at), state=tmp_path)
    assert [p.name for p in tmp_path.glob("step-*")] == [f"step-{kept:08d}"]
    torch.manual_seed(99)
    model, ssd, again = run(config, state=tmp_path)
    assert again.losses == record.losses
    assert again.parts == record.parts
    assert (ssd.decisions, ssd.switches, ssd.probes) == (whole.decisions, whole.switches, whole.probes)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))
    assert [layer.mode for layer in moe_layers(model).values()] == [layer.mode for layer in moe_layers(wanted).values()]


def test_a_finished_run_gives_its_result_again(tmp_path, uninterrupted):
    adaptive = SSDConfig(num_experts=8, selected=3, probe_frac=0.2, min_sparsity=0.3, min_similarity=0.2, sparse_frac=0.2)
    first, _, _ = run(adaptive, state=tmp_path)
    model, _, _ = run(adaptive, data=DyingData(Counting(), at=1), state=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first.parameters(), strict=True))


def test_states_without_or_of_other_parts_are_refused(tmp_path):
    model = tiny_gpt()
    _, ssd = attached()
    plain, tensors = ssd.state()
    with pytest.raises(CheckpointError, match="state of SSD is damaged"):
        ssd.load_state({**plain, "switches": [{"stp": 1}]}, tensors)
    with pytest.raises(CheckpointError, match="another model or similarity"):
        ssd.load_state(plain, {})
    run(state=tmp_path / "a")
    kept = tmp_path / "a" / "step-00000012"
    assert {p.name for p in kept.iterdir()} >= {"parts.json", "parts.safetensors"}
    (kept / "parts.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"parts.json' is damaged"):
        run(state=tmp_path / "a")
    (kept / "parts.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no state of 'ssd'"):
        run(state=tmp_path / "a")
    train(model, Counting(), replace(STEPS, steps=2), state=tmp_path / "b")
    assert not list((tmp_path / "b").glob("*/parts*"))  # as it was without parts that keep something


# -- torch.compile ---------------------------------------------------------------------------------------------------------------------


def test_compiled_training_compiles_each_mode_once_and_has_the_eager_losses(monkeypatch, uninterrupted):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    _, eager, expected = uninterrupted
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    _, ssd, record = run(training=replace(STEPS, compile=True))
    assert record.losses == pytest.approx(expected.losses, rel=1e-4)
    assert [d.after for d in ssd.decisions] == [d.after for d in eager.decisions]
    assert len(graphs) == 2, "one of dense steps, one of sparse ones, though there are two phases of each"


def test_compiling_is_refused_with_hooks_that_it_would_not_see():
    class Hooks:
        def set_step(self, step):
            raise AssertionError("nothing has been trained")

    with pytest.raises(ConfigError, match="compile does not go with Hooks"):
        train(tiny_gpt(), Counting(), replace(STEPS, compile=True), parts=[Hooks()])
    with pytest.raises(ConfigError, match="compile and gradient_checkpointing do not go together"):
        train(tiny_gpt(), Counting(), replace(STEPS, compile=True, gradient_checkpointing=True))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    model, ssd = attached()
    monkeypatch.setattr(Ranks, "present", lambda: Ranks(rank=0, size=2))
    with pytest.raises(ConfigError, match="parallel='none' leaves processes alone, and those of SSD need each other"):
        train(model, Counting(), replace(STEPS, parallel="none"), parts=[ssd])


# -- transformers.Trainer --------------------------------------------------------------------------------------------------------------


def with_trainer(folder, *, steps=12, **options):
    model = tiny_llama()
    callback = SSDCallback(sites_of(model), CONFIG, probe=PROBE)
    trainer = trainer_of(model, Counting(), replace(STEPS, steps=steps), folder, callbacks=[callback], **options)
    return trainer, model, callback


def test_trainer_gives_the_losses_and_decisions_of_our_loop(tmp_path):
    wanted = tiny_llama()  # not a GPT-2, of which Trainer counts one label too many a sequence
    with SSD(wanted, sites_of(wanted), CONFIG, total_steps=12, probe=PROBE) as whole:
        record = train(wanted, Counting(), STEPS, parts=[whole])
        whole.set_step(12)
    trainer, model, callback = with_trainer(tmp_path)
    assert trainer_losses(trainer) == pytest.approx(record.losses, rel=1e-5)
    assert [(d.step, d.after) for d in callback.ssd.decisions] == [(d.step, d.after) for d in whole.decisions]
    assert [s.step for s in callback.ssd.switches] == [3, 9]
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [row["ssd_sparse"] for row in trainer.state.log_history if "ssd_sparse" in row][2:5] == [0.0, 1.0, 1.0]


def test_trainer_resumes_within_a_sparse_phase_to_the_same_losses(tmp_path):
    trainer, model, callback = with_trainer(tmp_path, save_strategy="steps", save_steps=5)
    losses = trainer_losses(trainer)
    assert "ssd" in json.loads((tmp_path / "checkpoint-5" / "parts.json").read_text())
    again, resumed, other = with_trainer(tmp_path, save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert other.ssd.decisions == callback.ssd.decisions


def test_trainer_compiles_the_model_and_gives_the_losses_of_our_loop(tmp_path):
    torch.compiler.reset()
    trainer, _, callback = with_trainer(tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager")
    eager, _, _ = with_trainer(tmp_path / "eager")
    assert trainer_losses(trainer) == pytest.approx(trainer_losses(eager), rel=1e-4)
    assert [s.step for s in callback.ssd.switches] == [3, 9]
