"""The executor of channel sparsity in real models."""

import copy
import dataclasses
import math
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from ffn_cases import needs_library
from numerics import assert_as_accurate_as_torch
from tiny import tiny_inputs, tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify import channels
from moeify.channels import SparseInput, attach_channels, detach_channels, record_channels, sparse_inputs
from moeify.controls import set_impl, set_mode, token_mask
from moeify.errors import ConfigError, KernelError, UnsupportedModelError
from moeify.kernels.cpu_linear import SparseGated, SparseLinear
from moeify.select import Threshold, TopK
from moeify.sites import find_linear_sites


def thinned(*, level=0.0, rule=None, first_dense=0):
    model, inputs = tiny_llama().eval(), tiny_inputs()
    for site in find_linear_sites(model, inputs):
        executor = SparseInput(site, rule=rule, first_dense=first_dense)
        executor.level_K.fill_(level)
        attach_channels(model, executor)
    return model, inputs


@torch.no_grad()
def test_at_level_zero_the_model_is_the_dense_one_and_nothing_is_skipped():
    model, inputs = thinned()
    with record_channels(model) as recorder:
        found = model(**inputs).logits
    assert recorder.skipped_frac() == 0
    torch.testing.assert_close(found, tiny_llama().eval()(**inputs).logits)
    set_impl(model, "masked")
    torch.testing.assert_close(model(**inputs).logits, tiny_llama().eval()(**inputs).logits)


@torch.no_grad()
def test_padding_is_not_counted_where_a_mask_tells():
    model, inputs = thinned(level=0.05)
    ids, mask = inputs["input_ids"], torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    kept = {name: [] for name in sparse_inputs(model)}
    for name, executor in sparse_inputs(model).items():
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda _m, args, n=name, e=executor: kept[n].append(args[0].abs() >= e.level_K))
    with record_channels(model) as recorder, token_mask(model, mask):
        model(input_ids=ids, attention_mask=mask)
    skipped = {name: 1 - one[mask.bool()].float().mean().item() for name, (one,) in kept.items()}
    everywhere = {name: 1 - one.float().mean().item() for name, (one,) in kept.items()}
    assert recorder.per_layer() == pytest.approx(skipped) != pytest.approx(everywhere)
    costs = {name: executor.site.d_in * executor.site.d_out for name, executor in sparse_inputs(model).items()}
    assert recorder.skipped_frac() == pytest.approx(sum(costs[n] * s for n, s in skipped.items()) / sum(costs.values()))
    with record_channels(model) as recorder, token_mask(model, torch.ones(1, 3)):  # of other tokens
        model(input_ids=ids, attention_mask=mask)
    assert recorder.per_layer() == pytest.approx(everywhere)
    with record_channels(model) as recorder, token_mask(model, torch.zeros(2, 9)):
        model(input_ids=ids, attention_mask=mask)
    assert all(math.isnan(share) for share in recorder.per_layer().values())
    with pytest.raises(ValueError, match="the token mask leaves none"):
        recorder.skipped_frac()


@torch.no_grad()
@pytest.mark.parametrize("rule", [None, TopK(k=5)])
def test_a_sparse_layer_is_the_dense_one_on_a_masked_input(rule):
    model, _ = thinned(level=0.05, rule=rule)
    executor = next(iter(sparse_inputs(model).values()))
    linear = model.get_submodule(executor.site.name)
    x = torch.randn(2, 7, executor.site.d_in)
    keep = x.abs() >= 0.05
    if rule is not None:
        keep = torch.zeros_like(keep).scatter_(-1, x.abs().topk(5, dim=-1).indices, True)
    with record_channels(model) as recorder:
        found = linear(x)
    torch.testing.assert_close(found, torch.nn.functional.linear(x * keep, linear.weight, linear.bias))
    assert recorder.per_layer() == {executor.site.name: pytest.approx(1 - keep.float().mean().item())}
    set_mode(model, "dense")
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    set_mode(model, "moe")
    torch.testing.assert_close(linear(x), found)


