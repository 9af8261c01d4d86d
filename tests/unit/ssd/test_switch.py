"""A switch renumbers neurons: the dense function and the optimizer's next steps stay what they were."""

import copy

import pytest
import torch
from pretraining import PROBE, Counting, sites_of, tiny_gpt
from tiny import tiny_llama
from torch import nn

from moeify.controls import set_mode, set_rule
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.layers import moe_layers
from moeify.select import TopK
from moeify.ssd import SSD, SSDConfig, check_optimizer, permute_trained
from moeify.ssd.switch import group_neurons

CONFIG = SSDConfig(num_experts=8, selected=3)


def fused(model):
    """One up projection for gate and up of a layer, as Phi-3 has it."""
    from transformers import Phi3Config, Phi3ForCausalLM

    del model
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, hidden_act="relu", pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Phi3ForCausalLM(config)


MODELS = {"gpt2": tiny_gpt, "llama": lambda: tiny_llama(intermediate_size=50), "phi3": lambda: fused(None)}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def attached(model, config=CONFIG):
    return SSD(model, sites_of(model), config, total_steps=100, probe=PROBE)


def step(model, optimizer, rows):
    loss = model(**Counting().batch(rows, generator=None)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROBE[0]["input_ids"]).logits


@pytest.mark.parametrize(("family", "kind"), [*((family, "fused adamw") for family in MODELS), *(("gpt2", kind) for kind in OPTIMIZERS)])
def test_dense_training_goes_on_after_a_switch_as_if_there_had_been_none(family, kind):
    losses, outputs = [], []
    for switches in (False, True):
        model = MODELS[family]().train()
        ssd = attached(model)
        optimizer = OPTIMIZERS[kind](model.parameters())
        ssd.begin(optimizer)
        found = [step(model, optimizer, [i, i + 3]) for i in range(4)]
        identity = {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
        before = logits(model)
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        if switches:
            up = next(iter(moe_layers(model).values())).weights().up_FD.clone()
            ssd._regroup(4, warm=False)
            torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
            assert not torch.equal(next(iter(moe_layers(model).values())).weights().up_FD, up)
            assert {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters()} == identity
            now = optimizer.state_dict()["state"]
            assert now.keys() == moments.keys()
            if kind != "plain sgd":
                assert any(not torch.equal(now[i][key], value) for i, slot in moments.items() for key, value in slot.items())
        found += [step(model, optimizer, [i, i + 3]) for i in range(4, 12)]
        losses.append(found)
        outputs.append(logits(model))
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)


def test_a_switch_that_forgot_the_moments_would_be_seen():
    """What the test above sees: moments left where they were."""
    model = tiny_gpt().train()
    ssd, other = attached(model), tiny_gpt().train()
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (model, other))
    for i in range(4):
        step(model, optimizer, [i])
        step(other, plain, [i])
    for layer in moe_layers(model).values():
        permute_trained(model, layer.site, group_neurons(layer, CONFIG, seed=0, warm=False)[0].order_F, None)
    ssd.remove()
    after = [(step(model, optimizer, [i]), step(other, plain, [i])) for i in range(4, 12)]
    assert max(abs(a - b) / b for a, b in after) > 1e-3


def test_gradients_in_flight_follow_their_neurons():
    model = tiny_gpt().train()
    attached(model)
    model(**PROBE[0]).loss.backward()
    (layer, *_) = moe_layers(model).values()
    order_F = torch.randperm(50)
    bias = model.get_submodule(layer.site.up).bias
    grad = bias.grad.clone()
    permute_trained(model, layer.site, order_F, None)
    assert torch.equal(bias.grad, grad[order_F])


