"""A checkpoint through lm-evaluation-harness, offline, with what it cost beside the results.

Tasks are lm-eval's own by name, YAML files of its format, or files of multiple-choice questions, of which tasks are made here. YAML from
others can run code: by functions (``!function``), by templates, which lm-eval renders without a sandbox, by metrics that are paths of
scripts, and by data sets with scripts or pickles. Unless the caller trusts them, templates are rendered in Jinja's sandbox here, and files
may name nothing but lm-eval's own metrics and data in formats that are read as data.
"""

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .._progress import NO_PROGRESS, Progress
from ..channels import record_channels, sparse_inputs
from ..controls import record_active, set_mode, set_rule
from ..errors import ConfigError, DataError, MoeifyError
from ..evaluate import model_cost, model_weights
from ..hf.folders import check_writable
from ..hf.inputs import example_inputs
from ..hf.load import load_model
from ..hf.save import library_versions
from ..layers import moe_layers
from .names import torch_device, torch_dtype

_DATA = {".jsonl": "json", ".parquet": "parquet"}
_YAML = (".yaml", ".yml")
_QUESTION = "{{query.rstrip()}}{% if query.startswith('Question:') or '\\nQuestion:' in query %}\nAnswer:{% endif %}"
_TRIMMED = "{{%s | map('trim') | list}}"
_FORMATS: dict[frozenset[str], dict[str, Any]] = {
    frozenset({"query", "choices", "gold"}): {
        "doc_to_text": _QUESTION,
        "doc_to_choice": _TRIMMED % "choices",
        "doc_to_target": "{{gold | int}}",
    },
    frozenset({"ctx", "endings", "label"}): {
        "doc_to_text": "{{ctx.rstrip()}}",
        "doc_to_choice": _TRIMMED % "endings",
        "doc_to_target": "{{label | int}}",
    },
    frozenset({"context_options", "continuation", "gold"}): {  # the contexts differ, what follows them is scored
        "doc_to_text": "{{gold | int}}",
        "doc_to_choice": _TRIMMED % "context_options",
        "doc_to_target": "{{continuation.strip()}}",
    },
}
"""Columns of a file of questions, and what lm-eval makes of them."""
_FORMATS_OF_DATA = ("json", "parquet", "csv", "text")
"""Readers of `datasets` that run nothing of what they read; "pandas" unpickles, and any other name is a folder or of the Hub."""
_KEYS_OF_DATA = ("data_files", "split", "name")
_RUN_CODE = ("class", "custom_dataset", "use_prompt", "group", "task_list", "unsafe_code")
"""Keys by which lm-eval calls what they name, renders templates of other files, or reads other tasks."""
_MOST_YAML = 1_000_000
"""Bytes of a task file."""


