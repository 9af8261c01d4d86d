"""From a converted or thinned checkpoint to the same with int8 weights."""

from pathlib import Path
from typing import Any

from .._progress import NO_PROGRESS, Progress
from ..errors import CheckpointError, UnsupportedModelError
from ..hf.folders import check_output
from ..hf.load import load_model, read_calibration, read_manifest
from ..hf.save import save_checkpoint
from ..layers import moe_layers
from ..quantize import quantize
from .convert import card_of
from .names import torch_dtype
from .thin import thin_card_of


def quantize_checkpoint(
    directory: str | Path, out: Path, *, dtype: str = "auto", overwrite: bool = False, progress: Progress = NO_PROGRESS
) -> dict[str, Any]:
    """Give the experts of a converted checkpoint, or the sparse layers of a thinned one, int8 weights; everything else is unchanged.

    Args:
        directory: folder that `moeify convert` or `moeify thin` wrote; never written to, unless it is ``out``.
        out: new folder; written whole or not at all.
        dtype: of all other weights, "float32", "bfloat16" or "float16"; "auto" as they are.
        overwrite: replace an earlier conversion at ``out``.
        progress: told of loading and saving.

    Returns:
        What ``moeify.json`` holds under "calibration": that of ``directory`` with "weights", "int8_errors" by FFN or layer
        (`quantize`), and "measured" under "measured_float", for quality was measured with floating weights; `moeify sweep` measures
        again.

    Raises:
        CheckpointError: no converted checkpoint, or ``out`` is in the way or cannot be written.
        UnsupportedModelError: it has int8 weights already.
    """
    directory = Path(directory)
    if directory.is_file():
        raise CheckpointError(f"'{directory}' is a file; give the folder that `moeify convert` wrote (which reads .gguf files).")
    if read_manifest(directory).has_int8:
        raise UnsupportedModelError(f"'{directory}' has int8 weights already.")
    calibration = read_calibration(directory)
    for key in ("source", "measured"):
        if key not in calibration:
            raise CheckpointError(f"the calibration record of '{directory}' lacks '{key}'; convert the model again.")
    check_output(out, overwrite=overwrite)
    model, processor = load_model(directory, dtype="auto" if dtype == "auto" else torch_dtype(dtype), progress=progress)
    errors = quantize(model)
    record = {**calibration, "weights": "int8", "int8_errors": errors, "measured_float": calibration["measured"], "measured": None}
    is_thinned = not moe_layers(model)
    card = thin_card_of(model, record, name=out.name) if is_thinned else card_of(model, record, name=out.name)
    save_checkpoint(model, processor, out, calibration=record, card=card, overwrite=overwrite, progress=progress)
    return record
