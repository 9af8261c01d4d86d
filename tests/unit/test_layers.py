"""The executor inside a model: selection, counting, what it must not read directly, threads, errors, autograd, compile, dtypes."""

import copy
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights
from tiny import convert_tiny, tiny_inputs, tiny_llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, CompileConfig, OPTConfig, OPTModel

from moeify.controls import record_active, set_impl, set_mode, set_rule, token_mask
from moeify.convert import ConvertConfig, convert, to_dense
from moeify.errors import ConfigError, KernelError, UnsupportedModelError
from moeify.kernels import CPU_UNTIL, CPU_UNTIL_INT8, build_plan, cpu, cpu_always, explain, impls_for
from moeify.layers import MoEFFN, _dropout_names, _drops_activations, attach, detach, moe_layers
from moeify.quantize import quantize
from moeify.routers import NormRouter, NormRouterConfig, OracleRouterConfig, build_router
from moeify.select import DynKMass, DynKMax, Threshold, TopK
from moeify.sites import FFNSite, find_ffn_sites, site_weights

D, F_, E = 6, 10, 4  # experts of 3, 3, 2 and 2 neurons
needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


class FixedScores(nn.Module):
    """Scores by token index, whatever the input."""

    def __init__(self, rows):
        super().__init__()
        self.rows_TE = torch.tensor(rows)

    def forward(self, x_TD, weights=None):
        return self.rows_TE[: x_TD.shape[0]]


class PlainFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, F_), nn.Linear(F_, D)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class GatedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False), nn.Linear(F_, D, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class FusedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * F_), nn.Linear(F_, D)
        self.act = nn.SiLU()

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


HOSTS = {"plain": (PlainFFN, {"activation": "relu"}), "gated": (GatedFFN, {"activation": "silu", "gate": "mlp.gate"}),
         "fused": (FusedFFN, {"activation": "silu", "fused": "gate_up"})}  # fmt: skip


class Net(nn.Module):
    """One FFN in a model."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


SCORES = [[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 5.0, 1.0], [0.0, 9.0, 0.0, 8.0], [2.0, 2.0, 1.0, 1.0]]


def make_net(kind="plain", *, rule=None, router=None, always_on=()):
    """A model with one converted FFN, its five tokens of input, and its site."""
    cls, options = HOSTS[kind]
    net = Net(cls())
    site = FFNSite(name="mlp", up="mlp.up", down="mlp.down", d_model=D, d_ff=F_, d_out=D, **options)
    attach(net, MoEFFN(site, num_experts=E, router=router or FixedScores(SCORES), rule=rule or TopK(k=2), always_on=always_on))
    return net, torch.randn(5, D), site


def by_hand(net, site, x_TD, mask_TE):
    """The definition, token by token in fp64."""
    weights = map_weights(site_weights(net, site), lambda t: t.detach().double())
    return loop_over_tokens(x_TD.detach().double(), weights, mask_TE, activation=site.activation)


def dense_by_hand(net, x_TD):
    """A plain FFN without any of its modules' forwards."""
    return F.linear(F.linear(x_TD, net.mlp.up.weight, net.mlp.up.bias).relu(), net.mlp.down.weight, net.mlp.down.bias)


def in_order_of_shape(net):
    """A copy whose weights lie in memory as `to_dense` leaves them: strides decide how torch's GEMMs round."""
    copied = copy.deepcopy(net)
    for parameter in copied.parameters():
        parameter.data = parameter.data.contiguous()
    return copied


def assert_runs_masked(net, site, x_TD, *, mask_TE=None):
    mask_TE = net.mlp.moe.rule(torch.tensor(SCORES)) if mask_TE is None else mask_TE
    torch.testing.assert_close(net(x_TD).double(), by_hand(net, site, x_TD, mask_TE), rtol=1e-5, atol=1e-6)


# -- what runs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("impl", [*impls_for("cpu"), "auto"])
def test_forward_runs_the_selected_experts_of_each_token(kind, impl):
    net, x_TD, site = make_net(kind)
    set_impl(net, impl)
    assert_runs_masked(net, site, x_TD)
    batched = net(x_TD[:4].reshape(2, 2, D))
    torch.testing.assert_close(batched.reshape(4, D), net(x_TD)[:4])


def test_always_on_experts_run_whatever_their_score():
    net, x_TD, site = make_net(rule=TopK(k=1), always_on=(1, 3))
    mask_TE = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1]]).bool()
    assert_runs_masked(net, site, x_TD, mask_TE=mask_TE)
    with record_active(net) as stats:
        net(x_TD)
    assert stats.active_fraction() == (8 + 5 + 7 + 5 + 8) / 50


@pytest.mark.parametrize("always_on", [(4,), (-1,), (0, 7)])
def test_always_on_out_of_range_is_refused(always_on):
    with pytest.raises(ConfigError, match=r"always_on must name experts in \[0, 4\)"):
        make_net(always_on=always_on)


def test_set_mode_switches_without_touching_a_weight():
    net, x_TD, _ = make_net()
    weights = [p.clone() for p in net.parameters()]
    sparse, dense = net(x_TD), dense_by_hand(net, x_TD)
    set_mode(net, "dense")
    assert torch.equal(net(x_TD), dense)
    set_mode(net, "moe")
    assert torch.equal(net(x_TD), sparse)
    assert not torch.allclose(sparse, dense)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
    with pytest.raises(ConfigError, match="'dense' or 'moe', got 'sparse'"):
        set_mode(net, "sparse")


@pytest.mark.parametrize("rule", [TopK(k=3), DynKMax(tau=0.6), DynKMass(mass=0.5), Threshold(theta=3.0)], ids=lambda r: r.name)
def test_set_rule_takes_effect_at_the_next_forward(rule):
    net, x_TD, site = make_net()
    net(x_TD)
    set_rule(net, rule)
    assert_runs_masked(net, site, x_TD)


def test_set_rule_by_name_changes_that_layer_only_and_refuses_an_unknown_one():
    model = converted_llama(rule=TopK(k=1))
    first, second = moe_layers(model)
    set_rule(model, {first: TopK(k=2)})
    assert [layer.rule for layer in moe_layers(model).values()] == [TopK(k=2), TopK(k=1)]
    with pytest.raises(ConfigError, match=f"no MoE layer 'model.layers.9.mlp'.*{second}"):
        set_rule(model, {first: TopK(k=3), "model.layers.9.mlp": TopK(k=3)})
    assert moe_layers(model)[first].rule == TopK(k=2)


def test_attach_twice_is_refused_and_detach_leaves_nothing():
    net, x_TD, site = make_net()
    with pytest.raises(UnsupportedModelError, match="'mlp' has an attribute 'moe' already"):
        attach(net, MoEFFN(site, num_experts=E, router=FixedScores(SCORES), rule=TopK(k=1)))
    detach(net, "mlp")
    assert moe_layers(net) == {}
    assert all("forward" not in module.__dict__ for module in net.modules())
    assert torch.equal(net(x_TD), dense_by_hand(net, x_TD))


def test_an_activation_in_place_does_not_write_into_the_input():
    net, x_TD, site = make_net()
    net.mlp.act = nn.ReLU(inplace=True)
    before = x_TD.clone()
    assert_runs_masked(net, site, x_TD)
    assert torch.equal(x_TD, before)


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_code_with_explicit_sizes_between_the_projections_gets_the_full_width(kind):
    class Sliced(HOSTS[kind][0]):
        def forward(self, x):
            h = self.up(x).view(*x.shape[:-1], self.up.out_features)
            return self.down(self.act(h[..., :F_]) * h[..., F_:] if kind == "fused" else self.act(h))

    net, x_TD, site = make_net(kind)
    net.mlp.__class__ = Sliced
    with pytest.raises(RuntimeError, match="shape"):
        net(x_TD)
    net.mlp.moe.site = replace(site, explicit_width=True)
    assert_runs_masked(net, site, x_TD)
    assert net.mlp.moe.masked_reason() is None


