"""What is special to the grouped kernel: its segments, its memory, and the grouped_mm way of CUDA (which also runs on CPU, in bf16)."""

import pytest
import torch
from ffn_cases import loop_over_tokens, map_weights, random_ffn, random_plan
from numerics import assert_as_accurate_as_torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.kernels import build_plan, grouped, masked
from moeify.kernels.grouped import Segment, find_segments

SIZES = {"num_tokens": 100, "expert_size": 24, "flops_per_row": 100_000, "row_elements": 64}


@pytest.mark.parametrize(
    ("counts", "segments"),
    [
        pytest.param([], [], id="no expert"),
        pytest.param([0, 0], [], id="no pair"),
        pytest.param([10, 10, 11, 10], [Segment(0, 4, 11, False)], id="like counts are joined"),
        pytest.param([0, 10, 10, 0], [Segment(1, 3, 10, False)], id="idle experts at the edges are left out"),
        pytest.param(
            [2, 2, 40, 2, 2], [Segment(0, 2, 2, False), Segment(2, 3, 40, False), Segment(3, 5, 2, False)], id="a long one stands alone"
        ),
        pytest.param([100, 90, 100], [Segment(0, 3, 100, True)], id="experts of most tokens are shared"),
        pytest.param([100, 3, 3], [Segment(0, 1, 100, True), Segment(1, 3, 3, False)], id="one always-on expert"),
    ],
)
def test_find_segments_by_hand(counts, segments):
    assert find_segments(counts, **SIZES) == segments


def test_find_segments_when_experts_are_wide_never_joins():
    assert find_segments([5, 0, 5], **(SIZES | {"expert_size": 64})) == [Segment(0, 1, 5, False), Segment(2, 3, 5, False)]


@pytest.mark.parametrize("seed", range(20))
def test_find_segments_covers_each_busy_expert_once_and_bounds_the_padding(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = (torch.rand(50, generator=generator) ** 4 * 100).long().tolist()
    segments = find_segments(counts, **SIZES)
    covered = [e for s in segments for e in range(s.first, s.last)]
    assert covered == sorted(set(covered))
    assert {e for e, count in enumerate(counts) if count} <= set(covered)
    for s in segments:
        total = sum(counts[s.first : s.last])
        slack = grouped.SEGMENT_FLOPS / SIZES["flops_per_row"]
        assert s.rows >= max(counts[s.first : s.last])
        assert (s.last - s.first) * s.rows <= max((1 + grouped.PADDING_FRAC) * total + slack, total / grouped.shared_frac(24))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3])
def test_largest_tensor_forward_and_backward_is_linear_in_pairs(keep):
    T, E, G, D = 256, 64, 4, 16
    weights, plan = map_weights(random_ffn(D, E * G, gated=True), torch.Tensor.requires_grad_), random_plan(T, E, keep)
    x_TD = torch.randn(T, D, requires_grad=True)
    with LargestTensor() as largest:
        grouped.moe_ffn(x_TD, weights, plan, activation="silu").sum().backward()
    padded = (1 + grouped.PADDING_FRAC) * plan.num_pairs + grouped.SEGMENT_FLOPS / (6 * G * D)
    assert largest.elements <= max((T + 1) * D, weights.up_FD.numel(), T * E, padded * max(D, G))


def test_memory_when_a_segment_is_full_is_cut(monkeypatch):
    monkeypatch.setattr(grouped, "SEGMENT_ELEMENTS", 1 << 10)
    weights, plan, x_TD = random_ffn(16, 256), random_plan(64, 64, 0.2), torch.randn(64, 16)
    with LargestTensor() as largest:
        out = grouped.moe_ffn(x_TD, weights, plan, activation="relu")
    assert largest.elements <= 65 * 64
    torch.testing.assert_close(out, masked.moe_ffn(x_TD, weights, plan, activation="relu"))


def test_grouped_when_upstream_gradient_has_stride_zero_is_right():
    weights, plan, x_TD = random_ffn(8, 24), random_plan(6, 4, 0.5), torch.randn(6, 8, requires_grad=True)
    grouped.moe_ffn(x_TD, weights, plan, activation="relu").sum().backward()
    expected = torch.autograd.grad(masked.moe_ffn(x_TD, weights, plan, activation="relu").sum(), x_TD)[0]
    torch.testing.assert_close(x_TD.grad, expected)


needs_grouped_mm = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no public grouped_mm")


@needs_grouped_mm
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, False)])
def test_grouped_mm_way_matches_fp64_loop_forward_and_backward(keep, gated, biased):
    weights, plan = random_ffn(16, 64, gated=gated, biased=biased, dtype=torch.bfloat16), random_plan(21, 4, keep)
    x_TD = torch.randn(21, 16).bfloat16()
    assert grouped.grouped_mm_refusal(x_TD, weights, plan) is None

    def run(function, dtype):
        x, w = x_TD.to(dtype).requires_grad_(), map_weights(weights, lambda t: t.detach().to(dtype).requires_grad_())
        out = function(x, w)
        return out.detach(), *torch.autograd.grad(
            out.sum() + 0 * x.sum() + 0 * w.up_FD.sum() + 0 * w.down_FD.sum(), [x, w.up_FD, w.down_FD]
        )

    got = run(lambda x, w: grouped._by_grouped_mm(x, w, plan, activation="silu"), torch.bfloat16)
    oracle = run(lambda x, w: loop_over_tokens(x, w, plan.mask_TE, activation="silu"), torch.float64)
    baseline = run(lambda x, w: masked.moe_ffn(x, w, plan, activation="silu"), torch.bfloat16)
    for out, exact, plain in zip(got, oracle, baseline, strict=True):
        assert_as_accurate_as_torch(out, oracle=exact, baseline=plain)


@needs_grouped_mm
@pytest.mark.parametrize(
    ("D", "F", "E", "dtype", "reason"),
    [
        pytest.param(16, 64, 4, torch.float32, "takes bfloat16", id="fp32"),
        pytest.param(16, 66, 4, torch.bfloat16, "one size", id="uneven split"),
        pytest.param(12, 64, 4, torch.bfloat16, "multiples of 8", id="unaligned width"),
        pytest.param(16, 64, 16, torch.bfloat16, "multiples of 8", id="experts of 4"),
    ],
)
def test_grouped_mm_refusal_names_the_limit(D, F, E, dtype, reason):
    refusal = grouped.grouped_mm_refusal(torch.zeros(3, D, dtype=dtype), random_ffn(D, F, dtype=dtype), build_plan(torch.ones(3, E).bool()))
    assert reason in refusal
