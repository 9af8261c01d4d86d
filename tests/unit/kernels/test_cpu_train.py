"""The compiled kernels of training: every instruction set, layout and activation, threads, memory, and what a training step does with them.

`test_kernels.py` compares results and gradients with every other implementation's, gradients of probabilities among them.
Letters: T tokens, D model width, O output width, F FFN width, E experts.
"""

import concurrent.futures
import dataclasses

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, needs_library, random_ffn, random_plan, tensors_of
from numerics import assert_as_accurate_as_torch
from pretraining import sites_of, tiny_gpt
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from moeify.convert import apply_site
from moeify.errors import KernelError
from moeify.kernels import build_plan, cpu, cpu_train, explain, masked, moe_ffn
from moeify.manifest import SiteRecord
from moeify.routers import LinearRouterConfig
from moeify.select import TopK
from moeify.sites.formula import ACTIVATIONS
from moeify.sites.site import FFNWeights

pytestmark = [needs_library, pytest.mark.usefixtures("poisoned_empty")]
REGIMES = pytest.mark.parametrize(
    ("T", "E", "F", "D", "keep"),
    [
        pytest.param(1, 3, 20, 17, 0.7, id="one token, odd widths"),
        pytest.param(70, 4, 300, 40, 0.4, id="experts of more than one slice"),
        pytest.param(400, 5, 83, 130, 0.3, id="several blocks of tokens, experts of unequal size, several panels"),
        pytest.param(300, 40, 40, 33, 0.02, id="experts of one neuron, many without tokens"),
        pytest.param(150, 1, 64, 1100, 0.9, id="long rows: sums in parts"),
    ],
)


def gradients(function, x_TD, weights, upstream_TD, dtype):
    """y and every gradient, in a dtype."""
    x, w = x_TD.to(dtype).requires_grad_(), map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
    y = function(x, w)
    found = torch.autograd.grad(y + 0 * x.sum(), [x, *tensors_of(w)], upstream_TD.to(dtype), allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


def train(plan, activation="relu"):
    return lambda x, w: moe_ffn(x, w, plan, activation=activation, impl="cpu_train")


def assert_accurate(x_TD, weights, plan, upstream_TD, activation="relu"):
    found = gradients(train(plan, activation), x_TD, weights, upstream_TD, x_TD.dtype)
    # the loop over tokens is the oracle of test_kernels.py; for hundreds of tokens the masked dense FFN in float64, which that tests, is
    exact = gradients(lambda x, w: masked.moe_ffn(x, w, plan, activation=activation), x_TD, weights, upstream_TD, torch.float64)
    plain = gradients(lambda x, w: masked.moe_ffn(x, w, plan, activation=activation), x_TD, weights, upstream_TD, x_TD.dtype)
    for got, oracle, baseline in zip(found, exact, plain, strict=True):
        assert_as_accurate_as_torch(got, oracle=oracle, baseline=baseline)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("gated", "biased", "conv1d"), [(False, True, False), (True, False, True)], ids=["plain, Linear", "gated, Conv1D"])
@REGIMES
def test_results_and_gradients_are_as_accurate_as_torch_in_every_regime(monkeypatch, isa, dtype, gated, biased, conv1d, T, E, F, D, keep):
    if isa not in cpu.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu.FORCE_ISA, isa)
    weights = random_ffn(D, F, gated=gated, biased=biased, dtype=dtype, conv1d=conv1d)
    assert_accurate(torch.randn(T, D).to(dtype), weights, random_plan(T, E, keep), torch.randn(T, D).to(dtype))


@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation_and_its_derivative_far_out_too(activation, gated):
    # Neuron j has the activation x * j: from -40 to 40, where exponentials overflow and derivatives vanish.
    T, F = 81, 12
    x_TD, plan = torch.linspace(-1, 1, T)[:, None], random_plan(T, 3, 0.7)
    weights = FFNWeights(torch.linspace(1, 40, F)[:, None], torch.randn(F, 1), torch.linspace(40, 1, F)[:, None] if gated else None)
    assert_accurate(x_TD, weights, plan, torch.randn(T, 1), activation)