@torch.no_grad()
def test_the_first_positions_stay_dense_but_a_single_one_is_no_start():
    model, _ = thinned(level=1e9, first_dense=2)
    executor = next(iter(sparse_inputs(model).values()))
    x = torch.randn(3, 5, executor.site.d_in)
    assert executor.select(x).any(-1).tolist() == [[True, True, False, False, False]] * 3
    assert not executor.select(x[:, :1]).any()


def test_gradients_reach_the_weights_and_the_kept_channels():
    model, inputs = thinned(level=0.05)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_the_buffer_is_all_that_a_checkpoint_gets_and_detach_takes_it_away():
    model, inputs = thinned(level=0.05)
    dense = tiny_llama().eval()
    extra = set(model.state_dict()) - set(dense.state_dict())
    assert {key.rpartition(".channels.")[2] for key in extra} == {"level_K"}
    assert len(extra) == len(sparse_inputs(model))
    detach_channels(model)
    assert set(model.state_dict()) == set(dense.state_dict()) and not sparse_inputs(model)
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)


def a_layer(model):
    executor = next(iter(sparse_inputs(model).values()))
    return executor, model.get_submodule(executor.site.name)


class CountCalls:
    """Calls of the compiled kernel."""

    def __init__(self, monkeypatch):
        self.number = 0
        call = SparseLinear.__call__

        def counted(linear, x):
            self.number += 1
            return call(linear, x)

        monkeypatch.setattr(SparseLinear, "__call__", counted)

    def during(self, function, *args):
        before = self.number
        out = function(*args)
        return out, self.number - before


@pytest.fixture
def calls(monkeypatch):
    return CountCalls(monkeypatch)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (16,), ()], ids=str)
def test_decoding_calls_the_kernel_and_gives_what_masking_gives(calls, dtype, shape):
    model = thinned(level=0.5, first_dense=1)[0].to(dtype)
    executor, linear = a_layer(model)
    x = torch.randn(*shape, executor.site.d_in).to(dtype)
    found, number = calls.during(linear, x)
    assert number == 1 and executor.masked_reason(linear, x) is None
    expected = torch.nn.functional.linear(torch.where(x.abs() >= 0.5, x, 0), linear.weight, linear.bias)
    torch.testing.assert_close(found, expected)
    with record_channels(model) as recorder:
        recorded, number = calls.during(linear, x)
    assert number == 1
    torch.testing.assert_close(recorded, expected)
    assert recorder.per_layer()[executor.site.name] == pytest.approx((x.abs() < 0.5).float().mean().item())
    set_impl(model, "masked")
    masked, number = calls.during(linear, x)
    assert number == 0 and executor.masked_reason(linear, x) == "asked for by name"
    torch.testing.assert_close(masked, expected)


@needs_library
@torch.no_grad()
def test_other_rules_and_starts_of_sequences_call_the_kernel_on_what_they_leave(calls):
    for options, x in (({"rule": TopK(k=5)}, torch.randn(2, 1, 32)), ({"level": 1.0, "first_dense": 2}, torch.randn(2, 5, 32))):
        model, _ = thinned(**options)
        executor, linear = a_layer(model)
        found, number = calls.during(linear, x)
        assert number == 1
        torch.testing.assert_close(found, torch.nn.functional.linear(torch.where(executor.select(x), x, 0), linear.weight))


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_a_prompt_is_dense_on_what_is_kept_and_leaves_its_input_alone(recorded):
    model, _ = thinned(level=0.5, first_dense=2)
    executor, linear = a_layer(model)
    x = torch.randn(2, 40, executor.site.d_in)
    kept = torch.where((x.abs() >= 0.5) | (torch.arange(40) < 2)[:, None], x, 0)
    before = x.clone()
    with record_channels(model) if recorded else nullcontext():
        found = linear(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, torch.nn.functional.linear(kept, linear.weight, linear.bias))


