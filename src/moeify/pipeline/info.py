"""What a checkpoint is, from its JSON files and the headers of its safetensors: no weight is read, no model is built."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..hf.folders import EXPORT_FILE, MANIFEST_FILE, PRETRAINING_FILE, TRAINING_FILE
from ..hf.load import locate, read_calibration, weight_files
from ..hf.registration import QUANT_METHOD
from ..hf.shards import TensorFiles, TensorInfo
from ..manifest import Manifest

_MOST_BYTES = 2**28  # of a JSON file, as everywhere that checkpoints are read
_SCALES = (".weight_scale", ".channels.level_K")
_MEASURES = ("metric", "quality", "dense_quality", "kl", "ffn_flops_fraction", "flops_fraction", "bytes_fraction", "latency_fraction")


def checkpoint_info(directory: Path) -> dict[str, Any]:
    """What a checkpoint is.

    Args:
        directory: folder of a dense, converted, thinned, quantised or pre-trained model.

    Returns:
        JSON values: ``kind``, ``family`` (``model_type``), ``architecture``, ``parameters`` (elements of the model's own tensors as stored,
        tied ones once) and ``added_parameters`` (routers, levels, scales), ``dtypes`` (elements of each), ``weight_bytes`` and ``bytes``
        (weights, whole folder), ``dense_equal`` (None, or why the same files are no dense model), ``base_model``, ``versions`` and
        ``files`` (bytes by name); where they apply ``ffns``, ``channels``, ``projections``, ``measured`` (what was measured when it was
        made), ``presets``, ``sparsified``, ``pretrained`` and ``exported``.

    Raises:
        CheckpointError: no such folder, no checkpoint, files missing, truncated, malformed or pickled, or a manifest of a newer schema.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"'{directory}' {what}; give the folder of a checkpoint.")
    locate(str(directory))
    config = _read(directory, "config.json") or {}
    stored = config.get("quantization_config")
    stored = stored if isinstance(stored, dict) else {}
    manifest = None
    if stored.get("quant_method") == QUANT_METHOD:
        fields = {key: value for key, value in stored.items() if key != "quant_method"}
        manifest = Manifest.from_dict({"sites": [], **fields}, where=str(directory / "config.json"))
    calibration = read_calibration(directory) if (directory / MANIFEST_FILE).is_file() else {}
    trained, pretrained = _read(directory, TRAINING_FILE), _read(directory, PRETRAINING_FILE)
    exported = _read(directory, EXPORT_FILE)
    record = next((found for found in (calibration, trained, pretrained, exported) if found), {})
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    weights = weight_files(directory)
    return {
        "folder": str(directory),
        "kind": _kind(manifest, trained, pretrained, exported, foreign=stored.get("quant_method")),
        "family": config.get("model_type"),
        "architecture": ", ".join(map(str, config.get("architectures") or ())) or None,
        **_sizes(TensorFiles(weights).infos, manifest),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "bytes": sum(files.values()),
        "dense_equal": _dense_equal(manifest, foreign=stored.get("quant_method")),
        **_structure(manifest, calibration, directory),
        **_measured(calibration),
        **({} if manifest is None or not manifest.presets else {"presets": [_preset(preset) for preset in manifest.presets]}),
        **_training(trained, pretrained),
        **({} if exported is None else {"exported": _scalars(exported)}),
        "base_model": record.get("source") or config.get("_name_or_path") or None,
        "versions": record.get("versions") or {"transformers": config.get("transformers_version")},
        "files": files,
    }


def info_text(info: Mapping[str, Any]) -> dict[str, Any]:
    """What people see of `checkpoint_info`: sizes with units, and no None."""
    shown = {key: value for key, value in info.items() if value is not None and key not in ("weight_bytes", "bytes")}
    shown["parameters"] = _count(info["parameters"])
    if info["added_parameters"]:
        shown["added_parameters"] = f"{_count(info['added_parameters'])} of routers, levels and scales"
    else:
        shown.pop("added_parameters")
    shown["dtypes"] = ", ".join(f"{name} {_count(count)}" for name, count in info["dtypes"].items())
    shown["size"] = f"{_size(info['bytes'])}, of them {_size(info['weight_bytes'])} of weights"
    shown["dense_equal"] = (
        "yes: without moeify the same files load as a dense model" if info["dense_equal"] is None else info["dense_equal"]
    )
    if "presets" in info:
        shown["presets"] = {preset["name"]: _preset_line(preset) for preset in info["presets"]}
    shown["files"] = ", ".join(f"{name} ({_size(size)})" for name, size in info["files"].items())
    first = ("folder", "kind", "family", "architecture", "parameters", "added_parameters", "dtypes", "size", "dense_equal")
    return {key: shown[key] for key in (*(key for key in first if key in shown), *(key for key in shown if key not in first))}


