"""Distillation by hooks against the same terms added to the loss by autograd alone, in fp64."""

import copy

import pytest
import torch
from families.models import build
from tiny import tiny_inputs, tiny_llama
from torch.nn import functional as F
from training import F32, emotions, text, tiny_classifier, without_dropout

from moeify.errors import ConfigError, UnsupportedModelError
from moeify.sites import find_ffn_sites
from moeify.sparsity import EnforcementConfig, enforce_sparsity
from moeify.train import distill
from moeify.train.distill import Distillation, DistillConfig, token_weights
from moeify.train.loop import TrainConfig, train

CONFIG = DistillConfig(logits_weight=0.7, temperature=2.0, task_weight=0.4, ffn_weight=0.5)


def batch_of(kind):
    if kind == "image":
        random = torch.Generator().manual_seed(0)
        pixels = torch.randn(4, 3, 16, 16, generator=random, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 0])}
    batch = (emotions() if kind == "classes" else text()).batch(range(4), generator=None)
    if kind == "masked":
        batch["labels"][:, ::2] = -100
    return batch


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    return ViTForImageClassification(ViTConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def models_of(kind):
    """A student, a teacher that differs, and their sites."""
    build_one = {"causal": lambda: build("llama")[0], "masked": lambda: build("bert")[0], "classes": tiny_classifier, "image": vit}[kind]
    student = without_dropout(build_one())
    sites = find_ffn_sites(student, {key: value.float() if value.is_floating_point() else value for key, value in batch_of(kind).items()})
    teacher = copy.deepcopy(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return student.double().train(), teacher.double(), sites


def expected_loss(student, teacher, sites, batch, config, *, kind):
    """All terms, by the formula: every row and every token by itself."""
    outputs = {}

    def run(model, key):
        handles = [
            model.get_submodule(s.down).register_forward_hook(lambda _m, _a, y, n=s.name: outputs.update({(key, n): y})) for s in sites
        ]
        result = model(**batch)
        for handle in handles:
            handle.remove()
        return result

    mine = run(student, "student")
    with torch.no_grad():
        its = run(teacher, "teacher")
    t = config.temperature
    kl = F.softmax(its.logits / t, -1) * (F.log_softmax(its.logits / t, -1) - F.log_softmax(mine.logits / t, -1))
    rows = kl.sum(-1)
    if kind == "causal":
        rows = rows[:, :-1][batch["labels"][:, 1:] != -100]
    elif kind == "masked":
        rows = rows[batch["labels"] != -100]
    loss = config.task_weight * mine.loss + config.logits_weight * t**2 * rows.mean()
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    for site in sites:
        y, target = outputs["student", site.name][keep], outputs["teacher", site.name][keep]
        energy, error = target.square().sum(-1), (y - target).square().sum(-1)
        loss = loss + config.ffn_weight / len(sites) * (error / (energy + energy.mean() / 100)).mean()
    return loss


def grads_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found, expected, *, rtol=1e-6):
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def causal():
    """Models, batch, and the gradients of `CONFIG`."""
    student, teacher, sites = models_of("causal")
    batch = batch_of("causal")
    expected_loss(student, teacher, sites, batch, CONFIG, kind="causal").backward()
    return student, teacher, sites, batch, grads_of(student)


@pytest.mark.parametrize("kind", ["causal", "masked", "classes", "image"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="all terms"),
        pytest.param(DistillConfig(), id="logits beside the task"),
        pytest.param(DistillConfig(logits_weight=0.0, ffn_weight=2.0), id="outputs alone"),
    ],
)
def test_distillation_gives_the_gradients_of_the_added_terms(kind, config, monkeypatch):
    monkeypatch.setattr(distill, "_CHUNK_LOGITS", 200)  # a few rows at a time
    student, teacher, sites = models_of(kind)
    batch = batch_of(kind)
    with torch.no_grad():
        plain = student(**batch).loss
    expected_loss(student, teacher, sites, batch, config, kind=kind).backward()
    wanted = grads_of(student)
    with Distillation(student, teacher, config, sites) as part:
        loss = student(**batch).loss
        loss.backward()
        same(grads_of(student), wanted)
        values = {name: value.item() for name, value in part.values().items()}
        assert ("distill_kl" in values, "distill_ffn" in values) == (config.logits_weight > 0, config.ffn_weight > 0)
        in_loss = config.task_weight * values["task_loss"] + config.logits_weight * values.get("distill_kl", 0)
        assert loss.item() == pytest.approx(in_loss, rel=1e-6)
        assert values["task_loss"] == pytest.approx(plain.item(), rel=1e-6)
        with torch.no_grad():
            assert student(**batch).loss == plain, "a forward without gradients is untouched"
    student(**batch).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_distillation_when_layers_are_checkpointed_counts_once(causal, reentrant):
    student, teacher, sites, batch, wanted = copy.deepcopy(causal)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    student.enable_input_require_grads()
    with Distillation(student, teacher, CONFIG, sites):
        student(**batch, use_cache=False).loss.backward()
    same(grads_of(student), wanted)


