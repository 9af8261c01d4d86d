"""Other activation functions in a model's FFNs: ReLU at once, annealed, or shifted, and what its checkpoint says of it.

Letters: F FFN width.

Which module of an FFN is its activation is found by calling the candidates, and which entry of ``config.json`` decides it by building the
model's skeleton with another value there: no names are involved. Where an entry can say all that was changed ("relu" in every layer) it is
written there, and the checkpoint is an ordinary dense one. Where none can (other functions in other layers, a threshold, a transition under
way, an entry that a head outside the FFNs reads too) the entry becomes `UNRESTORED`: without moeify no model can be built from it, and with
it ``from_pretrained`` restores every module from ``config.moeify_activations`` (`restore_activations`).
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import _config
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..sites.formula import ACTIVATIONS, ShiftedReLU
from ..sites.policy import check_patterns, check_policy, options_for
from ..sites.projection import ProjectionMLP, inside_projection
from ..sites.site import FFNSite

UNRESTORED = "restored_by_moeify"
"""Value of a config entry that names no function of transformers; its loader refuses it."""
RECORD = "moeify_activations"
"""Attribute of ``model.config`` with all that `restore_activations` needs."""

_ALIASES = re.compile("|".join(("gelu.*", "swish", UNRESTORED, *map(re.escape, ACTIVATIONS))))
_Signature = tuple[type, str, tuple[tuple[str, str], ...]]


class SquaredReLU(nn.Module):
    """relu(z)^2."""

    def forward(self, z: Tensor) -> Tensor:
        """The function, elementwise."""
        return torch.relu(z).square()


class BlendedActivation(nn.Module):
    """Between two functions: (1 - mix) start(z) + mix end(z); exactly ``end`` at mix 1, at its cost alone.

    Args:
        start: module of the function before.
        end: module of the function after.
        mix: in [0, 1].
    """

    start: nn.Module
    end: nn.Module

    def __init__(self, start: nn.Module, end: nn.Module, *, mix: float) -> None:
        super().__init__()
        # Not registered: to whoever looks for the FFN's activation, this is it, and not one of its parts.
        self.__dict__["start"], self.__dict__["end"] = start, end
        # A tensor, so that a compiled model reads it; no buffer, which loading would take for one of the checkpoint's.
        self._mix = torch.zeros((), device="cpu")
        self.set_mix(mix)

    @property
    def mix(self) -> float:
        """Share of ``end``."""
        return float(self._mix)

    def set_mix(self, mix: float) -> None:
        """Move on; of a compiled model only mix = 1 is compiled again."""
        if not 0 <= mix <= 1:
            raise ConfigError(f"mix must be in [0, 1], got {mix}.")
        self._mix.fill_(mix)
        self.is_done = mix == 1

    def forward(self, z: Tensor) -> Tensor:
        """The function, elementwise."""
        end = cast(Tensor, self.end(z))
        if self.is_done:
            return end
        start = cast(Tensor, self.start(z))
        return start + (end - start) * self._mix

    def extra_repr(self) -> str:
        return f"{self.start} -> {self.end}, mix={self.mix}"


class UnrestoredActivation(nn.Module):
    """Stands where a checkpoint has an activation that its config cannot name, until `restore_activations` has put it there."""

    def forward(self, _z: Tensor) -> Tensor:
        """Refuses."""
        raise CheckpointError("the activations of this checkpoint were not restored; load it by from_pretrained with moeify imported.")


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Which function the FFNs compute."""

    activation: Literal["relu", "relu2"] = "relu"
    """ReLU, or its square."""
    threshold: float = 0.0
    """t of relu(z - t), for relu only. Where the projection has a bias and nothing is annealed, t goes there and the function is relu."""
    policy: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Exceptions by site name, or by 're:' pattern on it: options to change there, or null to keep the FFN's function. An exact name wins,
    then the first matching pattern."""

    def __post_init__(self) -> None:
        if not abs(self.threshold) < float("inf"):
            raise ConfigError(f"threshold must be finite, got {self.threshold}.")
        if self.threshold and self.activation != "relu":
            raise ConfigError(f"threshold is for the activation 'relu', not {self.activation!r}.")
        check_patterns(self.policy)

    @property
    def name(self) -> str:
        """The function's name in `moeify.sites.ACTIVATIONS`."""
        return ShiftedReLU(self.threshold).activation if self.threshold else self.activation

    def by_site(self, sites: Sequence[FFNSite]) -> dict[str, "ActivationConfig | None"]:
        """The options at each site by name, the policy applied; None where the FFN's function stays.

        Raises:
            ConfigError: an entry of the policy matches no site, or has an unknown option.
        """
        check_policy(self.policy, sites)
        return {site.name: options_for(self, self.policy, site.name) for site in sites}

    def build(self) -> nn.Module:
        """A module that computes it."""
        if self.threshold:
            return ShiftedReLU(self.threshold)
        return nn.ReLU() if self.activation == "relu" else SquaredReLU()


