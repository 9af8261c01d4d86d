"""The model card of a checkpoint that moeify made, from measured numbers only."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..channels import sparse_inputs
from ..layers import MoEProjection, moe_layers
from ..manifest import manifest_of
from ..presets import Preset
from ..sites import replaced_projections

_TAGS = ("moeify", "mixture-of-experts", "dynamic-k", "activation-sparsity")
_TRAINED_TAGS = ("moeify", "activation-sparsity")
_AS_DENSE = "without it the same files load as the equal dense model"
_NOT_REPLACED = "no other loader takes its replaced layers"
_NOT_INT8 = "no other loader takes its int8 weights"


def model_card(
    model: nn.Module, *, name: str, base_model: str, calibration: Mapping[str, Any], results: Mapping[str, str] | None = None
) -> str:
    """Markdown with the Hub's metadata block.

    Args:
        model: the converted model.
        name: title.
        base_model: Hub id of the dense source; a local path is named in the text only.
        calibration: what `moeify.json` records; numbers are shown as they are.
        results: further rows of the table of measurements, ready to print.

    Returns:
        Text of ``README.md``.
    """
    layers, cls = moe_layers(model), type(model).__name__
    experts = sorted({moe.num_experts for moe in layers.values()})
    rules = sorted({str(moe.rule) for moe in layers.values()})
    rule = rules[0] if len(rules) == 1 else f"{rules[0]} ... {rules[-1]} (one a layer)"
    has_int8 = manifest_of(model).has_int8
    replaced = replaced_projections(model)
    without = _NOT_REPLACED if replaced else _NOT_INT8 if has_int8 else _AS_DENSE
    rows = {
        "FFNs converted": str(sum(not isinstance(moe, MoEProjection) for moe in layers.values())),
        **_projection_rows(replaced, calibration.get("projections")),
        "experts per FFN": " or ".join(map(str, experts)),
        "router": ", ".join(sorted({moe.router.config.name for moe in layers.values()})),
        "selection rule": rule,
        **({"weights of the experts": "int8, one scale an output"} if has_int8 else {}),
        **{key.replace("_", " "): _cell(value) for key, value in calibration.items() if not isinstance(value, (dict, list))},
        **(results or {}),
    }
    scores = calibration.get("router_scores")
    return "\n".join(
        [
            *_metadata(base_model, _TAGS),
            f"# {name}",
            "",
            f"`{base_model}`, its dense FFNs turned into mixtures of experts with a dynamic number of experts per token by `moeify`.",
            *_projection_lines(replaced),
            "",
            *_usage(cls, name, without=without),
            *_measured(rows),
            *(_score_table(scores) if isinstance(scores, Mapping) and scores else []),
            "`moeify.json` holds the same numbers and the structure; `moeify sweep` measures quality against cost.",
            "",
        ]
    )


def thinned_card(model: nn.Module, *, name: str, record: Mapping[str, Any], results: Mapping[str, str]) -> str:
    """Markdown with the Hub's metadata block, of a model whose linear layers skip input channels.

    Args:
        model: the thinned model.
        name: title.
        record: what ``moeify.json`` holds under "calibration".
        results: further rows of the table of measurements, ready to print.

    Returns:
        Text of ``README.md``.
    """
    cls, config, skipped = type(model).__name__, record["config"], record["skipped"]
    has_int8 = manifest_of(model).has_int8
    inputs = sorted({executor.site.role for executor in sparse_inputs(model).values()})
    rows = {
        "linear layers that skip input channels": f"{len(skipped)} ({', '.join(inputs)})",
        "wanted share of channels skipped": _cell(config["skip_frac"]),
        "a channel's worth": record["method"],
        "budget over layers": f"{config['allocate']}, by {config.get('cost', 'parameters')}",
        **_transform_row(config.get("transform", "none"), untied_head=record.get("untied_head", False)),
        "calibrated on": f"{record['tokens']} tokens of `{record['data']}`",
        "channels skipped, least and most of a layer": f"{min(skipped.values()):.4g}, {max(skipped.values()):.4g}",
        **({"weights of these layers": "int8, one scale an output"} if has_int8 else {}),
        **results,
    }
    return "\n".join(
        [
            *_metadata(record["source"], _TRAINED_TAGS),
            f"# {name}",
            "",
            f"`{record['source']}`, whose linear layers skip input channels that matter little to a token (`moeify thin`).",
            "Nothing was trained.",
            "",
            *_usage(cls, name, without=_NOT_INT8 if has_int8 else _AS_DENSE),
            *_measured(rows),
            "`moeify.json` holds the same numbers by layer; `moeify sweep` measures quality against cost.",
            "",
        ]
    )


def _transform_row(transform: str, *, untied_head: bool) -> dict[str, str]:
    if transform == "none":
        return {}
    untied = "; the head, tied to the embeddings in the source, is a matrix of its own" if untied_head else ""
    return {"transform of the weights": f"{transform} (same function, other numbers{untied})"}


def trained_card(model: nn.Module, *, name: str, base_model: str, record: Mapping[str, Any]) -> str:
    """Markdown with the Hub's metadata block, of a dense model that was trained towards sparse activations.

    Args:
        model: the dense model.
        name: title.
        base_model: Hub id of the source; a local path is named in the text only.
        record: what ``sparsify.json`` holds.

    Returns:
        Text of ``README.md``.
    """
    config, train, replaced = record["config"], record["train"], replaced_projections(model)
    kind = f"a {type(model).__name__} that loads with `moeify` only" if replaced else f"an ordinary dense {type(model).__name__}"
    before, after = record["activations"]["before"]["mean"], record["activations"]["after"]["mean"]
    rows = {
        "task": record["task"],
        f"{record['metric'].replace('_', '-')}, before and after": [record["quality"][when] for when in ("before", "after")],
        **_projection_rows(replaced, record.get("projections")),
        "zeros among activations, before and after": [before["zero_frac"], after["zero_frac"]],
        "at most 0.001 among activations, before and after": [before["near_zero_frac"], after["near_zero_frac"]],
        "non-zero neurons a token, before and after": [before["nonzeros_per_token"], after["nonzeros_per_token"]],
        "activation": config["activation"],
        "penalty": f"{config['enforcement']['loss']}, weight {config['enforcement']['weight']:g}",
        "distilled from the source": "no" if config["distill"] is None else "yes",
        "training": f"{train['steps']} steps, {record['tokens']} tokens, {record['epochs']:.2f} epochs of `{record['data']}`",
    }
    return "\n".join(
        [
            *_metadata(base_model, _TRAINED_TAGS),
            f"# {name}",
            "",
            f"`{base_model}`, trained by `moeify` so that more of its FFN activations are zero; {kind}.",
            *_projection_lines(replaced),
            "`moeify convert` turns it into a mixture of experts.",
            "",
            *(_usage(type(model).__name__, name, without=_NOT_REPLACED) if replaced else ()),
            *_measured({key: ", ".join(map(_cell, value)) if isinstance(value, list) else value for key, value in rows.items()}),
            "`sparsify.json` holds the same numbers by layer, the losses and the configuration.",
            "",
        ]
    )


def pretrained_card(model: nn.Module, *, name: str, record: Mapping[str, Any]) -> str:
    """Markdown with the Hub's metadata block, of a model that was trained from random weights.

    Args:
        model: dense, or with the experts of sparse-dense pre-training.
        name: title.
        record: what ``pretrain.json`` holds.

    Returns:
        Text of ``README.md``.
    """
    layers, flops, train = moe_layers(model), record["flops"], record["config"]["train"]
    rows = {
        "task": record["task"],
        "parameters": str(record["parameters"]),
        "training": f"{train['steps']} steps, {record['tokens']} tokens, {record['epochs']:.2f} epochs of `{record['data']}`",
        **{
            f"validation {mode}": f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.4g}"
            for mode, found in record["evaluation"].items()
        },
        "training FLOPs": f"{flops['total_flops']:.3g} (dense training of as many steps {flops['all_dense_flops']:.3g})",
    }
    how = "from random weights."
    usage: list[str] = []
    if layers:
        ssd = record["config"]["ssd"]
        rows |= {
            "FFNs with experts": str(len(layers)),
            "experts a token runs, of each FFN": f"{ssd['selected']} of {ssd['num_experts']}",
            "dense and sparse steps": f"{flops['dense_steps']}, {flops['sparse_steps']}",
        }
        how = 'from random weights by switchable sparse-dense pre-training: `moeify.set_mode(model, "dense")` runs all of it.'
        usage = _usage(type(model).__name__, name, without=_AS_DENSE)
    return "\n".join(
        [
            *_metadata(".", _TRAINED_TAGS),
            f"# {name}",
            "",
            f"A {type(model).__name__} that `moeify` trained {how}",
            "",
            *usage,
            *_measured(rows),
            "`pretrain.json` holds the same numbers, the losses, the decisions and the configuration; `log.jsonl` what went on.",
            "",
        ]
    )


def _projection_rows(replaced: Collection[str], record: Mapping[str, Any] | None) -> dict[str, str]:
    """Replaced linear layers for the table, and what the record says of them where they were replaced in the same run."""
    if not replaced:
        return {}
    rows = {"linear layers replaced by MLPs": str(len(replaced))}
    if record is None:
        return rows
    config, errors = record["config"], [numbers["after"] for numbers in record["errors"].values()]
    chosen = ", ".join([*config["attention"], *(f"`{pattern}`" for pattern in config["patterns"])])
    rows = {
        "linear layers replaced by MLPs": f"{len(replaced)} ({chosen}), each of {config['flops_factor']:g} times the layer's cost",
        "distilled on": f"{record['tokens']} tokens",
        "relative squared error of their outputs, mean": _cell(sum(errors) / len(errors)),
    }
    return rows | ({"quality with them, before training": _cell(record["quality"])} if "quality" in record else {})


def _projection_lines(replaced: Collection[str]) -> list[str]:
    """What must be said of replaced linear layers."""
    if not replaced:
        return []
    return ["Linear layers were replaced by two-layer MLPs that were distilled from them: there is no equal dense model."]


def _usage(cls: str, name: str, *, without: str) -> list[str]:
    """How to load it; ``without`` says what happens where moeify is not imported."""
    return [
        "```python",
        f"import moeify  # registers the loader; {without}",
        f"from transformers import {cls}",
        "",
        f'model = {cls}.from_pretrained("{name}")',
        "```",
        "",
    ]


def _measured(rows: Mapping[str, str]) -> list[str]:
    """The table of measurements under its heading."""
    return ["## Measured", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _metadata(base_model: str, tags: Sequence[str]) -> list[str]:
    """The Hub's block at the head of a card."""
    lines = ["library_name: transformers", "tags:", *(f"- {tag}" for tag in tags)]
    if _is_hub_id(base_model):
        lines += [f"base_model: {base_model}", "base_model_relation: finetune"]
    return ["---", *lines, "---"]


