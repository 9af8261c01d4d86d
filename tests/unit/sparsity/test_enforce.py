"""The injected gradient against the same term added to the loss, in fp64: whatever runs between forward and backward."""

import copy
import json
import os
import warnings

import pytest
import tiny
import torch
from families.models import build
from torch import nn

from moeify import _config
from moeify.convert import ConvertConfig, convert, replace_projections
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.sites import find_ffn_sites, find_projections, projection_mlps
from moeify.sparsity import ActivationConfig, EnforcementConfig, displace, enforce_sparsity, set_activation, set_mix, sparsity_loss
from moeify.sparsity.activation import find_activation

WEIGHT = 0.01


def batch(*, seed=0, rows=3, length=7, pad=True):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, 4:] = 0
        mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def model_of(family="llama", *, relu=True):
    model, inputs = build(family)
    sites = find_ffn_sites(model, inputs)
    if relu:
        sites = set_activation(model, sites)
    return model.double(), sites


def grads_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found, expected, *, rtol=1e-9):
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())  # the gradient of a key's bias is zero up to rounding
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


def watched(model, sites, inputs, *, on="activations", factors=None, loss="hoyer", delta=-10.0):
    """outputs.loss and the term, by autograd alone: no part of enforcement."""
    caught, handles = {}, []
    for site in sites:
        if on == "products":
            hook = model.get_submodule(site.down).register_forward_pre_hook(lambda _m, args, n=site.name: caught.update({n: args[0]}))
        else:
            module = model.get_submodule(find_activation(model, site))
            hook = module.register_forward_hook(
                lambda _m, args, out, n=site.name: caught.update({n: out if on == "activations" else displace(args[0], delta=delta)})
            )
        handles.append(hook)
    result = model(**inputs).loss
    for handle in handles:
        handle.remove()
    factors = factors or {}
    parts = [
        factors.get(n, 1.0) * sparsity_loss(a, loss=loss, mask_T=inputs["attention_mask"].view(a.shape[:-1])) for n, a in caught.items()
    ]
    enforced = [site for site in sites if factors.get(site.name, 1.0)]
    return result, sum(parts) / len(enforced)


def config_of(**options):
    return EnforcementConfig(**({"weight": WEIGHT, "schedule": "constant"} | options))


@pytest.fixture(scope="module")
def llama():
    return model_of()


@pytest.fixture(scope="module")
def expected(llama):
    """Gradients of loss + weight * term for `batch()`."""
    model, sites = llama
    loss, term = watched(model, sites, batch())
    (loss + WEIGHT * term).backward()
    return grads_of(model)


@pytest.mark.parametrize("loss", ["hoyer", "l1"])
@pytest.mark.parametrize(
    ("family", "relu", "on"),
    [
        pytest.param("llama", True, "activations", id="gated relu: act(gate)"),
        pytest.param("llama", True, "products", id="gated relu: the product"),
        pytest.param("llama", False, "preactivations", id="silu, displaced"),
        pytest.param("phi3", True, "activations", id="fused gate and up"),
        pytest.param("phi3", False, "preactivations", id="fused, displaced"),
        pytest.param("gpt2", True, "activations", id="plain, Conv1D"),
        pytest.param("gpt2", False, "preactivations", id="gelu, displaced"),
        pytest.param("bert", True, "activations", id="two modules"),
        pytest.param("opt", True, "activations", id="in the layer"),
        pytest.param("persimmon", False, "activations", id="squared relu"),
    ],
)
def test_enforce_sparsity_gives_the_gradients_of_the_added_term(family, relu, on, loss):
    model, sites = model_of(family, relu=relu and family != "opt")
    inputs = batch()
    result, term = watched(model, sites, inputs, on=on, loss=loss)
    result.backward(retain_graph=True)
    without = grads_of(model)
    (result + WEIGHT * term).backward()
    explicit = grads_of(model)
    assert any(not torch.allclose(without[name], explicit[name], rtol=1e-4) for name in explicit), "the term must matter"
    with enforce_sparsity(model, sites, config_of(loss=loss, on=on)) as enforcement:
        found = model(**inputs).loss
        found.backward()
    assert torch.equal(found, result), "the model's own loss does not change"
    same(grads_of(model), explicit)
    assert enforcement.value().item() == pytest.approx(term.item(), rel=1e-6)
    model(**inputs).loss.backward()
    same(grads_of(model), without)


