"""Linear layers replaced by MLPs: sizes, layouts of fused layers, what must be refused."""

import copy

import pytest
import torch
from torch import nn

from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.sites import (
    ACTIVATIONS,
    FusedProjection,
    ProjectionMLP,
    ProjectionPart,
    ProjectionRecord,
    find_ffn_sites,
    projection_width,
    replaced_projections,
)
from moeify.sites.projection import activation_name, check_replaceable, keep_rows, load_tensors, record_of, replacement_of, runs_of

CPU = torch.device("cpu")


def interleaved(*, heads=2, head_width=4, d_in=8, keep=()):
    """[q k v] of each head, one after the other."""
    parts = tuple(
        ProjectionPart(name=name, rows=((i * head_width, head_width, 3 * head_width, heads),), width=None if name in keep else 3)
        for i, name in enumerate("qkv")
    )
    return ProjectionRecord(name="qkv", d_in=d_in, d_out=3 * heads * head_width, bias=True, parts=parts)


@pytest.mark.parametrize(
    ("d_in", "d_out", "factor", "width"),
    [
        pytest.param(768, 768, 1.0, 384, id="the authors'"),
        pytest.param(384, 384, 1.0, 192, id="MiniLM"),
        pytest.param(576, 192, 1.0, 144, id="narrow k: 576 * 192 / 768"),
        pytest.param(7, 7, 1.0, 4, id="a half is rounded up, as (49 + 7) / 15 = 3.73 is"),
        pytest.param(768, 768, 0.5, 192, id="half the cost"),
        pytest.param(1, 1, 0.1, 1, id="never none"),
    ],
)
def test_width_of_equal_cost(d_in, d_out, factor, width):
    assert projection_width(d_in, d_out, factor) == width


def test_square_layers_have_the_authors_width():
    assert [projection_width(d, d) for d in range(1, 300)] == [round((d * d + d) / (2 * d + 1)) for d in range(1, 300)]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_cost_is_refused(factor):
    with pytest.raises(ConfigError, match="flops_factor"):
        projection_width(8, 8, factor)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "shifted_relu:0.5"])
def test_an_mlp_computes_its_formula_and_names_its_function(name):
    mlp = ProjectionMLP(6, 5, width=4, activation=name)
    x = torch.randn(2, 3, 6)
    wanted = ACTIVATIONS[name](x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), wanted)
    assert activation_name(copy.deepcopy(mlp).act) == name
    assert (mlp.in_features, mlp.out_features, mlp.width) == (6, 5, 4)


def test_the_guard_fits_no_linear_layer_and_takes_no_gradient():
    mlp = ProjectionMLP(6, 5, width=4, dtype=torch.bfloat16)
    assert mlp.weight.shape == (1,)
    assert not mlp.weight.requires_grad
    assert mlp.weight.dtype is torch.bfloat16
    assert mlp.half().weight.dtype is torch.float16
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(6, 5).load_state_dict(mlp.state_dict(), strict=False)


