"""Discovery on hand-made modules: what it must see, what it must not believe, and that it leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeify.errors import UnsupportedModelError
from moeify.sites import ACTIVATIONS, FFNSite, discover, find_ffn_sites

D_MODEL, D_FF = 12, 30
LINEAR_SHAPES = {"up": (D_MODEL, D_FF), "gate": (D_MODEL, D_FF), "fused": (D_MODEL, 2 * D_FF), "down": (D_FF, D_MODEL)}


class Block(nn.Module):
    """A residual FFN whose hidden activations are any function of its projections, given as ``hidden(block, x)``."""

    def __init__(self, hidden, *, leaves=("up", "down"), **shapes):
        super().__init__()
        self.hidden = hidden
        for name in leaves:
            setattr(self, name, nn.Linear(*(LINEAR_SHAPES | shapes)[name]))

    def forward(self, x):
        return x + self.down(self.hidden(self, x))


class Stack(nn.Module):
    """Blocks one after the other, then a head that is no FFN."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(D_MODEL, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain(act=F.gelu):
    return Block(lambda b, x: act(b.up(x)))


def inputs(scale=1.0, tokens=6):
    return {"x": torch.randn(2, tokens, D_MODEL, generator=torch.Generator().manual_seed(1)) * scale}


def only_reason(model, **kwargs):
    found = discover(model, kwargs or inputs())
    assert not found.sites
    assert len(found.refused) == 1
    return found.refused[0].reason


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["inputs of size 1", "inputs so small that all activations look alike"])
def test_discover_tells_every_activation_from_its_neighbours(name, scale):
    model = Stack(plain(ACTIVATIONS[name]))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3 * scale)

    (site,) = find_ffn_sites(model, inputs(scale))

    assert site == FFNSite(
        name="blocks.0", up="blocks.0.up", down="blocks.0.down", activation=name, d_model=D_MODEL, d_ff=D_FF, d_out=D_MODEL
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_discover_in_other_dtypes_tells_near_activations_apart(name, dtype):
    model = Stack(plain(ACTIVATIONS[name])).to(dtype)
    (site,) = find_ffn_sites(model, {"x": inputs()["x"].to(dtype)})
    assert site.activation == name


@pytest.mark.parametrize(
    ("leaves", "hidden", "gate", "fused"),
    [
        pytest.param(("gate", "up", "down"), lambda b, x: F.silu(b.gate(x)) * b.up(x), "blocks.0.gate", None, id="gate called first"),
        pytest.param(("gate", "up", "down"), lambda b, x: b.up(x) * F.silu(b.gate(x)), "blocks.0.gate", None, id="up called first"),
        pytest.param(
            ("fused", "down"), lambda b, x: F.silu(b.fused(x)[..., :D_FF]) * b.fused(x)[..., D_FF:], None, "gate_up", id="gate | up"
        ),
        pytest.param(
            ("fused", "down"), lambda b, x: b.fused(x)[..., :D_FF] * F.silu(b.fused(x)[..., D_FF:]), None, "up_gate", id="up | gate"
        ),
    ],
)
def test_discover_on_a_glu_tells_gate_from_up(leaves, hidden, gate, fused):
    (site,) = find_ffn_sites(Stack(Block(hidden, leaves=leaves)), inputs())
    assert (site.gate, site.fused, site.activation) == (gate, fused, "silu")
    assert site.is_gated


def sliced(b, x):
    return F.silu(b.fused(x)[..., :D_FF]) * b.fused(x)[..., D_FF:]


EXPLICIT = {
    "slices": ("fused", sliced),
    "split": ("fused", lambda b, x: F.silu((h := b.fused(x).split([D_FF, D_FF], -1))[0]) * h[1]),
    "view": ("up", lambda b, x: F.relu(b.up(x).view(-1, D_FF)).view(*x.shape[:-1], D_FF)),
    "assert": ("up", lambda b, x: F.relu(b.checked(b.up(x)))),
    "rows": ("up", lambda b, x: F.relu(b.up(x).view(x.shape[0], -1)).view(x.shape[0], -1, D_FF)),
}
NARROW = {
    "chunk": ("fused", lambda b, x: F.silu((h := b.fused(x).chunk(2, -1))[0]) * h[1]),
    "view by shape": ("up", lambda b, x: F.relu((h := b.up(x)).view(-1, h.shape[-1])).view(h.shape)),
}


@pytest.mark.parametrize("name", [*EXPLICIT, *NARROW])
def test_discover_tells_code_with_explicit_sizes_from_code_that_takes_any_width(name):
    def checked(h):
        assert h.shape[-1] == D_FF
        return h

    first, hidden = (EXPLICIT | NARROW)[name]
    block = Block(hidden, leaves=(first, "down"))
    block.checked = checked
    model = Stack(plain(), block, plain())
    sites = find_ffn_sites(model, inputs(tokens=D_FF))
    assert [site.explicit_width for site in sites] == [False, name in EXPLICIT, False]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_discover_lists_sites_in_execution_order():
    class Backwards(Stack):
        def forward(self, x):
            return self.blocks[0](self.blocks[1](x))

    sites = find_ffn_sites(Backwards(plain(), plain(F.relu)), inputs())

    assert [site.activation for site in sites] == ["relu", "gelu"]


def test_discover_on_a_layer_called_twice_finds_one_site():
    shared = plain()
    assert len(find_ffn_sites(Stack(shared, shared), inputs())) == 1


def test_discover_on_a_sequential_names_the_module_around_it():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(inplace=True), nn.Linear(D_FF, D_MODEL))

        def forward(self, x):
            return x + self.ffn(x)

    (site,) = find_ffn_sites(Stack(Layer()), inputs())

    assert (site.name, site.up, site.down) == ("blocks.0", "blocks.0.ffn.0", "blocks.0.ffn.2")