def find_activation(model: nn.Module, site: FFNSite) -> str | None:
    """Path of the module that computes a site's activation; None where the family's code calls a function instead.

    Found by calling: a module without parameters or parts, inside the site's own, that computes the site's function on a grid of values; of
    several the one nearest to the projection before it.

    Raises:
        UnsupportedModelError: several do.
    """
    host = model.get_submodule(site.name)
    grid = torch.linspace(-12, 12, 241, device="cpu")
    wanted = ACTIVATIONS[site.activation](grid)
    found = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, module in host.named_modules(remove_duplicate=False):
            if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
                continue
            if not isinstance(host, ProjectionMLP) and inside_projection(host, name):
                continue  # of an attention within the same module
            functions = (module, module.end) if isinstance(module, BlendedActivation) else (module,)
            if any(_computes(function, grid, wanted) for function in functions):
                found.append(f"{site.name}.{name}".lstrip("."))
    near = (site.gate or site.up).split(".")
    shared = {path: next((i for i, (a, b) in enumerate(zip(path.split("."), near, strict=False)) if a != b), len(near)) for path in found}
    found = [path for path in found if shared[path] == max(shared.values())]
    if len(found) > 1:
        raise UnsupportedModelError(f"'{site.name}' has several modules that compute {site.activation}: {', '.join(found)}.")
    return found[0] if found else None


def _computes(module: nn.Module, grid: Tensor, wanted: Tensor) -> bool:
    try:
        result = module.forward(grid)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, CheckpointError):  # made for other arguments
        return False
    return isinstance(result, Tensor) and result.shape == wanted.shape and torch.allclose(result, wanted, rtol=1e-5, atol=1e-6)


def set_activation(
    model: nn.Module, sites: Sequence[FFNSite], config: ActivationConfig | None = None, *, mix: float = 1.0
) -> list[FFNSite]:
    """Give FFNs another activation function, in place; weights stay, but for a threshold that goes into a bias.

    At once (``mix=1``), or annealed: start with ``mix=0`` and call `set_mix` while training.   h = (1 - mix) act(z) + mix relu(z - t)

    ``model.config`` says what was done, so that ``save_pretrained`` writes a checkpoint that computes the same: see this file's head.
    Enforcement and ``torch.compile`` come after this call, not before.

    Args:
        model: dense model, also a plain module without a config.
        sites: FFNs to change, as `find_ffn_sites` returned them; usually all.
        config: function and policy; None: ReLU.
        mix: share of the new function, in [0, 1].

    Returns:
        The sites with the functions that they will have at mix 1, those that the policy keeps included, in order.

    Raises:
        ConfigError: an entry of the policy matches no site or has an unknown option, or ``mix`` outside [0, 1].
        UnsupportedModelError: an FFN is converted, its function is no module that can be replaced, or the family's code fixes it, so that
            no config could say that it was changed. Nothing has been changed then.
    """
    config = config or ActivationConfig()
    functions = config.by_site(sites)
    if not 0 <= mix <= 1:
        raise ConfigError(f"mix must be in [0, 1], got {mix}.")
    plan: dict[str, tuple[FFNSite, ActivationConfig, str]] = {}
    for site in sites:
        options = functions[site.name]
        if options is None or options.name == site.activation:
            continue
        if hasattr(model.get_submodule(site.name), "moe"):
            raise UnsupportedModelError(f"'{site.name}' is converted: change its activation before, or call to_dense(model) first.")
        if hasattr(model.get_submodule(site.down), "channels"):
            raise UnsupportedModelError(f"'{site.name}' is thinned: change its activation before, or call to_dense(model) first.")
        if isinstance(model.get_submodule(site.name), ProjectionMLP):
            raise UnsupportedModelError(
                f"'{site.name}' replaces a linear layer and computes {site.activation}: choose its function when replacing "
                "(find_projections(activation=...)), or leave it out by the policy."
            )
        path = find_activation(model, site)
        if path is None:
            raise UnsupportedModelError(
                f"'{site.name}': no module computes its {site.activation}, so there is none to replace; leave it out by the policy."
            )
        plan[site.name] = (site, options, path)
    entries = _Entries.of(model) if plan and hasattr(getattr(model, "config", None), "to_dict") else None
    if entries is not None:
        for name, (_, _, path) in plan.items():
            if not any(path in paths for paths in entries.decides.values()):
                raise UnsupportedModelError(
                    f"'{name}': no entry of {type(model).__name__}'s config decides its activation, so no checkpoint could say that it was "
                    "changed and it would load with the old one; leave it out by the policy."
                )
    changed = {}
    for name, (site, options, path) in plan.items():
        if mix == 1 and options.threshold and _fold(model, site, options.threshold):
            options = replace(options, threshold=0.0)
        end = options.build()
        old = model.get_submodule(path)
        start = old.start if isinstance(old, BlendedActivation) else old
        new = end if mix == 1 else BlendedActivation(start, end, mix=mix)
        put_module(model, path, new.train(old.training))
        changed[name] = replace(site, activation=options.name)
    if entries is not None:
        entries.write(model)
    return [changed.get(site.name, site) for site in sites]