def test_an_ffn_without_tokens_gives_none():
    net, _, _ = make_net()
    assert net(torch.zeros(0, D)).shape == (0, D)


def test_an_overflow_in_an_unselected_neuron_stays_unseen_on_both_paths():
    net, x_TD, _ = make_net(rule=TopK(k=1))
    with torch.no_grad():
        net.mlp.up.bias[3:6] = float("inf")  # expert 1, which token 0 does not run
    assert net(x_TD)[0].isfinite().all()
    net.mlp.up.register_forward_hook(lambda *_: None)
    assert net.mlp.moe.masked_reason() is not None
    assert net(x_TD)[0].isfinite().all()


# -- counting ------------------------------------------------------------------------------------------------------------------------


def test_record_active_counts_neurons_by_hand():
    net, x_TD, _ = make_net(rule=TopK(k=1))  # experts 0, 3, 2, 1, 0 of 3, 3, 2, 2 neurons
    with record_active(net) as stats:
        net(x_TD)
        assert stats.active_fraction() == (3 + 2 + 2 + 3 + 3) / 50
        net(x_TD[:1])
    assert stats.active_fraction() == (13 + 3) / 60
    assert stats.per_layer() == {"mlp": 16 / 60}
    net(x_TD)
    assert stats.active_fraction() == 16 / 60
    assert net.mlp.moe.recorder is None


def test_token_mask_leaves_padding_out_and_ignores_another_shape():
    net, x_TD, _ = make_net(rule=TopK(k=1))
    with record_active(net) as stats:
        with token_mask(net, torch.tensor([[1, 0, 0, 1, 0]])):
            net(x_TD)
        assert stats.active_fraction() == (3 + 3) / 20
        net(x_TD)
        assert stats.active_fraction() == (6 + 13) / 70
        with token_mask(net, torch.ones(1, 3)):  # an encoder's mask while the decoder runs
            net(x_TD)
        assert stats.active_fraction() == (6 + 13 + 13) / 120
        with token_mask(net, None):
            net(x_TD)
    assert stats.active_fraction() == (6 + 13 + 13 + 13) / 170


def test_token_mask_fits_by_batch_and_length_not_by_their_product():
    net, x_TD, _ = make_net(rule=TopK(k=1))
    mask_BS = torch.tensor([[1, 0], [0, 1]])
    for x, counted in ((x_TD[:4].reshape(2, 2, D), 3 + 3), (x_TD[:4], 3 + 3), (x_TD[:4].reshape(1, 4, D), 3 + 2 + 2 + 3)):
        with record_active(net) as stats, token_mask(net, mask_BS):
            net(x)
        assert stats.active_fraction() == counted / (20 if counted == 6 else 40)


def test_token_mask_of_an_encoder_never_reaches_the_decoder():
    class Pair(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True)

        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Net(PlainFFN()), Net(PlainFFN())

        def forward(self, x):
            return self.decoder(self.encoder(x))

    net = Pair()
    for part in ("encoder", "decoder"):
        names = {key: f"{part}.mlp.{key}" for key in ("up", "down")}
        site = FFNSite(name=f"{part}.mlp", **names, activation="relu", d_model=D, d_ff=F_, d_out=D)
        attach(net, MoEFFN(site, num_experts=E, router=FixedScores(SCORES), rule=TopK(k=1)))
    x_BSD, first, last = torch.randn(1, 5, D), torch.tensor([[1, 0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0, 0]])
    with record_active(net) as stats, token_mask(net, first):  # of the very same shape
        net(x_BSD)
    assert stats.per_layer() == {"encoder.mlp": 3 / 10, "decoder.mlp": 13 / 50}
    with record_active(net) as stats, token_mask(net, first, decoder_mask_BS=last):
        net(x_BSD)
    assert stats.per_layer() == {"encoder.mlp": 3 / 10, "decoder.mlp": 2 / 10}


def test_record_active_weighs_layers_by_their_neurons():
    wide, narrow = make_net(rule=TopK(k=1))[0], make_net(rule=TopK(k=4))[0]
    small = FFNSite(name="b.mlp", up="b.mlp.up", down="b.mlp.down", activation="relu", d_model=D, d_ff=4, d_out=D)
    net = nn.ModuleDict({"a": wide, "b": narrow})
    net.b.mlp = PlainFFN()
    net.b.mlp.up, net.b.mlp.down = nn.Linear(D, 4), nn.Linear(4, D)
    attach(net, MoEFFN(small, num_experts=E, router=FixedScores(SCORES), rule=TopK(k=4)))
    with record_active(net) as stats:
        net.b(net.a(torch.randn(5, D)))
    assert stats.per_layer() == {"mlp": 13 / 50, "b.mlp": 1.0}
    assert stats.active_fraction() == (13 + 20) / 70


def test_record_active_of_nothing_is_an_error():
    net, x_TD, _ = make_net()
    with record_active(net) as stats, pytest.raises(ValueError, match="no MoE layer ran"):
        stats.active_fraction()
    with record_active(net) as stats, token_mask(net, torch.zeros(1, 5)):
        net(x_TD)
    with pytest.raises(ValueError, match="the token mask leaves none"):
        stats.active_fraction()
    assert str(stats.per_layer()) == "{'mlp': nan}"


def test_record_active_in_dense_mode_counts_nothing():
    net, x_TD, _ = make_net()
    set_mode(net, "dense")
    with record_active(net) as stats:
        net(x_TD)
    assert stats.per_layer() == {}


# -- what must not be read directly (D7) ---------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """What peft puts in the place of a linear layer: the layer itself, and a branch of its own beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))

    def merged(self):
        """(weight, bias) of the layer that computes the same."""
        return self.base_layer.weight + self.b.weight @ self.a.weight, self.base_layer.bias


def wrap(net, *names):
    for name in names:
        setattr(net.mlp, name, LowRank(getattr(net.mlp, name)))


def merged_by_hand(net, site, x_TD):
    """The masked FFN whose weights are the adapters' and the layers' together."""
    plain = Net(HOSTS["plain" if site.gate is None and not site.fused else "gated" if site.gate else "fused"][0]())
    with torch.no_grad():
        for name in ("up", "gate", "down"):
            if hasattr(net.mlp, name):
                layer = getattr(net.mlp, name)
                weight, bias = layer.merged() if isinstance(layer, LowRank) else (layer.weight, layer.bias)
                getattr(plain.mlp, name).weight.copy_(weight)
                if bias is not None:
                    getattr(plain.mlp, name).bias.copy_(bias)
    return by_hand(plain, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [("plain", ("up",)), ("plain", ("down",)), ("plain", ("up", "down")), ("fused", ("up", "down")),
     ("gated", ("gate",)), ("gated", ("up",)), ("gated", ("gate", "up", "down"))],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)  # fmt: skip
def test_adapters_put_in_after_conversion_are_part_of_what_runs(kind, wrapped):
    net, x_TD, site = make_net(kind)
    wrap(net, *wrapped)
    assert "is a LowRank" in net.mlp.moe.masked_reason()
    for _ in range(2):
        torch.testing.assert_close(net(x_TD).double(), merged_by_hand(net, site, x_TD), rtol=1e-5, atol=1e-6)
    with record_active(net) as stats:
        net(x_TD)
    assert 0.4 < stats.active_fraction() < 0.6
    net(x_TD).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name in wrapped for p in getattr(net.mlp, name).parameters())


