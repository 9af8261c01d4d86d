"""Experts batched into few GEMMs, pure torch, forward and backward, memory linear in the routed pairs.

Letters: T tokens, D model width, F FFN width, E experts, G expert size, N routed pairs, b experts of one segment, M its rows per expert.

Two ways:

- `_by_grouped_mm` on CUDA: `torch.nn.functional.grouped_mm` reads the counts on the device, so nothing waits for the host.
- `_SegmentedFFN` everywhere else: the counts are read by the host and neighbouring experts are joined into segments, each one batched GEMM
  over the weights in place (an expert is a contiguous slice, so neighbours are one strided view and nothing is copied):
    * "padded": each expert's tokens gathered and padded to the segment's longest expert;
    * "shared": experts that most tokens want run for all tokens, without gather or combine, with the unselected neurons zeroed.
  Thin experts gain by joining: 8 neurons x 16 rows run at 0.26 of the GEMM peak one by one, at 0.4 to 0.6 joined (fp32, D=768, AVX-512).
  Wide experts are never joined: their own GEMM is as good, and padding would only add work.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sites.formula import ACTIVATIONS
from ..sites.site import FFNWeights, expert_bounds
from .plan import DispatchPlan, straight_through

# What starting one more segment costs, in FLOPs that could have been done instead: about 15 small torch calls, 20 us at 100 GFLOP/s.
SEGMENT_FLOPS = 2_000_000
# Padding rows allowed per real row of thin experts. 32 experts of 24 neurons x 64 rows in one batched GEMM are 1.5x to 2.2x faster than in
# 32 GEMMs (fp32, two cores, D=768), so some padding is worth it.
PADDING_FRAC = 0.25
# Rows after which a GEMM stops being bound by reading its weights; an expert without tokens costs about so much inside a padded segment.
WEIGHT_BOUND_ROWS = 16
# Gathered elements per segment: x, hidden and output of a segment stay in the cache between the GEMMs. 1 << 21 costs up to 1.6x more.
SEGMENT_ELEMENTS = 1 << 19
# From this size on an expert's own GEMM is efficient: joining gains nothing (0.85x at 96 neurons, 64 rows), so it is never padded.
WIDE_EXPERT = 48


# The counts decide the shapes: a graph break, or an error under fullgraph=True. torch.compiler.disable would do the same, but imports
# torch._dynamo (and triton) with this module instead of at the first call.
@torch._disable_dynamo  # type: ignore[attr-defined]
def moe_ffn(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Sum of the selected experts' outputs. Arguments and result as in `reference.moe_ffn`.

    Sums over experts run in fp32 for half dtypes. Differentiable once in every floating input.

    Cost: FLOPs of the routed pairs plus at most a quarter of padding (shared experts: up to 1 / `shared_frac`); memory O(N G + T D). Int8
    weights are dequantised at every call.
    Host syncs: none on CUDA where `grouped_mm_refusal` is None; else one, for the counts.
    """
    weights = weights.dequantized(x_TD.dtype)
    if x_TD.is_cuda and grouped_mm_refusal(x_TD, weights, plan) is None:
        return _by_grouped_mm(x_TD, weights, plan, activation=activation)
    return _SegmentedFFN.apply(  # type: ignore[no-any-return]
        plan,
        activation,
        x_TD,
        weights.up_FD,
        weights.down_FD,
        weights.gate_FD,
        weights.up_bias_F,
        weights.gate_bias_F,
        weights.down_bias_D,
        plan.probs_TE,
    )


def shared_frac(expert_size: int) -> float:
    """Fraction of the tokens above which an expert runs for all: its own thin GEMM is slower per FLOP than the wide shared one."""
    return 0.45 if expert_size < WIDE_EXPERT else 0.75 if expert_size < 256 else 0.9


@dataclass(frozen=True)
class Segment:
    """Experts [first, last) of equal size, computed together."""

    first: int
    last: int
    rows: int
    """Rows per expert: the longest expert's tokens, or T where ``is_shared``."""
    is_shared: bool
    """Whether every token runs through, with unselected neurons zeroed."""

    @property
    def num_rows(self) -> int:
        """Rows of all its experts, padding included."""
        return self.rows * (self.last - self.first)


