"""`export_checkpoint` and its command: what lies in the folder, what the record says, what is refused."""

import json
from unittest.mock import patch

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from moeify import cli
from moeify._progress import NO_PROGRESS
from moeify.controls import set_mode
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeify.hf.load import load_model
from moeify.pipeline import export, export_checkpoint
from moeify.quantize import quantize
from moeify.select import TopK


@pytest.fixture
def silu(tmp_path):
    """A converted SwiGLU model on disk, and text for it."""
    model = tiny.convert_tiny(tiny.tiny_llama(hidden_act="silu"), rule=TopK(k=3))
    model.save_pretrained(tmp_path / "moe")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("All happy families are alike; each converts in its own way. " * 60)
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(**tiny.tiny_inputs()).logits


def test_a_native_mixture_by_the_command_line(silu, capsys):
    arguments = ["export", str(silu / "moe"), "--to", "qwen2-moe", "--out", str(silu / "out"), "--json"]
    assert cli.run([*arguments, "--data", str(silu / "text.txt"), "--window", "64"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["to"] == "qwen2-moe"
    assert (record["k"], record["num_experts"], record["expert_size"], record["active_fraction"]) == (3, 6, 8, 0.5)
    assert 1 <= record["shared"] <= 2
    assert record["max_error"] < 5e-3
    assert (record["fitted_tokens"], record["held_out_tokens"]) == (44 * 64, 12 * 64)
    found = record["perplexity"]
    assert found["exported"] == pytest.approx(found["same_routing"], rel=1e-2)
    assert set(found) == {"exported", "same_routing", "dense", "ours_fixed_k", "ours_dynamic_k"}
    kept = json.loads((silu / "out" / "export.json").read_text())
    assert kept.pop("versions")["moeify"]
    assert kept == record
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (silu / "out").iterdir()}
    assert type(AutoModelForCausalLM.from_pretrained(silu / "out")).__name__ == "Qwen2MoeForCausalLM"
    assert cli.run([*arguments, "--data", str(silu / "text.txt"), "--window", "64"]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("max_tokens", "text", "expected"),
    [
        pytest.param(1024, 20_000, (1024, 8192), id="8192 tokens beside those to fit to"),
        pytest.param(1024, 3600, (1024, 2560), id="all that there is beside them"),
        pytest.param(3400, 3600, (2816, 768), id="a fifth of a short text"),
        pytest.param(None, 3600, (2816, 768), id="a fifth of all"),
        pytest.param(None, 60_000, (51776, 8192), id="a fifth would be more"),
    ],
)
def test_a_fixed_k_export_is_measured_on_what_is_kept_out(tmp_path, max_tokens, text, expected):
    (tmp_path / "text.txt").write_text("0123456789" * (text // 10))
    data = DataConfig(data=str(tmp_path / "text.txt"), window=64, max_tokens=max_tokens)
    parts = export._batches(tiny.tiny_llama(), tiny.byte_tokenizer(), data, progress=NO_PROGRESS)
    assert tuple(sum(batch["input_ids"].numel() for batch in part) for part in parts) == expected


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_dense_export_is_the_dense_mode_and_names_no_hook(silu, weights):
    model, _ = load_model(silu / "moe")
    if weights == "int8":
        quantize(model)
        model.save_pretrained(silu / "moe")
    export_checkpoint(silu / "moe", silu / "dense", to="dense")
    assert "quantization_config" not in json.loads((silu / "dense" / "config.json").read_text())
    dense, info = AutoModelForCausalLM.from_pretrained(silu / "dense", output_loading_info=True)
    assert not any(info.values())
    assert not hasattr(dense, "hf_quantizer") or dense.hf_quantizer is None
    set_mode(model, "dense")
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)


def test_an_onnx_folder_has_the_graph_the_config_and_the_tokenizer(silu):
    def written(model, path, *, config):
        path.write_bytes(b"graph")
        from moeify.export import OnnxReport

        return OnnxReport(file=path.name, inputs=("input_ids",), outputs=("logits",), ffns={}, operators=1, max_error=0.0)

    with patch("moeify.pipeline.export.to_onnx", written):
        record = export_checkpoint(silu / "moe", silu / "onnx", to="onnx")
    assert record["file"] == "model.onnx"
    assert {"model.onnx", "config.json", "tokenizer.json", "export.json"} <= {path.name for path in (silu / "onnx").iterdir()}


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(silu):
    moe, out = silu / "moe", silu / "out"
    with pytest.raises(ConfigError, match="--to: unknown name 'gguf'; known: onnx, dense, qwen2-moe, mixtral"):
        export_checkpoint(moe, out, to="gguf")
    with pytest.raises(ConfigError, match="--k, --shared and --data are of fixed-k checkpoints"):
        export_checkpoint(moe, out, to="dense", k=3)
    with pytest.raises(CheckpointError, match="which is never written to"):
        export_checkpoint(moe, moe / "inside", to="dense")
    with pytest.raises(CheckpointError, match=r"has no moeify\.json"):  # plain save_pretrained: nobody wrote what data it was made of
        export_checkpoint(moe, out, to="mixtral")
    replaced = tiny.replaced_llama()
    replaced.save_pretrained(silu / "replaced")
    with pytest.raises(CheckpointError, match="is of a dense model"):
        export_checkpoint(silu / "replaced", out, to="dense")
    model = tiny.replaced_llama()
    tiny.convert_tiny(model)
    model.save_pretrained(silu / "both")
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.0.self_attn.\w_proj' was replaced by an MLP, so there is no dense"):
        export_checkpoint(silu / "both", out, to="dense")
    assert not out.exists()
    assert not list(silu.glob("*.partial"))
