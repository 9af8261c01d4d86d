"""Routers: their targets against explicit expert outputs, what each computes, its JSON and its cost."""

import json

import pytest
import torch
from ffn_cases import map_weights, random_ffn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeify._config import from_dict, to_dict
from moeify.errors import ConfigError
from moeify.kernels import build_plan
from moeify.kernels.reference import moe_ffn
from moeify.routers import (
    ROUTERS,
    CentreRouterConfig,
    GateRouterConfig,
    LinearRouterConfig,
    LowRankRouterConfig,
    MLPRouterConfig,
    NormRouterConfig,
    OracleRouterConfig,
    RandomRouterConfig,
    build_router,
    check_router,
    expert_grams,
    expert_means,
    expert_norms,
    expert_sums,
)
from moeify.select import Threshold
from moeify.sites import FFNSite, expert_bounds, ffn_hidden
from moeify.train.fit import RouterTrainConfig, fit_router, score_router

D, T = 12, 9
SPLITS = [pytest.param(24, 4, id="equal"), pytest.param(26, 4, id="two larger"), pytest.param(7, 4, id="of 2 and 1"),
          pytest.param(5, 5, id="one neuron each"), pytest.param(11, 1, id="one expert")]  # fmt: skip


def site_of(num_neurons, *, activation="silu", gated=True):
    gate = "mlp.gate" if gated else None
    return FFNSite(name="mlp", up="mlp.up", down="mlp.down", gate=gate, activation=activation, d_model=D, d_ff=num_neurons, d_out=D)


def explicit_norms(x_TD, weights, num_experts, *, activation):
    """|y_e|, every expert's output computed alone, without the output bias."""
    columns = []
    for e in range(num_experts):
        only_e = torch.zeros(x_TD.shape[0], num_experts, dtype=torch.bool)
        only_e[:, e] = True
        y_TD = moe_ffn(x_TD, weights, build_plan(only_e), activation=activation)
        columns.append((y_TD - (0 if weights.down_bias_D is None else weights.down_bias_D)).norm(dim=1))
    return torch.stack(columns, dim=1)


# -- targets -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_neurons", "num_experts"), SPLITS)
@pytest.mark.parametrize("gated", [False, True])
def test_gram_norms_equal_the_norms_of_explicit_outputs(num_neurons, num_experts, gated):
    weights = random_ffn(D, num_neurons, gated=gated, biased=True, dtype=torch.float64)
    x_TD, bounds = torch.randn(T, D, dtype=torch.float64), expert_bounds(num_neurons, num_experts)
    grams = expert_grams(weights.down_FD, bounds)
    norms = expert_norms(ffn_hidden(x_TD, weights, activation="silu"), grams, bounds)
    assert grams.dtype is norms.dtype is torch.float64
    torch.testing.assert_close(norms, explicit_norms(x_TD, weights, num_experts, activation="silu"), rtol=1e-10, atol=1e-12)


def test_gram_norms_of_half_weights_are_fp32_and_never_negative_under_the_root():
    weights = random_ffn(D, 26, dtype=torch.bfloat16)
    grams = expert_grams(weights.down_FD, expert_bounds(26, 4))
    h_TF = torch.zeros(T, 26, dtype=torch.bfloat16)
    norms = expert_norms(h_TF, grams, expert_bounds(26, 4))
    assert norms.dtype is torch.float32
    assert torch.equal(norms, torch.zeros(T, 4))
    # cancelling neurons: h^T G h is a rounding error around zero
    down_FD = torch.ones(2, D)
    norms = expert_norms(torch.tensor([[1e3, -1e3], [0.1, -0.1]]), expert_grams(down_FD, (0, 2)), (0, 2))
    assert norms.isfinite().all()
    assert (norms < 1).all()


