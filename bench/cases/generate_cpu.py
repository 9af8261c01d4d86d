"""Tokens per second of Hugging Face `generate` with its cache of keys and values, greedy: a dense model against the converted one.

Dense is an ordinary model of the same weights: the converted checkpoint's `to_dense` (every matrix in the order of its shape; the neurons'
order means nothing to it) or ``--dense``. Its kernels are torch's own; the converted model's dense mode, whose weights lie by neuron, is no
baseline. With ``--compiled`` the dense model also runs with a static cache and its decoding steps under `torch.compile`, as `generate`
does it on a GPU by itself.

The converted model runs its own rule, with a knob for each layer such that the wanted fraction of neurons is active: set on router scores
of the prompt, then corrected until the fraction *recorded while decoding from that very prompt* is near. Rows say what was recorded.
Without ``--converted`` the model is random: what a token costs does not depend on what it says.

Sides take turns in one process. A step is one token of every sequence, from the logits before to its own; the first token is timed apart,
in rows of their own at a long prompt. At batch size 1 the roofline stands beside: the FLOPs and weight bytes of a token over the fp32 peaks
that `moeify doctor` measures; caches, and everything but matrix products, come on top.

Letters: B batch, S sequence.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LogitsProcessorList

from bench.common import DTYPES, numbers, p80_over_p20, whole_numbers, words
from moeify import (
    ConvertConfig,
    DataConfig,
    convert,
    example_inputs,
    find_ffn_sites,
    load_model,
    model_cost,
    model_weights,
    moe_layers,
    roofline_s,
    set_rule,
    to_dense,
)
from moeify._config import lookup
from moeify.doctor import doctor
from moeify.errors import ConfigError
from moeify.layers import ActiveRecorder, MoEFFN
from moeify.pipeline import calibration_batches
from moeify.quantize import quantize
from moeify.select import Rule
from moeify.select.calibrate import Calibrator
from moeify.split import ContiguousSplit

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = SMOLLM2 | {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 256}
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.int8: 0.2,
}  # of the largest logit, with every expert on: are these the same model?
NEAR, MOST_TRIALS = 0.01, 8  # of the active fraction
WEIGHTS: dict[str, Callable[[nn.Module], object]] = {"float": lambda model: None, "int8": quantize}
"""What is done to a converted model before it runs; its dense equal takes part."""
NOT_COMPILED = "not asked for"
STATIC = "static cache, decoding steps compiled"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides ``quick``."""
    parser.add_argument(
        "--converted", type=Path, metavar="DIR", help="a converted language model; without it a random one of SmolLM2's shape"
    )
    parser.add_argument("--dense", metavar="MODEL", help="its dense source; by default DIR itself, made dense")
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES), metavar="A,B", help=f"some of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--weights", type=words, default=("float",), metavar="A,B", help="of the experts: float (as --dtypes), int8")
    parser.add_argument("--batches", type=whole_numbers, default=(1, 8), metavar="B,B", help="sequences at once; 1,8 by default")
    parser.add_argument(
        "--fractions", type=numbers, default=(0.5, 0.25), metavar="F,F", help="wanted active fractions; 0.5,0.25 by default"
    )
    parser.add_argument("--prompt-tokens", type=int, help="before decoding begins; 128, with --quick 8")
    parser.add_argument("--new-tokens", type=int, help="decoded from there; 128, with --quick 8")
    parser.add_argument("--long-prompt", type=int, help="tokens before the first token that is timed; 1024, with --quick 32; 0: not timed")
    parser.add_argument("--rounds", type=int, help="timed calls of each side; 5, with --quick 1")
    parser.add_argument("--expert-size", type=int, help="neurons of an expert of the random model; 8 by default")
    parser.add_argument("--compiled", action="store_true", help="the dense model under torch.compile, too")


