"""Masks of a real model's run, for kernels to be timed with: which experts one text's consecutive tokens selected.

``masks.npz`` was recorded by ``python -m bench.masks CHECKPOINT --data DATA`` from a converted GPT: four layers of 96 experts of 8 ReLU
neurons, d = 192, trained on text and sparsified, routers fitted; 512 tokens of four windows of Python documentation. A layer's threshold
is the quantile of its own scores at which the wanted share runs. The experts of all layers stand side by side, so a mask of up to 384
columns has the popularity and the neighbourhoods of tokens that a model has, not those of an 8B model: larger ones were not to be had.

Letters: T tokens, E experts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeify.data import DataConfig
from moeify.errors import MoeifyError
from moeify.hf.load import load_model
from moeify.layers import moe_layers
from moeify.pipeline.inputs import calibration_batches
from moeify.select import DynKMax

FILE = Path(__file__).with_name("masks.npz")
FRACTIONS = (0.5, 0.25, 0.1)
"""Shares of pairs that were recorded."""


@torch.no_grad()
def record(source: str, *, data: str, num_tokens: int, window: int, out: Path) -> dict[str, float]:
    """Run the model, every expert on, and write one packed mask a fraction; what share of pairs each has."""
    model, processor = load_model(source)
    layers, scores = moe_layers(model.eval()), {}
    for name, layer in layers.items():
        layer.rule = DynKMax(tau=0.0)
        layer.router.register_forward_hook(lambda _module, _args, found, name=name: scores.setdefault(name, []).append(found))
    for batch in calibration_batches(model, processor, DataConfig(data=data, max_tokens=num_tokens, window=window)):
        model(**batch)
    found, shares = {}, {}
    for fraction in FRACTIONS:
        parts = [_share(torch.cat(of_layer)[:num_tokens], fraction) for of_layer in scores.values()]
        mask_TE = torch.cat(parts, 1)
        found[str(fraction)], found["shape"] = np.packbits(mask_TE.numpy()), np.array(mask_TE.shape)
        shares[str(fraction)] = mask_TE.float().mean().item()
    np.savez_compressed(out, **found)
    return shares


def _share(scores_TE: Tensor, fraction: float) -> Tensor:
    """The pairs of largest score, so many that ``fraction`` of all run."""
    return scores_TE >= scores_TE.flatten().sort(descending=True).values[round(fraction * scores_TE.numel()) - 1]


def recorded(T: int, E: int, fraction: float, *, device: str, file: Path = FILE) -> Tensor:
    """mask_TE: the first T tokens; beyond what was recorded both start over, other columns beside the same tokens.

    Args:
        fraction: one of `FRACTIONS`.
    """
    with np.load(file, allow_pickle=False) as stored:
        shape = tuple(stored["shape"])
        bits = np.unpackbits(stored[str(fraction)], count=shape[0] * shape[1])
    mask_TE = torch.from_numpy(bits.reshape(shape)).bool()
    t_T, e_E = torch.arange(T), torch.arange(E)
    column_TE = (e_E[None, :] * max(1, shape[1] // E) + 97 * (t_T // shape[0])[:, None]) % shape[
        1
    ]  # another token of the same row has other experts
    return mask_TE[(t_T % shape[0])[:, None], column_TE].to(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.masks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="folder of a converted checkpoint")
    parser.add_argument("--data", default="builtin:pydoc", help="what it reads; builtin:pydoc by default")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="tokens that are recorded; 512 by default")
    parser.add_argument("--window", type=int, default=128, metavar="S", help="tokens of a window; 128 by default")
    parser.add_argument("--out", type=Path, default=FILE, help="beside this file by default")
    options = parser.parse_args(argv)
    try:
        print(record(options.source, data=options.data, num_tokens=options.tokens, window=options.window, out=options.out))
    except MoeifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
