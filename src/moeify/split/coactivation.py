"""Co-activation split: neurons that fire on the same tokens share an expert.

Letters: T tokens, F FFN width, K features.

The default compares log energies: neurons that are quiet together, and equally quiet, share an expert. What an expert costs when it is
skipped, and how well a router can tell, depends on both. The other transforms are graphs in the sense of MoEfication, which cuts a
thresholded co-activation graph with METIS and repairs the sizes at random. Here the same graph, normalised, becomes features whose inner
products are its edge weights, so that balanced k-means maximises the co-activation inside experts directly, with exact sizes and no
external solver: sum_e ||S_e||^2 / n_e is the weight inside expert e over its size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, DataError
from .balanced_kmeans import balanced_kmeans, check_solver_options
from .record import ExpertSplit

# Floor of a neuron's share of its token's energy, in units of the mean share 1 / F, before the logarithm.
_LOG_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Coactivation:
    """Balanced k-means on what neurons do, not on what their weights are: `coactivation_features` or `graph_features`.

    Source: the graph is Zhang et al. 2022, arXiv:2110.01786, section 3.2; normalisation and solver are ours.
    """

    name: ClassVar[str] = "coactivation"

    seed: int = 0
    """Seed of the starting centroids."""
    transform: Literal["log_energy", "amplitude", "share", "log"] = "log_energy"
    """What is compared: the log of the neuron's energy, level included (`log_energy_features`), or of its share p of the token's energy
    sqrt(p), p or log(F p + 1e-3), each neuron scaled to norm 1."""
    centring: Literal["mean", "none"] = "mean"
    """Of the share transforms: "mean" compares how neurons vary together (correlation); "none" how much they fire together (cosine), as
    MoEfication's graph does."""
    level_weight: float = 0.0
    """Weight of one extra feature of the share transforms, the standardised log of the neuron's mean energy; 0 ignores it, a large value
    (100) groups by mean energy alone."""
    iterations: int = 1000
    """At most this many rounds of swaps."""
    tolerance: float = 2e-4
    """Stop when a round lowers the inertia by less than this fraction of it."""
    restarts: int = 1
    """Independent starts, of which the best is kept; ignored with a warm start."""

    def __post_init__(self) -> None:
        check_solver_options(self.iterations, self.tolerance, self.restarts)
        if not 0 <= self.level_weight < float("inf"):
            raise ConfigError(f"level_weight must be finite and >= 0, got {self.level_weight}.")

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


@torch.no_grad()
def coactivation_features(energy_TF: Tensor, *, method: Coactivation | None = None) -> Tensor:
    """Feature view: one row a neuron, from the energies of a sample of tokens.

    p_tj = e_tj / sum_j' e_tj';  a = transform(p);  x_j = (a_:j - mean) / ||a_:j - mean||,  so x_i . x_j is the correlation of i and j

    Shares, not energies: a few tokens with massive activations would otherwise decide everything. A thousand tokens or more are enough;
    the sample is the caller's (evenly spaced over the calibration stream, not its beginning).

    Args:
        energy_TF: e_tj = (h_tj ||down_j||)^2, >= 0 and finite; tokens without any energy are ignored.
        method: the transform, centring and level weight; the defaults of `Coactivation` if None.

    Returns:
        features_FK in fp32; K <= min(T, F) + 1. Rows have norm 1 before the level feature; neurons that never vary have a zero row.

    Raises:
        DataError: not 2-D, or not finite, or negative.

    Cost: O(T F) for T <= F; else O(T F^2), a Gram matrix and its Cholesky factor, which have the same inner products.
    """
    method = method or Coactivation()
    if energy_TF.dim() != 2 or not energy_TF.is_floating_point():
        raise DataError(f"energy_TF must be a 2-D floating-point tensor, got {tuple(energy_TF.shape)} {energy_TF.dtype}.")
    energy_TF = energy_TF.detach().float()
    if not bool((energy_TF.isfinite() & (energy_TF >= 0)).all()):
        raise DataError("energy_TF holds NaN, infinity or negative values; energies are (h_tj * ||down_j||)^2.")
    if method.transform == "log_energy":
        return log_energy_features(energy_TF, seed=method.seed)
    share_TF = energy_TF / energy_TF.sum(1, keepdim=True)
    share_TF = share_TF[share_TF[:, 0].isfinite()]
    num_tokens, num_neurons = share_TF.shape
    if method.transform == "share":
        value_TF = share_TF
    elif method.transform == "amplitude":
        value_TF = share_TF.sqrt()
    else:
        value_TF = (share_TF * num_neurons + _LOG_FLOOR).log()
    if method.centring == "mean" and num_tokens:
        value_TF = value_TF - value_TF.mean(0)
    features_FK = _unit_rows(value_TF.t())
    if num_tokens > num_neurons:
        features_FK = _factor(features_FK @ features_FK.t())
    return _with_level(features_FK, share_TF.mean(0) if num_tokens else share_TF.sum(0), method.level_weight)


