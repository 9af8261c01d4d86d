"""A model without its weights, and whether a checkpoint's files are those of it: told from their headers, before memory is taken.

transformers fills what the files lack, or have in another shape, with random numbers of the sizes that config.json asks for.
"""

import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .._random import seeded
from ..errors import CheckpointError, MoeifyError
from ..manifest import Manifest
from .folders import first_line
from .registration import QUANT_METHOD
from .shards import TensorFiles

_TENSORS_OVER_FILES = 16
"""Parameters of a model for each tensor in its files, at most: few are taken apart while they are loaded, and into few."""
_FEW_TENSORS = 1024
_FEW_NUMBERS = 2**28
"""Beside twice what the files have: of parameters that are computed while they are loaded."""
_MOST_TABLE_BYTES = 2**32
"""Of buffers that no file holds: positions, masks."""
_NO_MODEL = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""How a family's code says that it cannot work with the sizes and names that it was given."""


def skeleton(cls: Any, config: Any, *, dtype: torch.dtype) -> Any:
    """A transformers model whose parameters are on the meta device and whose buffers are real: those that no file holds (rotary
    frequencies, masks) are what the family's own code computes."""

    def on_meta(parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    with _registering(on_meta):  # what accelerate's init_empty_weights does, too
        model = _build(cls, config, dtype=dtype)
    model.tie_weights()
    return model


def check_headers(cls: Any, config: Any, paths: Sequence[Path], *, source: str, new_head: Mapping[str, Any] | None = None) -> None:
    """Refuse files that are not those of the model that a config describes, before a weight is read or memory taken for one.

    The model is built on the meta device, converted as its manifest says, and names and shapes of its parameters are compared with the
    files' headers. What transformers computes from tensors of other names while it loads cannot be told by names; `check_complete` finds
    that afterwards.

    Args:
        cls: transformers class, or auto class.
        config: of the checkpoint; it is not changed.
        paths: its safetensors files.
        source: name of the checkpoint, for errors.
        new_head: as in `load_model`: what lies beside the base model is not compared.

    Raises:
        CheckpointError: a parameter is missing or has another shape; a file is damaged; the config describes no model, or one of sizes
            that the files cannot have; the manifest does not fit.
    """
    infos = TensorFiles(list(paths)).infos
    config = copy.deepcopy(config)
    for field, value in (new_head or {}).items():
        setattr(config, field, value)
    most = _TENSORS_OVER_FILES * len(infos) + _FEW_TENSORS
    model = _on_meta(cls, config, paths, source=source, most=most)
    held = set(model.state_dict())
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in held)
    if tables > _MOST_TABLE_BYTES:
        raise CheckpointError(
            f"'{source}': config.json asks for {tables / 1e9:.1f} GB of tables that no file holds (positions, masks); no model has as much."
        )
    keys, _, computed = file_keys(model, list(infos))
    tied = tied_names(model)
    missing: dict[str, int] = {}
    mismatched: list[tuple[str, tuple[str, tuple[int, ...], tuple[int, ...]]]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = next((keys[other] for other in (name, *tied.get(id(parameter), ())) if other in keys), None)
        if key is None:
            missing[name] = parameter.numel()
        elif infos[key].shape != tuple(parameter.shape):
            mismatched.append((key, (name, infos[key].shape, tuple(parameter.shape))))
    made = sum(missing.values())
    if missing or mismatched:
        renamed = renamed_by_transformers(model, list(infos))
        if renamed is None or computed is not None:
            missing = {}  # they may be made of others
        mismatched = [] if renamed is None else [pair for pair in mismatched if not renamed[pair[0]][1]]
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = {name: size for name, size in missing.items() if not any(pattern.search(name) for pattern in ignored)}
    in_files = sum(torch.Size(one.shape).numel() for one in infos.values())
    if not missing and made > 2 * in_files + _FEW_NUMBERS:
        raise CheckpointError(f"'{source}': config.json asks for {made} numbers beside those of its files, which hold {in_files}.")
    info: dict[str, list[Any]] = {"missing_keys": list(missing), "mismatched_keys": [entry for _, entry in mismatched]}
    check_complete(info if new_head is None else of_base(info, model), source, type(model).__name__)


def check_complete(info: Mapping[str, Any], source: str, cls: str) -> None:
    """Refuse a checkpoint of which transformers' loading info names missing or mismatched tensors; transformers itself only logs them.

    Raises:
        CheckpointError: names the first.
    """
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


def of_base(info: Mapping[str, Iterable[Any]], model: Any) -> dict[str, list[Any]]:
    """Of missing and mismatched tensors those of the model under a head; all of them where the model has no such part."""
    prefix = f"{model.base_model_prefix}.".lstrip(".")
    return {key: [entry for entry in info[key] if _name_of(entry).startswith(prefix)] for key in ("missing_keys", "mismatched_keys")}


def _name_of(entry: Any) -> str:
    """Tensor of an entry of transformers' loading info: a name, or a name with two shapes."""
    return str(entry if isinstance(entry, str) else entry[0])


def file_keys(model: nn.Module, keys: Sequence[str]) -> tuple[dict[str, str], bool, str | None]:
    """How a checkpoint's files call a model's tensors.

    Args:
        model: on any device.
        keys: names of all tensors in the files.

    Returns:
        The name in the files of every tensor of the model that is there under a name that can be told; whether transformers had to tell
        one; and one of the files' tensors that transformers computes others from while it loads, if there is any.
    """
    names = set(model.state_dict())
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".lstrip(".")
    found: dict[str, str] = {}
    for key in keys:
        for name in (key, key.removeprefix(prefix), f"{prefix}{key}"):
            if name in names:
                found.setdefault(name, key)
                break
    renamed = (renamed_by_transformers(model, keys) or {}) if names - set(found) else {}
    computed = next((key for key, (_, is_computed) in renamed.items() if is_computed and key not in names), None)
    more = {name: key for key, (name, is_computed) in renamed.items() if not is_computed and name in names and name not in found}
    return found | more, bool(more), computed


def renamed_by_transformers(model: nn.Module, keys: Sequence[str]) -> dict[str, tuple[str, bool]] | None:
    """What transformers takes each tensor of the files for: the name in the model, and whether it computes something from it rather than
    taking it as it is. None where this transformers does not say."""
    try:  # not public
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    rules = get_model_conversion_mapping(cast(Any, model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), cast(Any, model).base_model_prefix or None
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        found[key] = (str(name), pattern is not None)
    return found


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """Names of each tensor that has several, by the tensor's id."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return {key: names for key, names in found.items() if len(names) > 1}


def _on_meta(cls: Any, config: Any, paths: Sequence[Path], *, source: str, most: int) -> Any:
    """The model of a config, converted as its manifest says, all of it on the meta device.

    Raises:
        CheckpointError: it has more than ``most`` parameters, which ends its making; or there is no such model.
    """
    count = 0

    def counted(parameter: nn.Parameter) -> nn.Parameter:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(f"'{source}': config.json asks for more than {most} tensors, which is more than its files can fill.")
        return parameter

    stored = getattr(config, "quantization_config", None)
    with seeded(0), warnings.catch_warnings(), torch.device("meta"), _registering(counted):
        warnings.simplefilter("ignore")  # whoever loads the model afterwards warns of the same
        try:
            model = _build(cls, config, dtype=torch.float32)
        except MoeifyError:
            raise
        except _NO_MODEL as error:
            raise CheckpointError(f"'{source}': there is no {cls.__name__} as config.json describes it: {first_line(error)}") from error
        if isinstance(stored, Mapping) and stored.get("quant_method") == QUANT_METHOD:
            from .quantizer import MoeifyConfig, MoeifyQuantizer

            fields = {key: value for key, value in stored.items() if key != "quant_method"}
            manifest = Manifest.from_dict(fields, where="config.json: quantization_config")
            quantizer = MoeifyQuantizer(MoeifyConfig(manifest))
            quantizer._process_model_before_weight_loading(model, checkpoint_files=[str(path) for path in paths])
        model.tie_weights()
    return model


def _build(cls: Any, config: Any, *, dtype: torch.dtype) -> Any:
    build = getattr(cls, "_from_config", None) or partial(cls.from_config, trust_remote_code=False)
    own = getattr(cls, "config_class", None)
    if own is not None and not isinstance(config, own):  # the text model of a composite config, whose part from_pretrained takes, too
        config = next((part for key in config.sub_configs if isinstance(part := getattr(config, key, None), own)), config)
    return build(config, dtype=dtype)


@contextmanager
def _registering(change: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Inside, what modules of this thread register as parameters goes through a function."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def changed(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            parameter = change(parameter)
        register(module, name, parameter)

    cast(Any, nn.Module).register_parameter = changed
    try:
        yield
    finally:
        cast(Any, nn.Module).register_parameter = register
