"""Layers that skip single neurons while decoding: one native call where it does what router, rule and FFN do, and nowhere else."""

import copy
import pickle

import pytest
import torch
from ffn_cases import needs_library
from tiny import tiny_inputs, tiny_llama
from torch import nn

from moeify import doctor
from moeify.controls import record_active, set_impl, set_mode, set_rule
from moeify.convert import ConvertConfig, convert
from moeify.kernels import cpu
from moeify.kernels.cpu_neurons import MOST_TOKENS, RoutedNeurons
from moeify.layers import MoEFFN, attach, moe_layers
from moeify.quantize import quantize
from moeify.routers import (
    GateRouter,
    GateRouterConfig,
    LowRankRouter,
    LowRankRouterConfig,
    NormRouterConfig,
    OracleRouter,
    OracleRouterConfig,
    build_router,
)
from moeify.select import NormBudget, Threshold, TopK
from moeify.sites import FFNSite, find_ffn_sites

D, F = 12, 26
ROUTERS = {"gate": GateRouterConfig(), "lowrank": LowRankRouterConfig(rank=5), "oracle": OracleRouterConfig(of="activation")}
KINDS = pytest.mark.parametrize("kind", ROUTERS)
SPLITS = pytest.mark.parametrize("num_tokens", [1, MOST_TOKENS], ids=["one token", "most tokens"])
pytestmark = needs_library


class GatedFFN(nn.Module):
    def __init__(self, *, bias=True):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F, bias=bias), nn.Linear(D, F, bias=bias), nn.Linear(F, D, bias=bias)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class FusedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * F), nn.Linear(F, D)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class PlainFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


HOSTS = {"gated": (GatedFFN, {"activation": "silu", "gate": "mlp.gate"}), "fused": (FusedFFN, {"activation": "silu", "fused": "gate_up"}),
         "plain": (PlainFFN, {"activation": "relu"})}  # fmt: skip


def neuron_net(kind, *, host="gated", rule=None, num_experts=F, always_on=()):
    """A net in eval mode whose FFN skips single neurons, with a router of random content."""
    cls, options = HOSTS[host]
    site = FFNSite(name="mlp", up="mlp.up", down="mlp.down", d_model=D, d_ff=F, d_out=D, **options)
    router = build_router(ROUTERS[kind], site=site, num_experts=num_experts)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.detach().copy_(torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor) / tensor.shape[1] ** 0.5)
    net = Net(cls()).eval()
    attach(net, MoEFFN(site, num_experts=num_experts, router=router.requires_grad_(False), rule=rule or TopK(k=7), always_on=always_on))
    return net


@pytest.fixture
def calls(monkeypatch):
    """What ran, in order: the native call, a router in PyTorch."""
    seen = []

    def counted(function, said):
        def count(*args, **kwargs):
            seen.append(said)
            return function(*args, **kwargs)

        return count

    routers = ((router, "forward", "router") for router in (GateRouter, LowRankRouter, OracleRouter))
    for owner, name, said in ((RoutedNeurons, "__call__", "native"), *routers):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), said))

    def of(call):
        seen.clear()
        call()
        return list(seen)

    return of