def test_discover_when_the_residual_is_added_in_place_finds_the_site():
    class InPlace(Block):
        def forward(self, x):
            y = self.down(self.hidden(self, x))
            y += x
            return y

    assert len(find_ffn_sites(Stack(InPlace(lambda b, x: F.gelu(b.up(x)))), inputs())) == 1


def keep_largest(h):
    return torch.where(h >= h.topk(5, dim=-1).values[..., -1:], h, torch.zeros_like(h))


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [
        pytest.param(lambda b, x: F.layer_norm(F.gelu(b.up(x)), (D_FF,)), "not independent", id="norm over the neurons"),
        pytest.param(lambda b, x: keep_largest(F.relu(b.up(x))), "not independent", id="top-k over the neurons"),
        pytest.param(lambda b, x: F.silu(b.up(x) * 0.9), "unknown activation", id="multiplier"),
        pytest.param(lambda b, x: F.prelu(b.up(x), torch.tensor(0.3)), "unknown activation", id="parameter"),
        pytest.param(lambda b, x: torch.tanh(b.up(x)), "unknown activation", id="tanh"),
        pytest.param(lambda b, x: F.gelu(b.up(x)).cumsum(1), "tokens mix", id="tokens mix"),
        pytest.param(lambda b, x: F.relu(b.up(x)).clamp(max=7.0), "differs at larger values", id="a limit out of the example's reach"),
        pytest.param(lambda b, x: F.gelu(b.up(x)) / 0.0, "non-finite", id="infinite"),
    ],
)
def test_discover_on_what_is_not_elementwise_refuses_with_the_reason(hidden, reason):
    assert reason in only_reason(Stack(Block(hidden)))


def test_discover_when_neurons_are_read_twice_refuses_that_site_alone():
    class Leaky(Block):
        def forward(self, x):
            h = self.hidden(self, x)
            return x + self.down(h) + h.sum(-1, keepdim=True)

    found = discover(Stack(plain(), Leaky(lambda b, x: F.gelu(b.up(x))), plain()), inputs())

    assert [site.name for site in found.sites] == ["blocks.0", "blocks.2"]
    assert [(r.path, r.reason) for r in found.refused] == [("blocks.1", "its neurons are read by something else than the down projection")]


def test_discover_when_the_weight_is_not_all_of_a_projection_refuses():
    class FalconLinear(nn.Linear):  # a class that is trusted by name
        def forward(self, x):
            return super().forward(x) * 1.1

    block = plain()
    block.down = FalconLinear(D_FF, D_MODEL)
    assert "more than multiply by their weights" in only_reason(Stack(block))


def test_discover_on_a_subclass_of_linear_refuses_it_by_name():
    class Odd(nn.Linear):
        pass

    block = plain()
    block.up = Odd(D_MODEL, D_FF)
    assert only_reason(Stack(block)) == "'up' is a Odd, not a plain Linear or Conv1D"


def test_discover_on_an_adapter_refuses_although_it_still_adds_nothing():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.a, self.b = base, nn.Linear(D_MODEL, 2), nn.Linear(2, D_FF, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base_layer(x) + self.b(self.a(x))

    block = plain()
    block.up = Adapter(block.up)
    assert "adapter" in only_reason(Stack(block))

    nn.init.ones_(block.up.b.weight)
    assert "adapter" in only_reason(Stack(block))


def test_discover_on_a_hooked_projection_refuses():
    block = plain()
    block.up.register_forward_hook(lambda module, args, output: None)
    assert only_reason(Stack(block)) == "'up' has a forward hook"


def test_discover_on_tied_weights_refuses_every_owner():
    first, second = plain(), plain()
    second.up.weight = first.up.weight
    found = discover(Stack(first, second), inputs())
    assert not found.sites
    assert [r.reason for r in found.refused] == ["'up' shares its weight with another module"] * 2


def test_discover_on_two_ffns_in_one_module_keeps_the_first():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)
            self.c, self.d = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)

        def forward(self, x):
            return self.d(F.relu(self.c(x + self.b(F.relu(self.a(x))))))

    found = discover(Stack(Twice()), inputs())

    assert [site.up for site in found.sites] == ["blocks.0.a"]
    assert "a second FFN in the same module" in found.refused[0].reason


