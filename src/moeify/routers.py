"""Routers: what decides, from the FFN's input alone, how much each expert would contribute.

Letters: T tokens, D model width, F FFN width, E experts, W router width.

A router is a module ``(x_TD, weights) -> scores_TE`` in fp32; only the oracle looks at ``weights``. Each has a frozen config that stands in
the table `ROUTERS` under the name that manifests store. A new router is a config, a module and one line of the table.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError
from .sites import FFNSite, FFNWeights, expert_bounds
from .sites.formula import ffn_hidden


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
class RandomRouterConfig:
    """Scores that are a fixed random function of x; the floor that every router must beat."""

    name: ClassVar[str] = "random"


@dataclass(frozen=True, kw_only=True)
class OracleRouterConfig:
    """The experts' true output norms, computed at full cost; the ceiling for studies, never a speed-up."""

    name: ClassVar[str] = "oracle"


RouterConfig: TypeAlias = NormRouterConfig | MLPRouterConfig | CentreRouterConfig | RandomRouterConfig | OracleRouterConfig


def _without_autocast(x_TD: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x_TD.is_meta else torch.autocast(x_TD.device.type, enabled=False)  # the meta device has none


class Router(nn.Module):
    """Base: keeps the config, tells what a token costs, and stays fp32 when the model around it is cast."""

    needs_weights = False

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token (multiply and add = 2); the matrices, elementwise work left out."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

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
    """scores_e = |y_e|_2, the true output norm of each expert."""

    needs_weights = True

    def __init__(self, config: OracleRouterConfig, *, site: FFNSite, num_experts: int) -> None:
        super().__init__(config)
        self._num_experts = num_experts
        self._site = site

    @property
    def flops_per_token(self) -> int:
        """All hidden activations, and the Gram form of each expert: dearer than the dense FFN's first half."""
        first = self._site.d_model * self._site.d_ff * (2 if self._site.is_gated else 1)
        return 2 * (first + self._site.d_ff * -(-self._site.d_ff // self._num_experts))

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        assert weights is not None
        bounds = expert_bounds(weights.num_neurons, self._num_experts)
        return expert_norms(ffn_hidden(x_TD, weights, activation=self._site.activation), expert_grams(weights.down_FD, bounds), bounds)


def build_router(config: RouterConfig, *, site: FFNSite, num_experts: int) -> Router:
    """A router with fresh parameters for one site."""
    return ROUTERS[config.name][1](config, site, num_experts)


_Builder: TypeAlias = Callable[..., Router]
ROUTERS: dict[str, tuple[type, _Builder]] = {
    "norm": (NormRouterConfig, lambda c, s, e: NormRouter(c, d_model=s.d_model, num_experts=e)),
    "mlp": (MLPRouterConfig, lambda c, s, e: MLPRouter(c, d_model=s.d_model, num_experts=e)),
    "centre": (CentreRouterConfig, lambda c, s, e: CentreRouter(c, d_model=s.d_model, num_experts=e)),
    "random": (RandomRouterConfig, lambda c, s, e: RandomRouter(c, d_model=s.d_model, num_experts=e)),
    "oracle": (OracleRouterConfig, lambda c, s, e: OracleRouter(c, site=s, num_experts=e)),
}
"""Name -> (config class, builder)."""


# -- regression targets --------------------------------------------------------------------------------------------------------------


def expert_grams(down_FD: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """G_e = W_down[e] W_down[e]^T of every expert, zero-padded to the largest expert: grams_EGG, fp32 (fp64 for fp64 weights).

    Cost: E * G^2 * D multiply-adds, once a layer.
    """
    rows_EGD = _pad_experts(down_FD if down_FD.dtype is torch.float64 else down_FD.float(), bounds)
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
    h_ETG = _pad_experts(h_TF.to(grams_EGG.dtype).t(), bounds).transpose(1, 2)
    return (h_ETG @ grams_EGG).mul_(h_ETG).sum(2).clamp_min_(0).sqrt_().t()


def expert_sums(h_TF: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Sum of |h| over each expert's neurons: sums_TE. The label of MoEfication's classifier, where h >= 0; |.| serves GLU and GELU."""
    return _pad_experts(h_TF.abs().t(), bounds).sum(1).t()


def expert_means(rows_FD: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Mean of the L2-normalised rows of each expert: centres_ED, fp32."""
    rows = F.normalize(rows_FD.float(), dim=1)
    return torch.stack([rows[a:b].mean(0) for a, b in zip(bounds, bounds[1:], strict=False)])


def _input_rows(weights: FFNWeights) -> Tensor:
    """The rows that decide whether a neuron fires: the gate's where there is one."""
    return weights.up_FD if weights.gate_FD is None else weights.gate_FD


def _pad_experts(rows_FK: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """(F, K) rows as (E, G, K), the smaller experts padded with zero rows (neutral in every sum here)."""
    num_experts, size = len(bounds) - 1, bounds[1]
    larger = rows_FK.shape[0] % num_experts
    if larger == 0:
        return rows_FK.reshape(num_experts, size, -1)
    cut = larger * size
    head = rows_FK[:cut].reshape(larger, size, -1)
    tail = F.pad(rows_FK[cut:].reshape(num_experts - larger, size - 1, -1), (0, 0, 0, 1))
    return torch.cat([head, tail])