@needs_library
@pytest.mark.parametrize("why", ["made for decoding", "no gradient", "while training", "autocast", "adapter", "float16", "parametrised"])
def test_what_the_kernel_is_not_for_runs_masked_and_says_why(calls, why):
    model, _ = thinned(level=0.5)
    executor, linear = a_layer(model)
    x = torch.randn(65 if why == "made for decoding" else 2, executor.site.d_in)
    if why == "while training":
        model.train()
    if why == "adapter":
        linear.__class__ = type("LoraLinear", (torch.nn.Linear,), {})
    if why == "float16":
        model, x = model.half(), x.half()
    if why == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(linear)
    with torch.set_grad_enabled(why == "no gradient"), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        reason = executor.masked_reason(linear, x)
        found, number = calls.during(linear, x)
        assert number == 0
        assert {"adapter": "is a LoraLinear", "parametrised": "is a ParametrizedLinear"}.get(why, why) in reason
        torch.testing.assert_close(found, torch.nn.functional.linear(torch.where(x.abs() >= 0.5, x, 0), linear.weight))
        set_impl(model, "cpu")
        if why in ("made for decoding", "while training"):  # asked for by name
            torch.testing.assert_close(calls.during(linear, x), (found, 1))
        else:
            with pytest.raises(KernelError, match="impl 'cpu'"):
                linear(x)


@needs_library
@torch.no_grad()
def test_decoding_that_runs_masked_is_warned_of_once(caplog):
    channels._told.clear()
    model, _ = thinned(level=0.5)
    model.half()
    for _ in range(2):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    assert [(record.levelname, "float16" in record.getMessage()) for record in caplog.records] == [("WARNING", True)]


@needs_library
@torch.no_grad()
def test_a_threshold_scales_the_levels_that_the_compiled_kernel_reads(fused):
    model, mlp = thinned_mlp(of_neurons=0.0)
    x = torch.randn(1, 32)
    at_level = mlp(x)
    for executor in sparse_inputs(model).values():
        executor.rule = Threshold(theta=2.0)
    scaled = mlp(x)
    assert fused == ["gated"] * 2 and not torch.equal(scaled, at_level)
    executor = mlp.up_proj.channels
    assert executor.levels() is executor.levels() and torch.equal(executor.levels(), executor.level_K * 2)
    assert torch.equal(executor.select(x), x.abs() >= executor.level_K * 2)
    set_impl(model, "masked")
    torch.testing.assert_close(mlp(x), scaled, rtol=1e-5, atol=1e-6)
    set_impl(model, "auto")
    for other in sparse_inputs(model).values():
        other.level_K.mul_(0.5)  # in place: what was made for the old levels must not be used
    torch.testing.assert_close(mlp(x), at_level, rtol=1e-5, atol=1e-6)
    for other in sparse_inputs(model).values():
        other.rule = Threshold(theta=0.0)
    torch.testing.assert_close(mlp(x), by_hand(mlp, x, level=0), rtol=1e-5, atol=1e-6)


@needs_library
@torch.no_grad()
def test_a_forward_that_fails_between_the_projections_leaves_nothing_behind(fused):
    _, mlp = thinned_mlp()
    x, h = torch.randn(1, 32), torch.randn(1, mlp.down_proj.in_features)
    alone = mlp.down_proj(h), mlp.gate_proj(x)
    handle = mlp.act_fn.forward
    mlp.act_fn.forward = _fails
    with pytest.raises(ZeroDivisionError):
        mlp(x)
    mlp.act_fn.forward = handle
    assert "gated" not in fused and torch.equal(mlp.down_proj(h), alone[0]) and torch.equal(mlp.gate_proj(x), alone[1])
    mlp(x)
    assert fused[-1] == "gated"


def _fails(*_):
    raise ZeroDivisionError


