"""Self-speculative decoding: a model's cheap rules draft some tokens, its own rules verify them in one forward.

Letters: S tokens so far, V vocabulary, K drafted tokens.

Draft and model share one cache of keys and values. The draft writes those of the tokens that it proposes; they are cut off again, and the
verifying forward writes the model's own. So what stays in the cache, and every token that is given out, is of the model, and no prompt is
read twice. `transformers`' own loop (``assistant_model=``) has a cache for each and calls `generate` for every draft.

One round of K drafted tokens costs K steps of the draft and one forward of K + 1 tokens, and gives out 1 to K + 1 tokens. With a share a of
drafted tokens accepted, independently, the expected number is (1 - a^(K + 1)) / (1 - a) (`expected_tokens`).

Source: Leviathan et al. 2023, arXiv:2211.17192; drafts by the model itself: Zhang et al. 2024, arXiv:2309.08168.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from .draft import check_draft

_KNOWN = frozenset({"attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep", "cache_position", "return_dict"})
"""What `generate` hands over beside the text, and the loop knows how to continue."""
_NO_MATTER = frozenset({"tokenizer", "assistant_tokenizer", "synced_gpus"})

FIRST = 4
"""Tokens of the first draft where their number adapts."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""(ids (1, S), logits (1, V)) -> logits (1, V)."""


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens given out by a round of ``drafted`` tokens, each accepted with probability ``acceptance`` in [0, 1] if all before it were.

    Source: Leviathan et al. 2023, arXiv:2211.17192, equation 1.
    """
    return sum(acceptance**i for i in range(drafted + 1))


def expected_speedup(acceptance: float, drafted: int, *, draft_cost: float, verify_cost: float) -> float:
    """Tokens per second over plain decoding's.

    Args:
        acceptance: of a drafted token, in [0, 1].
        drafted: tokens of a round.
        draft_cost: of one drafted token, in steps of plain decoding.
        verify_cost: of one forward of ``drafted + 1`` tokens, in the same unit.

    Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8, where the verifying forward costs one step.
    """
    return expected_tokens(acceptance, drafted) / (drafted * draft_cost + verify_cost)


@dataclass(frozen=True, kw_only=True)
class SpeculationCounts:
    """What a `Speculation` has done."""

    rounds: int = 0
    """Verifying forwards."""
    drafted: int = 0
    """Tokens that the draft proposed."""
    accepted: int = 0
    """Of these, tokens that the model agreed with."""
    refused: int = 0
    """Rounds in which the model disagreed with a drafted token."""
    new_tokens: int = 0
    """Tokens given out, the model's own among them."""

    def __add__(self, more: "SpeculationCounts") -> "SpeculationCounts":
        """Of both."""
        return SpeculationCounts(**{f.name: getattr(self, f.name) + getattr(more, f.name) for f in fields(self)})

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted, in [0, 1]; nan without any."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def alpha(self) -> float:
        """Chance that a drafted token is accepted if all before it in its round were, in [0, 1]; nan without any."""
        asked = self.accepted + self.refused
        return self.accepted / asked if asked else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """Mean of what a verifying forward gave out, in [1, K + 1]; nan without any."""
        return 1 + self.accepted / self.rounds if self.rounds else float("nan")


class Speculation:
    """Decodes with a draft, as ``model.generate(..., custom_generate=Speculation(draft))``.

    Greedy decoding gives the model's own text: each token is the argmax of the model's logits for what stands before it. The verifying
    forward reads several tokens at once, by other kernels perhaps than one at a time: where two logits are equal up to that rounding,
    either may be taken. Sampling gives tokens of the model's own distribution, not the same ones as without a draft for a seed.

    One sequence at a time, decoders that read text, and caches that can be cut (dynamic ones).

    Args:
        draft: from `self_draft`.
        draft_tokens: most tokens that are drafted before they are verified, at least 1.
        adapt: whether fewer are drafted where fewer are accepted: a call begins with `FIRST`; after a round of which all were accepted
            the next drafts 2 more, after another one 1 more than were accepted. Else every round drafts ``draft_tokens``.
        confidence: a round's draft ends with the first token whose probability, by the draft, is below it; in [0, 1], 0 asks nothing.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(self, draft: Any, *, draft_tokens: int = 8, adapt: bool = True, confidence: float = 0.0) -> None:
        if draft_tokens < 1:
            raise ConfigError(f"draft_tokens must be at least 1, got {draft_tokens}.")
        if not 0 <= confidence <= 1:
            raise ConfigError(f"confidence must be in [0, 1], got {confidence}.")
        self.draft, self.draft_tokens, self.adapt, self.confidence = draft, draft_tokens, adapt, confidence
        self._counts, self._lock = SpeculationCounts(), threading.Lock()

    @property
    def counts(self) -> SpeculationCounts:
        """Of all calls that are finished."""
        return self._counts

    def streaming(self, streamer: Any) -> Callable[..., Any]:
        """The same decoding, told to ``streamer``; for ``custom_generate``.

        `generate` of transformers 5.23 does not hand its own ``streamer`` on to a custom loop, and would never end it.
        """
        return partial(self, streamer=streamer)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls.

        Raises:
            ConfigError: beams, several sequences, no cache or one that cannot be cut, or hidden states and attentions are asked for.
            UnsupportedModelError: the draft is not of this model, or the model reads more than text.
        """
        _check(model, input_ids, generation_config, model_kwargs)
        check_draft(self.draft, model)
        text = _Text(model, self.draft, input_ids, logits_processor, generation_config, model_kwargs)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        prompt_tokens = input_ids.shape[1]
        counts, done, length = SpeculationCounts(), False, min(FIRST, self.draft_tokens) if self.adapt else self.draft_tokens
        kept = text.read_prompt()
        while True:
            for token in kept:
                done = text.add(token, stopping_criteria)
                if streamer is not None:
                    streamer.put(text.ids[0, -1:].cpu())
                if done:
                    break
            if done:
                break
            # the last of so many tokens is the model's own
            most = min(length, generation_config.max_length - text.ids.shape[1] - 1)
            proposal = text.propose(most, self.confidence)
            kept = text.verify(proposal)
            if self.adapt:
                length = min(length + 2 if len(kept) > len(proposal.tokens) else len(kept), self.draft_tokens)
            agreed = len(kept) - 1
            counts += SpeculationCounts(rounds=1, drafted=len(proposal.tokens), accepted=agreed, refused=int(agreed < len(proposal.tokens)))
        if streamer is not None:
            streamer.end()
        text.end()
        with self._lock:
            self._counts += replace(counts, new_tokens=text.ids.shape[1] - prompt_tokens)
        return text.output(generation_config)