@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_derivatives_of_large_numbers_are_finite(activation):
    x_TD = torch.tensor([[1e4], [-1e4], [1e18], [-1e18]]).requires_grad_()
    weights = FFNWeights(torch.ones(1, 1), torch.ones(1, 1))
    moe_ffn(x_TD, weights, build_plan(torch.ones(4, 1, dtype=torch.bool)), activation=activation, impl="cpu_train").sum().backward()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](x_TD.double()).sum(), x_TD)
    torch.testing.assert_close(x_TD.grad, expected)


def test_output_of_another_width_and_layouts_of_each_kind():
    D, O, F, plan, upstream_TO = 24, 40, 50, random_plan(90, 4, 0.5), torch.randn(90, 40)  # noqa: E741
    wide = torch.randn(90, 2 * D)
    fused = torch.randn(D, 2 * F)  # gate and up of one Conv1D: by column, and neither dense
    layouts = {
        "rows of a wider matrix": (torch.randn(F, D + 3)[:, :D], torch.randn(F, O)),
        "halves of a fused Conv1D": (fused.t()[:F], torch.randn(O, F).t()),
        "no stride of one": (torch.randn(F, 2 * D)[:, ::2], torch.randn(2 * O, F).t()[:, ::2]),
    }
    for up_FD, down_FO in layouts.values():
        weights = FFNWeights(up_FD, down_FO, fused.t()[F:], torch.randn(F), None, torch.randn(O))
        for x_TD in (wide[:, :D], wide[:, ::2], torch.randn(1, D).expand(90, D), torch.randn(D, 90).t()):
            assert_accurate(x_TD, weights, plan, upstream_TO)


