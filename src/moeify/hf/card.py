"""The model card of a converted checkpoint, from measured numbers only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..convert import manifest_of
from ..layers import moe_layers

_TAGS = ("moeify", "mixture-of-experts", "dynamic-k", "activation-sparsity")


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
    metadata = ["library_name: transformers", "tags:", *(f"- {tag}" for tag in _TAGS)]
    if _is_hub_id(base_model):
        metadata += [f"base_model: {base_model}", "base_model_relation: finetune"]
    rule = rules[0] if len(rules) == 1 else f"{rules[0]} ... {rules[-1]} (one a layer)"
    has_int8 = manifest_of(model).has_int8
    without = "no other loader takes its int8 weights" if has_int8 else "without it the same files load as the equal dense model"
    rows = {
        "FFNs converted": str(len(layers)),
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
            "---",
            *metadata,
            "---",
            f"# {name}",
            "",
            f"`{base_model}`, its dense FFNs turned into mixtures of experts with a dynamic number of experts per token by `moeify`.",
            "",
            "```python",
            f"import moeify  # registers the loader; {without}",
            f"from transformers import {cls}",
            "",
            f'model = {cls}.from_pretrained("{name}")',
            "```",
            "",
            "## Measured",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            *(_score_table(scores) if isinstance(scores, Mapping) and scores else []),
            "`moeify.json` holds the same numbers and the structure; `moeify sweep` measures quality against cost.",
            "",
        ]
    )


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
