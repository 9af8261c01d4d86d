"""Routers: what decides, from the FFN's input alone, how much each expert would contribute.

Letters: T tokens, D model width, F FFN width, E experts, W router width, R rank.

A router is a module ``(x_TD, weights) -> scores_TE`` in fp32; only those that compute with the FFN's own projections look at ``weights``
(the gate, the oracle). Each has a frozen config that stands in the table `ROUTERS` under the name that manifests store. A new router is a
config, a module and one line of the table.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError
from .sites import FFNSite, FFNWeights, expert_bounds
from .sites.formula import ACTIVATIONS, ffn_hidden


@dataclass(frozen=True, kw_only=True)
class NormRouterConfig:
    """Regression of each expert's output norm by ``Linear, ReLU, Linear``."""

    name: ClassVar[str] = "norm"

    width: int = 128
    """Hidden width W; the router costs W * (D + E) multiply-adds a token."""
    output: Literal["exp", "abs"] = "exp"
    """Last step: "exp", exp(z / 2), fitted to squared norms by the Gamma deviance; or "abs", |z|, fitted to norms by the squared error, as
    published (Szatkowski et al. 2024) and worse where norms differ by orders of magnitude."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"router width must be at least 1, got {self.width}.")


@dataclass(frozen=True, kw_only=True)
class MLPRouterConfig:
    """MoEfication's classifier: ``W2 tanh(W1 x / |x|)``, no biases, hidden width E."""

    name: ClassVar[str] = "mlp"


@dataclass(frozen=True, kw_only=True)
class CentreRouterConfig:
    """Parameter centres: cosine of x with the mean of each expert's L2-normalised input weights, shifted to be >= 0. Nothing to train."""

    name: ClassVar[str] = "centre"


@dataclass(frozen=True, kw_only=True)
class LinearRouterConfig:
    """exp(x W), one matrix, no bias; starts from parameter centres and is then trained with the model (`moeify.ssd`)."""

    name: ClassVar[str] = "linear"


@dataclass(frozen=True, kw_only=True)
class RandomRouterConfig:
    """Scores that are a fixed random function of x; the floor that every router must beat."""

    name: ClassVar[str] = "random"


@dataclass(frozen=True, kw_only=True)
class OracleRouterConfig:
    """The experts' true output norms, computed at full cost; the ceiling for studies, never a speed-up."""

    name: ClassVar[str] = "oracle"

    of: Literal["output", "activation"] = "output"
    """Whose norm: "output", what an expert adds to the residual stream; or "activation", its neurons' activations. With experts of one
    neuron and the rule "topk" the latter is top-k activation (Lazy Neuron)."""


@dataclass(frozen=True, kw_only=True)
class GateRouterConfig:
    """The gate of a gated FFN decides which neurons' up and down projections run (CATS, CHESS). Nothing to train."""

    name: ClassVar[str] = "gate"

    scale: Literal["none", "up", "output"] = "up"
    """What a neuron's abs(act(gate)) is multiplied by: "none", nothing (CATS); "up", the mean of abs(up) on calibration tokens (CHESS); or
    "output", that times the norm of its row of the down projection: comparable between layers, for one knob for all."""


