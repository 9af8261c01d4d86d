"""What each FFN of a model reads, found by running one block at a time: for models whose weights do not fit into memory.

Letters: B batch, S sequence, T tokens, D model width.

What enters a block is on disk for all batches. The block's weights are read once, its FFNs' inputs stored, and what it gives is written as
what enters the next one. The arguments that blocks get besides hidden states (masks, rotary tables) come from a forward in which every
block hands on what it got: they must not depend on hidden states, and a watched forward of the model shows whether they do.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..errors import DataError, UnsupportedModelError
from ..sites import FFNSite, mask_name
from ..sites.probe import eval_mode
from ..sparsity.blocks import hidden_of
from .capture import FFNInputs, Recorder, autocast_as

Loaded = Callable[[str], AbstractContextManager[None]]
"""By the path of a block: a ``with`` in which its weights are in memory."""

_STATE = "blocks.json"


class _Stop(Exception):  # noqa: N818 - control flow: nothing after the last block is needed
    pass


@dataclass(frozen=True)
class Call:
    """One call of a block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class BlockChain:
    """Blocks that run one after the other, each reading what the one before it gave."""

    names: tuple[str, ...]
    """Module paths, in execution order."""
    places: tuple[int | str, ...]
    """Where each block takes hidden states: a position or a keyword."""
    lengths: tuple[int, ...]
    """What each gives: 0 for hidden states alone, else a tuple of so many entries that begins with them."""

    def run(self, model: nn.Module, index: int, hidden: Tensor, call: Call) -> Tensor:
        """One block of ``model`` on hidden states; its other arguments are those of ``call``."""
        args, kwargs = list(call.args), dict(call.kwargs)
        place = self.places[index]
        if isinstance(place, int):
            args[place] = hidden
        else:
            kwargs[place] = hidden
        return hidden_of(model.get_submodule(self.names[index])(*args, **kwargs))


@torch.no_grad()
def watch_blocks(
    model: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor], look: Callable[[str, Call], None] = lambda _name, _call: None
) -> tuple[BlockChain, list[Call]]:
    """One forward of a model, in which its blocks prove to be a chain; with `check_chain`, the proof is complete.

    Args:
        model: must run; in eval mode and without a cache for the forward.
        names: module paths of the blocks.
        inputs: keyword arguments of the forward.
        look: called after each block with its path and arguments, while its weights are there; may run it.

    Returns:
        The chain, and what each block got besides hidden states.

    Raises:
        UnsupportedModelError: a block does not run, or not exactly once, or it reads something else than the one before it gave.
    """
    seen: list[tuple[str, Call, int | str, int, Tensor, Tensor]] = []
    entered: dict[str, Call] = {}
    looking = False

    def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        if not looking:
            entered[name] = Call(copied(args), copied(kwargs))

    def leave(_block: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any, name: str) -> None:
        nonlocal looking
        if looking:
            return
        call, after = entered.pop(name), hidden_of(output)
        values: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        place = next((key for key, value in values if isinstance(value, Tensor) and value.shape == after.shape), None)
        if place is None:
            raise _no_chain(model, f"'{name}' does not map hidden states to hidden states")
        before = call.args[place] if isinstance(place, int) else call.kwargs[place]
        seen.append((name, call, place, 0 if isinstance(output, Tensor) else len(output), before, after.clone()))
        looking = True
        try:
            look(name, call)
        finally:
            looking = False

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(_no_cache(model))
        for name in names:
            block = model.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(partial(enter, name=name), with_kwargs=True).remove)
            # in front of whatever takes the weights away
            stack.callback(block.register_forward_hook(partial(leave, name=name), with_kwargs=True, prepend=True).remove)
        model(**{key: value for key, value in inputs.items() if key != "labels"})
    if [entry[0] for entry in seen] != list(names):
        raise _no_chain(model, "its layers do not each run once, one after the other")
    for (name, *_, given), (_, _, _, _, taken, _) in zip(seen, seen[1:], strict=False):
        if not torch.equal(given, taken):
            raise _no_chain(model, f"what '{name}' gives is not what the next layer reads")
    chain = BlockChain(tuple(names), tuple(entry[2] for entry in seen), tuple(entry[3] for entry in seen))
    return chain, [_without(call, place) for _, call, place, *_ in seen]


