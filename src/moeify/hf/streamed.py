"""A model whose weights stay in the checkpoint's files: a skeleton on the meta device, a part of which is read while it is needed.

The parts: each block of the model's largest stack of layers as a whole, and every other module with tensors of its own.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from ..layers import MoEFFN
from ..sites.site import is_transposed
from ..sparsity.activation import restore_activations
from .load import check_finite_tensor, load_config, load_processor, locate, model_class_of, weight_files
from .registration import register
from .shards import TensorFiles
from .skeleton import check_complete, check_headers, file_keys, skeleton, tied_names


@dataclass(frozen=True)
class Slot:
    """One tensor of a module, and where it is read."""

    module: nn.Module
    """Its owner."""
    table: str
    """Attribute of the module that holds it: "_parameters" or "_buffers"."""
    name: str
    """Its name there."""
    path: str
    """Its name in the model's state dict."""
    key: str
    """Its name in the files."""


class StreamedModel:
    """A skeleton and the files with its weights.

    Args:
        model: on the meta device, but for buffers that no file holds; kept in ``model``.
        files: the checkpoint's tensors.
        dtype: of floating tensors that are read; None: as the files have them.
        device: where they go.
        source: name of the checkpoint, for errors.

    Raises:
        CheckpointError: the files lack a tensor of the model, or have it in another shape.
        UnsupportedModelError: two parts share a tensor, and one of them is a block; or the model has no stack of blocks.
    """

    def __init__(
        self, model: nn.Module, files: TensorFiles, *, dtype: torch.dtype | None, device: torch.device | None = None, source: str
    ) -> None:
        self.model, self._files, self._dtype, self._device = model, files, dtype, device or torch.device("cpu")
        self.source = source
        """Name of the checkpoint."""
        self.blocks = block_names(model)
        """Module paths of the blocks, in module order."""
        self._slots = self._find_slots(source)
        self._held: dict[str, int] = dict.fromkeys(self._slots, 0)
        self._skeleton: dict[str, list[Tensor | None]] = {}
        self._tied = self._find_tied()
        self._shared: dict[int, Tensor] = {}
        """What is in memory of parts that share tensors, by the skeleton's."""
        first = next(iter(model.parameters()))
        self._anchor = next(
            part for part, slots in self._slots.items() if any(getattr(s.module, s.table).get(s.name) is first for s in slots)
        )

    @property
    def num_bytes(self) -> int:
        """Of all tensors as they are read."""
        return sum(self._size(slot) for slots in self._slots.values() for slot in slots)

    @property
    def most_bytes(self) -> int:
        """Of the largest part."""
        return max(sum(map(self._size, slots)) for slots in self._slots.values())

    def parts(self) -> list[str]:
        """Module paths of all parts, in module order."""
        return list(self._slots)

    def slots(self, part: str) -> list[Slot]:
        """A part's tensors."""
        return list(self._slots[part])

    def own_tensors(self, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """State-dict names of a part's tensors, with their shapes and dtypes when they are read; none that an earlier part has, too."""
        first: dict[int, str] = {}
        for slots in self._slots.values():
            for slot in slots:
                first.setdefault(id(self._skeleton_of(slot)), slot.path)
        own = [slot for slot in self._slots[part] if first[id(self._skeleton_of(slot))] == slot.path]
        return {slot.path: (self._files.infos[slot.key].shape, self._dtype_of(slot)) for slot in own}

    def ties(self) -> list[tuple[Slot, Slot]]:
        """Slots whose tensor an earlier slot has, too, each with that one; before any tensor is replaced."""
        first: dict[int, Slot] = {}
        pairs = [(slot, first.setdefault(id(self._skeleton_of(slot)), slot)) for slots in self._slots.values() for slot in slots]
        return [(slot, owner) for slot, owner in pairs if slot is not owner]

    def saved_name(self, name: str) -> str:
        """The name in a checkpoint's files of a tensor of the model, one that was not read (a router's) included, as ``save_pretrained``
        chooses it."""
        if not self._is_renamed:
            return name
        from transformers.core_model_loading import revert_weight_conversion

        (saved,) = revert_weight_conversion(cast(Any, self.model), {name: torch.empty(0, device="meta")})
        return str(saved)

    def part_of(self, path: str) -> str:
        """The block that a module lies in; the module itself where it lies in none."""
        return next((block for block in self.blocks if f"{path}.".startswith(f"{block}.")), path)

    @contextmanager
    def loaded(self, part: str) -> Iterator[None]:
        """Inside, a part's tensors are in memory; afterwards they are gone, and so is what was changed in them."""
        self._enter(part)
        try:
            yield
        finally:
            self._leave(part)

    @contextmanager
    def on_demand(self, *, hold: bool = False) -> Iterator[None]:
        """Inside, the model runs: each part is read when its forward begins and gone when it ends.

        Args:
            hold: parts other than blocks stay until the ``with`` ends, and blocks are not read: nothing may run them.
        """
        with ExitStack() as stack:
            stack.enter_context(self.loaded(self._anchor))  # whoever asks where the model is looks at its first parameter
            if hold:
                for part in self._slots:
                    if part not in self.blocks:
                        module = self.model.get_submodule(part)
                        stack.callback(module.register_forward_pre_hook(partial(self._hold, stack, part)).remove)
            else:
                self._hook(stack, self.parts())
            yield

    def check(self) -> str:
        """Read everything once.

        Returns:
            A checksum of the weights.

        Raises:
            CheckpointError: a tensor holds NaN or infinity.
        """
        checksum = 0
        for part in self._slots:
            for slot in self._slots[part]:
                tensor = self._read(slot)
                check_finite_tensor(tensor, slot.path, self.source)
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                checksum = zlib.crc32(raw, checksum)
        return f"{checksum:08x}"

    def _hook(self, stack: ExitStack, parts: Sequence[str]) -> None:
        for part in parts:
            module = self.model.get_submodule(part)
            stack.callback(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)).remove)
            stack.callback(module.register_forward_hook(lambda *_, part=part: self._leave(part), always_call=True).remove)

    def _hold(self, stack: ExitStack, part: str, *_: object) -> None:
        if not self._held[part]:
            stack.enter_context(self.loaded(part))

    def _enter(self, part: str) -> None:
        for one in self._tied[part]:
            self._held[one] += 1
            if self._held[one] == 1:
                self._load(one)

    def _leave(self, part: str) -> None:
        for one in self._tied[part]:
            self._held[one] -= 1
            if not self._held[one]:
                self._unload(one)

    def _load(self, part: str) -> None:
        slots = self._slots[part]
        bare = self._skeleton[part] = [self._skeleton_of(slot) for slot in slots]
        for slot, tensor in zip(slots, bare, strict=True):
            if (loaded := self._shared.get(id(tensor))) is None:
                loaded = self._read(slot).to(self._device)
                loaded = nn.Parameter(loaded, requires_grad=False) if slot.table == "_parameters" else loaded
            if len(self._tied[part]) > 1:  # others are not kept here: whoever replaces them wants their memory
                self._shared[id(tensor)] = loaded
            getattr(slot.module, slot.table)[slot.name] = loaded
        self._lay_out(part)

    def _unload(self, part: str) -> None:
        for slot, tensor in zip(self._slots[part], self._skeleton.pop(part), strict=True):
            self._shared.pop(id(tensor), None)
            getattr(slot.module, slot.table)[slot.name] = tensor
        self._lay_out(part)

    def _find_tied(self) -> dict[str, list[str]]:
        """Of each part those that share a tensor with it, itself among them: they are in memory together, and the tensor once."""
        parts_of: dict[int, list[str]] = {}
        for part, slots in self._slots.items():
            for slot in slots:
                parts_of.setdefault(id(self._skeleton_of(slot)), []).append(part)
        found: dict[str, list[str]] = {part: [part] for part in self._slots}
        for parts in parts_of.values():
            for part in parts:
                found[part] += [other for other in parts if other not in found[part]]
        return found

    def _lay_out(self, part: str) -> None:
        """An executor remembers the weights that it last ran with, and would keep them in memory."""
        if part in self.blocks:
            for module in self.model.get_submodule(part).modules():
                if isinstance(module, MoEFFN):
                    module.lay_out()

    def _read(self, slot: Slot) -> Tensor:
        return self._files.read(slot.key).to(self._dtype_of(slot))

    def _dtype_of(self, slot: Slot) -> torch.dtype:
        stored = self._files.infos[slot.key].dtype
        if not stored.is_floating_point:
            return stored
        return stored if self._dtype is None else self._dtype

    def _size(self, slot: Slot) -> int:
        return torch.Size(self._files.infos[slot.key].shape).numel() * self._dtype_of(slot).itemsize

    def _skeleton_of(self, slot: Slot) -> Tensor | None:
        return getattr(slot.module, slot.table)[slot.name]  # type: ignore[no-any-return] # of a dict of tensors

    def _find_slots(self, source: str) -> dict[str, list[Slot]]:
        keys, self._is_renamed, computed = file_keys(self.model, list(self._files.infos))
        if computed is not None:
            raise UnsupportedModelError(
                f"'{computed}' is not a tensor of {type(self.model).__name__}: transformers computes its own from such while it loads; "
                "convert without --stream."
            )
        tied = tied_names(self.model)
        slots: dict[str, list[Slot]] = {}
        missing, mismatched = [], []
        for path, module in self.model.named_modules(remove_duplicate=False):
            part = self.part_of(path)
            for table in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, table).items():
                    if tensor is None or (table == "_buffers" and name in module._non_persistent_buffers_set):
                        continue
                    full = f"{path}.{name}".lstrip(".")
                    key = next((keys[other] for other in (full, *tied.get(id(tensor), ())) if other in keys), None)
                    if key is None:
                        if table == "_parameters":
                            missing.append(full)
                        continue
                    if self._files.infos[key].shape != tuple(tensor.shape):
                        mismatched.append((full, self._files.infos[key].shape, tuple(tensor.shape)))
                    slots.setdefault(part, []).append(Slot(module, table, name, full, key))
        check_complete({"missing_keys": missing, "mismatched_keys": mismatched}, source, type(self.model).__name__)
        owners: dict[int, str] = {}
        for part, members in slots.items():
            for slot in members:
                tensor = getattr(slot.module, slot.table)[slot.name]
                other = owners.setdefault(id(tensor), part)
                if other != part and {other, part} & set(self.blocks):
                    raise UnsupportedModelError(
                        f"'{other}' and '{part}' share '{slot.path}', so neither runs alone; convert without --stream."
                    )
        return slots


