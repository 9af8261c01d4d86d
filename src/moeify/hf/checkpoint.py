"""Loads models of any source and writes converted ones, whole or not at all.

transformers is imported where it is used: it takes seconds, and this module's errors and output checks need none of it.
"""

import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._config import did_you_mean
from .._files import remove_folder, sync
from .._progress import NO_PROGRESS, Progress
from .._random import seeded
from ..convert import Manifest, stamp
from ..errors import CheckpointError, MoeifyError, UnsupportedModelError
from .registration import QUANT_METHOD, register

MANIFEST_FILE = "moeify.json"
"""The manifest and how it was calibrated, beside the checkpoint that convert writes."""
TRAINING_FILE = "sparsify.json"
"""How a dense checkpoint was trained, beside the one that sparsify writes."""

PRETRAINING_FILE = "pretrain.json"
"""How a model was pre-trained, beside the checkpoint that pretrain writes."""

_MOST_JSON = 2**28
"""Bytes of a JSON file of a checkpoint; tens of megabytes are the knobs and presets of a model of thousands of layers."""
EXPORT_FILE = "export.json"
"""What an export is of and how it was checked, beside the files that export writes."""

_MARKERS = (MANIFEST_FILE, TRAINING_FILE, PRETRAINING_FILE, EXPORT_FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    auto_class: Any = None,
    new_head: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> tuple[Any, Any]:
    """A model, in eval mode, and its tokenizer or processor.

    Args:
        source: Hub id, folder (dense or converted), or ``.gguf`` file.
        dtype: of the weights, "auto" as the checkpoint has them; routers stay fp32, and int8 weights int8.
        auto_class: transformers class to load with; None takes the one that the checkpoint's config names.
        new_head: config entries (``num_labels``, ...) of a head that the checkpoint lacks: what ``auto_class`` has beside the base model
            may then be missing in the files, or have other shapes there, and is drawn anew. None: every tensor must be there.
        seed: of what is drawn.
        progress: told of the tokenizer, the weights and the check of each tensor.

    Returns:
        The model, and its tokenizer or processor; None where the source has neither.

    Raises:
        CheckpointError: nothing there, the Hub cannot be reached, files truncated, pickled, foreign or without some of the model's tensors,
            NaN or infinity in the weights, or a manifest that does not fit.
        UnsupportedModelError: transformers does not know the family, or the weights are quantised.
    """
    register()
    source = os.fspath(source)
    where, options = locate(source)
    file_options = {key: value for key, value in options.items() if key == "gguf_file"}
    with progress.task(f"read the tokenizer of {source}", total=1) as task:
        config = load_config(where, file_options, source)
        cls = model_class_of(config, source) if auto_class is None else auto_class
        processor = load_processor(where, file_options, source)  # before the weights: a bad one is found at once
        task.advance(1)
    with progress.task(f"load {source}", total=1) as task, seeded(seed):
        try:
            # Shapes that differ are let through here: `check_complete` names the tensor, transformers' own error does not.
            model, info = cls.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
                **(new_head or {}),
            )
        except MoeifyError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(f"'{source}': {_first_line(error)}") from error
        task.advance(1)
    if new_head is not None and (prefix := model.base_model_prefix):
        info = {
            key: [entry for entry in info[key] if _name_of(entry).startswith(f"{prefix}.")] for key in ("missing_keys", "mismatched_keys")
        }
    check_complete(info, source, type(model).__name__)
    _check_finite(model, source, progress=progress)
    return model.eval(), processor


def model_class(source: str | os.PathLike[str]) -> Any:
    """The transformers class that `load_model` takes, from the config alone.

    Raises:
        MoeifyError: as `load_model`, as far as the config shows it.
    """
    register()
    source = os.fspath(source)
    where, options = locate(source)
    return model_class_of(load_config(where, {key: value for key, value in options.items() if key == "gguf_file"}, source), source)


