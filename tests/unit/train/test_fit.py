"""Fitting one layer: a planted problem is solved, the same seed gives the same bits, and each router learns its own target."""

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ffn_cases import random_ffn
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.convert import ConvertConfig
from moeify.errors import ConfigError, DataError
from moeify.manifest import SiteRecord
from moeify.routers import (
    ROUTERS,
    CentreRouterConfig,
    GateRouterConfig,
    LowRankRouterConfig,
    MLPRouterConfig,
    NormRouterConfig,
    OracleRouterConfig,
    RandomRouterConfig,
    build_router,
    expert_grams,
    expert_norms,
)
from moeify.select import DynKMax
from moeify.sites import FFNSite, FFNWeights, expert_bounds, ffn_hidden
from moeify.split import BalancedKMeans, Coactivation, ContiguousSplit, RandomSplit
from moeify.train.fit import (
    RouterTrainConfig,
    _mean_and_std,
    fit_router,
    fit_site,
    held_out_tokens,
    loudest_experts,
    minimise,
    score_router,
    split_site,
)

D, E, G = 16, 6, 5
TRAIN = RouterTrainConfig(epochs=20, batch_tokens=128)


def planted(*, tokens=1500, seed=0):
    """A ReLU FFN of E groups of neurons, each firing by the sign of its own direction; stored in shuffled order.

    Returns the weights, the tokens, and each neuron's group.
    """
    rng = torch.Generator().manual_seed(seed)
    directions_ED = torch.linalg.qr(torch.randn(D, E, generator=rng)).Q.t()
    groups_F = torch.arange(E).repeat_interleave(G)[torch.randperm(E * G, generator=rng)]
    up_FD = directions_ED[groups_F] + 0.02 * torch.randn(E * G, D, generator=rng)
    down_FD = torch.randn(E * G, D, generator=rng)
    x_TD = torch.randn(tokens, D, generator=rng)
    return FFNWeights(up_FD=up_FD, down_FD=down_FD), x_TD.bfloat16(), groups_F


def record_of(router, *, num_neurons=E * G, num_experts=E, activation="relu"):
    site = FFNSite(name="mlp", up="mlp.up", down="mlp.down", activation=activation, d_model=D, d_ff=num_neurons, d_out=D)
    return SiteRecord(site=site, num_experts=num_experts, router=router, rule=DynKMax(tau=0.0))


def options(split=None, **more):
    return ConvertConfig(expert_size=G, split=split or BalancedKMeans(), **more)


def groups_of(order_F, groups_F):
    return [groups_F[order_F[e * G : (e + 1) * G]].tolist() for e in range(E)]


@pytest.mark.parametrize("split", [BalancedKMeans(), Coactivation(), None], ids=["kmeans", "coactivation", "default"])
def test_split_site_finds_the_planted_groups(split):
    weights, x_TD, groups_F = planted()
    found = split_site(weights, x_TD, record_of(NormRouterConfig()), ConvertConfig(expert_size=G, split=split))
    assert all(len(set(group)) == 1 for group in groups_of(found.order_F, groups_F))