def open_streamed(source: str, *, dtype: torch.dtype, device: torch.device | None = None) -> tuple[StreamedModel, Any]:
    """A dense checkpoint as a skeleton and its files, in eval mode, and its tokenizer or processor; no weight is read.

    Args:
        source: folder with safetensors files.
        dtype: of the weights.
        device: where they are to run.

    Raises:
        CheckpointError, UnsupportedModelError: as `load_model` and `StreamedModel`; also a source that is no folder.
    """
    register()
    where = Path(source).expanduser()
    if source.endswith(".gguf") or not (where.is_dir() or where.exists()):
        raise CheckpointError(
            f"'{source}' is no folder; --stream reads safetensors files from a folder: download them first (hf download)."
        )
    located, _ = locate(source)
    processor = load_processor(located, {}, source)
    config = load_config(located, {}, source)
    cls = model_class_of(config, source)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and any(stored.get(kind) for kind in ("sites", "channels", "projections")):
        raise UnsupportedModelError(
            f"'{source}' is converted already, thinned, or has replaced layers; --stream reads plain dense checkpoints."
        )
    paths = weight_files(where)
    check_headers(cls, config, paths, source=source)
    model = skeleton(cls, config, dtype=dtype)
    if any(p in name for name, _ in model.named_parameters() for p in _fp32_patterns(model, dtype)):
        raise UnsupportedModelError(
            f"{cls.__name__} keeps some weights in float32 whatever the others are; use --dtype float32 with --stream."
        )
    restore_activations(model)
    return StreamedModel(model.eval(), TensorFiles(paths), dtype=dtype, device=device, source=source), processor