def run(
    *,
    quick: bool,
    converted: Path | None = None,
    dense: str | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    weights: Sequence[str] = ("float",),
    batches: Sequence[int] = (1, 8),
    fractions: Sequence[float] = (0.5, 0.25),
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    long_prompt: int | None = None,
    rounds: int | None = None,
    expert_size: int | None = None,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows: one per dtype, batch size and fraction for decoding, one per dtype and fraction for the first token; medians over the rounds.

    ratio is dense over ours; spread the larger p80 / p20 of the two; compiled_us null where there is none, and ``compiled`` says why.
    """
    prompt_tokens, new_tokens, long_prompt, rounds = (
        (short if quick else full) if given is None else given
        for given, full, short in ((prompt_tokens, 128, 8), (new_tokens, 128, 8), (long_prompt, 1024, 32), (rounds, 5, 1))
    )
    types = {name: lookup(DTYPES, name, where="--dtypes") for name in dtypes}
    changes = {name: lookup(WEIGHTS, name, where="--weights") for name in weights}
    for option, value, least in (
        ("--batches", min(batches), 1),
        ("--prompt-tokens", prompt_tokens, 2),
        ("--new-tokens", new_tokens, 2),
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, got {value}.")
    if long_prompt < 0 or long_prompt == 1:
        raise ConfigError(f"--long-prompt must be at least 2, or 0, got {long_prompt}.")
    if wrong := [f for f in fractions if not 0 < f <= 1]:
        raise ConfigError(f"--fractions must be in (0, 1], got {wrong[0]}.")
    if dense is not None and converted is None:
        raise ConfigError("--dense is the source of what --converted names; give both, or --converted alone.")
    if expert_size is not None and converted is not None:
        raise ConfigError("--converted has its own experts; leave --expert-size out.")
    for (name, dtype), change in product(types.items(), changes.values()):
        if converted is None:
            pair = _random_pair(TINY if quick else SMOLLM2, dtype, change, expert_size=expert_size or 8)
        else:
            pair = _stored_pair(converted, dense, dtype, change)
        layer = next(iter(moe_layers(pair.ours).values()))
        kind = str(layer.weights().up_FD.dtype).removeprefix("torch.")
        same = {"model": pair.name, "expert_size": layer.bounds[1], "dtype": name, "weights": kind}
        for batch in batches:
            ids_BS = pair.prompts(batch, prompt_tokens, prompt_tokens + new_tokens)
            for row in _decoding(pair, ids_BS, fractions, new_tokens=new_tokens, rounds=rounds, compiled=compiled):
                yield same | row
        if long_prompt:
            for row in _first_token(pair, pair.prompts(1, long_prompt, long_prompt + 1), fractions, rounds=rounds):
                yield same | row
        del pair, layer  # before the next one is made


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two models with the same weights, and text for them."""

    name: str
    dense: Any
    ours: Any
    prompts: Callable[[int, int, int], Tensor]
    """(sequences, tokens of each, positions that will be used) -> ids_BS."""


def _stored_pair(directory: Path, source: str | None, dtype: torch.dtype, change: Callable[[nn.Module], object]) -> _Pair:
    ours, processor = load_model(directory, dtype=dtype)
    if not moe_layers(ours):
        raise ConfigError(f"'{directory}' is not a converted model; moeify convert makes one.")
    if not ours.can_generate():
        raise ConfigError(f"{type(ours).__name__} at '{directory}' does not generate text.")
    change(ours)
    dense, _ = load_model(source or directory, dtype=dtype)
    if source is None:
        change(dense)
    to_dense(dense)

    def prompts(batch: int, tokens: int, positions: int) -> Tensor:
        data = DataConfig(data="builtin:pydoc", window=positions, max_tokens=batch * positions)
        windows = [window["input_ids"] for window in calibration_batches(ours, processor, data, batch_tokens=positions)]
        return torch.cat(windows)[:batch, :tokens]

    return _Pair(name=directory.name, dense=dense, ours=ours, prompts=prompts)


def _random_pair(shape: Mapping[str, Any], dtype: torch.dtype, change: Callable[[nn.Module], object], *, expert_size: int) -> _Pair:
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    convert(ours, ConvertConfig(expert_size=expert_size, split=ContiguousSplit()), sites=find_ffn_sites(ours, example_inputs(ours)))
    change(ours)
    dense = copy.deepcopy(ours)
    to_dense(dense)

    def prompts(batch: int, tokens: int, _: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))

    name = f"random weights, Llama {config.num_hidden_layers} x {config.hidden_size}/{config.intermediate_size}"
    return _Pair(name=name, dense=dense, ours=ours, prompts=prompts)


# -- rows ------------------------------------------------------------------------------------------------------------------------------