def save_checkpoint(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    calibration: Mapping[str, Any],
    card: str,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a converted model: checkpoint, tokenizer, ``moeify.json`` and ``README.md``; all of it, or nothing.

    Args:
        model: converted model.
        processor: tokenizer or processor to save beside it, or None.
        out: new folder.
        calibration: how the rules were set and what was measured; JSON values. Library versions are added.
        card: text of the model card, from `moeify.hf.card.model_card`.
        overwrite: replace ``out`` where it holds an earlier conversion; the old one is deleted only when the new one is complete.
        progress: told when everything is on the disk under its name.

    Raises:
        CheckpointError: ``out`` is in the way, or cannot be written (disk full); nothing has changed then.
        UnsupportedModelError: the model is dense.
    """
    manifest = stamp(model)
    record = {**manifest.to_dict(), "calibration": {**calibration, "versions": library_versions()}}
    with progress.task(f"save {out}", total=1) as task:
        with whole_folder(out, overwrite=overwrite) as partial:
            (partial / MANIFEST_FILE).write_text(json.dumps(record, indent=2) + "\n")
            _save(model, processor, partial)
            (partial / "README.md").write_text(card)
        task.advance(1)


def save_dense(model: nn.Module, processor: Any, out: Path) -> None:
    """Write a dense model and its tokenizer; all of it, or nothing.

    Raises:
        CheckpointError: ``out`` exists and is not empty, or cannot be written.
    """
    with whole_folder(out, overwrite=False) as partial:
        _save(model, processor, partial)


def save_trained(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    record: Mapping[str, Any],
    card: str,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a dense model that was trained, its tokenizer, ``sparsify.json`` and ``README.md``; all of it, or nothing.

    Args:
        model: dense model.
        processor: tokenizer or processor to save beside it, or None.
        out: new folder.
        record: how it was trained and what was measured; JSON values.
        card: text of the model card.
        overwrite: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    with progress.task(f"save {out}", total=1) as task:
        with whole_folder(out, overwrite=overwrite, marker=TRAINING_FILE) as partial:
            (partial / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
            _save(model, processor, partial)
            (partial / "README.md").write_text(card)
        task.advance(1)


def save_pretrained_run(
    model: nn.Module,
    processor: Any,
    out: Path,
    *,
    record: Mapping[str, Any],
    card: str,
    calibration: Mapping[str, Any] | None = None,
    beside: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a model that was pre-trained, its tokenizer, ``pretrain.json``, ``README.md`` and its logs; all of it, or nothing.

    Args:
        model: dense or converted model.
        processor: tokenizer to save beside it.
        out: new folder.
        record: how it was trained and what was measured; JSON values.
        card: text of the model card.
        calibration: of a converted model, as in `save_checkpoint`: ``moeify.json`` is written, too.
        beside: files and folders to copy.
        overwrite: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    with progress.task(f"save {out}", total=1) as task:
        with whole_folder(out, overwrite=overwrite, marker=PRETRAINING_FILE) as partial:
            (partial / PRETRAINING_FILE).write_text(json.dumps(record, indent=1) + "\n")
            if calibration is not None:
                whole = {**stamp(model).to_dict(), "calibration": {**calibration, "versions": library_versions()}}
                (partial / MANIFEST_FILE).write_text(json.dumps(whole, indent=2) + "\n")
            _save(model, processor, partial)
            (partial / "README.md").write_text(card)
            for path in beside:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, partial / path.name)
        task.advance(1)


@contextmanager
def exported_folder(out: Path, *, overwrite: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write an export into, and the record of it, which becomes ``export.json``; all of it takes the name ``out``, or nothing.

    Raises:
        CheckpointError: as in `save_checkpoint`.
    """
    with whole_folder(out, overwrite=overwrite, marker=EXPORT_FILE) as partial:
        record: dict[str, Any] = {}
        yield partial, record
        (partial / EXPORT_FILE).write_text(json.dumps({**record, "versions": library_versions()}, indent=2) + "\n")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder before any work is done for it; first `recover` what a killed save left.

    Raises:
        CheckpointError: ``out`` exists, is not empty and may not be replaced, its parent cannot be written, or a name beside it that saving
            needs is taken.
    """
    recover(out)
    if out.is_dir():
        if any(out.iterdir()):
            is_ours = _marker_of(out) is not None
            if not overwrite:
                way_out = "--overwrite replaces it, or choose another --out" if is_ours else "choose another --out"
                raise CheckpointError(f"the output folder '{out}' exists and is not empty; {way_out}.")
            if not is_ours:
                raise CheckpointError(
                    f"'{out}' holds no {' or '.join(_MARKERS)}, so it is not an earlier conversion and is not replaced; "
                    "choose another --out."
                )
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"the output '{out}' is a file; choose another --out.")
    for leftover in _names_beside(out):
        _check_leftover(leftover)
    check_writable(next(p for p in out.absolute().parents if p.exists()), out)


def check_apart(out: Path, source: str | os.PathLike[str]) -> None:
    """Refuse an output folder that is the source, lies in it, or holds it: a source is never written to, nor replaced.

    Raises:
        CheckpointError: it does; names both.
    """
    folder, new = Path(source).expanduser().resolve(), out.expanduser().resolve()
    if folder.is_dir() and new.is_relative_to(folder):
        where = "is the source" if new == folder else f"lies in the source '{source}'"
        raise CheckpointError(f"the output folder '{out}' {where}, which is never written to; choose another --out.")
    if folder.exists() and folder.is_relative_to(new):
        raise CheckpointError(f"the output folder '{out}' holds the source '{source}', which is never replaced; choose another --out.")


def check_writable(folder: Path, out: Path) -> None:
    """Make a nameless file in ``folder``: permissions alone do not tell (a read-only file system, root).

    Raises:
        CheckpointError: it is no folder, or nothing can be written in it; ``out`` is what the user named.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' is not a folder that can be written ({error.strerror}); choose another --out than '{out}'."
        ) from error