def checkpoint_numbers(source: str) -> int | None:
    """How many floating numbers a local checkpoint's files hold; None where ``source`` is no folder with such files."""
    where = Path(source).expanduser()
    if source.endswith(".gguf") or not (where / "config.json").is_file():
        return None
    infos = TensorFiles([path for path in weight_files(where) if path.is_file()]).infos.values()
    return sum(torch.Size(info.shape).numel() for info in infos if info.dtype.is_floating_point)


def block_names(model: nn.Module) -> list[str]:
    """The elements of the list of layers that holds most of a model's parameters; of lists within lists the outer one.

    Raises:
        UnsupportedModelError: there is none, or another list of layers, so that FFNs there would be missed (encoder-decoders, two towers).
    """
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = sum(p.numel() for p in module.parameters())
    if not lists or not max(lists.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of layers that could be read one at a time; convert without --stream."
        )
    largest = max(lists, key=lambda path: lists[path])
    if other := next((path for path in lists if path != largest and _has_layers(model.get_submodule(path))), None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has several stacks of layers ('{largest}', '{other}'), and one can be read a layer at a time; convert "
            "without --stream."
        )
    return [f"{largest}.{name}" for name, _ in model.get_submodule(largest).named_children()]


def _has_layers(stack: nn.Module) -> bool:
    """Whether an element of a list could hold an FFN."""
    return any(sum(isinstance(m, nn.Linear) or is_transposed(m) for m in element.modules()) > 1 for element in stack.children())


def _fp32_patterns(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Parts of names whose tensors a family keeps in float32: in float16, or in any half type."""
    if dtype is torch.float32:
        return []
    strict = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return strict + (list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else [])
