"""What heads read of the training examples, captured in one pass of the frozen model: their training is then minutes of small products.

Letters: N examples (times views) that are read, F features: the widths of all places together.

    <folder>/run.json        what tells this capture from another
    <folder>/features.bf16   rows of F numbers
    <folder>/labels.i64      a class each
    <folder>/state.json      rows that are whole
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._progress import NO_PROGRESS, Progress
from ..errors import CheckpointError, DataError
from ..sites.probe import eval_mode
from ..train.loop import TrainingData
from ..train.state import open_state
from .places import Left, Place, Token, pooled, to_device, visited

_STATE = "state.json"
_BATCH = 64


class Features:
    """Captured rows as training data: batches of "x_NF" in fp32 and "labels".

    Args:
        rows_NF: bfloat16 as int16, in memory or mapped from a file; of the rows that were asked for.
        labels_N: class of each.
        read_N: their numbers among all rows, rising; None: all.
        total: number of all rows.
    """

    def __init__(self, rows_NF: Any, labels_N: Tensor, *, read_N: Tensor | None = None, total: int | None = None) -> None:
        self.rows_NF, self.labels_N, self._total = rows_NF, labels_N, len(labels_N) if total is None else total
        self._read_N = torch.arange(self._total) if read_N is None else read_N

    def __len__(self) -> int:
        """Of all rows: the order of training follows from it."""
        return self._total

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """The rows as they were captured; nothing is drawn. A row that was not asked for is an IndexError."""
        wanted = torch.as_tensor(rows)
        at = torch.searchsorted(self._read_N, wanted)
        if len(self._read_N) == 0 or bool((self._read_N[at.clamp(max=len(self._read_N) - 1)] != wanted).any()):
            raise IndexError("a row was not captured.")
        x_NF = torch.from_numpy(np.ascontiguousarray(self.rows_NF[at.numpy()])).view(torch.bfloat16).float()
        return {"x_NF": x_NF, "labels": self.labels_N[at]}


@torch.no_grad()
def capture_features(
    model: nn.Module,
    data: TrainingData,
    places: Sequence[Place],
    *,
    token: Token,
    num_classes: int,
    views: int = 1,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    folder: Path | None = None,
    run: Mapping[str, Any] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Features:
    """Read the pooled token of every place for every example that training will ask for, in bfloat16 (2^-9 relative rounding).

    Args:
        model: the frozen classifier, run in eval mode up to the last place; left as it was.
        data: sequences with a class each.
        places: where heads will be.
        token: what they read.
        num_classes: C; labels are checked against it.
        views: passes over the data. With random augmentation each is another draw of every example; without, one is all there is.
        seed: of what ``data`` draws.
        rows: numbers of the rows (view times examples + example) that will be read, rising; others are not run through the model. What is
            drawn and how texts are padded is as for all rows. None: all.
        folder: where to keep them, 2 F bytes a row; a killed capture goes on after its last whole batch. None keeps them in memory.
        run: JSON object that tells this capture from others.
        progress: told the rows.

    Raises:
        DataError: no example, labels that are no classes, or features that are not finite.
        CheckpointError: ``folder`` holds another capture or something else, or cannot be written.
    """
    total, width = views * len(data), sum(place.d_model for place in places)
    if total == 0:
        raise DataError("the training data has no example.")
    read_N = torch.arange(total) if rows is None else torch.as_tensor(rows)
    made_from = {**(run or {}), **({} if rows is None else {"rows": hashlib.sha256(read_N.numpy().tobytes()).hexdigest()[:16]})}
    kept = _Memory() if folder is None else _Files(folder, made_from, width=width)
    starts = [(view * len(data), start) for view in range(views) for start in range(0, len(data), _BATCH)]
    seen = 0
    with eval_mode(model), kept, progress.task("read features", total=len(read_N)) as task:
        task.advance(kept.done)
        for first, start in starts:
            stop = min(start + _BATCH, len(data))
            inside_B = read_N[(read_N >= first + start) & (read_N < first + stop)] - first - start
            seen += len(inside_B)
            if len(inside_B) == 0 or seen <= kept.done:
                continue
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + first + start)
            batch = {name: value[inside_B] for name, value in data.batch(range(start, stop), generator=generator).items()}
            rows_BF = read_places(model, batch, places, token=token)
            if not rows_BF.isfinite().all():
                raise DataError("a hidden state of the model holds NaN or infinity: its weights are damaged, or its dtype overflows.")
            kept.add(rows_BF, _classes(batch, num_classes))
            task.advance(len(inside_B))
    return kept.features(read_N, total, width)


def read_places(model: nn.Module, batch: Mapping[str, Tensor], places: Sequence[Place], *, token: Token) -> Tensor:
    """(B, F) pooled tokens of all places side by side, from a forward that ends at the last of them."""
    seen: list[Tensor] = []

    def visit(i: int, hidden_BSD: Tensor) -> None:
        seen.append(pooled(hidden_BSD, batch.get("attention_mask"), token))
        if i == len(places) - 1:
            raise Left

    with visited(model, places, visit), suppress(Left):
        model(**to_device({name: value for name, value in batch.items() if name != "labels"}, model))
    return torch.cat(seen, dim=1)


def _classes(batch: Mapping[str, Tensor], num_classes: int) -> Tensor:
    labels_B = batch.get("labels")
    if labels_B is None or labels_B.dim() != 1 or labels_B.is_floating_point():
        found = "none" if labels_B is None else f"{labels_B.dtype} of shape {tuple(labels_B.shape)}"
        raise DataError(f"early exit needs one class id per example as 'labels', got {found}.")
    if not ((labels_B >= 0) & (labels_B < num_classes)).all():
        raise DataError(f"labels must be in [0, {num_classes}), got {int(labels_B.min())} to {int(labels_B.max())}.")
    return labels_B.long().cpu()


class _Memory:
    """Rows in memory."""

    done = 0

    def __init__(self) -> None:
        self._rows: list[np.ndarray[Any, Any]] = []
        self._labels: list[Tensor] = []

    def __enter__(self) -> "_Memory":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, rows_BF: Tensor, labels_B: Tensor) -> None:
        self._rows.append(_as_int16(rows_BF))
        self._labels.append(labels_B)

    def features(self, read_N: Tensor, total: int, _width: int) -> Features:
        return Features(np.concatenate(self._rows), torch.cat(self._labels), read_N=read_N, total=total)


class _Files:
    """Rows on disk; what a killed process wrote beyond its last whole batch is cut off."""

    def __init__(self, folder: Path, run: Mapping[str, Any], *, width: int) -> None:
        open_state(folder, {"features": dict(run)})
        self._folder, self._paths = folder, (folder / "features.bf16", folder / "labels.i64")
        self._bytes = (2 * width, 8)
        state = folder / _STATE
        self.done = int(json.loads(state.read_text())["rows"]) if state.exists() else 0
        # A file can be shorter than the state says if the machine, not only the process, went down.
        if any(not path.exists() or path.stat().st_size < self.done * size for path, size in zip(self._paths, self._bytes, strict=True)):
            self.done = 0

    def __enter__(self) -> "_Files":
        for path, size in zip(self._paths, self._bytes, strict=True):
            path.touch()
            os.truncate(path, self.done * size)
        self._sinks = [path.open("ab") for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def add(self, rows_BF: Tensor, labels_B: Tensor) -> None:
        try:
            for sink, rows in zip(self._sinks, (_as_int16(rows_BF), labels_B.numpy()), strict=True):
                sink.write(rows.tobytes())
                sink.flush()
            self.done += len(labels_B)
            temporary = self._folder / f"{_STATE}.new"
            temporary.write_text(json.dumps({"rows": self.done}))
            temporary.replace(self._folder / _STATE)
        except OSError as error:
            raise CheckpointError(
                f"cannot write '{self._folder}': {error.strerror}; a row needs {sum(self._bytes)} bytes. Free space and run again."
            ) from error

    def features(self, read_N: Tensor, total: int, width: int) -> Features:
        rows_NF = np.memmap(self._paths[0], dtype=np.int16, mode="r", shape=(len(read_N), width))
        labels_N = torch.from_numpy(np.fromfile(self._paths[1], dtype=np.int64, count=len(read_N)))
        return Features(rows_NF, labels_N, read_N=read_N, total=total)


def _as_int16(rows_BF: Tensor) -> np.ndarray[Any, Any]:
    return rows_BF.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