def set_mix(model: nn.Module, mix: float) -> None:
    """Move every annealed activation of a model on: ``mix`` is the share of the new function, in [0, 1]; 1 ends it for good, and may be
    repeated.

    Cost: microseconds a layer, no host sync; at 1 the model's skeleton is built a few times, to write the final config.

    Raises:
        ConfigError: ``mix`` outside [0, 1], or below 1 while nothing is annealed.
    """
    blended = [m for m in model.modules() if isinstance(m, BlendedActivation) and not m.is_done]
    if not blended and mix != 1:
        raise ConfigError(f"no activation of this {type(model).__name__} is annealed, or it is no more; call set_activation(..., mix=0.0).")
    for module in blended:
        module.set_mix(mix)
    config = getattr(model, "config", None)
    if not blended or not hasattr(config, "to_dict"):
        return
    if mix == 1:
        _Entries.of(model).write(model)
    else:
        for kind in getattr(config, RECORD)["modules"].values():
            if "mix" in kind:
                kind["mix"] = mix


def _fold(model: nn.Module, site: FFNSite, threshold: float) -> bool:
    """Subtract the threshold from the bias of what enters the activation; False where there is none."""
    projection = model.get_submodule(site.gate or site.up)
    bias = projection._parameters.get("bias")
    if bias is None:
        return False
    half = bias if site.fused is None else bias.chunk(2)[0 if site.fused == "gate_up" else 1]
    with torch.no_grad():
        half.sub_(threshold)
    return True


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# ---- what the config says


@dataclass(frozen=True)
class _Entries:
    """The config entries that decide activations, and what they decide."""

    config: Any
    """The config as it was before moeify changed an activation."""
    original: nn.Module
    """The skeleton that it builds, on the meta device."""
    decides: Mapping[str, frozenset[str]]
    """Entry (dotted where configs nest) -> paths of the modules that change with it."""

    @classmethod
    def of(cls, model: nn.Module) -> "_Entries":
        """Build the model's skeleton once for every entry that may be an activation's name.

        Raises:
            UnsupportedModelError: the model's class does not build it from the config.
        """
        config = _original_config(model)
        original = _skeleton(model, config)
        before = _signatures(original)
        decides = {}
        for entry, value in _names_in(config.to_dict()):
            try:
                after = _signatures(
                    _skeleton(model, _changed(config, {entry: _renamed(value, "relu" if _name(value) != "relu" else "silu")}))
                )
            except (KeyError, ValueError):  # an entry of another meaning
                continue
            if after.keys() == before.keys() and (paths := frozenset(path for path in before if after[path] != before[path])):
                decides[entry] = paths
        return cls(config, original, decides)

    def write(self, model: nn.Module) -> None:
        """Make ``model.config`` say which functions the model computes now."""
        names: dict[str, str] = {}
        hidden: dict[str, str] = {}
        modules: dict[str, dict[str, Any]] = {}
        values = dict(_names_in(self.config.to_dict()))
        for entry, paths in self.decides.items():
            value = values[entry]
            kinds = {path: self._kind(path, model.get_submodule(path)) for path in sorted(paths)}
            changed = {path: kind for path, kind in kinds.items() if kind is not None}
            first = next(iter(changed.values()), {})
            if not changed:
                names[entry] = value
            elif all(kind == first for kind in kinds.values()) and first.keys() == {"activation"}:
                names[entry] = _renamed(value, first["activation"])
            else:
                names[entry], hidden[entry] = _renamed(value, UNRESTORED), value
                modules |= changed
        config = cast(Any, model.config)
        _update(config, _changed(_plain(config), {}).to_dict(), _changed(self.config, names).to_dict())
        if hidden:
            setattr(config, RECORD, {"entries": hidden, "modules": modules})
        elif hasattr(config, RECORD):
            delattr(config, RECORD)
        mark(model)

    def _kind(self, path: str, module: nn.Module) -> dict[str, Any] | None:
        """What to write about a module, as `_build` reads it; None where it is the original."""
        if _signature(module) == _signature(self.original.get_submodule(path)):
            return None
        if isinstance(module, BlendedActivation):
            end = self._kind(path, module.end)
            return end if module.is_done else {"start": self._kind(path, module.start), "end": end, "mix": module.mix}
        if isinstance(module, ShiftedReLU):
            return {"activation": "relu", "threshold": module.threshold}
        return {"activation": "relu2" if isinstance(module, SquaredReLU) else "relu"}