class LargestTensor(TorchDispatchMode):
    """Largest number of elements that any operation wrote."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_gram_norms_never_hold_the_outputs_of_all_experts():
    tokens, d_model, num_neurons, num_experts = 64, 48, 66, 16
    weights, bounds = random_ffn(d_model, num_neurons), expert_bounds(num_neurons, num_experts)
    h_TF = torch.randn(tokens, num_neurons)
    with LargestTensor() as largest:
        grams = expert_grams(weights.down_FD, bounds)
        expert_norms(h_TF, grams, bounds)
    assert largest.numel <= tokens * num_experts * bounds[1]  # the padded activations
    assert largest.numel < num_experts * tokens * d_model / 8


def test_sums_and_means_by_hand():
    bounds = (0, 2, 4, 5)
    h_TF = torch.tensor([[1.0, -2.0, 0.0, 4.0, 5.0], [0.0, 0.0, 1.0, 1.0, -3.0]])
    assert expert_sums(h_TF, bounds).tolist() == [[3.0, 4.0, 5.0], [0.0, 2.0, 3.0]]
    rows_FD = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(expert_means(rows_FD, bounds), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.6, 0.8]]))


# -- routers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["exp", "abs"])
def test_norm_router_computes_its_formula(output):
    router = build_router(NormRouterConfig(width=5, output=output), site=site_of(24), num_experts=4)
    x_TD = torch.randn(T, D)
    z_TE = torch.relu(x_TD @ router.hidden.weight.t() + router.hidden.bias) @ router.out.weight.t() + router.out.bias
    torch.testing.assert_close(router(x_TD), (z_TE / 2).exp() if output == "exp" else z_TE.abs())
    assert (router(x_TD) >= 0).all()


def test_norm_router_of_huge_inputs_stays_finite():
    router = build_router(NormRouterConfig(width=5), site=site_of(24), num_experts=4)
    scores = router(torch.full((1, D), 1e30))
    assert scores.isfinite().all()
    assert scores.square().isfinite().all()


def test_mlp_router_starts_as_the_centres_and_the_identity():
    weights, bounds = random_ffn(D, 26, gated=True), expert_bounds(26, 4)
    router = build_router(MLPRouterConfig(), site=site_of(26), num_experts=4)
    router.set_centres(weights, bounds)
    x_TD = torch.randn(T, D)
    normed = weights.gate_FD / weights.gate_FD.norm(dim=1, keepdim=True)
    centres = torch.stack([normed[a:b].mean(0) for a, b in zip(bounds, bounds[1:], strict=False)])
    expected = torch.tanh(x_TD / x_TD.norm(dim=1, keepdim=True) @ centres.t())
    torch.testing.assert_close(router.raw_scores(x_TD), expected)
    torch.testing.assert_close(router(x_TD), torch.sigmoid(expected))


@pytest.mark.parametrize("gated", [False, True])
def test_centre_router_is_one_plus_the_cosine_with_the_mean_of_the_normalised_rows(gated):
    weights, bounds = random_ffn(D, 26, gated=gated), expert_bounds(26, 4)
    router = build_router(CentreRouterConfig(), site=site_of(26), num_experts=4)
    router.set_centres(weights, bounds)
    x_TD, rows = torch.randn(T, D), weights.gate_FD if gated else weights.up_FD
    for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        centre = torch.stack([row / row.norm() for row in rows[a:b]]).mean(0)
        torch.testing.assert_close(router(x_TD)[:, e], 1 + torch.cosine_similarity(x_TD, centre.unsqueeze(0)))
    torch.testing.assert_close(router(3 * x_TD), router(x_TD))


def test_random_router_is_a_fixed_function_of_its_seed():
    x_TD, scores = torch.randn(T, D), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        router = build_router(RandomRouterConfig(), site=site_of(24), num_experts=4)
        scores.append(router(x_TD))
        assert torch.equal(router(x_TD), scores[-1])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert (scores[0] >= 0).all()


@pytest.mark.parametrize(("num_neurons", "num_experts"), SPLITS)
def test_oracle_scores_are_the_true_norms(num_neurons, num_experts):
    weights = random_ffn(D, num_neurons, gated=True, biased=True)
    router = build_router(OracleRouterConfig(), site=site_of(num_neurons), num_experts=num_experts)
    x_TD = torch.randn(T, D)
    expected = explicit_norms(x_TD, weights, num_experts, activation="silu")
    torch.testing.assert_close(router(x_TD, weights), expected, rtol=1e-4, atol=1e-5)


def test_oracle_captures_at_least_as_much_as_any_other_router():
    weights, bounds = random_ffn(D, 26, gated=True), expert_bounds(26, 6)
    x_TD = torch.randn(50, D)
    energy_TE = explicit_norms(x_TD, weights, 6, activation="silu").square()
    captured = {}
    for name, (config, _) in ROUTERS.items():
        router = build_router(config(), site=site_of(26), num_experts=6)
        if hasattr(router, "set_centres"):
            router.set_centres(weights, bounds)
        captured[name] = energy_TE.gather(1, router(x_TD, weights).topk(2, dim=1).indices).sum().item()
    assert captured["oracle"] == pytest.approx(energy_TE.topk(2, dim=1).values.sum().item())
    assert all(captured["oracle"] >= value for value in captured.values())


@pytest.mark.parametrize("num_experts", [26, 6])
def test_oracle_of_activations_is_the_norm_of_each_experts_neurons(num_experts):
    weights, bounds = random_ffn(D, 26, gated=True, biased=True), expert_bounds(26, num_experts)
    x_TD = torch.randn(T, D)
    h_TF = ffn_hidden(x_TD, weights, activation="silu")
    expected = torch.stack([h_TF[:, a:b].norm(dim=1) for a, b in zip(bounds, bounds[1:], strict=False)], dim=1)
    router = build_router(OracleRouterConfig(of="activation"), site=site_of(26), num_experts=num_experts)
    torch.testing.assert_close(router(x_TD, weights), expected)


# -- the FFN's own gate (CATS, CHESS) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [26, 6])
@pytest.mark.parametrize("scale", ["none", "up", "output"])
def test_gate_router_computes_its_formula(scale, num_experts):
    weights, bounds = random_ffn(D, 26, gated=True, biased=True), expert_bounds(26, num_experts)
    x_TD, mean_up_F = torch.randn(T, D), torch.rand(26) + 0.5
    router = build_router(GateRouterConfig(scale=scale), site=site_of(26), num_experts=num_experts)
    router.set_scales(weights, mean_up_F)
    scale_F = {"none": 1, "up": mean_up_F, "output": mean_up_F * weights.down_FD.norm(dim=1)}[scale]
    gate_TF = torch.nn.functional.silu(x_TD @ weights.gate_FD.t() + weights.gate_bias_F) * scale_F
    expected = torch.stack([gate_TF[:, a:b].norm(dim=1) for a, b in zip(bounds, bounds[1:], strict=False)], dim=1)
    torch.testing.assert_close(router(x_TD, weights), expected)


def test_threshold_on_the_gate_routers_score_is_a_threshold_for_each_channel():
    weights, x_TD, mean_up_F = random_ffn(D, 26, gated=True), torch.randn(T, D), torch.rand(26) + 0.5
    router = build_router(GateRouterConfig(scale="up"), site=site_of(26), num_experts=26)
    router.set_scales(weights, mean_up_F)
    gate_TF = torch.nn.functional.silu(x_TD @ weights.gate_FD.t())
    assert torch.equal(Threshold(theta=0.1)(router(x_TD, weights)), gate_TF.abs() >= 0.1 / mean_up_F)


def test_a_neuron_whose_up_was_silent_in_calibration_still_counts():
    weights, mean_up_F = random_ffn(D, 4, gated=True), torch.tensor([0.0, 1.0, 1.0, 2.0])
    router = build_router(GateRouterConfig(scale="up"), site=site_of(4), num_experts=4)
    router.set_scales(weights, mean_up_F)
    assert router.scale_F.tolist() == pytest.approx([0.01, 1.0, 1.0, 2.0])
    router.set_scales(weights, torch.zeros(4))
    assert router.scale_F.tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("build", [build_router, lambda config, *, site, num_experts: check_router(config, site)])
def test_gate_router_of_an_ffn_without_a_gate_is_refused(build):
    with pytest.raises(ConfigError, match="'mlp' has no gate"):
        build(GateRouterConfig(), site=site_of(24, gated=False), num_experts=24)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (NormRouterConfig(), 0.0),
        (GateRouterConfig(), 1 / 3),
        (OracleRouterConfig(), 1.0),
        (OracleRouterConfig(of="activation"), 2 / 3),
    ],
    ids=repr,
)
def test_ffn_share_is_what_the_router_reads_of_the_ffn(config, share):
    assert build_router(config, site=site_of(24), num_experts=24).ffn_share == pytest.approx(share)


# -- low rank ----------------------------------------------------------------------------------------------------------------------------


def fitted_low_rank(weights, x_TD, *, rank, gated, num_experts=26, activation="silu"):
    router = build_router(LowRankRouterConfig(rank=rank), site=site_of(26, gated=gated, activation=activation), num_experts=num_experts)
    fit_router(router, x_TD, weights, activation=activation, num_experts=num_experts, config=RouterTrainConfig())
    return router


def of_largest(scores_TE):
    return scores_TE / scores_TE.amax(1, keepdim=True)


@pytest.mark.parametrize("num_experts", [26, 6])
@pytest.mark.parametrize("gated", [False, True])
def test_low_rank_router_of_full_rank_gives_the_true_contributions(gated, num_experts):
    weights, x_TD = random_ffn(D, 26, gated=gated, biased=True), torch.randn(200, D)
    router = fitted_low_rank(weights, x_TD, rank=D, gated=gated, num_experts=num_experts)
    h_TF = ffn_hidden(x_TD, weights, activation="silu") * weights.down_FD.norm(dim=1)
    bounds = expert_bounds(26, num_experts)
    expected = torch.stack([h_TF[:, a:b].norm(dim=1) for a, b in zip(bounds, bounds[1:], strict=False)], dim=1)
    torch.testing.assert_close(of_largest(router(x_TD)), of_largest(expected), rtol=1e-3, atol=1e-4)


def test_low_rank_router_is_exact_where_the_inputs_have_its_rank():
    weights = random_ffn(D, 26, gated=True)
    x_TD = torch.randn(200, 3) @ torch.randn(3, D)
    router = fitted_low_rank(weights, x_TD, rank=3, gated=True)
    expected = (ffn_hidden(x_TD, weights, activation="silu") * weights.down_FD.norm(dim=1)).abs()
    torch.testing.assert_close(of_largest(router(x_TD)), of_largest(expected), rtol=2e-2, atol=1e-2)


def test_low_rank_router_gives_the_same_scores_however_much_of_a_token_it_sees():
    weights, x_TD = random_ffn(D, 26, gated=True), torch.randn(200, D)
    router = build_router(LowRankRouterConfig(rank=D), site=site_of(26, gated=True, activation="relu"), num_experts=26)
    fit_router(router, x_TD, weights, activation="relu", num_experts=26, config=RouterTrainConfig())
    scores_TE = router(x_TD)
    torch.testing.assert_close(router(0.1 * x_TD), scores_TE, rtol=2e-2, atol=2e-2)
    assert bool((scores_TE < 1e-2).any()), "ReLU leaves neurons at zero, which must not decide the mean"
    assert scores_TE.amax(1).median() < 100
    assert torch.equal(router(torch.zeros(2, D)), torch.zeros(2, 26))


@pytest.mark.parametrize("gated", [False, True])
def test_low_rank_routers_energy_is_the_mean_over_what_it_does_not_see(gated):
    # relu2's expectation is a polynomial where no input is negative, which three nodes integrate exactly: E[(m + s n)^4]
    router = build_router(LowRankRouterConfig(rank=2), site=site_of(2, gated=gated, activation="relu2"), num_experts=2)
    inner, std_F = (router.gate, router.gate_std_F) if gated else (router.up, router.up_std_F)
    with torch.no_grad():
        router.project.weight.zero_()
        if gated:
            router.up.bias.copy_(torch.tensor([1.0, -2.0]))
            router.up_std_F.copy_(torch.tensor([3.0, 0.0]))
        inner.bias.copy_(torch.tensor([5.0, 3.0]))
        std_F.copy_(torch.tensor([2.0, 0.0]))
        router.scale_F.copy_(torch.tensor([1.0, 10.0]))
    energy = (5**4 + 6 * 5**2 * 2**2 + 3 * 2**4) * (1 + 3**2 if gated else 1)
    size_F = torch.tensor([energy**0.5, 90.0 * (2 if gated else 1)])
    torch.testing.assert_close(router(torch.zeros(1, D)), (size_F / size_F.prod().sqrt())[None])


def test_low_rank_router_captures_more_with_more_rank_and_more_than_chance():
    weights, x_TD = random_ffn(D, 26, gated=True), torch.randn(400, D)
    captured = []
    for rank in (1, 4, 8):
        router = fitted_low_rank(weights, x_TD, rank=rank, gated=True)
        captured.append(score_router(router, x_TD, weights, activation="silu", num_experts=26)[1]["captured@0.5"])
    assert 0.55 < captured[0] < captured[1] < captured[2]


def test_low_rank_router_of_no_rank_is_refused():
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        LowRankRouterConfig(rank=0)


# -- the router of SSD -----------------------------------------------------------------------------------------------------------------


def test_linear_router_scores_the_direction_of_each_experts_mean_row():
    weights, bounds = random_ffn(D, 26, gated=True), expert_bounds(26, 4)
    router = build_router(LinearRouterConfig(), site=site_of(26), num_experts=4)
    router.set_centres(weights, bounds)
    x_TD = torch.randn(T, D)
    means = torch.stack(
        [torch.nn.functional.normalize(weights.gate_FD[a:b], dim=1).mean(0) for a, b in zip(bounds, bounds[1:], strict=False)]
    )
    logits = x_TD @ (means / means.norm(dim=1, keepdim=True)).t() * weights.gate_FD.norm(dim=1).mean()
    scores = router(x_TD)
    torch.testing.assert_close(scores.log(), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores / scores.sum(1, keepdim=True), logits.softmax(1))
    assert router(1e4 * x_TD).isfinite().all()
    router.set_random(weights, generator=torch.Generator().manual_seed(1))
    first = router.out.weight.clone()
    torch.testing.assert_close(first.norm(dim=1), weights.gate_FD.norm(dim=1).mean().expand(4))
    router.set_random(weights, generator=torch.Generator().manual_seed(1))
    assert torch.equal(router.out.weight, first)


# -- all of them -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_router_gives_fp32_scores_of_any_input_dtype_under_autocast_too(name, dtype):
    router = build_router(ROUTERS[name][0](), site=site_of(26), num_experts=4)
    x_TD, weights = torch.randn(T, D).to(dtype), random_ffn(D, 26, gated=True, dtype=dtype)
    for x in (x_TD, x_TD[:0], x_TD[:1]):
        scores = router(x, weights)
        assert scores.shape == (x.shape[0], 4)
        assert scores.dtype is (torch.float64 if name == "oracle" and dtype is torch.float64 else torch.float32)
    if not router.needs_weights:  # those compute the model's own projections, as the model would
        plain = router(x_TD, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router(x_TD, weights), plain)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_stays_fp32_when_its_model_is_cast_and_moves_with_it(name):
    router = build_router(ROUTERS[name][0](), site=site_of(26), num_experts=4)
    model = nn.ModuleDict({"router": router, "other": nn.Linear(2, 2)})
    before = {key: value.clone() for key, value in router.state_dict().items()}
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(model)
        assert {p.dtype for p in router.parameters()} <= {torch.float32}
        assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    assert next(model.to("meta", torch.bfloat16).other.parameters()).dtype is torch.bfloat16
    assert all(p.is_meta and p.dtype is torch.float32 for p in router.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_built_again_from_its_json_and_tensors(name):
    config = ROUTERS[name][0]()
    again = from_dict(ROUTERS[name][0], json.loads(json.dumps(to_dict(config))))
    assert again == config
    router, other = (build_router(c, site=site_of(26), num_experts=4) for c in (config, again))
    for buffer in router.buffers():
        buffer.normal_()  # as fitting does; else a buffer that is not saved would not be missed
    other.load_state_dict(router.state_dict())
    x_TD, weights = torch.randn(T, D), random_ffn(D, 26, gated=True)
    assert torch.equal(router(x_TD, weights), other(x_TD, weights))
    assert router.config == config


@pytest.mark.parametrize(
    ("config", "flops"),
    [
        (NormRouterConfig(width=5), 2 * 5 * (D + 4)),
        (MLPRouterConfig(), 2 * 4 * (D + 4)),
        (CentreRouterConfig(), 2 * 4 * D),
        (LinearRouterConfig(), 2 * 4 * D),
        (RandomRouterConfig(), 2 * 4 * D),
        (OracleRouterConfig(), 2 * (2 * D * 24 + 24 * 6)),
        (OracleRouterConfig(of="activation"), 2 * 2 * D * 24),
        (GateRouterConfig(), 2 * D * 24),
        (LowRankRouterConfig(rank=5), 2 * 5 * (D + 2 * 24)),
        (LowRankRouterConfig(rank=99), 2 * D * (D + 2 * 24)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_flops_per_token_counts_the_matrices(config, flops):
    assert build_router(config, site=site_of(24), num_experts=4).flops_per_token == flops


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="router width must be at least 1, got 0"):
        NormRouterConfig(width=0)
    with pytest.raises(ConfigError, match=r"output must be one of 'exp', 'abs', got 'relu'"):
        from_dict(NormRouterConfig, {"output": "relu"})


def test_oracle_does_not_change_the_weights():
    weights = random_ffn(D, 26, gated=True)
    before = map_weights(weights, torch.clone)
    build_router(OracleRouterConfig(), site=site_of(26), num_experts=4)(torch.randn(T, D), weights)
    assert all(torch.equal(a, b) for a, b in zip(before.per_neuron(), weights.per_neuron(), strict=True))


def test_oracle_router_costs_the_hidden_activations_and_the_grams():
    site = FFNSite(name="a", up="a.u", down="a.d", gate="a.g", activation="silu", d_model=6, d_ff=10, d_out=6)
    router = build_router(OracleRouterConfig(), site=site, num_experts=4)
    assert router.flops_per_token == 2 * (2 * 6 * 10 + 10 * 3)
