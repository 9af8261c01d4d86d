"""Hard selection in training: budgets counted, and every gradient against plain autograd and the experts' outputs, in fp64."""

import copy
import math

import pytest
import tiny
import torch

from moeify.controls import record_active, set_impl
from moeify.convert import ConvertConfig, convert
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.layers import moe_layers
from moeify.routers import CentreRouterConfig, MLPRouterConfig, NormRouter, NormRouterConfig, OracleRouterConfig
from moeify.select import RULES, DynKMass, DynKMax, NormBudget, Threshold, TopK
from moeify.sites import find_ffn_sites
from moeify.train.selection import SelectionConfig, SelectionTraining, _spread, select_share, straight_through


def converted(*, router=None, rule=None, width=48, seed=0):
    model = tiny.tiny_llama(intermediate_size=width, seed=seed)
    config = ConvertConfig(expert_size=8, router=router or NormRouterConfig(width=4), rule=rule or Threshold(theta=0.0))
    convert(model, config, sites=find_ffn_sites(model, tiny.tiny_inputs()))
    for layer in moe_layers(model).values():
        if isinstance(layer.router, NormRouter):  # near the norms that there are: above a hundredfold the pull is limited
            layer.router.out.bias.data.add_(5.0)
    return model.double().train()


def batch(*, seed=0, rows=3, length=7, pad=True):
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if pad:
        mask[0, 4:] = 0
        mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def grads_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found, expected, *, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol * grad.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


def routers_of(grads):
    return {name: grad for name, grad in grads.items() if "router" in name}


def watch(model, inputs):
    """Loss of a forward in training, and of every layer x, h before the mask, y and mask, as the part's own hooks never see them."""
    seen, handles = {layer.site.name: {} for layer in moe_layers(model).values()}, []
    for layer in moe_layers(model).values():
        of, select = seen[layer.site.name], layer.selector

        def watched(moe, x, h, *, of=of, select=select):
            masked, mask_TE = select(moe, x, h)
            of.update(x=x.detach().flatten(0, 1), h=h.detach().flatten(0, 1), mask=mask_TE)
            return masked, mask_TE

        def keep(_module, _args, y, *, of=of):
            y.retain_grad()
            of["y"] = y

        layer.selector = watched
        handles.append(model.get_submodule(layer.site.name).register_forward_hook(keep))
    loss = model(**inputs).loss
    for handle, layer in zip(handles, moe_layers(model).values(), strict=True):
        handle.remove()
        layer.selector = layer.selector.__kwdefaults__["select"]
    return loss, seen


