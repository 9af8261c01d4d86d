"""Converted SwiGLU decoders as checkpoints of Qwen2-MoE or Mixtral: fixed k, for engines that run those.

Letters: T tokens, D model width, E experts, G neurons of the largest expert, S experts that always run.

Both layouts route by a linear layer without bias, softmax and top-k, and weight each expert's output by its probability; ours are not
weighted, and a router may be anything. Therefore:

    router    W_ED that orders the experts as ours does: the ridge regression of log scores, less their mean over the token's experts, on
              the FFN's inputs. Of a linear router it is that router.
    weights   W is scaled down until the probabilities are 1 / E' up to `sharpness`, which keeps their order; what they multiply,
              1 / E' (Qwen2-MoE, not normalised) or 1 / k (Mixtral, normalised over the selected), is taken out of the down projections.
    shared    Qwen2-MoE has an expert that always runs: the S experts that hold most energy are put into it, its gate at sigmoid(0) = 1/2.
    sizes     smaller experts get neurons of zero weights.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._progress import NO_PROGRESS, Progress
from ..channels import kept, sparse_inputs
from ..errors import ConfigError, UnsupportedModelError
from ..layers import MoEFFN, moe_layers
from ..routers import LinearRouter, LinearRouterConfig, Router, expert_grams, expert_norms, pad_experts
from ..select import TopK
from ..sites import FFNWeights, replaced_projections
from ..sites.formula import ffn_hidden
from ..train.capture import capture_ffn_inputs

Layout = Literal["qwen2-moe", "mixtral"]
FAMILIES = ("llama", "mistral", "qwen2")
"""Model types whose attention, norms and head the layouts have."""
_SHARPNESS = 2.0**-10
_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class NativeMoEConfig:
    """What a fixed-k checkpoint selects."""

    layout: Layout
    """Architecture: "qwen2-moe" or "mixtral"."""
    k: int | None = None
    """Experts per token, those that always run included; none takes that of the rule topk."""
    shared: int | None = None
    """Of them those that always run, for qwen2-moe; none takes what holds the most energy of the outputs on the calibration data."""
    sharpness: float = _SHARPNESS
    """Spread of the router's logits (RMS on the calibration data). Outputs of experts are weighted by 1 up to about as much; below 1e-5
    rounding of the softmax decides which experts run."""

    def __post_init__(self) -> None:
        if self.layout not in ("qwen2-moe", "mixtral"):
            raise ConfigError(f"layout must be 'qwen2-moe' or 'mixtral', got {self.layout!r}.")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}.")
        if self.shared is not None and self.shared < 0:
            raise ConfigError(f"shared must be at least 0, got {self.shared}.")
        if not 1e-6 <= self.sharpness <= 1:
            raise ConfigError(f"sharpness must be in [1e-6, 1], got {self.sharpness}.")


@dataclass(frozen=True, kw_only=True)
class FixedRouting:
    """What one layer selects in the new layout."""

    shared: tuple[int, ...]
    """Experts that always run, ascending."""
    routed: tuple[int, ...]
    """The others, in the order of the rows of ``weight_RD``."""
    weight_RD: Tensor
    """Router, fp32; logits are x weight^T."""
    captured: float
    """Share of the experts' output energy that the selected ones hold on tokens that the router was not fitted to, in [0, 1]."""
    captured_before: float
    """The same of as many experts by our router."""


class RoutedRouter(Router):
    """Scores as a fixed-k checkpoint orders experts: exp(x W) of routed ones, 0 of those that always run."""

    config: LinearRouterConfig
    name: ClassVar[str] = "routed"

    def __init__(self, routing: FixedRouting, *, num_experts: int) -> None:
        super().__init__(LinearRouterConfig())
        self.num_experts = num_experts
        self.register_buffer("weight_RD", routing.weight_RD)
        self.register_buffer("routed", torch.tensor(routing.routed))

    def forward(self, x_TD: Tensor, weights: FFNWeights | None = None) -> Tensor:
        logits_TR = F.linear(x_TD.float(), self.get_buffer("weight_RD"))
        scores_TE = logits_TR.new_zeros(len(logits_TR), self.num_experts)
        # the softmax itself, so that its rounding is theirs
        return scores_TE.index_copy(1, self.get_buffer("routed"), logits_TR.softmax(1))