@torch.no_grad()
def log_energy_features(energy_TF: Tensor, *, dimensions: int = 32, seed: int = 0) -> Tensor:
    """Log energies of each neuron over a sample of tokens, on their main directions.

    z_jt = log(e_tj + 1e-6 mean e) - mean_j of it;   features = the projection of z on its ``dimensions`` leading singular directions

    The token's mean is taken off, the neuron's is not: the level of a neuron is part of what experts have to share. Main directions keep
    what is common to many tokens and drop the noise of single ones, and make k-means cheap.

    Args:
        energy_TF: (h_tj ||down_j||)^2, >= 0 and finite.
        dimensions: most features K.
        seed: of the random start of the subspace iteration.

    Returns:
        features_FK in fp32, K <= min(dimensions, T, F).

    Source: ours; subspace iteration after Halko, Martinsson and Tropp 2011, arXiv:0909.4061. Cost: 7 T F K multiply-adds.
    """
    floor = (energy_TF.mean() * 1e-6).clamp_min(torch.finfo(torch.float32).tiny)
    z_FT = (energy_TF.float() + floor).log_().t()  # in place: T * F numbers are the most that fitting a layer holds
    z_FT = z_FT.sub_(z_FT.mean(0)).contiguous()
    dimensions = min(dimensions, *z_FT.shape)
    oversampled = min(dimensions + 8, *z_FT.shape)
    generator = torch.Generator().manual_seed(seed)
    basis_TK = torch.randn(z_FT.shape[1], oversampled, generator=generator).to(z_FT.device)
    for _ in range(3):
        basis_TK = torch.linalg.qr(z_FT.t() @ (z_FT @ basis_TK)).Q
    left_FK, values_K, _ = torch.linalg.svd(z_FT @ basis_TK, full_matrices=False)
    features_FK: Tensor = left_FK * values_K
    return features_FK[:, :dimensions].contiguous()


@torch.no_grad()
def graph_features(
    coactivation_FF: Tensor, *, amplitude_sum_F: Tensor, num_tokens: int, energy_F: Tensor | None = None, method: Coactivation | None = None
) -> Tensor:
    """Graph view: one row a neuron, from accumulated co-activation (`ActivationProfile.tensors()`), without keeping any token.

    C_ij = sum_t a_ti a_tj, less T mean_i mean_j when centred;  x x^T = C_ij / sqrt(C_ii C_jj)

    Args:
        coactivation_FF: sum over tokens of a_t a_t^T with a = sqrt(share), the "amplitude" transform.
        amplitude_sum_F: sum over tokens of a.
        num_tokens: T of both sums.
        energy_F: mean energies for the level feature; C's diagonal, the mean share, if None.
        method: centring and level weight; its transform must be "amplitude", as it is if None.

    Returns:
        features_FK in fp32, K = F (+ 1); equal partitions come out of `coactivation_features` on the same tokens.

    Raises:
        DataError: not a finite square matrix, or sums of another width.
        ConfigError: another transform.

    Cost: F^3 / 3 multiply-adds.
    """
    method = method or Coactivation(transform="amplitude")
    if method.transform != "amplitude":
        raise ConfigError(f"graph_features has the 'amplitude' transform accumulated, not {method.transform!r}; use coactivation_features.")
    num_neurons = coactivation_FF.shape[0]
    if coactivation_FF.shape != (num_neurons, num_neurons) or amplitude_sum_F.shape != (num_neurons,):
        raise DataError(
            f"coactivation_FF {tuple(coactivation_FF.shape)} and amplitude_sum_F {tuple(amplitude_sum_F.shape)} must be (F, F) and (F,)."
        )
    # fp64: centring subtracts nearly equal numbers
    graph_FF = coactivation_FF.detach().double()
    if not bool(graph_FF.isfinite().all()):
        raise DataError("coactivation_FF holds NaN or infinity.")
    level_F = graph_FF.diagonal() if energy_F is None else energy_F
    if method.centring == "mean" and num_tokens:
        sum_F = amplitude_sum_F.detach().double()
        graph_FF = graph_FF - torch.outer(sum_F, sum_F) / num_tokens
    # a variance below fp32's rounding of the uncentred sum is no variance
    noise_F = coactivation_FF.diagonal().double() * 1e-6
    scale_F = torch.where(graph_FF.diagonal() > noise_F, graph_FF.diagonal(), 0.0).sqrt().reciprocal()
    scale_F = torch.where(scale_F.isfinite(), scale_F, 0.0)
    return _with_level(_factor(graph_FF * scale_F * scale_F[:, None]), level_F, method.level_weight)


def _unit_rows(x_FK: Tensor) -> Tensor:
    return F.normalize(x_FK, dim=1, eps=torch.finfo(torch.float32).tiny)


def _factor(graph_FF: Tensor) -> Tensor:
    """X with X X^T = graph up to 1e-4 on the diagonal, by Cholesky; more where rounding has made the graph indefinite."""
    graph_FF = (graph_FF + graph_FF.t()).double() / 2
    jitter = 1e-4
    while True:
        factor_FF, info = torch.linalg.cholesky_ex(
            graph_FF + jitter * torch.eye(len(graph_FF), dtype=torch.float64, device=graph_FF.device)
        )
        if int(info) == 0:
            # the jitter alone is not a feature: neurons without any edge get their zero row back
            features_FF: Tensor = (factor_FF * (graph_FF.diagonal() > 0)[:, None]).float()
            return features_FF.contiguous()
        jitter *= 10


def _with_level(features_FK: Tensor, energy_F: Tensor, level_weight: float) -> Tensor:
    """Append the standardised log mean energy as one more feature."""
    if level_weight == 0 or len(features_FK) < 2:
        return features_FK.contiguous()
    energy_F = energy_F.detach().to(features_FK.device).double()
    level_F = energy_F.clamp(min=max(float(energy_F.max()) * 1e-9, torch.finfo(torch.float64).tiny)).log()
    level_F = (level_F - level_F.mean()) / level_F.std().clamp(min=1e-12)
    return torch.cat([features_FK, level_weight * level_F.float()[:, None]], dim=1)