class _Proposal(NamedTuple):
    """What the draft says comes next."""

    tokens: list[int]
    probs: list[Tensor]
    """Of each token the distribution (V,) that it was drawn from; empty for greedy decoding."""


class _Text:
    """One sequence that is being decoded: its ids, the cache that model and draft share, and what the model said of each new token.

    Between rounds the cache holds all ids but the last.
    """

    def __init__(self, model: Any, draft: Any, ids: Tensor, processor: Any, config: Any, kwargs: dict[str, Any]) -> None:
        self.ids = ids
        self._model, self._draft, self._config = model, draft, config
        self._process: Processor | None = processor or None
        self._samples = bool(config.do_sample)
        self._mask, self._positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        self._cache = kwargs["past_key_values"]
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in kwargs else {}
        self._in_cache = 0
        self._said: list[tuple[Tensor, Tensor]] = []  # (logits, scores) (1, V) of tokens that are about to be added
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []

    # -- the forwards ---------------------------------------------------------------------------------------------------------------------

    def _forward(self, model: Any, ids: Tensor, **options: Any) -> Tensor:
        """Logits (1, S, V) in fp32 of what follows the cache; it grows by these ids."""
        start, length = self._in_cache, self._in_cache + ids.shape[1]
        if self._mask is not None:
            missing = length - self._mask.shape[1]
            grown = self._mask if missing <= 0 else torch.cat([self._mask, self._mask.new_ones(1, missing)], dim=1)
            options["attention_mask"] = grown[:, :length]
        if self._positions is not None:
            known = self._positions.shape[-1]
            if length > known:
                more = self._positions[..., -1:] + torch.arange(1, length - known + 1, device=self._positions.device)
                self._positions = torch.cat([self._positions, more], dim=-1)
            options["position_ids"] = self._positions[..., start:length]
        output = model(input_ids=ids, past_key_values=self._cache, use_cache=True, return_dict=True, **options)
        self._cache, self._in_cache = output.past_key_values, length
        logits: Tensor = output.logits
        return logits.to(device=ids.device, dtype=torch.float32)

    def _cut(self, length: int) -> None:
        if (surplus := self._in_cache - length) > 0:
            self._cache.crop(-surplus)
            self._in_cache = length

    def read_prompt(self) -> list[int]:
        """The model's first token."""
        known = self._in_cache = self._cache.get_seq_length()
        if known >= self.ids.shape[1]:
            raise ConfigError(
                f"the cache holds {known} tokens, the text {self.ids.shape[1]}; give all of the text with what was cached of it."
            )
        if self._positions is not None and self._positions.shape[-1] < self.ids.shape[1]:
            raise ConfigError("position_ids are shorter than the text; give them for all of it.")
        logits_V = self._forward(self._model, self.ids[:, known:], **self._keep_last)[0, -1]
        if any(not hasattr(layer, "crop") for layer in getattr(self._cache, "layers", ())) or not hasattr(self._cache, "crop"):
            raise ConfigError(f"self-speculative decoding cuts its cache, which a {type(self._cache).__name__} cannot; use a dynamic one.")
        if hasattr(self._cache, "activate_past_recording"):  # sliding windows forget what a cut may need again
            self._cache.activate_past_recording()
        scores_V = self._processed(self.ids, logits_V)
        self._said = [(logits_V[None], scores_V[None])]
        return [self._choose(scores_V)]

    def propose(self, most: int, confidence: float) -> _Proposal:
        """Up to ``most`` tokens by the draft; the cache is left as it was."""
        ids, length, found = self.ids, self._in_cache, _Proposal([], [])
        while len(found.tokens) < most:
            scores_V = self._processed(ids, self._forward(self._draft, ids[:, self._in_cache :])[0, -1])
            probs_V = scores_V.softmax(-1) if self._samples or confidence else None
            token = self._choose(scores_V)
            found.tokens.append(token)
            if self._samples and probs_V is not None:
                found.probs.append(probs_V)
            if probs_V is not None and confidence and float(probs_V.max()) < confidence:
                break
            ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
        self._cut(length)
        return found

    def verify(self, proposal: _Proposal) -> list[int]:
        """The drafted tokens that the model agrees with, and one of its own; the cache holds what they follow."""
        start, drafted = self._in_cache, proposal.tokens
        ids = torch.cat([self.ids, self.ids.new_tensor([drafted])], dim=1) if drafted else self.ids
        logits_KV = self._forward(self._model, ids[:, start:])[0]
        if self._samples or self._process is not None:
            kept = self._one_by_one(ids, logits_KV, proposal)
        else:
            chosen = logits_KV.argmax(-1).tolist()
            agreed = next((i for i, token in enumerate(drafted) if token != chosen[i]), len(drafted))
            kept = chosen[: agreed + 1]
            self._said = [(row[None], row[None]) for row in logits_KV[: agreed + 1]]
        self._cut(start + len(kept))
        return kept

    def _one_by_one(self, ids: Tensor, logits_KV: Tensor, proposal: _Proposal) -> list[int]:
        # A processor sees the text before the token, so what follows a refused token is not even asked.
        first, kept = self.ids.shape[1], list[int]()
        self._said = []
        for i, logits_V in enumerate(logits_KV):
            scores_V = self._processed(ids[:, : first + i], logits_V)
            self._said.append((logits_V[None], scores_V[None]))
            drafted = proposal.tokens[i] if i < len(proposal.tokens) else None
            if drafted is None or not self._samples:
                kept.append(self._choose(scores_V))
                if drafted != kept[-1]:
                    break
                continue
            probs_V, draft_V = scores_V.softmax(-1), proposal.probs[i]
            if float(torch.rand((), device=probs_V.device)) * float(draft_V[drafted]) < float(probs_V[drafted]):
                kept.append(drafted)
                continue
            rest_V = (probs_V - draft_V).clamp(min=0)
            kept.append(int(torch.multinomial(rest_V if float(rest_V.sum()) > 0 else probs_V, 1)))
            break
        return kept

    # -- tokens -----------------------------------------------------------------------------------------------------------------------

    def _processed(self, ids: Tensor, logits_V: Tensor) -> Tensor:
        return logits_V if self._process is None else self._process(ids, logits_V[None].clone())[0]

    def _choose(self, scores_V: Tensor) -> int:
        return int(torch.multinomial(scores_V.softmax(-1), 1)) if self._samples else int(scores_V.argmax())

    def add(self, token: int, stopping_criteria: Any) -> bool:
        """Give a token out; whether it is the last one."""
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        logits, scores = self._said.pop(0)
        if self._config.return_dict_in_generate:
            if self._config.output_logits:
                self._logits.append(logits)
            if self._config.output_scores:
                self._scores.append(scores)
        return bool(stopping_criteria(self.ids, tuple(self._scores) if self._scores else None).all())

    def end(self) -> None:
        """Leave the cache as plain decoding does: with all tokens but the last."""
        self._cut(self.ids.shape[1] - 1)

    def output(self, config: Any) -> Any:
        """What `generate` returns."""
        if not config.return_dict_in_generate:
            return self.ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=self.ids,  # type: ignore[arg-type]
            scores=tuple(self._scores) if config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(self._logits) if config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=self._cache,
        )


def _check(model: nn.Module, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> None:
    """Everything that can be seen before a token is read."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder, which Speculation does not know; use generate(assistant_model=self_draft(...))."
        )
    if (config.num_beams or 1) > 1 or ids.shape[0] != 1:
        raise ConfigError(
            f"self-speculative decoding takes one sequence and no beams, got {ids.shape[0]} sequences and num_beams={config.num_beams}."
        )
    if not kwargs.get("use_cache") or kwargs.get("past_key_values") is None:
        raise ConfigError("self-speculative decoding needs a cache; leave use_cache=True.")
    if config.cache_implementation not in (None, "dynamic"):
        raise ConfigError(
            f"self-speculative decoding cuts its cache, which cache_implementation={config.cache_implementation!r} does not allow; "
            "leave it out."
        )
    if config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions):
        raise ConfigError("self-speculative decoding keeps scores and logits, but neither hidden states nor attentions.")
    if more := sorted(name for name, value in kwargs.items() if value is not None and name not in _KNOWN | _NO_MATTER):
        raise UnsupportedModelError(f"Speculation reads text alone, got {more[0]!r}; use generate(assistant_model=self_draft(...)).")