@needs_library
@torch.no_grad()
def test_a_prompt_that_runs_masked_is_told_of_once(caplog):
    channels._told.clear()
    model, _ = thinned(level=0.5)
    with caplog.at_level("INFO", logger="moeify.channels"):
        for _ in range(2):
            model(input_ids=torch.zeros(1, 65, dtype=torch.long))
    assert [record.getMessage().count("made for decoding") for record in caplog.records] == [1]


@needs_library
@torch.no_grad()
def test_weights_keep_their_name_shape_values_and_identity_when_their_memory_is_ordered():
    dense = tiny_llama().eval()
    model, _ = thinned()
    for name, executor in sparse_inputs(model).items():
        weight = model.get_submodule(name).weight
        assert weight.stride() == (1, executor.site.d_out)
        assert torch.equal(weight, dense.get_submodule(name).weight)
    executor, linear = a_layer(model)
    weight = linear.weight
    copied = copy.deepcopy(model)
    assert copied.get_submodule(executor.site.name).weight.stride() == weight.stride()
    assert copied.get_submodule(executor.site.name).channels.masked_reason(linear, torch.zeros(1, 32)) is None
    pickled = pickle.loads(pickle.dumps(linear))
    assert torch.equal(pickled(torch.ones(1, 32)), linear(torch.ones(1, 32)))
    detach_channels(model)
    assert linear.weight is weight and weight.is_contiguous()


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", ["values", "weight", "data", "level", "dtype", "layout", "hook"])
def test_nothing_stale_is_read_after_a_change(calls, change):
    model, _ = thinned(level=0.5)
    executor, linear = a_layer(model)
    x = torch.randn(1, executor.site.d_in)
    if change == "hook":
        hook = linear.register_forward_hook(lambda *_: None)
        assert calls.during(linear, x)[1] == 0
        hook.remove()
    else:
        assert calls.during(linear, x)[1] == 1
    if change == "values":
        linear.weight.mul_(2)
    elif change == "weight":
        linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))
    elif change == "data":
        linear.weight.data = torch.randn_like(linear.weight)
    elif change == "level":
        executor.level_K = torch.full_like(executor.level_K, 1.0)
    elif change == "dtype":
        model, x = model.bfloat16(), x.bfloat16()
    elif change == "layout":
        linear.weight.data = linear.weight.data.contiguous()
        assert "store_by_input" in executor.masked_reason(linear, x)
    expected = torch.nn.functional.linear(torch.where(x.abs() >= executor.level_K, x, 0), linear.weight)
    found, number = calls.during(linear, x)
    assert number == (change != "layout")
    torch.testing.assert_close(found, expected.to(x.dtype))


def test_levels_are_never_rounded():
    model, _ = thinned(level=0.1)
    model.bfloat16()
    executor, linear = a_layer(model)
    assert executor.level_K.dtype is torch.float32 and torch.equal(executor.level_K, torch.full((32,), 0.1))
    assert linear.weight.dtype is torch.bfloat16
    model.to("meta")
    assert executor.level_K.is_meta and executor.level_K.dtype is torch.float32


@torch.no_grad()
@pytest.mark.parametrize("impl", ["auto", "masked"])
def test_a_number_that_is_none_stays_so(impl):
    model, _ = thinned(level=0.5)
    set_impl(model, impl)
    executor, linear = a_layer(model)
    x = torch.zeros(2, executor.site.d_in)
    x[1, 3] = math.nan
    found = linear(x)
    assert found[0].eq(0).all() and found[1].isnan().all()


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_a_compiled_layer_gives_the_same(recorded):
    model, _ = thinned(level=0.5, first_dense=1)
    executor, linear = a_layer(model)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=not recorded)
    for shape in ((1, 1), (2, 1), (1, 70), (1, 6)):
        x = torch.randn(*shape, executor.site.d_in)
        torch.testing.assert_close(compiled(x), linear(x))