def evaluate_checkpoint(
    directory: str | os.PathLike[str],
    *,
    tasks: Sequence[str],
    preset: str | None = None,
    dense: bool = False,
    limit: int | None = None,
    batch_size: int = 1,
    trust_tasks: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    out: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Evaluate a language model on tasks of lm-evaluation-harness, without the network.

    Args:
        directory: converted, thinned or dense checkpoint with its tokenizer.
        tasks: names of lm-eval's own tasks, whose data must be in the cache of `datasets`; ``.yaml`` files of its format; ``.jsonl`` and
            ``.parquet`` files of questions with the columns query, choices, gold, or ctx, endings, label, or context_options,
            continuation, gold; folders of such files.
        preset: of the checkpoint, or None for its own rules.
        dense: evaluate the model's dense mode, too.
        limit: most examples of each task.
        batch_size: sequences of a forward. Above 1 shorter ones are padded, and padding counts in the active fraction.
        trust_tasks: let YAML files call Python functions and scripts, and their templates anything.
        dtype: of the weights.
        device: where the model runs.
        out: where the result is written as JSON.
        progress: told of each evaluation.

    Returns:
        JSON values: ``results`` by "moe" (and "dense"), each with the metrics of every task and their number of examples; ``cost`` while
        the tasks ran, of the dense model's: ``active_fraction`` (of neurons; None without MoE layers), ``kept_channels`` (None without
        layers that skip some), ``ffn_flops_fraction``, ``flops_fraction``, ``read_bytes_fraction`` of a decoded token, and
        ``params_fraction``, all parameters of the dense model's (routers make it more than 1); the options, the tasks' checksums and the
        versions.

    Raises:
        DataError: a file is none of the known formats, or a task cannot be run.
        ConfigError: no task, an unknown one or an unknown preset.
        CheckpointError: as `load_model`.
        MoeifyError: lm-eval is missing.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    if out is not None:
        check_writable(next(p for p in out.absolute().parents if p.exists()), out)
    files, names = find_tasks(tasks)
    _check_installed()
    if not trust_tasks:
        _check_datasets()
    with _offline():
        configs = {path: task_config(path, trust=trust_tasks) for path in files}
        titles = [str(config["task"]) for config in configs.values()] + names
        if len(set(titles)) < len(titles):
            raise ConfigError(f"there are two tasks named {next(t for t in titles if titles.count(t) > 1)!r}; rename a file.")
        model, tokenizer = load_model(directory, dtype=torch_dtype(dtype))
        if tokenizer is None or not model.can_generate():
            raise DataError(f"'{directory}' is no language model with a tokenizer; lm-eval's tasks are of text.")
        model.to(torch_device(device))
        if preset is not None:
            set_rule(model, preset)
        is_ours = bool(moe_layers(model) or sparse_inputs(model))
        modes = ["moe", "dense"] if dense and is_ours else ["moe" if is_ours else "dense"]
        found: dict[str, Any] = {}
        cost: dict[str, Any] = {}
        with ExitStack() as stack:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            if not trust_tasks:
                stack.enter_context(_sandboxed_templates())
            for mode in modes:
                set_mode(model, "dense" if mode == "dense" else "moe")
                with progress.task(f"evaluate {directory} ({mode})", total=1) as task:
                    with record_active(model) as active, record_channels(model) as channels:
                        found[mode] = _run(model, tokenizer, configs, names, limit=limit, batch_size=batch_size, cache=Path(cache))
                    if mode == "moe":
                        kept = active.per_layer() | {name: 1 - share for name, share in channels.per_layer().items()}
                        cost = _cost(model, kept) | {
                            "active_fraction": active.active_fraction() if moe_layers(model) else None,
                            "kept_channels": 1 - channels.skipped_frac() if sparse_inputs(model) else None,
                        }
                    task.advance(1)
    record = {
        "model": str(directory),
        "preset": preset,
        "limit": limit,
        "batch_size": batch_size,
        "dtype": dtype,
        "results": found,
        "cost": cost,
        "tasks": {str(config["task"]): hashlib.sha256(path.read_bytes()).hexdigest() for path, config in configs.items()},
        "versions": library_versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def find_tasks(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files of tasks, folders opened, and what is left: names of lm-eval's own.

    Raises:
        ConfigError: nothing is named, or a folder has no such file.
        DataError: a path does not exist, or is of no known kind.
    """
    files: list[Path] = []
    names = []
    for entry in filter(None, (task.strip() for task in tasks)):
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in (*_DATA, *_YAML) and not p.name.startswith(("_", ".")))
            if not inside:
                raise ConfigError(f"'{path}' has no file of tasks ({', '.join((*_YAML, *_DATA))}).")
            files += inside
        elif path.suffix in (*_DATA, *_YAML) or os.sep in entry:
            if path.suffix not in (*_DATA, *_YAML) or not path.is_file():
                raise DataError(f"'{entry}' is no file of tasks ({', '.join((*_YAML, *_DATA))}) and no folder.")
            files.append(path)
        else:
            names.append(entry)
    if not files and not names:
        raise ConfigError("--tasks names no task; give a folder, files, or names of lm-eval's tasks.")
    return files, names


def task_config(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """lm-eval's configuration of one file, of questions or YAML.

    Args:
        path: of the file. Relative paths of data in a YAML file are from its folder.
        trust: let YAML name what runs code.

    Raises:
        DataError: unknown columns, no YAML of one task, or something that can run code and is not trusted.
    """
    if path.suffix in _YAML:
        config = _read_yaml(path, trust=trust, seen=())
        if not isinstance(config.get("task"), str):
            raise DataError(f"'{path}' is not the configuration of one task (it has no 'task' with a name); groups are not read.")
        if not trust and (what := _untrusted(config)):
            raise DataError(f"'{path}': {what}, which can run code; --trust-tasks lets it, if you have read the file and what it names.")
        kwargs = config.get("dataset_kwargs")
        if isinstance(kwargs, dict) and isinstance(kwargs.get("data_files"), dict):
            config["dataset_kwargs"] = {**kwargs, "data_files": {k: _beside(path, v) for k, v in kwargs["data_files"].items()}}
        return config
    columns = _columns(path)
    options = next((options for needed, options in _FORMATS.items() if needed <= columns), None)
    if options is None:
        wanted = "; ".join(", ".join(sorted(needed)) for needed in _FORMATS)
        raise DataError(f"'{path}' has the columns {', '.join(sorted(columns)) or 'none'}; questions have one of: {wanted}.")
    kinds = ("acc",) if "context_options" in columns else ("acc", "acc_norm")
    return {
        "task": path.stem,
        "dataset_path": _DATA[path.suffix],
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": kind, "aggregation": "mean", "higher_is_better": True} for kind in kinds],
        "metadata": {"version": 1.0},
        **options,
    }


def _untrusted(config: Mapping[str, Any]) -> str | None:
    """What of a task can run code, or read data that does; None if nothing. Functions and templates are seen to elsewhere."""
    if key := next((key for key in _RUN_CODE if config.get(key)), None):
        return f"it has the key {key!r}"
    kind, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if kind is not None and kind not in _FORMATS_OF_DATA:
        return f"dataset_path {str(kind)[:200]!r} is none of {', '.join(_FORMATS_OF_DATA)}"
    if not isinstance(options, dict) or set(options) - set(_KEYS_OF_DATA):
        return f"dataset_kwargs have other keys than {', '.join(_KEYS_OF_DATA)}"
    if address := next((text for text in _texts(options) if "::" in text or "://" in text), None):
        return f"its data is at the address {address[:200]!r}"
    entries = config.get("metric_list") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return "metric_list is no list of metrics"
    if not entries:
        return None
    import lm_eval.api.metrics  # noqa: F401 - fills the tables
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    for entry in entries:
        if "hf_evaluate" in entry:
            return "a metric has the key 'hf_evaluate'"
        for key, known in (("metric", METRIC_REGISTRY), ("aggregation", AGGREGATION_REGISTRY)):
            name = entry.get(key)
            if (name is not None or key == "metric") and (not isinstance(name, str) or name not in known):
                return f"the {key} {str(name)[:200]!r} is not lm-eval's own"
    return None


def _texts(value: Any) -> Iterator[str]:
    """All strings in lists and dicts, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(list(pair))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _columns(path: Path) -> frozenset[str]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"'{path}' is parquet: pip install 'moeify[data]'.") from error
        try:
            return frozenset(pyarrow.parquet.read_schema(path).names)
        except (OSError, ValueError) as error:
            raise DataError(f"'{path}' is not a parquet file ({' '.join(str(error).split())[:200]}).") from error
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(_MOST_YAML)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"'{path}': its first line is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"'{path}': its first line is not a JSON object.")
    return frozenset(row)


def _read_yaml(path: Path, *, trust: bool, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A task file with what it includes, local keys first, as lm-eval merges them."""
    import yaml

    if path.resolve() in seen:
        raise DataError(f"'{path}' includes itself.")
    if path.stat().st_size > _MOST_YAML:
        raise DataError(f"'{path}' is larger than a task's file ({_MOST_YAML} bytes).")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML without Python objects; functions as lm-eval reads them where they are trusted."""

    def function(loader: Any, node: Any) -> Any:
        name = loader.construct_scalar(node)
        if not trust:
            raise DataError(f"'{path}' runs Python code (!function {name}); --trust-tasks lets it, if you have read it.")
        from lm_eval.utils import import_function

        return import_function(loader, node, path)

    Loader.add_constructor("!function", function)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, dict):
        raise DataError(f"'{path}' is not the configuration of a task.")
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read_yaml(path.parent / str(name), trust=trust, seen=(*seen, path.resolve()))
    return merged | config


def _beside(path: Path, entry: Any) -> Any:
    if isinstance(entry, list):
        return [_beside(path, one) for one in entry]
    return str((path.parent / entry).resolve()) if isinstance(entry, str) and "://" not in entry else entry


def _check_installed() -> None:
    try:
        importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise MoeifyError(f"evaluation needs lm-evaluation-harness ({error}); pip install 'moeify[eval]'.") from error


def _check_datasets() -> None:
    """Data sets of lm-eval's own tasks come from the cache; before version 4 `datasets` runs scripts that it finds there."""
    version = importlib.metadata.version("datasets")
    if int(version.partition(".")[0]) < 4:
        raise MoeifyError(f"datasets {version} can run scripts of data sets; pip install 'datasets>=4', or --trust-tasks.")


def _run(
    model: Any,
    tokenizer: Any,
    configs: Mapping[Path, Mapping[str, Any]],
    names: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    cache: Path,
) -> dict[str, Any]:
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # tells of a model that is no name, and of folders without git
    datasets.disable_progress_bars()
    tasks: list[Any] = [dict(config) for config in configs.values()]
    for config in tasks:
        config["dataset_kwargs"] = {"cache_dir": str(cache), **(config.get("dataset_kwargs") or {})}
    try:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[*tasks, *names],
            limit=limit,
            bootstrap_iters=0,  # its default takes minutes for an error bar
            log_samples=False,
            task_manager=TaskManager(include_defaults=bool(names)),
        )
    except MoeifyError:
        raise
    except Exception as error:  # whatever a task's file or data make lm-eval, datasets and Jinja raise
        raise DataError(f"the tasks cannot be run: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    assert found is not None
    results: dict[str, Any] = {}
    for name, metrics in found["results"].items():
        # "acc,none": metric and filter; standard errors are not computed without a bootstrap
        plain = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float) and "_stderr" not in key}
        results[name] = {**plain, "examples": found.get("n-samples", {}).get(name, {}).get("effective")}
    return results


