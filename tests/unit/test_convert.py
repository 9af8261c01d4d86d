"""Conversion in place: the policy, what is refused before anything is touched, parameters' identity, and the manifest."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_inputs, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moeify.controls import set_rule
from moeify.convert import ConvertConfig, apply_site, convert, plan_conversion, rebuild, to_dense
from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.kernels import cpu
from moeify.layers import moe_layers
from moeify.manifest import SCHEMA, Manifest, manifest_of, with_rules
from moeify.routers import CentreRouterConfig, GateRouterConfig, MLPRouterConfig, NormRouterConfig
from moeify.select import DynKMass, DynKMax, TopK
from moeify.sites import find_ffn_sites, site_weights
from moeify.split import BalancedKMeans, Coactivation, ContiguousSplit, ExpertSplit, RandomSplit

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"
SMALL = NormRouterConfig(width=4)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def sites(model):
    return find_ffn_sites(model, tiny_inputs())


def config(**options):
    return ConvertConfig(**{"expert_size": 7, "router": SMALL, "split": RandomSplit(), "rule": DynKMax(tau=0.0), **options})


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert moe_layers(model) == {}
    assert not any(hasattr(module, "moe") or "forward" in module.__dict__ for module in model.modules())
    assert snapshot(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


# -- policy --------------------------------------------------------------------------------------------------------------------------


def test_policy_by_exact_name_changes_that_site(model, sites):
    convert(model, config(policy={SECOND: {"expert_size": 16, "rule": {"name": "topk", "k": 2}}}), sites=sites)
    layers = moe_layers(model)
    assert [layer.num_experts for layer in layers.values()] == [7, 3]  # 48 neurons, by 7 and by 16
    assert [layer.rule for layer in layers.values()] == [DynKMax(tau=0.0), TopK(k=2)]


def test_policy_by_pattern_changes_every_match_and_an_exact_name_wins(model, sites):
    policy = {r"re:model\.layers\.\d+\.mlp": {"expert_size": 16}, "re:.*": {"expert_size": 4}, SECOND: {"router": {"name": "centre"}}}
    convert(model, config(policy=policy), sites=sites)
    first, second = moe_layers(model).values()
    assert (first.num_experts, first.router.config) == (3, SMALL)
    assert (second.num_experts, second.router.config) == (7, CentreRouterConfig())


def test_policy_pattern_must_match_the_whole_name(model, sites):
    with pytest.raises(ConfigError, match="policy 're:layers' matches no FFN"):
        convert(model, config(policy={"re:layers": {"expert_size": 4}}), sites=sites)


def test_policy_null_leaves_a_site_dense(model, sites):
    weights = site_weights(model, sites[0]).up_FD.clone()
    manifest = convert(model, config(policy={FIRST: None}), sites=sites)
    assert list(moe_layers(model)) == [SECOND] == [record.site.name for record in manifest.sites]
    assert torch.equal(site_weights(model, sites[0]).up_FD, weights)


BAD_POLICIES = [
    pytest.param(
        {"model.layers.0.mpl": {"expert_size": 4}}, f"'model.layers.0.mpl' matches no FFN; did you mean '{FIRST}'", id="typo in name"
    ),
    pytest.param(
        {FIRST: {"expert_siz": 4}}, "unknown option 'expert_siz' of ConvertConfig; did you mean 'expert_size'", id="unknown option"
    ),
    pytest.param({FIRST: {"expert_size": "4"}}, "expert_size must be int, got '4'", id="wrong type"),
    pytest.param({FIRST: {"expert_size": 0}}, "expert_size must be at least 1, got 0", id="out of range"),
    pytest.param({FIRST: {"router": {"name": "nrm"}}}, "unknown name 'nrm'; did you mean 'norm'", id="unknown router"),
    pytest.param({SECOND: {"expert_size": 49}}, f"expert_size 49 is larger than the 48 neurons of '{SECOND}'", id="too large at one site"),
]


@pytest.mark.parametrize(("policy", "message"), BAD_POLICIES)
def test_convert_with_a_bad_policy_touches_nothing(model, sites, policy, message):
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        convert(model, config(policy=policy), sites=sites)
    assert_untouched(model, before)


def test_policy_that_is_no_regular_expression_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"policy 're:mlp\(' is not a regular expression"):
        ConvertConfig(policy={"re:mlp(": None})


def test_convert_of_an_ffn_whose_code_slices_runs_it_sparse_and_keeps_its_function():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.down = nn.Linear(6, 32), nn.Linear(16, 6)

        def forward(self, x):
            gate, up = self.first(x).split([16, 16], -1)
            return x + self.down(nn.functional.silu(gate) * up)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Sliced()

        def forward(self, x):
            return self.mlp(x)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 5, 6)
    dense = net(x)
    manifest = convert(net, config(expert_size=4), sites=find_ffn_sites(net, {"x": x}))
    torch.testing.assert_close(net(x), dense)
    assert moe_layers(net)["mlp"].masked_reason() is None
    again = Net()
    rebuild(again, Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), dense)


def test_set_rule_after_convert_is_what_save_pretrained_writes(model, sites, tmp_path):
    convert(model, config(), sites=sites)
    set_rule(model, {SECOND: TopK(k=2)})
    assert model.config.quantization_config == {"quant_method": "moeify", **manifest_of(model).to_dict()}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [layer.rule for layer in moe_layers(loaded).values()] == [DynKMax(tau=0.0), TopK(k=2)]
    set_rule(loaded, {FIRST: TopK(k=3)})
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert [layer.rule for layer in moe_layers(again).values()] == [TopK(k=3), TopK(k=2)]


# -- refused before anything is touched ------------------------------------------------------------------------------------------------


def test_convert_with_experts_larger_than_the_ffn_touches_nothing(model, sites):
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"expert_size 49 is larger than the 48 neurons of '{FIRST}'; choose at most 48"):
        convert(model, config(expert_size=49), sites=sites)
    assert_untouched(model, before)


@pytest.mark.parametrize("where", ["config", "policy"])
def test_convert_with_always_on_and_no_activations_touches_nothing(model, sites, where):
    before = snapshot(model)
    options = {"always_on": 1} if where == "config" else {"policy": {SECOND: {"always_on": 1}}}
    with pytest.raises(ConfigError, match=f"'{FIRST if where == 'config' else SECOND}': which experts are always on .* use convert_model"):
        convert(model, config(**options), sites=sites)
    assert_untouched(model, before)


def test_gate_router_for_ffns_without_a_gate_is_refused_and_nothing_is_touched():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=16, n_head=2, n_layer=1, n_positions=32)).eval()
    before, sites = snapshot(model), find_ffn_sites(model, tiny_inputs())
    with pytest.raises(ConfigError, match=r"'transformer\.h\.0\.mlp' has no gate, which the router 'gate' \(cats, chess\) reads"):
        convert(model, config(expert_size=1, router=GateRouterConfig()), sites=sites)
    assert_untouched(model, before)


def test_experts_of_one_neuron_keep_the_neurons_order(model, sites):
    before = snapshot(model)
    convert(model, config(expert_size=1, split=None), sites=sites)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_plan_with_more_experts_always_on_than_there_are_is_refused(model, sites):
    assert len(plan_conversion(model, sites, config(always_on=7))) == 2
    with pytest.raises(ConfigError, match=f"always_on 8 is more than the 7 experts of '{FIRST}'"):
        plan_conversion(model, sites, config(always_on=8))
    with pytest.raises(ConfigError, match="always_on must be at least 0, got -1"):
        config(always_on=-1)


def test_experts_that_are_always_on_survive_the_manifest_and_run(model, sites):
    for (record, _), always_on in zip(plan_conversion(model, sites, config(always_on=2, rule=TopK(k=1))), ((0, 5), (3, 6)), strict=True):
        apply_site(model, replace(record, always_on=always_on), order_F=None)
    manifest = Manifest.from_dict(json.loads(json.dumps(manifest_of(model).to_dict())))
    assert [record.always_on for record in manifest.sites] == [(0, 5), (3, 6)]
    again = tiny_llama()
    rebuild(again, manifest)
    for layer in moe_layers(again).values():
        mask_TE = layer.select(torch.randn(9, 32))
        assert mask_TE[:, list(layer.always_on)].all()
        assert mask_TE.sum() < 9 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_convert_with_a_damaged_last_site_touches_nothing(model, sites, value):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"'{SECOND}' has NaN or infinite weights"):
        convert(model, config(), sites=sites)
    assert moe_layers(model) == {}
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before[f"{FIRST}.up_proj.weight"])


def test_convert_with_an_adapter_at_the_last_site_touches_nothing(model, sites):
    class Wrapped(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    before = snapshot(model)
    linear = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Wrapped(linear)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp\.up_proj' is a Wrapped"):
        convert(model, config(), sites=sites)
    model.model.layers[1].mlp.up_proj = linear
    assert_untouched(model, before)


def test_convert_twice_is_refused_and_the_first_conversion_stays(model, sites):
    convert(model, config(rule=TopK(k=2)), sites=sites)
    before, logits = snapshot(model), model(**tiny_inputs()).logits
    with pytest.raises(UnsupportedModelError, match=f"'{FIRST}' is converted already; call to_dense"):
        convert(model, config(), sites=sites)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**tiny_inputs()).logits, logits)


@pytest.mark.parametrize("policy", [{FIRST: None, SECOND: None}, {"re:.*": None}])
def test_convert_of_nothing_is_an_error(model, sites, policy):
    with pytest.raises(UnsupportedModelError, match="leaves no FFN to convert"):
        convert(model, config(policy=policy), sites=sites)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({SECOND: ExpertSplit(order_F=torch.arange(48), num_experts=6)}, "48 neurons in 6 experts, the conversion 48 in 7"),
        ({SECOND: ExpertSplit(order_F=torch.arange(14), num_experts=7)}, "14 neurons in 7 experts, the conversion 48 in 7"),
        ({"model.layers.2.mlp": ExpertSplit(order_F=torch.arange(48), num_experts=7)}, "'model.layers.2.mlp', which is not converted"),
    ],
)
def test_convert_with_a_split_that_does_not_fit_touches_nothing(model, sites, splits, message):
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        convert(model, config(), sites=sites, splits=splits)
    assert_untouched(model, before)


def test_convert_by_coactivation_without_activations_touches_nothing(model, sites):
    before = snapshot(model)
    with pytest.raises(ConfigError, match="co-activation split"):
        convert(model, config(split=Coactivation()), sites=sites)
    assert_untouched(model, before)


# -- what a conversion does ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, BalancedKMeans(), RandomSplit(), ContiguousSplit()], ids=lambda s: s.name if s else "default")
def test_convert_permutes_whole_neurons_and_nothing_else(model, sites, split):
    old = [site_weights(model, site) for site in sites]
    old = [(w.up_FD.clone(), w.gate_FD.clone(), w.down_FD.clone()) for w in old]
    before = snapshot(model)
    convert(model, config(split=split), sites=sites)
    for site, (up, gate, down) in zip(sites, old, strict=True):
        new = site_weights(model, site)
        order_F = torch.tensor([int((up == row).all(1).nonzero()) for row in new.up_FD])
        assert order_F.sort().values.tolist() == list(range(48))
        assert torch.equal(new.gate_FD, gate[order_F])
        assert torch.equal(new.down_FD, down[order_F])
    others = [name for name in before if ".mlp." not in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)


def test_convert_with_ready_made_splits_takes_them(model, sites):
    order_F = torch.arange(47, -1, -1)
    up = site_weights(model, sites[1]).up_FD.clone()
    splits = {SECOND: ExpertSplit.from_order(order_F, num_experts=7)}
    convert(model, config(split=Coactivation(), policy={FIRST: None}), sites=sites, splits=splits)
    assert torch.equal(site_weights(model, sites[1]).up_FD, up[splits[SECOND].order_F])


def test_convert_keeps_every_parameter_object_and_moves_only_what_the_kernels_read_by_neuron(model, sites):
    before = {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    identities = {name: (id(p), p.stride()) for name, p in model.named_parameters()}
    convert(model, config(), sites=sites)
    after = {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters() if ".moe." not in name}
    assert {name: identity for name, (identity, *_) in after.items()} == {name: identity for name, (identity, *_) in before.items()}
    moved = {name for name in after if after[name] != before[name]}
    assert moved == ({f"{site.down}.weight" for site in sites} if cpu.unavailable() is None else set())
    to_dense(model)
    assert {name: (id(p), p.stride()) for name, p in model.named_parameters()} == identities


def test_an_optimizer_built_before_the_conversion_keeps_training(model, sites):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, config(rule=TopK(k=4)), sites=sites)
    inputs, before = tiny_inputs(), snapshot(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".mlp." in name and ".moe." not in name} <= moved


def test_convert_is_deterministic_by_seed_and_leaves_torchs_generator_alone(sites):
    states = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        generator = torch.get_rng_state()
        convert(model, config(seed=seed), sites=sites)
        assert torch.equal(torch.get_rng_state(), generator)
        states.append(model.state_dict())
    same, other = states[1], states[2]
    assert all(torch.equal(tensor, same[name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0][f"{FIRST}.up_proj.weight"], other[f"{FIRST}.up_proj.weight"])
    assert not torch.equal(states[0][f"{FIRST}.moe.router.hidden.weight"], other[f"{FIRST}.moe.router.hidden.weight"])


def test_apply_site_with_router_tensors_that_do_not_fit_is_an_error(model, sites):
    ((record, _), _) = plan_conversion(model, sites, config())
    with pytest.raises(CheckpointError, match=f"'{FIRST}': router tensors do not fit"):
        apply_site(model, record, order_F=None, router_state={"hidden.weight": torch.zeros(1, 1)})


def test_to_dense_of_a_dense_model_does_nothing(model):
    before = snapshot(model)
    to_dense(model)
    assert_untouched(model, before)


# -- manifest --------------------------------------------------------------------------------------------------------------------------


def test_manifest_survives_json(model, sites):
    policy = {SECOND: {"router": {"name": "mlp"}, "rule": {"name": "dynk_mass", "mass": 0.25}}}
    manifest = convert(model, config(policy=policy), sites=sites)
    data = json.loads(json.dumps(manifest.to_dict()))
    assert Manifest.from_dict(data) == manifest
    assert data["schema"] == SCHEMA
    assert data["sites"][1]["rule"] == {"name": "dynk_mass", "mass": 0.25}
    assert data["sites"][0]["site"]["name"] == FIRST
    assert model.config.quantization_config == {"quant_method": "moeify", **manifest.to_dict()}


def test_manifest_of_tells_the_rules_as_they_are_now(model, sites):
    manifest = convert(model, config(), sites=sites)
    set_rule(model, {SECOND: DynKMass(mass=0.5)})
    assert manifest_of(model) == with_rules(manifest, {SECOND: DynKMass(mass=0.5)})
    assert manifest_of(model) != manifest
    with pytest.raises(UnsupportedModelError, match="this LlamaForCausalLM is dense; convert it first"):
        manifest_of(tiny_llama())


BAD_MANIFESTS = [
    pytest.param(lambda m: m.update(schema=SCHEMA + 1), f"schema {SCHEMA + 1} is newer than this moeify reads", id="newer schema"),
    pytest.param(lambda m: m.update(sitse=[]), "unknown option 'sitse' of Manifest; did you mean 'sites'", id="unknown key"),
    pytest.param(lambda m: m.pop("sites"), "Manifest lacks 'sites'", id="missing key"),
    pytest.param(lambda m: m.update(schema="1"), "schema must be int, got '1'", id="wrong type"),
    pytest.param(lambda m: m.update(sites={}), "sites must be a list", id="not a list"),
    pytest.param(lambda m: m["sites"][0].update(num_expert=3), "unknown option 'num_expert' of SiteRecord", id="unknown key of a site"),
    pytest.param(lambda m: m["sites"][0]["site"].pop("d_ff"), "FFNSite lacks 'd_ff'", id="missing key of a site"),
    pytest.param(lambda m: m["sites"][0].update(router={"name": "nrom"}), "'nrom'; did you mean 'norm'", id="unknown router"),
    pytest.param(lambda m: m["sites"][0].update(rule={"name": "dynk_max", "tau": 2.0}), "tau must be in", id="rule out of range"),
    pytest.param(lambda m: m["sites"][0].update(rule=None), "rule", id="no rule"),
]


@pytest.mark.parametrize(("change", "message"), BAD_MANIFESTS)
def test_manifest_from_bad_json_says_what_and_where(model, sites, change, message):
    data = copy.deepcopy(convert(model, config(), sites=sites).to_dict())
    change(data)
    with pytest.raises(CheckpointError, match=f"moeify.json.*{message}"):
        Manifest.from_dict(data, where="moeify.json")


@pytest.mark.parametrize("data", [[], "x", None, 3])
def test_manifest_from_no_object_is_an_error(data):
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        Manifest.from_dict(data)


def test_rebuild_on_a_meta_skeleton_takes_the_tensors_and_equals_the_original(model, sites):
    convert(model, config(rule=TopK(k=3), policy={FIRST: {"router": {"name": "mlp"}}}), sites=sites)
    manifest = Manifest.from_dict(json.loads(json.dumps(manifest_of(model).to_dict())))
    with torch.device("meta"):
        skeleton = type(model)(tiny_llama().config).eval()
    rebuild(skeleton, manifest)
    assert all(p.is_meta for p in skeleton.parameters())
    assert set(skeleton.state_dict()) == set(model.state_dict())

    skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(model.state_dict())
    skeleton.model.rotary_emb.load_state_dict(model.model.rotary_emb.state_dict())
    for name, buffer in model.named_buffers():  # rotary frequencies are not saved
        skeleton.get_buffer(name).copy_(buffer)
    assert manifest_of(skeleton) == manifest
    assert {p.dtype for layer in moe_layers(skeleton).values() for p in layer.router.parameters()} == {torch.float32}
    assert torch.equal(skeleton(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


BAD_SITES = [
    pytest.param(lambda r: replace(r, site=replace(r.site, d_ff=40)), r"\(F, D\) = \(40, 32\), the model has \(48, 32\)", id="other F"),
    pytest.param(lambda r: replace(r, site=replace(r.site, d_model=16)), r"\(F, D\) = \(48, 16\)", id="other D"),
    pytest.param(
        lambda r: replace(r, site=replace(r.site, up="model.layers.7.mlp.up_proj")), f"names '{SECOND}', which", id="no such module"
    ),
    pytest.param(lambda r: replace(r, site=replace(r.site, up="model.norm")), f"names '{SECOND}', which", id="not a projection"),
    pytest.param(lambda r: replace(r, num_experts=0), "0 experts", id="no expert"),
    pytest.param(lambda r: replace(r, num_experts=49), "49 experts.*no split of 48 neurons", id="more experts than neurons"),
    pytest.param(lambda r: replace(r, always_on=(7,)), r"7 experts, of which \(7,\) always run", id="no such expert"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SITES)
def test_rebuild_with_a_foreign_manifest_attaches_nothing(model, sites, change, message):
    manifest = convert(model, config(), sites=sites)
    first, second = manifest.sites
    other = tiny_llama()
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=message):
        rebuild(other, replace(manifest, sites=(first, change(second))))
    assert_untouched(other, before)


def test_config_survives_json_and_refuses_a_size_of_zero():
    from moeify._config import from_dict, to_dict

    full = ConvertConfig(
        expert_size=4,
        router=MLPRouterConfig(),
        split=RandomSplit(seed=3),
        rule=TopK(k=2),
        policy={"re:.*": None, FIRST: {"expert_size": 2}},
        seed=5,
    )
    assert from_dict(ConvertConfig, json.loads(json.dumps(to_dict(full)))) == full
    assert from_dict(ConvertConfig, {}) == ConvertConfig()
    with pytest.raises(ConfigError, match="expert_size must be at least 1, got 0"):
        ConvertConfig(expert_size=0)