def check_exportable(model: Any, config: NativeMoEConfig) -> int:
    """Refuse what the layout cannot hold, before any work.

    Returns:
        k, experts per token, those that always run included.

    Raises:
        UnsupportedModelError: another family; an FFN that is not SwiGLU without biases, or experts that differ in number between layers;
            for mixtral also biases of attention, FFNs that stay dense, or experts that always run.
        ConfigError: no k, or one that is out of range.
    """
    layers = moe_layers(model)
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} ({family}) has no equal in {config.layout}: that takes causal language models of "
            f"{', '.join(FAMILIES)}; use --to onnx or --to dense."
        )
    if not layers:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
    if replaced_projections(model) or sparse_inputs(model):
        raise UnsupportedModelError(
            f"{config.layout} has neither replaced projections nor layers that skip channels; use --to onnx or dense."
        )
    biased = [name for name, _ in model.named_parameters() if name.endswith("proj.bias")]
    for name, moe in layers.items():
        site = moe.site
        if not site.is_gated or site.activation != "silu" or any(name_.startswith(f"{name}.") for name_ in biased):
            raise UnsupportedModelError(f"'{name}' is not a SwiGLU without biases (gated, silu), which experts of {config.layout} are.")
        if reason := moe.masked_reason():
            raise UnsupportedModelError(f"'{name}' cannot be exported: {reason}; merge adapters and remove hooks and offload first.")
    counts = {(moe.num_experts, moe.bounds[1]) for moe in layers.values()}
    if len(counts) > 1:
        raise UnsupportedModelError(f"layers differ in their experts ({sorted(counts)}), and {config.layout} has one number for all.")
    bad = [name for name in biased if config.layout == "mixtral" or name.endswith("o_proj.bias")]
    if bad:
        other = "; use --to qwen2-moe" if not any(name.endswith("o_proj.bias") for name in bad) else ""
        raise UnsupportedModelError(f"'{bad[0]}' has no place in {config.layout}{other}.")
    always = max(len(moe.always_on) for moe in layers.values())
    num_layers, num_experts = model.config.num_hidden_layers, counts.pop()[0]
    if config.layout == "mixtral":
        if len(layers) < num_layers:
            raise UnsupportedModelError(
                f"{num_layers - len(layers)} FFNs of the model stay dense, which mixtral has none of; use qwen2-moe."
            )
        if always or config.shared:
            raise UnsupportedModelError("mixtral has no expert that always runs; use --to qwen2-moe.")
    rules = {moe.rule for moe in layers.values()}
    k = config.k
    if k is None:
        rule = rules.pop()
        if rules or not isinstance(rule, TopK):
            raise ConfigError(f"the checkpoint's rule is not one topk for all layers; say how many of the {num_experts} experts run (--k).")
        k = min(rule.k + always, num_experts)
    least = max(always + 1, 2) if config.layout == "qwen2-moe" else 1
    if not least <= k <= num_experts or (config.shared is not None and not always <= config.shared < k):
        raise ConfigError(
            f"k must be in [{least}, {num_experts}] and shared in [{always}, k), got k = {k}"
            + (f", shared = {config.shared}." if config.shared else ".")
        )
    if config.layout == "qwen2-moe" and config.shared == 0:
        raise ConfigError("qwen2-moe needs an expert that always runs; give --shared 1 or more.")
    return k


@torch.no_grad()
def fit_routing(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], config: NativeMoEConfig, *, progress: Progress = NO_PROGRESS
) -> dict[str, FixedRouting]:
    """What each layer selects: which experts always run, and a linear router for the others.

    Args:
        model: as `check_exportable` takes it, in eval mode.
        batches: calibration inputs; every fifth token is held out to choose the number of experts that always run.
        config: layout and k.
        progress: told of the inputs that are read, and every layer.

    Raises:
        ConfigError, UnsupportedModelError: as `check_exportable`.

    Cost: one dense forward a batch, two bytes a token, layer and channel on disk; each layer's experts once, E numbers a token in memory.
    """
    k, layers = check_exportable(model, config), moe_layers(model)
    counts = [0] if config.layout == "mixtral" else [config.shared] if config.shared is not None else _counts(k, layers)
    found: dict[str, dict[int, FixedRouting]] = {}
    with tempfile.TemporaryDirectory(prefix="moeify-") as folder:
        sites = [moe.site for moe in layers.values()]
        with kept(list(layers.values()), "mode"):
            for moe in layers.values():
                moe.mode = "dense"
            inputs = capture_ffn_inputs(model, sites, batches, Path(folder), progress=progress)
        with progress.task("fit linear routers", total=len(layers)) as task:
            for name, moe in layers.items():
                found[name] = _fit_layer(moe, inputs.read(name).float(), k=k, counts=counts, sharpness=config.sharpness)
                task.advance(1)
    best = max(counts, key=lambda count: sum(options[count].captured for options in found.values()))
    return {name: options[best] for name, options in found.items()}