@dataclass(frozen=True, kw_only=True)
class LowRankRouterConfig:
    """The FFN's own neurons, computed from a truncated SVD of gate and up. Nothing to train."""

    name: ClassVar[str] = "lowrank"

    rank: int = 64
    """Rank R of the SVD, at most D; the router costs R * (D + 2 F) multiply-adds a token, R * (D + F) where there is no gate."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"router rank must be at least 1, got {self.rank}.")


RouterConfig: TypeAlias = (
    NormRouterConfig
    | MLPRouterConfig
    | CentreRouterConfig
    | LinearRouterConfig
    | RandomRouterConfig
    | OracleRouterConfig
    | GateRouterConfig
    | LowRankRouterConfig
)


def _without_autocast(x_TD: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x_TD.is_meta else torch.autocast(x_TD.device.type, enabled=False)  # the meta device has none


class Router(nn.Module):
    """Base: keeps the config, tells what a token costs, and stays fp32 when the model around it is cast."""

    needs_weights = False
    is_of_weights = False
    """Whether its scores are read off the FFN's own weights, so that a rule calibrated on them is wrong for others."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token (multiply and add = 2); the matrices, elementwise work left out."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    @property
    def ffn_share(self) -> float:
        """Share of the FFN's weights that the router reads for every token, whatever runs; in [0, 1]."""
        return 0.0

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        """scores_TE, fp32."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What .half(), .double() and .to(...) go through: follow to the device, never to another float dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (tensor.dtype, torch.float32) else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class NormRouter(Router):
    """scores = exp(z / 2) or |z|,   z = W2 relu(W1 x + b1) + b2.

    Norms of one layer span orders of magnitude, and the experts near the threshold are among the small ones: a squared error hardly sees
    them, a log link does.

    Source: Szatkowski et al. 2024, arXiv:2310.04361, section 3.3 (Linear-ReLU-Linear-abs, no biases, MSE). The biases (an expert's mean
    norm is a constant), the log link and its loss are ours.
    """

    config: NormRouterConfig

    def __init__(self, config: NormRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.hidden = nn.Linear(d_model, config.width, dtype=torch.float32)
        self.out = nn.Linear(config.width, num_experts, dtype=torch.float32)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        z_TE = self.raw_scores(x_TD)
        # 40: exp(40) squared still fits fp32
        return z_TE.clamp(-40, 40).div(2).exp() if self.config.output == "exp" else z_TE.abs()

    def raw_scores(self, x_TD: Tensor) -> Tensor:
        """z_TE in fp32, any sign: scores before the last step. Of "exp" the log of the predicted squared norm; what the loss is made on."""
        with _without_autocast(x_TD):
            return cast(Tensor, self.out(F.relu(self.hidden(x_TD.float()))))


class MLPRouter(Router):
    """scores = sigmoid(z),   z = W2 tanh(W1 x / |x|_2): W1 starts as the experts' centres, W2 as the identity.

    Source: Zhang et al. 2022, arXiv:2110.01786 and its released code.
    """

    def __init__(self, config: MLPRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.hidden = nn.Linear(d_model, num_experts, bias=False, dtype=torch.float32)
        self.out = nn.Linear(num_experts, num_experts, bias=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        # The sigmoid is monotone, so that top-k is the published one, and >= 0 for rules that compare with a maximum.
        return torch.sigmoid(self.raw_scores(x_TD))

    def raw_scores(self, x_TD: Tensor) -> Tensor:
        """z_TE in fp32, any sign: scores before the sigmoid; what the binary cross-entropy is made on."""
        with _without_autocast(x_TD):
            return cast(Tensor, self.out(torch.tanh(self.hidden(F.normalize(x_TD.float(), dim=1)))))

    @torch.no_grad()
    def set_centres(self, weights: FFNWeights, bounds: tuple[int, ...]) -> None:
        """Start from the experts' centres and the identity, as published."""
        self.hidden.weight.copy_(expert_means(_input_rows(weights), bounds))
        self.out.weight.copy_(torch.eye(len(bounds) - 1))


