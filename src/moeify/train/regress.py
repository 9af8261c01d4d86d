"""Each FFN onto its own former outputs, one layer at a time: the cheap repair after an activation function has changed.

Letters: T tokens, D model width, F FFN width.

Trained end to end, a model whose activations were swapped first has to find its way back through all layers at once. Alone, every layer has
a regression with known inputs and outputs, those of the model as it was: no attention, no head, and no other layer in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, DataError
from ..sites import FFNSite, FFNWeights, ffn_hidden, find_ffn_sites, site_weights
from ..sites.formula import ACTIVATIONS
from .capture import capture_ffn_inputs, fast_dtype, short_batch
from .distill import token_weights
from .fit import cast_weights
from .layerwise import CHUNK_TOKENS, LayerwiseConfig, fit_outputs, fitting_rows, in_parallel, measured_error
from .work import fingerprint, open_work, read_tensors, weights_checksum, write_tensors


@dataclass(frozen=True, kw_only=True)
class RegressConfig(LayerwiseConfig):
    """How each FFN is fitted to its former outputs."""


def regress_layers(
    model: nn.Module,
    teacher: nn.Module,
    sites: Sequence[FFNSite],
    batches: Sequence[Mapping[str, Tensor]],
    config: RegressConfig | None = None,
    *,
    work: Path,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, dict[str, float]]:
    """Fit each FFN of ``model`` to what the same FFN of ``teacher`` gives for the teacher's inputs, by gradient descent, in place.

    loss = mean over tokens of |y - y'|^2 / (|y'|^2 + mean |y'|^2 / 100)   [+ sparsity_weight * penalty]

    Args:
        model: the changed model; everything but the weights of ``sites`` stays.
        teacher: the model as it was, another object, dense.
        sites: FFNs of ``model`` with the functions that they now have, as `set_activation` returned them.
        batches: inputs of one forward each; the teacher runs once over them, its FFN inputs go to disk (2 D bytes a token and layer).
        config: None: the defaults.
        work: folder for inputs and finished layers; a call with the same arguments continues what it holds, to equal weights. The caller
            deletes it (`moeify.train.work.remove_work`).
        run: what else tells this run from another.
        progress: told every batch and layer.

    Returns:
        For each site its ``before`` and ``after``: the mean relative squared error (the loss without the penalty) on held-out tokens.

    Raises:
        ConfigError: ``teacher`` is ``model``; a site that the teacher has not, or of another shape; a penalty on a function without zeros.
        DataError: too few tokens.

    Cost: 16 T F D multiply-adds of a gated FFN for each epoch (11 of a plain one), in bfloat16 where that is native, and memory for one
        layer's inputs and outputs in bfloat16, its weights and their AdamW state, times ``workers``.
    """
    config = config or RegressConfig()
    if teacher is model:
        raise ConfigError("teacher and model are the same object; copy the model before its activations are changed.")
    teachers = _teachers(teacher, sites, batches)
    if config.sparsity_weight:
        for site in sites:
            if ACTIVATIONS[site.activation](torch.full((), -1.0)) != 0:
                raise ConfigError(f"'{site.name}' has the activation {site.activation}, without exact zeros; leave sparsity_weight at 0.")
    identity = {
        **(run or {}),
        "regress": _config.to_dict(replace(config, workers=1)),
        "sites": [_config.to_dict(site) for site in sites],
        "batches": fingerprint(batches),
        "weights": [weights_checksum(model), weights_checksum(teacher)],
    }
    open_work(work, identity)
    device = next(model.parameters()).device
    inputs = capture_ffn_inputs(teacher, teachers, batches, work / "inputs", compute=fast_dtype(device), progress=progress)

    def fit(i: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        path = work / f"regressed{i:04d}.safetensors"
        found = read_tensors(path)
        if found is None:
            site, before = sites[i], teachers[i]
            x_TD = inputs.read(before.name).to(device)
            found = _regress(x_TD, site_weights(teacher, before), before, site_weights(model, sites[i]), site, config)
            write_tensors(path, *found)
        return found

    errors = {}
    with progress.task("regress FFNs", total=len(sites)) as task:
        for site, (tensors, error) in zip(sites, in_parallel(fit, range(len(sites)), workers=config.workers), strict=True):
            weights = site_weights(model, site)
            with torch.no_grad():
                for name, tensor in tensors.items():
                    getattr(weights, name).copy_(tensor)
            errors[site.name] = error
            task.advance(1)
    return errors


def _teachers(teacher: nn.Module, sites: Sequence[FFNSite], batches: Sequence[Mapping[str, Tensor]]) -> list[FFNSite]:
    """The teacher's sites, in the order of ``sites``."""
    if not batches:
        raise DataError("no batch to regress on: the data gave no tokens.")
    short = short_batch(batches[0])
    device = next(teacher.parameters()).device
    found = {site.name: site for site in find_ffn_sites(teacher, {k: v.to(device) for k, v in short.items()})}
    for site in sites:
        old = found.get(site.name)
        if old is None or (old.d_model, old.d_ff, old.d_out, old.is_gated) != (site.d_model, site.d_ff, site.d_out, site.is_gated):
            raise ConfigError(f"the teacher has no FFN like '{site.name}'; is it the model from before the change?")
    return [found[site.name] for site in sites]