def expert_outputs(layer, h_TF):
    """y_e of every expert, one at a time: (T, E, D)."""
    down_FD, bounds = layer.weights().down_FD.detach(), layer.bounds
    return torch.stack([h_TF[:, a:b] @ down_FD[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], dim=1)


def regression(layer, seen, keep_T):
    """The routers' regression of one layer, written out: Gamma deviance of squared norms over their mean square, floored."""
    norms_TE = expert_outputs(layer, seen["h"]).norm(dim=2)[keep_T]
    scale = norms_TE.square().mean().sqrt()
    t_TE = (norms_TE / scale).square().clamp_min(1e-4)
    z_TE = layer.router.raw_scores(seen["x"][keep_T]) - 2 * scale.log()
    return (t_TE * (-z_TE).exp() + z_TE).mean(), (t_TE * (-z_TE).exp() + z_TE - t_TE.log() - 1).mean()


# ---- the budget


@pytest.mark.parametrize("always_on", [(), (1, 4)])
@pytest.mark.parametrize("name", RULES)
def test_select_share_when_asked_for_a_budget_selects_exactly_so_many_real_pairs_as_the_rule_would(name, always_on):
    rule_type = RULES[name]
    scores_TE, keep_T = torch.rand(50, 8).exp(), torch.arange(50) % 5 != 0
    scores_TE[~keep_T] *= 100
    for share in (0.45, 0.7, 1.0):
        mask_TE = select_share(rule_type.at(1), scores_TE, share, keep_T=keep_T, always_on=always_on)
        pairs = 40 * 8
        wanted = 40 * max(len(always_on), round(share * 8)) if name == "topk" and not always_on else round(share * pairs)
        if name == "topk":  # ranks tie over tokens: whole k, and always-on experts come on top or not at all
            assert abs(int(mask_TE[keep_T].sum()) - wanted) <= 40
        else:
            assert int(mask_TE[keep_T].sum()) == wanted
        assert mask_TE.any(1).all()
        assert mask_TE[:, list(always_on)].all()
    if not always_on:
        some = {
            "topk": TopK(k=4),
            "dynk_max": DynKMax(tau=0.6),
            "dynk_mass": DynKMass(mass=0.5),
            "norm_budget": NormBudget(beta=0.8),
            "threshold": Threshold(theta=1.7),
        }[name]
        theirs = some(scores_TE)
        assert torch.equal(select_share(some, scores_TE, theirs.double().mean().item()), theirs)


def test_select_share_of_many_tokens_samples_them(monkeypatch):
    monkeypatch.setattr("moeify.train.selection._MOST_PAIRS", 4000)
    scores_TE = torch.rand(5000, 8)
    assert abs(select_share(Threshold(theta=0), scores_TE, 0.5).double().mean().item() - 0.5) < 0.03


def test_select_share_when_every_token_is_padding_runs_all():
    assert select_share(Threshold(theta=0), torch.rand(3, 4), 0.5, keep_T=torch.zeros(3, dtype=torch.bool)).all()


@pytest.mark.parametrize("width", [48, 50], ids=["equal experts", "experts of two sizes"])
@pytest.mark.parametrize("routers", ["frozen", "norms", "straight_through", "both"])
def test_selection_training_runs_the_budget_of_the_step_in_every_layer_with_padding_left_out(routers, width):
    model, inputs = converted(width=width), batch()
    with SelectionTraining(model, SelectionConfig(target_active=(0.2, 0.9), routers=routers), seed=3) as training:
        shares = set()
        for step in range(3):
            training.set_step(step)
            _, seen = watch(model, inputs)
            shares.add(training.active)
            keep_T = inputs["attention_mask"].flatten().bool()
            for of in seen.values():
                real = of["mask"][keep_T]
                assert int(real.sum()) == max(round(training.active * real.numel()), len(real))
            assert training.values()["active_fraction"].item() == pytest.approx(real.double().mean().item())
        assert len(shares) == 3
        assert all(0.2 <= share <= 0.9 for share in shares)
        training.set_step(1)
        again = SelectionTraining.set_step
        first = training.active
        again(training, 0)
        again(training, 1)
        assert training.active == first
        model.eval()
        with record_active(model) as recorder, torch.no_grad():
            model(**inputs | {"attention_mask": None})
        assert recorder.active_fraction() == pytest.approx(0.55, abs=0.02)


def test_selection_training_gives_the_output_of_the_model_with_that_mask():
    model, inputs = converted().eval(), batch()
    plain = copy.deepcopy(model)
    for routers in ("norms", "straight_through"):
        with SelectionTraining(model.train(), SelectionConfig(routers=routers)):
            loss, seen = watch(model, inputs)
        set_impl(plain, "reference")
        for layer in moe_layers(plain).values():
            layer.rule = Fixed(seen[layer.site.name]["mask"])
        torch.testing.assert_close(loss, plain(**inputs).loss)
    before = model.eval()(**inputs).logits
    assert not any(layer.selector for layer in moe_layers(model).values())
    assert not model._forward_hooks
    torch.testing.assert_close(before, converted().eval()(**inputs).logits)


class Fixed:
    name = "fixed"

    def __init__(self, mask_TE):
        self.mask_TE = mask_TE

    def __call__(self, _scores_TE):
        return self.mask_TE


# ---- straight through


def test_straight_through_is_exactly_the_mask_with_the_gradient_of_a_sigmoid_at_the_tokens_boundary():
    scores = torch.tensor([[8.0, 2.0, 0.5, 100.0], [4.0, 4.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, False, False, True], [True, True, True, True], [False, False, False, True]])
    factors = straight_through(scores, mask, temperature=0.5, always_on=(3,))
    assert torch.equal(factors, mask.double())
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0]], dtype=torch.float64)
    (factors * weights).sum().backward()
    expected = torch.zeros_like(weights)
    for t, boundary in ((0, math.sqrt(8.0 * 2.0)), (1, 1.0), (2, 3.0)):  # both sides; nothing unselected; nothing selected but always-on
        for e in range(3):
            s = scores[t, e].item()
            soft = 1 / (1 + (s / boundary) ** (-1 / 0.5))
            expected[t, e] = weights[t, e] * soft * (1 - soft) / 0.5 / s
    torch.testing.assert_close(scores.grad, expected)


