"""Expert parallelism: in training, a group of processes shares out the experts of an FFN, and tokens go to where their experts are.

Letters: T tokens of this process, D model width, E experts, e experts of one process, g processes of the group, S rows sent, R rows
received.

    x_TD, factors_TE --select--> x_SD, factors --all_to_all--> x_RD, factors_Re --own experts--> y_RD --all_to_all--> y_SD --add--> y_TD

A token is sent once to each process that has at least one of its experts, and what those give is added there before it comes back. Nothing
is dropped or padded: rows are as many as there are.

Every process keeps all weights (or its shard of them, "fsdp"); it computes its own experts alone, and the gradients of the others' are 0.
An expert's gradient is then the sum over its group's tokens on one process, and the mean over all processes, which DDP and FSDP2 take
anyway, is the one without expert parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..kernels import DispatchPlan, build_plan, moe_ffn
from ..kernels.reference import expert_slice
from ..sites import FFNWeights, expert_bounds

_UNSELECTED = -torch.inf
"""In place of a factor, at pairs that were not selected: so the mask travels with the factors."""


@dataclass(frozen=True)
class ExpertGroup:
    """The processes that share out experts, seen from one of them. All run the same forwards, and the same backwards, in the same order."""

    handle: Any
    """torch's process group: not the one that gradients are averaged in, for the two may send at the same time."""
    rank: int
    """This process, in [0, size)."""
    size: int
    """g."""

    def bounds(self, num_experts: int) -> tuple[int, ...]:
        """Process r computes experts [bounds[r], bounds[r + 1]); their numbers differ by at most one.

        Raises:
            ConfigError: a process would have none.
        """
        if num_experts < self.size:
            raise ConfigError(f"expert_parallel {self.size} is more than the {num_experts} experts of an FFN; lower it.")
        return expert_bounds(num_experts, self.size)

    def ffn(self, x_TD: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str = "auto") -> Tensor:
        """`kernels.moe_ffn`, computed by the group: the same result and gradients up to the order of additions, but for weights.

        Under autocast rows are sent in its dtype, and each process' part of an output is rounded to it before parts are added in float32.

        Args:
            x_TD: of this process; their number may differ from others', and be 0.
            weights: all of the FFN's, alike on all processes.
            plan: of this process' tokens.
            activation: as `kernels.moe_ffn`.
            impl: as `kernels.moe_ffn`; each process decides "auto" for the rows that it received.

        Returns:
            y_TD. Gradients of weights are those of this process' experts for the tokens of all, and 0 for the others'.

        Cost: sends and receives S rows of D and of e numbers, and in backward the same; S is at most T min(k, g). One host sync, for the
        numbers of rows.
        """
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        route = self._route(plan)
        factors_TE = torch.zeros_like(plan.mask_TE, dtype=torch.float32) if plan.probs_TE is None else plan.probs_TE
        factors_TE = factors_TE.masked_fill(~plan.mask_TE, _UNSELECTED)
        bounds, parts = self.bounds(plan.num_experts), route.token_S.split(route.sent)
        flat = [factors_TE[token_n, first:last].flatten() for token_n, first, last in zip(parts, bounds, bounds[1:], strict=False)]
        width = bounds[self.rank + 1] - bounds[self.rank]
        x_RD, factors = _Exchange.apply(
            self.handle,
            (route.sent, [count * (last - first) for count, first, last in zip(route.sent, bounds, bounds[1:], strict=False)]),
            (route.received, [count * width for count in route.received]),
            x_TD.index_select(0, route.token_S),
            torch.cat(flat),
        )
        y_RD = self._own(x_RD, factors.view(-1, width), weights, plan, activation=activation, impl=impl)
        (y_SD,) = _Exchange.apply(self.handle, (route.received,), (route.sent,), y_RD)
        y_TD: Tensor = y_SD.new_zeros(x_TD.shape[0], y_SD.shape[1], dtype=torch.float32 if y_SD.dtype.itemsize < 4 else None)
        y_TD = y_TD.index_add(0, route.token_S, y_SD.to(y_TD.dtype))
        if weights.down_bias_D is not None:
            y_TD = y_TD + weights.down_bias_D
        return y_TD.to(y_SD.dtype)

    def _own(self, x_RD: Tensor, factors_Re: Tensor, weights: FFNWeights, plan: DispatchPlan, *, activation: str, impl: str) -> Tensor:
        """What this process' experts give for the rows it received."""
        first, last = self.bounds(plan.num_experts)[self.rank : self.rank + 2]
        neurons = expert_bounds(weights.num_neurons, plan.num_experts)
        mask_Re = factors_Re.detach() != _UNSELECTED
        probs_Re = None if plan.probs_TE is None else factors_Re.masked_fill(~mask_Re, 0)
        # The experts of a range are the even split of its neurons, too: larger ones come first.
        own = expert_slice(weights, slice(neurons[first], neurons[last]))
        return moe_ffn(x_RD, own, build_plan(mask_Re, probs_Re), activation=activation, impl=impl, training=True)

    def _route(self, plan: DispatchPlan) -> "_Route":
        bounds = self.bounds(plan.num_experts)
        needs_gT = torch.stack([plan.mask_TE[:, first:last].any(1) for first, last in zip(bounds, bounds[1:], strict=False)])
        counts_g = needs_gT.sum(1)
        received_g = torch.empty_like(counts_g)
        dist.all_to_all_single(received_g, counts_g, group=self.handle)
        sent, received = torch.stack([counts_g, received_g]).tolist()
        return _Route(token_S=needs_gT.nonzero()[:, 1], sent=sent, received=received)


@dataclass(frozen=True)
class _Route:
    """Who sends how many rows to whom in one forward."""

    token_S: Tensor
    """int64, in [0, T): token of each row sent, by process that it goes to."""
    sent: list[int]
    """Rows to each process of the group."""
    received: list[int]
    """Rows from each of them."""


class _Exchange(torch.autograd.Function):
    """`all_to_all_single` of several tensors, each with its own numbers of rows; gradients go back the same way.

    Of several tensors one node: the order in which autograd would come to several may depend on how each process computes its experts.
    """

    @staticmethod
    def forward(ctx: Any, group: Any, sent: Sequence[list[int]], received: Sequence[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return tuple(_all_to_all(*one, group=group) for one in zip(tensors, sent, received, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back = zip(gradients, ctx.received, ctx.sent, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(_all_to_all(*one, group=ctx.group) if is_needed else None for *one, is_needed in back)


def _all_to_all(tensor: Tensor, sent: list[int], received: list[int], *, group: Any) -> Tensor:
    found = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(found, tensor.contiguous(), received, sent, group=group)
    return found


def expert_group(size: int) -> ExpertGroup:
    """The group of ``size`` neighbouring processes that this one is in, which divides their number; all processes call this together."""
    firsts = range(0, dist.get_world_size(), size)
    handles = [dist.new_group(list(range(first, first + size))) for first in firsts]  # everyone makes all of them
    index, rank = divmod(dist.get_rank(), size)
    return ExpertGroup(handle=handles[index], rank=rank, size=size)