def _decoding(
    pair: _Pair, ids_BS: Tensor, fractions: Sequence[float], *, new_tokens: int, rounds: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    batch, prompt_tokens = ids_BS.shape
    tuned = _tuned(pair, ids_BS, fractions, new_tokens=new_tokens, counted=batch)
    sides = {"dense": Side(pair.dense)} | {f"ours {f}": Side(pair.ours, rules) for f, (rules, _) in tuned.items()}
    status = NOT_COMPILED
    if compiled:
        torch.compiler.reset()  # every batch size is a compilation of its own, of which there is a limit
        side = Side(pair.dense, options={"cache_implementation": "static", "compile_config": _on_this_device()})
        if (status := _why_not(side, ids_BS, new_tokens)) == STATIC:
            sides["compiled"] = side
    times = take_turns(sides, ids_BS, new_tokens=new_tokens, rounds=rounds)
    first = {name: statistics.median(t.first_s for t in found) for name, found in times.items()}
    step = {name: [t.step_s for t in found] for name, found in times.items()}
    speed = doctor()["speed"] if batch == 1 else None  # more sequences share what they read
    labels = {"regime": "decode", "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "tokens": batch}
    for wanted, (_, active) in tuned.items():
        ours = f"ours {wanted}"
        row = labels | {"wanted_f": wanted, "f": active} | compared(step, ours) | {"compiled": status}
        seconds = {"dense": row["dense_us"] / 1e6, "ours": row["ours_us"] / 1e6}
        row |= {f"{name}_tokens_per_s": batch / s for name, s in seconds.items()}
        row |= {"dense_ttft_ms": first["dense"] * 1e3, "ours_ttft_ms": first[ours] * 1e3}
        if speed is not None:
            row |= _roofline(pair.ours, ids_BS, active, speed, context=prompt_tokens + new_tokens // 2)
        yield row


def _first_token(pair: _Pair, ids_BS: Tensor, fractions: Sequence[float], *, rounds: int) -> Iterator[dict[str, Any]]:
    batch, prompt_tokens = ids_BS.shape
    tuned = _tuned(pair, ids_BS, fractions, new_tokens=1, counted=ids_BS.numel())
    sides = {"dense": Side(pair.dense)} | {f"ours {f}": Side(pair.ours, rules) for f, (rules, _) in tuned.items()}
    times = take_turns(sides, ids_BS, new_tokens=1, rounds=rounds)
    first = {name: [t.first_s for t in found] for name, found in times.items()}
    labels = {"regime": "first token", "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": 1, "tokens": ids_BS.numel()}
    for wanted, (_, active) in tuned.items():
        row = labels | {"wanted_f": wanted, "f": active} | compared(first, f"ours {wanted}")
        row["compiled"] = "generate compiles decoding steps only"
        yield row | {"dense_ttft_ms": row["dense_us"] / 1e3, "ours_ttft_ms": row["ours_us"] / 1e3}


def compared(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """What rows say of the side ``ours`` beside the others, from seconds a step."""
    medians = {name: statistics.median(found) * 1e6 for name, found in seconds.items()}
    compiled_us = medians.get("compiled")
    return {
        "dense_us": medians["dense"],
        "ours_us": medians[ours],
        "compiled_us": compiled_us,
        "ratio": medians["dense"] / medians[ours],
        "compiled_over_ours": None if compiled_us is None else compiled_us / medians[ours],
        "spread": max(p80_over_p20(seconds[name]) for name in ("dense", ours)),
    }


def _roofline(model: nn.Module, ids_BS: Tensor, active: float, speed: Mapping[str, float], *, context: int) -> dict[str, float]:
    weights = model_weights(model)
    cost = model_cost(model, {"input_ids": ids_BS}).at_context(context)
    routers = sum(size for _, size in weights.router.values())
    sides = {
        "dense": (cost.dense_flops_per_token, weights.read_bytes_per_token() - routers),
        "ours": (cost.flops_per_token(active), weights.read_bytes_per_token(active)),
    }
    peaks = {"peak_flops_per_s": speed["matmul_flops_per_s"], "peak_bytes_per_s": speed["copy_bytes_per_s"]}
    return {
        f"{name}_roofline_us": roofline_s(flops=flops, num_bytes=num_bytes, **peaks) * 1e6 for name, (flops, num_bytes) in sides.items()
    }


# -- clock -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """One call of `generate`."""

    first_s: float
    """Until the logits of the first new token."""
    step_s: float
    """Of each later one, in the mean; nan where there is none."""


@dataclass(frozen=True)
class Side:
    """A model as it is timed."""

    model: Any
    rules: Mapping[str, Rule] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def prepare(self, ids_BS: Tensor) -> None:
        """Set the rules; what a layer makes once for a rule is not part of a token."""
        if self.rules is not None:
            set_rule(self.model, self.rules)
            self.model(ids_BS[:, :1])

    def __call__(self, ids_BS: Tensor, new_tokens: int) -> Times:
        marks: list[float] = []

        def clock(_: Tensor, scores: Tensor) -> Tensor:
            marks.append(time.perf_counter())
            return scores

        start = time.perf_counter()
        self.model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
            **self.options,
        )
        assert len(marks) == new_tokens
        return Times(marks[0] - start, (marks[-1] - marks[0]) / (new_tokens - 1) if new_tokens > 1 else math.nan)


def take_turns(sides: Mapping[str, Side], ids_BS: Tensor, *, new_tokens: int, rounds: int) -> dict[str, list[Times]]:
    """Times of each side: one round of warm-up, then rounds that each begin with another side."""
    times: dict[str, list[Times]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(-1, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            sides[name].prepare(ids_BS)
            found = sides[name](ids_BS, new_tokens)
            if i >= 0:
                times[name].append(found)
    return times


def _on_this_device() -> CompileConfig:
    config = CompileConfig(dynamic=False, mode="default")
    config._compile_all_devices = True  # transformers compiles on GPUs alone unless told so
    return config


def _why_not(side: Side, ids_BS: Tensor, new_tokens: int) -> str:
    """Compile; what the rows say of it."""
    try:
        side(ids_BS, new_tokens)
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:  # torch's compiler raises RuntimeErrors; OSError: no compiler
        return f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return STATIC


# -- active fraction -------------------------------------------------------------------------------------------------------------------


class _Active(ActiveRecorder):
    """Counts forwards of so many tokens only: the decoding steps of a call, or its prompt."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens

    def add(self, layer: MoEFFN, mask_TE: Tensor, *, shape: Sequence[int]) -> None:
        if mask_TE.shape[0] == self._num_tokens:
            super().add(layer, mask_TE, shape=shape)


def _tuned(
    pair: _Pair, ids_BS: Tensor, fractions: Sequence[float], *, new_tokens: int, counted: int
) -> dict[float, tuple[Mapping[str, Rule], float]]:
    """Wanted fraction -> rules, and the fraction that they run in calls with this prompt.

    Args:
        pair: checked here to be one model twice: with every expert on both give the same logits.
        counted: tokens of the forwards whose experts are counted.
    """
    layers = moe_layers(pair.ours)
    scores = _router_scores(pair.ours, ids_BS)
    calibrator = Calibrator(
        type(next(iter(layers.values())).rule),
        scores,
        weights={name: float(layer.site.d_ff) for name, layer in layers.items()},
        always_on={name: layer.always_on for name, layer in layers.items()},
    )
    set_rule(pair.ours, calibrator.solve(1.0).rules)
    _check_same(pair, ids_BS)

    def measured(share: float) -> tuple[Mapping[str, Rule], float]:
        rules = calibrator.solve(share).rules
        side, active = Side(pair.ours, rules), _Active(counted)
        side.prepare(ids_BS)
        with _recording(pair.ours, active):
            side(ids_BS, new_tokens)
        return rules, active.active_fraction()

    return {wanted: _nearest(measured, wanted) for wanted in fractions}


def _nearest(measured: Callable[[float], tuple[Mapping[str, Rule], float]], wanted: float) -> tuple[Mapping[str, Rule], float]:
    """Rules that run a fraction near ``wanted``; the share asked of calibration is interpolated between too little and too much."""
    low, high = (0.0, 0.0), (1.0, 1.0)  # (share asked, fraction measured)
    trials = []
    for _ in range(MOST_TRIALS):
        share = low[0] + (wanted - low[1]) * (high[0] - low[0]) / (high[1] - low[1])
        rules, found = measured(min(max(share, 1e-6), 1.0))
        trials.append((rules, found))
        if abs(found - wanted) <= NEAR:
            break
        if found < wanted:
            low = (share, found)
        else:
            high = (share, found)
    return min(trials, key=lambda trial: abs(trial[1] - wanted))


@torch.no_grad()
def _router_scores(model: nn.Module, ids_BS: Tensor) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    layers = moe_layers(model)
    hooks = [
        layer.router.register_forward_hook(lambda _module, _args, out, name=name: scores.__setitem__(name, out))
        for name, layer in layers.items()
    ]
    try:
        model(ids_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return scores


@torch.no_grad()
def _check_same(pair: _Pair, ids_BS: Tensor) -> None:
    dense, ours = (model(ids_BS[:1, :16]).logits.float() for model in (pair.dense, pair.ours))
    error = ((dense - ours).abs().max() / dense.abs().max()).item()
    stored = next(iter(moe_layers(pair.ours).values())).weights().up_FD.dtype
    if not error <= max(TOLERANCE[dtype] for dtype in (pair.dense.dtype, stored)):
        raise ConfigError(
            f"'{pair.name}' with every expert on differs from the dense model by {error:.2g} of the largest logit: not the same model."
        )


@contextmanager
def _recording(model: nn.Module, recorder: ActiveRecorder) -> Iterator[None]:
    layers = moe_layers(model).values()
    for layer in layers:
        layer.recorder = recorder
    try:
        yield
    finally:
        for layer in layers:
            layer.recorder = None