def test_straight_through_values_are_exactly_zero_and_one():
    scores = (3 * torch.randn(500, 20)).exp().requires_grad_()
    mask = torch.rand(500, 20) < 0.4
    assert torch.equal(straight_through(scores, mask, temperature=0.3), mask.float())


@pytest.mark.parametrize("width", [48, 50], ids=["equal experts", "experts of two sizes"])
@pytest.mark.parametrize("router", [NormRouterConfig(width=4), MLPRouterConfig(), CentreRouterConfig()], ids=lambda c: c.name)
def test_straight_through_gives_routers_the_inner_products_of_the_outputs_gradient_with_every_experts_output(router, width):
    model, inputs = converted(router=router, width=width), batch()
    with SelectionTraining(model, SelectionConfig(routers="straight_through", temperature=0.7)):
        loss, seen = watch(model, inputs)
        loss.backward()
    found = grads_of(model)
    expected = {}
    for name, layer in moe_layers(model).items():
        of = seen[name]
        inner_TE = (expert_outputs(layer, of["h"]) * of["y"].grad.flatten(0, 1).unsqueeze(1)).sum(2)
        (straight_through(layer.router(of["x"]), of["mask"], temperature=0.7).double() * inner_TE).sum().backward()
    expected = grads_of(model)
    assert min(grad.abs().max() for grad in expected.values()) > 0
    same(routers_of(found), expected)
    with SelectionTraining(model, SelectionConfig(routers="frozen")):
        model(**inputs).loss.backward()
    without = grads_of(model)
    assert not routers_of(without)
    same({n: g for n, g in found.items() if "router" not in n}, without, rtol=1e-9)  # nothing goes into x through the router


# ---- norms


@pytest.mark.parametrize("routers", ["norms", "both"])
def test_norms_add_the_gradient_of_the_regression_that_fits_routers_and_nothing_elsewhere(routers):
    model, inputs = converted(), batch()
    keep_T = inputs["attention_mask"].flatten().bool()
    with SelectionTraining(model, SelectionConfig(routers=routers, router_weight=0.3)) as training:
        loss, seen = watch(model, inputs)
        (3 * loss).backward()
        deviance = training.values()["router_deviance"]
    found = grads_of(model)
    losses, deviances = zip(*(regression(layer, seen[name], keep_T) for name, layer in moe_layers(model).items()), strict=True)
    assert deviance.item() == pytest.approx(sum(deviances).item() / 2, rel=1e-5)
    with SelectionTraining(model, SelectionConfig(routers="straight_through" if routers == "both" else "frozen")):
        (3 * (model(**inputs).loss + 0.3 * sum(losses) / 2)).backward()
    same(found, grads_of(model))


def test_norms_of_an_abs_router_are_the_squared_error():
    model, inputs = converted(router=NormRouterConfig(width=4, output="abs")), batch(pad=False)
    with SelectionTraining(model) as training:
        loss, seen = watch(model, inputs)
        loss.backward()
    found, losses = grads_of(model), []
    for name, layer in moe_layers(model).items():
        norms_TE = expert_outputs(layer, seen[name]["h"]).norm(dim=2)
        losses.append((layer.router.raw_scores(seen[name]["x"]).abs() - norms_TE).square().mean() / norms_TE.square().mean())
    assert training.values()["router_deviance"].item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    (sum(losses) / 2).backward()
    same(routers_of(found), grads_of(model))


def test_norms_of_a_pair_that_fires_against_all_prediction_pull_no_harder_than_a_hundredfold():
    model, inputs = converted(), batch(pad=False)
    for layer in moe_layers(model).values():
        with torch.no_grad():
            layer.router.out.bias.fill_(-25.0)
    biases = []
    for _ in range(2):
        with SelectionTraining(model):
            model(**inputs).loss.backward()
        biases.append(torch.stack([layer.router.out.bias.grad for layer in moe_layers(model).values()]))
        model.zero_grad()
        for layer in moe_layers(model).values():
            with torch.no_grad():
                layer.router.out.bias.fill_(-20.0)
    torch.testing.assert_close(biases[0], biases[1])
    assert biases[0].sum().item() == pytest.approx(-100, rel=0.05)  # mean over layers of the sum over pairs of 100 / pairs