@pytest.mark.parametrize(
    ("index", "runs"),
    [
        pytest.param(range(4, 10), ((4, 6, 6, 1),), id="one block"),
        pytest.param([0, 1, 6, 7, 12, 13], ((0, 2, 6, 3),), id="per head"),
        pytest.param([0, 1, 4, 5, 6], ((0, 2, 2, 1), (4, 3, 3, 1)), id="irregular"),
        pytest.param([3, 5, 7, 8], ((3, 1, 2, 2), (7, 2, 2, 1)), id="single rows"),
    ],
)
def test_runs_are_compact_and_lossless(index, runs):
    assert runs_of(torch.tensor(list(index))) == runs
    assert ProjectionPart(name="q", rows=runs, width=None).index_N().tolist() == list(index)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fused_layer_puts_its_outputs_back_in_order(device):
    linear, record = nn.Linear(8, 24), interleaved(keep="kv")
    with torch.device(device):  # as a skeleton is built: the order must be there all the same
        fused = replacement_of(record, device=CPU, dtype=torch.float32)
    keep_rows(fused, linear)
    x = torch.randn(5, 8)
    y, wanted = fused(x), linear(x)
    q = record.parts[0].index_N()
    torch.testing.assert_close(y[:, q], fused.q(x))
    others = [i for i in range(24) if i not in q.tolist()]
    torch.testing.assert_close(y[:, others], wanted[:, others])
    assert isinstance(fused.q, ProjectionMLP)
    assert type(fused.k) is nn.Linear
    assert record_of("qkv", fused) == record
    assert list(record.mlps) == ["qkv.q"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"parts": ()}, "a width, or parts", id="neither"),
        pytest.param({"width": 3}, "a width, or parts", id="both"),
        pytest.param({"d_out": 25}, "not its 25 outputs", id="an output is missing"),
        pytest.param({"activation": "rleu"}, "did you mean 'relu'", id="function"),
        pytest.param({"parts": interleaved(keep="q").parts[:1] + interleaved(keep="kv").parts[1:]}, "keeps all", id="nothing replaced"),
    ],
)
def test_a_record_that_fits_nothing_is_refused(change, message):
    options = {"name": "qkv", "d_in": 8, "d_out": 24, "bias": True, "parts": interleaved().parts} | change
    with pytest.raises(ConfigError, match=message):
        ProjectionRecord(**options)


def test_tensors_are_loaded_and_what_does_not_fit_is_named():
    source, target = ProjectionMLP(6, 5, width=4), ProjectionMLP(6, 5, width=4)
    tensors = {key: value for key, value in source.state_dict().items() if key != "weight"}
    load_tensors("q_proj", target, tensors)
    x = torch.randn(3, 6)
    assert torch.equal(source(x), target(x))
    with pytest.raises(CheckpointError, match=r"'q_proj' lacks the tensor 'up\.weight'"):
        load_tensors("q_proj", target, {k: v for k, v in tensors.items() if k != "up.weight"})
    with pytest.raises(CheckpointError, match="has no tensor 'gate'"):
        load_tensors("q_proj", target, tensors | {"gate": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'q_proj\.up\.bias' has shape \(3,\)"):
        load_tensors("q_proj", target, tensors | {"up.bias": torch.zeros(3)})


class Attention(nn.Module):
    """Four layers of which k is narrow, without attention between them."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = ProjectionMLP(8, 4, width=3)
        self.o = ProjectionMLP(4, 8, width=3, activation="gelu")

    def forward(self, x):
        return self.q(x) + self.o(self.k(x))


class Model(nn.Module):
    """One block."""

    def __init__(self):
        super().__init__()
        self.block = Attention()

    def forward(self, x):
        return self.block(x)


def test_replaced_layers_are_sites_whatever_their_width():
    torch.manual_seed(0)
    sites = find_ffn_sites(Model(), {"x": torch.randn(6, 8)})
    found = [(s.name, s.d_model, s.d_ff, s.d_out, s.activation) for s in sites]
    assert found == [("block.k", 8, 3, 4, "relu"), ("block.o", 4, 3, 8, "gelu")]


def test_a_hooked_replacement_is_refused_and_the_others_are_found():
    model = Model()
    model.block.k.up.register_forward_hook(lambda *_: None)
    assert [site.name for site in find_ffn_sites(model, {"x": torch.randn(6, 8)})] == ["block.o"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("block.k", "'block.k' is replaced already", id="twice"),
        pytest.param("block.k.up", "'block.k.up' is a part of 'block.k', which is replaced already", id="a part"),
        pytest.param("block.nothing", "'block.nothing' is no module", id="name"),
        pytest.param("block", "is a Attention, not a plain Linear", id="no layer"),
    ],
)
def test_what_cannot_be_replaced_is_named(name, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_replaceable(Model(), name)


def test_a_layer_in_two_places_is_refused():
    model = Model()
    model.other = Attention()
    model.other.q = model.block.q
    with pytest.raises(UnsupportedModelError, match=r"one module in several places \(block\.q, other\.q\)"):
        check_replaceable(model, "block.q")


def test_a_fused_module_is_itself_no_part():
    model = Model()
    model.block.q = FusedProjection(interleaved())
    assert list(replaced_projections(model)) == ["block.q", "block.k", "block.o"]