def mark(model: nn.Module) -> None:
    """Make ``from_pretrained`` call moeify where the config alone does not say everything; nothing where it does."""
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    if hasattr(config, RECORD) and quantization is None:
        cast(Any, config).quantization_config = {"quant_method": "moeify", "schema": 1, "sites": []}  # a manifest without a site
    elif quantization is not None and not hasattr(config, RECORD):
        data = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        if data.get("quant_method") == "moeify" and not (data["sites"] or data.get("channels") or data.get("projections")):
            del cast(Any, config).quantization_config


def restore_activations(model: nn.Module) -> None:
    """Put the activations that ``config.moeify_activations`` names into a skeleton built from that config, on any device; in place.

    Raises:
        CheckpointError: the record is damaged, or the model is of another family than the one that wrote it.
    """
    config = getattr(model, "config", None)
    record = getattr(config, RECORD, None)
    if record is None:
        return
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    try:
        original, modules = _skeleton(model, _original_config(model)), dict(record["modules"])
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, UnrestoredActivation):
                kind = next((modules[p] for p in (path, prefix + path, path.removeprefix(prefix)) if p in modules), None)
                put_module(model, path, _build(kind, original.get_submodule(path)))
            for key, value in _kept_names(module).items():
                if _name(value) == UNRESTORED:
                    setattr(module, key, getattr(original.get_submodule(path), key))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"config.json: {RECORD} is damaged or of another model: {error}.") from error


def _build(kind: Mapping[str, Any] | None, original: nn.Module) -> nn.Module:
    if kind is None:
        return original
    if "mix" in kind:
        return BlendedActivation(_build(kind["start"], original), _build(kind["end"], original), mix=kind["mix"])
    return _config.from_dict(ActivationConfig, kind, where=f"config.json: {RECORD}").build()


def _skeleton(model: nn.Module, config: Any) -> nn.Module:
    """The model that its class builds from a config; nothing but modules: no memory, no random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            skeleton: nn.Module = cast(Any, type(model))(copy.deepcopy(config))
        except TypeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be built from its config alone ({error}); change activations before it is wrapped."
            ) from error
    return skeleton


def _signatures(model: nn.Module) -> dict[str, _Signature]:
    return {path: _signature(module) for path, module in model.named_modules(remove_duplicate=False)}


def _signature(module: nn.Module) -> _Signature:
    """What of a module can change with an activation's name: the module that it is, and names that it keeps to look up itself (Mamba)."""
    leaf = next(module.children(), None) is None
    return type(module) if leaf else nn.Module, module.extra_repr() if leaf else "", tuple(sorted(_kept_names(module).items()))


def _kept_names(module: nn.Module) -> dict[str, str]:
    return {key: value for key, value in vars(module).items() if isinstance(value, str) and _ALIASES.fullmatch(_name(value))}


def _plain(config: Any) -> Any:
    """The config without what moeify adds."""
    return _changed(config, {}, without=(RECORD, "quantization_config"))


def _original_config(model: nn.Module) -> Any:
    config = cast(Any, model.config)
    return _changed(_plain(config), (getattr(config, RECORD, None) or {}).get("entries", {}))


def _changed(config: Any, entries: Mapping[str, str], *, without: Sequence[str] = ()) -> Any:
    """A new config with other entries; what the family derives from them follows."""
    data = copy.deepcopy(config.to_dict())
    for key in without:
        data.pop(key, None)
    for entry, value in entries.items():
        *outer, last = entry.split(".")
        part = data
        for key in outer:
            part = part[key]
        part[last] = value
    return type(config).from_dict(data)


def _update(config: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Set the attributes of a config in which two dicts differ, those of nested configs included."""
    for key, value in new.items():
        if old.get(key) == value:
            continue
        part = getattr(config, key, None)
        if isinstance(value, Mapping) and hasattr(part, "to_dict"):
            _update(part, old.get(key) or {}, value)
        else:
            setattr(config, key, value)


def _names_in(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Entries that may be the name of an activation ("gelu_new"; T5: "gated-gelu")."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _names_in(value, f"{prefix}{key}.")
        elif isinstance(value, str) and _ALIASES.fullmatch(_name(value)):
            yield f"{prefix}{key}", value


def _name(value: str) -> str:
    return value.rpartition("-")[2]


def _renamed(value: str, name: str) -> str:
    return value.removesuffix(_name(value)) + name
