"""FFN inputs found one block at a time: the numbers of one whole forward, and the same after a kill."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_inputs, tiny_llama
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moeify.errors import DataError, UnsupportedModelError
from moeify.hf.streamed import block_names
from moeify.sites import find_ffn_sites
from moeify.train.blockwise import capture_by_block, check_chain, watch_blocks
from moeify.train.capture import capture_ffn_inputs

SIZES = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES)),
    "bloom, whose blocks give more than hidden states": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=257, hidden_size=32, n_layer=3, n_head=4)
    ),
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=257, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32
        )
    ),
}
PADDED = {"input_ids": torch.arange(1, 19).reshape(3, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])}


def batches():
    return [*({"input_ids": torch.arange(10).reshape(2, 5) * (i + 3) % 257} for i in range(2)), PADDED]


def by_block(model, directory, **options):
    """The capture, the sites, and the blocks in the order in which their weights were asked for."""
    inputs = tiny_inputs()
    chain, calls = watch_blocks(model, block_names(model), inputs)
    check_chain(model, chain, calls, inputs)
    sites = find_ffn_sites(model, inputs)
    asked = []

    @contextmanager
    def loaded(name):
        asked.append(name)
        yield

    of_blocks = {name: [site for site in sites if site.down.startswith(f"{name}.")] for name in chain.names}
    captured = capture_by_block(model, chain, of_blocks, batches(), directory, loaded=loaded, **options)
    return captured, sites, asked


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["own dtype", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_capture_by_block_equals_one_pass_of_the_whole(kind, compute, tmp_path):
    model = MODELS[kind]().eval()
    captured, sites, asked = by_block(model, tmp_path / "blocks", compute=compute)
    whole = capture_ffn_inputs(model, sites, batches(), tmp_path / "whole", compute=compute)
    assert asked == block_names(model)
    for site in sites:
        assert captured.num_tokens(site.name) == 10 + 10 + 13
        assert torch.equal(captured.read(site.name), whole.read(site.name))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    left = {path.name for path in (tmp_path / "blocks").iterdir()} - {f"site{i:04d}.bf16" for i in range(len(sites))}
    assert left == {"blocks.json", f"hidden{len(asked):04d}"}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_capture_that_is_killed_goes_on_with_the_block_that_was_not_done(at, tmp_path):
    model = MODELS["gpt2"]().eval()
    names, seen = block_names(model), []

    def kill(name, _inputs):
        seen.append(name)
        if name == names[at]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_block(model, tmp_path / "blocks", done=kill)
    captured, sites, asked = by_block(model, tmp_path / "blocks")
    assert seen == names[: at + 1]
    assert asked == names[at:]
    whole = capture_ffn_inputs(model, sites, batches(), tmp_path / "whole")
    assert all(torch.equal(captured.read(site.name), whole.read(site.name)) for site in sites)
    _, _, asked = by_block(model, tmp_path / "blocks")
    assert asked == []


def test_hidden_states_that_a_crash_of_the_machine_cut_short_are_made_again(tmp_path):
    model = MODELS["gpt2"]().eval()

    def kill(name, _inputs):
        if name.endswith(".2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_block(model, tmp_path / "blocks", done=kill)
    (tmp_path / "blocks" / "hidden0002").write_bytes(b"short")
    _, _, asked = by_block(model, tmp_path / "blocks")
    assert asked == block_names(model)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeify.train.blockwise._Writing._write", full)
    with pytest.raises(DataError, match=r"cannot write to .*No space left.* lower max_tokens"):
        by_block(MODELS["gpt2"]().eval(), tmp_path / "blocks")
    shutil.rmtree(tmp_path / "blocks")


class Skips(nn.Module):
    """Blocks whose second reads what the first read, or gets what the first computed beside it."""

    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.how = how

    def forward(self, x):
        if self.how == "twice":
            return self.layers[1](self.layers[0](self.layers[0](x)))
        first = self.layers[0](x)
        return self.layers[1](x) if self.how == "skips" else self.layers[1](first, first.sum())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return self.linear(x) * scale


@pytest.mark.parametrize(
    ("how", "why"),
    [("twice", "do not each run once"), ("skips", "is not what the next layer reads"), ("scale", "comes from other layers")],
)
def test_blocks_that_are_no_chain_are_refused(how, why):
    model, inputs = Skips(how), {"x": torch.randn(3, 4)}
    with pytest.raises(UnsupportedModelError, match=why):
        check_chain(model, *watch_blocks(model, block_names(model), inputs), inputs)


def test_block_names_refuses_two_stacks_and_none():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 257}
    with pytest.raises(UnsupportedModelError, match="several stacks of layers"):
        block_names(T5ForConditionalGeneration(T5Config(**sizes)))
    with pytest.raises(UnsupportedModelError, match="no list of layers"):
        block_names(nn.Linear(3, 3))
