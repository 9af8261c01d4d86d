"""What the documentation's commands and code find where they run: tiny models and data under the names that the pages use.

A page is run in a folder of its own with these names (models are random, data is a few words):

| name | is |
|---|---|
| MODEL, BIG, HuggingFaceTB/SmolLM2-135M-Instruct | a Llama of two layers with ReLU |
| DIR, OTHER | MODEL, converted, with the presets quality, balanced and fast, and a curve |
| ENCODER, google-bert/bert-base-uncased | a BERT without a head |
| google/vit-base-patch16-224-in21k, VIT | a ViT without a head, and a converted one with a head for two classes |
| text.txt, other.txt, train.txt, novels, DATA | text; DATA has the splits train and validation |
| emotions, shoes | labelled texts, and images in folders by class, with both splits |
| TASKS, FOLDER | a file of multiple-choice questions |
| recipes | recipes of the same names, for these models |

Options of size become small ones (`SMALLER`), and devices the CPU.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import tiny
import torch
import transformers
from PIL import Image
from pretraining import BERT, RECIPE, T5, recipe_file
from tokenizers.processors import TemplateProcessing
from typer.main import get_command

from moeify import cli

SMALLER = {
    "--window": "32",
    "--max-tokens": "128",
    "--validation-tokens": "64",
    "--steps": "2",
    "--batch-tokens": "64",
    "--batch-sequences": "2",
    "--router-width": "4",
    "--router-epochs": "1",
    "--projection-epochs": "1",
    "--projection-tokens": "64",
    "--max-new-tokens": "3",
    "--device": "cpu",
    "--limit": "1",
    "--passes": "0",
    "--latency-tokens": "1",
}
"""Every command that has one of these options gets it with this value."""
MORE = {"sweep": ("--targets", "0.5,1"), "preset": ("--no-latency",), "report": ("--no-latency",)}
"""What some get beside."""
NEEDS = {"--window": "--data", "--max-tokens": "--data", "--projection-epochs": "--attention", "--projection-tokens": "--attention"}
NEEDS |= {name: name for name in ("--steps", "--batch-tokens", "--batch-sequences", "--device", "--limit", "--latency-tokens")}
"""Those that are given only beside another, or only where the page gives them."""

WORDS = "a fox and an owl went to the old town hall and found it dark so they sat down and ate their bread until it was day again "
PYDOC = """
name = "gpt_pydoc"
metric = "perplexity"
[model]
source = "MODEL"
[data]
data = "text.txt"
window = 32
[validation]
data = "other.txt"
window = 32
max_tokens = 64
[train]
steps = 1
batch_sequences = 2
[[variant]]
name = "relu"
main = true
[convert]
config = { expert_size = 8, router = { name = "norm", width = 4 } }
calibration = { max_tokens = 256, window = 32, router = { epochs = 1 } }
[sweep]
targets = [0.5]
"""


def save_encoder(folder):
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = tiny.byte_tokenizer(mask_token="<mask>", cls_token="<s>", sep_token="</s>", pad_token="<pad>")
    around = [("<s>", tokenizer.cls_token_id), ("</s>", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.save_pretrained(folder)


def save_vit(folder):
    names = {0: "boot", 1: "sandal"}
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_channels=3,
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def build(root: Path) -> Path:
    """The folder; its models and data are made once and copied for each page."""
    torch.manual_seed(0)
    dense = tiny.save_dense_tiny(root / "MODEL", hidden_act="silu", intermediate_size=256)
    for name in ("BIG", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(dense, root / name)
    save_encoder(root / "ENCODER")
    shutil.copytree(root / "ENCODER", root / "google-bert/bert-base-uncased")
    save_vit(root / "CLASSIFIER")
    transformers.AutoModel.from_pretrained(root / "CLASSIFIER").save_pretrained(root / "google/vit-base-patch16-224-in21k")
    shutil.copy(root / "CLASSIFIER/preprocessor_config.json", root / "google/vit-base-patch16-224-in21k")
    for name in (
        "text.txt",
        "other.txt",
        "train.txt",
        "novels/train.txt",
        "novels/validation.txt",
        "DATA/train.txt",
        "DATA/validation.txt",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(WORDS * (60 if "train" in name else 12))
    for split in ("train", "validation"):
        rows = [{"text": f"i feel {name} today", "label": name} for name in ("joy", "anger", "fear") for _ in range(2)]
        (root / "emotions").mkdir(exist_ok=True)
        (root / f"emotions/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for label, shade in (("boot", 60), ("sandal", 200)):
            (root / "shoes" / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (shade + i,) * 3).save(root / "shoes" / split / label / f"{i}.png")
    shutil.copy(root / "shoes/train/boot/0.png", root / "shoe.png")
    for name in ("TASKS", "FOLDER"):
        (root / name).mkdir()
        (root / name / "which.jsonl").write_text(json.dumps({"query": "It rained, so", "choices": ["he ran", "the"], "gold": 0}) + "\n")
    (root / "recipes/pretrain").mkdir(parents=True)
    (root / "recipes/gpt_pydoc.toml").write_text(PYDOC)
    for name, text in (("gpt", RECIPE), ("bert", BERT), ("t5", T5)):
        file = recipe_file(root / "recipes/pretrain", text)
        short = file.read_text().replace("steps = 20", "steps = 6").replace("eval_every = 10", "eval_every = 6")
        file.rename(root / f"recipes/pretrain/{name}.toml").write_text(short)
    assert run_in(root, "convert MODEL --data text.txt --out DIR --expert-size 8 --target-active 0.5") == 0
    assert run_in(root, "convert CLASSIFIER --data shoes --out VIT --expert-size 8 --target-active 0.5") == 0
    assert run_in(root, "preset DIR --data text.txt --no-latency") == 0
    assert run_in(root, "sweep DIR --data text.txt --targets 0.5,1 --out DIR/curve.json") == 0
    shutil.copytree(root / "DIR", root / "OTHER")
    return root


def run_in(folder: Path, command: str) -> int:
    """The exit code of `moeify COMMAND`, in this process and with `folder` as the current one."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        return cli.run(smaller(shlex.split(command)))
    finally:
        os.chdir(here)


def smaller(arguments: list[str]) -> list[str]:
    """A command's arguments at the size of these models."""
    name, *rest = arguments
    if name.startswith("-"):  # an option of moeify itself
        return arguments
    known = {o for p in get_command(cli.app).commands[name].params for o in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
    for option, value in SMALLER.items():
        if option in rest:
            rest[rest.index(option) + 1] = value
        elif option in known and NEEDS.get(option, "") in ["", *rest] and not (option == "--router-width" and "--router" in rest):
            rest += [option, value]
    rest = [re.sub(r"^train.steps=\d+$", "train.steps=2", word) for word in rest]
    if MORE.get(name, ("--",))[0] in known and not {"--targets", "--values"} & set(rest):
        rest += MORE[name]
    if "--overwrite" in known and "--overwrite" not in rest:
        rest.append("--overwrite")  # a page shows the same output folder twice
    return [name, *rest]


def arguments_of(command: str) -> list[str]:
    """The arguments of `moeify`, of a page's command line."""
    return shlex.split(command.removeprefix("moeify "))


def lay_out(world: Path, folder: Path) -> None:
    """A page's own copy."""
    shutil.copytree(world, folder, dirs_exist_ok=True)