def test_enforce_sparsity_when_left_to_choose_takes_activations_of_relu_and_preactivations_of_silu(llama, expected):
    model, sites = llama
    with enforce_sparsity(model, sites, config_of()):
        model(**batch()).loss.backward()
    same(grads_of(model), expected)
    silu, silu_sites = model_of(relu=False)
    result, term = watched(silu, silu_sites, batch(), on="preactivations", delta=-3.0)
    (result + WEIGHT * term).backward()
    explicit = grads_of(silu)
    with enforce_sparsity(silu, silu_sites, config_of(delta=-3.0)):
        silu(**batch()).loss.backward()
    same(grads_of(silu), explicit)


@pytest.mark.parametrize("reentrant", [False, True])
def test_enforce_sparsity_when_layers_are_checkpointed_counts_the_term_once(llama, expected, reentrant):
    model, sites = copy.deepcopy(llama)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with enforce_sparsity(model, sites, config_of()) as enforcement:
        model(**batch(), use_cache=False).loss.backward()
    same(grads_of(model), expected)
    assert len(enforcement.values()) == 2


def test_enforce_sparsity_when_compiled_as_one_graph_is_exact_and_follows_weights_and_scale(llama, expected):
    model, sites = copy.deepcopy(llama)
    plain, term = watched(model, sites, batch())
    (0.25 * (plain + 2 * WEIGHT * term)).backward()
    twice = grads_of(model)
    enforcement = enforce_sparsity(model, sites, config_of(schedule="linear", weight=4 * WEIGHT), total_steps=5)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # With the partitioner of the default backend, which moves whatever it can from backward to forward.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        for step, factor, wanted in ((1, 1.0, expected), (2, 0.25, twice), (1, 1.0, expected)):
            enforcement.set_step(step)
            loss = enforcement.follow(compiled(**batch()).loss)
            (factor * loss).backward()
            same(grads_of(model), wanted, rtol=1e-6)  # the family's norms run in fp32, and are decomposed
    assert enforcement.value().item() == pytest.approx(term.item(), rel=1e-6)


def test_enforce_sparsity_when_the_loss_is_scaled_scales_the_term(llama, expected):
    model, sites = llama
    with enforce_sparsity(model, sites, config_of()) as enforcement:
        (model(**batch()).loss * 1024).backward()
        same({name: grad / 1024 for name, grad in grads_of(model).items()}, expected)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaler.scale(model(**batch()).loss).backward()
        scaler.unscale_(optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
        same(grads_of(model), expected)
        own = model(**batch()).logits.square().mean()
        enforcement.follow(own * 0 + 1)  # a loss of one's own, never used: nothing scales the term
        own.backward()
        unscaled = grads_of(model)
        enforcement.follow(own := model(**batch()).logits.square().mean())
        (own / 8).backward()
        same({name: grad * 8 for name, grad in grads_of(model).items()}, unscaled)
    del optimizer


def test_enforce_sparsity_when_another_loss_is_added_follows_the_sum(llama):
    model, sites = llama
    plain, term = watched(model, sites, batch())
    (0.5 * plain + WEIGHT * term).backward()
    explicit = grads_of(model)
    with enforce_sparsity(model, sites, config_of()) as enforcement:
        enforcement.follow(0.5 * model(**batch()).loss).backward()
    same(grads_of(model), explicit)


def test_enforce_sparsity_when_micro_batches_differ_in_tokens_averages_over_all_tokens(llama):
    model, sites = llama
    parts = [batch(seed=1, rows=2, pad=False), batch(seed=2, rows=3), batch(seed=3, rows=1, pad=False)]
    tokens = [int(part["attention_mask"].sum()) for part in parts]
    explicit = 0
    for part, count in zip(parts, tokens, strict=True):
        loss, term = watched(model, sites, part)
        explicit = explicit + (loss + WEIGHT * term) * count / sum(tokens)
    explicit.backward()
    wanted = grads_of(model)
    with enforce_sparsity(model, sites, config_of()):
        for part, count in zip(parts, tokens, strict=True):
            (model(**part).loss * count / sum(tokens)).backward()
    same(grads_of(model), wanted, rtol=1e-6)  # the family's loss is fp32, and so is the factor that is read from it


def test_enforce_sparsity_when_trainer_gives_the_number_of_items_averages_over_them(llama):
    model, sites = llama
    parts = [batch(seed=1, rows=2, pad=False), batch(seed=2, rows=3)]
    items = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]  # as Trainer counts for a model whose loss shifts labels
    explicit = 0
    for part, count in zip(parts, items, strict=True):
        _, term = watched(model, sites, part)
        loss = model(**part, num_items_in_batch=torch.tensor(sum(items))).loss
        explicit = explicit + loss + WEIGHT * term * count / sum(items)
    explicit.backward()
    wanted = grads_of(model)
    with enforce_sparsity(model, sites, config_of()):
        for part in parts:
            model(**part, num_items_in_batch=torch.tensor(sum(items))).loss.backward()
    same(grads_of(model), wanted, rtol=1e-6)