def _counts(k: int, layers: Mapping[str, MoEFFN]) -> list[int]:
    """Numbers of experts that always run, to be compared: some eight from as few as must to all but one."""
    least = max(1, *(len(moe.always_on) for moe in layers.values()))
    return sorted({least + round(i * (k - 1 - least) / 7) for i in range(8)})


def _fit_layer(moe: MoEFFN, x_TD: Tensor, *, k: int, counts: Sequence[int], sharpness: float) -> dict[int, FixedRouting]:
    weights = moe.weights().dequantized(torch.float32)
    x_TD = x_TD.to(weights.up_FD.device)
    is_fit = torch.arange(len(x_TD), device=x_TD.device) % 5 != 4
    grams = expert_grams(weights.down_FD, moe.bounds)
    energy_TE, log_TE = [], []
    for x in x_TD.split(_CHUNK):
        h_TF = ffn_hidden(x, _floats(weights), activation=moe.site.activation)
        energy_TE.append(expert_norms(h_TF, grams, moe.bounds).square())
        log_TE.append(moe.scores(x).clamp_min(1e-30).log())
    energy, log = torch.cat(energy_TE), torch.cat(log_TE)
    energy = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    log = log - log.mean(1, keepdim=True)
    held = energy[~is_fit]
    if isinstance(moe.router, LinearRouter):
        weight_ED = moe.router.out.weight.float()
    else:
        weight_ED = _regress(x_TD[is_fit], log[is_fit])
    order = energy[is_fit].mean(0).argsort(descending=True).tolist()
    first = [*moe.always_on, *(e for e in order if e not in moe.always_on)]
    before = _held(held, log[~is_fit], k - len(moe.always_on), moe.always_on)
    found = {}
    for count in counts:
        shared, routed = tuple(sorted(first[:count])), tuple(sorted(first[count:]))
        weight_RD = weight_ED[list(routed)]
        weight_RD = weight_RD - weight_RD.mean(0)  # the same softmax, and smaller logits
        logits = F.linear(x_TD[is_fit], weight_RD)
        weight_RD = weight_RD * (sharpness / logits.square().mean().sqrt().clamp_min(1e-30))
        scores = energy.new_zeros(len(held), moe.num_experts)
        scores[:, list(routed)] = F.linear(x_TD[~is_fit], weight_RD).exp()
        captured = _held(held, scores, k - count, shared)
        found[count] = FixedRouting(shared=shared, routed=routed, weight_RD=weight_RD, captured=captured, captured_before=before)
    return found


def _floats(weights: FFNWeights) -> FFNWeights:
    return FFNWeights(*(None if t is None else t.float() for t in vars(weights).values()))  # type: ignore[arg-type]


def _held(energy_TE: Tensor, scores_TE: Tensor, k: int, always: Sequence[int]) -> float:
    """Mean share of a token's energy that the always-on and the k best-scored of the other experts hold."""
    chosen = scores_TE.index_fill(1, torch.tensor(always, dtype=torch.long, device=scores_TE.device), -torch.inf).topk(k, dim=1).indices
    mask_TE = torch.zeros_like(energy_TE).scatter_(1, chosen, 1.0)
    mask_TE[:, list(always)] = 1
    return float((energy_TE * mask_TE).sum(1).mean())


def _regress(x_TD: Tensor, z_TE: Tensor) -> Tensor:
    """W_ED of the ridge regression z = x W^T; fp64, for energies of channels differ by 1e6."""
    x, z = x_TD.double(), z_TE.double()
    gram_DD = x.t() @ x
    gram_DD.diagonal().add_(1e-4 * gram_DD.diagonal().mean())
    weight_DE: Tensor = torch.linalg.solve(gram_DD, x.t() @ z)
    return weight_DE.t().float()


@contextmanager
def routed_as(model: nn.Module, routings: Mapping[str, FixedRouting], k: int) -> Iterator[None]:
    """Our own model selecting as the exported one does inside the ``with``."""
    layers = moe_layers(model)
    with kept(list(layers.values()), "router"), kept(list(layers.values()), "rule"), kept(list(layers.values()), "always_on"):
        for name, moe in layers.items():
            routing = routings[name]
            moe.router = RoutedRouter(routing, num_experts=moe.num_experts).to(moe.weights().up_FD.device)
            moe.rule, moe.always_on = TopK(k=k - len(routing.shared)), routing.shared
        yield


