"""A conversion one block at a time: the checkpoint of the conversion in memory, in the memory of one block, whatever goes wrong."""

import errno
import json
import os
import random
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from bench.cases.stream import write_llama
from moeify import load_model
from moeify.convert import ConvertConfig
from moeify.data import DataConfig
from moeify.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from moeify.hf.shards import TensorWriter
from moeify.hf.streamed import StreamedModel, open_streamed
from moeify.layers import moe_layers
from moeify.pipeline import CalibrationConfig, convert_checkpoint, stream
from moeify.routers import GateRouterConfig, NormRouterConfig
from moeify.train.fit import RouterTrainConfig

OURS = ("run", "streamed")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0)
    path.write_text("".join(words.choice("abcdefghij klm") for _ in range(6000)))
    return DataConfig(data=str(path))


def gpt2(*, with_middle=True):
    """Tied embeddings, transposed weights, biases, learnt positions; the base model's own names in the files."""
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2 + with_middle, n_head=4, bos_token_id=None, eos_token_id=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def saved(model, folder, *, shard="20KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny.tiny_llama(), tmp_path_factory.mktemp("dense") / "llama")


def converted(source, out, data, *, config=None, tokens=2048, **options):
    config = config or ConvertConfig(expert_size=8, router=NormRouterConfig(width=4))
    calibration = CalibrationConfig(max_tokens=tokens, window=32, router=RouterTrainConfig(epochs=1))
    return convert_checkpoint(str(source), out, data=data, config=config, calibration=calibration, **options)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def base_only(folder):
    """The files of a base model under the config of one with a head: names without the prefix, no tied head."""
    for path in folder.glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name.removeprefix("transformer."): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["llama", "llama in bfloat16", "gpt2", "gpt2, the base model's files, a policy"])
def test_streamed_conversion_gives_the_tensors_config_and_record_of_the_one_in_memory(kind, llama, data, tmp_path):
    source, options = llama, {}
    if kind.startswith("gpt2"):
        source = saved(gpt2(with_middle="base" in kind), tmp_path / "dense")  # which the policy leaves out
    if "base" in kind:
        source = base_only(source)
        policy = {"transformer.h.1.mlp": None}
        options = {"config": ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), policy=policy, always_on=1)}
    if kind == "llama in bfloat16":  # whose router reads the weights, of which the manifest then has fingerprints
        options = {"config": ConvertConfig(expert_size=8, router=GateRouterConfig()), "dtype": "bfloat16"}
    assert len(list(source.glob("*.safetensors"))) > 2
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    in_memory = converted(source, tmp_path / "memory", data, **options)
    record = converted(source, tmp_path / "stream", data, stream=True, **options)

    assert record.pop("streamed") is True
    assert {key: value for key, value in record.items() if key not in OURS} == {k: v for k, v in in_memory.items() if k not in OURS}
    ours, theirs = tensors_of(tmp_path / "stream"), tensors_of(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype is theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "stream" / name).read_text() == (tmp_path / "memory" / name).read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "dense") == ["memory", "stream"]
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    model, _ = load_model(tmp_path / "stream", dtype="auto")
    again, _ = load_model(tmp_path / "memory", dtype="auto")
    assert len(moe_layers(model)) == len(moe_layers(again)) == 2
    with torch.no_grad():
        assert torch.equal(model(**tiny.tiny_inputs()).logits, again(**tiny.tiny_inputs()).logits)


def test_a_killed_conversion_goes_on_with_the_layer_that_was_not_fitted(data, tmp_path, monkeypatch):
    source = saved(gpt2(), tmp_path / "dense")
    expected = converted(source, tmp_path / "whole", data, stream=True)
    fit, fitted = stream.fit_site, []

    def killed_at(count):
        def counted(weights, x_TD, record, *rest):
            if len(fitted) == count:
                raise KeyboardInterrupt
            fitted.append(record.site.name)
            return fit(weights, x_TD, record, *rest)

        return counted

    monkeypatch.setattr(stream, "fit_site", killed_at(1))
    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "out", data, stream=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stream, "fit_site", killed_at(-1))
    monkeypatch.setattr(TensorWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(CheckpointError, match="the disk is full; nothing was changed"):
        converted(source, tmp_path / "out", data, stream=True)
    assert fitted == ["transformer.h.0.mlp", "transformer.h.1.mlp", "transformer.h.2.mlp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out.work", "whole"]
    monkeypatch.undo()
    monkeypatch.setattr(stream, "fit_site", killed_at(3))  # all are there
    assert converted(source, tmp_path / "out", data, stream=True) == expected
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.work").exists()


def held_bytes(monkeypatch):
    """Of the model's tensors that are loaded: now, and at most so far."""
    held = {"now": 0, "most": 0, "parts": []}
    enter, leave = StreamedModel._enter, StreamedModel._leave

    def size(model, part):
        return sum(model._size(slot) for slot in model._slots[part])

    def entering(model, part):
        held["now"] += 0 if model._held[part] else size(model, part)
        held["most"] = max(held["most"], held["now"])
        enter(model, part)

    def leaving(model, part):
        leave(model, part)
        held["now"] -= 0 if model._held[part] else size(model, part)

    monkeypatch.setattr(StreamedModel, "_enter", entering)
    monkeypatch.setattr(StreamedModel, "_leave", leaving)
    return held


def own_bytes():
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


def test_a_model_of_100_mb_is_converted_in_less_than_a_third_of_its_size(llama, data, tmp_path, monkeypatch):
    converted(llama, tmp_path / "first", data, tokens=512, stream=True)  # what is imported at the first use is no part of it
    size = write_llama(tmp_path / "dense", width=256, layers=27, vocab=257)
    assert size > 100e6
    held, before, most, ended = held_bytes(monkeypatch), own_bytes(), [0], threading.Event()

    def watch():
        while not ended.wait(0.002):
            most[0] = max(most[0], own_bytes())

    # One layer is fitted: the others would take time and show nothing.
    config = ConvertConfig(expert_size=64, router=NormRouterConfig(width=4), policy={"model.layers.3.mlp": {}, "re:.*": None})
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        converted(tmp_path / "dense", tmp_path / "out", data, config=config, tokens=512, stream=True)
    finally:
        ended.set()
        thread.join()
    assert held["now"] == 0
    assert held["most"] < size / 24  # a block, and the embedding that says where the model is
    assert most[0] - before < size / 3


def with_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def without_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-5])


