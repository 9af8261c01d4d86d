"""Converted models whose weights are not in memory: accelerate's device maps, and experts that are read when they are selected."""

import mmap
import re
import shutil
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


def resident(pointer, path):
    """Pages of a mapped file that this process has touched."""
    text = Path("/proc/self/smaps").read_text()
    areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
    area = next(a for a in areas if a and int(a.split("-")[0], 16) <= pointer < int(a.split()[0].split("-")[1], 16) and str(path) in a)
    return int(re.search(r"Rss:\s+(\d+)", area)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are read from /proc")
def test_only_selected_experts_come_into_memory(tmp_path):
    model = tiny.tiny_llama(intermediate_size=64 * 1024)  # 8 MB a matrix; experts of 8 neurons are a quarter of a page
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=16), split=ContiguousSplit())
    convert(model, config, sites=find_ffn_sites(model, tiny.tiny_inputs()))
    model.save_pretrained(tmp_path / "moe")
    loaded, _ = load_offloaded(tmp_path / "moe", tmp_path / "offload")
    layer = moe_layers(loaded)["model.layers.0.mlp"]
    places = {name: (getattr(layer.weights(), name).data_ptr()) for name in ("gate_FD", "up_FD", "down_FD")}
    files = {"gate_FD": "0000-gate_proj", "up_FD": "0000-up_proj", "down_FD": "0000-down_proj"}
    before = {name: resident(places[name], tmp_path / "offload" / files[name]) for name in files}
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[3]]))
    size = layer.weights().up_FD.nbytes
    for name in files:
        read = resident(places[name], tmp_path / "offload" / files[name]) - before[name]
        # Faults bring neighbours of a page along that are in the page cache already: 16 pages each, never all.
        assert 16 * 1024 <= read <= 16 * 17 * mmap.PAGESIZE < size / 4


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