@torch.no_grad()
def to_native_moe(model: Any, routings: Mapping[str, FixedRouting], config: NativeMoEConfig) -> Any:
    """A `Qwen2MoeForCausalLM` or `MixtralForCausalLM` that computes what the converted model computes with these routings.

    Its outputs differ from ours (`routed_as`) by the weights of experts, 1 up to about ``config.sharpness``, and by rounding.

    Args:
        model: as `check_exportable` takes it; not changed.
        routings: from `fit_routing`.
        config: layout and k.

    Returns:
        The model, of the dtype of ``model``, in eval mode; ``save_pretrained`` writes names that other engines read.

    Raises:
        ConfigError, UnsupportedModelError: as `check_exportable`.

    Cost: one copy of the weights.
    """
    k, layers = check_exportable(model, config), moe_layers(model)
    shared = len(next(iter(routings.values())).shared)
    new_config = _config_of(model, config, k=k, shared=shared)
    state = {name: tensor for name, tensor in model.state_dict().items() if not any(name.startswith(f"{site}.") for site in layers)}
    for name, moe in layers.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _layer_state(moe, routings[name], config, k=k).items()}
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        new = _class_of(config.layout)(new_config)
    new.to_empty(device=next(model.parameters()).device).to(dtype)
    # to_empty leaves what is computed and not saved, the rotary frequencies, as it found it
    for mine, theirs in zip(_rotary(model), _rotary(new), strict=True):
        theirs.load_state_dict({})
        for key, buffer in mine.named_buffers():
            theirs.register_buffer(key, buffer.clone(), persistent=False)
    if new_config.tie_word_embeddings:
        new.tie_weights()
    new.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, strict=True)
    new.generation_config = model.generation_config
    return new.eval()


def _rotary(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("rotary_emb")]


def _class_of(layout: Layout) -> Any:
    import transformers

    return transformers.Qwen2MoeForCausalLM if layout == "qwen2-moe" else transformers.MixtralForCausalLM


def _config_of(model: Any, config: NativeMoEConfig, *, k: int, shared: int) -> Any:
    import transformers

    moe = next(iter(moe_layers(model).values()))
    old = model.config
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_parameters", "attention_dropout", "hidden_act"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    )
    same = {name: getattr(old, name) for name in names if hasattr(old, name)}
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    window = getattr(old, "sliding_window", None)
    size = moe.bounds[1]
    if config.layout == "mixtral":
        return transformers.MixtralConfig(
            **same,
            intermediate_size=size,
            num_local_experts=moe.num_experts,
            num_experts_per_tok=k,
            head_dim=head_dim,
            sliding_window=window,
        )
    dense = [i for i in range(old.num_hidden_layers) if not any(f".{i}." in f".{name}." for name in moe_layers(model))]
    kinds = getattr(old, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * old.num_hidden_layers
    is_windowed = "sliding_attention" in kinds
    more = {"head_dim": head_dim} if head_dim * old.num_attention_heads != old.hidden_size else {}
    return transformers.Qwen2MoeConfig(
        **same,
        **more,
        intermediate_size=moe.site.d_ff,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=shared * size,
        num_experts=moe.num_experts - shared,
        num_experts_per_tok=k - shared,
        norm_topk_prob=False,
        mlp_only_layers=dense,
        qkv_bias=any(name.endswith("q_proj.bias") for name, _ in model.named_parameters()),
        use_sliding_window=is_windowed,
        sliding_window=window,
        layer_types=list(kinds),
    )


def _layer_state(moe: MoEFFN, routing: FixedRouting, config: NativeMoEConfig, *, k: int) -> dict[str, Tensor]:
    weights = moe.weights().dequantized(torch.float32)
    assert weights.gate_FD is not None
    gate_EGD, up_EGD, down_EGD = (pad_experts(w.float(), moe.bounds) for w in (weights.gate_FD, weights.up_FD, weights.down_FD))
    routed, shared = list(routing.routed), list(routing.shared)
    weight_of_each = k if config.layout == "mixtral" else len(routed)
    state = {
        "experts.gate_up_proj": torch.cat([gate_EGD[routed], up_EGD[routed]], 1),
        "experts.down_proj": down_EGD[routed].transpose(1, 2) * weight_of_each,
        "gate.weight": routing.weight_RD,
    }
    if config.layout == "qwen2-moe":
        state |= {
            "shared_expert.gate_proj.weight": gate_EGD[shared].flatten(0, 1),
            "shared_expert.up_proj.weight": up_EGD[shared].flatten(0, 1),
            "shared_expert.down_proj.weight": 2 * down_EGD[shared].flatten(0, 1).t(),
            "shared_expert_gate.weight": torch.zeros(1, gate_EGD.shape[2]),
        }
    return {key: tensor.contiguous() for key, tensor in state.items()}
