"""Balanced k-means: experts of equal size whose neurons have similar features.

Letters: F FFN width (points), K features, E experts (clusters), M slots of the largest expert, N neurons and the filler, or swaps.

Three steps: seeds (k-means++ is not needed: the refinement forgets them), a balanced greedy assignment, and refinement by swaps that count
what a swap does to both centroids. The last is what Lloyd's iterations cannot do: in D = 768 dimensions with 4 to 32 points a cluster,
each point is a visible part of its own centroid, so every point prefers where it is and Lloyd stops after two or three iterations.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..sites.site import FFNWeights, expert_bounds
from .record import ExpertSplit, check_features, slice_labels

# Partners of each expert whose exact gain is computed in a round; the rest is ranked by an upper estimate only.
_PARTNERS = 8
_LAST_PARTNERS = 32


@dataclass(frozen=True, kw_only=True)
class BalancedKMeans:
    """MoEfication's parameter clustering: balanced k-means on `parameter_features`.

    Source: Zhang et al. 2022, arXiv:2110.01786, section 3.2; the solver is ours (`balanced_kmeans`).
    """

    name: ClassVar[str] = "kmeans"

    seed: int = 0
    """Seed of the starting centroids."""
    iterations: int = 1000
    """At most this many rounds; a round is a few milliseconds, and it usually ends by itself before 60."""
    tolerance: float = 2e-4
    """Stop when a round lowers the inertia by less than this fraction of it."""
    restarts: int = 1
    """Independent starts, of which the best is kept; ignored with a warm start."""

    def __post_init__(self) -> None:
        check_solver_options(self.iterations, self.tolerance, self.restarts)

    def __call__(self, features_FK: Tensor, *, num_experts: int, warm_start: ExpertSplit | None = None) -> ExpertSplit:
        """Cluster ``features_FK``; arguments as in `moeify.split.split_neurons`."""
        return balanced_kmeans(
            features_FK,
            num_experts=num_experts,
            seed=self.seed,
            iterations=self.iterations,
            tolerance=self.tolerance,
            restarts=self.restarts,
            warm_start=warm_start,
        ).split


@dataclass(frozen=True)
class Clustering:
    """What `balanced_kmeans` found: labels, the centroids that belong to them, and the way there."""

    split: ExpertSplit
    centroids_EK: Tensor
    """Mean of each expert's features; fp32, on the features' device."""
    history: tuple[float, ...]
    """Inertia at the start and after each round; never increases."""


def check_solver_options(iterations: int, tolerance: float, restarts: int) -> None:
    """Refuse options that the solver cannot run with.

    Raises:
        ConfigError: names the option and its range.
    """
    if iterations < 0:
        raise ConfigError(f"iterations must be >= 0, got {iterations}.")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance must be in [0, 1), got {tolerance}.")
    if restarts < 1:
        raise ConfigError(f"restarts must be >= 1, got {restarts}.")


def parameter_features(weights: FFNWeights) -> Tensor:
    """MoEfication's feature of a neuron: its row of W1 (of the gate in a GLU), L2-normalised; the bias is not part of it.

    Returns:
        features_FK in fp32 (K = D); a zero row stays zero.
    """
    rows_FD = weights.up_FD if weights.gate_FD is None else weights.gate_FD
    # eps: the smallest normal fp32, so that rows of tiny weights are normalised too
    return F.normalize(rows_FD.detach().float(), dim=1, eps=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def balanced_kmeans(
    features_FK: Tensor,
    *,
    num_experts: int,
    seed: int = 0,
    iterations: int = 1000,
    tolerance: float = 2e-4,
    restarts: int = 1,
    warm_start: ExpertSplit | None = None,
) -> Clustering:
    """Partition the rows of ``features_FK`` into equal clusters of small inertia.

    inertia = sum_i ||x_i - c_a(i)||^2 = sum_i ||x_i||^2 - sum_e ||S_e||^2 / n_e,   S_e = sum of the n_e rows of cluster e

    Sizes are those of `expert_bounds`. Each round swaps pairs i in A, j in B whose exchange raises the last sum, by exactly
    w_A (2 S_A . d + d . d) + w_B (-2 S_B . d + d . d) with d = x_j - x_i and w_e = 1 / n_e; the pairs of a round share no cluster, so
    their gains add up.

    Args:
        features_FK: finite, floating point; computed in fp32 on its device.
        num_experts: E, in [1, F].
        seed: of the starting centroids; equal arguments give equal results on one device.
        iterations: maximal rounds of swaps.
        tolerance: end when a round gains less than this fraction of the inertia.
        restarts: number of starts, best kept.
        warm_start: start from this partition; the result is never worse than it.

    Returns:
        The best partition, its centroids, and the inertia by round.

    Raises:
        DataError: features not 2-D, empty or not finite.
        ConfigError: E out of range; a warm start of another F or E.

    Cost: about F (F + E) K multiply-adds in all, O(F E) memory. F=3072, K=768, E=128: see bench/cases/split.py.
    """
    check_features(features_FK)
    x_FK = features_FK.detach().float().contiguous()
    num_neurons = x_FK.shape[0]
    slice_labels(num_neurons, num_experts)  # refuses a bad E before anything else does
    if warm_start is not None:
        if (warm_start.num_neurons, warm_start.num_experts) != (num_neurons, num_experts):
            raise ConfigError(
                f"warm_start splits {warm_start.num_neurons} neurons into {warm_start.num_experts} experts, "
                f"not {num_neurons} into {num_experts}."
            )
        starts = [warm_start.order_F.to(x_FK.device)]
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = []
        for _ in range(restarts):
            seeds_E = torch.randperm(num_neurons, generator=generator)[:num_experts].to(x_FK.device)
            starts.append(_greedy_order(x_FK @ x_FK[seeds_E].t()))
    best: Clustering | None = None
    for start_F in starts:
        order_F, history = _refine(x_FK, start_F, num_experts=num_experts, iterations=iterations, tolerance=tolerance)
        inertia, centroids_EK = _inertia(x_FK, order_F, num_experts)
        if best is None or inertia < best.history[-1]:
            split = ExpertSplit.from_order(order_F, num_experts=num_experts, inertia=inertia)
            best = Clustering(split=split, centroids_EK=centroids_EK, history=(*history, inertia))
    assert best is not None
    return best


def _greedy_order(scores_FE: Tensor) -> Tensor:
    """Balanced assignment by regret: neurons choose their best expert with room; where too many come, those who would lose most get in.

    A neuron's regret is its best minus its second best score. Each pass settles everybody whom an expert has room for, so passes are few.

    Returns:
        int64 (F,): neuron ids expert by expert.
    """
    num_neurons, num_experts = scores_FE.shape
    device = scores_FE.device
    room_E = torch.bincount(slice_labels(num_neurons, num_experts), minlength=num_experts).to(device)
    if num_experts == 1:
        return torch.arange(num_neurons, device=device)
    labels_F = torch.empty(num_neurons, dtype=torch.int64, device=device)
    free_R = torch.arange(num_neurons, device=device)
    scores_RE = scores_FE.clone()
    while free_R.numel():
        scores_RE[:, room_E == 0] = -torch.inf
        top = scores_RE.topk(2, dim=1)
        by_regret_R = (top.values[:, 0] - top.values[:, 1]).argsort(descending=True, stable=True)
        wish_R = top.indices[by_regret_R, 0]
        wish_R, by_wish_R = wish_R.sort(stable=True)
        row_R = by_regret_R[by_wish_R]
        place_R = torch.arange(len(wish_R), device=device) - torch.searchsorted(wish_R, wish_R)
        accepted_R = place_R < room_E[wish_R]
        labels_F[free_R[row_R[accepted_R]]] = wish_R[accepted_R]
        room_E -= torch.bincount(wish_R[accepted_R], minlength=num_experts)
        refused_R = row_R[~accepted_R].sort().values
        free_R, scores_RE = free_R[refused_R], scores_RE[refused_R]
    return labels_F.argsort(stable=True)


def _sums(x_FK: Tensor, order_F: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(sum of each expert's rows (E, K), reciprocal of its size (E,))."""
    labels_F = slice_labels(len(x_FK), num_experts).to(x_FK.device)
    weight_E = torch.bincount(labels_F, minlength=num_experts).to(x_FK.dtype).reciprocal()
    bounds = torch.tensor(expert_bounds(len(x_FK), num_experts), device=x_FK.device)
    # segment_reduce, not index_add: one order of summation on every device
    return torch.segment_reduce(x_FK[order_F], "sum", offsets=bounds, axis=0), weight_E