class CentreRouter(Router):
    """scores_e = 1 + cos(x, c_e), c_e the mean of expert e's normalised input weights.

    Source: Zhang et al. 2022, arXiv:2110.01786 ("parameter centre").
    """

    def __init__(self, config: CentreRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.centres = nn.Linear(d_model, num_experts, bias=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        with _without_autocast(x_TD):
            return 1 + cast(Tensor, self.centres(F.normalize(x_TD.float(), dim=1)))

    @torch.no_grad()
    def set_centres(self, weights: FFNWeights, bounds: tuple[int, ...]) -> None:
        """Take the centres from the weights, neurons in expert order; stored with norm 1."""
        self.centres.weight.copy_(F.normalize(expert_means(_input_rows(weights), bounds), dim=1))


class LinearRouter(Router):
    """scores_e = exp(x . w_e): over their sum, the softmax of x . w.

    w_e starts as the direction of the mean of expert e's normalised input weights, as long as an input weight is in the mean.

    Source: the released clustering code of Zhang et al. 2024, arXiv:2410.03440, has x . w_e with w_e as long as the first neuron of
    expert 0; the mean length is ours. exp keeps the order, so that top-k selects the same, and makes scores that every rule takes.
    """

    def __init__(self, config: LinearRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.out = nn.Linear(d_model, num_experts, bias=False, dtype=torch.float32)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        with _without_autocast(x_TD):
            return cast(Tensor, self.out(x_TD.float())).clamp(-40, 40).exp()

    @torch.no_grad()
    def set_centres(self, weights: FFNWeights, bounds: tuple[int, ...]) -> None:
        """Take the centres from the weights, neurons in expert order."""
        rows_FD = _input_rows(weights)
        self.out.weight.copy_(F.normalize(expert_means(rows_FD, bounds), dim=1) * _row_norms(rows_FD).mean())

    @torch.no_grad()
    def set_random(self, weights: FFNWeights, *, generator: torch.Generator) -> None:
        """Gaussian directions of the same length, drawn on the CPU: what centres must beat."""
        drawn_ED = torch.randn(self.out.weight.shape, generator=generator)
        self.out.weight.copy_(F.normalize(drawn_ED, dim=1).to(self.out.weight.device) * _row_norms(_input_rows(weights)).mean())


class RandomRouter(Router):
    """scores = |P x|, P fixed and Gaussian."""

    def __init__(self, config: RandomRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__(config)
        self.projection = nn.Linear(d_model, num_experts, bias=False, dtype=torch.float32)
        nn.init.normal_(self.projection.weight, std=d_model**-0.5)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        with _without_autocast(x_TD):
            return cast(Tensor, self.projection(x_TD.float())).abs()


class OracleRouter(Router):
    """scores_e = |y_e|_2, the true output norm of each expert, or |h_e|_2, the norm of its neurons' activations.

    Experts of one neuron, ``of="activation"`` and the rule ``TopK(k)`` are y = down(top_k(h)): of each token the k largest |h_j| are kept,
    gradients go through the kept.

    Source: of "activation" Li et al. 2023, arXiv:2210.06313, section 4 (there of ReLU, where |h| = h).
    """

    needs_weights = True
    config: OracleRouterConfig

    def __init__(self, config: OracleRouterConfig, *, site: FFNSite, num_experts: int) -> None:
        super().__init__(config)
        self._num_experts = num_experts
        self._site = site

    @property
    def flops_per_token(self) -> int:
        """All hidden activations, and of outputs the Gram form of each expert: at least the dense FFN's first half."""
        first = self._site.d_model * self._site.d_ff * (2 if self._site.is_gated else 1)
        return 2 * (first + (self._site.d_ff * -(-self._site.d_ff // self._num_experts) if self.config.of == "output" else 0))

    @property
    def ffn_share(self) -> float:
        """All of it, or all but the down projection."""
        first = self._site.d_model * (2 if self._site.is_gated else 1)
        return 1.0 if self.config.of == "output" else first / (first + self._site.d_out)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        assert weights is not None
        bounds = expert_bounds(weights.num_neurons, self._num_experts)
        h_TF = ffn_hidden(x_TD, weights, activation=self._site.activation)
        if self.config.of == "activation":
            return norms_over_experts(h_TF if h_TF.dtype is torch.float64 else h_TF.float(), bounds)
        return expert_norms(h_TF, expert_grams(weights.down_FD, bounds), bounds)


class GateRouter(Router):
    """scores_e = norm over the expert's neurons j of act(gate_j) * scale_j.

    With experts of one neuron and the rule `Threshold(theta)`: CATS with scale 1; CHESS with the mean of |up_j|, where the threshold
    theta / scale_j of each neuron is one of the channel's own.

    Source: Lee et al. 2024, arXiv:2404.08763 (CATS); He et al. 2024, arXiv:2409.01366 (CHESS). The norm of down's row is ours.
    """

    needs_weights = True
    is_of_weights = True
    config: GateRouterConfig
    scale_F: Tensor

    def __init__(self, config: GateRouterConfig, *, site: FFNSite, num_experts: int) -> None:
        super().__init__(config)
        check_router(config, site)
        self._site, self._bounds = site, expert_bounds(site.d_ff, num_experts)
        self.register_buffer("scale_F", torch.ones(site.d_ff, dtype=torch.float32))

    @property
    def flops_per_token(self) -> int:
        """The whole gate projection. The experts that run are counted in full, their rows of it again: so it happens, but for few tokens
        on the CPU (`kernels.cpu_neurons`)."""
        return 2 * self._site.d_model * self._site.d_ff

    @property
    def ffn_share(self) -> float:
        """The gate projection."""
        return self._site.d_model / (2 * self._site.d_model + self._site.d_out)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        assert weights is not None
        assert weights.gate_FD is not None
        gate_TF = ACTIVATIONS[self._site.activation](F.linear(x_TD, weights.gate_FD, weights.gate_bias_F))
        return norms_over_experts(gate_TF.float() * self.scale_F, self._bounds)

    @torch.no_grad()
    def set_scales(self, weights: FFNWeights, mean_up_F: Tensor) -> None:
        """Take the scales that the config names.

        A neuron whose up projection was silent in calibration need not stay so: none counts less than a hundredth of the mean.

        Args:
            weights: of the FFN, neurons in expert order.
            mean_up_F: mean of |up| on calibration tokens.
        """
        scale_F = torch.ones_like(self.scale_F) if self.config.scale == "none" else _floored(mean_up_F)
        if self.config.scale == "output":
            scale_F = scale_F * _row_norms(weights.down_FD)
        self.scale_F.copy_(scale_F)


class LowRankRouter(Router):
    """scores_e = root of the expert's expected energy, summed over its neurons j, given a rank-R image a = A x of the input:

    E[act(gate_j)^2 | a] * E[up_j^2 | a] * |down_j|^2,    gate_j ~ N(B_gate a + b_gate, s_gate^2),  up_j likewise;   without a gate the
    first factor alone, of up;   over the geometric mean of the token's neurons.

    A is of the calibration's text: of other text it leaves more out, and all of a token's predictions shrink together, though its neurons
    do not. Their size says nothing that a threshold could use; their ratios hold.

    The deviations are what A leaves out of gate and up, on calibration tokens; without them a neuron whose known part is small would count
    as silent. A neuron that is predicted and turns out zero costs time, never quality.

    Source: A and B are the SVD of W C^(1/2), C the inputs' second moments: the best approximation of W x on them (Yuan et al. 2023,
    arXiv:2312.05821); as predictor Shin et al. 2024, arXiv:2407.11660. The expectation is ours.
    """

    is_of_weights = True
    config: LowRankRouterConfig
    scale_F: Tensor
    up_std_F: Tensor
    gate_std_F: Tensor | None

    def __init__(self, config: LowRankRouterConfig, *, site: FFNSite, num_experts: int) -> None:
        super().__init__(config)
        rank = min(config.rank, site.d_model)
        self._activation, self._bounds = site.activation, expert_bounds(site.d_ff, num_experts)
        self.project = nn.Linear(site.d_model, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, site.d_ff, dtype=torch.float32)
        self.gate = nn.Linear(rank, site.d_ff, dtype=torch.float32) if site.is_gated else None
        self.register_buffer("scale_F", torch.ones(site.d_ff, dtype=torch.float32))
        self.register_buffer("up_std_F", torch.zeros(site.d_ff, dtype=torch.float32))
        self.register_buffer("gate_std_F", torch.zeros(site.d_ff, dtype=torch.float32) if site.is_gated else None)

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        with _without_autocast(x_TD):
            a_TR = self.project(x_TD.float())
            up_TF = self.up(a_TR)
            if self.gate is None or self.gate_std_F is None:
                energy_TF = self._expected_square(up_TF, self.up_std_F)
            else:
                energy_TF = self._expected_square(self.gate(a_TR), self.gate_std_F) * (up_TF.square() + self.up_std_F.square())
        size_TF = energy_TF.sqrt() * self.scale_F
        return norms_over_experts(size_TF / _geometric_mean(size_TF), self._bounds)

    def _expected_square(self, mean_TF: Tensor, std_F: Tensor) -> Tensor:
        """E[act(z)^2], z ~ N(mean, std^2), by Gauss and Hermite's quadrature with three nodes."""
        act, step_F = ACTIVATIONS[self._activation], math.sqrt(3) * std_F
        outer_TF = act(mean_TF - step_F).square() + act(mean_TF + step_F).square()
        return outer_TF.div_(6).add_(act(mean_TF).square(), alpha=2 / 3)

    @torch.no_grad()
    def set_factors(self, weights: FFNWeights, moments_DD: Tensor, *, mean_gate_F: Tensor | None, mean_up_F: Tensor) -> None:
        """Take factors and deviations from the FFN's weights.

        Rows of gate and up are weighted by what an error in them does to the output: by down's row, and by the mean of what they are
        multiplied with.

        Args:
            weights: of the FFN, neurons in expert order.
            moments_DD: E[x x^T] on calibration tokens.
            mean_gate_F: mean of |act(gate)|; None without a gate.
            mean_up_F: mean of |up|.
        """
        down_F = _row_norms(weights.down_FD)
        self.scale_F.copy_(down_F)
        parts = [(self.up, self.up_std_F, weights.up_FD, weights.up_bias_F, mean_gate_F)]
        if self.gate is not None and self.gate_std_F is not None and weights.gate_FD is not None:
            parts.append((self.gate, self.gate_std_F, weights.gate_FD, weights.gate_bias_F, mean_up_F))
        # fp64: the inputs' energies differ by 1e6 between directions, and are squared here
        energy_D, basis_DD = torch.linalg.eigh(moments_DD.double())
        # directions that calibration hardly saw must not be blown up by dividing through their energy
        root_D = energy_D.clamp_min(1e-6 * energy_D[-1].clamp_min(1e-30)).sqrt()
        whole = [W_FD.double() @ basis_DD * root_D for _, _, W_FD, _, _ in parts]
        weighted = [W_FD * _floored(down_F * (1 if by_F is None else by_F))[:, None] for W_FD, (*_, by_F) in zip(whole, parts, strict=True)]
        right_RD = torch.linalg.svd(torch.cat(weighted), full_matrices=False).Vh[: self.project.out_features]
        self.project.weight.zero_()[: len(right_RD)].copy_(right_RD / root_D @ basis_DD.t())
        for W_FD, (linear, std_F, _, bias_F, _) in zip(whole, parts, strict=True):
            left_FR = W_FD @ right_RD.t()
            linear.weight.zero_()[:, : left_FR.shape[1]].copy_(left_FR)
            linear.bias.zero_() if bias_F is None else linear.bias.copy_(bias_F)
            std_F.copy_((W_FD - left_FR @ right_RD).norm(dim=1))


def check_router(config: RouterConfig, site: FFNSite) -> None:
    """Refuse a router that an FFN cannot have.

    Raises:
        ConfigError: the gate router of an FFN without a gate.
    """
    if isinstance(config, GateRouterConfig) and not site.is_gated:
        raise ConfigError(
            f"'{site.name}' has no gate, which the router 'gate' (cats, chess) reads; use 'lowrank' (predictor) or 'norm', or leave it "
            "dense by the policy."
        )


def build_router(config: RouterConfig, *, site: FFNSite, num_experts: int) -> Router:
    """A router with fresh parameters for one site."""
    return ROUTERS[config.name][1](config, site, num_experts)


_Builder: TypeAlias = Callable[..., Router]
ROUTERS: dict[str, tuple[type, _Builder]] = {
    "norm": (NormRouterConfig, lambda c, s, e: NormRouter(c, d_model=s.d_model, num_experts=e)),
    "mlp": (MLPRouterConfig, lambda c, s, e: MLPRouter(c, d_model=s.d_model, num_experts=e)),
    "centre": (CentreRouterConfig, lambda c, s, e: CentreRouter(c, d_model=s.d_model, num_experts=e)),
    "linear": (LinearRouterConfig, lambda c, s, e: LinearRouter(c, d_model=s.d_model, num_experts=e)),
    "random": (RandomRouterConfig, lambda c, s, e: RandomRouter(c, d_model=s.d_model, num_experts=e)),
    "oracle": (OracleRouterConfig, lambda c, s, e: OracleRouter(c, site=s, num_experts=e)),
    "gate": (GateRouterConfig, lambda c, s, e: GateRouter(c, site=s, num_experts=e)),
    "lowrank": (LowRankRouterConfig, lambda c, s, e: LowRankRouter(c, site=s, num_experts=e)),
}
"""Name -> (config class, builder)."""


# -- regression targets --------------------------------------------------------------------------------------------------------------


def expert_grams(down_FD: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """G_e = W_down[e] W_down[e]^T of every expert, zero-padded to the largest expert: grams_EGG, fp32 (fp64 for fp64 weights).

    Cost: E * G^2 * D multiply-adds, once a layer.
    """
    rows_EGD = pad_experts(down_FD if down_FD.dtype is torch.float64 else down_FD.float(), bounds)
    return rows_EGD @ rows_EGD.transpose(1, 2)


def expert_norms(h_TF: Tensor, grams_EGG: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Norm of each expert's output, without ever forming an output: |y_e|^2 = h_e^T G_e h_e.

    Args:
        h_TF: activations in expert order.
        grams_EGG: from `expert_grams`.
        bounds: `expert_bounds`.

    Returns:
        norms_TE >= 0, in the dtype of the grams; the output bias is not part of any expert.

    Cost: T * G * F multiply-adds and T * F numbers, against T * D * F and E * T * D for the outputs themselves.
    """
    h_ETG = pad_experts(h_TF.to(grams_EGG.dtype).t(), bounds).transpose(1, 2)
    return (h_ETG @ grams_EGG).mul_(h_ETG).sum(2).clamp_min_(0).sqrt_().t()


def norms_over_experts(rows_TF: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Root of the sum of squares over each expert's neurons: norms_TE; of experts of one neuron the absolute values."""
    if len(bounds) - 1 == rows_TF.shape[1]:
        return rows_TF.abs()
    return pad_experts(rows_TF.t(), bounds).square().sum(1).sqrt().t()


def expert_sums(h_TF: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Sum of |h| over each expert's neurons: sums_TE. The label of MoEfication's classifier, where h >= 0; |.| serves GLU and GELU."""
    return pad_experts(h_TF.abs().t(), bounds).sum(1).t()


def expert_means(rows_FD: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Mean of the L2-normalised rows of each expert: centres_ED, fp32."""
    rows = F.normalize(rows_FD.float(), dim=1)
    return torch.stack([rows[a:b].mean(0) for a, b in zip(bounds, bounds[1:], strict=False)])


def _input_rows(weights: FFNWeights) -> Tensor:
    """The rows that decide whether a neuron fires: the gate's where there is one."""
    return weights.up_FD if weights.gate_FD is None else weights.gate_FD


def _geometric_mean(size_TF: Tensor) -> Tensor:
    """Of each row (T, 1); what is below a thousandth of the row's largest counts as that, so that zeros do not decide."""
    floor_T1 = (1e-3 * size_TF.amax(dim=1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    return size_TF.maximum(floor_T1).log().mean(dim=1, keepdim=True).exp()


def _row_norms(down_FD: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(down_FD, dim=1, dtype=torch.float32))


def _floored(mean_F: Tensor) -> Tensor:
    """At least a hundredth of the mean; ones where all are 0."""
    mean = mean_F.mean()
    return mean_F.clamp_min(0.01 * mean) if bool(mean > 0) else torch.ones_like(mean_F)


def pad_experts(rows_FK: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """(F, K) rows as (E, G, K), the smaller experts padded with zero rows (neutral in every sum here)."""
    num_experts, size = len(bounds) - 1, bounds[1]
    larger = rows_FK.shape[0] % num_experts
    if larger == 0:
        return rows_FK.reshape(num_experts, size, -1)
    cut = larger * size
    head = rows_FK[:cut].reshape(larger, size, -1)
    tail = F.pad(rows_FK[cut:].reshape(num_experts - larger, size - 1, -1), (0, 0, 0, 1))
    return torch.cat([head, tail])
