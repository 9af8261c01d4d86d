"""A converted model trained further: as it runs, with hard selection; or its routers alone, from the experts as they are now.

Letters: T tokens, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _config
from .._progress import NO_PROGRESS, Progress
from ..errors import ConfigError, UnsupportedModelError
from ..layers import MoEFFN, moe_layers
from ..routers import NormRouter, expert_grams, expert_norms
from ..select.calibrate import Scope
from ..sites import mask_name, token_mask_of
from ..sparsity.inflight import InFlight, Removable
from .calibration import recalibrate, set_calibrated_rules, spread
from .capture import capture_ffn_inputs, fast_dtype
from .distill import Distillation, DistillConfig, check_teacher
from .fit import RouterTrainConfig, cast_weights, fit_new_router, router_loss, router_targets, split_tokens
from .loop import TrainConfig, TrainingData, TrainRecord, train
from .selection import SelectionConfig, SelectionTraining
from .work import fingerprint, open_work, read_tensors, weights_checksum, write_tensors

_CALIBRATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SelectionConfig):
    """How a converted model is trained further, with hard selection."""

    parameters: Literal["all", "ffn", "routers"] = "all"
    """What is trained of the parameters that require gradients: all but the gains and biases of norms (routers, which read what they
    give, do not survive a change of the smallest), those of converted FFNs, or nothing but routers. Routers only if ``routers`` is not
    'frozen'."""
    router_lr_factor: float = 10.0
    """Learning rate of routers over that of everything else, greater than 0."""
    distill: DistillConfig | None = None
    """Loss from a frozen teacher, usually the model before its conversion; none without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.router_lr_factor < float("inf"):
            raise ConfigError(f"router_lr_factor must be finite and greater than 0, got {self.router_lr_factor}.")
        if self.parameters == "routers" and self.routers == "frozen":
            raise ConfigError("parameters='routers' with routers='frozen' leaves nothing to train.")


class Finetuning(Removable):
    """What `finetune_converted` attaches to a model: a `moeify.train.Part` for any loop, and a context manager that removes it.

    Selection and distillation. Parameters that are not trained lose ``requires_grad`` until it is removed: make the optimizer afterwards.

    Args:
        model: converted model.
        config: what to do. ``router_lr_factor`` is the loop's business.
        seed: of the budgets; a step's is a function of (seed, step) alone.
        teacher: for ``config.distill``.
        compute: see `Distillation`.

    Raises:
        ConfigError: distillation without a teacher, a teacher without it, int8 experts, or what `SelectionTraining` refuses.
        UnsupportedModelError: as `SelectionTraining` and `Distillation`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FinetuneConfig | None = None,
        *,
        seed: int = 0,
        teacher: nn.Module | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        config = config or FinetuneConfig()
        layers = list(moe_layers(model).values())
        check_teacher(config.distill, teacher)
        if config.parameters != "routers" and any(layer.is_int8 for layer in layers):
            raise ConfigError("int8 experts cannot be trained; call dequantize(model) first, or train parameters='routers'.")
        with ExitStack() as stack:
            self._parts: list[SelectionTraining | Distillation] = [stack.enter_context(SelectionTraining(model, config, seed=seed))]
            if config.distill is not None and teacher is not None:
                sites = [layer.site for layer in layers]
                self._parts.append(stack.enter_context(Distillation(model, teacher, config.distill, sites, compute=compute)))
            stack.enter_context(_trainable(model, config))
            self._attached = stack.pop_all()

    def set_step(self, step: int) -> None:
        """Draw the active fraction of an optimizer step."""
        for part in self._parts:
            part.set_step(step)

    def values(self) -> Mapping[str, Tensor]:
        """Of `SelectionTraining` and `Distillation`."""
        return {name: value for part in self._parts for name, value in part.values().items()}

    def remove(self) -> None:
        """Give the layers their rules, and the parameters their gradients back."""
        self._attached.close()


def finetune_converted(
    model: nn.Module,
    data: TrainingData,
    config: FinetuneConfig,
    train_config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    state: Path | None = None,
    run: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress = NO_PROGRESS,
) -> TrainRecord:
    """Train a converted model as it runs: hard selection at a budget in every layer, gradients to experts and, if wanted, routers.

    Args:
        model: converted model, floating weights; changed in place.
        data: sequences to train on.
        config: budgets, what is trained, how routers learn, distillation.
        train_config: optimizer and schedule; its seed also draws the budgets.
        teacher: dense model that distillation learns from; needed with ``config.distill``.
        state, run, evaluate: see `train`. ``evaluate`` sees the model at the middle of ``config.target_active``, set batch by batch.
        progress: told every step.

    Returns:
        The record of training. The rules are set to the middle budget on some of ``data`` (`recalibrate`, which also gives the record for a
        checkpoint).

    Raises:
        ConfigError, UnsupportedModelError: see `Finetuning`.
        TrainingError, CheckpointError: see `train`.
    """
    with Finetuning(model, config, seed=train_config.seed, teacher=teacher) as part:
        record = train(
            model,
            data,
            train_config,
            parts=[part],
            lr_factors={r"re:(.*\.)?moe\.router\..*": config.router_lr_factor},
            state=state,
            run={**(run or {}), "finetune": _config.to_dict(config)},
            evaluate=evaluate,
            progress=progress,
        )
    recalibrate(model, _some(data, seed=train_config.seed), target_active=sum(config.target_active) / 2, progress=progress)
    return record


@contextmanager
def _trainable(model: nn.Module, config: FinetuneConfig) -> Iterator[None]:
    """Let only what is trained require gradients, for a while."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    routers = {p for layer in moe_layers(model).values() for p in layer.router.parameters()}
    ffns = {p for layer in moe_layers(model).values() for p in layer.projection_parameters()}
    # One step of Adam is as long for a gain of 4e-5 as for one of 0.3, and a router divides by each channel's spread: see docs/log.
    norms = {p for module in model.modules() if "norm" in type(module).__name__.lower() for p in module._parameters.values()}
    chosen = {"all": set(before) - norms, "ffn": ffns | routers, "routers": routers}[config.parameters]
    if config.routers == "frozen":
        chosen -= routers
    try:
        for parameter, was in before.items():
            parameter.requires_grad_(was and parameter in chosen)
        yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)
            parameter.grad = None