def _inertia(x_FK: Tensor, order_F: Tensor, num_experts: int) -> tuple[float, Tensor]:
    """Inertia (summed in fp64) and centroids_EK of a partition."""
    sums_EK, weight_E = _sums(x_FK, order_F, num_experts)
    inertia = x_FK.square().sum(1).double().sum() - (sums_EK.square().sum(1) * weight_E).double().sum()
    return max(float(inertia), 0.0), sums_EK * weight_E[:, None]


def _refine(x_FK: Tensor, order_F: Tensor, *, num_experts: int, iterations: int, tolerance: float) -> tuple[Tensor, list[float]]:
    """Lloyd's iterations while they pay, then swaps; returns the order and the inertia before and after every round."""
    inertia, centroids_EK = _inertia(x_FK, order_F, num_experts)
    start, history = (inertia, order_F), [inertia]
    while len(history) <= iterations:
        candidate_F = _greedy_order(2 * (x_FK @ centroids_EK.t()) - centroids_EK.square().sum(1))
        inertia, candidate_EK = _inertia(x_FK, candidate_F, num_experts)
        if inertia >= history[-1]:
            break
        gain = history[-1] - inertia
        order_F, centroids_EK = candidate_F, candidate_EK
        history.append(inertia)
        # a round of swaps gains more than this in less time
        if gain < 2e-3 * inertia:
            break
    swaps = _Swaps(x_FK, order_F, num_experts)
    while len(history) <= iterations:
        gain = swaps.round()
        history.append(history[-1] - gain)
        if gain <= tolerance * history[-1]:
            break
    order_F = swaps.order()
    inertia = _inertia(x_FK, order_F, num_experts)[0]
    if inertia > start[0]:  # rounding, when there was nothing to gain
        return start[1], [start[0]]
    return order_F, [max(value, inertia) for value in history]