def find_segments(counts: Sequence[int], *, num_tokens: int, expert_size: int, flops_per_row: int, row_elements: int) -> list[Segment]:
    """Join neighbouring experts greedily; experts without tokens at a segment's edge are left out.

    Args:
        counts: tokens of each expert; all experts of one size.
        num_tokens: T.
        expert_size: G.
        flops_per_row: FLOPs of one expert for one token.
        row_elements: elements gathered per row (D).

    Returns:
        Disjoint segments in order; each expert with tokens is in exactly one.
    """
    shared_min = shared_frac(expert_size)
    segments: list[Segment] = []
    max_rows = max(SEGMENT_ELEMENTS // row_elements, 1)
    runs = _padded_runs(counts, is_wide=expert_size >= WIDE_EXPERT, flops_per_row=flops_per_row, max_rows=max_rows)
    for first, last, rows, real in runs:
        is_shared = real >= shared_min * num_tokens * (last - first)
        if is_shared and segments and segments[-1].is_shared and segments[-1].last == first:
            first = segments.pop().first
        segments.append(Segment(first, last, num_tokens if is_shared else rows, is_shared))
    return segments


def _padded_runs(counts: Sequence[int], *, is_wide: bool, flops_per_row: int, max_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Greedy runs (first, last, longest, total tokens) whose padding costs less than the segments that it saves."""
    if is_wide:
        yield from ((e, e + 1, count, count) for e, count in enumerate(counts) if count)
        return
    first = last = longest = total = 0
    for e, count in enumerate(counts):
        if last > first:
            width = e + 1 - first
            padded = width * max(longest, count)
            waste = padded - total - count + (0 if count else WEIGHT_BOUND_ROWS)
            allowed = max(PADDING_FRAC * (total + count), SEGMENT_FLOPS / flops_per_row)
            if padded <= max_rows and waste <= allowed:
                if count:
                    last, longest, total = e + 1, max(longest, count), total + count
                continue
            yield first, last, longest, total
            last = first
        if count:
            first, last, longest, total = e, e + 1, count, count
    if last > first:
        yield first, last, longest, total


class _Work(NamedTuple):
    """One segment with its indices: what forward and backward both need."""

    experts: slice
    neurons: slice
    batch: int | None
    """Experts b of a batched product; None where one plain product does: a single expert, or all tokens through neighbours."""
    source_R: Tensor | None
    """Token of each row (b*M); None: all tokens, in order."""
    target_R: Tensor | None
    """Where the row's output goes: its token, or the spare row T for padding."""
    drop: Tensor | None
    """True where a row must not reach the expert: padding, (b, M, 1), or not selected, (T, experts, 1)."""


def _segment_work(plan: DispatchPlan, num_neurons: int, *, d_model: int, num_projections: int) -> list[_Work]:
    """Segments of all experts; the larger experts of an uneven split come first and never share a segment with the others."""
    offsets = plan.offsets_E1.tolist()
    counts = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    bounds = expert_bounds(num_neurons, plan.num_experts)
    size, larger = divmod(num_neurons, plan.num_experts)
    segments = [
        Segment(start + segment.first, start + segment.last, segment.rows, segment.is_shared)
        for start, stop, expert_size in ((0, larger, size + 1), (larger, plan.num_experts, size))
        for segment in find_segments(
            counts[start:stop],
            num_tokens=plan.num_tokens,
            expert_size=expert_size,
            flops_per_row=2 * num_projections * d_model * expert_size,
            row_elements=d_model,
        )
    ]
    padded = [s for s in segments if not s.is_shared and s.num_rows > offsets[s.last] - offsets[s.first]]
    padding = iter(_padded_rows(plan, padded))
    works = []
    for segment in segments:
        first, last = segment.first, segment.last
        experts, neurons = slice(first, last), slice(bounds[first], bounds[last])
        pairs = slice(offsets[first], offsets[last])
        if segment.is_shared:
            is_full = pairs.stop - pairs.start == segment.num_rows
            drop = None if is_full else ~plan.mask_TE[:, first:last].unsqueeze(2)
            works.append(_Work(experts, neurons, None, None, None, drop))
        elif segment.num_rows == pairs.stop - pairs.start:
            token_R = plan.token_N[pairs]
            works.append(_Work(experts, neurons, last - first if last - first > 1 else None, token_R, token_R, None))
        else:
            source_R, target_R, drop_R = next(padding)
            works.append(_Work(experts, neurons, last - first, source_R, target_R, drop_R.view(last - first, segment.rows, 1)))
    return works


def _padded_rows(plan: DispatchPlan, segments: Sequence[Segment]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Source, target and drop of each segment's rows; computed for all segments at once, because small calls add up (40 us a segment)."""
    if not segments:
        return
    device = plan.token_N.device
    rows = torch.tensor([s.rows for s in segments for _ in range(s.first, s.last)], device=device)
    experts = torch.tensor([e for s in segments for e in range(s.first, s.last)], device=device)
    num_rows = [s.num_rows for s in segments]
    starts, ends = plan.offsets_E1[experts], plan.offsets_E1[experts + 1]
    # pair = start of the expert + position among its rows
    shift_R = (starts - rows.cumsum(0) + rows).repeat_interleave(rows, output_size=sum(num_rows))
    last_R = (ends - 1).repeat_interleave(rows, output_size=sum(num_rows))
    pair_R = torch.arange(sum(num_rows), device=device) + shift_R
    drop_R = pair_R > last_R
    # padding repeats the expert's last token: what it computes is dropped, but it must be a real row
    source_R = plan.token_N[torch.minimum(pair_R, last_R).clamp_(min=0)]
    target_R = source_R.masked_fill(drop_R, plan.num_tokens)
    yield from zip(source_R.split_with_sizes(num_rows), target_R.split_with_sizes(num_rows), drop_R.split_with_sizes(num_rows), strict=True)


class _SegmentedFFN(torch.autograd.Function):
    """The segmented way, with its own backward: x and the output's gradient are gathered per segment; nothing of size N*D is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: DispatchPlan,
        activation: str,
        x_TD: Tensor,
        up_FD: Tensor,
        down_FD: Tensor,
        gate_FD: Tensor | None,
        up_bias_F: Tensor | None,
        gate_bias_F: Tensor | None,
        down_bias_D: Tensor | None,
        probs_TE: Tensor | None,
    ) -> Tensor:
        sums_TD = _zero_sums(x_TD, down_FD.shape[1])
        if down_bias_D is not None:
            sums_TD += down_bias_D
        keeps = any(ctx.needs_input_grad)
        x_space, out_space = _Workspace(), _Workspace()
        works: list[_Work] = []
        kept: list[Tensor | None] = []
        projections = 2 if gate_FD is None else 3
        for work in _segment_work(plan, up_FD.shape[0], d_model=x_TD.shape[1], num_projections=projections):
            x = _rows(x_TD, work, x_space)
            up = _project(x, up_FD, up_bias_F, work)
            gate = None if gate_FD is None else _project(x, gate_FD, gate_bias_F, work)
            hidden = _hidden(up, gate, activation=activation)
            if work.target_R is None:  # elsewhere padding is dropped by its target
                _drop_(hidden, work)
            _add_rows_(sums_TD, hidden, _experts(down_FD, work), work, out_space)
            if keeps:
                works.append(work)
                kept += [up, gate]
        if keeps:
            ctx.works, ctx.activation, ctx.plan_shape = works, activation, plan.mask_TE.shape
            ctx.save_for_backward(x_TD, up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, *kept)
        # Not a view: what a custom function returns as one, nobody may add to in place, as Falcon does with its residual.
        return sums_TD.resize_(x_TD.shape[0], down_FD.shape[1]).to(x_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_FD, down_FD, gate_FD, up_bias_F, gate_bias_F, *kept = ctx.saved_tensors
        _, _, wants_x, wants_up, wants_down, wants_gate, wants_up_bias, wants_gate_bias, wants_bias, wants_probs = ctx.needs_input_grad
        x_space, grad_space, out_space = _Workspace(), _Workspace(), _Workspace()
        grad_TD = grad_TD.contiguous()  # y.sum() sends a stride-0 gradient
        sums_TD = _zero_sums(grad_TD, x_TD.shape[1]) if wants_x else None
        grad_up, grad_down, grad_gate, grad_up_bias, grad_gate_bias = (
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in (
                (up_FD, wants_up),
                (down_FD, wants_down),
                (gate_FD, wants_gate),
                (up_bias_F, wants_up_bias),
                (gate_bias_F, wants_gate_bias),
            )
        )
        grad_probs = torch.zeros(ctx.plan_shape, dtype=torch.float32, device=x_TD.device) if wants_probs else None
        for i, work in enumerate(ctx.works):
            with torch.enable_grad():
                first = [tensor.detach().requires_grad_() for tensor in kept[2 * i : 2 * i + 2] if tensor is not None]
                hidden = _hidden(first[0], first[1] if gate_FD is not None else None, activation=ctx.activation)
            grad_out = _rows(grad_TD, work, grad_space)
            grad_hidden = _project(grad_out, down_FD, None, work)
            _drop_(grad_hidden, work)
            first_grads = torch.autograd.grad(hidden, first, grad_hidden)
            hidden = hidden.detach()
            _drop_(hidden, work)
            if grad_down is not None:
                grad_down[work.neurons] = (hidden.mT @ grad_out).view(-1, grad_out.shape[-1])
            if grad_probs is not None:
                _add_energies_(grad_probs, hidden * grad_hidden, work)
            x = _rows(x_TD, work, x_space)
            for grad_first, weight, grad_weight, grad_bias in zip(
                first_grads, (up_FD, gate_FD), (grad_up, grad_gate), (grad_up_bias, grad_gate_bias), strict=False
            ):
                if grad_weight is not None:
                    grad_weight[work.neurons] = (grad_first.mT @ x).view(-1, x.shape[-1])
                if grad_bias is not None:
                    grad_bias[work.neurons] = grad_first.sum(-2).flatten()
                if sums_TD is not None:
                    _add_rows_(sums_TD, grad_first, _experts(weight, work), work, out_space)
        grad_x = None if sums_TD is None else sums_TD[:-1].to(x_TD.dtype)
        grad_bias_D = grad_TD.sum(0) if wants_bias else None
        return None, None, grad_x, grad_up, grad_down, grad_gate, grad_up_bias, grad_gate_bias, grad_bias_D, grad_probs


def _hidden(up: Tensor, gate: Tensor | None, *, activation: str) -> Tensor:
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


def _zero_sums(like_TD: Tensor, width: int) -> Tensor:
    """Accumulator of T + 1 rows, fp32 at least; the spare last row takes what padding computes."""
    dtype = torch.float32 if like_TD.dtype.itemsize < 4 else like_TD.dtype
    return torch.zeros(like_TD.shape[0] + 1, width, dtype=dtype, device=like_TD.device)


class _Workspace:
    """One buffer that all segments of a call write over, so that its pages stay mapped and cached.

    Fresh buffers of a few MB per segment cost more in page faults than the batched GEMM saves.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def take(self, *shape: int, like: Tensor) -> Tensor:
        size = math.prod(shape)
        if self.buffer.numel() < size or self.buffer.dtype != like.dtype:
            self.buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        return self.buffer[:size].view(shape)


def _rows(source_TD: Tensor, work: _Work, space: _Workspace) -> Tensor:
    """Input rows of a segment: (b, M, D), or (M, D) where there is one expert or all share the rows."""
    if work.source_R is None:
        return source_TD
    rows_RD = space.take(work.source_R.shape[0], source_TD.shape[1], like=source_TD)
    torch.index_select(source_TD, 0, work.source_R, out=rows_RD)
    return rows_RD if work.batch is None else rows_RD.view(work.batch, -1, source_TD.shape[1])


def _experts(weight_FD: Tensor, work: _Work) -> Tensor:
    """The segment's weights in place: (b, G, D), or (neurons, D) beside 2-D rows."""
    weight = weight_FD[work.neurons]
    return weight if work.batch is None else weight.view(work.batch, -1, weight_FD.shape[1])


def _project(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, work: _Work) -> Tensor:
    """``x weight^T + bias``, (b, M, G) or (M, neurons)."""
    weight = _experts(weight_FD, work)
    if work.batch is None:
        return F.linear(x, weight, None if bias_F is None else bias_F[work.neurons])
    if bias_F is None:
        return _thin_product(x, weight)
    return torch.baddbmm(bias_F[work.neurons].view(work.batch, -1, 1), weight, x.mT).mT


def _thin_product(x_bMD: Tensor, weight_bGD: Tensor) -> Tensor:
    """``x weight^T`` as ``(weight x^T)^T``: 1.3x faster for thin experts (MKL, G=24, M=64)."""
    return torch.bmm(weight_bGD, x_bMD.mT).mT


def _drop_(hidden: Tensor, work: _Work) -> None:
    """Zero what must not reach the expert: padding, or tokens that did not select it. In place."""
    if work.drop is not None:
        (hidden if work.batch else hidden.view(*work.drop.shape[:2], -1)).masked_fill_(work.drop, 0)


def _add_rows_(sums_TD: Tensor, rows: Tensor, weight: Tensor, work: _Work, space: _Workspace) -> None:
    """Add ``rows @ weight`` to the rows' targets, in the accumulator's dtype. In place."""
    if work.target_R is not None:
        out_RD = space.take(work.target_R.shape[0], weight.shape[-1], like=rows)
        torch.matmul(rows, weight, out=out_RD if work.batch is None else out_RD.view(work.batch, -1, weight.shape[-1]))
        sums_TD.index_add_(0, work.target_R, out_RD.to(sums_TD.dtype))
    elif rows.dtype == sums_TD.dtype:
        sums_TD[:-1].addmm_(rows, weight)
    else:
        sums_TD[:-1] += rows @ weight


def _add_energies_(sums_TE: Tensor, products: Tensor, work: _Work) -> None:
    """Add each pair's sum over its expert's neurons of h * (d loss / d h): that is <d loss / d y, y_e>. Padding is 0. In place."""
    if work.source_R is None:
        num_tokens, num_experts = products.shape[0], work.experts.stop - work.experts.start
        sums_TE[:, work.experts] += products.view(num_tokens, num_experts, -1).sum(2, dtype=torch.float32)
        return
    energy_R = products.sum(-1, dtype=torch.float32).flatten()
    experts_R = torch.arange(work.experts.start, work.experts.stop, device=sums_TE.device).repeat_interleave(
        len(energy_R) // (work.experts.stop - work.experts.start)
    )
    sums_TE.view(-1).index_add_(0, work.source_R * sums_TE.shape[1] + experts_R, energy_R)


def grouped_mm_refusal(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot compute this; None if it can.

    Its limits in torch 2.13 (docstring, and observed): bf16 on CUDA of capability 8.0; strides of 16 bytes; experts of one size.
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no public grouped_mm"
    if x_TD.dtype is not torch.bfloat16:
        return f"grouped_mm without a host sync takes bfloat16, not {x_TD.dtype}"
    if x_TD.is_cuda and torch.cuda.get_device_capability(x_TD.device) < (8, 0):
        return "grouped_mm needs CUDA capability 8.0"
    if weights.num_neurons % plan.num_experts:
        return f"{weights.num_neurons} neurons do not split into {plan.num_experts} experts of one size"
    multiple = 16 // x_TD.dtype.itemsize
    sizes = (weights.num_neurons // plan.num_experts, x_TD.shape[1], weights.down_FD.shape[1])
    if any(size % multiple for size in sizes):
        return f"grouped_mm needs expert size, input and output width to be multiples of {multiple}, got {sizes}"
    if any(s != 1 and s % multiple for w in weights.per_neuron() if w.dim() == 2 for s in w.stride()):
        return f"grouped_mm needs weight strides that are multiples of {multiple}"
    return None


def _by_grouped_mm(x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str) -> Tensor:
    """Gather, grouped GEMMs with counts on the device, combine. Autograd keeps the N*D gathered inputs; no host sync."""
    num_experts, offsets_E = plan.num_experts, plan.offsets_E1[1:]
    expert_N = plan.expert_N()
    x_ND = x_TD.index_select(0, plan.token_N)

    def project(weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        out_NG = F.grouped_mm(x_ND, weight_FD.view(num_experts, -1, weight_FD.shape[1]).mT, offs=offsets_E)
        return out_NG if bias_F is None else out_NG + bias_F.view(num_experts, -1).index_select(0, expert_N)

    up_NG = project(weights.up_FD, weights.up_bias_F)
    gate_NG = None if weights.gate_FD is None else project(weights.gate_FD, weights.gate_bias_F)
    hidden_NG = _hidden(up_NG, gate_NG, activation=activation)
    if plan.probs_TE is not None:
        hidden_NG = hidden_NG * straight_through(plan.probs_TE[plan.token_N, expert_N]).to(hidden_NG.dtype)[:, None]
    out_ND = F.grouped_mm(hidden_NG, weights.down_FD.view(num_experts, -1, weights.down_FD.shape[1]), offs=offsets_E)
    sums_TD = out_ND.new_zeros(x_TD.shape[0], out_ND.shape[1], dtype=torch.float32).index_add(0, plan.token_N, out_ND.float())
    if weights.down_bias_D is not None:
        sums_TD = sums_TD + weights.down_bias_D
    return sums_TD.to(x_TD.dtype)