@needs_library
@torch.no_grad()
def test_tracers_and_transformations_see_operators():
    model, _ = thinned(level=0.5)
    executor, linear = a_layer(model)
    x = torch.randn(3, executor.site.d_in)
    torch.testing.assert_close(torch.func.vmap(linear)(x), linear(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x)).shape == (3, executor.site.d_out)


@torch.no_grad()
def test_set_impl_refuses_what_no_layer_knows():
    model, _ = thinned()
    with pytest.raises(ConfigError, match="did you mean 'masked'"):
        set_impl(model, "maskd")
    with pytest.raises(ConfigError, match="unknown name 'gather'"):
        set_impl(model, "gather")


def test_errors_say_what_is_wrong():
    model, _ = thinned()
    site = next(iter(sparse_inputs(model).values())).site
    with pytest.raises(UnsupportedModelError, match="is sparse already"):
        attach_channels(model, SparseInput(site))
    with pytest.raises(ConfigError, match="first_dense must be at least 0"):
        SparseInput(site, first_dense=-1)
    with record_channels(model) as recorder, pytest.raises(ValueError, match="no sparse layer ran"):
        recorder.skipped_frac()
    other = tiny_llama()
    other.get_submodule(site.name).forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        attach_channels(other, SparseInput(site))


# -- a gated FFN as one native call -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """Names of the calls: "gated" for a whole FFN, "linear" for one layer."""
    made = []
    call = SparseLinear.__call__

    def noted(native, x):
        made.append("gated" if isinstance(native, SparseGated) else "linear")
        return call(native, x)

    monkeypatch.setattr(SparseLinear, "__call__", noted)
    return made


def mlp_of(model):
    return model.get_submodule("model.layers.0.mlp")


def projections(mlp):
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def by_hand(mlp, x, level=0.5):
    """The definition, in x's dtype."""
    gate, up, down = (projection.weight.to(x.dtype) for projection in projections(mlp))
    x = torch.where(x.abs() >= level, x, 0)
    h = torch.relu(torch.nn.functional.linear(x, gate)) * torch.nn.functional.linear(x, up)
    return torch.nn.functional.linear(torch.where(h.abs() >= mlp.down_proj.channels.level_K, h, 0), down)


def thinned_mlp(*, of_neurons=0.1, **options):
    model, _ = thinned(level=0.5, **options)
    for executor in sparse_inputs(model).values():
        if executor.site.role == "ffn_hidden":
            executor.level_K.fill_(of_neurons)
    return model, mlp_of(model)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (16,), (1, 1, 2), ()], ids=str)
def test_decoding_runs_a_gated_ffn_as_one_call(fused, dtype, shape):
    model, mlp = thinned_mlp(of_neurons=0.0, first_dense=1)  # a level there would skip other neurons wherever sums round differently
    model, x = model.to(dtype), torch.randn(*shape, 32).to(dtype)
    found = mlp(x)
    assert fused == ["gated"] and mlp.down_proj.channels.gated.separate_reason(x) is None
    set_impl(model, "masked")
    baseline = mlp(x)
    assert fused == ["gated"] and "'masked' was asked for" in mlp.down_proj.channels.gated.separate_reason(x)
    assert_as_accurate_as_torch(found, oracle=by_hand(mlp, x.double()), baseline=baseline)
    set_impl(model, "cpu")
    assert torch.equal(mlp(x), found) and fused == ["gated"] * 2


@needs_library
@torch.no_grad()
def test_neurons_below_their_level_are_skipped_in_one_call(fused):
    _, mlp = thinned_mlp()
    x = torch.randn(5, 32)
    torch.testing.assert_close(mlp(x), by_hand(mlp, x))
    mlp.down_proj.channels.level_K.fill_(math.inf)
    assert mlp(x).eq(0).all() and fused == ["gated"] * 2


