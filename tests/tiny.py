"""Tiny checkpoints for tests that go through files: a Llama with a byte-level tokenizer, dense or converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moeify.convert import ConvertConfig, convert, replace_projections
from moeify.routers import NormRouterConfig
from moeify.select import DynKMax, Rule
from moeify.sites import ProjectionRecord, find_ffn_sites, projection_width

VOCAB = 257  # the bytes, and the end of text


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Bytes as tokens, in the files that a transformers tokenizer has; ``options`` add special tokens from 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **options)


def tiny_llama(
    *, seed: int = 0, hidden_act: str = "relu", dtype: torch.dtype = torch.float32, intermediate_size: int = 48
) -> LlamaForCausalLM:
    """Two layers, D = 32, F = 48, random weights; ReLU, so that experts differ in how much they do."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        hidden_act=hidden_act,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
    for parameter in model.parameters():  # not model.to(dtype), which rounds the rotary frequencies too and from_pretrained does not
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_inputs(*, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids that exercise all of the vocabulary's size."""
    ids = torch.arange(batch * length).reshape(batch, length) * 37 % VOCAB
    return {"input_ids": ids}


def convert_tiny(model: LlamaForCausalLM, *, rule: Rule | None = None) -> LlamaForCausalLM:
    """Convert in place: experts of 8, untrained norm routers of width 4; every expert runs unless ``rule`` says otherwise."""
    config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=rule or DynKMax(tau=0.0))
    convert(model, config, sites=find_ffn_sites(model, tiny_inputs()))
    return model


def projection_records(model: LlamaForCausalLM) -> list[ProjectionRecord]:
    """q, k, v and o of both layers; k and v are narrow."""
    roles: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
    found = []
    for layer in range(2):
        for role in roles:
            name = f"model.layers.{layer}.self_attn.{role}_proj"
            d_out, d_in = model.get_submodule(name).weight.shape
            width = projection_width(d_in, d_out)
            found.append(ProjectionRecord(name=name, role=role, d_in=d_in, d_out=d_out, width=width, bias=False))
    return found


def replaced_llama(*, seed: int = 0) -> LlamaForCausalLM:
    """All attention projections are MLPs with random weights."""
    model = tiny_llama()
    replace_projections(model, projection_records(model), None, seed=seed)
    return model


def save_dense_tiny(directory: Path, **options: Any) -> Path:
    """A dense checkpoint with its tokenizer on disk."""
    tiny_llama(**options).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_converted_tiny(directory: Path, *, rule: Rule | None = None) -> Path:
    """A converted checkpoint on disk, as plain ``save_pretrained`` writes it."""
    convert_tiny(tiny_llama(), rule=rule).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to the parsed ``config.json`` of a checkpoint."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def silence_ffn(tensors: dict[str, torch.Tensor], layer: int) -> None:
    """Gates far below zero: with ReLU one FFN's neurons are active on bytes above ASCII alone (`byte_tokenizer`'s ids 94 to 187)."""
    tensors["model.embed_tokens.weight"][:, 0] = 5
    tensors["model.embed_tokens.weight"][94:188, 0] = -5
    tensors[f"model.layers.{layer}.mlp.gate_proj.weight"][:, 0] = -10


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply ``change`` to the dict of tensors of a checkpoint's one safetensors file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