class _Swaps:
    """Rounds of disjoint pair swaps, each raising sum_e w_e ||S_e||^2 by a known amount.

    ``score_EN[B, i] = 2 w_B S_B . x_i + w_B ||x_i||^2``; moving i from A to B then gains ``score[B, i] - score[A, i] + 2 w_A ||x_i||^2``,
    and a swap gains both moves less ``2 (w_A + w_B) x_i . x_j``. Column N - 1 is a zero point that fills the last slot of the smaller
    experts and never moves.
    """

    def __init__(self, x_FK: Tensor, order_F: Tensor, num_experts: int) -> None:
        device = x_FK.device
        num_neurons = len(x_FK)
        self.x_NK = F.pad(x_FK, (0, 0, 0, 1))
        self.square_N = self.x_NK.square().sum(1)
        self.least_gain = 1e-6 * float(self.square_N.max())
        sums_EK, self.weight_E = _sums(x_FK, order_F, num_experts)
        labels_F = slice_labels(num_neurons, num_experts).to(device)
        self.labels_N = torch.zeros(num_neurons + 1, dtype=torch.int64, device=device)
        self.labels_N[order_F] = labels_F
        first_E = torch.tensor(expert_bounds(num_neurons, num_experts)[:-1], device=device)
        slots = -(-num_neurons // num_experts)
        self.order_ME = torch.full((slots, num_experts), num_neurons, device=device)
        self.order_ME[torch.arange(num_neurons, device=device) - first_E[labels_F], labels_F] = order_F
        self.score_EN = (sums_EK * (2 * self.weight_E[:, None])) @ self.x_NK.t()
        self.score_EN += self.weight_E[:, None] * self.square_N
        self.move_EE = torch.empty(num_experts, num_experts, device=device)
        self.slot_EE = torch.empty(num_experts, num_experts, dtype=torch.int64, device=device)
        everyone_E = torch.arange(num_experts, device=device)
        self._refresh(everyone_E, everyone_E)

    def order(self) -> Tensor:
        """int64 (F,): neuron ids expert by expert."""
        return self.labels_N[:-1].argsort(stable=True)

    def round(self) -> float:
        """Swap what pays; returns the gain, 0 if nothing does."""
        # the second look, without the filter, sees swaps that pay only because the two neurons point apart
        for partners, floor in ((_PARTNERS, self.least_gain), (_LAST_PARTNERS, -torch.inf)):
            gain = self._swap(partners, floor)
            if gain:
                return gain
        return 0.0

    def _swap(self, partners: int, floor: float) -> float:
        """Swap between each expert and its most promising ``partners`` whose estimate is above ``floor``; returns the gain."""
        num_experts = len(self.weight_E)
        # move_EE[B, A] is the best single move from A to B: the sum of both ways estimates the swap's gain, but for x_i . x_j
        estimate_EE = (self.move_EE + self.move_EE.t()).fill_diagonal_(-torch.inf)
        best = estimate_EE.topk(min(partners, num_experts), dim=1)
        a_N, nth_N = (best.values > floor).nonzero().unbind(1)
        b_N = best.indices[a_N, nth_N]
        pair_N = torch.unique(torch.minimum(a_N, b_N) * num_experts + torch.maximum(a_N, b_N))
        a_N, b_N = pair_N // num_experts, pair_N % num_experts
        i_N = self.order_ME[self.slot_EE[b_N, a_N], a_N]
        j_N = self.order_ME[self.slot_EE[a_N, b_N], b_N]
        overlap_N = (self.x_NK[i_N] * self.x_NK[j_N]).sum(1)
        gain_N = self.move_EE[b_N, a_N] + self.move_EE[a_N, b_N] - 2 * (self.weight_E[a_N] + self.weight_E[b_N]) * overlap_N
        chosen = self._disjoint(a_N, b_N, gain_N)
        if chosen.numel() == 0:
            return 0.0
        self._apply(a_N[chosen], b_N[chosen], i_N[chosen], j_N[chosen])
        return float(gain_N[chosen].double().sum())

    def _disjoint(self, a_N: Tensor, b_N: Tensor, gain_N: Tensor) -> Tensor:
        """Indices of swaps with a real gain, best first, no expert twice."""
        rank_N = gain_N.argsort(descending=True, stable=True)
        rank_N = rank_N[gain_N[rank_N] > self.least_gain]
        taken: set[int] = set()
        chosen = []
        for index, a, b in zip(rank_N.tolist(), a_N[rank_N].tolist(), b_N[rank_N].tolist(), strict=True):
            if a not in taken and b not in taken:
                taken |= {a, b}
                chosen.append(index)
        return torch.tensor(chosen, dtype=torch.int64, device=gain_N.device)

    def _apply(self, a_N: Tensor, b_N: Tensor, i_N: Tensor, j_N: Tensor) -> None:
        """Exchange i in A with j in B for each swap."""
        slot_i_N, slot_j_N = self.slot_EE[b_N, a_N], self.slot_EE[a_N, b_N]
        self.order_ME[slot_i_N, a_N], self.order_ME[slot_j_N, b_N] = j_N, i_N
        self.labels_N[i_N], self.labels_N[j_N] = b_N, a_N
        change_NN = (self.x_NK[j_N] - self.x_NK[i_N]) @ self.x_NK.t()
        self.score_EN[a_N] += change_NN * (2 * self.weight_E[a_N])[:, None]
        self.score_EN[b_N] -= change_NN * (2 * self.weight_E[b_N])[:, None]
        touched, everyone_E = torch.cat([a_N, b_N]), torch.arange(len(self.weight_E), device=a_N.device)
        if 3 * len(touched) < len(everyone_E):
            self._refresh(touched, everyone_E)
            self._refresh(everyone_E, touched)
        else:
            self._refresh(everyone_E, everyone_E)

    def _refresh(self, to_B: Tensor, from_A: Tensor) -> None:
        """Recompute the best move into each expert of ``to_B`` out of each of ``from_A``."""
        num_experts = len(self.weight_E)
        neurons = self.order_ME[:, from_A].reshape(-1)
        labels = self.labels_N[neurons]
        home = self.score_EN[labels, neurons] - 2 * self.weight_E[labels] * self.square_N[neurons]
        home.masked_fill_(neurons == len(self.labels_N) - 1, torch.inf)
        rows = self.score_EN if len(to_B) == num_experts else self.score_EN[to_B]
        moves = (rows.index_select(1, neurons) - home).view(len(to_B), -1, len(from_A))
        best = moves.max(1)
        if len(to_B) == num_experts and len(from_A) == num_experts:
            self.move_EE, self.slot_EE = best.values, best.indices
        elif len(from_A) == num_experts:
            self.move_EE[to_B], self.slot_EE[to_B] = best.values, best.indices
        else:
            self.move_EE[:, from_A], self.slot_EE[:, from_A] = best.values, best.indices
