"""Loads models of any source, dense and converted, and says in one line why one cannot be.

transformers is imported where it is used: it takes seconds, and most of this module's errors need none of it.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._bounds import MOST_ITEMS
from .._config import did_you_mean
from .._progress import NO_PROGRESS, Progress
from .._random import seeded
from ..errors import CheckpointError, MoeifyError, UnsupportedModelError
from ..manifest import Manifest
from .folders import MANIFEST_FILE, first_line
from .registration import QUANT_METHOD, register
from .skeleton import check_complete, check_headers, of_base

_MOST_JSON = 2**28
"""Bytes of a JSON file of a checkpoint; tens of megabytes are the knobs and presets of a model of thousands of layers."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_ADAPTER = "adapter_config.json"
_HAS_ADAPTER = (
    f"has a PEFT adapter ({_ADAPTER}) beside a model, which some loaders would put on it and others not; merge it (merge_and_unload, "
    "save_pretrained), or keep it in a folder of its own and load it with peft."
)
_RANKS_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""What transformers writes of a model that is spread over processes, and reads in place of model.safetensors."""
_COUNT = re.compile(r"layers?$|num_labels$")
"""Keys of a config whose values become lists, in the config itself."""


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
        if not options and Path(where).is_dir():
            check_headers(cls, config, weight_files(Path(where)), source=source, new_head=new_head)
        task.advance(1)
    with progress.task(f"load {source}", total=1) as task, seeded(seed):
        try:
            # Shapes that differ are let through here: `check_complete` names the tensor, transformers' own error does not. Where files are
            # local, `check_headers` has seen them.
            model, info = cls.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
                **(new_head or {}),
            )
        except MoeifyError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(f"'{source}': {_why(error)}") from error
        task.advance(1)
    if getattr(model, "_hf_peft_config_loaded", False):  # of a Hub id; the loading info is then the adapter's
        raise CheckpointError(f"'{source}' {_HAS_ADAPTER}")
    check_complete(info if new_head is None else of_base(info, model), source, type(model).__name__)
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
        raise CheckpointError(f"'{path}' cannot be read: {first_line(error)}") from error
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
        raise CheckpointError(f"'{path}' cannot be read: {first_line(error)}") from error
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    # Without a site and a channel it only makes from_pretrained restore activations.
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD or not (stored.get("sites") or stored.get("channels")):
        raise CheckpointError(f"'{path}' is of a dense model; convert it first.")
    return Manifest.from_dict({k: v for k, v in stored.items() if k != "quant_method"}, where=str(path))


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
        raise CheckpointError(f"'{path}' is truncated or damaged ({first_line(error)}); download it again.") from error
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
        raise CheckpointError(f"'{config_file}' is not JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{config_file}' is not a JSON object.")
    _check_counts(config, config_file)
    if (path / _ADAPTER).exists():
        raise CheckpointError(f"'{path}' {_HAS_ADAPTER}")
    weights = weight_files(path)
    _check_only_weights(path, config, weights)
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
                f"'{file}' is truncated or not a safetensors file ({first_line(error)}); download or save it again."
            ) from error


def _check_counts(config: Mapping[str, Any], config_file: Path) -> None:
    """Refuse numbers of layers or labels of which reading the config would make lists that fill the memory."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        for key, entry in value.items() if isinstance(value, dict) else ():
            if isinstance(entry, (int, float)) and _COUNT.search(key) and entry > MOST_ITEMS:
                raise CheckpointError(
                    f"'{config_file}': {key!r} is {entry if entry < 10**30 else 'huge'}; no model has more than {MOST_ITEMS}."
                )
        left += [entry for entry in (value.values() if isinstance(value, dict) else value) if isinstance(entry, (dict, list))]


def _check_only_weights(path: Path, config: Mapping[str, Any], weights: Sequence[Path]) -> None:
    """Refuse a folder in which transformers would read other weights than `weight_files`."""
    if shard := next((p.name for p in sorted(path.iterdir()) if _RANKS_SHARD.match(p.name)), None):
        raise CheckpointError(f"'{path}' has weights of a model that was spread over processes ({shard}); save it whole (save_pretrained).")
    read = "model.safetensors" if weights == [path / "model.safetensors"] else "model.safetensors.index.json"
    if (named := config.get("transformers_weights")) not in (None, read):
        raise CheckpointError(
            f"'{path / 'config.json'}' names other weights, {str(named)[:200]!r}; moeify reads {read}: remove that entry."
        )


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
        with _asking_nobody():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    except OSError as error:
        if Path(where).is_dir():
            raise CheckpointError(f"'{source}': {first_line(error)}") from error
        raise CheckpointError(
            f"'{source}' is not a folder here, and the Hugging Face Hub did not give it ({first_line(error)}); "
            "check the name and the network."
        ) from error
    except MoeifyError:
        raise
    except StrictDataclassError as error:
        raise CheckpointError(f"'{source}': config.json: {first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"'{source}': {_why(error)}") from error
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    if method not in (None, QUANT_METHOD):
        raise UnsupportedModelError(f"'{source}' has weights quantised by {method}; moeify needs floating-point weights.")
    named = getattr(config, "transformers_weights", None)  # of a folder `locate` has looked at it
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"'{source}': config.json names the weights {str(named)[:200]!r}, which are no safetensors file.")
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
            raise CheckpointError(f"'{path}': {first_line(error)}") from error


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
        with _asking_nobody():
            if options:
                return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
            if any(_has_file(where, name) for name in _PROCESSOR_FILES):
                return AutoProcessor.from_pretrained(where, trust_remote_code=False)
            if any(_has_file(where, name) for name in _TOKENIZER_FILES):
                return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself, its callers KeyError and others
        raise CheckpointError(f"'{source}': the tokenizer or processor cannot be loaded: {type(error).__name__}: {_why(error)}") from error
    return None


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """Inside, transformers does not ask on the terminal whether to run a checkpoint's code: it refuses. Some of its loaders lose
    ``trust_remote_code=False`` on the way to the next one, which then would ask."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # seconds for an answer
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def _why(error: Exception) -> str:
    """What an error of transformers says; it names an option that moeify has not."""
    return "it needs code of the checkpoint's own, which moeify does not run" if "trust_remote_code" in str(error) else first_line(error)


def _has_file(where: str, name: str) -> bool:
    if Path(where).is_dir():
        return (Path(where) / name).is_file()
    from transformers.utils.hub import cached_file

    return cached_file(where, name, _raise_exceptions_for_missing_entries=False) is not None