def recover(out: Path) -> None:
    """Undo or finish a replacement of ``out`` that was killed: the earlier conversion gets its name back, or goes where the new one has it.

    Nothing happens where no replacement was under way.
    """
    replaced = _names_beside(out)[1]
    if (marker := _marker_of(replaced)) is None:
        if replaced.is_dir() and not any(replaced.iterdir()):
            replaced.rmdir()  # killed when all but the folder was deleted
        return
    if out.is_dir() and any(out.iterdir()):
        remove_folder(replaced, last=marker)
    elif not out.exists() or out.is_dir():
        if out.is_dir():
            out.rmdir()
        replaced.rename(out)


def read_calibration(directory: Path) -> dict[str, Any]:
    """The ``calibration`` record of a converted checkpoint's ``moeify.json``.

    Raises:
        CheckpointError: no such file, not JSON, a newer schema or no such record.
    """
    path = directory / MANIFEST_FILE
    try:
        record = _read_bounded(path)
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"'{directory}' has no {MANIFEST_FILE}; is it a folder that `moeify convert` wrote?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {_first_line(error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get("calibration"), dict):
        raise CheckpointError(f"'{path}' has no 'calibration' record; convert the model again.")
    Manifest.from_dict({k: v for k, v in record.items() if k != "calibration"}, where=str(path))
    calibration: dict[str, Any] = record["calibration"]
    return calibration


