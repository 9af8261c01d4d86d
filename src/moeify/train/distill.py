"""A frozen teacher's opinion beside the labels: its logits, and what each of its FFNs gives.

Letters: N rows of logits, V classes or vocabulary, T tokens, D model width, L FFNs, R rows of a chunk.

    loss = task_weight * own loss + logits_weight * T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))
         + ffn_weight / L * sum_l mean over a forward's tokens of |y_l - y*_l|^2 / (|y*_l|^2 + mean |y*_l|^2 / 100)

Hooks do it, so any loop trains with it. The first two terms are in ``outputs.loss``; the third is injected as a gradient where the FFNs'
outputs are, as `moeify.sparsity.enforce` does it, which is exact whatever is checkpointed.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, UnsupportedModelError
from ..sites.site import FFNSite, mask_name, token_mask_of
from ..sparsity.inflight import InFlight, Removable, read_scale
from .labels import IGNORED, shifts_labels

_CHUNK_LOGITS = 2**22  # numbers of a chunk of rows; their fp32 copies are what the KL needs beside the logits
_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "use_cache")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Weights of what is learnt from the teacher, beside the model's own loss."""

    logits_weight: float = 1.0
    """Weight of the KL divergence from the teacher's distribution to the student's, at least 0."""
    temperature: float = 1.0
    """T that both logits are divided by; the term is multiplied by T^2, which keeps its gradient's size. Greater than 0."""
    task_weight: float = 1.0
    """Weight of the model's own loss, at least 0."""
    ffn_weight: float = 0.0
    """Weight of the squared error of each FFN's output, relative token by token, mean over tokens and FFNs; at least 0."""

    def __post_init__(self) -> None:
        for name in ("logits_weight", "task_weight", "ffn_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be finite and greater than 0, got {self.temperature}.")
        if self.logits_weight == self.ffn_weight == 0:
            raise ConfigError("logits_weight and ffn_weight are both 0: nothing is learnt from the teacher.")


def check_teacher(config: DistillConfig | None, teacher: nn.Module | None) -> None:
    """A `ConfigError` where one of the two is given without the other."""
    if (teacher is None) != (config is None):
        given, missing = ("distill", "a teacher") if teacher is None else ("a teacher", "distill")
        raise ConfigError(f"{given} is given without {missing}; distillation needs both.")