def test_distillation_when_the_loss_is_scaled_scales_all(causal):
    student, teacher, sites, batch, wanted = causal
    with Distillation(student, teacher, CONFIG, sites):
        (student(**batch).loss * 1024).backward()
    same({name: grad / 1024 for name, grad in grads_of(student).items()}, wanted)


@pytest.mark.parametrize("by", ["shares", "num_items_in_batch"])
def test_distillation_when_accumulated_is_that_of_the_whole_batch(causal, by):
    student, teacher, sites, _, _ = causal
    config = DistillConfig(temperature=2.0, task_weight=0.4)
    data = text(rows=5)
    whole = {**data.tensors}
    expected_loss(student, teacher, sites, whole, config, kind="causal").backward()
    wanted = grads_of(student)
    total = (whole["labels"][:, 1:] != -100).sum()
    with Distillation(student, teacher, config):
        for rows in ([0, 1], [2, 3], [4]):
            part = {key: value[rows] for key, value in whole.items()}
            if by == "shares":
                (student(**part).loss * (part["labels"][:, 1:] != -100).sum() / total).backward()
            else:
                student(**part, num_items_in_batch=total).loss.backward()
    same(grads_of(student), wanted)


def test_distillation_of_outputs_when_trainer_accumulates_weighs_micro_batches_by_their_items(causal):
    student, teacher, sites, batch, _ = causal
    config = DistillConfig(logits_weight=0.0, ffn_weight=1.0)
    total = 2 * (batch["labels"][:, 1:] != -100).sum()
    (expected_loss(student, teacher, sites, batch, config, kind="causal") / 2).backward()
    wanted = grads_of(student)
    with Distillation(student, teacher, config, sites):
        student(**batch, num_items_in_batch=total).loss.backward()
    same(grads_of(student), wanted)


def test_distillation_when_autocast_to_bf16_runs_the_teacher_in_it_and_stays_near(causal):
    student, teacher, sites, batch, wanted = copy.deepcopy(causal)
    student, teacher = student.float(), teacher.float()
    seen = []
    teacher.lm_head.register_forward_hook(lambda _m, _a, y: seen.append(y.dtype))

    def error(found):
        return sum((found[n].double() - wanted[n]).norm() for n in wanted) / sum(grad.norm() for grad in wanted.values())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        explicit = expected_loss(student, teacher, sites, batch, CONFIG, kind="causal")
    explicit.backward()
    allowed = 1.5 * error(grads_of(student))
    seen.clear()
    with Distillation(student, teacher, CONFIG, sites), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(**batch).loss
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert error(grads_of(student)) <= allowed < 0.2
    seen.clear()
    with Distillation(student, teacher, CONFIG, sites, compute=torch.bfloat16):
        student(**batch)
    assert set(seen) == {torch.bfloat16}, "accelerate's autocast begins inside of forward, and cannot be seen"


@pytest.mark.parametrize("first", ["distillation", "enforcement"])
def test_distillation_beside_enforcement_is_the_sum_of_both(causal, first):
    student, teacher, sites, batch, wanted = causal
    plain = EnforcementConfig(weight=0.01, schedule="constant")
    with enforce_sparsity(student, sites, plain):
        student(**batch).loss.backward()
    with_term = grads_of(student)
    student(**batch).loss.backward()
    without = grads_of(student)
    attached = {
        "distillation": lambda: Distillation(student, teacher, CONFIG, sites),
        "enforcement": lambda: enforce_sparsity(student, sites, plain),
    }
    order = sorted(attached, key=lambda name: name != first)
    parts = [attached[name]() for name in order]
    (0.5 * student(**batch).loss).backward()
    for part in parts:
        part.remove()
    same({n: 2 * g for n, g in grads_of(student).items()}, {n: wanted[n] + with_term[n] - without[n] for n in wanted})


