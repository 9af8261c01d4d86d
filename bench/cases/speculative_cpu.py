"""Tokens per second of a sparse model that drafts for itself at a low budget and verifies at a high one, against the high budget alone.

Sides take turns in one process, a round being all prompts: plain `generate` at the high budget; `Speculation` for each draft and length;
and, beside the first length, transformers' own assisted generation with the same draft. Times are of what follows the first token. Prompts
are held-out text. The greedy text of all sides must be one; in fp32 a difference is counted (``other_texts``), for bf16 rounds near ties
the other way.

Beside the measured ratio stands what explains it, from one more call of each side with a clock on every forward: ``draft_cost`` and
``verify_cost`` in plain forwards; ``alpha``, the chance that a drafted token is accepted if all before it were; ``expected``, the speed-up
by the formula of Leviathan et al. for these (fixed lengths only); ``accounted``, tokens of a round over what its forwards cost, loops
aside; and the weight bytes that a step of each reads.

Without ``--model`` a ReLU GPT on bytes is trained and converted first, as `moeify demo` does: few layers and wide FFNs, so that its weights
do not fit in the caches of small machines and a step is bound by memory, not by Python. It takes some ten minutes on two cores and stays in
``--work``. Its greedy text repeats itself, which is easy to draft: rows at temperature 1 (``--temperatures 0,1``) are the harder test.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bench.common import DTYPES, numbers, p80_over_p20, whole_numbers, words
from moeify import (
    ConvertConfig,
    DataConfig,
    Speculation,
    SpeculationCounts,
    convert_checkpoint,
    load_model,
    model_weights,
    moe_layers,
    record_active,
    record_channels,
    self_draft,
    set_rule,
)
from moeify._config import lookup
from moeify._random import seeded
from moeify.channels import sparse_inputs
from moeify.data import text_windows
from moeify.demo import CONTEXT, RandomWindows
from moeify.errors import ConfigError
from moeify.hf.save import save_dense
from moeify.hf.speculate import expected_speedup
from moeify.hf.tokenizer import byte_tokenizer
from moeify.pipeline import CalibrationConfig
from moeify.pipeline.measure import rules_at
from moeify.routers import NormRouterConfig
from moeify.select import DynKMass
from moeify.train.loop import TrainConfig, train

OWN = "own"
"""The high budget that the checkpoint itself has."""
ADAPTED = 0
"""As a draft's length: what `Speculation` makes of it."""
LONGEST = 12
"""Most tokens of a draft whose length adapts."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="a converted or thinned language model; without it one is trained")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the trained model; a later run with the same options takes it")
    parser.add_argument(
        "--dtypes", type=words, default=("float32",), metavar="A,B", help=f"some of {', '.join(DTYPES)}; float32 by default"
    )
    parser.add_argument(
        "--highs",
        type=words,
        default=("1", OWN),
        metavar="F,F",
        help=f"budgets that verify: active fractions, or '{OWN}'; 1,{OWN} by default",
    )
    parser.add_argument("--drafts", type=numbers, default=(0.1, 0.2, 0.3), metavar="F,F", help="active fractions that draft; 0.1,0.2,0.3")
    parser.add_argument(
        "--lengths",
        type=whole_numbers,
        default=(4, 8, ADAPTED),
        metavar="K,K",
        help=f"tokens of a draft; {ADAPTED}: adapted; 4,8,{ADAPTED}",
    )
    parser.add_argument("--temperatures", type=numbers, default=(0.0,), metavar="T,T", help="0 (the default): greedy")
    parser.add_argument("--prompts", type=int, help="texts of a round; 3, with --quick 1")
    parser.add_argument("--prompt-tokens", type=int, help="of each; 64, with --quick 8")
    parser.add_argument("--new-tokens", type=int, help="of each; 128, with --quick 12")
    parser.add_argument("--rounds", type=int, help="timed rounds; 5, with --quick 1")
    parser.add_argument("--shape", type=whole_numbers, metavar="L,D,F", help="of the trained model; 2,512,8192, with --quick 1,32,64")
    parser.add_argument("--steps", type=int, help="of its training, 8 x 256 bytes each; 200, with --quick 2")


def run(
    *,
    quick: bool,
    model: Path | None = None,
    work: Path | None = None,
    dtypes: Sequence[str] = ("float32",),
    highs: Sequence[str] = ("1", OWN),
    drafts: Sequence[float] = (0.1, 0.2, 0.3),
    lengths: Sequence[int] = (4, 8, ADAPTED),
    temperatures: Sequence[float] = (0.0,),
    prompts: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int | None = None,
    shape: Sequence[int] | None = None,
    steps: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows: one per dtype, high budget, temperature, draft and way to draft; medians over the rounds."""
    prompts, prompt_tokens, new_tokens, rounds = (
        (short if quick else full) if given is None else given
        for given, full, short in ((prompts, 3, 1), (prompt_tokens, 64, 8), (new_tokens, 128, 12), (rounds, 5, 1))
    )
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    wanted = {text: _budget(text) for text in highs}
    for option, value, least in (
        ("--prompts", prompts, 1),
        ("--prompt-tokens", prompt_tokens, 1),
        ("--new-tokens", new_tokens, 3),
        ("--rounds", rounds, 1),
        ("--lengths", min(lengths), 0),
        ("--steps", 1 if steps is None else steps, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, got {value}.")
    if wrong := [t for t in temperatures if not 0 <= t < math.inf]:
        raise ConfigError(f"--temperatures must be at least 0 and finite, got {wrong[0]}.")
    if shape is not None and (len(shape) != 3 or min(shape) < 1 or shape[1] % 8):
        raise ConfigError(f"--shape must be layers, width (a multiple of 8) and neurons, got {','.join(map(str, shape))}.")
    if model is not None and (shape is not None or steps is not None or work is not None):
        raise ConfigError("--shape, --steps and --work are of the model that is trained; leave them out with --model.")
    with tempfile.TemporaryDirectory() as temporary:
        if model is None:
            sizes = tuple(shape) if shape is not None else (1, 32, 64) if quick else (2, 512, 8192)
            directory = trained(work or Path(temporary), sizes, steps=steps or (2 if quick else 200), tokens=2_000 if quick else 30_000)
        else:
            directory = model
        for name, dtype in types.items():
            ours, processor = load_model(directory, dtype=dtype)
            texts = _texts(ours, processor, prompts, prompt_tokens, new_tokens)
            own = {n: layer.rule for n, layer in {**sparse_inputs(ours), **moe_layers(ours)}.items()}
            for text, high in wanted.items():
                set_rule(ours, own if high is None else rules_at(directory, high, option="--highs"))
                for temperature in temperatures:
                    bench = _Bench(ours, texts, new_tokens=new_tokens, temperature=temperature, rounds=rounds)
                    labels = {"model": directory.name, "dtype": name, "high": text, "temperature": temperature}
                    labels |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
                    views = {draft: self_draft(ours, rules_at(directory, draft, option="--drafts")) for draft in drafts}
                    for row in bench.rows(views, lengths):
                        yield labels | row
            del ours, bench, views  # before the next one is made


def _budget(text: str) -> float | None:
    if text == OWN:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--highs: {text!r} is neither an active fraction nor '{OWN}'.") from error


# -- the model -----------------------------------------------------------------------------------------------------------------------------


def trained(work: Path, shape: Sequence[int], *, steps: int, tokens: int) -> Path:
    """A converted ReLU GPT on bytes in ``work``; what is there of the same shape and steps is taken.

    Args:
        work: folder.
        shape: layers, width and neurons of an FFN.
        steps: of training, 8 x 256 bytes each.
        tokens: of calibration.
    """
    layers, width, neurons = shape
    place = work / f"gpt-{layers}x{width}x{neurons}-{steps}"
    data = DataConfig(data="builtin:pydoc", split="train", window=CONTEXT)
    tokenizer = byte_tokenizer(context=CONTEXT)
    dense, moe = place / "dense", place / "moe"
    if not (moe / "config.json").is_file():
        config = GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=width,
            n_layer=layers,
            n_head=8,
            n_inner=neurons,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        with seeded(0):
            model = GPT2LMHeadModel(config)
        ids = text_windows(replace(data, max_tokens=None), tokenizer).reshape(-1)
        options = TrainConfig(
            steps=steps, batch_sequences=8, lr=1e-3, warmup_steps=20, min_lr_frac=0.1, weight_decay=0.1, betas=(0.9, 0.95)
        )
        train(model, RandomWindows(ids, seed=0, count=8 * steps), options)
        if dense.exists():
            shutil.rmtree(dense)
        save_dense(model, tokenizer, dense)
        del model
        convert_checkpoint(
            str(dense),
            moe,
            data=data,
            config=ConvertConfig(expert_size=8, router=NormRouterConfig(width=48), rule=DynKMass(mass=1.0)),
            calibration=CalibrationConfig(target_active=0.3, scope="global", max_tokens=tokens, window=CONTEXT),
            overwrite=True,
        )
    return moe


def _texts(model: Any, processor: Any, prompts: int, prompt_tokens: int, new_tokens: int) -> list[Tensor]:
    if processor is None or not model.can_generate():
        raise ConfigError(f"{type(model).__name__} does not generate text.")
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if prompt_tokens + new_tokens > positions:
        raise ConfigError(
            f"--prompt-tokens and --new-tokens: {prompt_tokens + new_tokens} is more than the {positions} positions of the model."
        )
    for config in (model.generation_config, model.config):
        config.eos_token_id = None  # every text has the same length
    data = DataConfig(data="builtin:pydoc", split="validation", window=prompt_tokens, max_tokens=prompts * prompt_tokens)
    return [row[None] for row in text_windows(data, processor)[:prompts]]


# -- sides ---------------------------------------------------------------------------------------------------------------------------------


class _Marks:
    """A streamer that keeps when tokens came: [seconds, how many]."""

    def __init__(self) -> None:
        self.came: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt first."""
        self.came.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing."""

    def after_first(self) -> tuple[float, int]:
        """Seconds from the first new tokens to the last, and how many came after the first."""
        _, first, *later = self.came
        return self.came[-1][0] - first[0], sum(count for _, count in later)


@dataclass(frozen=True)
class _Side:
    """A way to decode."""

    model: Any
    draft: Any = None
    speculation: Speculation | None = None

    def __call__(self, ids: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, float, int]:
        """Text, seconds after the first token, tokens in these."""
        marks = _Marks()
        if self.speculation is not None:
            way: dict[str, Any] = {"custom_generate": self.speculation.streaming(marks)}
        else:
            way = {"streamer": marks} | ({} if self.draft is None else {"assistant_model": self.draft})
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **way, **options)
        return (out, *marks.after_first())


class _Bench:
    """The sides of one high budget and one temperature."""

    def __init__(self, model: Any, texts: Sequence[Tensor], *, new_tokens: int, temperature: float, rounds: int) -> None:
        self._model, self._texts, self._rounds, self._new_tokens = model, texts, rounds, new_tokens
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        self._is_greedy = not temperature
        self._options = {"max_new_tokens": new_tokens, "pad_token_id": 0, **sampling}

    def rows(self, views: Mapping[float, Any], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
        """One per draft and way to draft."""
        plain = _Side(self._model)
        sides: dict[tuple[float, str], _Side] = {}
        for draft, view in views.items():
            for length in lengths:
                speculation = Speculation(view, draft_tokens=length or LONGEST, adapt=length == ADAPTED)
                sides[draft, "adapted" if length == ADAPTED else str(length)] = _Side(self._model, view, speculation)
            view.generation_config.num_assistant_tokens = lengths[0] or LONGEST
            view.generation_config.num_assistant_tokens_schedule = "constant" if lengths[0] else "heuristic"
            view.generation_config.assistant_confidence_threshold = 0.0
            sides[draft, "assistant_model"] = _Side(self._model, view)
        rates, texts = self._timed({("plain", ""): plain, **sides})  # type: ignore[dict-item]
        per_s = {key: statistics.median(found) for key, found in rates.items()}
        plain_per_s = per_s["plain", ""]  # type: ignore[index]
        high_bytes, plain_s = self._bytes(self._model, plain), self._forwards(plain)[1]
        low_bytes = {draft: self._bytes(view, _Side(view)) for draft, view in views.items()}
        for (draft, length), side in sides.items():
            row: dict[str, Any] = {"draft": draft, "length": length, "plain_per_s": plain_per_s, "drafted_per_s": per_s[draft, length]}
            row |= {"ratio": row["drafted_per_s"] / plain_per_s}
            row |= {"spread": max(p80_over_p20(rates[key]) for key in (("plain", ""), (draft, length)))}  # type: ignore[index]
            same = (torch.equal(a, b) for a, b in zip(texts["plain", ""], texts[draft, length], strict=True))  # type: ignore[index]
            row |= {"other_texts": sum(not equal for equal in same) if self._is_greedy else None}
            if side.speculation is not None:
                row |= self._explained(side, plain_s, length)
            yield row | {"high_mb": high_bytes / 1e6, "draft_mb": low_bytes[draft] / 1e6, "plain_us": plain_s * 1e6}

    def _timed(self, sides: Mapping[Any, _Side]) -> tuple[dict[Any, list[float]], dict[Any, list[Tensor]]]:
        """Tokens per second of each side in each round, and the texts of the last; one round of warm-up."""
        rates: dict[Any, list[float]] = {key: [] for key in sides}
        texts: dict[Any, list[Tensor]] = {}
        keys = list(sides)
        for i in range(-1, self._rounds):
            for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
                torch.manual_seed(i + 1)
                found = [sides[key](ids, self._options) for ids in self._texts]
                texts[key] = [out for out, _, _ in found]
                if i >= 0:
                    rates[key].append(sum(tokens for _, _, tokens in found) / sum(seconds for _, seconds, _ in found))
        return rates, texts

    def _explained(self, side: _Side, plain_s: float, length: str) -> dict[str, Any]:
        assert side.speculation is not None
        before = side.speculation.counts
        draft_s, verify_s = self._forwards(side)
        now = side.speculation.counts
        counts = SpeculationCounts(**{name: getattr(now, name) - getattr(before, name) for name in SpeculationCounts.__annotations__})
        costs = {"draft_cost": draft_s / plain_s, "verify_cost": verify_s / plain_s}
        drafted = counts.drafted / counts.rounds
        expected = None if length == "adapted" else expected_speedup(counts.alpha, int(length), **costs)
        accounted = counts.tokens_per_round / (drafted * costs["draft_cost"] + costs["verify_cost"])
        found = {"acceptance": counts.acceptance, "alpha": counts.alpha, "drafted": drafted, "tokens_per_round": counts.tokens_per_round}
        return found | costs | {"expected": expected, "accounted": accounted}

    def _forwards(self, side: _Side) -> tuple[float, float]:
        """Median seconds of a forward of the draft, and of the model's after the prompt."""
        times: dict[str, list[float]] = {"model": [], "draft": []}
        with _clocked(side.model, times["model"]), _clocked(side.draft, times["draft"]):
            for ids in self._texts:
                known = {name: len(found) for name, found in times.items()}
                torch.manual_seed(0)
                side(ids, self._options)
                del times["model"][known["model"]]  # the prompt's
        return statistics.median(times["draft"] or [math.nan]), statistics.median(times["model"])

    def _bytes(self, model: nn.Module, side: _Side) -> float:
        """Weight bytes of a step, experts as they ran and channels as they were skipped while decoding one text."""
        with record_active(model) as active, record_channels(model) as skipped:
            side(self._texts[0], self._options)
        shares = active.per_layer() | {name: 1 - share for name, share in skipped.per_layer().items()}
        return model_weights(model).read_bytes_per_token(shares)


@contextmanager
def _clocked(model: nn.Module | None, seconds: list[float]) -> Iterator[None]:
    """Keep the time of every forward in the block."""
    if model is None:
        yield
        return
    begun: list[float] = []
    hooks = (
        model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - begun.pop())),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