def test_moe_mode_with_every_expert_is_the_dense_function_after_a_switch():
    model = tiny_gpt().eval()
    ssd = attached(model)
    before = logits(model)
    ssd.begin(torch.optim.SGD(model.parameters(), lr=0.1))
    ssd._regroup(0, warm=False)
    set_mode(model, "moe")
    assert not torch.allclose(logits(model), before, rtol=1e-5, atol=1e-6)
    set_rule(model, TopK(k=8))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_the_lower_of_the_warm_and_the_fresh_inertia_is_taken():
    model = tiny_gpt()
    attached(model)
    (layer, *_) = moe_layers(model).values()
    fresh = [group_neurons(layer, CONFIG, seed=seed, warm=False)[0].inertia for seed in range(6)]
    best = min(range(6), key=lambda seed: fresh[seed])
    worst = max(range(6), key=lambda seed: fresh[seed])
    assert fresh[best] < fresh[worst]
    permute_trained(model, layer.site, group_neurons(layer, CONFIG, seed=best, warm=False)[0].order_F, None)
    kept, is_warm = group_neurons(layer, CONFIG, seed=worst, warm=True)
    assert is_warm
    assert kept.inertia <= fresh[best] * (1 + 1e-6)
    permute_trained(model, layer.site, torch.randperm(50, generator=torch.Generator().manual_seed(0)), None)
    found, is_warm = group_neurons(layer, CONFIG, seed=best, warm=True)
    assert found.inertia <= group_neurons(layer, CONFIG, seed=best, warm=False)[0].inertia * (1 + 1e-6)


def test_routers_start_from_the_centres_of_the_experts():
    model = tiny_gpt()
    ssd = attached(model)
    optimizer = torch.optim.AdamW(model.parameters())
    ssd.begin(optimizer)
    router = next(iter(moe_layers(model).values())).router
    optimizer.state[router.out.weight] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 32), "exp_avg_sq": torch.ones(8, 32)}
    ssd._regroup(0, warm=False)
    assert router.out.weight not in optimizer.state  # moments of other experts
    layer = next(iter(moe_layers(model).values()))
    rows = layer.weights().up_FD
    length = rows.norm(dim=1).mean()
    for e in range(8):
        unit = nn.functional.normalize(rows[layer.bounds[e] : layer.bounds[e + 1]], dim=1).mean(0)
        torch.testing.assert_close(router.out.weight[e], unit / unit.norm() * length)


class Factored(torch.optim.Optimizer):
    """Keeps a mean over rows, as Adafactor and others do; its constructor takes what no default says."""

    def __init__(self, params, *, extra):
        super().__init__(params, {"lr": 0.1})
        self.extra = extra

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["rows"] = p.grad.mean(-1)


def test_optimizers_whose_state_cannot_be_permuted_are_refused_before_training():
    model = tiny_gpt()
    ssd = attached(model)
    for optimizer, message in (
        (torch.optim.Adafactor(model.parameters()), r"Adafactor keeps 'row_var' .*cannot be permuted in it exactly; use AdamW or SGD"),
        (torch.optim.LBFGS(model.parameters()), "LBFGS cannot take a plain step"),
        (torch.optim.AdamW(p for n, p in model.named_parameters() if "router" not in n), "is not in the optimizer; attach SSD before"),
    ):
        with pytest.raises(ConfigError, match=message):
            ssd.begin(optimizer)
    late = Factored(model.parameters(), extra=1)  # cannot be made a second time
    ssd.begin(late)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    model(**PROBE[0]).loss.backward()
    late.step()
    with pytest.raises(ConfigError, match="Factored keeps 'rows'"):
        ssd._regroup(0, warm=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # nothing has moved
    with pytest.raises(ConfigError, match="Factored keeps 'rows'"):
        check_optimizer(late, list(moe_layers(model).values()))


def test_attaching_refuses_what_cannot_be_before_anything_is_changed():
    model = tiny_gpt(inner=7)
    with pytest.raises(ConfigError, match=r"num_experts 8 is more than the 7 neurons of 'transformer\.h\.0\.mlp'"):
        attached(model)
    assert not moe_layers(model)
    model = tiny_gpt()
    sites = sites_of(model)
    with pytest.raises(UnsupportedModelError, match="no FFN to make sparse"):
        SSD(model, [], CONFIG, probe=PROBE)
    SSD(model, sites, CONFIG, probe=PROBE)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        SSD(model, sites, CONFIG, probe=PROBE)
    with pytest.raises(ConfigError, match="knows no optimizer"):
        attached(tiny_gpt()).set_step(100)