def stand_in_the_way(model, mlp, what):
    gate, up, down = projections(mlp)
    if what == "hook":
        up.register_forward_hook(lambda *_: None)
    elif what == "hook between":
        mlp.act_fn.register_forward_pre_hook(lambda _module, args: assert_wide(args[0]))
    elif what == "rule":
        down.channels.rule = TopK(k=2)
    elif what == "another activation":
        mlp.act_fn = torch.nn.ReLU().eval()
    elif what == "hook on the FFN":
        mlp.register_forward_pre_hook(lambda _module, args: assert_wide(mlp.gate_proj(args[0])))
    elif what == "dense layer":
        gate.channels.mode = "dense"
    elif what == "replaced":
        mlp.gate_proj = Doubled(gate)
    elif what == "detached":
        detach_channels(model, [up.channels.site.name])
    elif what == "layout":
        up.weight.data = up.weight.data.contiguous()
    elif what == "training between":
        mlp.act_fn.train()
    elif what == "training":
        mlp.train()
    elif what == "dtype":
        down.double()
        mlp.down_proj.register_forward_pre_hook(lambda _module, args: args[0].double())
    elif what == "unknown activation":
        down.channels.gated._site = dataclasses.replace(down.channels.gated._site, activation="mish")


def assert_wide(h):
    assert h.shape[-1] > 1