def read_manifest(directory: Path) -> Manifest:
    """The manifest in the ``config.json`` of a converted checkpoint: unlike ``moeify.json`` it has the rules that were set since.

    Raises:
        CheckpointError: no such file, not JSON, of a dense model, or a manifest that cannot be read.
    """
    path = directory / "config.json"
    try:
        config = _read_bounded(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {_first_line(error)}") from error
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    # Without a site and a channel it only makes from_pretrained restore activations.
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD or not (stored.get("sites") or stored.get("channels")):
        raise CheckpointError(f"'{path}' is of a dense model; convert it first.")
    return Manifest.from_dict({k: v for k, v in stored.items() if k != "quant_method"}, where=str(path))


def library_versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    found = {}
    for name in ("moeify", "torch", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _name_of(entry: Any) -> str:
    """Tensor of an entry of transformers' loading info: a name, or a name with two shapes."""
    return str(entry if isinstance(entry, str) else entry[0])


# -- loading -------------------------------------------------------------------------------------------------------------------------


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Where transformers is to look, and with which options."""
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        return _gguf_options(path)
    if path.is_dir():
        _check_folder(path)
        return str(path), {}
    if path.exists() or not _HUB_ID.fullmatch(source):
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"'{source}' {what}; give the folder of a checkpoint, a .gguf file or a Hub id such as 'org/name'.")
    return source, {}


def _gguf_options(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist; give the path of a .gguf file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"'{path}' is not a GGUF file; download it again.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(f"'{path}': reading GGUF needs the package '{package}'; pip install 'moeify[gguf]'.")
    from gguf import GGUFReader
    from transformers import GgufConfig

    try:
        GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"'{path}' is truncated or damaged ({_first_line(error)}); download it again.") from error
    return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def _check_folder(path: Path) -> None:
    """What can be said about a local checkpoint before transformers touches it: the errors are clearer, and no pickle is opened."""
    config_file = path / "config.json"
    if not config_file.is_file():
        near = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "it is empty"
        raise CheckpointError(f"'{path}' has no config.json, so it is not a Hugging Face checkpoint ({near}).")
    try:
        config = _read_bounded(config_file)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"'{config_file}' is not JSON: {_first_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{config_file}' is not a JSON object.")
    weights = weight_files(path)
    if not weights:
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise CheckpointError(
                f"'{path}' has only pickled weights ({pickled[0]}), which can run code; moeify reads safetensors: "
                "convert them with a tool that you trust."
            )
        raise CheckpointError(f"'{path}' has no model.safetensors.")
    for file in weights:
        if not file.is_file():
            raise CheckpointError(f"'{path}' lacks the shard {file.name} that its index names; download it again.")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"'{file}' is truncated or not a safetensors file ({_first_line(error)}); download or save it again."
            ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, there or not; none where neither a single file nor an index is.

    Raises:
        CheckpointError: the index is none, or names something else than safetensors files beside it.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(_read_bounded(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{index}' is not an index of safetensors shards.") from error
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name and "\\" not in name):
            raise CheckpointError(f"'{index}' names the shard {str(name)[:200]!r}, which is no safetensors file of this folder.")
    return [path / name for name in names]


def _read_bounded(path: Path) -> Any:
    """The JSON value of a file of a checkpoint, of bearable size: sizes are of whoever wrote it.

    Raises:
        CheckpointError: too large to be read.
        OSError, ValueError: as reading JSON.
    """
    if path.stat().st_size > _MOST_JSON:
        raise CheckpointError(f"'{path}' has {path.stat().st_size} bytes; no checkpoint needs more than {_MOST_JSON}.")
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def load_config(where: str, options: Mapping[str, Any], source: str) -> Any:
    """The config of what `locate` found; ``source`` is what the user called it.

    Raises:
        CheckpointError, UnsupportedModelError: there is none, it is damaged, of an unknown family, or of quantised weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    config_file = Path(where) / "config.json"
    if not options and config_file.is_file():
        family = json.loads(config_file.read_text()).get("model_type")
        if family not in CONFIG_MAPPING:
            near = did_you_mean(str(family), CONFIG_MAPPING.keys()) if family else "."
            near = near if near.startswith("; did") else "."
            raise UnsupportedModelError(f"'{source}': transformers does not know the model family {family!r} of its config.json{near}")
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except OSError as error:
        if Path(where).is_dir():
            raise CheckpointError(f"'{source}': {_first_line(error)}") from error
        raise CheckpointError(
            f"'{source}' is not a folder here, and the Hugging Face Hub did not give it ({_first_line(error)}); "
            "check the name and the network."
        ) from error
    except MoeifyError:
        raise
    except StrictDataclassError as error:
        raise CheckpointError(f"'{source}': config.json: {_first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"'{source}': {_first_line(error)}") from error
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    if method not in (None, QUANT_METHOD):
        raise UnsupportedModelError(f"'{source}' has weights quantised by {method}; moeify needs floating-point weights.")
    return config


def model_class_of(config: Any, source: str) -> Any:
    """The transformers class that a config names, or that its family is made for.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    import transformers

    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is None:
            raise UnsupportedModelError(
                f"'{source}': transformers {transformers.__version__} has no class {name}; models with code of their own are not supported."
            )
        return cls
    # GGUF files and hand-made configs name no class: what the family is made for.
    for mapping, cls in (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
    ):
        if type(config) in mapping:
            return cls
    return transformers.AutoModel


def take_generation_config(model: Any, where: str | os.PathLike[str]) -> None:
    """The ``generation_config.json`` of a checkpoint's folder becomes that of a model that was built from its config alone; without such
    a file the model keeps its own.

    Raises:
        CheckpointError: the file is damaged.
    """
    from transformers import GenerationConfig

    if model.can_generate() and (path := Path(where).expanduser() / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path.parent)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}': {_first_line(error)}") from error


def check_complete(info: Mapping[str, Any], source: str, cls: str) -> None:
    """transformers fills missing tensors with random numbers and only logs it."""
    for name, found, expected in sorted(info["mismatched_keys"], key=lambda entry: str(entry[0])):
        raise CheckpointError(
            f"'{source}': the tensor '{name}' has shape {tuple(found)}, {cls} has {tuple(expected)}: config.json is of another model."
        )
    # Sentence encoders are often saved without the pooler that their class has and that they do not use.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise CheckpointError(
            f"'{source}' lacks {len(missing)} tensors of {cls}, first '{missing[0]}': its weights are of another model, or incomplete."
        )


def _check_finite(model: nn.Module, source: str, *, progress: Progress) -> None:
    parameters = dict(model.named_parameters())
    with progress.task(f"check {source}", total=len(parameters)) as task:
        for name, parameter in parameters.items():
            check_finite_tensor(parameter, name, source)
            task.advance(1)


def check_finite_tensor(tensor: Tensor, name: str, source: str) -> None:
    """Refuse NaN and infinity, with the tensor's name."""
    # aminmax passes NaN on and, unlike isfinite, needs no copy of the tensor
    if tensor.is_floating_point() and tensor.numel() and not all(torch.isfinite(x) for x in torch.aminmax(tensor.detach())):
        raise CheckpointError(f"'{source}': the tensor '{name}' has NaN or infinite values; the checkpoint is damaged.")


def load_processor(where: str, options: Mapping[str, Any], source: str) -> Any:
    """The tokenizer or processor of what `locate` found; None where it has neither.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoProcessor, AutoTokenizer

    try:
        if options:
            return AutoTokenizer.from_pretrained(where, **options)
        if any(_has_file(where, name) for name in _PROCESSOR_FILES):
            return AutoProcessor.from_pretrained(where)
        if any(_has_file(where, name) for name in _TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # the tokenizers library raises Exception itself, its callers KeyError and others
        raise CheckpointError(
            f"'{source}': the tokenizer or processor cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return None


def _has_file(where: str, name: str) -> bool:
    if Path(where).is_dir():
        return (Path(where) / name).is_file()
    from transformers.utils.hub import cached_file

    return cached_file(where, name, _raise_exceptions_for_missing_entries=False) is not None


def _first_line(error: BaseException) -> str:
    """What an exception says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# -- saving --------------------------------------------------------------------------------------------------------------------------


def _save(model: Any, processor: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)


@contextmanager
def whole_folder(out: Path, *, overwrite: bool, marker: str = MANIFEST_FILE) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the body has ended without an error, and vanishes otherwise.

    Same parent, so same file system: the rename is atomic. Files reach the disk before the name does.
    """
    check_output(out, overwrite=overwrite)
    out = out.absolute()
    partial, replaced = _names_beside(out)
    done = False
    try:
        if partial.exists():
            remove_folder(partial, last=_marker_of(partial) or marker)
        partial.mkdir(parents=True)
        (partial / marker).touch()  # says that the folder is ours, see _check_leftover
        yield partial
        is_dense = (partial / marker).stat().st_size == 0
        _sync_all(partial)
        if out.exists() and any(out.iterdir()):
            out.rename(replaced)
        partial.rename(out)
        done = True
        if is_dense:
            (out / marker).unlink()
        sync(out.parent)
    except MoeifyError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write '{out}': {_reason(error)}; nothing was changed.") from error
    finally:
        with suppress(OSError):  # the next run's check_output repeats it
            if not done and partial.exists():
                remove_folder(partial, last=marker)
            recover(out)


def _names_beside(out: Path) -> tuple[Path, Path]:
    """Where a new ``out`` is written, and where an earlier one is kept while the new one takes its name."""
    out = out.absolute()
    return out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced-by-moeify")


def _marker_of(folder: Path) -> str | None:
    """The file that says that moeify wrote a folder; None where it did not."""
    return next((name for name in _MARKERS if (folder / name).is_file()), None)


def _check_leftover(folder: Path) -> None:
    """A killed save leaves folders of its own: they may go. Anything else of that name may not."""
    if folder.exists() and not (folder.is_dir() and (_marker_of(folder) is not None or not any(folder.iterdir()))):
        raise CheckpointError(f"'{folder}' is in the way and was not written by moeify; move it, or choose another --out.")


def _sync_all(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in (*names, ""):  # the folder itself at the end
            sync(Path(folder) / name)


def _reason(error: Exception) -> str:
    """Why writing failed; safetensors' errors carry the system's number only in their text."""
    text = _first_line(error)
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or "No space left" in text or any(f"os error {number})" in text for number in full):
        return "the disk is full"
    return text
