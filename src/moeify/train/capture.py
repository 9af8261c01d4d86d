"""What each FFN of a dense model reads, spilled to disk in one pass, so that every layer can be split and fitted on its own afterwards.

Letters: T tokens, D model width, B batch, S sequence.

Holding the inputs of all layers in memory would need layers * T * D numbers; one file a site needs them on disk only, and each layer is
then read back alone. Stored as bfloat16: 2^-9 relative rounding is far below what a router can resolve.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._progress import NO_PROGRESS, Progress
from ..errors import DataError
from ..sites import mask_name, token_mask_of

_STATE = "capture.json"


class Reader(Protocol):
    """An FFN, or anything else whose input `capture_ffn_inputs` can store."""

    @property
    def name(self) -> str:
        """What the capture calls it."""

    @property
    def d_model(self) -> int:
        """Width of its input."""

    @property
    def first(self) -> tuple[str, ...]:
        """Module paths of the layers that read the input; the first one is watched."""


class _LastSiteReached(Exception):  # noqa: N818 - control flow: nothing after the last FFN is needed
    pass


@dataclass(frozen=True)
class FFNInputs:
    """A finished capture: one bfloat16 file of (T, D) rows per site, padding left out."""

    directory: Path
    widths: dict[str, int]
    """D of each site, in execution order."""
    files: dict[str, str]

    def num_tokens(self, name: str) -> int:
        """T: rows stored for a site."""
        return (self.directory / self.files[name]).stat().st_size // (2 * self.widths[name])

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> Tensor:
        """x_TD of a site, bfloat16, read into memory."""
        width = self.widths[name]
        stop = self.num_tokens(name) if stop is None else stop
        raw = np.fromfile(self.directory / self.files[name], dtype=np.int16, count=(stop - start) * width, offset=2 * start * width)
        return torch.from_numpy(raw).view(torch.bfloat16).view(-1, width)


@torch.no_grad()
def capture_ffn_inputs(
    model: nn.Module,
    sites: Sequence[Reader],
    batches: Sequence[Mapping[str, Tensor]],
    directory: Path,
    *,
    compute: torch.dtype | None = None,
    progress: Progress = NO_PROGRESS,
) -> FFNInputs:
    """Run the dense model once over ``batches`` and store the input of every FFN.

    Args:
        model: dense model; put into eval mode for the pass and back.
        sites: FFNs, or other layers, to record, in execution order.
        batches: keyword arguments of ``model``; rows where ``attention_mask`` is 0 are left out, in the decoder of an encoder-decoder those
            where ``decoder_attention_mask`` is.
        directory: where to write; a capture that was killed continues after its last whole batch.
        compute: dtype of the model's matrix products (autocast); None leaves the model's own. A family whose code does not run under
            autocast is read in its own dtype.
        progress: told the number of batches.

    Returns:
        The capture.

    Raises:
        DataError: no batch, or a site that saw no token or a non-finite input.
    """
    if not batches:
        raise DataError("no calibration batch: the data gave no tokens.")
    directory.mkdir(parents=True, exist_ok=True)
    files = {site.name: f"site{i:04d}.bf16" for i, site in enumerate(sites)}
    result = FFNInputs(directory, {s.name: s.d_model for s in sites}, files)
    state = _read_state(result, len(batches))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sinks = {name: _open_at(directory / file, state["bytes"].get(name, 0)) for name, file in files.items()}
    handles: list[RemovableHandle] = []
    try:
        try:
            calls = _count_calls(model, sites, batches[0], compute)
        except RuntimeError:  # how torch reports mixed dtypes; anything else wrong with the model shows again without autocast
            if compute is None:
                raise
            compute = None
            calls = _count_calls(model, sites, batches[0], compute)
        recorder = Recorder(sinks, calls_per_forward=calls)
        for site in sites:
            first = model.get_submodule(site.first[0])
            hook = recorder.hook(site.name, mask=mask_name(model, site))
            handles.append(first.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        with progress.task("read FFN inputs", total=len(batches)) as task:
            task.advance(state["done"])
            for i, batch in enumerate(batches[state["done"] :], start=state["done"]):
                recorder.start(batch)
                with suppress(_LastSiteReached), _autocast(model, compute):
                    model(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
                for sink in sinks.values():
                    sink.flush()
                _write_state(directory, result.widths, len(batches), done=i + 1, sizes={n: s.tell() for n, s in sinks.items()})
                task.advance(1)
    except OSError as error:
        need = f"the FFN inputs need {sum(2 * site.d_model for site in sites)} bytes a token"
        raise DataError(f"cannot write to '{directory}': {error.strerror or error}; {need}. Free space or lower max_tokens.") from error
    finally:
        for handle in handles:
            handle.remove()
        for sink in sinks.values():
            with suppress(OSError):  # the disk is still full
                sink.close()
        model.train(was_training)
    for name in files:
        if result.num_tokens(name) == 0:
            raise DataError(f"'{name}' saw no token of the calibration data; leave it out by the policy, or give inputs that reach it.")
    return result


class Recorder:
    """Writes what the hooks see, and ends each forward when the last FFN has its input: the LM head's logits would be the largest
    tensor of all. Without a number of calls it ends none."""

    def __init__(self, sinks: Mapping[str, BinaryIO], *, calls_per_forward: int | None) -> None:
        self._sinks = sinks
        self._batch: Mapping[str, Tensor] = {}
        self._calls = 0
        self._calls_per_forward = calls_per_forward

    def start(self, batch: Mapping[str, Tensor]) -> None:
        """A forward of this batch begins."""
        self._batch = batch
        self._calls = 0

    def hook(self, name: str, *, mask: str) -> Any:
        """The hook of one site; ``mask`` names the batch's entry with its padding."""
        sink = self._sinks[name]

        def record(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            x_TD = x.detach().reshape(-1, x.shape[-1])
            if (keep_T := token_mask_of(self._batch.get(mask), x.shape[:-1])) is not None:
                x_TD = x_TD[keep_T.to(x_TD.device)]
            if not torch.isfinite(x_TD).all():
                raise DataError(f"the input of '{name}' holds NaN or infinity: the model's weights are damaged, or its dtype overflows.")
            sink.write(x_TD.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            self._calls += 1
            if self._calls == self._calls_per_forward:
                raise _LastSiteReached

        return record


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (4x fp32 on AVX-512-BF16: 300 against 75 GFLOP/s a core), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # The portable check has been private in every release; without it fp32 is only slower.
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if native else torch.float32


def autocast_as(device: str, compute: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in ``compute`` on a kind of device; None and float32 leave the model's own."""
    # No cache of cast weights: it would hold half of the model once more.
    return nullcontext() if compute in (None, torch.float32) else torch.autocast(device, dtype=compute, cache_enabled=False)


def short_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a forward that costs little: one example, and of text its first tokens."""
    return {k: v[:1, :16] if v.dim() == 2 and not v.is_floating_point() else v[:1] for k, v in batch.items() if k != "labels"}


def _autocast(model: nn.Module, compute: torch.dtype | None) -> AbstractContextManager[Any]:
    return autocast_as(next(model.parameters()).device.type, compute)


def _count_calls(model: nn.Module, sites: Sequence[Reader], batch: Mapping[str, Tensor], compute: torch.dtype | None) -> int:
    """FFN calls of one forward, from a short one: layers that share weights run several times."""
    calls = 0

    def count(_module: nn.Module, _args: object) -> None:
        nonlocal calls
        calls += 1

    handles = [model.get_submodule(site.first[0]).register_forward_pre_hook(count) for site in sites]
    try:
        short = short_batch(batch)  # the number of calls does not depend on the length
        device = next(model.parameters()).device
        with _autocast(model, compute):
            model(**{k: v.to(device) for k, v in short.items()})
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first ``size`` bytes; what a killed run wrote beyond them is cut off."""
    path.touch()
    os.truncate(path, size)
    sink = path.open("r+b")
    sink.seek(size)
    return sink


def _read_state(capture: FFNInputs, num_batches: int) -> dict[str, Any]:
    path = capture.directory / _STATE
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        files = {name: capture.directory / file for name, file in capture.files.items()}
        same = state["widths"] == capture.widths and state["batches"] == num_batches
        # A file can be shorter than the state says if the machine, not only the process, went down.
        if same and all(file.exists() and file.stat().st_size >= state["bytes"][name] for name, file in files.items()):
            return state
    return {"done": 0, "bytes": {}}


def _write_state(directory: Path, widths: Mapping[str, int], num_batches: int, *, done: int, sizes: Mapping[str, int]) -> None:
    temporary = directory / (_STATE + ".new")
    temporary.write_text(json.dumps({"widths": dict(widths), "batches": num_batches, "done": done, "bytes": dict(sizes)}))
    temporary.replace(directory / _STATE)