def _cost(model: Any, kept: Mapping[str, float]) -> dict[str, Any]:
    inputs = {key: value.to(model.device) for key, value in example_inputs(model).items()}
    cost, weights = model_cost(model, inputs), model_weights(model)
    routers = sum(p.numel() for moe in moe_layers(model).values() for p in moe.router.parameters())
    total = sum(p.numel() for p in model.parameters())
    return {
        "ffn_flops_fraction": cost.ffn_flops_fraction(kept),
        "flops_fraction": cost.flops_fraction(kept),
        "read_bytes_fraction": weights.read_bytes_fraction(kept),
        "params_fraction": total / (total - routers),
    }


@contextmanager
def _offline() -> Iterator[None]:
    """The Hub is not asked, by nobody: libraries read the variables when they are imported, and have names of their own afterwards."""
    variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    places = (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"))
    before = {name: os.environ.get(name) for name in variables}
    loaded = [(sys.modules[module], name, getattr(sys.modules[module], name, None)) for module, name in places if module in sys.modules]
    os.environ.update(dict.fromkeys(variables, "1"))
    for module, name, _ in loaded:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in loaded:
            setattr(module, name, value)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """lm-eval renders templates of tasks in Jinja's sandbox: they read a question, and reach nothing else."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not hasattr(utils, "env"):
        raise MoeifyError("this lm-eval renders templates in a way that is not known here; --trust-tasks goes on without a sandbox.")
    open_env = utils.env
    env = ImmutableSandboxedEnvironment(loader=open_env.loader, undefined=open_env.undefined, keep_trailing_newline=True)
    env.filters.update(open_env.filters)
    utils.env = env
    try:
        yield
    finally:
        utils.env = open_env
