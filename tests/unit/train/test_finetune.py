"""Training of converted models: it pays, resumes, trains only what it should, and leaves rules that hold their budget."""

import copy
import json
from dataclasses import replace

import pytest
import tiny
import torch

from moeify import _config
from moeify.controls import record_active
from moeify.convert import ConvertConfig, convert
from moeify.errors import ConfigError, DataError, UnsupportedModelError
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import MLPRouterConfig, NormRouterConfig
from moeify.select import DynKMass, Threshold, TopK
from moeify.sites import find_ffn_sites
from moeify.train.calibration import TARGETS, recalibrate
from moeify.train.distill import DistillConfig
from moeify.train.finetune import FinetuneConfig, RouterTraining, finetune_converted, train_routers
from moeify.train.fit import RouterTrainConfig, fit_new_router, split_tokens
from moeify.train.loop import TrainConfig, train

TRAIN = TrainConfig(steps=12, batch_sequences=4, lr=3e-3, compute="float32", weight_decay=0.0)
ROUTERS = RouterTrainConfig(epochs=3, batch_tokens=32)


class Pattern:
    """Counting modulo a prime from random starts: quickly learned."""

    def __len__(self):
        return 40

    def batch(self, rows, *, generator):
        ids = (torch.tensor(rows)[:, None] * 5 + torch.arange(16) * 7) % 61
        return {"input_ids": ids, "labels": ids}


def batches(count=6):
    return [{"input_ids": Pattern().batch(range(i, i + 4), generator=None)["input_ids"]} for i in range(0, 4 * count, 4)]


def converted(*, router=None, rule=None):
    model = tiny.tiny_llama()
    config = ConvertConfig(expert_size=8, router=router or NormRouterConfig(width=8), rule=rule or Threshold(theta=0.0))
    convert(model, config, sites=find_ffn_sites(model, tiny.tiny_inputs()))
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model):
    with torch.no_grad(), record_active(model) as recorder:
        return sum(
            model(**Pattern().batch(range(i, i + 8), generator=None)).loss.item() for i in (0, 16, 32)
        ) / 3, recorder.active_fraction()


def config_of(**options):
    return FinetuneConfig(**({"router_tokens": 64} | options))


@pytest.mark.parametrize("routers", ["frozen", "norms", "straight_through", "both"])
def test_finetune_converted_lowers_the_loss_at_half_of_the_experts_and_leaves_rules_of_that_budget(routers):
    model = converted()
    recalibrate(model, batches(), target_active=0.5)
    before, active = loss_of(model)
    assert active == pytest.approx(0.5, abs=0.02)
    start = weights(model)
    record = finetune_converted(model, Pattern(), config_of(routers=routers), TRAIN)
    after, active = loss_of(model)
    assert after < before - 1
    assert active == pytest.approx(0.5, abs=0.03)
    assert record.losses[-1] < record.losses[0]
    assert record.parts[-1]["active_fraction"] == pytest.approx(0.5, abs=0.01)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert any("router" in name for name in moved) == (routers != "frozen")
    assert {name for name in start if "router" not in name and "norm" not in name} == {name for name in moved if "router" not in name}
    assert not any(layer.selector for layer in moe_layers(model).values())


@pytest.mark.parametrize("parameters", ["ffn", "routers"])
def test_finetune_converted_trains_what_it_is_told_to(parameters):
    model = converted()
    model.lm_head.weight.requires_grad_(False)
    start = weights(model)
    finetune_converted(model, Pattern(), config_of(parameters=parameters), replace(TRAIN, steps=2))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    expected = {name for name in start if "router" in name or (parameters == "ffn" and "mlp" in name)}
    assert moved == expected
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_finetune_converted_gives_routers_their_own_learning_rate():
    moved = []
    for factor in (1.0, 4.0):
        model = converted()
        start = weights(model)
        finetune_converted(model, Pattern(), config_of(router_lr_factor=factor), replace(TRAIN, steps=1))
        now = weights(model)
        moved.append({kind: max((now[n] - start[n]).abs().max().item() for n in now if kind in n) for kind in ("router", "proj")})
    assert moved[1]["router"] == pytest.approx(4 * moved[0]["router"], rel=1e-3)  # AdamW's first step
    assert moved[1]["proj"] == pytest.approx(moved[0]["proj"], rel=1e-3)


def test_finetune_converted_when_killed_resumes_to_equal_weights_and_losses(tmp_path):
    config = config_of(target_active=(0.3, 0.8), routers="both")
    train_config = replace(TRAIN, steps=6, save_every=2)
    whole = converted()
    expected = finetune_converted(whole, Pattern(), config, train_config)

    class Killed(Pattern):
        calls = 0

        def batch(self, rows, *, generator):
            Killed.calls += 1
            if Killed.calls == 5:
                raise KeyboardInterrupt
            return super().batch(rows, generator=generator)

    with pytest.raises(KeyboardInterrupt):
        finetune_converted(model := converted(), Killed(), config, train_config, state=tmp_path / "state")
    assert all(p.requires_grad for p in model.parameters())
    record = finetune_converted(model := converted(), Pattern(), config, train_config, state=tmp_path / "state")
    assert record.losses == expected.losses
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(model).items())
    assert [layer.rule for layer in moe_layers(model).values()] == [layer.rule for layer in moe_layers(whole).values()]


