"""Converted models whose weights are not in memory: accelerate's device maps, and experts that are read when they are selected."""

import ctypes
import json
import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from moeify import load_model, load_offloaded
from moeify.convert import ConvertConfig, convert
from moeify.errors import CheckpointError, UnsupportedModelError
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites
from moeify.split import ContiguousSplit


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save_converted_tiny(tmp_path_factory.mktemp("moe") / "moe", rule=TopK(k=2))


def logits(model):
    with torch.no_grad():
        return model(**tiny.tiny_inputs()).logits


MAPS = {
    "one layer on the disk": {
        **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
        "model.layers.1": "disk",
    },
    "all on the disk": {"": "disk"},
}


@pytest.mark.parametrize("kind", MAPS)
def test_device_map_with_disk_offload_gives_the_outputs_of_the_model_in_memory(kind, saved, tmp_path):
    pytest.importorskip("accelerate")
    expected = AutoModelForCausalLM.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=MAPS[kind], offload_folder=str(tmp_path))
    offloaded = moe_layers(model)["model.layers.1.mlp"]
    assert all(parameter.is_meta for parameter in offloaded.projection_parameters())
    assert "accelerate hook" in offloaded.masked_reason()
    assert offloaded.mode == "moe"
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False}
    ids = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    assert torch.equal(model.generate(**ids, **options), expected.generate(**ids, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_the_disk_give_the_outputs_of_those_in_memory(dtype, saved, tmp_path):
    expected, _ = load_model(saved, dtype=dtype)
    for again in (False, True):  # the second time from the files that are there
        written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("offload/0*")}
        model, tokenizer = load_offloaded(saved, tmp_path / "offload", dtype=dtype)
        assert tokenizer is not None
        assert torch.equal(logits(model), logits(expected))
        assert all(layer.masked_reason() is None for layer in moe_layers(model).values())
        if again:
            assert written == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("offload/0*")}
    for layer in moe_layers(model).values():
        assert layer.weights().down_FD.stride(-1) == 1


def test_tied_weights_and_how_to_generate_are_those_of_the_model_in_memory(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.7
    model.save_pretrained(tmp_path / "moe")
    loaded, _ = load_offloaded(tmp_path / "moe", tmp_path / "offload")
    expected, _ = load_model(tmp_path / "moe")
    assert torch.equal(logits(loaded), logits(expected))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in expected.parameters())
    assert loaded.generation_config.to_diff_dict() == expected.generation_config.to_diff_dict()
    ids = torch.arange(5)[None]
    assert torch.equal(loaded.generate(ids), expected.generate(ids))
    (tmp_path / "moe" / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_offloaded(tmp_path / "moe", tmp_path / "offload")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.moe.router.hidden.weight"]
)
def test_numbers_that_are_none_are_refused_with_the_tensors_name(name, saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    tiny.edit_tensors(broken, lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan))
    for _ in range(2):  # nothing half-written is taken for whole
        with pytest.raises(CheckpointError, match=f"'{name}' has NaN or infinite values"):
            load_offloaded(broken, tmp_path / "offload")


def cached(rows_FD):
    """Pages of a mapped matrix that are in the system's page cache, and how many it has."""
    pages = -(-rows_FD.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    code = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(rows_FD.data_ptr()), ctypes.c_size_t(rows_FD.nbytes), found)
    assert code == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in found), pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is in its page cache")
def test_only_selected_experts_are_read_from_the_disk(tmp_path):
    model = tiny.tiny_llama(intermediate_size=16 * 1024)  # 2 MB a matrix, 1 KB an expert
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=2), split=ContiguousSplit())
    convert(model, config, sites=find_ffn_sites(model, tiny.tiny_inputs()))
    model.save_pretrained(tmp_path / "moe")
    loaded, _ = load_offloaded(tmp_path / "moe", tmp_path / "offload")
    for path in (tmp_path / "offload").glob("0*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    weights = moe_layers(loaded)["model.layers.0.mlp"].weights()
    matrices = (weights.gate_FD, weights.up_FD, weights.down_FD)
    if any(cached(rows_FD)[0] for rows_FD in matrices):
        pytest.skip("the file system keeps files in memory")
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[3]]))
    for rows_FD in matrices:
        read, pages = cached(rows_FD)
        assert 1 <= read < pages / 8


def test_what_cannot_be_offloaded_is_one_line(saved, tmp_path):
    tiny.save_dense_tiny(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is of a dense model"):
        load_offloaded(tmp_path / "dense", tmp_path / "offload")
    model = tiny.convert_tiny(tiny.tiny_llama())
    quantize(model)
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match="int8"):
        load_offloaded(tmp_path / "int8", tmp_path / "offload")
    assert not (tmp_path / "offload").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="in the way"):
        load_offloaded(saved, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_files_of_another_checkpoint_are_made_anew(saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    load_offloaded(saved, tmp_path / "offload", dtype=torch.bfloat16)
    model, _ = load_offloaded(other, tmp_path / "offload")
    assert torch.equal(logits(model), logits(load_model(other)[0]))


def test_files_that_were_cut_or_lost_since_are_made_anew(saved, tmp_path):
    expected = logits(load_offloaded(saved, tmp_path / "offload")[0])
    files = sorted((tmp_path / "offload").glob("0*"))
    sizes = {path.name: path.stat().st_size for path in files}
    assert json.loads((tmp_path / "offload" / "offload.json").read_text())["sizes"] == sizes
    for damage in (lambda path: os.truncate(path, 100), Path.unlink):
        damage(files[1])
        assert torch.equal(logits(load_offloaded(saved, tmp_path / "offload")[0]), expected)
        assert {path.name: path.stat().st_size for path in files} == sizes