def not_finite(folder):
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("q_proj.weight"):
                tensors[name][0, 0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})


def other_shape(folder):
    tiny.edit_config(folder, lambda config: config.update(intermediate_size=40))


def one_layer_more(folder):
    tiny.edit_config(folder, lambda config: config.update(num_hidden_layers=3))


@pytest.mark.parametrize("way", [True, False], ids=["streamed", "in memory"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_shard, "lacks the shard"),
        (cut_shard, "truncated"),
        (not_finite, "NaN or infinite"),
        (other_shape, "has shape"),
        (one_layer_more, "lacks 9 tensors"),
        (
            lambda folder: with_index(folder, lambda names: names.update({"x": "../other.safetensors"})),
            "no safetensors file",
        ),
        (lambda folder: with_index(folder, lambda names: names.update({"x": "/etc/x.safetensors"})), "no safetensors file"),
        (lambda folder: with_index(folder, lambda names: names.update({"x": "model.bin"})), "no safetensors file"),
    ],
    ids=["missing shard", "cut shard", "NaN", "shape", "missing tensors", "outside", "absolute", "pickle"],
)
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(damage, says, way, llama, data, tmp_path):
    shutil.copytree(llama, tmp_path / "dense")
    damage(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=says) as caught:
        converted(tmp_path / "dense", tmp_path / "out", data, stream=way)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_cannot_be_streamed_is_refused_before_anything_is_done(llama, data, tmp_path):
    def refused(error, says, source=llama, **options):
        with pytest.raises(error, match=says):
            converted(source, tmp_path / "out", data, stream=True, **options)

    refused(ConfigError, "--no-stream", weights="int8")
    refused(CheckpointError, "download them first", source="org/name")
    refused(UnsupportedModelError, "is converted already", source=saved(tiny.convert_tiny(tiny.tiny_llama()), tmp_path / "moe"))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 257}
    refused(UnsupportedModelError, "several stacks", source=saved(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "t5"))
    policy = {"re:.*": {"rule": {"name": "topk", "k": 1}}}
    refused(ConfigError, "one rule is calibrated", config=ConvertConfig(expert_size=8, policy=policy))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "t5"]


def test_a_disk_without_room_for_the_result_is_said_at_once(llama, data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"0\.0 GB free, and the weights need"):
        converted(llama, tmp_path / "out", data, stream=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "large"), [(100_000, True), (10_000_000, False), (None, False)])
def test_weights_that_do_not_fit_are_streamed_unless_somebody_says_otherwise(free, large, llama, monkeypatch):
    monkeypatch.setattr(stream, "_free_bytes", lambda: free)
    assert stream.is_too_large(str(llama), dtype="float32") is large  # 105,856 bytes
    assert not stream.is_too_large("org/name", dtype="float32")
    assert not stream.is_too_large("model.gguf", dtype="float32")
    chosen = []
    monkeypatch.setattr(stream, "convert_streamed", lambda *_, **__: chosen.append(True) or {})
    options = {"data": DataConfig(data="missing.txt"), "config": ConvertConfig(), "calibration": CalibrationConfig()}
    for asked in (None, False):
        try:
            convert_checkpoint(str(llama), Path("out"), stream=asked, **options)
        except DataError:
            chosen.append(False)
    assert chosen == [large, False]


def test_free_memory_is_known_where_linux_says_it():
    free = stream._free_bytes()
    assert free is None or 1e6 < free < 1e15


def test_names_in_files_are_those_of_save_pretrained_where_transformers_renames(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**sizes))
    model.save_pretrained(tmp_path)
    found, _ = open_streamed(str(tmp_path), dtype=torch.float32)
    names = {found.saved_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    assert names == {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    router = found.saved_name(f"{found.blocks[1]}.mlp.moe.router.out.weight")
    first = next(name for name in load_file(tmp_path / "model.safetensors") if "layer.1." in name or "layers.1." in name)
    assert router.startswith(first.partition("1.")[0] + "1.")