def _some(data: TrainingData, *, seed: int, most: int = _CALIBRATION_TOKENS) -> list[dict[str, Tensor]]:
    """A few thousand tokens of evenly spaced sequences, without labels."""
    generator = torch.Generator().manual_seed(seed)

    def batch(rows: list[int]) -> dict[str, Tensor]:
        return {key: value for key, value in data.batch(rows, generator=generator).items() if key != "labels"}

    ids = batch([0]).get("input_ids")
    tokens = 64 if ids is None else ids.shape[1]
    count = min(len(data), -(-most // max(1, tokens)))
    rows = [i * len(data) // count for i in range(count)]
    return [batch(rows[i : i + 8]) for i in range(0, count, 8)]


def train_routers(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: RouterTrainConfig | None = None,
    *,
    work: Path,
    target_active: float = 0.5,
    scope: Scope = "layer",
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Fit the routers of a converted model anew to its experts as they are now, layer by layer, and set its rules; in place.

    What conversion does after the split: neurons stay where they are. Inputs are those of the dense mode. To teach routers by the model's
    own loss, or a teacher, call `finetune_converted` with ``parameters="routers"`` and ``routers="straight_through"`` or "both".

    Args:
        model: converted model; its experts were trained, or its routers never were.
        batches: calibration inputs; ``config.holdout_frac`` of their tokens, in blocks, score the routers and set the rules.
        config: None: the defaults.
        work: folder for inputs and finished routers; a call with the same arguments continues what it holds. The caller deletes it.
        target_active: active fraction that the rules are set to, in (0, 1]; the rules keep their kind.
        scope: see `moeify.select.calibrate.calibrate`.
        run: what else tells this run from another.
        progress: told every batch and layer.

    Returns:
        What ``moeify.json`` holds of rules and routers: see `calibrate_rules`.

    Raises:
        UnsupportedModelError: the model is dense.
        DataError: too few tokens.
    """
    layers, config = moe_layers(model), config or RouterTrainConfig()
    if not layers:
        raise UnsupportedModelError(f"this {type(model).__name__} is dense; convert it first.")
    identity = {
        **(run or {}),
        "routers": _config.to_dict(config),
        "batches": fingerprint(batches),
        "weights": weights_checksum(model),
    }
    open_work(work, identity)
    device = next(model.parameters()).device
    modes = {name: layer.mode for name, layer in layers.items()}
    for layer in layers.values():
        layer.mode = "dense"
    try:
        sites = [layer.site for layer in layers.values()]
        inputs = capture_ffn_inputs(model, sites, batches, work / "inputs", compute=fast_dtype(device), progress=progress)
    finally:
        for name, layer in layers.items():
            layer.mode = modes[name]
    scores: dict[str, Tensor] = {}
    captured: dict[str, dict[str, float]] = {}
    states: dict[str, dict[str, Tensor]] = {}
    with progress.task("fit routers", total=len(layers)) as task:
        for i, (name, layer) in enumerate(layers.items()):
            path = work / f"router{i:04d}.safetensors"
            found = read_tensors(path)
            if found is None:
                train_TD, held_out_TD = split_tokens(inputs.read(name), config.holdout_frac, name=name)
                weights = cast_weights(layer.weights().dequantized(torch.float32), torch.float32, device=torch.device("cpu"))
                states[name], scores_TE, captured[name] = fit_new_router(
                    layer.router.config, train_TD, held_out_TD, weights, layer.site, layer.num_experts, config
                )
                scores[name] = spread(scores_TE)
                tensors = {f"router.{key}": tensor for key, tensor in states[name].items()}
                write_tensors(path, {**tensors, "scores_TE": scores[name]}, {"captured": captured[name]})
            else:
                tensors, metadata = found
                scores[name], captured[name] = tensors.pop("scores_TE"), metadata["captured"]
                states[name] = {key.removeprefix("router."): tensor for key, tensor in tensors.items()}
            task.advance(1)
    for name, layer in layers.items():
        layer.router.load_state_dict(states[name])
    kind = type(next(iter(layers.values())).rule)
    return set_calibrated_rules(model, kind, scores, router_scores=captured, target_active=target_active, scope=scope)


class RouterTraining(Removable):
    """The regression of all routers as the model's loss, for trainers of others; a `Part` of training.

    ``outputs.loss`` becomes the sum over layers of the loss that `train_routers` fits with, on every real token of the batch, in dense
    mode, so that each router sees what the dense model's FFN sees. Everything but the routers is frozen until the part is removed. No
    gradient leaves a layer, so a backward pass costs next to nothing.

    Args:
        model: converted model with norm routers.

    Raises:
        ConfigError: the model is dense, or has another kind of router.
        UnsupportedModelError: (in forward) reentrant gradient checkpointing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(moe_layers(model).values())
        if not self._layers:
            raise ConfigError(f"this {type(model).__name__} has no routers; convert it first.")
        for layer in self._layers:
            if not isinstance(layer.router, NormRouter):
                raise ConfigError(f"'{layer.site.name}' has a {layer.router.config.name} router, which predicts no norms.")
        self._losses: list[Tensor] = []
        self._state = InFlight(model)
        self._modes = [layer.mode for layer in self._layers]
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        routers = {p for layer in self._layers for p in layer.router.parameters()}
        for parameter, was in self._required.items():
            parameter.requires_grad_(was and parameter in routers)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, prepend=True),
        ]
        for layer in self._layers:
            layer.mode = "dense"
            self._handles += self._watch(layer, mask_name=mask_name(model, layer.site))

    def _watch(self, layer: MoEFFN, *, mask_name: str) -> list[RemovableHandle]:
        inputs: list[Tensor] = []

        def remember(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():  # else nobody takes it out again
                inputs[:] = [args[0]]

        def regress(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self._losses.append(self._loss(layer, inputs.pop(), args[0], self._state.masks[mask_name]))

        first, down = layer.projections()
        return [first.register_forward_pre_hook(remember), down.register_forward_pre_hook(regress)]

    def _loss(self, layer: MoEFFN, x: Tensor, h: Tensor, mask_BS: Tensor | None) -> Tensor:
        router = cast(NormRouter, layer.router)
        x_TD, h_TF = x.detach().flatten(0, -2), h.detach().flatten(0, -2)
        if (keep_T := token_mask_of(mask_BS, x.shape[:-1])) is not None:
            x_TD, h_TF = x_TD[keep_T], h_TF[keep_T]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            grams_EGG = expert_grams(layer.weights().dequantized(torch.float32).down_FD, layer.bounds)
            targets_TE, scale = router_targets(expert_norms(h_TF, grams_EGG, layer.bounds), output=router.config.output)
        z_TE, output = router.raw_scores(x_TD), router.config.output
        return router_loss(z_TE - 2 * scale.log() if output == "exp" else z_TE / scale, targets_TE, output=output)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._losses.clear()  # of a forward that failed, or of checkpointed layers that ran again
        self._state.begin(model, args, kwargs)

    def _end(self, _model: nn.Module, _args: tuple[Any, ...], outputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return outputs
        if not self._losses:
            raise UnsupportedModelError(
                "reentrant gradient checkpointing hides the routers' inputs; leave it out, nothing here needs its memory."
            )
        share = self._state.share
        outputs["loss"] = torch.stack(self._losses).sum() * (1.0 if share is None else share)
        self._losses.clear()
        return outputs

    def set_step(self, step: int) -> None:
        """Nothing depends on it."""

    def values(self) -> Mapping[str, Tensor]:
        """Nothing beside the loss."""
        return {}

    def remove(self) -> None:
        """Give the model its mode and its gradients back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer, mode in zip(self._layers, self._modes, strict=True):
            layer.mode = mode
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