def test_enforce_sparsity_when_autocast_to_bf16_is_as_near_as_the_added_term(llama, expected):
    model, sites = copy.deepcopy(llama)
    model.float()

    def error(found):
        names = [name for name in found if "mlp" in name]
        return sum((found[n].double() - expected[n]).norm() for n in names) / sum(expected[n].norm() for n in names)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, term = watched(model, sites, batch())
    (loss + WEIGHT * term).backward()
    explicit = error(grads_of(model))
    with enforce_sparsity(model, sites, config_of()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
    assert error(grads_of(model)) <= 1.5 * explicit < 0.2


def test_enforce_sparsity_when_preactivations_are_bf16_displaces_them_in_fp32():
    model, sites = model_of(relu=False)
    model.to(torch.bfloat16)
    caught = []
    for site in sites:
        model.get_submodule(find_activation(model, site)).register_forward_hook(lambda _m, args, _out: caught.append(args[0].detach()))
    with enforce_sparsity(model, sites, config_of(on="preactivations", loss="l1")) as enforcement:
        model(**batch(pad=False))
        value = enforcement.value().item()
    parts = [sparsity_loss(displace(z.double(), delta=-10.0), loss="l1").item() for z in caught]
    assert caught[0].dtype == torch.bfloat16
    assert value == pytest.approx(sum(parts) / len(parts), rel=1e-6)


def test_enforce_sparsity_when_layers_have_weights_uses_them(llama):
    model, sites = llama
    first, second = (site.name for site in sites)
    for factors, given in (({first: 3.0}, {first: 3.0}), ({first: 0.0}, {r"re:.*\.0\.mlp": 0.0})):
        loss, term = watched(model, sites, batch(), factors=factors)
        (loss + WEIGHT * term).backward()
        explicit = grads_of(model)
        with enforce_sparsity(model, sites, config_of(layer_weights=given)) as enforcement:
            model(**batch()).loss.backward()
        same(grads_of(model), explicit)
        assert set(enforcement.values()) == {n for n in (first, second) if factors.get(n, 1.0)}


@pytest.mark.parametrize("mean_over", ["kinds", "all"])
def test_enforce_sparsity_pushes_ffns_as_hard_with_replaced_projections_as_without(mean_over):
    model, inputs = build("llama")
    replace_projections(model, find_projections(model, inputs, attention=("q", "o"), activation="relu"), None)
    sites = find_ffn_sites(model, inputs)
    ffns = set_activation(model, [site for site in sites if site.name not in projection_mlps(model)])
    mlps = [site for site in sites if site.name in projection_mlps(model)]
    assert (len(ffns), len(mlps)) == (2, 4)
    model.double()
    kinds = {site.name: 6 / len(kind) for kind in (ffns, mlps) for site in kind}  # the helper divides by all 6
    loss, term = watched(model, [*ffns, *mlps], batch(), factors=kinds if mean_over == "kinds" else None)
    (loss + WEIGHT * term).backward()
    explicit = grads_of(model)
    with enforce_sparsity(model, [*ffns, *mlps], config_of(mean_over=mean_over)) as enforcement:
        model(**batch()).loss.backward()
    same(grads_of(model), explicit)
    assert enforcement.value().item() == pytest.approx(term.item(), rel=1e-6)


def test_enforce_sparsity_when_layers_share_one_activation_object_tells_them_apart():
    model, sites = model_of("gpt2")
    shared = nn.ReLU()
    for site in sites:
        model.get_submodule(site.name).act = shared
    first = sites[0].name
    _, term = watched(model_of("gpt2")[0], sites, batch(), factors={first: 3.0})
    with enforce_sparsity(model, sites, config_of(layer_weights={first: 3.0})) as enforcement:
        model(**batch()).loss.backward()
    assert enforcement.value().item() == pytest.approx(term.item(), rel=1e-6)


def test_enforce_sparsity_when_annealed_acts_on_what_the_activation_becomes(llama, expected):
    model, inputs = build("llama")
    sites = set_activation(model, find_ffn_sites(model, inputs), mix=0.0)
    model.double()
    with enforce_sparsity(model, sites, config_of()):
        set_mix(model, 0.5)
        loss = model(**batch()).loss
        loss.backward()
        assert any(not torch.allclose(grad, expected[name]) for name, grad in grads_of(model).items())
        set_mix(model, 1.0)
        model(**batch()).loss.backward()
    same(grads_of(model), expected)


def test_enforce_sparsity_when_no_gradient_is_wanted_leaves_the_forward_alone(llama):
    model, sites = llama
    with torch.no_grad():
        plain = model(**batch()).logits
        with enforce_sparsity(model, sites, config_of()) as enforcement:
            assert torch.equal(model(**batch()).logits, plain)
            assert enforcement.values() == {}
            assert enforcement.value().isnan()


def test_enforce_sparsity_when_the_mask_does_not_fit_warns_and_counts_all(llama):
    model, sites = llama
    inputs = batch(pad=False)
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    with enforce_sparsity(model, sites, config_of()), pytest.warns(UserWarning, match="padding is counted"):
        model(**(inputs | {"attention_mask": mask}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"loss": "l1", "on": "activations"}, "silu, which is never zero.*change the activation to relu", id="raw l1 on silu"),
        pytest.param({"on": "products"}, "silu, which is never zero", id="raw products of silu"),
        pytest.param({"layer_weights": {"model.layers.0.mpl": 1.0}}, "did you mean 'model.layers.0.mlp'", id="no such layer"),
        pytest.param({"layer_weights": {"re:.*": 0.0}}, "leaves no FFN", id="all left out"),
    ],
)
def test_enforce_sparsity_when_it_makes_no_sense_says_so(options, message):
    model, sites = model_of(relu=False)
    with pytest.raises(ConfigError, match=message):
        enforce_sparsity(model, sites, config_of(**options))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"loss": "hoyr"}, "did you mean 'hoyer'", id="unknown loss"),
        pytest.param({"weight": -1.0}, "weight must be", id="negative weight"),
        pytest.param({"weight": float("nan")}, "weight must be", id="nan weight"),
        pytest.param({"warmup_frac": 0.0}, "warmup_frac", id="no warm-up"),
        pytest.param({"eps": 0.0}, "eps", id="no eps"),
        pytest.param({"layer_weights": {"a": -1.0}}, r"layer_weights\['a'\]", id="negative layer weight"),
        pytest.param({"layer_weights": {"re:(": 1.0}}, "not a regular expression", id="bad pattern"),
    ],
)
def test_enforcement_config_when_out_of_range_raises(options, message):
    with pytest.raises(ConfigError, match=message):
        EnforcementConfig(**options)