def _regress(
    x_TD: Tensor, old: FFNWeights, old_site: FFNSite, new: FFNWeights, site: FFNSite, config: RegressConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The fitted tensors of one site by field name of `FFNWeights`, and its errors."""
    rows, held_out = fitting_rows(len(x_TD), config, name=site.name)
    target_TD = _outputs(x_TD, old, old_site.activation)
    weight_T = token_weights(target_TD)
    # Down in the order of its Linear, for which its products are fastest.
    leaves = {
        f.name: (t.t().float().clone(memory_format=torch.contiguous_format) if f.name == "down_FD" else t.float().clone())
        .detach()
        .requires_grad_()
        for f in fields(new)
        if (t := getattr(new, f.name)) is not None
    }

    def weights() -> FFNWeights:
        return replace(new, **{name: leaf.t() if name == "down_FD" else leaf for name, leaf in leaves.items()})

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(x, weights(), site.activation)

    before, _ = measured_error(forward, x_TD, target_TD, weight_T, held_out)
    fit_outputs(leaves, forward, x_TD, target_TD, weight_T, rows, config)
    after, _ = measured_error(forward, x_TD, target_TD, weight_T, held_out)
    fitted = {name: (leaf.t() if name == "down_FD" else leaf).detach().cpu().contiguous() for name, leaf in leaves.items()}
    return fitted, {"before": before, "after": after}


def _forward(x_TD: Tensor, weights: FFNWeights, activation: str) -> tuple[Tensor, Tensor]:
    """act(z), of a gated FFN act(gate), and the output."""
    act = ACTIVATIONS[activation]
    up_TF = F.linear(x_TD, weights.up_FD, weights.up_bias_F)
    a_TF = act(up_TF if weights.gate_FD is None else F.linear(x_TD, weights.gate_FD, weights.gate_bias_F))
    h_TF = a_TF if weights.gate_FD is None else a_TF * up_TF
    return a_TF, F.linear(h_TF, weights.down_FD.t(), weights.down_bias_D)


@torch.no_grad()
def _outputs(x_TD: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """The FFN's outputs in bfloat16, a chunk of tokens at a time."""
    low = fast_dtype(x_TD.device)
    weights = cast_weights(weights, low)
    y_TD = torch.empty(len(x_TD), weights.down_FD.shape[1], dtype=torch.bfloat16, device=x_TD.device)
    for y, x in zip(y_TD.split(CHUNK_TOKENS), x_TD.split(CHUNK_TOKENS), strict=True):
        y.copy_(F.linear(ffn_hidden(x.to(low), weights, activation=activation), weights.down_FD.t(), weights.down_bias_D))
    return y_TD