def test_split_site_adds_the_conversions_seed_to_the_splits():
    weights, x_TD, _ = planted(tokens=50)
    record = record_of(NormRouterConfig())
    a, b, c = (split_site(weights, x_TD, record, options(RandomSplit(seed=s), seed=t)).order_F for s, t in ((1, 2), (3, 0), (1, 3)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("output", ["exp", "abs"])
def test_fit_site_on_a_planted_problem_captures_nearly_what_the_oracle_does(output):
    weights, x_TD, groups_F = planted()
    fitted = fit_site(weights, x_TD, record_of(NormRouterConfig(width=32, output=output)), options(), TRAIN)
    assert all(len(set(group)) == 1 for group in groups_of(fitted.order_F, groups_F))
    for frac in (0.25, 0.5, 0.75):
        assert fitted.captured[f"captured@{frac}"] > 0.95 * fitted.captured[f"oracle@{frac}"]
    assert 0 < fitted.captured["oracle@0.1"] < fitted.captured["oracle@0.5"] <= 1
    assert fitted.scores_TE.shape == (held_out_tokens(1500, 0.1).sum(), E)
    assert fitted.scores_TE.dtype is torch.float32


def test_fitted_scores_are_norms_in_the_units_of_the_output():
    weights, x_TD, _ = planted()
    fitted = fit_site(weights, x_TD, record_of(NormRouterConfig(width=32)), options(), replace(TRAIN, lr=3e-3))
    ordered = FFNWeights(up_FD=weights.up_FD[fitted.order_F], down_FD=weights.down_FD[fitted.order_F])
    bounds = expert_bounds(E * G, E)
    h_TF = ffn_hidden(x_TD[held_out_tokens(1500, 0.1)].float(), ordered, activation="relu")
    norms_TE = expert_norms(h_TF, expert_grams(ordered.down_FD, bounds), bounds)
    large = norms_TE > norms_TE.quantile(0.75)
    assert (fitted.scores_TE[large] / norms_TE[large]).log().abs().mean() < 0.7  # half of the experts of each token are silent


def test_fit_site_is_deterministic_by_seed_and_leaves_torchs_generator_and_the_weights_alone():
    weights, x_TD, _ = planted(tokens=300)
    before, state = weights.up_FD.clone(), torch.get_rng_state()
    few = replace(TRAIN, epochs=2)
    a, b = (fit_site(weights, x_TD, record_of(NormRouterConfig(width=8)), options(), few) for _ in range(2))
    torch.manual_seed(5)
    c = fit_site(weights, x_TD, record_of(NormRouterConfig(width=8)), options(), replace(few, seed=1))
    torch.set_rng_state(state)
    assert a.router_state.keys() == b.router_state.keys()
    assert all(torch.equal(tensor, b.router_state[name]) for name, tensor in a.router_state.items())
    assert torch.equal(a.scores_TE, b.scores_TE)
    assert a.captured == b.captured
    assert not torch.equal(a.router_state["out.weight"], c.router_state["out.weight"])
    assert torch.equal(weights.up_FD, before)
    fit_site(weights, x_TD, record_of(NormRouterConfig(width=8)), options(), few)
    assert torch.equal(torch.get_rng_state(), state)


def test_classifier_learns_which_experts_fire():
    weights, x_TD, _ = planted()
    fitted = fit_site(weights, x_TD, record_of(MLPRouterConfig()), options(), TRAIN)
    assert fitted.captured["captured@0.5"] > 0.9 * fitted.captured["oracle@0.5"]
    untrained = build_router(MLPRouterConfig(), site=record_of(MLPRouterConfig()).site, num_experts=E)
    assert fitted.router_state.keys() == untrained.state_dict().keys()


def test_every_router_captures_more_than_chance_and_less_than_the_oracle():
    weights, x_TD, _ = planted()
    captured = {}
    for name, (config, _) in ROUTERS.items():
        if name == "gate":
            continue  # this FFN has none
        fitted = fit_site(weights, x_TD, record_of(config()), options(), replace(TRAIN, epochs=5))
        captured[name] = fitted.captured["captured@0.25"]
        assert captured[name] <= fitted.captured["oracle@0.25"] + 1e-6
    assert captured["oracle"] == pytest.approx(fitted.captured["oracle@0.25"])
    assert captured["random"] < min(captured["norm"], captured["mlp"], captured["centre"])


@pytest.mark.parametrize("config", [OracleRouterConfig(), RandomRouterConfig()], ids=lambda c: c.name)
def test_fit_router_without_anything_to_train_changes_nothing(config):
    weights, x_TD, _ = planted(tokens=20)
    router = build_router(config, site=record_of(config).site, num_experts=E)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    fit_router(router, x_TD, weights, activation="relu", num_experts=E, config=TRAIN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())


def test_fit_router_sets_the_centres():
    weights, x_TD, _ = planted(tokens=20)
    router = build_router(CentreRouterConfig(), site=record_of(CentreRouterConfig()).site, num_experts=E)
    fit_router(router, x_TD, weights, activation="relu", num_experts=E, config=TRAIN)
    torch.testing.assert_close(router.centres.weight.norm(dim=1), torch.ones(E))


def test_score_router_by_hand():
    # Two experts of one neuron: |y_0| = relu(x_0) * 2, |y_1| = relu(x_1).
    weights = FFNWeights(up_FD=torch.eye(2), down_FD=torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    x_TD = torch.tensor([[1.0, 1.0], [0.0, 4.0], [3.0, 1.0], [-1.0, 2.0]])
    site = FFNSite(name="mlp", up="up", down="down", activation="relu", d_model=2, d_ff=2, d_out=2)
    energy = [[4.0, 1.0], [0.0, 16.0], [36.0, 1.0], [0.0, 4.0]]
    oracle = build_router(OracleRouterConfig(), site=site, num_experts=2)
    scores, captured = score_router(oracle, x_TD, weights, activation="relu", num_experts=2)
    torch.testing.assert_close(scores.square(), torch.tensor(energy))
    assert captured["captured@0.5"] == captured["oracle@0.5"] == pytest.approx((4 + 16 + 36 + 4) / 62)
    centre = build_router(CentreRouterConfig(), site=site, num_experts=2)
    centre.set_centres(weights, (0, 1, 2))
    _, captured = score_router(centre, x_TD[1:], weights, activation="relu", num_experts=2)
    assert captured["captured@0.5"] == pytest.approx((16 + 36 + 4) / 57)


@pytest.mark.parametrize("num_experts", [4, 7])
def test_fit_site_with_experts_of_two_sizes_biases_and_half_weights(num_experts):
    weights = random_ffn(D, 30, gated=True, biased=True, dtype=torch.bfloat16)
    record = record_of(NormRouterConfig(width=8), num_experts=num_experts, activation="silu")
    fitted = fit_site(weights, torch.randn(200, D), record, options(ContiguousSplit()), replace(TRAIN, epochs=2))
    assert torch.equal(fitted.order_F, torch.arange(30))
    assert fitted.scores_TE.shape == (held_out_tokens(200, 0.1).sum(), num_experts)
    assert all(tensor.isfinite().all() for tensor in fitted.router_state.values())


def test_a_channel_that_hardly_varies_does_not_blow_up_the_router():
    # Its variation is lost in bfloat16, and the deployed router, which reads fp32, must not be thrown off by it.
    weights, x_TD, _ = planted()
    x_TD = x_TD.float()
    x_TD[:, 0] = 40 + 0.01 * torch.randn(len(x_TD))
    x_TD[:, 1] = 0
    record = record_of(NormRouterConfig(width=16))
    fitted = fit_site(weights, x_TD.bfloat16(), record, options(), replace(TRAIN, epochs=4))
    router = build_router(record.router, site=record.site, num_experts=E)
    router.load_state_dict(fitted.router_state)
    off = x_TD.clone()
    off[:, 1] = 0.001
    with torch.no_grad():
        stored, deployed = router(x_TD.bfloat16()), router(off)
    assert (deployed / stored).log().abs().max() < 0.5


def test_an_expert_that_never_fires_gets_a_small_finite_score():
    weights, x_TD, _ = planted()
    dead = torch.arange(E * G) < G
    weights = FFNWeights(up_FD=torch.where(dead[:, None], 0.0, weights.up_FD), down_FD=weights.down_FD)
    fitted = fit_site(weights, x_TD, record_of(NormRouterConfig(width=16)), options(ContiguousSplit()), replace(TRAIN, epochs=5))
    assert fitted.scores_TE.isfinite().all()
    assert fitted.scores_TE[:, 0].max() < 0.05 * fitted.scores_TE[:, 1:].mean()


def test_an_ffn_that_is_zero_everywhere_fits_without_nan():
    weights = FFNWeights(up_FD=torch.zeros(E * G, D), down_FD=torch.zeros(E * G, D))
    fitted = fit_site(
        weights, torch.randn(60, D), record_of(NormRouterConfig(width=4)), options(ContiguousSplit()), replace(TRAIN, epochs=1)
    )
    assert fitted.scores_TE.isfinite().all()
    assert all(0 <= value <= 1 for value in fitted.captured.values())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("tokens", [3, 4, 10, 1000, 20_000])
def test_held_out_tokens_are_the_wanted_share_spread_over_the_data(tokens, share):
    held_out_T = held_out_tokens(tokens, share)
    assert 1 <= held_out_T.sum() < tokens
    assert not held_out_T[0]
    assert held_out_T[-1]
    if tokens >= 1000:
        for part in held_out_T.split(tokens // 2):
            assert part.double().mean() == pytest.approx(share, rel=0.2, abs=0.005)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_too_few_tokens_are_refused(tokens):
    weights, x_TD, _ = planted(tokens=5)
    with pytest.raises(DataError, match=f"'mlp' saw {tokens} calibration tokens"):
        fit_site(weights, x_TD[:tokens], record_of(NormRouterConfig(width=4)), options(ContiguousSplit()), TRAIN)
    fit_site(weights, x_TD[:3], record_of(NormRouterConfig(width=4)), options(ContiguousSplit()), TRAIN)


def test_a_single_token_to_train_on_is_refused():
    weights, x_TD, _ = planted(tokens=5)
    train = replace(TRAIN, holdout_frac=0.9)
    with pytest.raises(DataError, match="1 of them to train on; a router needs at least 2"):
        fit_site(weights, x_TD[:3], record_of(NormRouterConfig(width=4)), options(ContiguousSplit()), train)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"holdout_frac": 0.0}, "holdout_frac"),
        ({"holdout_frac": 1.0}, "holdout_frac"),
        ({"epochs": 0}, "epochs"),
        ({"batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_train_config_refuses_what_means_nothing(bad, message):
    with pytest.raises(ConfigError, match=message):
        RouterTrainConfig(**bad)


def test_loudest_experts_are_those_with_the_largest_peak_not_the_largest_mean():
    # one neuron an expert: the output norm is the activation. Expert 1 is the loudest on average, 3 and 0 on one token each.
    weights = FFNWeights(up_FD=torch.eye(4), down_FD=torch.eye(4))
    x_TD = torch.tensor([[0.0, 5.0, 1.0, 0.0], [7.0, 5.0, 1.0, -9.0], [0.0, 5.0, 1.0, 8.0]])
    loudest = [loudest_experts(x_TD, weights, activation="relu", num_experts=4, count=count) for count in range(5)]
    assert loudest == [(), (3,), (0, 3), (0, 1, 3), (0, 1, 2, 3)]
    tied = loudest_experts(torch.ones(2, 4), weights, activation="relu", num_experts=4, count=2)
    assert tied == (0, 1)


def test_fit_site_numbers_the_experts_that_are_always_on_by_their_new_order():
    weights, x_TD, groups_F = planted()
    loud_F = (groups_F == 2) | (groups_F == 4)
    weights = replace(weights, down_FD=torch.where(loud_F[:, None], 10 * weights.down_FD, weights.down_FD))
    fitted = fit_site(weights, x_TD, record_of(NormRouterConfig(width=4)), options(always_on=2), replace(TRAIN, epochs=1))
    groups = [set(group) for group in groups_of(fitted.order_F, groups_F)]
    assert {e for e, group in enumerate(groups) if group & {2, 4}} == set(fitted.always_on)
    assert len(fitted.always_on) == 2
    assert fit_site(weights, x_TD, record_of(RandomRouterConfig()), options(), TRAIN).always_on == ()


MEMORY = """
from pathlib import Path
import torch
from moeify.convert import ConvertConfig
from moeify.manifest import SiteRecord
from moeify.routers import NormRouterConfig
from moeify.select import Threshold
from moeify.sites import FFNSite, FFNWeights
from moeify.split import ContiguousSplit
from moeify.train.fit import RouterTrainConfig, fit_site

T, D, E = 24 * 1024, 512, 1024
chunk = 1024 * D * 8  # tokens of one chunk in fp64; their activations in fp32 are as many bytes

def memory_mb(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) / 1024

def fit(x_TD):
    site = FFNSite(name="mlp", up="up", down="down", activation="relu", d_model=D, d_ff=E, d_out=D)
    record = SiteRecord(site=site, num_experts=E, router=NormRouterConfig(width=16), rule=Threshold(theta=0.0))
    train = RouterTrainConfig(epochs=1, batch_tokens=256, holdout_frac=0.01)
    fit_site(weights, x_TD, record, ConvertConfig(expert_size=1, split=ContiguousSplit()), train)

weights = FFNWeights(up_FD=torch.randn(E, D), down_FD=torch.randn(E, D))
fit(torch.randn(2048, D).bfloat16())  # what is loaded and made once
x_TD = torch.empty(T, D, dtype=torch.bfloat16).normal_()
before = memory_mb("VmRSS")
fit(x_TD)
grown, allowed = memory_mb("VmHWM") - before, (x_TD.nbytes + T * E * 4 + 12 * chunk) / 2**20
assert grown > T * E * 4 / 2**20, f"only {grown:.0f} MB: the peak was missed"
assert grown <= allowed, f"{grown:.0f} MB, more than the {allowed:.0f} of inputs, targets and twelve chunks"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_fit_site_stays_within_its_inputs_its_targets_and_a_few_chunks():
    # The process, not torch's allocations: what the heap does not give back counts, too. One thread and glibc's own rules, so that
    # the same memory is asked for in the same order every time.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class SmallTensors(TorchDispatchMode):
    """Counts the tensors of at most so many bytes, views of larger ones aside, that are alive at once."""

    def __init__(self, num_bytes):
        super().__init__()
        self.num_bytes, self.seen, self.most = num_bytes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() <= self.num_bytes:
            self.seen.append(weakref.ref(out))
        self.most = max(self.most, sum(ref() is not None for ref in self.seen))
        return out


def test_mean_and_std_leaves_no_small_tensor_between_the_large_ones_of_its_chunks():
    # Each would keep the heap from giving back the chunk below it: how many it does so for differs from run to run, so they are counted.
    x_TD = torch.randn(12 * 1024, 8).bfloat16()
    with SmallTensors(8 * 8) as small:
        mean_D, std_D = _mean_and_std(x_TD)
    assert small.most < 6
    torch.testing.assert_close(mean_D, x_TD.double().mean(0).float())
    torch.testing.assert_close(std_D, x_TD.double().std(0).float())


@pytest.mark.parametrize("router", [GateRouterConfig(), LowRankRouterConfig(rank=4)])
def test_an_ffn_where_calibration_saw_only_zeros_is_named(router):
    weights, x_TD = random_ffn(D, E * G, gated=True), torch.zeros(40, D)
    record = record_of(router, num_experts=E * G)
    record = replace(record, site=replace(record.site, gate="gate"))
    with pytest.raises(DataError, match=f"'{record.site.name}': calibration saw only zeros at this FFN; give other data"):
        fit_site(weights, x_TD, record, ConvertConfig(expert_size=1), TRAIN)


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 10, 14, 15])
def test_minimise_takes_any_number_of_steps(steps):
    leaf = torch.ones(3, requires_grad=True)
    minimise([leaf], lambda rows: leaf.square().sum() * len(rows), steps, epochs=1, batch_tokens=1, lr=1e-2)
    assert leaf.isfinite().all()
    assert (leaf < 1).all()
