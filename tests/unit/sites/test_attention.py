"""Which layers are q, k, v and o: by data flow, whatever they are called; and what is refused."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from moeify.convert import replace_projections
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.quantize import quantize
from moeify.sites import find_projections

D = 8


class Block(nn.Module):
    """One attention over (B, S, D) whose layers have names that say nothing; subclasses compute it in their own ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(D, D) for _ in range(4))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        # Written in another order than q, k, v.
        v, k, q = self.a(x), self.b(x), self.c(x)
        return x + self.d(self.attend(q, k, v))


class Eager(Block):
    """As written by hand, with the changes in place that models make."""

    def attend(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores /= D**0.5
        scores += torch.zeros_like(scores)
        return torch.softmax(scores, dim=-1) @ v


class Einsum(Block):
    """The scores are a view, changed in place."""

    def attend(self, q, k, v):
        scores = torch.einsum("bqd,bkd->bkq", q, k).transpose(1, 2)
        scores = torch.einsum("bqd,bkd->bqk", q, k)
        scores += 1
        return torch.einsum("bqk,bkd->bqd", F.softmax(scores, dim=-1), v)


class Baddbmm(Block):
    """Bloom's way."""

    def attend(self, q, k, v):
        bias = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
        return torch.bmm(nn.Softmax(dim=-1)(torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5)), v)