def test_discover_on_a_head_that_changes_the_width_refuses_it():
    block = Block(lambda b, x: F.gelu(b.up(x)), down=(D_FF, 5))
    block.forward = lambda x: block.down(block.hidden(block, x))
    model = nn.ModuleDict({"block": plain(), "head": block})
    model.forward = lambda x: model["head"](model["block"](x))

    found = discover(model, inputs())

    assert [site.name for site in found.sites] == ["block"]
    assert [(r.path, r.reason) for r in found.refused] == [
        ("head", f"not an FFN of the residual stream: reads width {D_MODEL}, writes width 5")
    ]


def test_discover_on_a_pooling_head_refuses_it():
    class Pooled(Stack):
        def __init__(self):
            super().__init__(plain(), plain())
            self.pool = plain()

        def forward(self, x):
            return self.pool(self.blocks[1](self.blocks[0](x))[:, 0])

    found = discover(Pooled(), inputs())

    assert [site.name for site in found.sites] == ["blocks.0", "blocks.1"]
    assert [r.path for r in found.refused] == ["pool"]


class RoutedList(nn.Module):
    """Top-1 MoE with a module per expert and a shared FFN."""

    def __init__(self):
        super().__init__()
        self.router, self.shared = nn.Linear(D_MODEL, 3), plain()
        self.experts = nn.ModuleList(plain() for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, -2)
        choice, y = self.router(flat).argmax(-1), self.shared(flat)
        for e, expert in enumerate(self.experts):
            if (choice == e).any():
                y = y.index_add(0, (choice == e).nonzero()[:, 0], expert(flat[choice == e]))
        return y.view_as(x)


class RoutedBank(nn.Module):
    """MoE whose experts are slices of 3-D parameters."""

    def __init__(self):
        super().__init__()
        self.shared, self.experts = plain(), nn.Module()
        self.experts.w = nn.Parameter(torch.randn(3, D_FF, D_MODEL))
        self.experts.forward = lambda x: torch.einsum("bsd,efd,efc->bsc", x, self.experts.w, self.experts.w).tanh()

    def forward(self, x):
        return self.shared(x) + self.experts(x)


@pytest.mark.parametrize("moe", [RoutedList, RoutedBank])
@pytest.mark.parametrize("tokens", [6, 100])
def test_discover_on_a_native_moe_refuses_experts_and_shared_ffn(moe, tokens):
    found = discover(Stack(plain(), moe()), inputs(tokens=tokens))

    assert [site.name for site in found.sites] == ["blocks.0"]
    assert {r.path for r in found.refused} == {"blocks.1.experts", "blocks.1.shared"}
    assert all(r.reason.startswith("native MoE") for r in found.refused)


def test_discover_on_an_ffn_beside_a_stack_with_native_moe_finds_it():
    class Projected(Stack):
        def __init__(self):
            super().__init__(RoutedBank(), plain())
            self.projector = plain()

        def forward(self, x):
            return super().forward(self.projector(x))

    assert [site.name for site in discover(Projected(), inputs()).sites] == ["projector", "blocks.1"]


def test_find_ffn_sites_when_there_is_none_names_the_near_misses_of_a_stack_once():
    norm = [Block(lambda b, x: F.layer_norm(F.gelu(b.up(x)), (D_FF,))) for _ in range(3)]
    with pytest.raises(UnsupportedModelError, match=r"no FFN of Stack can be converted: 'blocks\.\*' \(3 of them\): its neurons are not"):
        find_ffn_sites(Stack(*norm), inputs())


def test_find_ffn_sites_when_nothing_resembles_an_ffn_says_so():
    with pytest.raises(UnsupportedModelError, match="no two of its linear layers"):
        find_ffn_sites(Stack(), inputs())


def test_find_ffn_sites_on_meta_weights_raises():
    with torch.device("meta"):
        model = Stack(plain())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        find_ffn_sites(model, inputs())


def test_discover_on_a_large_example_samples_it():
    assert len(find_ffn_sites(Stack(plain()), inputs(tokens=300))) == 1


def test_discover_with_a_single_token_finds_the_site():
    assert len(find_ffn_sites(Stack(plain(), plain()), {"x": torch.randn(1, 1, D_MODEL)})) == 2


def test_an_ffn_whose_neurons_are_silent_is_left_out_with_a_warning_that_names_it():
    silent = Block(lambda b, x: F.relu(b.gate(x)) * b.up(x), leaves=("gate", "up", "down"))
    nn.init.constant_(silent.gate.bias, -100.0)
    with pytest.warns(UserWarning, match=r"'blocks\.1' is left as it is: its neurons are all zero in the probe forward"):
        sites = find_ffn_sites(Stack(plain(), silent), inputs())
    assert [site.name for site in sites] == ["blocks.0"]
    with pytest.raises(UnsupportedModelError, match="its neurons are all zero in the probe forward"):
        find_ffn_sites(Stack(silent), inputs())
