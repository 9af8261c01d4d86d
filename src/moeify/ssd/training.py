"""SSD as a part of training: told the step, it measures, decides and switches between two optimizer steps."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _config
from .._dist import ALONE, Ranks
from .._random import seeded
from ..controls import check_dense
from ..convert import apply_site
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..manifest import SiteRecord, stamp
from ..routers import LinearRouterConfig
from ..select import TopK
from ..sites import FFNSite, neuron_parameters
from ..sparsity.inflight import Removable
from .controller import Controller, Decision, Fallback, Signals, SSDConfig
from .monitor import Monitor, Probe
from .switch import SwitchRecord, check_optimizer, group_layers, permute_trained, reset_router

_log = logging.getLogger(__name__)


class SSD(Removable):
    """Switchable sparse-dense pre-training of a dense model: a `moeify.train.Part` with a state, for any loop.

    It attaches to every FFN a `MoEFFN` in dense mode, with its router, at once: so the optimizer that is made afterwards holds the routers
    (decision D8). Before each optimizer step `set_step` measures, decides and switches, where it is due; in between there is no work and no
    host sync of its own. Sparse steps run the selected experts alone (`kernels.moe_ffn`), their outputs unweighted; routers learn through
    1 + p - stopgrad(p), p the softmax over the selected scores; no token is dropped, nothing balances the load.

    With several processes (`torch.distributed`, initialised before `begin`) all of them call everything alike: each measures its part of
    the probe and groups its part of the layers, and the first one's signals decide.

    ``set_step(total_steps)`` ends the run: the experts are grouped once more where the last phase was dense, so that the model serves both
    modes (`moeify.set_mode`). The manifest in ``model.config`` makes ``save_pretrained`` keep both.

    Args:
        model: dense model, neither compiled nor wrapped; changed in place.
        sites: its FFNs, as `find_ffn_sites` returned them.
        config: experts and rules.
        total_steps: optimizer steps of the run; may be set later, before the first step.
        probe: batches that everything is measured on, the same every time and not trained on; with labels.
        compute: dtype of the probe's matrix products (autocast); None: the weights' own.
        fallbacks: sparse phases that went wrong in an earlier attempt at this run.

    Raises:
        ConfigError: more experts than an FFN has neurons.
        UnsupportedModelError: the model is converted already, or an FFN's projections are no plain layers. Nothing has been changed then.
        DataError: no probe.

    Source: Zhang et al. 2024, arXiv:2410.03440; what is published and what is ours: docs/ssd.md.
    """

    name = "ssd"
    compiles = True
    """Within a training forward there are only the layers' modes, which a compiled graph is guarded by."""

    is_collective = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[FFNSite],
        config: SSDConfig | None = None,
        *,
        total_steps: int = 1,
        probe: Sequence[Mapping[str, Tensor]],
        compute: torch.dtype | None = None,
        fallbacks: Sequence[Fallback] = (),
    ) -> None:
        self.config = config = config or SSDConfig()
        check_dense(model, type(model).__name__)
        if not sites:
            raise UnsupportedModelError(f"this {type(model).__name__} has no FFN to make sparse.")
        for site in sites:
            if config.num_experts > site.d_ff:
                raise ConfigError(f"num_experts {config.num_experts} is more than the {site.d_ff} neurons of '{site.name}'.")
            neuron_parameters(model, site)
        self._model = model
        rule = TopK(k=config.selected)
        with seeded(config.seed):
            self._layers = [
                apply_site(
                    model, SiteRecord(site=site, num_experts=config.num_experts, router=LinearRouterConfig(), rule=rule), order_F=None
                )
                for site in sites
            ]
        for layer in self._layers:
            layer.mode, layer.is_taught = "dense", True
        stamp(model)
        self.monitor = Monitor(model, probe, config, compute=compute)
        self.controller = Controller(config, total_steps=total_steps)
        self.probes: list[Probe] = []
        """Every measurement."""
        self.switches: list[SwitchRecord] = []
        """Every grouping of neurons."""
        self._fallbacks = list(fallbacks)
        self._optimizer: torch.optim.Optimizer | None = None
        self._ranks = ALONE
        self._is_finished = False

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.controller.total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        """For a run whose length is not known when this is attached."""
        self.controller.total_steps = steps

    @property
    def decisions(self) -> list[Decision]:
        """Every decision with the numbers behind it."""
        return self.controller.log

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer whose moments follow the neurons; before the first step.

        Raises:
            ConfigError: its state cannot be permuted exactly, or it lacks the routers (`check_optimizer`).
        """
        check_optimizer(optimizer, self._layers)
        self._optimizer = optimizer
        self._ranks = self.monitor.ranks = Ranks.present()

    def set_step(self, step: int) -> None:
        """After ``step`` optimizer steps, before the forwards of the next: measure, decide and switch where it is due.

        Raises:
            ConfigError: `begin` was not called, or the optimizer's state cannot be permuted.
        """
        if step >= self.total_steps:
            self._finish(step)
            return
        if step > self.controller.state.step:
            for fallback in self._fallbacks:
                if fallback.step == step:
                    self.controller.fall_back(fallback)
                    _log.info("step %d: dense until %d: %s", step, fallback.until, fallback.reason)
                    self._set_mode()
        if not self.controller.is_due(step):
            return
        signals = None
        if self.controller.measures(step):
            found = self.monitor.measure(step, sparse=self.controller.mode == "sparse")
            self.probes.append(found)
            # Sums over processes are alike on all; that decisions are is not left to that.
            signals = _config.from_dict(Signals, self._ranks.same(_config.to_dict(found.signals)), where="signals")
        decision = self.controller.decide(signals or Signals(step=step))
        if decision.after != decision.before:
            _log.log(
                logging.INFO if self._ranks.is_first else logging.DEBUG,
                "step %d: %s to %s: %s %s",
                step,
                decision.before,
                decision.after,
                decision.reason,
                decision.numbers,
            )
            if decision.after == "sparse":
                self._regroup(step, warm=self.controller.state.sparse_phases > 1)
            self._set_mode()

    def values(self) -> Mapping[str, Tensor]:
        """'ssd_sparse' (0 or 1) and, once measured, 'ssd_sparsity' and 'ssd_similarity'; of the last measurement, on the CPU."""
        found = {"ssd_sparse": torch.tensor(float(self.controller.mode == "sparse"))}
        if self.probes:
            signals = self.probes[-1].signals
            named = {"ssd_sparsity": signals.sparsity, "ssd_similarity": signals.similarity}
            found |= {name: torch.tensor(value) for name, value in named.items() if value is not None}
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON value and tensors that `load_state` goes on from.

        Weights, moments and routers are the model's and the optimizer's; the experts are the order of the neurons.
        """
        plain = {
            "controller": self.controller.to_dict(),
            "probes": [_config.to_dict(p) for p in self.probes],
            "switches": [_config.to_dict(s) for s in self.switches],
        }
        return plain, self.monitor.tensors()

    def load_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`; the model and the optimizer have been loaded by the caller.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        try:
            self.controller.load(plain["controller"])
            self.probes = [_config.from_dict(Probe, p, where="probes") for p in plain["probes"]]
            self.switches = [_config.from_dict(SwitchRecord, s, where="switches") for s in plain["switches"]]
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"the state of SSD is damaged: {error}; delete the training state to start anew.") from error
        self.monitor.load(tensors)
        self._set_mode()

    def remove(self) -> None:
        """Leave the model as a converted one, in the mode of its last phase."""
        for layer in self._layers:
            layer.is_taught = False

    def _set_mode(self) -> None:
        for layer in self._layers:
            layer.mode = "dense" if self.controller.mode == "dense" else "moe"

    def _finish(self, step: int) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        if self.controller.mode == "dense":
            self._regroup(step, warm=self.controller.state.sparse_phases > 0)
        stamp(self._model)

    def _regroup(self, step: int, *, warm: bool) -> None:
        """New experts in every FFN; in place."""
        if self._optimizer is None:
            raise ConfigError("SSD knows no optimizer to permute with the weights; call begin(optimizer) before the first step.")
        seed = self.config.seed + 1_000_003 * (len(self.switches) + 1)
        found = group_layers(self._layers, self.config, seed=seed, warm=warm, ranks=self._ranks)
        for i, (layer, (split, _)) in enumerate(zip(self._layers, found, strict=True)):
            permute_trained(self._model, layer.site, split.order_F, self._optimizer)
            self.monitor.permute(layer.site.name, split.order_F)
            reset_router(layer, self.config, self._optimizer, seed=seed + i)
        inertia = tuple(split.inertia for split, _ in found if split.inertia is not None)
        self.switches.append(SwitchRecord(step=step, warm_layers=sum(is_warm for _, is_warm in found), inertia=inertia))