def test_adapters_taken_off_again_leave_no_hook_and_the_kernels_run():
    net, x_TD, site = make_net()
    wrap(net, "down")
    net(x_TD)
    net.mlp.down = net.mlp.down.base_layer
    assert net.mlp.moe.masked_reason() is None
    assert_runs_masked(net, site, x_TD)
    handle = net.mlp.up.register_forward_hook(lambda *_: None)  # the masked path, without an adapter
    assert_runs_masked(net, site, x_TD)
    handle.remove()
    assert net.mlp.moe.masked_reason() is None
    wrap(net, "down")
    torch.testing.assert_close(net(x_TD).double(), merged_by_hand(net, site, x_TD), rtol=1e-5, atol=1e-6)


class Foreign(nn.Module):
    """A linear layer of another library, which takes the weights and never calls the module that it replaces."""

    def __init__(self, linear):
        super().__init__()
        self.matrix, self.offset = linear.weight, linear.bias

    def forward(self, x):
        return F.linear(x, self.matrix, self.offset)


class Subclass(nn.Linear):
    """What quantisers make of nn.Linear."""


def another(linear, cls=nn.Linear):
    new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    return new


REPLACE = {"foreign class": Foreign, "nn.Linear": another, "subclass": lambda linear: another(linear, Subclass)}


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE)
@pytest.mark.parametrize(
    ("kind", "names"),
    [("plain", ("up",)), ("plain", ("down",)), ("plain", ("up", "down")), ("fused", ("up",)), ("fused", ("up", "down")),
     ("gated", ("gate",)), ("gated", ("up",)), ("gated", ("down",)), ("gated", ("gate", "up")), ("gated", ("gate", "up", "down"))],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)  # fmt: skip
def test_projections_replaced_after_conversion_run_masked_and_ours_put_back_by_kernels(kind, names, replace):
    net, x_TD, site = make_net(kind)
    expected = by_hand(net, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))
    ours = {name: getattr(net.mlp, name) for name in names}
    theirs = {name: replace(leaf) for name, leaf in ours.items()}
    for _ in range(2):
        for name, leaf in theirs.items():
            setattr(net.mlp, name, leaf)
        assert net.mlp.moe.masked_reason() is not None
        with record_active(net) as stats:
            for _ in range(2):
                torch.testing.assert_close(net(x_TD).double(), expected, rtol=1e-5, atol=1e-6)
        assert 0.4 < stats.active_fraction() < 0.6
        for name, leaf in ours.items():
            setattr(net.mlp, name, leaf)
        assert net.mlp.moe.masked_reason() is None
        torch.testing.assert_close(net(x_TD).double(), expected, rtol=1e-5, atol=1e-6)
        assert not any(module._forward_pre_hooks for module in (*ours.values(), *theirs.values()))


def test_replaced_projections_in_dense_mode_and_after_to_dense_run_dense():
    net, x_TD, _ = make_net()
    dense = dense_by_hand(net, x_TD)
    net.mlp.up, net.mlp.down = Foreign(net.mlp.up), Foreign(net.mlp.down)
    net(x_TD)
    set_mode(net, "dense")
    assert torch.equal(net(x_TD), dense)
    expected = in_order_of_shape(net)(x_TD)
    to_dense(net)
    assert torch.equal(net(x_TD), expected)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("down", [False, True])
def test_a_first_projection_that_nobody_can_follow_is_refused_not_run_dense(down):
    net, x_TD, _ = make_net()
    if down:
        net.mlp.down = LowRank(net.mlp.down)
        net(x_TD)  # its hook is there
    net.mlp.up = Foreign(net.mlp.up)
    with pytest.raises(UnsupportedModelError, match=r"'mlp.down' ran without 'mlp.up'.*set_mode\(model, 'dense'\)"):
        net.mlp.forward(x_TD)  # not through the module's call: hooks of the host do not run
    assert not net.mlp.moe._calls


def test_offload_by_accelerate_runs_masked():
    accelerate = pytest.importorskip("accelerate")
    net, x_TD, site = make_net("gated")
    expected = by_hand(net, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    assert net.mlp.up.weight.is_meta
    torch.testing.assert_close(net(x_TD).double(), expected, rtol=1e-5, atol=1e-6)


def test_to_dense_under_adapters_leaves_the_adapted_dense_model():
    net, x_TD, _ = make_net()
    wrap(net, "up", "down")
    net(x_TD)
    set_mode(net, "dense")
    dense = in_order_of_shape(net)(x_TD)
    to_dense(net)
    assert torch.equal(net(x_TD), dense)
    assert not net.mlp.down._forward_pre_hooks


@pytest.mark.parametrize("kind", HOSTS)
def test_forward_hooks_of_others_see_and_change_what_the_dense_model_would(kind):
    net, x_TD, site = make_net(kind)
    seen = []
    net.mlp.up.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[-1]))
    net.mlp.down.register_forward_hook(lambda _m, _a, out: 2 * out)
    assert "has a forward hook" in net.mlp.moe.masked_reason()
    expected = 2 * by_hand(net, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))
    torch.testing.assert_close(net(x_TD).double(), expected, rtol=1e-5, atol=1e-6)
    assert seen == [2 * F_ if kind == "fused" else F_]


class Offloaded:
    """What accelerate does to a module: weights live elsewhere and are there only while the module's own forward runs."""

    def __init__(self, module):
        self.module, self.stored = module, {name: p.detach().clone() for name, p in module.named_parameters()}
        module._hf_hook, module._old_forward, module.forward = self, module.forward, self.forward
        self.place(dict.fromkeys(self.stored))

    def place(self, tensors):
        for name, tensor in tensors.items():
            data = torch.empty_like(self.stored[name], device="meta") if tensor is None else tensor
            setattr(self.module, name, nn.Parameter(data))

    def forward(self, *args):
        self.place(self.stored)
        out = self.module._old_forward(*args)
        self.place(dict.fromkeys(self.stored))
        return out


@pytest.mark.parametrize("kind", HOSTS)
def test_offloaded_weights_run_masked_through_their_hooks(kind):
    net, x_TD, site = make_net(kind)
    expected = by_hand(net, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))
    leaves = [module for module in net.mlp.modules() if isinstance(module, nn.Linear)]
    hooks = [Offloaded(leaf) for leaf in leaves]
    assert all(p.is_meta for p in net.mlp.parameters())
    assert "has an accelerate hook" in net.mlp.moe.masked_reason()
    torch.testing.assert_close(net(x_TD).double(), expected, rtol=1e-5, atol=1e-6)

    set_mode(net, "dense")
    dense = net(x_TD)
    to_dense(net)
    assert torch.equal(net(x_TD), dense)
    assert all(leaf.forward == hook.forward for leaf, hook in zip(leaves, hooks, strict=True))


def test_meta_weights_are_named_as_the_reason():
    net, _, _ = make_net()
    net.mlp.up.weight = nn.Parameter(torch.empty_like(net.mlp.up.weight, device="meta"))
    assert net.mlp.moe.masked_reason() == "'up' is on the meta device"


class Quantised(torch.Tensor):
    """A tensor that is more than its values, as torchao puts in the place of a weight."""