class Doubled(torch.nn.Module):
    """An adapter: what it wraps, and as much again."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("hook", "has a hook"),
        ("hook between", "has a hook"),
        ("rule", "has the rule"),
        ("hook on the FFN", "has another hook"),
        ("another activation", "is not the module that was there"),
        ("dense layer", "runs dense"),
        ("replaced", "another module stands in its place"),
        ("detached", "skips no input channels"),
        ("layout", "store_by_input"),
        ("training between", "trains or"),
        ("training", "trains or"),
        ("dtype", "has a hook"),
        ("unknown activation", "does not know the activation 'mish'"),
        ("prompt", "made for decoding"),
        ("start", "the first positions"),
        ("recorder", "records"),
        ("autocast", "autocast"),
    ],
)
def test_a_gated_ffn_whose_layers_must_run_one_by_one_does_and_says_why(fused, what, reason):
    model, mlp = thinned_mlp(first_dense=2 if what == "start" else 0)
    x = torch.randn(1, {"prompt": 65, "start": 3}.get(what, 1), 32)
    mlp(x[:, :1])
    fused.clear()
    gated = mlp.down_proj.channels.gated
    stand_in_the_way(model, mlp, what)
    assert reason in (gated.separate_reason(x) or "") or what in ("recorder", "autocast")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"),
        record_channels(model) if what == "recorder" else nullcontext(),
    ):
        assert reason in gated.separate_reason(x)
        found = mlp(x)
        assert "gated" not in fused
        for executor in sparse_inputs(model).values():
            executor.gated = None
        assert torch.equal(found, mlp(x)) and found.shape == x.shape


@needs_library
def test_gradients_go_through_a_gated_ffn(fused):
    _, mlp = thinned_mlp()
    x = torch.randn(1, 1, 32, requires_grad=True)
    found = mlp(x)
    torch.testing.assert_close(found, by_hand(mlp, x))
    found.sum().backward()
    assert not fused and x.grad.abs().sum() > 0 and all(p.weight.grad is not None for p in projections(mlp))


@needs_library
@torch.no_grad()
def test_a_projection_that_is_called_by_itself_computes_itself(fused):
    _, mlp = thinned_mlp()
    x = torch.randn(1, 1, 32)
    expected = torch.nn.functional.linear(torch.where(x.abs() >= 0.5, x, 0), mlp.gate_proj.weight)
    for _ in range(2):
        torch.testing.assert_close(mlp.gate_proj(x), expected)
        mlp(x)
    assert fused == ["linear", "gated"] * 2
    mlp.register_forward_pre_hook(lambda *_: [mlp.down_proj(torch.zeros(1, 48))].clear())  # somebody runs down first
    torch.testing.assert_close(mlp(x), by_hand(mlp, x))


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", ["values", "weight", "data", "level", "dtype", "mode", "executor", "place"])
def test_no_gated_ffn_reads_what_was_there_before_a_change(fused, change):
    model, mlp = thinned_mlp(of_neurons=0.0)
    x = torch.randn(1, 1, 32)
    mlp(x)
    up = mlp.up_proj
    if change == "values":
        up.weight.mul_(2)
    elif change == "weight":
        up.weight = torch.nn.Parameter(torch.randn_like(up.weight))
    elif change == "data":
        up.weight.data = torch.randn_like(up.weight)
    elif change == "level":
        for projection in (up, mlp.gate_proj):
            projection.channels.level_K = torch.full_like(projection.channels.level_K, 1.0)
    elif change == "dtype":
        model, x = model.bfloat16(), x.bfloat16()
    elif change == "mode":
        set_mode(model, "dense")
        assert torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up(x)))
        set_mode(model, "moe")
    elif change == "executor":
        site = up.channels.site
        detach_channels(model, [site.name])
        mlp(x)
        executor = SparseInput(site)
        executor.level_K.fill_(0.5)
        attach_channels(model, executor)
    elif change == "place":
        other = mlp_of(thinned_mlp()[0]).up_proj
        other.weight.mul_(-3)
        mlp.up_proj = other
    fused.clear()
    found = mlp(x)
    assert fused == (["linear"] * 3 if change == "place" else ["gated"])  # what comes from elsewhere is not asked
    set_impl(model, "masked")
    assert_as_accurate_as_torch(found, oracle=by_hand(mlp, x.double(), 1.0 if change == "level" else 0.5), baseline=mlp(x))


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_ffn_runs_as_one_call_on_its_own_weights(fused, way):
    model, mlp = thinned_mlp()
    x = torch.randn(1, 1, 32)
    expected = mlp(x)
    copied = mlp_of(copy.deepcopy(model)) if way == "deepcopy" else pickle.loads(pickle.dumps(mlp))
    mlp.up_proj.weight.zero_()
    mlp.register_forward_hook(lambda *_: pytest.fail("the copy must not call the original"))
    fused.clear()
    assert torch.equal(copied(x), expected) and fused == ["gated"]
    alone = copy.deepcopy(copied.gate_proj)
    assert torch.equal(alone(x), copied.gate_proj(x))


@needs_library
@torch.no_grad()
def test_detach_leaves_no_trace_in_the_ffn():
    model, _ = thinned(level=0.5)
    detach_channels(model)
    mlp, plain = mlp_of(model), mlp_of(tiny_llama())
    assert not mlp._forward_pre_hooks and set(mlp.__dict__) == set(plain.__dict__)
    torch.testing.assert_close(mlp(torch.ones(1, 1, 32)), plain(torch.ones(1, 1, 32)))


@needs_library
@torch.no_grad()
def test_the_order_in_which_layers_are_attached_does_not_matter(fused):
    model, inputs = tiny_llama().eval(), tiny_inputs()
    for site in reversed(find_linear_sites(model, inputs)):
        attach_channels(model, SparseInput(site))
    mlp_of(model)(torch.randn(1, 1, 32))
    assert fused == ["gated"]


@needs_library
@torch.no_grad()
def test_threads_do_not_mix_their_tokens():
    _, mlp = thinned_mlp()
    xs = [torch.randn(1, 1, 32) for _ in range(4)]
    expected = [mlp(x) for x in xs]
    wrong = []

    def many(i):
        with torch.no_grad():  # a setting of the thread
            wrong.extend(i for _ in range(50) if not torch.equal(mlp(xs[i]), expected[i]))

    threads = [threading.Thread(target=many, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
@torch.no_grad()
def test_a_compiled_ffn_gives_the_same(fused):
    _, mlp = thinned_mlp()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for tokens in (1, 70):
        x = torch.randn(1, tokens, 32)
        torch.testing.assert_close(compiled(x), mlp(x))
    x = torch.randn(2, 1, 32)
    torch.testing.assert_close(torch.func.vmap(mlp)(x), mlp(x))