def check_chain(model: nn.Module, chain: BlockChain, calls: Sequence[Call], inputs: Mapping[str, Tensor]) -> None:
    """Compare what `watch_blocks` saw blocks get besides hidden states with what `entering` finds.

    Raises:
        UnsupportedModelError: they differ, so that it depends on hidden states, or on what else blocks give.
    """
    try:
        _, found = entering(model, chain, inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # a block's further outputs are None here
        raise _no_chain(model, "it reads more of what its layers give than hidden states") from error
    for name, call, handed in zip(chain.names, calls, found, strict=True):
        if not _same(call, handed):
            raise _no_chain(model, f"what '{name}' gets besides hidden states comes from other layers")


@torch.no_grad()
def entering(model: nn.Module, chain: BlockChain, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
    """What enters the first block, and the other arguments of every block (None in the place of hidden states).

    No block's weights are used.
    """
    first: list[Tensor] = []
    calls: list[Call] = []

    def hand_on(*args: Any, index: int, **kwargs: Any) -> Any:
        call, place = Call(copied(args), copied(kwargs)), chain.places[index]
        hidden = args[place] if isinstance(place, int) else kwargs[place]
        if not first:
            first.append(hidden.clone())
        calls.append(_without(call, place))
        if index == len(chain.names) - 1:
            raise _Stop
        length = chain.lengths[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(_no_cache(model))
        for index, name in enumerate(chain.names):
            block: Any = model.get_submodule(name)
            block.forward = partial(hand_on, index=index)
            stack.callback(delattr, block, "forward")
        with suppress(_Stop):
            model(**{key: value for key, value in inputs.items() if key != "labels"})
    return first[0], calls


@torch.no_grad()
def capture_by_block(
    model: nn.Module,
    chain: BlockChain,
    sites: Mapping[str, Sequence[FFNSite]],
    batches: Sequence[Mapping[str, Tensor]],
    directory: Path,
    *,
    loaded: Loaded,
    on_demand: Callable[[], AbstractContextManager[None]] = nullcontext,
    done: Callable[[str, FFNInputs], None] = lambda _name, _inputs: None,
    device: torch.device | None = None,
    compute: torch.dtype | None = None,
    progress: Progress = NO_PROGRESS,
) -> FFNInputs:
    """Store the input of every FFN, as `capture_ffn_inputs` does and with the same values, in the memory of one block.

    Args:
        model: dense model, or its skeleton.
        chain: its blocks, from `watch_blocks`.
        sites: FFNs to record by block, each block's in execution order.
        batches: as for `capture_ffn_inputs`.
        directory: where to write; a capture that was killed continues with the block that was not done.
        loaded: reads a block's weights.
        on_demand: a ``with`` in which what comes before the blocks runs.
        done: called after each block with FFNs, its weights still there; may fit them, and delete their inputs.
        device: of the blocks.
        compute: dtype of matrix products (autocast); None leaves the model's own.
        progress: told the number of blocks and batches.

    Returns:
        The capture.

    Raises:
        DataError: as `capture_ffn_inputs`.

    Cost: on disk, twice the hidden states of all tokens beside what ``done`` leaves of the inputs; in memory, the distinct masks and
        tables of all batches.
    """
    if not batches:
        raise DataError("no calibration batch: the data gave no tokens.")
    place = device or torch.device("cpu")
    order = [site for name in chain.names for site in sites.get(name, ())]
    files = {site.name: f"site{i:04d}.bf16" for i, site in enumerate(order)}
    inputs = FFNInputs(directory, {site.name: site.d_model for site in order}, files)
    last = max(i for i, name in enumerate(chain.names) if sites.get(name))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with progress.task("read FFN inputs, block by block", total=last + 1) as task:
            hidden = _Hidden(directory, len(batches))
            calls, seen = [], dict[bytes, Tensor]()
            with on_demand(), autocast_as(place.type, compute), hidden.writing(0) as write:
                for batch in batches:
                    first, of_blocks = entering(model, chain, {key: value.to(place) for key, value in batch.items()})
                    calls.append([_shared(call, seen) for call in of_blocks])
                    write(first)
            task.advance(hidden.block)
            for index in range(hidden.block, last + 1):
                name = chain.names[index]
                with loaded(name):
                    _run_block(model, chain, index, sites.get(name, ()), batches, calls, hidden, inputs, place=place, compute=compute)
                    if sites.get(name):
                        done(name, inputs)
                hidden.advance(index + 1)
                task.advance(1)
            hidden.remove()
    except OSError as error:
        need = f"hidden states and FFN inputs need some {8 * order[0].d_model} bytes a token"
        raise DataError(f"cannot write to '{directory}': {error.strerror or error}; {need}. Free space or lower max_tokens.") from error
    return inputs


def _run_block(
    model: nn.Module,
    chain: BlockChain,
    index: int,
    sites: Sequence[FFNSite],
    batches: Sequence[Mapping[str, Tensor]],
    calls: Sequence[Sequence[Call]],
    hidden: "_Hidden",
    inputs: FFNInputs,
    *,
    place: torch.device,
    compute: torch.dtype | None,
) -> None:
    """All batches through one block; the inputs of its FFNs have their names when they are whole."""
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(autocast_as(place.type, compute))
        names = {site.name: inputs.directory / (inputs.files[site.name] + ".new") for site in sites}
        sinks = {name: stack.enter_context(path.open("wb")) for name, path in names.items()}
        recorder = Recorder(sinks, calls_per_forward=None)
        for site in sites:
            first = model.get_submodule(site.first[0])
            hook = recorder.hook(site.name, mask=mask_name(model, site))
            stack.callback(first.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        with hidden.reading(index) as read, hidden.writing(index + 1) as write:
            for batch, of_blocks in zip(batches, calls, strict=True):
                recorder.start(batch)
                write(chain.run(model, index, read().to(place), of_blocks[index]))
    for name, path in names.items():
        path.replace(inputs.directory / inputs.files[name])
        if inputs.num_tokens(name) == 0:
            raise DataError(f"'{name}' saw no token of the calibration data; leave it out by the policy, or give inputs that reach it.")


class _Hidden:
    """What enters each block, one file a block: of all batches in turn."""

    def __init__(self, directory: Path, num_batches: int) -> None:
        self._directory, self._num_batches = directory, num_batches
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: dict[int, torch.dtype] = {}
        self.block = 0
        """The first block that is not done."""
        with suppress(FileNotFoundError, ValueError):
            state = json.loads((directory / _STATE).read_text())
            # The file can be shorter than it was written if the machine, not only the process, went down.
            if state["batches"] == num_batches and self._path(state["block"]).stat().st_size == state["bytes"]:
                self.block = state["block"]
                self._dtypes[self.block] = getattr(torch, state["dtype"])

    def writing(self, index: int) -> AbstractContextManager[Callable[[Tensor], None]]:
        """A ``with`` that writes what enters block ``index``; of what is done already only the shapes are kept."""
        return _Writing(self, index)

    def reading(self, index: int) -> AbstractContextManager[Callable[[], Tensor]]:
        """A ``with`` that reads what enters block ``index``, batch by batch."""
        return _Reading(self, index)

    def advance(self, block: int) -> None:
        """Note that all blocks before this one are done."""
        size = self._path(block).stat().st_size
        temporary = self._directory / (_STATE + ".new")
        dtype = str(self._dtypes[block]).removeprefix("torch.")
        temporary.write_text(json.dumps({"block": block, "batches": self._num_batches, "bytes": size, "dtype": dtype}))
        temporary.replace(self._directory / _STATE)
        self._path(block - 1).unlink(missing_ok=True)
        self.block = block

    def remove(self) -> None:
        """Nothing reads what the last block gave."""
        self._path(self.block).write_bytes(b"")
        self.advance(self.block)

    def _path(self, index: int) -> Path:
        return self._directory / f"hidden{index:04d}"


class _Writing:
    def __init__(self, hidden: _Hidden, index: int) -> None:
        self._hidden, self._index = hidden, index
        self._file = (hidden._path(index)).open("wb") if index > hidden.block or not hidden.block else None

    def __enter__(self) -> Callable[[Tensor], None]:
        return self._write

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, hidden: Tensor) -> None:
        if not self._index:
            self._hidden._shapes.append(tuple(hidden.shape))
        if self._file is not None:
            self._hidden._dtypes[self._index] = hidden.dtype
            self._file.write(hidden.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class _Reading:
    def __init__(self, hidden: _Hidden, index: int) -> None:
        self._shapes, self._dtype = iter(hidden._shapes), hidden._dtypes[index]
        self._file = hidden._path(index).open("rb")

    def __enter__(self) -> Callable[[], Tensor]:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> Tensor:
        shape, dtype = next(self._shapes), self._dtype
        raw = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        if self._file.readinto(raw.numpy().data) != len(raw):
            raise DataError("the hidden states of a killed run are damaged; delete its .work folder and run again.")
        return raw.view(dtype).view(shape)


def _no_chain(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot be run one block at a time ({why}); convert without --stream.")


def _no_cache(model: nn.Module) -> AbstractContextManager[None]:
    """A cache would be an argument that depends on hidden states."""
    stack = ExitStack()
    config = getattr(model, "config", None)
    if cache := getattr(config, "use_cache", None):
        cast(Any, config).use_cache = False
        stack.callback(setattr, config, "use_cache", cache)
    return cast(AbstractContextManager[None], stack)


def copied(value: Any) -> Any:
    """Tensors as copies, wherever they are: a block may write into its input."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)


def _without(call: Call, place: int | str) -> Call:
    args = tuple(None if key == place else value for key, value in enumerate(call.args))
    return Call(args, {key: None if key == place else value for key, value in call.kwargs.items()})


def _same(one: Call, other: Call) -> bool:
    ours, theirs = list(_tensors([one.args, one.kwargs])), list(_tensors([other.args, other.kwargs]))
    return len(ours) == len(theirs) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _shared(value: Any, seen: dict[bytes, Tensor]) -> Any:
    """The same with one tensor for all that are equal: windows of one length share their masks and tables."""
    if isinstance(value, Call):
        return Call(_shared(value.args, seen), _shared(value.kwargs, seen))
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.dim() else str(value).encode()
        return seen.setdefault(hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + bytes(raw)).digest(), value)
    if isinstance(value, dict):
        return {key: _shared(entry, seen) for key, entry in value.items()}
    return type(value)(_shared(entry, seen) for entry in value) if type(value) in (tuple, list) else value
