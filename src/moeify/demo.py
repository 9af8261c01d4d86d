"""The whole idea in minutes: pre-train a small ReLU GPT, convert it, sweep quality against cost, save, load it elsewhere, generate."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._progress import NO_PROGRESS, Progress
from ._random import seeded
from .convert import ConvertConfig
from .data import DataConfig, text_windows
from .errors import CheckpointError, MoeifyError
from .hf.folders import check_output
from .hf.save import save_dense
from .hf.tokenizer import byte_tokenizer
from .pipeline import CalibrationConfig, convert_checkpoint, sweep_checkpoint
from .report.plots import plot_curve
from .routers import NormRouterConfig
from .select import DynKMass
from .train.loop import TrainConfig, train

CONTEXT = 256
PROMPT = "The "
_RUN = "demo.json"


def run_demo(out: Path, *, steps: int = 300, seed: int = 0, overwrite: bool = False, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Pre-train, convert, sweep, save, load in a fresh process and generate; everything lands in ``out``.

    Args:
        out: new folder; gets ``dense/``, ``moe/``, ``curve.json`` and ``curve.png``.
        steps: training steps of 16 x 256 bytes.
        seed: of initial weights, batches and conversion.
        overwrite: replace what an earlier demo left in ``out``; its pre-training is kept if seed and steps are the same.
        progress: told every stage.

    Returns:
        The curve, the text that the fresh process generated, and where the files are.

    Raises:
        MoeifyError: ``out`` exists and is not empty, or a stage failed.
    """
    train_data = DataConfig(data="builtin:pydoc", split="train", window=CONTEXT)
    tokenizer = byte_tokenizer(context=CONTEXT)
    dense, moe = out / "dense", out / "moe"
    check_output(moe, overwrite=overwrite)
    run = {"steps": steps, "seed": seed}
    if _earlier_run(out) != run:
        for old in (dense, out / "curve.json"):
            if old.exists() and not overwrite:
                raise CheckpointError(f"'{old}' is of another demo; --overwrite replaces it, or choose another --out.")
        model = small_relu_gpt(seed=seed)
        ids = text_windows(replace(train_data, max_tokens=None), tokenizer, progress=progress).reshape(-1)
        config = TrainConfig(
            steps=steps, batch_sequences=16, lr=2e-3, warmup_steps=20, min_lr_frac=0.1, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        train(model, RandomWindows(ids, seed=seed, count=16 * steps), config, progress=progress)
        if dense.exists():
            shutil.rmtree(dense)
        save_dense(model, tokenizer, dense)
        (out / "curve.json").unlink(missing_ok=True)
        (out / _RUN).write_text(json.dumps(run))
    convert_checkpoint(
        str(dense),
        moe,
        data=train_data,
        config=ConvertConfig(expert_size=8, router=NormRouterConfig(width=48), rule=DynKMass(mass=1.0), seed=seed),
        calibration=CalibrationConfig(target_active=0.3, scope="global", max_tokens=60_000, window=CONTEXT, seed=seed),
        overwrite=overwrite,
        progress=progress,
    )
    validation = replace(train_data, split="validation", max_tokens=16_384)
    curve = sweep_checkpoint(moe, data=validation, batch_size=16, out=out / "curve.json", progress=progress)
    plot_curve(curve, out / "curve.png")
    return {"curve": curve, "text": generate_elsewhere(moe, PROMPT), "checkpoint": str(moe), "plot": str(out / "curve.png")}


def _earlier_run(out: Path) -> object:
    """What the pre-training that lies in ``out`` was made with; it is kept if it is the same."""
    try:
        return json.loads((out / _RUN).read_text()) if (out / "dense" / "config.json").is_file() else None
    except (OSError, ValueError):
        return None


def small_relu_gpt(*, seed: int) -> Any:
    """A GPT-2 of 4 layers, D = 256, F = 1024, ReLU, on bytes: 3.3 M parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_inner=1024,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=True,
    )
    with seeded(seed):
        return GPT2LMHeadModel(config)


class RandomWindows:
    """Training data: windows that start anywhere in ``ids_T``."""

    def __init__(self, ids_T: Tensor, *, seed: int, count: int) -> None:
        self._ids_T = ids_T
        self._starts = torch.randint(0, len(ids_T) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, rows: Sequence[int], *, generator: torch.Generator) -> dict[str, Tensor]:
        """Each window is its own label."""
        ids_BS = torch.stack([self._ids_T[self._starts[row] : self._starts[row] + CONTEXT] for row in rows])
        return {"input_ids": ids_BS, "labels": ids_BS}


def generate_elsewhere(checkpoint: Path, prompt: str) -> str:
    """Load the checkpoint in a fresh process, as a user would, and continue ``prompt``.

    Raises:
        MoeifyError: that process failed; with its last line.
    """
    code = (
        "import sys, moeify\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert moeify.moe_layers(model)\n"
        "ids = model.generate(**tokenizer(sys.argv[2], return_tensors='pt'), max_new_tokens=60, do_sample=False, pad_token_id=0)\n"
        "print(tokenizer.decode(ids[0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint), prompt], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MoeifyError(f"a fresh process could not load '{checkpoint}': {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()