def _read(directory: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder; None where there is no such file."""
    path = directory / name
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"'{path}' has {path.stat().st_size} bytes; no checkpoint needs more than {_MOST_BYTES}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' is not a JSON object.")
    return value


def _kind(manifest: Manifest | None, *records: Mapping[str, Any] | None, foreign: Any) -> str:
    trained, pretrained, exported = records
    if manifest is None:
        base = "dense" if not foreign else f"quantised by {str(foreign)[:40]}"
    elif manifest.sites:
        base = "mixture of experts"
    elif manifest.channels:
        base = "skips input channels"
    else:
        base = "dense, projections replaced" if manifest.projections else "dense"
    added = [
        "int8" if manifest is not None and manifest.has_int8 else "",
        "sparsified" if trained is not None else "",
        "pre-trained" if pretrained is not None else "",
        "exported" if exported is not None else "",
    ]
    return ", ".join([base, *filter(None, added)])


def _dense_equal(manifest: Manifest | None, *, foreign: Any) -> str | None:
    """Why the same files are no dense model to a loader without moeify (decision D2); None if they are."""
    if manifest is None:
        return f"no: its weights are quantised by {str(foreign)[:40]}" if foreign else None
    if manifest.projections:
        return f"no: {len(manifest.projections)} linear layers were replaced by MLPs"
    return "no: it has int8 weights" if manifest.has_int8 else None


def _sizes(infos: Mapping[str, TensorInfo], manifest: Manifest | None) -> dict[str, Any]:
    own, added, dtypes = 0, 0, Counter[str]()
    for name, info in infos.items():
        count = info.num_bytes // info.dtype.itemsize
        dtypes[str(info.dtype).removeprefix("torch.")] += count
        if manifest is not None and (".moe.router." in f".{name}" or name.endswith(_SCALES)):
            added += count
        else:
            own += count
    return {"parameters": own, "added_parameters": added, "dtypes": dict(dtypes.most_common())}


def _structure(manifest: Manifest | None, calibration: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What was made of which layers."""
    found: dict[str, Any] = {}
    if manifest is None:
        return found
    if manifest.sites:
        replaced = {record.name for record in manifest.projections}
        ffns = [record for record in manifest.sites if record.site.name not in replaced]
        found["ffns"] = {
            "converted": len(ffns),
            **({"projections_converted": len(manifest.sites) - len(ffns)} if len(ffns) < len(manifest.sites) else {}),
            "neurons": _distinct(record.site.d_ff for record in manifest.sites),
            "experts": _distinct(record.num_experts for record in manifest.sites),
            "router": _distinct(record.router.name for record in manifest.sites),
            **_rules(record.rule for record in manifest.sites),
            **_calibrated(calibration, directory, manifest),
            "always_on": max(len(record.always_on) for record in manifest.sites),
            "weights": _distinct(record.weights for record in manifest.sites),
        }
    if manifest.channels:
        skipped = calibration.get("skipped")
        shares = [share for share in skipped.values() if isinstance(share, (int, float))] if isinstance(skipped, dict) else []
        found["channels"] = {
            "layers": len(manifest.channels),
            "read": _distinct(record.site.role for record in manifest.channels),
            "method": calibration.get("method"),
            **_rules(record.rule for record in manifest.channels),
            **({"skipped_least": min(shares), "skipped_most": max(shares)} if shares else {}),
            "weights": _distinct(record.weights for record in manifest.channels),
        }
    if manifest.projections:
        roles = Counter(record.role or "+".join(part.name for part in record.parts) or "by name" for record in manifest.projections)
        found["projections"] = {"replaced": len(manifest.projections), "roles": dict(roles)}
    return found


def _rules(rules: Iterable[Any]) -> dict[str, Any]:
    """Name of the rule, and its knob: one number, or least and most of the layers."""
    rules = list(rules)
    names, values = _distinct(rule.name for rule in rules), sorted(float(rule.value) for rule in rules)
    return {"rule": names, "knob": values[0] if values[0] == values[-1] else [values[0], values[-1]]}


def _calibrated(calibration: Mapping[str, Any], directory: Path, manifest: Manifest) -> dict[str, Any]:
    """The active fraction that calibration set the rules to, and whether they are still those."""
    if "active_fraction" not in calibration:
        return {}
    was = _read(directory, MANIFEST_FILE) or {}
    old = Manifest.from_dict({k: v for k, v in was.items() if k != "calibration"}, where=str(directory / MANIFEST_FILE))
    now = {record.site.name: record.rule for record in manifest.sites}
    changed = now != {record.site.name: record.rule for record in old.sites}
    found = {"calibrated_active_fraction": calibration["active_fraction"]}
    return {**found, "rules_changed": "since calibration, so its active fraction is not theirs"} if changed else found


def _measured(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured when the checkpoint was made; of int8 weights, before them."""
    for key in ("measured", "measured_float"):
        if isinstance(measured := calibration.get(key), dict):
            shown = {name: measured[name] for name in ("active_fraction", *_MEASURES) if measured.get(name) is not None}
            return {key: shown}
    return {}


def _preset(preset: Any) -> dict[str, Any]:
    names = ("name", "active_fraction", *_MEASURES, "machine")
    return {name: getattr(preset, name) for name in names}


def _preset_line(preset: Mapping[str, Any]) -> str:
    quality = [] if preset["quality"] is None else [f"{preset['metric']} {preset['quality']:.4g}"]
    if quality and preset["dense_quality"] is not None:
        quality[0] += f" (dense {preset['dense_quality']:.4g})"
    costs = {"FLOPs": "flops_fraction", "bytes": "bytes_fraction", "time": "latency_fraction"}
    measured = [f"{label} {preset[key]:.4g}" for label, key in costs.items() if preset[key] is not None]
    return ", ".join([f"active {preset['active_fraction']:.4g}", *quality, *measured])


def _training(trained: Mapping[str, Any] | None, pretrained: Mapping[str, Any] | None) -> dict[str, Any]:
    records = {
        "sparsified": (trained, ("task", "metric", "quality", "tokens", "epochs", "data")),
        "pretrained": (pretrained, ("name", "task", "data", "tokens", "epochs", "evaluation", "run")),
    }
    return {
        title: {key: record[key] for key in keys if record.get(key) is not None}
        for title, (record, keys) in records.items()
        if record is not None
    }


def _scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if isinstance(value, (str, int, float)) and not isinstance(value, bool)}


def _distinct(values: Iterable[Any]) -> Any:
    """The one value, or all there are."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else found


def _count(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _size(number: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number} B"