def test_a_tensor_subclass_as_weight_runs_masked():
    net, x_TD, site = make_net()
    net.mlp.up.weight = nn.Parameter(net.mlp.up.weight.detach().as_subclass(Quantised))
    assert net.mlp.moe.masked_reason() == "'up' has a Quantised as its weight"
    found = net(x_TD).detach().as_subclass(torch.Tensor)
    net.mlp.up.weight = nn.Parameter(net.mlp.up.weight.detach().as_subclass(torch.Tensor))
    assert net.mlp.moe.masked_reason() is None
    torch.testing.assert_close(found.double(), by_hand(net, site, x_TD, TopK(k=2)(torch.tensor(SCORES))), rtol=1e-5, atol=1e-6)


def test_parametrised_weights_and_mixed_dtypes_run_masked():
    net, _, _ = make_net()
    nn.utils.parametrizations.weight_norm(net.mlp.up)
    assert "ParametrizedLinear" in net.mlp.moe.masked_reason()
    net, _, _ = make_net("gated")
    net.mlp.gate.double()
    assert net.mlp.moe.masked_reason() == "projections differ in dtype"


@pytest.mark.parametrize("wrapped", [False, True])
def test_dropout_inside_the_ffn_while_training_runs_masked(wrapped):
    net, x_TD, site = make_net()
    if wrapped:
        net.mlp.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    else:
        net.mlp.activation_dropout = 0.5
    assert net.mlp.moe.masked_reason() is None or net.mlp.training
    net.train()
    assert net.mlp.moe.masked_reason() == "dropout inside the FFN while training"
    net.eval()
    assert net.mlp.moe.masked_reason() is None
    assert_runs_masked(net, site, x_TD)


def test_hidden_dropout_while_training_drops_what_the_dense_model_drops():
    net, x_TD, _ = make_net(rule=DynKMax(tau=0.0))
    net.mlp.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    net.train()
    torch.manual_seed(1)
    sparse = net(x_TD)
    set_mode(net, "dense")
    torch.manual_seed(1)
    assert torch.equal(net(x_TD), sparse)


# -- copies ---------------------------------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent_of_the_original():
    net, x_TD, site = make_net()
    before = net(x_TD)
    other = copy.deepcopy(net)
    assert other.mlp.moe.host is other.mlp
    with torch.no_grad():
        other.mlp.up.weight.mul_(2)
    set_rule(other, TopK(k=4))
    assert torch.equal(net(x_TD), before)
    assert net.mlp.moe.rule == TopK(k=2)
    assert_runs_masked(other, site, x_TD)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("wrapped", [(), ("down",), ("up", "down")], ids=lambda names: "+".join(names) or "plain")
def test_a_copy_runs_its_own_modules_and_hooks(copied, wrapped):
    net, x_TD, _ = make_net()
    wrap(net, *wrapped)
    before = net(x_TD)
    other = copied(net)
    assert torch.equal(other(x_TD), before)
    mine = {id(module) for module in net.modules()}
    assert other.mlp.moe.host is other.mlp
    assert not mine & {id(module) for module in (*other.modules(), *other.mlp.moe._leaves.values())}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(other(x_TD), before)
    set_mode(other, "dense")
    assert not torch.equal(other(x_TD), before)
    to_dense(other)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in other.modules())


def test_data_parallel_is_refused_with_the_way_out():
    net, _, _ = make_net()
    with pytest.raises(UnsupportedModelError, match=r"'mlp' is .*nn\.DataParallel.*torchrun"):
        [module._replicate_for_data_parallel() for module in net.modules()]  # what torch.nn.parallel.replicate does first


def test_state_dict_through_torch_save_holds_the_dense_names_and_the_router(tmp_path):
    site = make_net()[2]
    router = build_router(NormRouterConfig(width=3), site=site, num_experts=E)
    net, x_TD, _ = make_net(router=router)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other, _, _ = make_net(router=build_router(NormRouterConfig(width=3), site=site, num_experts=E))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    dense = {"mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias"}
    router_names = {f"mlp.moe.router.{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")}
    assert set(net.state_dict()) == dense | router_names
    assert torch.equal(other(x_TD), net(x_TD))


# -- errors and threads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTS)
def test_an_error_between_the_projections_leaves_nothing_behind(kind):
    net, x_TD, site = make_net(kind)
    act = net.mlp.act

    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    net.mlp.act = Breaks()
    with pytest.raises(RuntimeError, match="out of memory"):
        net(x_TD)
    net.mlp.act = act
    assert_runs_masked(net, site, x_TD)  # the very same input tensor
    net.mlp.act = Breaks()
    with pytest.raises(RuntimeError, match="out of memory"):
        net(x_TD)
    net.mlp.act = act
    net.mlp.down.register_forward_hook(lambda *_: None)  # what was decided in the broken call holds no longer
    assert_runs_masked(net, site, x_TD)
    assert net.mlp.moe._calls == {}


