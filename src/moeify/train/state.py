"""What a killed training run leaves, and how it goes on from there with the very same losses.

    <state>/run.json           what tells this run from another
    <state>/step-00000120/     model.safetensors, optimizer.safetensors, state.json: whole, or not there; parts.json and parts.safetensors
                               where parts of training have a state
    <state>/step-00000120/shards/   in place of the first two where processes have parts of the weights: each writes its own (`shards`)

Any number of processes goes on from either; all must see the same folder. A new state is written beside the last one and gets its name
when it is on the disk; only then the last one goes. Nothing is ever pickled.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._dist import ALONE, Ranks, is_spread, put
from .._files import sync
from ..errors import CheckpointError
from .parallel import is_sharded
from .shards import read_shards, write_shards
from .work import RUN_FILE

_PREFIX, _NEW, _PARTS, _SHARDS = "step-", ".new", "parts", "shards"

_SLOT = "optimizer/"
"""Before the names of what the optimizer keeps, where they are beside the weights'."""

PartState: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""What a part of training keeps: a JSON object and tensors."""


@dataclass(frozen=True)
class Kept:
    """What `load_state` found, besides what it has put back."""

    step: int
    """Steps done."""
    record: dict[str, Any]
    """As it was saved."""
    folder: Path
    """Where; `load_part` reads there."""


def open_state(folder: Path, run: Mapping[str, Any]) -> None:
    """Make ``folder`` the place of this run's states, or see that it is.

    Args:
        folder: new, empty, or what an earlier process of the same run left.
        run: a JSON object: everything that decides the run's outcome.

    Raises:
        CheckpointError: it holds the states of another run (says what differs), something else, or cannot be written. It is left as it is.
    """
    path, text = folder / RUN_FILE, json.dumps(run, sort_keys=True, indent=1)
    try:
        if path.exists():
            _check_same(json.loads(path.read_text()), json.loads(text), folder)
            return
        temporary = path.with_suffix(_NEW)
        if folder.exists() and (not folder.is_dir() or any(child != temporary for child in folder.iterdir())):
            raise CheckpointError(f"'{folder}' is in the way and is not the state of a training run; move it or choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{path}' cannot be read or written: {error}; free space or choose another folder.") from error


def save_state(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    record: Mapping[str, Any],
    parts: Mapping[str, PartState] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Keep everything that the rest of a run depends on, as it is after ``step`` steps; the state before it goes when this one is whole.

    All ``ranks`` call this; the first one writes, and the others as well where each has a part of the weights.

    Raises:
        CheckpointError: the disk is full or not writable; the last state is still there.
    """
    new, done = folder / f"{_name(step)}{_NEW}", folder / _name(step)
    slots = optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, slot in slots["state"].items() for key, value in slot.items()}
    rest = {"groups": slots["param_groups"], "schedule": schedule.state_dict(), "scaler": scaler.state_dict(), "record": record}
    spread = is_sharded(model)

    def begin() -> None:
        shutil.rmtree(new, ignore_errors=True)
        (new / _SHARDS if spread else new).mkdir(parents=True)

    def finish() -> None:
        if not spread:
            save_file(_contiguous(_without_ties(model)), new / "model.safetensors")
            save_file(_contiguous(tensors | _random_states(model)), new / "optimizer.safetensors")
        save_parts(new, parts or {})
        (new / "state.json").write_text(json.dumps(rest))
        for path in (*new.rglob("*"), new):
            sync(path)
        new.rename(done)
        sync(folder)

    ranks.first(partial(_written, begin, new))
    if spread:
        try:
            write_shards(new / _SHARDS, _without_ties(model) | {f"{_SLOT}{name}": tensor for name, tensor in tensors.items()}, ranks=ranks)
        except CheckpointError:  # in all processes, and none writes any more
            if ranks.is_first:
                shutil.rmtree(new, ignore_errors=True)
            raise
    ranks.first(partial(_written, finish, new))
    if ranks.is_first:
        for old in _steps(folder):
            if old != done:
                shutil.rmtree(old, ignore_errors=True)


def _written(write: Callable[[], None], new: Path) -> None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(f"cannot write '{new}': {error}; free space and run again, the last state is kept.") from error


def load_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    ranks: Ranks = ALONE,
) -> Kept | None:
    """Put back, in place, what `save_state` kept last, on whatever number of processes.

    Returns:
        What else was kept; None where nothing was.

    Raises:
        CheckpointError: it is damaged, or of another model or other parameters of it.
    """
    steps = _steps(folder)
    name = ranks.same(steps[-1].name if steps else None)
    if name is None:
        return None
    found = folder / name
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        if (found / _SHARDS).is_dir():
            weights, tensors = _read_spread(found / _SHARDS, model, parameters, ranks)
        else:
            weights, tensors = load_file(found / "model.safetensors"), load_file(found / "optimizer.safetensors")
        rest = json.loads((found / "state.json").read_text())
        _load_weights(model, weights, where=found)
        kept, present = ([(len(g["params"]), g["initial_lr"]) for g in groups] for groups in (rest["groups"], optimizer.param_groups))
        if kept != present:
            raise CheckpointError(f"'{found}' is of a run that trained other parameters, or at other rates; choose another state folder.")
        _load_random_states(model, tensors)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            slots.setdefault(int(index), {})[key] = _laid_out_as(parameters[int(index)], value)
        groups = [group | {"betas": tuple(group["betas"])} for group in rest["groups"]]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
        schedule.load_state_dict(rest["schedule"])
        scaler.load_state_dict(rest["scaler"])
        return Kept(int(found.name.removeprefix(_PREFIX)), rest["record"], found)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{found}' is damaged: {error}; delete it to train from the start.") from error