class Rotated(Block):
    """Norms, rotations and a scaled query between the layers and attention."""

    def attend(self, q, k, v):
        q, k = F.layer_norm(q, (D,)), F.layer_norm(k, (D,))
        q = q * 0.3
        q, k = (torch.cat([-t[..., D // 2 :], t[..., : D // 2]], dim=-1) for t in (q, k))
        return F.scaled_dot_product_attention(query=q, key=k, value=v)


class SharedKeyValue(Block):
    """Key and value are the same numbers."""

    def forward(self, x):
        kv = self.b(x)
        return self.d(self.attend(self.c(x), kv, kv)) + self.a(x)


class Gated(Block):
    """A fused layer that also gives a gate for attention's output."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, 4 * D)

    def forward(self, x):
        q, k, v, gate = self.a(x).chunk(4, dim=-1)
        return self.d(self.attend(q, k, v) * torch.sigmoid(gate))


class NoOutput(Block):
    """Nothing reads attention but a sum."""

    def forward(self, x):
        return self.attend(self.c(x), self.b(x), self.a(x)) + x


class LearnedQuery(Block):
    """The query is a parameter."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, D))

    def forward(self, x):
        return self.d(self.attend(self.query.expand(len(x), -1, -1), self.b(x), self.a(x)))


class Router(Block):
    """A softmax that is no attention: weights of experts."""

    def forward(self, x):
        weights = torch.softmax(self.a(x), dim=-1)
        return super().forward(x) + (weights.unsqueeze(-2) @ self.b(x).unsqueeze(-1)).squeeze(-1)


class Model(nn.Module):
    """Two blocks in a row."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([kind(), kind()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


INPUTS = {"x": torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))}


def roles(model, **options):
    return {record.name: record.role for record in find_projections(model, INPUTS, **({"attention": "qkvo"} | options))}


@pytest.mark.parametrize("kind", [Block, Eager, Einsum, Baddbmm, Rotated, Router])
def test_roles_are_told_by_data_flow(kind):
    expected = {f"blocks.{i}.{name}": role for i in (0, 1) for name, role in zip("abcd", "vkqo", strict=True)}
    assert roles(Model(kind)) == expected
    assert roles(Model(kind), attention=("k",)) == {name: role for name, role in expected.items() if role == "k"}


def test_the_model_is_left_as_it_was():
    model = Model(Eager).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    find_projections(model, INPUTS, attention="qkvo")
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_sizes_follow_the_layers_and_the_options():
    model = tiny.tiny_llama()
    records = find_projections(model, tiny.tiny_inputs(), attention="qkvo")
    assert records == [replace(record, adds_bias=True) for record in tiny.projection_records(model)]
    half = find_projections(model, tiny.tiny_inputs(), attention="k", flops_factor=0.5, activation="gelu")
    assert [(r.d_in, r.d_out, r.width, r.activation) for r in half] == [(32, 16, 5, "gelu")] * 2


def test_patterns_name_any_linear_layer_and_roles_come_first():
    model = Model(Block)
    found = roles(model, attention="q", patterns=("re:blocks.0.[cd]", "blocks.1.a"))
    assert found == {"blocks.0.c": "q", "blocks.1.c": "q", "blocks.0.d": None, "blocks.1.a": None}
    assert roles(model, attention=(), patterns=("re:.*",)) == {f"blocks.{i}.{name}": None for i in (0, 1) for name in "abcd"}


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        pytest.param(SharedKeyValue, "v", r"'blocks\.0\.b' cannot be split: 8 of its outputs are both k and v", id="k is v"),
        pytest.param(Gated, "q", r"'blocks\.0\.a' cannot be split: 8 of its outputs are none of q, k, v", id="gate"),
        pytest.param(NoOutput, "o", r"the attention in 'blocks\.1' has no linear layer that reads its output", id="no o"),
        pytest.param(LearnedQuery, "qk", r"the attention in 'blocks\.0' has no linear layer that gives its q", id="learned q"),
        pytest.param(nn.Identity, "q", "no attention of Model was seen", id="no attention"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_and_the_way_out_is_named(kind, attention, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_projections(Model(kind), INPUTS, attention=tuple(attention))
    assert "name the layers by pattern" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_not_asked_for_does_not_stand_in_the_way():
    assert roles(Model(SharedKeyValue), attention="qo") == {f"blocks.{i}.{n}": r for i in (0, 1) for n, r in (("c", "q"), ("d", "o"))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "no projection is named", id="nothing"),
        pytest.param({"attention": ("q", "query")}, "some of q, k, v, o, got 'query'", id="role"),
        pytest.param({"patterns": ("blocks.0.aa",)}, r"'blocks\.0\.aa' matches no linear layer; did you mean 'blocks\.0\.a'", id="name"),
        pytest.param({"patterns": ("re:blocks.7.*",)}, r"'re:blocks\.7\.\*' matches no linear layer", id="pattern"),
        pytest.param({"patterns": ("re:(",)}, "is not a regular expression", id="regular expression"),
        pytest.param({"patterns": ("blocks.0.a",), "flops_factor": 0.0}, "flops_factor", id="factor"),
        pytest.param({"patterns": ("blocks.0.a",), "activation": "rel"}, "did you mean 'relu'", id="function"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=message):
        find_projections(Model(Block), INPUTS, **options)


def thinned(model):
    model.model.layers[0].self_attn.q_proj.channels = nn.Identity()  # what a thinned layer is known by
    return model


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        pytest.param(tiny.replaced_llama, "re:.*0.*q_proj", r"q_proj' is replaced already", id="replaced"),
        pytest.param(lambda: tiny.convert_tiny(tiny.tiny_llama()), "re:.*0.mlp.up_proj", "belongs to the converted FFN", id="converted"),
        pytest.param(lambda: thinned(tiny.tiny_llama()), "re:.*0.*q_proj", "skips input channels", id="thinned"),
    ],
)
def test_a_match_on_what_is_changed_already_is_refused(make, pattern, message):
    with pytest.raises(UnsupportedModelError, match=message):
        find_projections(make(), tiny.tiny_inputs(), patterns=(pattern,))


def test_replaced_roles_and_int8_layers_are_refused_by_name():
    with pytest.raises(
        UnsupportedModelError, match=r"'model\.layers\.0\.self_attn\.q_proj\.down' is a part of .*, which is replaced already"
    ):
        find_projections(tiny.replaced_llama(), tiny.tiny_inputs(), attention="q")
    model = tiny.convert_tiny(tiny.tiny_llama())
    quantize(model)
    with pytest.raises(UnsupportedModelError, match="belongs to the converted FFN"):
        find_projections(model, tiny.tiny_inputs(), patterns=("model.layers.0.mlp.up_proj",))


def test_a_tied_layer_is_refused():
    model = Model(Block)
    model.blocks[0].a.weight = model.blocks[1].a.weight
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.a' shares its weight with 'blocks\.1\.a'"):
        find_projections(model, INPUTS, patterns=("blocks.0.a",))


def test_patterns_alone_need_no_forward_and_work_on_a_plain_module():
    model = Model(Block)
    records = find_projections(model, {"nonsense": 1}, patterns=("re:.*a",))
    replace_projections(model, records, None)
    assert model(**INPUTS).shape == (2, 5, D)
