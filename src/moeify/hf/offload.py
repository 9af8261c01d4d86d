"""A converted model whose experts stay on the disk: only those that a token selects are read.

The projections of every FFN are written once into files of their own, a row for each neuron (a checkpoint has down projections by output,
where an expert's numbers lie F apart), and mapped into memory. The kernels read rows of selected experts, so only their pages come into the
page cache, where they stay as long as the system has room. Rows of selected experts are asked for before the kernels begin: one fault after
the other would wait for the disk each time.
"""

import ctypes
import json
import mmap
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import remove_folder
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..kernels import DispatchPlan
from ..layers import MoEFFN, moe_layers
from ..sites import linear_weight
from ..sites.site import is_transposed
from .load import (
    check_finite_tensor,
    load_config,
    load_processor,
    locate,
    model_class_of,
    read_manifest,
    take_generation_config,
    weight_files,
)
from .registration import register
from .shards import TensorFiles
from .skeleton import check_headers, skeleton
from .streamed import StreamedModel

_MARK = "offload.json"
_RANDOM, _WILLNEED = 1, 3  # of madvise


def load_offloaded(source: str | Path, folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A converted model on the CPU whose FFNs' matrices are mapped from files, in eval mode, and its tokenizer or processor.

    Peak memory while loading: what is not in FFNs, and one block. Afterwards everything but the FFNs is in memory, and of these what was
    read lately and the system has room for. For inference: nothing has a gradient.

    Args:
        source: folder that `moeify convert` wrote, with floating weights.
        folder: new folder for the files, as large as the FFNs; what is there of the same checkpoint and dtype is used as it is.
        dtype: of the weights; None as the checkpoint has them. Routers stay fp32.

    Returns:
        The model, and its tokenizer or processor; None where the source has neither.

    Raises:
        CheckpointError: as `load_model`; or ``folder`` is something else's, or cannot be written.
        UnsupportedModelError: int8 weights, replaced or thinned layers, or as `StreamedModel`.
    """
    from .quantizer import MoeifyConfig, MoeifyQuantizer

    register()
    name, folder = str(source), Path(folder)
    where, options = locate(name)
    if options or not Path(where).is_dir():
        raise CheckpointError(f"'{name}' is no folder; give one that `moeify convert` wrote.")
    manifest = read_manifest(Path(where))
    if manifest.has_int8 or manifest.channels or manifest.projections:
        raise UnsupportedModelError(
            f"'{name}' has int8 weights, thinned or replaced layers; experts on the disk are floating ones of FFNs."
        )
    processor, config = load_processor(where, {}, name), load_config(where, {}, name)
    paths = weight_files(Path(where))
    dtype = dtype or _dtype_of(config)
    cls = model_class_of(config, name)
    check_headers(cls, config, paths, source=name)
    model: Any = skeleton(cls, config, dtype=dtype).eval()
    quantizer = MoeifyQuantizer(MoeifyConfig(manifest))
    take_generation_config(model, where)
    with torch.device("meta"):  # routers are as large as the manifest says, until the files' headers are compared with it
        quantizer._process_model_before_weight_loading(model, checkpoint_files=[str(path) for path in paths])
    streamed = StreamedModel(model, TensorFiles(paths), dtype=None, source=name)
    state = {
        "dtype": str(dtype),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "sites": [layer.site.name for layer in moe_layers(model).values()],
        "sizes": {
            file: linear_weight(model.get_submodule(path)).numel() * dtype.itemsize for path, (file, _) in _matrix_files(model).items()
        },
    }
    is_there = _open(folder, state)
    owned = {part: streamed.own_tensors(part).keys() for part in streamed.parts()}
    ties = streamed.ties()
    try:
        for part, own in owned.items():
            if own:
                _load_part(streamed, part, folder, own, dtype=dtype, write=not is_there)
        (folder / _MARK).write_text(json.dumps(state))
    except OSError as error:
        raise CheckpointError(f"cannot write '{folder}': {error.strerror or error}; free space or choose another folder.") from error
    for slot, owner in ties:
        getattr(slot.module, slot.table)[slot.name] = getattr(owner.module, owner.table)[owner.name]
    model.hf_quantizer = quantizer
    quantizer._process_model_after_weight_loading(model)
    for layer in moe_layers(model).values():
        layer.fetch = partial(_ask_for, layer)
    return model, processor


def _load_part(streamed: StreamedModel, part: str, folder: Path, own: Container[str], *, dtype: torch.dtype, write: bool) -> None:
    """Keep a part's ``own`` tensors in memory but the matrices of FFNs, which are written, if need be, and mapped."""
    files = _matrix_files(streamed.model)
    kept: list[tuple[nn.Module, str, str, Tensor]] = []
    with streamed.loaded(part):
        for slot in streamed.slots(part):
            if slot.path not in own:
                continue
            path, _, name = slot.path.rpartition(".")
            tensor = getattr(slot.module, slot.table)[slot.name].detach()
            check_finite_tensor(tensor, slot.path, streamed.source)
            if ".moe.router." not in slot.path and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if path in files and name == "weight":
                file, is_down = folder / files[path][0], files[path][1]
                linear = slot.module
                rows = linear_weight(linear).t() if is_down else linear_weight(linear)
                if write:
                    with file.open("wb") as out:
                        out.write(rows.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
                mapped = _map(file, tuple(rows.shape), dtype)
                tensor = mapped.t() if is_transposed(linear) != is_down else mapped
            kept.append((slot.module, slot.table, slot.name, tensor))
    for module, table, name, tensor in kept:
        getattr(module, table)[name] = nn.Parameter(tensor, requires_grad=False) if table == "_parameters" else tensor


def _matrix_files(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Of each matrix of an FFN, by its module's path, the name of its file and whether it is a down projection."""
    return {
        path: (f"{i:04d}-{path.rpartition('.')[2]}", path == layer.site.down)
        for i, layer in enumerate(moe_layers(model).values())
        for path in (*layer.site.first, layer.site.down)
    }


def _map(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A file as a tensor whose pages are read when they are touched."""
    tensor = torch.from_file(str(path), shared=False, size=torch.Size(shape).numel(), dtype=dtype).view(*shape)
    _advise(tensor.data_ptr(), tensor.nbytes, _RANDOM)  # neighbours of a selected expert are not wanted
    return tensor


def _open(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the folder has the files of this very checkpoint, none of them cut; it is ours and empty if not."""
    mark = folder / _MARK
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not mark.is_file()):
            raise CheckpointError(f"'{folder}' is in the way and holds no {_MARK}; choose another folder.")
        if mark.is_file():
            try:
                if json.loads(mark.read_text()) == state and all(_size(folder / file) == size for file, size in state["sizes"].items()):
                    return True
            except ValueError:
                pass
            remove_folder(folder, last=_MARK)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("{}")
    return False


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def _ask_for(layer: MoEFFN, plan: DispatchPlan) -> None:
    """Tell the system which rows come next; what it has already costs a call for each run of experts."""
    experts = plan.mask_TE.any(0).nonzero()[:, 0].tolist()
    runs: list[list[int]] = []
    for e in experts:
        if runs and runs[-1][1] == e:
            runs[-1][1] = e + 1
        else:
            runs.append([e, e + 1])
    weights = layer.weights()
    for rows_FD in (weights.gate_FD, weights.up_FD, weights.down_FD):
        if rows_FD is not None:
            row = rows_FD.stride(0) * rows_FD.element_size()
            for start, stop in runs:
                first, end = layer.bounds[start], layer.bounds[stop]
                _advise(rows_FD.data_ptr() + first * row, (end - first) * row, _WILLNEED)


def _advise(address: int, length: int, advice: int) -> None:
    madvise = _libc_madvise()
    if madvise is not None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), advice)


def _libc_madvise() -> Any:
    """None where the system has none; then its own reading ahead has to do."""
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None


def _dtype_of(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"config.json: dtype {dtype!r} is none of torch's.")
    return dtype or torch.float32