def test_finetune_converted_evaluates_at_the_middle_budget():
    seen = []

    def evaluate(model):
        with record_active(model) as recorder:
            model(**batches(1)[0])
        seen.append(recorder.active_fraction())
        return 0.0

    finetune_converted(converted(), Pattern(), config_of(target_active=(0.2, 0.6)), replace(TRAIN, steps=2), evaluate=evaluate)
    assert seen == [pytest.approx(0.4, abs=0.01)]


def test_finetune_converted_with_a_teacher_adds_its_loss():
    teacher = tiny.tiny_llama(seed=1)
    records = [
        finetune_converted(converted(), Pattern(), config_of(routers="both", distill=distill), replace(TRAIN, steps=3), teacher=given)
        for distill, given in ((None, None), (DistillConfig(logits_weight=0.5, ffn_weight=0.1), teacher))
    ]
    found = records[1].parts[-1]
    assert {"active_fraction", "router_deviance", "task_loss", "distill_kl", "distill_ffn"} <= found.keys()
    assert records[1].losses[0] > records[0].losses[0] + 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"parameters": "routers", "routers": "frozen"}, "nothing to train", id="all frozen"),
        pytest.param({"router_lr_factor": 0.0}, "router_lr_factor", id="no learning rate"),
        pytest.param({"target_active": (0.0, 1.0)}, "target_active", id="inherited checks"),
    ],
)
def test_finetune_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**options)


def test_finetune_config_when_written_as_json_reads_back_and_each_field_is_documented():
    config = FinetuneConfig(target_active=(0.25, 0.75), routers="both")
    assert _config.from_dict(FinetuneConfig, json.loads(json.dumps(_config.to_dict(config)))) == config
    assert set(_config.field_docs(FinetuneConfig)) == set(_config.to_dict(config))


def test_finetune_converted_of_int8_experts_or_with_half_a_distillation_is_refused():
    model = converted()
    with pytest.raises(ConfigError, match="a teacher is given without distill"):
        finetune_converted(model, Pattern(), config_of(), TRAIN, teacher=tiny.tiny_llama())
    quantize(model)
    with pytest.raises(ConfigError, match="int8 experts"):
        finetune_converted(model, Pattern(), config_of(), TRAIN)
    finetune_converted(model, Pattern(), config_of(parameters="routers"), replace(TRAIN, steps=1))


# ---- rules and routers alone


@pytest.mark.parametrize("kind", [None, DynKMass])
def test_recalibrate_sets_every_layer_to_the_budget_as_the_model_runs(kind):
    model = converted()
    record = recalibrate(model, batches(), target_active=0.4, rule=kind)
    assert record["rule"] == ("threshold" if kind is None else "dynk_mass")
    with record_active(model) as recorder, torch.no_grad():
        for batch in batches():
            model(**batch)
    assert all(share == pytest.approx(0.4, abs=0.02) for share in recorder.per_layer().values())
    assert record["targets"] == list(TARGETS)
    assert all(len(knobs) == len(TARGETS) for table in record["knobs"].values() for knobs in table.values())
    assert record["knobs"][record["rule"]].keys() == moe_layers(model).keys() == record["router_scores"].keys()
    stored = model.config.quantization_config["sites"][0]["rule"]
    assert stored == _config.to_dict(next(iter(moe_layers(model).values())).rule)
    json.dumps(record)


def test_recalibrate_and_train_routers_of_a_dense_model_say_so(tmp_path):
    with pytest.raises(UnsupportedModelError, match="is dense"):
        recalibrate(tiny.tiny_llama(), batches(), target_active=0.5)
    with pytest.raises(UnsupportedModelError, match="is dense"):
        train_routers(tiny.tiny_llama(), batches(), ROUTERS, work=tmp_path / "work")