def token_weights(target_TD: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """What makes the squared error of each token relative to what it should be: their product's mean is a relative error.

    weight_T = 1 / (|y*|^2 + mean |y*|^2 / 100)

    Relative token by token: the largest few have ten thousand times the energy of the others, and would be all that is fitted.

    Args:
        target_TD: y*, of any leading shape.
        mask_T: bool, of that leading shape: False at tokens that do not count, which may hold anything; their weights are finite.

    Returns:
        weight_T: positive, at least fp32.
    """
    dtype = torch.promote_types(target_TD.dtype, torch.float32)
    energy_T = target_TD.to(dtype).square().sum(-1)
    if mask_T is None:
        mean = energy_T.mean()
    else:
        energy_T = torch.where(mask_T, energy_T, 0)
        mean = energy_T.sum() / mask_T.sum().clamp_min(1)
    return 1 / (energy_T + 0.01 * mean + torch.finfo(dtype).tiny)


class Distillation(Removable):
    """What is attached to a model that learns from a teacher; a context manager that removes it, and a `moeify.train.Part`.

        with Distillation(model, teacher, DistillConfig(temperature=2.0)):
            train(model, data, config)

    Rows that count are those that the loss counts: labels that are not -100, shifted where the model shifts them; without labels, tokens
    that are not padding. They are averaged as the loss is, with ``num_items_in_batch`` too. Forwards without gradients are untouched.

    Args:
        model: the student; `torch.compile` its layers, not the whole.
        teacher: usually the dense model as it was, on the same device; it is put into eval mode and runs without gradients, in the autocast
            that the student is called in.
        config: weights.
        sites: FFNs of both for ``ffn_weight``; without it none are needed.
        compute: dtype of the teacher's matrix products (autocast), where that of the student's call cannot be seen from outside (accelerate
            switches it on inside of ``forward``).

    Raises:
        ConfigError: ``teacher`` is the model itself, no sites for ``ffn_weight``, or classes of which no distribution can be made.
        UnsupportedModelError: the teacher lacks a site, or (in forward) its logits have another shape, or an FFN runs several times.

    Cost: the teacher's forward, its logits, and with ``ffn_weight`` 2 T * D numbers a site until backward; a synchronisation a forward.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        config: DistillConfig | None = None,
        sites: Sequence[FFNSite] = (),
        *,
        compute: torch.dtype | None = None,
    ) -> None:
        self.config = config = config or DistillConfig()
        if teacher is model:
            raise ConfigError("the teacher is the model itself, which would teach it what it does; load it a second time.")
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        if config.logits_weight and problem in ("regression", "multi_label_classification"):
            raise ConfigError(f"a head for {problem} has no distribution over classes; set logits_weight to 0.")
        if config.ffn_weight and not sites:
            raise ConfigError("ffn_weight compares the outputs of FFNs, and there are no sites; find_ffn_sites lists them.")
        sites = sites if config.ffn_weight else ()
        paths = {name for name, _ in teacher.named_modules(remove_duplicate=False)}
        if missing := [site.down for site in sites if site.down not in paths]:
            raise UnsupportedModelError(
                f"the teacher ({type(teacher).__name__}) has no '{missing[0]}': it must be of the model's structure."
            )
        self._teacher = teacher.eval()
        self._compute = compute
        self._takes_cache = "use_cache" in inspect.signature(teacher.forward).parameters
        self._shifts: bool | None = None
        self._logits: Tensor | None = None
        self._values: dict[str, Tensor] = {}
        self._state = InFlight(model)
        self._ffns = {
            site.name: _FFN(self._state, config.ffn_weight / len(sites), site.name, mask_name=mask_name(model, site)) for site in sites
        }
        # Before all others: who follows outputs.loss (sparsity enforcement) is to see the final one.
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._ask_teacher, with_kwargs=True),
            model.register_forward_hook(self._add_to_loss, prepend=True),
        ]
        for site in sites:
            ffn = self._ffns[site.name]
            self._handles.append(teacher.get_submodule(site.down).register_forward_hook(ffn.remember))
            self._handles.append(model.get_submodule(site.down).register_forward_hook(ffn.inject))

    def set_step(self, step: int) -> None:
        """Nothing changes over a run."""

    def values(self) -> dict[str, Tensor]:
        """The latest forward's terms, unweighted and detached: 'task_loss', 'distill_kl' (with T^2), 'distill_ffn'."""
        errors = [ffn.value for ffn in self._ffns.values() if ffn.value is not None]
        return self._values | ({"distill_ffn": torch.stack([e.to(errors[0].device) for e in errors]).mean()} if errors else {})

    def remove(self) -> None:
        """Take all hooks off both models."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ask_teacher(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the student."""
        if not torch.is_grad_enabled():
            return
        self._state.begin(model, args, kwargs)
        inputs = self._state.inputs
        arguments = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_TEACHER}
        arguments |= {"use_cache": False} if self._takes_cache else {}
        device = self._state.scale.device.type
        enabled = torch.is_autocast_enabled(device)
        compute = self._compute or (torch.get_autocast_dtype(device) if enabled else torch.float32)
        with torch.no_grad(), torch.autocast(device, dtype=compute, enabled=compute is not torch.float32):
            if self._shifts is None and inputs.get("labels") is not None:
                tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "num_items_in_batch"}
                self._shifts = shifts_labels(self._teacher, tensors)
            with self._remembering():
                self._logits = getattr(self._teacher(**arguments), "logits", None)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """The teacher's forwards that others call in between are none of ours."""
        for ffn in self._ffns.values():
            ffn.target, ffn.is_listening = None, True
        try:
            yield
        finally:
            for ffn in self._ffns.values():
                ffn.is_listening = False

    def _add_to_loss(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Hook of the student."""
        if not torch.is_grad_enabled():
            return
        config, teacher_logits, inputs = self.config, self._logits, self._state.inputs
        self._logits = None
        own = outputs.loss
        terms = [] if own is None else [own] if config.task_weight == 1 else [config.task_weight * own]
        # Trainer's loss of a micro-batch is its labels' share of a mean; what is shown is the mean.
        share = 1 if self._state.share is None else self._state.share
        self._values = {} if own is None else {"task_loss": own.detach() / share}
        if config.logits_weight:
            if teacher_logits is None:
                raise UnsupportedModelError(f"the teacher ({type(self._teacher).__name__}) gives no logits; load it with its head.")
            kl = self._kl(outputs.logits, teacher_logits, inputs)
            self._values["distill_kl"] = kl.detach() / share
            terms.append(config.logits_weight * kl)
        if terms:
            outputs.loss = sum(terms[1:], terms[0])
        self._state.end(model, args, outputs)

    def _kl(self, logits: Tensor, teacher_logits: Tensor, inputs: dict[str, Any]) -> Tensor:
        if logits.shape != teacher_logits.shape:
            shapes = f"{tuple(teacher_logits.shape)}, the model's {tuple(logits.shape)}"
            raise UnsupportedModelError(f"the teacher's logits are {shapes}: both need the same classes or vocabulary.")
        if logits.shape[-1] == 1:
            raise ConfigError("one logit has no distribution over classes; set logits_weight to 0.")
        counts_N = _rows_that_count(inputs, logits.shape[:-1], shifted=bool(self._shifts))
        total = inputs.get("num_items_in_batch")
        if total is None:
            total = logits[..., 0].numel() if counts_N is None else counts_N.sum().clamp_min(1)
        elif isinstance(total, Tensor):
            total = total.to(logits.device)
        kl = _KLSum.apply(logits, teacher_logits, counts_N, self.config.temperature)
        return cast(Tensor, kl) * self.config.temperature**2 / total


def _rows_that_count(inputs: dict[str, Any], shape: Sequence[int], *, shifted: bool) -> Tensor | None:
    """True at rows of logits of this leading shape whose loss counts, flattened; None: all."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or tuple(labels.shape) != tuple(shape) or labels.dim() < 2:
            return None  # a class, or numbers, for the whole of a sequence
        counts = labels != IGNORED
        return (F.pad(counts[:, 1:], (0, 1), value=False) if shifted else counts).reshape(-1)
    return token_mask_of(mask if isinstance(mask, Tensor) else None, shape)


class _KLSum(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher / T) || softmax(student / T)).

    The gradient is made on the way and put where the teacher's logits are, so that no other (N, V) numbers are kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, counts_N: Tensor | None, temperature: float) -> Tensor:
        width = logits.shape[-1]
        student_NV, teacher_NV = logits.reshape(-1, width), teacher_logits.reshape(-1, width)
        grad_NV = teacher_NV if teacher_NV.dtype == student_NV.dtype else torch.empty_like(student_NV)
        dtype = torch.promote_types(student_NV.dtype, torch.float32)
        rows_N = torch.arange(len(student_NV), device=logits.device) if counts_N is None else counts_N.nonzero().squeeze(1)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for rows_R in rows_N.split(max(1, _CHUNK_LOGITS // width)):
            log_p_RV = F.log_softmax(teacher_NV[rows_R].to(dtype) / temperature, dim=-1)
            log_q_RV = F.log_softmax(student_NV[rows_R].to(dtype) / temperature, dim=-1)
            total += F.kl_div(log_q_RV, log_p_RV, reduction="sum", log_target=True)
            grad_NV[rows_R] = ((log_q_RV.exp_() - log_p_RV.exp_()) / temperature).to(grad_NV.dtype)
        if counts_N is not None:
            grad_NV[~counts_N] = 0
        ctx.save_for_backward(grad_NV.view(logits.shape))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad.to(grad_NV.dtype), None, None, None


class _FFN:
    """One FFN's term: what the teacher's gave, and the pull of the student's towards it."""

    def __init__(self, state: InFlight, weight: float, name: str, *, mask_name: str) -> None:
        self.target: Tensor | None = None
        self.is_listening = False
        """Whether the teacher's forward in flight is the one to learn from."""
        self.value: Tensor | None = None
        """Relative squared error of the latest forward with gradients."""
        self._state, self._weight, self._name = state, weight, name
        self._mask_name = mask_name

    def remember(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Hook of the teacher's down projection."""
        if not self.is_listening:
            return
        if self.target is not None:
            raise UnsupportedModelError(f"'{self._name}' runs several times in a forward; leave it out of sites, or set ffn_weight to 0.")
        self.target = output.detach()

    def inject(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Hook of the student's."""
        if not (torch.is_grad_enabled() and output.requires_grad) or self.target is None:
            return output
        if output.shape != self.target.shape:
            shapes = f"{tuple(self.target.shape)}, the model's {tuple(output.shape)}"
            raise UnsupportedModelError(f"the teacher's output of '{self._name}' is {shapes}: it must be of the model's structure.")
        with torch.no_grad():
            dtype = torch.promote_types(output.dtype, torch.float32)
            y, target = output.detach().to(dtype), self.target.to(dtype)
            mask_T = token_mask_of(self._state.masks[self._mask_name], output.shape[:-1])
            keep = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if mask_T is None else mask_T.view(y.shape[:-1])
            error = torch.where(keep[..., None], y - target, 0)  # a padded row may hold anything, NaN included
            weights = token_weights(target, keep) / keep.sum().clamp_min(1)
            self.value = (error.square().sum(-1) * weights).sum()
            # A float16 is too coarse for numbers that wait for the loss's scale.
            pull = (error * (2 * self._weight * weights)[..., None]).to(output.dtype if output.dtype is not torch.float16 else dtype)
        return cast(Tensor, _Inject.apply(output, pull, self._state.scale))


class _Inject(torch.autograd.Function):
    """Identity whose backward adds ``scale * pull``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pull: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(pull, scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pull, scale = ctx.saved_tensors
        return grad + (pull * read_scale(scale, grad).to(pull.dtype)).to(grad.dtype), None, None
