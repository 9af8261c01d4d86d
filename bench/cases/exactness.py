"""How far a converted checkpoint with every expert on is from its dense source, on the same text.

Rows: the dense mode, every kernel, every selection rule at the knob that runs all experts, two loads of the files, and a process that
cannot import moeify. Without a model, a tiny random Llama is converted first.

Letters: B batch, S sequence, V vocabulary, D model width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tiny import convert_tiny
from moeify import DataConfig, load_model, moe_layers, record_active, set_impl, set_mode, set_rule
from moeify.errors import CheckpointError, ConfigError
from moeify.kernels import impls_for
from moeify.pipeline import calibration_batches
from moeify.select import RULES, Rule, Threshold

Batch = Mapping[str, Tensor]

WITHOUT_MOEIFY = """
import json, sys
sys.modules["moeify"] = None  # an import of it fails, installed or not
import torch, transformers
from safetensors.torch import load_file, save_file
directory, kind, inputs, outputs = json.loads(sys.argv[1])
model = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32).eval()
with torch.no_grad():
    found = model(**load_file(inputs))
save_file({"output": (found["logits"] if "logits" in found else found["last_hidden_state"]).contiguous()}, outputs)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--dense", metavar="MODEL", help="Hub id, folder or .gguf file of the dense source")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="what moeify convert made of it")
    parser.add_argument("--data", default="builtin:pydoc", help="text (or images) to compare on, as for moeify sweep")
    parser.add_argument("--window", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in all; 512 with --quick")


def run(
    *,
    quick: bool,
    dense: str | None = None,
    converted: Path | None = None,
    data: str = "builtin:pydoc",
    window: int = 256,
    tokens: int = 2048,
) -> Iterator[dict[str, Any]]:
    """Rows: largest absolute difference of the logits; of a model without a head that of its hidden states, and cosines of their means."""
    if (dense is None) != (converted is None):
        raise ConfigError("give --dense and --converted, or neither.")
    model = dense or "random Llama"
    with tempfile.TemporaryDirectory() as folder:
        if dense is None or converted is None:
            dense, converted = convert_tiny(Path(folder))
        config = DataConfig(data=data, window=window, max_tokens=512 if quick else tokens)
        for row in _compare(dense, converted, config, Path(folder)):
            yield {"model": model, "data": data} | row


def _compare(dense: str, converted: Path, data: DataConfig, folder: Path) -> Iterator[dict[str, Any]]:
    source, processor = load_model(dense)
    batches = calibration_batches(source, processor, data, batch_tokens=data.window)
    kind, expected = type(source).__name__, _Outputs.of(source, batches)
    del source
    model, _ = load_model(converted)
    first = _Outputs.of(model, batches[:1])
    set_mode(model, "dense")
    yield {"check": "dense mode"} | expected.distance(_outputs(model, batches))
    set_mode(model, "moe")
    for impl in ("auto", *impls_for("cpu")):
        yield _with_all_experts(model, expected, Threshold, impl=impl)
    for rule_type in RULES.values():
        if rule_type is not Threshold:
            yield _with_all_experts(model, expected, rule_type, impl="auto")
    del model
    for time in ("second", "third"):
        again = _Outputs.of(load_model(converted)[0], batches[:1])
        same = torch.equal(again.tensors[0], first.tensors[0])
        yield {"check": f"{time} load against the first", "bit_equal": same} | first.distance(again.tensors)
    found = _output_without_moeify(converted, kind, batches[0], folder)
    yield {"check": "process without moeify"} | expected.distance([found])


def _with_all_experts(model: nn.Module, expected: "_Outputs", rule_type: type[Rule], *, impl: str) -> dict[str, Any]:
    end = rule_type.bounds[1 if rule_type.grows else 0]
    rule = rule_type.at(min(end, float(max(layer.num_experts for layer in moe_layers(model).values()))))
    set_impl(model, impl)
    set_rule(model, rule)
    with record_active(model) as stats:
        distance = expected.distance(_outputs(model, expected.batches))
    return {"check": "all experts", "rule": rule.name, "impl": impl, "active_fraction": stats.active_fraction()} | distance


@dataclass(frozen=True)
class _Outputs:
    """What one model gave for each batch."""

    batches: Sequence[Batch]
    tensors: Sequence[Tensor]
    """(B, S, V) or (B, V) logits, else (B, S, D) hidden states."""
    has_head: bool

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> "_Outputs":
        return cls(batches, list(_outputs(model, batches)), model.get_output_embeddings() is not None)

    def distance(self, found: Iterable[Tensor]) -> dict[str, Any]:
        """Largest absolute difference, padding left out; without a head also the cosines of the means over tokens. Batches that ``found``
        lacks are not compared."""
        difference = largest = 0.0
        cosines: list[float] = []
        count = 0
        for batch, ours, theirs in zip(self.batches, self.tensors, found, strict=False):
            keep = batch.get("decoder_attention_mask", batch.get("attention_mask", torch.ones(()))).bool()
            keep = keep if keep.shape == ours.shape[:-1] else torch.ones(ours.shape[:-1], dtype=torch.bool)
            difference = max(difference, float((theirs - ours)[keep].abs().max()))
            largest = max(largest, float(ours[keep].abs().max()))
            count += int(keep.sum())
            if not self.has_head and ours.dim() == 3:
                weight = keep[..., None].float()
                cosines += F.cosine_similarity((ours * weight).sum(1), (theirs * weight).sum(1), dim=-1).tolist()
        means = {"mean_cosine": sum(cosines) / len(cosines), "min_cosine": min(cosines)} if cosines else {}
        return {"max_abs_diff": difference, "max_abs_output": largest, "rows": count, **means}


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        found: Any = model(**batch)
        yield found["logits"] if "logits" in found else found["last_hidden_state"]


def _output_without_moeify(converted: Path, kind: str, batch: Batch, folder: Path) -> Tensor:
    inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, inputs)
    arguments = json.dumps([str(converted), kind, str(inputs), str(outputs)])
    done = subprocess.run([sys.executable, "-c", WITHOUT_MOEIFY, arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckpointError(f"a process without moeify could not load '{converted}': {done.stderr.strip().splitlines()[-1]}")
    return load_file(outputs)["output"]