@pytest.mark.parametrize("config", [EnforcementConfig(layer_weights={"a": 2.0}), ActivationConfig(threshold=0.5, policy={"re:a": None})])
def test_config_when_written_as_json_reads_back_and_each_field_is_documented(config):
    assert _config.from_dict(type(config), json.loads(json.dumps(_config.to_dict(config)))) == config
    assert set(_config.field_docs(type(config))) == set(_config.to_dict(config))


def test_enforce_sparsity_on_a_converted_model_is_refused():
    model = tiny.tiny_llama()
    sites = find_ffn_sites(model, tiny.tiny_inputs())
    convert(model, ConvertConfig(expert_size=8), sites=sites)
    with pytest.raises(UnsupportedModelError, match="is converted"):
        enforce_sparsity(model, sites, config_of())
    with pytest.raises(ConfigError, match="no sites"):
        enforce_sparsity(model, [], config_of())


# ---- several processes


def _rank(rank, kind, directory):
    torch.set_num_threads(1)
    # Through a file: a port may be another's, or still the last test's.
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    model, sites = model_of()
    enforcement = enforce_sparsity(model, sites, config_of())
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch(rows=4).items()}
    wrapped(**part).loss.backward()
    found = {n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) for n, p in model.named_parameters()}
    if rank == 0:
        torch.save((found, enforcement.values()), directory / "found.pt")
    torch.distributed.barrier()  # who leaves first takes the connection along
    os._exit(0)  # DDP's and gloo's threads may wait for each other for ever while they are taken down, after everything is done


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_enforce_sparsity_when_two_processes_train_is_the_mean_of_both(llama, kind, tmp_path):
    model, sites = llama
    explicit = 0
    for rank in range(2):
        loss, term = watched(model, sites, {key: value[2 * rank : 2 * rank + 2] for key, value in batch(rows=4).items()})
        explicit = explicit + (loss + WEIGHT * term) / 2
    explicit.backward()
    wanted = grads_of(model)
    torch.multiprocessing.spawn(_rank, (kind, tmp_path), nprocs=2)
    found, values = torch.load(tmp_path / "found.pt", weights_only=True)
    same(found, wanted)
    assert len(values) == 2
