"""A model for cases that were given none: it shows that they run, its numbers say nothing."""

from pathlib import Path

import torch

from moeify import CalibrationConfig, ConvertConfig, DataConfig, convert_checkpoint
from moeify.hf.save import save_dense
from moeify.hf.tokenizer import byte_tokenizer
from moeify.routers import NormRouterConfig
from moeify.train.fit import RouterTrainConfig


def save_tiny(folder: Path) -> str:
    """A random Llama of two layers, D = 32, F = 48, on bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,  # so that the logits are of ordinary size
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    save_dense(model, byte_tokenizer(context=config.max_position_embeddings), folder)
    return str(folder)


def convert_tiny(folder: Path) -> tuple[str, Path]:
    """The tiny Llama, and its conversion to experts of 8."""
    dense, converted = save_tiny(folder / "dense"), folder / "moe"
    convert_checkpoint(
        dense,
        converted,
        data=DataConfig(data="builtin:pydoc"),
        config=ConvertConfig(expert_size=8, router=NormRouterConfig(width=4)),
        calibration=CalibrationConfig(max_tokens=2048, window=64, router=RouterTrainConfig(epochs=1)),
    )
    return dense, converted