@pytest.mark.parametrize("reentrant", [False, True])
def test_selection_training_when_layers_are_checkpointed_gives_the_same_gradients(reentrant):
    model, inputs = converted(), batch()
    config = SelectionConfig(routers="both")
    with SelectionTraining(model, config):
        model(**inputs).loss.backward()
        expected = grads_of(model)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**inputs, use_cache=False).loss.backward()
    same(grads_of(model), expected, rtol=1e-9)


def test_selection_training_when_accumulating_and_scaling_multiplies_the_regression_by_what_multiplies_the_loss():
    model = converted()
    parts = [batch(seed=1, rows=2, pad=False), batch(seed=2, rows=3)]
    items = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    explicit = 0
    with SelectionTraining(model):
        for part, count in zip(parts, items, strict=True):
            _, seen = watch(model, part | {"num_items_in_batch": torch.tensor(sum(items))})
            keep_T = part["attention_mask"].flatten().bool()
            losses = [regression(layer, seen[name], keep_T)[0] for name, layer in moe_layers(model).items()]
            explicit = explicit + sum(losses) / 2 * count / sum(items)
        model.zero_grad()
        explicit.backward()
        expected = grads_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for part in parts:
            scaler.scale(model(**part, num_items_in_batch=torch.tensor(sum(items))).loss).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.0))
        same(routers_of(grads_of(model)), expected)


def test_selection_training_under_autocast_trains_routers_in_fp32_and_is_near_fp64():
    model, inputs = converted(), batch()
    with SelectionTraining(model, SelectionConfig(routers="both")):
        model(**inputs).loss.backward()
    expected = grads_of(model)
    model.float()
    with SelectionTraining(model, SelectionConfig(routers="both")) as training:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        assert training.values()["active_fraction"].item() == pytest.approx(0.5, abs=0.01)
    found = routers_of(grads_of(model))
    assert sum((found[n] - expected[n]).norm() for n in found) < 0.1 * sum(expected[n].norm() for n in found)


def test_norms_on_a_sample_take_evenly_spaced_real_tokens():
    keep_T = torch.arange(20) % 2 == 0
    assert _spread(keep_T, 20, 5, device=keep_T.device).tolist() == [0, 4, 8, 12, 16]
    assert _spread(None, 7, 3, device=keep_T.device).tolist() == [0, 2, 4]
    model, inputs = converted(), batch(pad=False)
    with SelectionTraining(model, SelectionConfig(router_tokens=5)):
        loss, seen = watch(model, inputs)
        loss.backward()
    found, rows = grads_of(model), torch.arange(5) * 21 // 5
    (sum(regression(layer, seen[n], rows)[0] for n, layer in moe_layers(model).items()) / 2).backward()
    same(routers_of(found), grads_of(model))


def test_selection_training_leaves_dense_mode_and_frozen_routers_alone():
    model, inputs = converted(), batch()
    for layer in moe_layers(model).values():
        layer.router.requires_grad_(False)
    with SelectionTraining(model, SelectionConfig(routers="both")) as training:
        model(**inputs).loss.backward()
        assert not routers_of(grads_of(model))
        assert "router_deviance" not in training.values()


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"target_active": (0.6, 0.5)}, "target_active", id="low above high"),
        pytest.param({"target_active": (0.0, 0.5)}, "target_active", id="none"),
        pytest.param({"temperature": 0.0}, "temperature", id="no width"),
        pytest.param({"router_weight": math.nan}, "router_weight", id="nan"),
        pytest.param({"router_tokens": 0}, "router_tokens", id="no tokens"),
    ],
)
def test_selection_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**options)


def test_selection_training_when_it_cannot_be_says_so():
    with pytest.raises(ConfigError, match="no experts"):
        SelectionTraining(tiny.tiny_llama())
    with pytest.raises(ConfigError, match=r"centre router.*straight_through"):
        SelectionTraining(converted(router=CentreRouterConfig()))
    with pytest.raises(ConfigError, match="nothing to learn"):
        SelectionTraining(converted(router=OracleRouterConfig()), SelectionConfig(routers="straight_through"))
    model = converted()
    with SelectionTraining(model), pytest.raises(UnsupportedModelError, match="another selection"):
        SelectionTraining(model)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Adapted(48, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.down_proj.*Adapted.*cannot be read|'down_proj' is a Adapted"):
        SelectionTraining(model)
    assert not any(layer.selector for layer in moe_layers(model).values())
    assert not model._forward_hooks


class Adapted(torch.nn.Linear):
    """Computes more than its weight says."""