def save_parts(folder: Path, parts: Mapping[str, PartState]) -> None:
    """Write the states of parts of training, by name, into a folder that is there; nothing for none."""
    if not parts:
        return
    tensors = {f"{name}:{key}": tensor for name, (_, own) in parts.items() for key, tensor in own.items()}
    if tensors:
        save_file(_contiguous(tensors), folder / f"{_PARTS}.safetensors")
    (folder / f"{_PARTS}.json").write_text(json.dumps({name: plain for name, (plain, _) in parts.items()}))


def load_part(folder: Path, name: str) -> PartState:
    """What `save_parts` wrote for one part.

    Raises:
        CheckpointError: nothing, or it is damaged.
    """
    plain_file, tensor_file = folder / f"{_PARTS}.json", folder / f"{_PARTS}.safetensors"
    try:
        plain = json.loads(plain_file.read_text()) if plain_file.exists() else {}
        tensors = load_file(tensor_file) if tensor_file.exists() else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"'{plain_file}' is damaged: {error}; delete '{folder}' to train from the start.") from error
    if name not in plain:
        raise CheckpointError(f"'{folder}' has no state of '{name}': it is of another run; choose another folder.")
    prefix = f"{name}:"
    return plain[name], {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _read_spread(folder: Path, model: nn.Module, parameters: Sequence[Tensor], ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name and slots of the optimizer, of the kind that the model's are: whole, or this process' part."""

    def like(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        if not name.startswith(_SLOT):
            weight = present.get(name)
            return None if weight is None else torch.empty_like(weight)
        index = int(name.removeprefix(_SLOT).partition(".")[0])
        parameter = parameters[index] if index < len(parameters) else None
        return (
            torch.empty_like(parameter, dtype=dtype)
            if parameter is not None and parameter.shape == shape
            else torch.empty(shape, dtype=dtype)
        )

    present = {name: tensor.detach() for name, tensor in _without_ties(model).items()}
    found = read_shards(folder, like, ranks=ranks)
    slots = {name.removeprefix(_SLOT): found.pop(name) for name in list(found) if name.startswith(_SLOT)}
    return found, slots


def has_state(folder: Path) -> bool:
    """Whether a whole state is kept there."""
    return bool(_steps(folder))


def latest_step(folder: Path) -> int:
    """Steps done in the last whole state; 0 where there is none."""
    steps = _steps(folder)
    return int(steps[-1].name.removeprefix(_PREFIX)) if steps else 0


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _steps(folder: Path) -> list[Path]:
    """Folders of whole states, the latest last."""
    return sorted(child for child in folder.glob(f"{_PREFIX}*") if not child.name.endswith(_NEW))


def _check_same(found: Any, wanted: Any, folder: Path) -> None:
    different = [] if isinstance(found, dict) else ["run"]
    if isinstance(found, dict):
        different = _differences(found, wanted)
    if different:
        raise CheckpointError(
            f"'{folder}' is the state of another run ({'; '.join(different)}); choose another folder, or delete it to start anew."
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} was {json.dumps(old)}, is {json.dumps(new)}")
    return lines


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tensors that share memory the first."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # what a module keeps beside tensors is its own business
            continue
        # Of a spread tensor a process may have nothing, so that memory does not tell; identity does, on all processes alike.
        place = (id(tensor),) if is_spread(tensor) else (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor
    return kept


@torch.no_grad()
def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    present = _without_ties(model)
    if present.keys() != weights.keys() or any(present[name].shape != weights[name].shape for name in weights):
        odd = sorted(present.keys() ^ weights.keys()) or [name for name in weights if present[name].shape != weights[name].shape]
        raise CheckpointError(f"'{where}' is of another model: '{odd[0]}' differs; choose another state folder.")
    for name, tensor in present.items():
        put(tensor, weights[name])


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    states = {"rng.cpu": torch.get_rng_state()}
    return states | ({"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _load_random_states(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Takes them out of ``tensors``."""
    if (on_cpu := tensors.pop("rng.cpu", None)) is not None:  # of several processes none is kept: each step seeds them
        torch.set_rng_state(on_cpu)
    device = next(model.parameters()).device
    on_cuda = tensors.pop("rng.cuda", None)  # a run that moves from one kind of device to another goes on with other dropout
    if on_cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(on_cuda, device)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Moments have their parameter's strides (`store_by_neuron` turns some around); the fused optimizer takes that for granted."""
    if value.shape != parameter.shape or is_spread(value):
        return value
    laid_out = torch.empty_like(parameter, dtype=value.dtype)
    put(laid_out, value)
    return laid_out


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
