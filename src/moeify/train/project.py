"""Linear layers onto MLPs of equal cost, one layer at a time: what makes the projections of attention sparse like FFNs.

Letters: T tokens, K inputs and N outputs of the linear layer, P neurons, R directions of its outputs.

Every layer is fitted alone, to its own outputs for the inputs that the model as it is gives it. A linear layer of which little more than
P / 2 directions matter is nearly an MLP already: relu(z) - relu(-z) = z.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, DataError
from ..sites.formula import ACTIVATIONS
from ..sites.projection import ProjectionRecord
from ..sites.site import linear_weight
from .capture import FFNInputs, capture_ffn_inputs, fast_dtype, short_batch
from .distill import token_weights
from .fit import some_rows
from .layerwise import CHUNK_TOKENS, LayerwiseConfig, Watch, fit_outputs, fitting_rows, in_parallel, measured_error
from .work import fingerprint, open_work, read_tensors, weights_checksum, write_tensors

_START_TOKENS = 16_384  # whose moments and activations make the start
_RIDGE = 1e-6  # of the mean diagonal, in the least squares of down
_LEAST_ENERGY = 1e-10  # of the largest direction; less is rounding


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(LayerwiseConfig):
    """How linear layers are replaced by MLPs of equal cost."""

    flops_factor: float = 1.0
    """Cost of an MLP over that of the layer it replaces, greater than 0."""
    activation: str = "relu"
    """Function between its two layers, a name in `moeify.sites.ACTIVATIONS`."""
    init: Literal["svd", "random"] = "svd"
    """Start: 'svd', the directions of most energy among the layer's outputs, and `down` by least squares; 'random', as `nn.Linear`."""
    shift: float = 2.0
    """Of the start 'svd', for MLPs with biases: a neuron is silent where its input is this many deviations below the mean, at least 0.
    At 0 half of the neurons are; the more, the smaller the error, and the fewer the zeros."""
    error: Literal["relative", "mse"] = "relative"
    """What is fitted: each token's squared error over its output's energy, or the mean squared error over all."""
    epochs: int = 6
    """Passes over the captured tokens."""
    lr: float = 2e-3
    """Largest learning rate of AdamW; warms up and decays to zero within each layer's run."""
    sparsity_weight: float = 0.0
    """Weight of the penalty at the end, to which it grows linearly from 0; at least 0. 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.flops_factor < math.inf:
            raise ConfigError(f"flops_factor must be finite and greater than 0, got {self.flops_factor}.")
        if not 0 <= self.shift < math.inf:
            raise ConfigError(f"shift must be finite and at least 0, got {self.shift}.")
        for name, known in (("init", ("svd", "random")), ("error", ("relative", "mse"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}.")
        _config.lookup(ACTIVATIONS, self.activation, where="activation")
        if self.sparsity_weight and ACTIVATIONS[self.activation](torch.full((), -1.0)) != 0:
            raise ConfigError(f"the activation {self.activation} has no exact zeros; leave sparsity_weight at 0.")


def project_layers(
    model: nn.Module,
    records: Sequence[ProjectionRecord],
    batches: Sequence[Mapping[str, Tensor]],
    config: ProjectConfig | None = None,
    *,
    work: Path,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, dict[str, Any]]:
    """Fit an MLP to each of some linear layers, y = x W^T + b, by gradient descent; the model is not changed.

    loss = mean over tokens of |y - y'|^2 / (|y'|^2 + mean |y'|^2 / 100)   [+ sparsity_weight * step / (steps - 1) * penalty]

    Args:
        model: dense model. It runs once over ``batches``; the inputs of the layers go to disk, once for those that read the same
            (2 K bytes a token).
        records: what is to be replaced, from `find_projections`; widths and activations are theirs, not the config's.
        batches: inputs of one forward each.
        config: None: the defaults.
        work: folder for inputs and finished layers; a call with the same arguments continues what it holds, to equal weights. The caller
            deletes it (`moeify.train.work.remove_work`).
        run: what else tells this run from another.
        progress: told every batch and layer.

    Returns:
        For each record's name its "tensors", as `replace_projections` takes them, and "errors": for each MLP, by its module path, the mean
        relative squared error on held-out tokens "before" (at the start) and "after", and the mean number of "nonzeros" of its neurons
        there.

    Raises:
        ConfigError: no record, or a penalty on a function without zeros.
        DataError: no batch, or too few tokens.

    Cost: 6 T P (K + N) multiply-adds an epoch and layer, in bfloat16 where that is native, and memory for one layer's inputs and outputs in
        bfloat16, its weights and their AdamW state, times ``workers``.

    Source: Szatkowski et al. 2024, arXiv:2310.04361v4, section 3.4; the mean squared error and the random start are theirs.
    """
    config = config or ProjectConfig()
    if not records:
        raise ConfigError("no linear layer to replace was given.")
    if config.sparsity_weight:
        for record in records:
            replace(config, activation=record.activation)  # which checks it
    identity = {
        **(run or {}),
        "project": _config.to_dict(replace(config, workers=1)),
        "records": [_config.to_dict(record) for record in records],
        "batches": fingerprint(batches),
        "weights": weights_checksum(model),
    }
    open_work(work, identity)
    device = next(model.parameters()).device
    inputs, source = capture_layers(model, {r.name: r.d_in for r in records}, batches, work / "inputs", progress=progress)
    jobs = [(record, path, part) for record in records for path, part in record.mlps.items()]

    def fit(i: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        record, path, part = jobs[i]
        kept = work / f"projected{i:04d}.safetensors"
        found = read_tensors(kept)
        if found is None:
            linear = model.get_submodule(record.name)
            weight_NK, bias_N = linear_weight(linear).detach(), cast(Tensor | None, getattr(linear, "bias", None))
            if part is not None:
                index_N = part.index_N().to(device)
                weight_NK, bias_N = weight_NK[index_N], None if bias_N is None else bias_N[index_N]
            if record.adds_bias:
                bias_N = weight_NK.new_zeros(len(weight_NK))
            x_TK = inputs.read(source[record.name]).to(device)
            own = replace(config, activation=record.activation)
            found = project_linear(x_TK, weight_NK, bias_N, own, width=cast(int, record.width if part is None else part.width), name=path)
            write_tensors(kept, *found)
        return found

    result: dict[str, dict[str, Any]] = {record.name: {"tensors": {}, "errors": {}} for record in records}
    with progress.task("replace projections", total=len(jobs)) as task:
        for (record, path, part), (tensors, errors) in zip(jobs, in_parallel(fit, range(len(jobs)), workers=config.workers), strict=True):
            prefix = "" if part is None else f"{part.name}."
            result[record.name]["tensors"] |= {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
            result[record.name]["errors"][path] = errors
            task.advance(1)
    return result


def project_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, config: ProjectConfig, *, width: int, name: str, watch: Watch | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The MLP down(act(up(x))) that is nearest to x W^T + b on some inputs.

    Args:
        x_TK: inputs, bfloat16.
        weight_NK: W.
        bias_N: b; None: the MLP has no biases either.
        config: start, loss and optimizer.
        width: neurons P.
        name: of the layer, for errors.
        watch: told step, error (as ``config.error`` has it) and penalty of each batch.

    Returns:
        fp32 tensors "up.weight" (P, K), "up.bias", "down.weight" (N, P), "down.bias", and the errors that `project_layers` describes.

    Raises:
        DataError: too few tokens.
    """
    rows, held_out = fitting_rows(len(x_TK), config, name=name)
    target_TN = _outputs(x_TK, weight_NK, bias_N)
    weight_T = token_weights(target_TN)
    fit_weight_T = weight_T if config.error == "relative" else _equal_weights(target_TN)
    some = some_rows(rows, most=_START_TOKENS).to(x_TK.device)
    leaves = random_start(weight_NK, width, has_bias=bias_N is not None, generator=torch.Generator().manual_seed(config.seed))
    if config.init == "svd":
        moments = x_TK[some].float(), target_TN[some].float(), fit_weight_T[some]
        leaves = svd_start(leaves, *moments, weight_NK.float(), activation=config.activation, shift=config.shift)
    for leaf in leaves.values():
        leaf.requires_grad_()
    act = ACTIVATIONS[config.activation]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        a_TP = act(F.linear(x, leaves["up.weight"], leaves.get("up.bias")))
        return a_TP, F.linear(a_TP, leaves["down.weight"], leaves.get("down.bias"))

    last_step = max(1, config.epochs * -(-len(rows) // config.batch_tokens) - 1)
    before, _ = measured_error(forward, x_TK, target_TN, weight_T, held_out)
    fit_outputs(
        leaves,
        forward,
        x_TK,
        target_TN,
        fit_weight_T,
        rows,
        config,
        penalty_weight=lambda step: config.sparsity_weight * step / last_step,
        watch=watch,
    )
    after, nonzeros = measured_error(forward, x_TK, target_TN, weight_T, held_out)
    tensors = {key: leaf.detach().cpu().contiguous() for key, leaf in leaves.items()}
    return tensors, {"before": before, "after": after, "nonzeros": nonzeros}


def random_start(weight_NK: Tensor, width: int, *, has_bias: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """fp32 weights distributed as those of `nn.Linear`, uniform within 1 / sqrt(inputs) of 0, for an MLP in the place of a linear layer.

    Args:
        weight_NK: of the layer.
        width: neurons P.
        has_bias: whether the MLP has biases.
        generator: of the CPU, so that draws are the same on every device; not torch's own, which layers fitted at the same time share.
    """
    d_out, d_in = weight_NK.shape
    leaves = {}
    for name, outputs, inputs in (("up", width, d_in), ("down", d_out, width)):
        shapes = {"weight": (outputs, inputs), **({"bias": (outputs,)} if has_bias else {})}
        for key, shape in shapes.items():
            drawn = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)
            leaves[f"{name}.{key}"] = drawn.to(weight_NK.device)
    return leaves


@torch.no_grad()
def svd_start(
    leaves: Mapping[str, Tensor],
    x_TK: Tensor,
    target_TN: Tensor,
    weight_T: Tensor,
    weight_NK: Tensor,
    *,
    activation: str,
    shift: float,
) -> dict[str, Tensor]:
    """The MLP that holds the directions of most energy among the layer's outputs.

    With C = sum_t weight_t y_t y_t^T = U diag(e) U^T, z_r = u_r^T y / sqrt(e_r) are the directions whose first R give the best product of
    rank R (the truncated SVD of W C_x^(1/2), C_x the second moments of x). A neuron act(z_r + shift), or of the other sign, explains a part
    rho_r of z_r's energy (of normal z 0.73 for ReLU without a shift), both together all of it; so one neuron is worth rho_r e_r,
    the second (1 - rho_r) e_r, and the P that are worth most are taken. With biases all is about the weighted mean; without, the shift is
    0. `down` then is the least squares solution.

    Args:
        leaves: from `random_start`; neurons for which no direction is left stay so.
        x_TK, target_TN, weight_T: inputs, outputs and weights of some tokens.
        weight_NK: of the layer.
        activation: key of `ACTIVATIONS`.
        shift: in deviations of z.

    Returns:
        Tensors like ``leaves``.

    Cost: T N (K + N + P) + T P^2 multiply-adds and the eigenvectors of N x N and P x P matrices.
    """
    act, has_bias = ACTIVATIONS[activation], "up.bias" in leaves
    shift = shift if has_bias else 0.0
    up_PK = leaves["up.weight"].clone()
    share_T = weight_T / weight_T.sum()
    # Only with biases can an MLP add a mean that no neuron holds.
    mean_K = share_T @ x_TK if has_bias else x_TK.new_zeros(x_TK.shape[1])
    y_TN = (x_TK - mean_K) @ weight_NK.t()
    energy_N, directions_NN = torch.linalg.eigh((y_TN * share_T[:, None]).t().double() @ y_TN.double())
    kept = energy_N > _LEAST_ENERGY * energy_N[-1].clamp_min(torch.finfo(torch.float32).tiny)
    energy_R, basis_RN = energy_N[kept].float(), directions_NN[:, kept].t().float()
    if len(energy_R):
        z_TR = y_TN @ basis_RN.t() / energy_R.sqrt()
        explained_2R = torch.stack([_explained(act(sign * (z_TR + shift)), z_TR, share_T, has_bias=has_bias) for sign in (1, -1)])
        rho_R, better_R = explained_2R.max(0)
        worth_S = torch.cat([rho_R * energy_R, (1 - rho_R) * energy_R])
        signs_S = torch.cat([1 - 2 * better_R, 2 * better_R - 1])
        chosen = worth_S.topk(min(len(up_PK), len(worth_S))).indices
        of = chosen % len(energy_R)
        rows_PK = (signs_S[chosen] / energy_R[of].sqrt())[:, None] * (basis_RN[of] @ weight_NK)
        up_PK[: len(rows_PK)] = rows_PK
    found = {"up.weight": up_PK}
    if has_bias:
        found["up.bias"] = leaves["up.bias"].clone()
        if len(energy_R):
            found["up.bias"][: len(rows_PK)] = -(rows_PK @ mean_K) + signs_S[chosen] * shift
    a_TP = act(F.linear(x_TK, up_PK, found.get("up.bias")))
    return found | _least_squares(a_TP, target_TN, share_T, has_bias=has_bias)


def _explained(a_TR: Tensor, z_TR: Tensor, share_T: Tensor, *, has_bias: bool) -> Tensor:
    """Part of the energy of each z that the best multiple of its a (with a bias: and a constant) gives."""
    if has_bias:
        a_TR, z_TR = a_TR - share_T @ a_TR, z_TR - share_T @ z_TR
    tiny = torch.finfo(torch.float32).tiny
    return (share_T @ (a_TR * z_TR)).square() / ((share_T @ a_TR.square()) * (share_T @ z_TR.square())).clamp_min(tiny)


def _least_squares(a_TP: Tensor, target_TN: Tensor, share_T: Tensor, *, has_bias: bool) -> dict[str, Tensor]:
    """`down` of least weighted squared error for given activations."""
    zero_P, zero_N = a_TP.new_zeros(a_TP.shape[1]), target_TN.new_zeros(target_TN.shape[1])
    mean_P, mean_N = (share_T @ a_TP, share_T @ target_TN) if has_bias else (zero_P, zero_N)
    a_TP = a_TP - mean_P
    weighted_PT = (a_TP * share_T[:, None]).t().double()
    gram_PP, cross_PN = weighted_PT @ a_TP.double(), weighted_PT @ (target_TN - mean_N).double()
    gram_PP.diagonal().add_(_RIDGE * gram_PP.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    down_NP = torch.linalg.solve(gram_PP, cross_PN).t().float().contiguous()
    return {"down.weight": down_NP} | ({"down.bias": mean_N - down_NP @ mean_P} if has_bias else {})


@torch.no_grad()
def _outputs(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """The layer's outputs in bfloat16, a chunk of tokens at a time."""
    low = fast_dtype(x_TK.device)
    weight, bias = weight_NK.to(low), None if bias_N is None else bias_N.detach().to(low)
    return torch.cat([F.linear(x.to(low), weight, bias).bfloat16() for x in x_TK.split(CHUNK_TOKENS)])


def _equal_weights(target_TN: Tensor) -> Tensor:
    """One weight for all tokens: over the mean energy, so that the loss has the relative one's size."""
    energy_T = target_TN.float().square().sum(1)
    return torch.full_like(energy_T, 1) / energy_T.mean().clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class _Read:
    """A linear layer, as `capture_ffn_inputs` takes it."""

    name: str
    d_model: int

    @property
    def first(self) -> tuple[str, ...]:
        return (self.name,)


def capture_layers(
    model: nn.Module,
    widths: Mapping[str, int],
    batches: Sequence[Mapping[str, Tensor]],
    directory: Path,
    *,
    progress: Progress = NO_PROGRESS,
) -> tuple[FFNInputs, dict[str, str]]:
    """Store what linear layers read, once for those that read the same.

    Args:
        model: dense model.
        widths: inputs K by the layers' module paths.
        batches, directory, progress: as `capture_ffn_inputs`.

    Returns:
        The capture, and for each layer the name that its inputs are stored under.

    Raises:
        DataError: as `capture_ffn_inputs`.
    """
    if not batches:
        raise DataError("no batch to distil on: the data gave no tokens.")
    source = _first_readers(model, [*widths], short_batch(batches[0]))
    reads = [_Read(name, widths[name]) for name in dict.fromkeys(source.values())]
    compute = fast_dtype(next(model.parameters()).device)
    return capture_ffn_inputs(model, reads, batches, directory, compute=compute, progress=progress), source


@torch.no_grad()
def _first_readers(model: nn.Module, names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, str]:
    """Every layer -> the first one to read the same input, seen in one forward."""
    seen: list[tuple[str, Tensor]] = []
    source: dict[str, str] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in source:
                same = (first for first, x in seen if x.shape == args[0].shape and torch.equal(x, args[0]))
                source[name] = next(same, name)
                seen.append((name, args[0].clone()))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    was_training, device = model.training, next(model.parameters()).device
    try:
        model.eval()(**{key: value.to(device) for key, value in batch.items()})
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: source.get(name, name) for name in names}