@pytest.mark.parametrize(("kind", "host"), [(kind, host) for kind in ROUTERS for host in HOSTS if (kind, host) != ("gate", "plain")])
@pytest.mark.parametrize("rule", [Threshold(theta=0.2), TopK(k=5)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("shape", [(D,), (1, D), (2, 8, D), (2, 9, D), (70, D)], ids=str)
def test_native_call_equals_its_pieces_and_counts_the_same(calls, kind, host, rule, shape):
    net, x = neuron_net(kind, host=host, rule=rule, always_on=(3,)), torch.randn(shape)
    is_few = x.numel() <= MOST_TOKENS * D
    with torch.no_grad():
        with record_active(net) as stats:
            assert calls(lambda: net(x)) == (["native"] if is_few else ["router"])
            found = net(x)
        set_impl(net, "reference")
        with record_active(net) as again:
            assert calls(lambda: net(x)) == ["router"]
            expected = net(x)
    torch.testing.assert_close(found, expected)
    assert stats.per_layer() == again.per_layer()
    assert stats.active_fraction() < 1


@KINDS
@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bf16_and_int8_layers_run_natively(calls, kind, dtype, is_int8):
    net = neuron_net(kind, rule=TopK(k=F)).to(dtype)  # all of them, so that no score at the level is rounded to the other side
    if is_int8:
        quantize(net)
    net.mlp.moe.lay_out()
    x = torch.randn(2, D).to(dtype)
    with torch.no_grad():
        assert calls(lambda: net(x)) == ["native"]
        found = net(x)
        set_impl(net, "reference")
        tolerance = 1e-5 if dtype is torch.float32 else 3e-2
        torch.testing.assert_close(found, net(x), rtol=tolerance, atol=tolerance)


@KINDS
def test_a_whole_model_generates_the_same(calls, kind):
    model = tiny_llama().eval()
    sites = find_ffn_sites(model, tiny_inputs())
    convert(model, ConvertConfig(expert_size=1, router=ROUTERS[kind], rule=Threshold(theta=0.0)), sites=sites)
    for layer in moe_layers(model).values():
        for tensor in (*layer.router.parameters(), *layer.router.buffers()):
            tensor.detach().copy_(torch.rand_like(tensor) + 0.5)
    set_rule(model, TopK(k=sites[0].d_ff // 2))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert set(calls(lambda: model(ids))) == {"native"}
        native = model(ids).logits
        set_impl(model, "reference")
        torch.testing.assert_close(native, model(ids).logits)


def another_buffer(net):
    net.mlp.moe.router.scale_F = torch.linspace(5, 0.1, F)


CHANGES = {
    "rule": lambda net: set_rule(net, TopK(k=20)),
    "always on": lambda net: setattr(net.mlp.moe, "always_on", tuple(range(F))),
    "gate's weight": lambda net: setattr(net.mlp.gate, "weight", nn.Parameter(torch.randn(F, D))),
    "down's data": lambda net: setattr(net.mlp.down.weight, "data", 3 * net.mlp.down.weight.data),
    "down's values": lambda net: net.mlp.down.weight.mul_(3),
    "projection's hook": lambda net: net.mlp.up.register_forward_hook(lambda _m, _a, out: 2 * out),
    "router's hook": lambda net: net.mlp.moe.router.register_forward_hook(lambda _m, _a, scores_TE: scores_TE.flip(1)),
    "router's pre-hook": lambda net: net.mlp.moe.router.register_forward_pre_hook(lambda _m, args: (-args[0], args[1])),
    "router's buffer": another_buffer,
    "router's buffer's values": lambda net: net.mlp.moe.router.scale_F.copy_(torch.linspace(5, 0.1, F)),
    "router's config": lambda net: setattr(net.mlp.moe, "router", build_router(GateRouterConfig(), site=net.mlp.moe.site, num_experts=F)),
}


@KINDS
@SPLITS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_native_call_sees_what_changes_after_it_was_made(change, num_tokens, kind):
    if kind == "oracle" and change in (CHANGES["router's buffer"], CHANGES["router's buffer's values"]):
        pytest.skip("it has no buffer")
    net, x_TD = neuron_net(kind), torch.randn(num_tokens, D)
    with torch.no_grad():
        before = net(x_TD)
        assert isinstance(net.mlp.moe._native.routed, RoutedNeurons)
        change(net)
        found = net(x_TD)
        set_impl(net, "reference")
        torch.testing.assert_close(found, net(x_TD))
    assert not torch.allclose(found, before)


def test_low_rank_native_call_sees_its_routers_layers():
    net, x_TD = neuron_net("lowrank"), torch.randn(3, D)
    router = net.mlp.moe.router
    with torch.no_grad():
        net(x_TD)
        made = net.mlp.moe._native
        net(x_TD)
        assert net.mlp.moe._native is made
        for change in (
            lambda: setattr(router, "up", copy.deepcopy(router.up)),
            lambda: setattr(router.gate, "weight", nn.Parameter(-router.gate.weight)),
            lambda: setattr(router, "up_std_F", 2 * router.up_std_F),
        ):
            change()
            net(x_TD)
            assert net.mlp.moe._native is not made
            made = net.mlp.moe._native
        router.up.register_forward_hook(lambda _m, _a, out: -out)
        found = net(x_TD)
        assert net.mlp.moe._native is None
        set_impl(net, "reference")
        torch.testing.assert_close(found, net(x_TD))


@KINDS
def test_native_call_is_left_where_it_would_not_do_what_the_pieces_do(calls, kind):
    net, x_TD = neuron_net(kind), torch.randn(2, D)
    assert calls(lambda: net(x_TD)) == ["router"], "its weights want gradients"
    with torch.no_grad():
        assert calls(lambda: net(x_TD)) == ["native"]
        assert calls(lambda: net.train()(x_TD)) == ["router"]
        net.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(lambda: net(x_TD)) == ["router"]
        for module in (net.mlp.up, net.mlp.down, net.mlp.moe.router):
            hook = module.register_forward_hook(lambda *_: None)
            assert calls(lambda: net(x_TD)) == ["router"]
            hook.remove()
            assert calls(lambda: net(x_TD)) == ["native"]
        set_impl(net, "grouped")
        assert calls(lambda: net(x_TD)) == ["router"]
        set_impl(net, "cpu")
        assert calls(lambda: net(x_TD)) == ["native"]
        assert calls(lambda: net(torch.randn(MOST_TOKENS + 1, D))) == ["router"]
        set_impl(net, "auto")
        set_rule(net, NormBudget(beta=0.5))
        assert calls(lambda: net(x_TD)) == ["router"]
        set_mode(net, "dense")
        assert calls(lambda: net(x_TD)) == []


@KINDS
def test_experts_of_more_than_one_neuron_run_as_before(calls, kind):
    net = neuron_net(kind, num_experts=5, rule=TopK(k=2))
    with torch.no_grad():
        assert calls(lambda: net(torch.randn(2, D))) == ["router"]


@KINDS
def test_compiled_graphs_hold_the_pieces(kind):
    net, x_TD = neuron_net(kind), torch.randn(2, D)
    with torch.no_grad():
        expected = net(x_TD)
        graph = torch.export.export(net, (x_TD,))
        torch.testing.assert_close(graph.module()(x_TD), expected)


@KINDS
def test_native_call_is_neither_copied_nor_pickled_nor_kept_over_a_cast(kind):
    net, x_TD = neuron_net(kind), torch.randn(2, D)
    with torch.no_grad():
        expected = net(x_TD)
        assert net.mlp.moe._native is not None
        assert copy.deepcopy(net).mlp.moe._native is None
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x_TD), expected)
        net.double()
    assert net.mlp.moe._native is None


@KINDS
def test_native_refusal_says_what_runs(kind, monkeypatch):
    net, x_TD = neuron_net(kind), torch.randn(2, D)
    moe = net.mlp.moe

    def reason(x=x_TD):
        refusal = moe.native_refusal(x)
        with torch.no_grad():
            moe._calls.clear()
            assert (moe._decide(net.mlp.up, x).whole is None) == (refusal is not None)
        return refusal

    with torch.no_grad():
        assert reason() is None
        assert reason(torch.randn(MOST_TOKENS + 1, D)) == f"{MOST_TOKENS + 1} tokens are more than {MOST_TOKENS}"
        assert "it is for the CPU or a GPU" in moe.native_refusal(x_TD.to("meta"))
        assert "the weights must be torch.bfloat16" in reason(x_TD.bfloat16())
        moe.rule = NormBudget.all_on()
        assert "no native call knows the rule" in reason()
        moe.rule = TopK(k=2)
        hook = moe.router.register_forward_hook(lambda *_: None)
        assert reason() == "the router has hooks"
        hook.remove()
        hook = net.mlp.up.register_forward_hook(lambda *_: None)
        assert reason() == "'up' has a forward hook"
        hook.remove()
        net.train()
        assert reason() == "the layer trains"
        net.eval()
        monkeypatch.setattr(cpu, "unavailable", lambda: "the compiled library is missing")
        assert moe.native_refusal(x_TD) == "the compiled library is missing"
        monkeypatch.undo()
        set_mode(net, "dense")
        assert moe.native_refusal(x_TD) == "the layer runs dense"


def test_native_refusal_of_a_norm_router_knows_the_crossovers():
    net = neuron_net("gate")
    moe = net.mlp.moe
    moe.router = build_router(NormRouterConfig(width=3), site=moe.site, num_experts=F).requires_grad_(False)
    with torch.no_grad():
        assert moe.native_refusal(torch.randn(1, D)) is None
        assert "tokens are more than 64" in moe.native_refusal(torch.randn(65, D))
        moe.impl = "cpu"
        assert moe.native_refusal(torch.randn(65, D)) is None


def test_doctor_says_that_single_neurons_are_one_call(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", dict)
    said = doctor.doctor()["neuron_ffn"]
    assert said == f"router 'gate', 'lowrank' or 'oracle' (topk), rule and kept neurons are one call, up to {MOST_TOKENS} tokens"
    monkeypatch.setattr(cpu, "unavailable", lambda: "the compiled library is missing")
    assert doctor._neuron_ffn() == "the compiled library is missing"