def _score_table(scores: Mapping[str, Any]) -> list[str]:
    """One row a layer; a score is a number, or numbers by name."""
    first = next(iter(scores.values()))
    columns = list(first) if isinstance(first, Mapping) else ["score"]
    rows = [
        [f"`{name}`", *(_cell(v) for v in (score.values() if isinstance(score, Mapping) else [score]))] for name, score in scores.items()
    ]
    table = [["layer", *columns], ["---", *["---:"] * len(columns)], *rows]
    return ["Router scores on held-out tokens:", "", *(f"| {' | '.join(cells)} |" for cells in table), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf") and not Path(name).exists()


_PRESETS = ("<!-- presets -->", "<!-- end of presets -->")


def with_presets(text: str, presets: Iterable[Preset]) -> str:
    """A model card with a table of presets: in the place of the one that it has, else at its end.

    Args:
        text: the card.
        presets: what the checkpoint has now; without any the table goes.
    """
    start, end = _PRESETS
    before, found, after = text.partition(start)
    if found:
        after = after.partition(end)[2]
    rows = []
    for p in presets:
        quality = f"{_or_dash(p.quality)} ({p.metric or 'not measured'}, dense {_or_dash(p.dense_quality)})"
        shares = " | ".join(map(_or_dash, (p.flops_fraction, p.bytes_fraction, p.latency_fraction)))
        rows.append(f"| `{p.name}` | {p.active_fraction:.3g} | {quality} | {shares} |")
    if not rows:
        return f"{before.rstrip()}\n{after.lstrip()}" if found else text
    table = [
        start,
        "## Presets",
        "",
        '`moeify.set_rule(model, "NAME")`; shares are of the dense model.',
        "",
        "| preset | active fraction | held-out quality | FLOPs | bytes per decoded token | time |",
        "|---|---|---|---|---|---|",
        *rows,
        end,
    ]
    return "\n".join([before.rstrip(), "", *table, after.lstrip()])


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
