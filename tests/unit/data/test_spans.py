"""Span corruption: what the encoder sees and the decoder writes is the text, once each; lengths are fixed."""

import pytest
import torch

from moeify.data import SpanConfig, SpanCorruptionData
from moeify.errors import ConfigError, DataError
from moeify.hf.tokenizer import byte_level

END = "</s>"


def tokenizer(sentinels=20):
    return byte_level("span-corruption", context=64, sentinels=sentinels)


def rebuilt(inputs, labels, sentinels, end):
    """The text from both sides, by the plainest loop."""
    assert inputs[-1] == labels[-1] == end
    spans, current = {}, None
    for token in labels[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text = []
    for token in inputs[:-1]:
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans
    return text


def test_text_is_split_between_both_sides_and_nothing_is_lost():
    config, tok = SpanConfig(), tokenizer()
    length = config.text_length(64)
    windows = torch.randint(0, 256, (5, length), generator=torch.Generator().manual_seed(0))
    batch = SpanCorruptionData(windows, tok, config).batch([3, 1, 1], generator=torch.Generator().manual_seed(1))
    inputs, outputs = config.lengths(length)
    assert batch["input_ids"].shape == (3, inputs)
    assert batch["labels"].shape == (3, outputs)
    sentinels = tok.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    for row, one, other in zip([3, 1, 1], batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert rebuilt(one, other, sentinels, tok.eos_token_id) == windows[row].tolist()
        assert [t for t in one if t in sentinels] == [t for t in other if t in sentinels] == sentinels[: config.spans(length)[1]]
    assert not batch["input_ids"][1].equal(batch["input_ids"][2])  # drawn anew


def test_shares_and_spans_are_those_of_the_paper():
    # T5: inputs of 512 tokens are made of texts of 568, and targets have 114 tokens (its code, random_spans_helper)
    config = SpanConfig()
    assert config.text_length(512) == 568
    assert config.lengths(568) == (512, 114)
    noise, spans = config.spans(568)
    assert (noise, spans) == (85, 28)
    longest = config.text_length(64)
    assert config.lengths(longest)[0] <= 64 < config.lengths(longest + 1)[0]


def test_where_noise_lies_is_uniform():
    config, tok = SpanConfig(noise_frac=0.5, mean_span=2), tokenizer()
    windows = torch.arange(8).expand(4000, -1)
    batch = SpanCorruptionData(windows, tok, config).batch(range(4000), generator=torch.Generator().manual_seed(0))
    hidden = torch.stack([(batch["labels"] == i).any(1) for i in range(8)]).float().mean(1)
    assert config.spans(8) == (4, 2)
    by_hand = torch.zeros(8)
    for a in (1, 2, 3):  # 4 text and 4 noise tokens, each in parts (1, 3), (2, 2) or (3, 1): a of text, n of noise, the rest of text, ...
        for n in (1, 2, 3):
            by_hand[a : a + n] += 1 / 9
            by_hand[4 + n :] += 1 / 9
    torch.testing.assert_close(hidden, by_hand, atol=0.03, rtol=0)


def test_the_same_generator_gives_the_same_batch():
    data = SpanCorruptionData(torch.arange(60).view(2, 30), tokenizer())
    one, other = (data.batch([0, 1], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(one[key].equal(other[key]) for key in one)


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="lacks the sentinel <extra_id_2>"):
        SpanCorruptionData(torch.zeros(1, 60, dtype=torch.int64), tokenizer(2))
    with pytest.raises(DataError, match="no end of sequence"):
        SpanCorruptionData(torch.zeros(1, 60, dtype=torch.int64), byte_level("masked-lm", context=8))
    with pytest.raises(DataError, match="too short for span corruption"):
        SpanConfig().text_length(2)
    for bad in ({"noise_frac": 1.0}, {"mean_span": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SpanConfig(**bad)