def test_train_routers_fits_each_router_to_the_present_experts_from_dense_inputs(tmp_path):
    model = converted(rule=TopK(k=1))
    moe_layers(model)["model.layers.1.mlp"].mode = "dense"
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.weights().down_FD.mul_(torch.rand(48)[:, None] * 3)  # experts that have changed
    caught, dense = {}, copy.deepcopy(model)
    for name, layer in moe_layers(dense).items():
        layer.mode = "dense"
        dense.get_submodule(name).register_forward_pre_hook(lambda _m, args, n=name: caught.setdefault(n, []).append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            dense(**batch)
    record = train_routers(model, batches(), ROUTERS, work=tmp_path / "work", target_active=0.5)
    for name, layer in moe_layers(model).items():
        train_TD, held_out_TD = split_tokens(torch.cat(caught[name]).bfloat16(), ROUTERS.holdout_frac, name=name)
        state, _, captured = fit_new_router(layer.router.config, train_TD, held_out_TD, layer.weights(), layer.site, 6, ROUTERS)
        for key, tensor in state.items():
            torch.testing.assert_close(layer.router.state_dict()[key], tensor, rtol=0.05, atol=0.05)  # inputs under autocast
        assert record["router_scores"][name]["captured@0.5"] == pytest.approx(captured["captured@0.5"], abs=0.05)
    assert [layer.mode for layer in moe_layers(model).values()] == ["moe", "dense"]
    assert record["active_fraction"] == pytest.approx(0.5, abs=0.02)
    assert [layer.rule for layer in moe_layers(model).values()] == [TopK(k=3), TopK(k=3)]


def test_train_routers_when_killed_goes_on_and_gives_equal_routers(tmp_path, monkeypatch):
    expected = converted()
    train_routers(expected, batches(), ROUTERS, work=tmp_path / "a")
    from moeify.train import finetune

    real, calls = finetune.write_tensors, []

    def dies(path, *args):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, *args)

    monkeypatch.setattr(finetune, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        train_routers(converted(), batches(), ROUTERS, work=tmp_path / "b")
    train_routers(model := converted(), batches(), ROUTERS, work=tmp_path / "b")
    assert calls == ["router0000.safetensors", "router0001.safetensors", "router0001.safetensors"]
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())
    assert [layer.rule for layer in moe_layers(model).values()] == [layer.rule for layer in moe_layers(expected).values()]


def test_train_routers_when_there_are_too_few_tokens_says_so(tmp_path):
    with pytest.raises(DataError, match=r"'model\.layers\.0\.mlp' saw 2 calibration tokens"):
        train_routers(converted(), [{"input_ids": torch.tensor([[1, 2]])}], ROUTERS, work=tmp_path / "work")


def test_router_training_makes_the_routers_regression_the_models_loss_and_trains_nothing_else():
    model = converted()
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, 9:] = 0
    inputs = batches(1)[0] | {"attention_mask": mask, "labels": batches(1)[0]["input_ids"]}
    start, before = weights(model), [layer.mode for layer in moe_layers(model).values()]
    with RouterTraining(model) as training:
        loss = model(**inputs).loss
        assert loss.item() == pytest.approx(regression(model, inputs), rel=1e-5)
        items = torch.tensor(2 * int((inputs["labels"][:, 1:] != -100).sum()))  # Trainer's, of two micro-batches
        assert model(**inputs, num_items_in_batch=items).loss.item() == pytest.approx(loss.item() / 2, rel=1e-5)
        record = train(model, Pattern(), replace(TRAIN, steps=30, lr=1e-2), parts=[training])
        with torch.no_grad():
            plain = model(**inputs).loss
    assert record.losses[-1] < record.losses[0] - 0.1
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "router" in name}
    assert [layer.mode for layer in moe_layers(model).values()] == before
    assert all(p.requires_grad for p in model.parameters())
    for layer in moe_layers(model).values():
        layer.mode = "dense"
    torch.testing.assert_close(plain, model(**inputs).loss)


def test_router_training_when_a_forward_failed_forgets_what_it_left():
    model = converted()
    inputs = batches(1)[0]
    with RouterTraining(model):
        wanted = model(**inputs).loss.item()
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        assert model(**inputs).loss.item() == pytest.approx(wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_router_training_when_layers_are_checkpointed_trains_the_same_or_refuses(reentrant):
    model, inputs = converted().train(), batches(1)[0]
    grads = []
    with RouterTraining(model):
        for checkpointed in (False, True, True):
            if checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": reentrant})
            if checkpointed and reentrant:
                model.enable_input_require_grads()
                with pytest.raises(UnsupportedModelError, match="reentrant gradient checkpointing hides the routers' inputs"):
                    model(**inputs, use_cache=False)
                continue
            model(**inputs, use_cache=False).loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
    for other in grads[1:]:
        assert other.keys() == grads[0].keys() > set()
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[0][name])


def regression(model, inputs):
    """Sum over layers of the Gamma deviance of every real token's squared output norms over their mean square, floored."""
    caught, handles, total = {}, [], 0.0
    for name, layer in moe_layers(model).items():
        for path, key in ((layer.site.gate, "x"), (layer.site.down, "h")):
            hook = lambda _m, args, name=name, key=key: caught.update({(name, key): args[0].flatten(0, 1)})  # noqa: E731
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    keep_T = inputs["attention_mask"].flatten().bool()
    for name, layer in moe_layers(model).items():
        h_TEG, down_EGD = caught[name, "h"][keep_T].view(-1, 6, 8), layer.weights().down_FD.detach().reshape(6, 8, -1)
        energy_TE = torch.einsum("teg,egd->ted", h_TEG, down_EGD).square().sum(2)
        t_TE = (energy_TE / energy_TE.mean()).clamp_min(1e-4)
        z_TE = layer.router.raw_scores(caught[name, "x"][keep_T]) - energy_TE.mean().log()
        total += (t_TE * (-z_TE).exp() + z_TE).mean().item()
    return total


def test_router_training_without_norm_routers_says_so():
    with pytest.raises(ConfigError, match="has no routers"):
        RouterTraining(tiny.tiny_llama())
    with pytest.raises(ConfigError, match="mlp router, which predicts no norms"):
        RouterTraining(converted(router=MLPRouterConfig()))
