"""Tiny GPTs and data for tests of sparse-dense pre-training."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moeify.sites import find_ffn_sites


def tiny_gpt(*, seed=0, inner=50, act="relu"):
    """Two layers, D = 32, F = 50: 8 experts of 6 or 7 neurons; biases, (in, out) weights, no dropout."""
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=inner, activation_function=act,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # as `hf.random.random_model` sets it
    return model


def sites_of(model):
    return find_ffn_sites(model, {"input_ids": torch.arange(16)[None]})


class Counting:
    """Counting modulo a prime from different starts: quickly learned."""

    def __len__(self):
        return 40

    def batch(self, rows, *, generator):
        ids = (torch.tensor(rows)[:, None] * 5 + torch.arange(16) * 7) % 61
        return {"input_ids": ids, "labels": ids}


PROBE = [Counting().batch(rows, generator=None) for rows in ((36, 37), (38, 39))]


RECIPE = """
name = "tiny"
task = "causal-lm"
[model.architecture]
model_type = "gpt2"
n_positions = 32
n_embd = 16
n_layer = 2
n_head = 2
n_inner = 32
activation_function = "relu"
[data]
data = "text"
split = "train"
window = 32
[validation]
max_tokens = 320
[train]
steps = 20
batch_sequences = 4
lr = 3e-3
compute = "float32"
eval_every = 10
log_every = 1
save_every = 5
[ssd]
num_experts = 8
selected = 3
schedule = "fixed"
switches = [0.35, 0.8]
probe_frac = 0.2
[log]
tensorboard = false
"""
"""Dense for 7 steps, sparse until step 16, dense again; on bytes."""

BERT = """
name = "bert"
task = "masked-lm"
[model.architecture]
model_type = "bert"
max_position_embeddings = 32
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
hidden_act = "relu"
"""

T5 = """
name = "t5"
task = "span-corruption"
[model.architecture]
model_type = "t5"
d_model = 16
d_kv = 8
d_ff = 32
num_layers = 1
num_heads = 2
feed_forward_proj = "relu"
"""


WORDS = "the quick brown fox jumps over a lazy dog while five wizards box very quietly in the old town hall"


def recipe_file(folder, text=RECIPE):
    """A recipe and its text, in a folder."""
    words = WORDS.split()
    (folder / "text").mkdir(exist_ok=True)
    for i in range(30):  # whole documents are dealt to train and validation
        lines = [" ".join(words[(i * i + k * 3 + j * (k % 7 + 1)) % len(words)] for j in range(12)) for k in range(12)]
        (folder / "text" / f"{i}.txt").write_text("\n".join(lines) + "\n")
    if text is not RECIPE:
        text += RECIPE[RECIPE.index("[data]") :]
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"