def test_many_threads_at_once_get_their_own_gradients():
    weights = random_ffn(24, 50, gated=True)
    cases = [(torch.randn(T, 24), random_plan(T, 5, 0.4), torch.randn(T, 24)) for T in (1, 7, 40, 90)]

    def work(case):
        x_TD, plan, upstream_TD = case
        return gradients(train(build_plan(plan.mask_TE), "silu"), x_TD, weights, upstream_TD, torch.float32)

    expected = [work(case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(10):
            for found, alone in zip(pool.map(work, cases), expected, strict=True):
                assert all(got.equal(want) for got, want in zip(found, alone, strict=True))


def test_only_the_gradients_that_are_wanted_are_computed():
    weights, x_TD, plan = random_ffn(8, 12, gated=True, biased=True), torch.randn(5, 8), random_plan(5, 3, 0.6)
    probs_TE = torch.rand(5, 3)
    names = (*cpu.MATRICES, *cpu.BIASES)
    inputs = dict(zip(("x", *names, "probs"), (x_TD, *(getattr(weights, n) for n in names), probs_TE), strict=True))
    for name, wanted in inputs.items():
        leaf = wanted.detach().clone().requires_grad_()
        now = {**inputs, name: leaf}
        w = FFNWeights(**{n: now[n] for n in names})
        results = []
        for impl in ("cpu_train", "masked"):
            y_TD = moe_ffn(now["x"], w, build_plan(plan.mask_TE, now["probs"]), activation="silu", impl=impl)
            results.append(torch.autograd.grad(y_TD.square().sum(), leaf)[0])
        torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_are_the_same_again_and_for_any_number_of_threads(dtype):
    weights, x_TD, plan = (
        random_ffn(40, 150, gated=True, biased=True, dtype=dtype),
        torch.randn(700, 40).to(dtype),
        random_plan(700, 7, 0.3),
    )
    probs_TE, upstream_TD = torch.rand(700, 7), torch.randn(700, 40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            probs = probs_TE.clone().requires_grad_()
            taught = build_plan(plan.mask_TE, probs)
            found = gradients(lambda x, w, taught=taught: train(taught)(x, w), x_TD, weights, upstream_TD, dtype)
            train(taught)(x_TD, weights).backward(upstream_TD.to(dtype))
            results.append([*found, probs.grad])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_without_tokens_and_batches_without_pairs_or_tokens():
    weights = random_ffn(16, 24, gated=True, biased=True)
    for T, keep in ((0, 0.5), (5, 0.0)):
        x_TD, plan = torch.randn(T, 16), random_plan(T, 6, keep)
        found = gradients(train(plan), x_TD, weights, torch.ones(T, 16), torch.float32)
        assert torch.equal(found[0], weights.down_bias_D.expand(T, 16))
        *others, down_bias = found[1:]
        assert all((t == 0).all() for t in others)
        assert torch.equal(down_bias, torch.full((16,), float(T)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_numbers_of_experts_that_a_token_does_not_take_stay_unseen(dtype):
    weights, mask_TE = random_ffn(8, 12, gated=True, dtype=dtype), torch.rand(40, 3) < 0.5
    mask_TE[:, 1] = False
    for name in cpu.MATRICES:
        getattr(weights, name)[4:8] = float("nan")
    x_TD = torch.randn(40, 8).to(dtype)
    x_TD[~mask_TE[:, 0]] = float("inf")  # of tokens that expert 0 does not see
    found = gradients(train(build_plan(mask_TE)), x_TD, weights, torch.ones(40, 8), dtype)
    assert found[0][mask_TE[:, 0]].isfinite().all()
    assert found[1][mask_TE[:, 0]].isfinite().all()
    assert all(t[:8].isfinite().all() for t in found[2:])


def test_backward_keeps_what_the_pairs_need_and_less_than_dense():
    T, F, D, E = 64, 320, 32, 10
    weights, x_TD = random_ffn(D, F, gated=True), torch.randn(T, D, requires_grad=True)
    mask_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, torch.rand(T, E).topk(2).indices, True)

    def kept(impl):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        w = map_weights(weights, lambda t: t.detach().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y_TD = moe_ffn(x_TD, w, build_plan(mask_TE), activation="silu", impl=impl)
        known = {t.data_ptr() for t in (x_TD, mask_TE, *tensors_of(w))}
        return y_TD, sum(size for pointer, size in sizes.items() if pointer not in known)

    _, ours = kept("cpu_train")
    _, dense = kept("masked")
    assert ours == 4 * 2 * T * 2 * F // E  # up and gate of two experts of ten
    assert ours < dense / 4


def test_operators_pass_opcheck():
    # every expert runs: what pairs do not need of the memory is as it was allocated, and opcheck would compare it
    weights, x_TD, plan = random_ffn(8, 12, gated=True, biased=True), torch.randn(5, 8), random_plan(5, 3, 1.0)
    tensors = [t.clone().requires_grad_() for t in (x_TD, *(getattr(weights, name) for name in cpu_train._FIELDS), torch.rand(5, 3))]
    kept = 2 * 5 * 12
    results = torch.library.opcheck(torch.ops.moeify.ffn_train_cpu.default, (*tensors, plan.mask_TE, "silu", kept))
    assert set(results.values()) == {"SUCCESS"}
    detached = [t.detach() for t in tensors]
    _, kept_K = torch.ops.moeify.ffn_train_cpu(*detached, plan.mask_TE, "silu", kept)
    arguments = (torch.randn(5, 8), *detached, plan.mask_TE, kept_K, "silu", [True] * 8)
    results = torch.library.opcheck(torch.ops.moeify.ffn_train_cpu_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """A router that is taught, and its experts."""

    def __init__(self, D=16, F=24, E=6):
        super().__init__()
        self.weights = torch.nn.ParameterDict(
            {name: t for name, t in vars(random_ffn(D, F, gated=True, biased=True)).items() if t is not None}
        )
        self.router = torch.nn.Linear(D, E)

    def forward(self, x_TD):
        scores_TE = self.router(x_TD.detach()).float()
        mask_TE = scores_TE >= scores_TE.detach().topk(2).values[:, -1:]
        probs_TE = scores_TE.masked_fill(~mask_TE, float("-inf")).softmax(1)
        return moe_ffn(x_TD, FFNWeights(**self.weights), build_plan(mask_TE, probs_TE), activation="silu", training=self.training)


def losses_and_gradients(layer, function, xs, *, autocast=False):
    layer.zero_grad()
    losses = []
    for x in xs:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(function(x).float().square().mean())
        losses[-1].backward()
    return [torch.stack(losses).detach(), *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_gives_the_bits_without_it_over_accumulated_batches(autocast, use_reentrant):
    layer, xs = Layer(), [torch.randn(30, 16, requires_grad=True) for _ in range(2)]
    plain = losses_and_gradients(layer, layer, xs, autocast=autocast)
    again = losses_and_gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), xs, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())
    assert any(p.grad.any() for p in layer.router.parameters()), "the router learns nothing"


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_compiled_step_is_one_graph_for_every_selection(autocast):
    layer, xs = Layer(), [torch.randn(30, 16, requires_grad=True) for _ in range(4)]
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = losses_and_gradients(layer, compiled, xs, autocast=autocast)
    expected = losses_and_gradients(layer, layer, xs, autocast=autocast)
    assert len(graphs) == 1
    if not (autocast and cpu.has_amx()):
        assert any("ffn_train_cpu" in str(target) for target in graphs[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_gpt_compiles_each_mode_once_and_gives_the_eager_gradients():
    model = tiny_gpt().train()
    layers = []
    for site in sites_of(model):
        record = SiteRecord(site=site, num_experts=8, router=LinearRouterConfig(), rule=TopK(k=2))
        layers.append(apply_site(model, record, order_F=None))
        layers[-1].is_taught = True
    graphs = []

    def backend(graph, inputs):
        graphs.append("ffn_train_cpu" in graph.code)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batches = [torch.randint(64, (2, 16)) for _ in range(2)]
    for mode in ("dense", "moe", "dense", "moe"):
        for layer in layers:
            layer.mode = mode
        for ids in batches:
            results = []
            for function in (compiled, model):
                model.zero_grad()
                loss = function(input_ids=ids).logits.square().mean()
                loss.backward()
                results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert graphs == [False, True]


def test_auto_runs_it_in_training_alone_and_says_why_not():
    weights, x_TD = random_ffn(16, 24), torch.randn(100, 16)
    mask_TE = torch.zeros(100, 6, dtype=torch.bool)
    mask_TE[:, :2] = True

    def reason(x=x_TD, w=weights, activation="relu", **options):
        rows = explain(x, w, build_plan(mask_TE), activation=activation, **options)
        (row,) = [c for c in rows if c.name == "cpu_train"]
        return row.reason if not row.chosen else None

    assert reason(training=True) is None
    assert reason(x=x_TD.clone().requires_grad_()) is None
    assert reason(w=map_weights(weights, lambda t: t.clone().requires_grad_())) is None
    assert reason() == "no gradient is wanted"
    with torch.no_grad():
        assert reason(x=x_TD.clone().requires_grad_()) == "no gradient is wanted"
        assert reason(training=True) is None, "a forward without gradients gives the bits of its recomputation"
    assert "float64" in reason(x=x_TD.double(), w=map_weights(weights, torch.Tensor.double), training=True)
    assert "mish" in reason(activation="mish", training=True)
    mask_TE[:] = True
    assert reason(training=True) == "active fraction 1.00 is above the crossover 0.9 for 100 tokens"


def test_tensors_that_do_not_fit_are_refused_before_native_code_runs():
    weights, x_TD, plan = random_ffn(8, 12, gated=True, biased=True), torch.randn(5, 8), random_plan(5, 3, 0.6)

    def call(x=x_TD, mask=plan.mask_TE, kept=0, **changes):
        w = dataclasses.replace(weights, **changes)
        fields = [getattr(w, name) for name in cpu_train._FIELDS]
        return torch.ops.moeify.ffn_train_cpu(x, *fields, None, mask, "relu", kept)

    call()
    for changes, message in (
        ({"x": torch.randn(5, 9)}, r"x_TD is \(5, 9\), expected \(5, 8\)"),
        ({"mask": plan.mask_TE.byte()}, "mask_TE is torch.uint8"),
        ({"mask": torch.ones(5, 13, dtype=torch.bool)}, "13 experts do not fit 12 neurons"),
        ({"down_FD": torch.randn(11, 8)}, "shapes do not fit together"),
        ({"gate_bias_F": torch.randn(11)}, "shapes do not fit together"),
        ({"up_FD": torch.randn(12, 8).bfloat16()}, "must be torch.float32"),
        ({"kept": 1}, "out of range"),
    ):
        with pytest.raises(KernelError, match=message):
            call(**changes)


def test_result_is_that_of_the_loop_over_tokens():
    weights, x_TD, plan = random_ffn(24, 30, gated=True, biased=True), torch.randn(20, 24), random_plan(20, 4, 0.4)
    oracle = loop_over_tokens(x_TD.double(), map_weights(weights, torch.Tensor.double), plan.mask_TE, activation="silu")
    torch.testing.assert_close(train(plan, "silu")(x_TD, weights).double(), oracle, rtol=1e-5, atol=1e-6)