def test_two_threads_on_one_model_get_their_own_results():
    model = converted_llama(rule=TopK(k=3))
    inputs = [{"input_ids": (torch.arange(7) * p % 257).unsqueeze(0)} for p in (3, 5)]
    with torch.no_grad():
        alone = [model(**i).logits for i in inputs]
    barrier, wrong = threading.Barrier(2), []

    def run(i):
        barrier.wait()
        for _ in range(10):
            with torch.no_grad():
                if not torch.equal(model(**inputs[i]).logits, alone[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_meet_between_the_projections_do_not_swap_inputs():
    # Both are inside the FFN at once, for certain: the activation waits for the other thread.
    net, _, site = make_net()
    barrier = threading.Barrier(2)

    class Waits(nn.Module):
        def forward(self, x):
            barrier.wait()
            return F.relu(x)

    net.mlp.act = Waits()
    inputs, found = [torch.randn(5, D), torch.randn(5, D)], {}

    def run(i):
        with torch.no_grad():
            found[i] = net(inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        expected = by_hand(net, site, inputs[i], TopK(k=2)(torch.tensor(SCORES)))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-6)


# -- autograd -------------------------------------------------------------------------------------------------------------------------


def gradients(net, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("impl", [*impls_for("cpu"), "auto"])
def test_backward_gives_the_gradients_of_the_masked_dense_ffn(kind, impl):
    net, x_TD, site = make_net(kind)
    set_impl(net, impl)
    x_TD.requires_grad_()
    found = gradients(net, net(x_TD).square().sum())
    grad_x, x_TD.grad = x_TD.grad, None

    oracle = copy.deepcopy(net).double()
    x64_TD = x_TD.detach().double().requires_grad_()
    mask_TE = net.mlp.moe.rule(torch.tensor(SCORES))
    expected = gradients(oracle, loop_over_tokens(x64_TD, site_weights(oracle, site), mask_TE, activation=site.activation).square().sum())

    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_x.double(), x64_TD.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", HOSTS)
def test_checkpointing_one_ffn_changes_nothing(kind, use_reentrant):
    net, x_TD, _ = make_net(kind)
    x_TD.requires_grad_()
    plain = gradients(net, net(x_TD).square().sum())
    out = checkpoint(net, x_TD, use_reentrant=use_reentrant)
    assert torch.equal(out, net(x_TD))
    again = gradients(net, out.square().sum())
    assert all(torch.equal(grad, plain[name]) for name, grad in again.items())
    assert net.mlp.moe._calls == {}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_transformers_model_changes_nothing(use_reentrant):
    model = converted_llama(rule=TopK(k=3)).train()
    inputs = tiny_inputs()
    plain = gradients(model, model(**inputs, labels=inputs["input_ids"]).loss)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    again = gradients(model, model(**inputs, labels=inputs["input_ids"]).loss)
    assert all(torch.equal(grad, plain[name]) for name, grad in again.items())
    assert any("up_proj" in name for name in plain)


def test_the_optimizer_trains_experts_in_moe_mode():
    model = converted_llama(rule=TopK(k=3)).train()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "moe" not in n], lr=0.1)
    inputs, losses = tiny_inputs(), []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# -- dtypes, compile ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", [*(impl for impl in impls_for("cpu") if not impl.startswith("cpu")), "auto"])
def test_a_model_cast_after_conversion_runs_in_its_dtype(dtype, impl):
    net, x_TD, site = make_net("gated")
    expected = by_hand(net, site, x_TD, net.mlp.moe.rule(torch.tensor(SCORES)))
    set_impl(net, impl)
    out = net.to(dtype)(x_TD.to(dtype))
    assert out.dtype is dtype
    rough = 4 * torch.finfo(dtype).eps * 10
    torch.testing.assert_close(out.double(), expected, rtol=rough, atol=max(rough, 1e-6) * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routers_still_score_in_fp32(dtype):
    model = converted_llama(rule=TopK(k=3)).to(dtype)
    layer = next(iter(moe_layers(model).values()))
    assert {p.dtype for p in layer.router.parameters()} == {torch.float32}
    assert layer.scores(torch.randn(3, 32, dtype=dtype)).dtype is torch.float32
    assert model(**tiny_inputs()).logits.isfinite().all()


@pytest.mark.parametrize("impl", ["masked", "grouped", "auto"])
def test_autocast_gives_what_the_dense_model_gives_in_bf16(impl):
    model = converted_llama(rule=DynKMax(tau=0.0))
    set_impl(model, impl)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sparse = model(**tiny_inputs()).logits
        set_mode(model, "dense")
        dense = model(**tiny_inputs()).logits
    assert sparse.dtype is dense.dtype
    set_mode(model, "dense")
    exact = model(**tiny_inputs()).logits
    assert (sparse - exact).abs().max() <= 2 * (dense - exact).abs().max() + 0.01 * exact.abs().max()


def converted_llama(*, rule=None, router=None):
    model = tiny_llama()
    config = ConvertConfig(expert_size=7, router=router or NormRouterConfig(width=4), rule=rule or DynKMax(tau=0.0))
    convert(model, config, sites=find_ffn_sites(model, tiny_inputs()))
    return model


NUM_TOKENS = pytest.mark.parametrize("num_tokens", [2, 70], ids=["few tokens", "many tokens"])
RULES = pytest.mark.parametrize(
    "rule", [Threshold(theta=0.01), DynKMax(tau=0.5), DynKMass(mass=0.5), TopK(k=3)], ids=lambda rule: rule.name
)


@needs_library
@pytest.mark.parametrize("ids", [[[3, 1, 4]], [[3, 1, 4, 1, 5] * 7, [9, 2, 6, 5, 3] * 7]], ids=["few tokens", "many tokens"])
@RULES
def test_native_call_equals_its_pieces(rule, ids):
    model, ids = converted_llama(rule=rule).eval(), {"input_ids": torch.tensor(ids)}
    layers = moe_layers(model).values()

    def pieces_and_call():
        with torch.no_grad(), record_active(model) as stats:
            native = model(**ids).logits
            in_use = all(layer._native is not None and layer._native.routed is not None for layer in layers)
            calls, by_call = {layer: layer._native for layer in layers}, stats.per_layer()
            set_impl(model, "reference")
            with record_active(model) as again:
                pieces = model(**ids).logits
            set_impl(model, "auto")
        torch.testing.assert_close(native, pieces)
        assert by_call == again.per_layer()
        assert in_use
        return calls

    first = pieces_and_call()
    with torch.no_grad():  # values written into the weights are seen
        for layer in layers:
            layer.weights().up_FD.mul_(1.5)
            layer.router.out.bias.add_(torch.randn(layer.num_experts))
    assert all(pieces_and_call()[layer] is call for layer, call in first.items())
    set_rule(model, TopK(k=2))  # another rule or another tensor in a parameter's place is another call
    second = pieces_and_call()
    assert all(second[layer] is not call for layer, call in first.items())
    for layer in layers:
        parameter = model.get_submodule(layer.site.down).weight
        parameter.data = torch.randn_like(parameter.data.t()).t()
    assert all(pieces_and_call()[layer] is not call for layer, call in second.items())
    other = copy.deepcopy(model)
    assert all(layer._native is None for layer in moe_layers(other).values())


def routed_net(kind="gated", *, num_tokens=2, **kwargs):
    """A net in eval mode whose tokens are routed by the native call, and so many tokens of input."""
    router = build_router(NormRouterConfig(width=3), site=make_net(kind)[2], num_experts=E)
    net, _, _ = make_net(kind, **{"router": router.requires_grad_(False), "rule": TopK(k=1), **kwargs})
    return net.eval(), torch.randn(num_tokens, D)


def runs_natively(net, x_TD):
    call = net.mlp.moe._decide(net.mlp.up, x_TD)
    return call.whole is not None or call.select is not None


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class TurnedRouter(NormRouter):
    def forward(self, x_TD, weights=None):
        return super().forward(x_TD, weights).flip(1)


class OneAfterTheOther(nn.Module):
    def forward(self, x_TD, weights=None):
        return torch.eye(E)[torch.arange(x_TD.shape[0]) % E]


def turned_router(net):
    """The router's last layer with its experts in the opposite order: other experts run."""
    other = copy.deepcopy(net.mlp.moe.router.out)
    other.weight.data, other.bias.data = other.weight.data.flip(0), other.bias.data.flip(0)
    return other


def hook_of_accelerate(net):
    leaf, inner = net.mlp.up, net.mlp.up.forward
    leaf._hf_hook, leaf.forward = object(), lambda x: 2 * inner(x)


def change_class(module, cls):
    module.__class__ = cls


def router_hook_of_accelerate(net):
    router, inner = net.mlp.moe.router, net.mlp.moe.router.forward
    router._hf_hook, router.forward = object(), lambda x_TD, weights: inner(x_TD, weights).flip(1)


def store(module, name, tensor):
    setattr(module, name, nn.Parameter(tensor))


def scale_data(parameter):
    parameter.data = 3 * parameter.data


CHANGES = {
    "rule": lambda net: set_rule(net, TopK(k=3)),
    "always on": lambda net: setattr(net.mlp.moe, "always_on", (0, 1, 2, 3)),
    "projection": lambda net: setattr(net.mlp, "up", another(nn.Linear(D, F_, bias=False))),
    "adapter": lambda net: wrap(net, "down"),
    "projection's class": lambda net: change_class(net.mlp.up, Doubled),
    "projection's hook": lambda net: net.mlp.up.register_forward_hook(lambda _m, _a, out: 2 * out),
    "projection's pre-hook": lambda net: net.mlp.down.register_forward_pre_hook(lambda _m, args: (2 * args[0],)),
    "projection's accelerate hook": hook_of_accelerate,
    "weight": lambda net: store(net.mlp.gate, "weight", torch.randn(F_, D)),
    "weight's data": lambda net: scale_data(net.mlp.down.weight),
    "weight's values": lambda net: net.mlp.down.weight.mul_(3),
    "bias": lambda net: store(net.mlp.down, "bias", torch.randn(D)),
    "router": lambda net: setattr(net.mlp.moe, "router", OneAfterTheOther()),
    "router's class": lambda net: change_class(net.mlp.moe.router, TurnedRouter),
    "router's hook": lambda net: net.mlp.moe.router.register_forward_hook(lambda _m, _a, scores_TE: scores_TE.flip(1)),
    "router's pre-hook": lambda net: net.mlp.moe.router.register_forward_pre_hook(lambda _m, args: (-args[0], None)),
    "router's accelerate hook": router_hook_of_accelerate,
    "router's layer": lambda net: setattr(net.mlp.moe.router, "out", turned_router(net)),
    "router's layer's class": lambda net: change_class(net.mlp.moe.router.out, Negated),
    "router's layer's hook": lambda net: net.mlp.moe.router.out.register_forward_hook(lambda _m, _a, z_TE: -z_TE),
    "router's weight": lambda net: store(net.mlp.moe.router.out, "weight", -net.mlp.moe.router.out.weight),
    "router's weight's data": lambda net: setattr(net.mlp.moe.router.hidden.weight, "data", -net.mlp.moe.router.hidden.weight.data),
}  # fmt: skip


@needs_library
@NUM_TOKENS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_native_call_sees_what_changes_after_it_was_made(change, num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    with torch.no_grad():
        router = net.mlp.moe.router  # scores far apart, so that other scores select others
        router.out.weight.mul_(5), router.out.bias.copy_(torch.tensor([1.0, -1.0, 0.3, -0.3]))
        before = net(x_TD)
        assert net.mlp.moe._native.routed is not None
        change(net)
        found = net(x_TD)
        set_impl(net, "reference")
        torch.testing.assert_close(found, net(x_TD))
    assert not torch.allclose(found, before)


@needs_library
@NUM_TOKENS
def test_native_call_is_left_where_a_weight_becomes_more_than_its_values(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    with torch.no_grad():
        net(x_TD)
        net.mlp.up.weight = nn.Parameter(net.mlp.up.weight.detach().as_subclass(Quantised))  # in the same place in memory
        assert not runs_natively(net, x_TD)


@needs_library
def test_native_call_is_made_once_for_what_stays():
    net, x_TD = routed_net()
    with torch.no_grad():
        net(x_TD)
        made = net.mlp.moe._native
        net(torch.randn(70, D))
        net(x_TD[:1])
    assert net.mlp.moe._native is made


@needs_library
@pytest.mark.parametrize("move", [lambda net: net.bfloat16(), lambda net: net.to("meta")], ids=["cast", "move"])
def test_native_call_does_not_keep_weights_from_before_a_cast_or_move(move):
    net, x_TD = routed_net()
    with torch.no_grad():
        net(x_TD)
        assert net.mlp.moe._native is not None
        move(net)
    assert net.mlp.moe._native is None


class Calls:
    """What ran: the native call with the FFN, the native selection alone, the PyTorch router."""

    def __init__(self, monkeypatch):
        self.seen = []
        for owner, name, said in ((cpu.Routed, "__call__", "ffn"), (cpu.Routed, "select", "selection"), (NormRouter, "forward", "router")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), said))

    def _counted(self, function, said):
        def counted(*args, **kwargs):
            self.seen.append(said)
            return function(*args, **kwargs)

        return counted

    def of(self, call):
        self.seen.clear()
        call()
        return list(self.seen)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("always_on", [(), (1,)], ids=["", "always on"])
@RULES
@pytest.mark.parametrize("shape", [(1, 4), (5,), (1, 64), (5, 13), (2, 3, 50)], ids=str)
def test_forward_selects_as_the_pieces_do_for_any_number_of_tokens(monkeypatch, shape, rule, always_on, dtype):
    net, _ = routed_net(rule=replace(rule, theta=1.0) if rule.name == "threshold" else rule, always_on=always_on)
    moe, x = net.mlp.moe, torch.randn(*shape, D).to(dtype)
    with torch.no_grad():
        moe.router.out.weight.mul_(5)
        for name in ("gate", "up", "down"):
            getattr(net.mlp, name).to(dtype)
        moe.lay_out()
        masks = []
        monkeypatch.setattr("moeify.layers.ActiveRecorder.add", lambda _, layer, mask_TE, *, shape: masks.append((mask_TE, shape)))
        calls = Calls(monkeypatch)
        with record_active(net):
            is_whole = x.numel() <= cpu_always(dtype, is_int8=False) * D
            assert calls.of(lambda: masks.append(net(x))) == (["ffn"] if is_whole else ["selection"])
            set_impl(net, "reference")
            assert calls.of(lambda: masks.append(net(x))) == ["router"]
    (mask_TE, of), found, (expected_TE, _), expected = masks
    assert mask_TE.equal(expected_TE)
    assert of == shape
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if rule.name != "topk":
        assert 0 < mask_TE.sum() < mask_TE.numel()


def borders():
    """Numbers of tokens on both sides of every crossover."""
    for is_int8, table in ((False, CPU_UNTIL), (True, CPU_UNTIL_INT8)):
        for dtype, rows in table.items():
            at_most = [int(tokens) for tokens, _ in rows if tokens != float("inf")]
            for num_tokens in (1, *at_most, *(n + 1 for n in at_most), 1000):
                yield pytest.param(num_tokens, dtype, is_int8, id=f"{num_tokens}-{str(dtype)[6:]}-{'int8' if is_int8 else 'float'}")


@needs_library
@pytest.mark.parametrize(("num_tokens", "dtype", "is_int8"), [*borders()])
def test_a_layer_computes_everything_in_one_call_exactly_where_auto_takes_the_compiled_kernels_anyway(
    monkeypatch, num_tokens, dtype, is_int8
):
    net, x_TD = routed_net(num_tokens=num_tokens, rule=DynKMax(tau=0.0))  # every expert runs
    moe, x_TD = net.mlp.moe, x_TD.to(dtype)
    net.to(dtype)
    if is_int8:
        quantize(net)
    moe.lay_out()
    calls = Calls(monkeypatch)
    with torch.no_grad():
        chosen = next(c.name for c in explain(x_TD, moe.weights(), build_plan(moe.select(x_TD)), activation="silu") if c.chosen)
        assert calls.of(lambda: net(x_TD)) == (["ffn"] if chosen == "cpu" else ["selection"])
        set_impl(net, "cpu")
        assert calls.of(lambda: net(x_TD)) == ["ffn"], "asked for by name"
        set_impl(net, "auto")
        assert calls.of(lambda: net(x_TD)) == (["ffn"] if chosen == "cpu" else ["selection"])


@needs_library
@NUM_TOKENS
def test_an_unknown_instruction_set_is_said_at_the_first_forward(monkeypatch, num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    monkeypatch.setenv(cpu.FORCE_ISA, "avx1024")
    with torch.no_grad(), pytest.raises(KernelError, match=r"MOEIFY_CPU_ISA='avx1024' is no instruction set"):
        net(x_TD)
    assert net.mlp.moe._native is None


@needs_library
@NUM_TOKENS
def test_native_call_counts_what_it_ran(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    with torch.no_grad():
        assert runs_natively(net, x_TD)
        with record_active(net) as stats:
            net(x_TD)
        with record_active(net) as again:
            net.mlp.moe.select(x_TD)
    assert stats.per_layer() == again.per_layer()


@needs_library
@NUM_TOKENS
def test_native_call_is_left_where_it_would_not_do_what_the_pieces_do(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    with torch.no_grad():
        assert runs_natively(net, x_TD)
        assert not runs_natively(net, x_TD.bfloat16())
        set_impl(net, "grouped")
        assert not runs_natively(net, x_TD)
        set_impl(net, "auto")
        net.train()
        assert not runs_natively(net, x_TD)
        net.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs_natively(net, x_TD)
        assert runs_natively(net, x_TD)
    assert not runs_natively(net, x_TD), "its weights want gradients"
    net.requires_grad_(False)
    assert runs_natively(net, x_TD)
    assert not runs_natively(net, x_TD.requires_grad_())


@needs_library
@NUM_TOKENS
def test_router_runs_in_pytorch_while_training_under_autocast_with_gradients_with_hooks_and_under_adapters(monkeypatch, num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    calls, native = Calls(monkeypatch), ["ffn"] if num_tokens <= 64 else ["selection"]
    assert calls.of(lambda: net(x_TD)) == ["router"], "its weights want gradients"
    with torch.no_grad():
        assert calls.of(lambda: net(x_TD)) == native
        assert calls.of(lambda: net.train()(x_TD)) == ["router"]
        net.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert calls.of(lambda: net(x_TD)) == ["router"]
        for module in (net.mlp.up, net.mlp.down, net.mlp.moe.router, net.mlp.moe.router.hidden):
            hook = module.register_forward_hook(lambda *_: None)
            assert calls.of(lambda: net(x_TD)) == ["router"]
            hook.remove()
            assert calls.of(lambda: net(x_TD)) == native
        wrap(net, "down")
        assert calls.of(lambda: net(x_TD)) == ["router"]


@needs_library
@NUM_TOKENS
def test_native_call_is_not_in_the_way_of_gradients_to_the_weights(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    net(x_TD).sum().backward()
    assert all(leaf.weight.grad.abs().sum() > 0 for leaf in (net.mlp.gate, net.mlp.up, net.mlp.down))


class PassesNamesOn(nn.Module):
    """A module around another that looks like it, as torch.compile and activation checkpointing put it in."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@needs_library
@NUM_TOKENS
def test_native_call_is_left_where_something_around_a_projection_passes_its_name_on(num_tokens):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.down = Net(nn.Linear(D, F_)), nn.Linear(F_, D)

        def forward(self, x):
            return self.down(self.first.mlp(x).relu())

    net, x_TD = Net(Nested()).eval(), torch.randn(num_tokens, D)
    site = FFNSite(name="mlp", up="mlp.first.mlp", down="mlp.down", activation="relu", d_model=D, d_ff=F_, d_out=D)
    router = build_router(NormRouterConfig(width=3), site=site, num_experts=E)
    attach(net, MoEFFN(site, num_experts=E, router=router, rule=TopK(k=2)))
    with torch.no_grad():
        before = net(x_TD)
        assert net.mlp.moe._native is not None
        net.mlp.first = PassesNamesOn(net.mlp.first)
        for _ in range(2):
            torch.testing.assert_close(net(x_TD), before)
            assert net.mlp.moe._native is None
            assert net.mlp.moe.masked_reason() is None


def converted_bert(*, rule):
    sizes = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    model = BertModel(config).eval()
    inputs = {"input_ids": torch.arange(18).reshape(2, 9)}
    convert(model, ConvertConfig(expert_size=7, router=NormRouterConfig(width=4), rule=rule), sites=find_ffn_sites(model, inputs))
    return model, inputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", ["masked", "auto"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compile_in_moe_mode_gives_one_graph_with_the_eager_result(family, impl):
    model, inputs = (converted_llama(rule=TopK(k=3)), tiny_inputs()) if family == "llama" else converted_bert(rule=DynKMass(mass=0.6))
    set_impl(model, impl)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**inputs)[0]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=0)


class Graphs:
    """A backend of torch.compile that keeps what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, _inputs):
        self.seen.append(graph)
        return graph

    @property
    def operators(self):
        """Operators of this package in each graph."""
        return [operators_of(graph) for graph in self.seen]


def operators_of(graph):
    return [name for node in graph.graph.nodes if (name := str(node.target)).startswith("moeify.")]


ROUTED, PIECES = ["moeify.routed_ffn_cpu.default"], ["moeify.ffn_cpu.default"]
TRAINED = ["moeify.ffn_train_cpu.default"]
traces = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@traces
@needs_library
@NUM_TOKENS
def test_compile_after_native_calls_gives_one_graph_with_their_operator_and_their_bits(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = net(x_TD)  # by the native call
        graphs = Graphs()
        compiled = torch.compile(net, backend=graphs, fullgraph=True)
        assert compiled(x_TD).equal(expected)
        assert graphs.operators == [ROUTED]
        assert net.mlp.moe._native.routed is not None


@traces
@needs_library
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_compile_for_any_number_of_tokens_is_one_graph_with_the_bits_of_eager(kind, weights):
    net, _ = routed_net(kind, rule=DynKMax(tau=0.0), always_on=(2,))  # every expert runs: many tokens go beyond the crossover
    net.to(torch.bfloat16)
    if weights == "int8":
        quantize(net)
    net.mlp.moe.lay_out()
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for num_tokens in (3, 17, 70, 129, 300):
            x_TD = torch.randn(num_tokens, D).bfloat16()
            assert compiled(x_TD).equal(net(x_TD)), num_tokens
        assert graphs.operators == [ROUTED]
        compiled(torch.randn(1, D).bfloat16()), compiled(torch.randn(2, 5, D).bfloat16())
        assert set(map(tuple, graphs.operators)) == {tuple(ROUTED)}


@traces
@needs_library
@NUM_TOKENS
def test_compile_while_recording_counts_what_eager_counts(num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens, rule=DynKMass(mass=0.5))
    graphs = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    with torch.no_grad():
        with record_active(net) as eager:
            expected = net(x_TD), net(x_TD)
        with record_active(net) as stats:
            assert (compiled(x_TD).equal(expected[0]), compiled(x_TD).equal(expected[1])) == (True, True)
    assert stats.per_layer() == eager.per_layer()
    assert 0 < stats.active_fraction() < 1
    assert set(map(tuple, graphs.operators)) == {tuple(ROUTED)}


def router_hook(net):
    net.mlp.moe.router.register_forward_hook(lambda *_: None)


def projection_hook(net):
    net.mlp.up.register_forward_hook(lambda *_: None)


@traces
@needs_library
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda net: set_rule(net, TopK(k=3)), ROUTED, id="rule"),
        pytest.param(lambda net: setattr(net.mlp.moe, "always_on", (0, 3)), ROUTED, id="always on"),
        pytest.param(lambda net: set_impl(net, "cpu"), ROUTED, id="asked for by name"),
        pytest.param(lambda net: set_impl(net, "masked"), [], id="another asked for by name"),
        pytest.param(lambda net: setattr(net.mlp.moe, "router", OneAfterTheOther()), PIECES, id="another router"),
        pytest.param(lambda net: scale_data(net.mlp.down.weight), ROUTED, id="other values"),
        pytest.param(lambda net: net.train(), TRAINED, id="training"),
        pytest.param(router_hook, None, id="hook on the router"),
        pytest.param(projection_hook, None, id="hook on a projection"),
    ],
)
def test_compile_calls_the_operator_where_eager_makes_the_native_call_and_follows_changes(change, expected):
    graphs = Graphs()
    net, x_TD = routed_net()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    with torch.no_grad():
        if expected is None:  # torch.compile does not look whether hooks come later
            change(net)
            torch.testing.assert_close(compiled(x_TD), net(x_TD))
            assert ROUTED not in graphs.operators
            return
        compiled(x_TD)
        change(net)
        torch.testing.assert_close(compiled(x_TD), net(x_TD))
    assert (graphs.operators[0], graphs.operators[-1]) == (ROUTED, expected)


@traces
@needs_library
def test_compile_where_a_gradient_is_wanted_gives_the_pieces_and_the_gradient():
    net, x_TD = routed_net()
    graphs = Graphs()
    torch._dynamo.reset()
    torch.compile(net, backend=graphs, fullgraph=True)(x_TD).sum().backward()
    found = [leaf.weight.grad for leaf in (net.mlp.gate, net.mlp.up, net.mlp.down)]
    net.zero_grad()
    net(x_TD).sum().backward()
    assert graphs.operators == [PIECES]
    for grad, leaf in zip(found, (net.mlp.gate, net.mlp.up, net.mlp.down), strict=True):
        torch.testing.assert_close(grad, leaf.weight.grad)


@traces
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the call in flight, gone when the forward ends
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11
@pytest.mark.filterwarnings("ignore:No complete tensor found")  # a down projection kept by neuron
@needs_library
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_export_calls_the_operator_for_any_number_of_tokens_also_from_a_file(tmp_path, strict, weights):
    net, x_TD = routed_net(num_tokens=5, rule=DynKMax(tau=0.5), always_on=(1,))
    if weights == "int8":
        quantize(net)
    with torch.no_grad():
        program = torch.export.export(net, (x_TD,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=400)},), strict=strict)
        assert operators_of(program.graph_module) == ROUTED
        torch.export.save(program, tmp_path / "net.pt2")
        again = torch.export.load(tmp_path / "net.pt2")
        for num_tokens in (2, 70):
            x_TD = torch.randn(num_tokens, D)
            assert program.module()(x_TD).equal(net(x_TD))
            assert again.module()(x_TD).equal(net(x_TD))


@traces
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@needs_library
def test_other_tracers_see_the_operator():
    net, x_TD = routed_net()
    net.requires_grad_(False)
    other_TD = torch.randn(2, D)
    with torch.no_grad():
        graph = make_fx(net)(x_TD)
        assert operators_of(graph) == ROUTED
        assert graph(other_TD).equal(net(other_TD))
        traced = torch.jit.trace(net, (x_TD,), check_trace=False)
        assert "moeify::routed_ffn_cpu" in str(traced.inlined_graph)
        assert traced(other_TD).equal(net(other_TD))


@needs_library
@pytest.mark.parametrize("impl", ["auto", "cpu", "masked"])
@NUM_TOKENS
def test_tensors_without_memory_give_tensors_without_memory(impl, num_tokens):
    net, x_TD = routed_net(num_tokens=num_tokens)
    set_impl(net, impl)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        net(x_TD)  # a native call is there
        fake = net(mode.from_tensor(x_TD))
        with mode:
            inside = net(x_TD)
        for found in (fake, inside):
            assert isinstance(found, FakeTensor)
            assert (found.shape, found.dtype, found.device.type) == (x_TD.shape, x_TD.dtype, "cpu")
        moved = copy.deepcopy(net).to("meta")(x_TD.to("meta"))
        assert (moved.shape, moved.device.type) == (x_TD.shape, "meta")


@needs_library
@pytest.mark.parametrize("rule", [Threshold(theta=0.5), DynKMax(tau=0.0)], ids=["some experts", "every expert"])
def test_generate_says_the_same_with_reference_and_compiled_kernels(rule):
    model = convert_tiny(tiny_llama(), rule=rule)
    texts = {}
    for impl in ("reference", "cpu", "auto"):
        set_impl(model, impl)
        with record_active(model) as stats:
            ids = model.generate(tiny_inputs(length=40)["input_ids"], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        texts[impl] = ids[:, 40:].tolist(), stats.per_layer()
    assert texts["cpu"] == texts["auto"] == texts["reference"]
    assert len({token for row in texts["cpu"][0] for token in row}) > 3, "a text that never changes shows little"


@traces
@needs_library
def test_generate_with_a_compiled_static_cache_says_what_eager_says():
    model = convert_tiny(tiny_llama(), rule=Threshold(theta=0.5))
    ids = tiny_inputs()["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    eager = model.generate(ids, **options)
    graphs = Graphs()
    config = CompileConfig(dynamic=False, mode=None, backend=lambda graph, inputs: graphs(graph, inputs), fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on GPUs alone unless told so
    torch._dynamo.reset()
    static = model.generate(ids, **options, cache_implementation="static", compile_config=config)
    assert static.equal(eager)
    assert graphs.operators
    assert all(names == 2 * ROUTED for names in graphs.operators)


def test_an_ffn_inside_the_layer_itself_is_hosted_by_the_layer():
    config = OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=51, num_hidden_layers=1, num_attention_heads=4,
                       max_position_embeddings=32)  # fmt: skip
    model = OPTModel(config).eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    dense = model(**inputs)[0]
    convert(model, ConvertConfig(expert_size=7, router=OracleRouterConfig()), sites=find_ffn_sites(model, inputs))
    assert list(moe_layers(model)) == ["decoder.layers.0"]
    torch.testing.assert_close(model(**inputs)[0], dense)


def test_hidden_dropout_by_any_attribute_name_counts_as_dropout_inside_the_ffn():
    host = nn.Linear(2, 2)
    assert not _drops_activations(host, _dropout_names(host))
    host.hidden_dropout = 0.0
    names = _dropout_names(host)
    assert not _drops_activations(host, names)
    host.hidden_dropout = 0.1
    assert _drops_activations(host, names)


@needs_library
def test_other_strides_in_the_same_place_are_seen_by_the_native_call():
    net, x_TD = routed_net(num_tokens=2, rule=DynKMax(tau=0.0))
    weight = net.mlp.up.weight
    F, D = weight.shape
    wide = torch.randn(2 * F * D)
    with torch.no_grad():
        weight.data = wide[: F * D].view(F, D)
        before = net(x_TD)
        weight.data = wide.as_strided((F, D), (2 * D, 1))
        found = net(x_TD)
        set_impl(net, "reference")
        torch.testing.assert_close(found, net(x_TD))
    assert not found.equal(before)


@needs_library
def test_forward_mode_gradients_of_a_layer_are_those_of_the_pieces():
    net, x_TD = routed_net(num_tokens=2, rule=DynKMax(tau=0.0))

    def tangent():
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(x_TD, torch.ones_like(x_TD)))).tangent

    with torch.no_grad():
        net(x_TD)  # the native call is made
    found = tangent()
    set_impl(net, "reference")
    torch.testing.assert_close(found, tangent())


# -- top-k activation: experts of one neuron, the oracle of activations, TopK ------------------------------------------------------------


def top_k_llama(k):
    model = tiny_llama(hidden_act="silu")
    config = ConvertConfig(expert_size=1, router=OracleRouterConfig(of="activation"), rule=TopK(k=k))
    convert(model, config, sites=find_ffn_sites(model, tiny_inputs()))
    return model


def with_top_k(model, k):
    """The same by hand: all but the k largest neurons of each token are zero in front of every down projection."""

    def keep(_module, args):
        kept_S = args[0].abs().topk(k, dim=-1).indices
        return (args[0] * torch.zeros_like(args[0]).scatter(-1, kept_S, 1.0),)

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_top_k_activation_and_its_gradients_equal_the_plain_formula(training):
    converted, plain = (model.train(training) for model in (top_k_llama(5), with_top_k(tiny_llama(hidden_act="silu"), 5)))
    inputs = {**tiny_inputs(), "labels": tiny_inputs()["input_ids"]}
    outputs, expected = converted(**inputs), plain(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    outputs.loss.backward()
    expected.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)


def test_top_k_activation_survives_save_and_load(tmp_path):
    model = top_k_llama(5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert [layer.router.config for layer in moe_layers(loaded).values()] == [OracleRouterConfig(of="activation")] * 2
    with torch.no_grad(), record_active(loaded) as recorder:
        assert torch.equal(loaded(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
    assert recorder.active_fraction() == pytest.approx(5 / 48)