def test_distillation_without_labels_learns_from_all_real_tokens(causal):
    student, teacher, _, batch, _ = causal
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mine, its = student(**inputs).logits, teacher(**inputs).logits.detach()
    rows = F.kl_div(F.log_softmax(mine, -1), F.log_softmax(its, -1), log_target=True, reduction="none").sum(-1)
    wanted = rows[inputs["attention_mask"].bool()].mean()
    with Distillation(student, teacher, DistillConfig()):
        assert student(**inputs).loss.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_distillation_when_the_teacher_is_called_by_others_in_between_learns_the_same(causal):
    student, teacher, sites, batch, wanted = causal
    with Distillation(student, teacher, CONFIG, sites):
        teacher(**batch)  # as an evaluation of agreement does
        loss = student(**batch).loss
        teacher(input_ids=batch["input_ids"].flip(1))
        loss.backward()
        same(grads_of(student), wanted)


def test_distillation_when_labels_come_later_shifts_them_as_the_model_does(causal):
    student, teacher, sites, batch, wanted = causal
    with Distillation(student, teacher, CONFIG, sites):
        student(**{key: value for key, value in batch.items() if key != "labels"})
        student(**batch).loss.backward()
        same(grads_of(student), wanted)


def test_train_with_a_teacher_comes_nearer_to_it():
    teacher, student = tiny_llama(), tiny_llama(seed=1)
    data = text(vocab=200)
    with Distillation(student, teacher, DistillConfig(task_weight=0.0)) as part:
        record = train(student, data, TrainConfig(steps=15, lr=1e-2, log_every=1, **F32), parts=[part])
    kls = [entry["distill_kl"] for entry in record.parts]
    assert kls[-1] < 0.5 * kls[0]
    assert record.losses == pytest.approx(kls, rel=1e-5)


def test_token_weights_are_relative_to_each_token_and_a_hundredth_of_the_mean():
    y_TD = torch.tensor([[3.0, 4.0], [0.0, 0.0], [300.0, 400.0]], dtype=torch.float64)  # energies 25, 0 and 250,000
    expected = torch.tensor([1 / (25 + 833.416666666), 1 / 833.416666666, 1 / (250_000 + 833.416666666)], dtype=torch.float64)
    torch.testing.assert_close(token_weights(y_TD), expected)
    assert token_weights(y_TD.bfloat16()).dtype is torch.float32
    padded = torch.cat([y_TD, torch.tensor([[float("nan"), 1.0]])])[None]
    found = token_weights(padded, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(found[0, :3], expected)
    assert found.isfinite().all()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_weight": -1.0}, "logits_weight must be finite"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"logits_weight": 0.0}, "are both 0: nothing is learnt"),
    ],
)
def test_distill_config_when_it_makes_no_sense_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**options)


def test_distillation_when_the_teacher_does_not_fit_says_so():
    student, inputs = tiny_llama(), tiny_inputs() | {"labels": tiny_inputs()["input_ids"]}
    sites = find_ffn_sites(student, tiny_inputs())
    outputs = DistillConfig(ffn_weight=1.0)
    with pytest.raises(ConfigError, match="the teacher is the model itself"):
        Distillation(student, student)
    with pytest.raises(ConfigError, match="there are no sites"):
        Distillation(student, tiny_llama(), outputs)
    with pytest.raises(UnsupportedModelError, match=r"\(BertForSequenceClassification\) has no 'model.layers.0.mlp.down_proj'"):
        Distillation(student, tiny_classifier(), outputs, sites)
    with (
        Distillation(student, build("llama")[0]),
        pytest.raises(UnsupportedModelError, match=r"logits are \(2, 9, 64\), the model's \(2, 9, 257\)"),
    ):
        student(**{key: value % 64 for key, value in inputs.items()})
    with Distillation(student, tiny_llama().model), pytest.raises(UnsupportedModelError, match="gives no logits; load it with its head"):
        student(**inputs)
    student.config.problem_type = "regression"
    with pytest.raises(ConfigError, match="a head for regression has no distribution"):
        Distillation(student, tiny_llama())


def test_distillation_of_outputs_when_layers_share_an_ffn_refuses():
    student, inputs = build("albert")
    sites = find_ffn_sites(student, inputs)
    part = Distillation(student, copy.deepcopy(student), DistillConfig(ffn_weight=1.0), sites)
    with part, pytest.raises(UnsupportedModelError, match="runs several times in a forward; leave it out of sites"):
        student(**inputs)
