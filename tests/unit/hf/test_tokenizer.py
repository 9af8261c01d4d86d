"""Tokenizers made here load as any other, and are the same each time."""

import pytest

from moeify.data import special_ids
from moeify.errors import ConfigError, DataError
from moeify.hf.tokenizer import SPECIALS, TokenizerTrainConfig, byte_level, load_tokenizer, train_tokenizer

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog; naïve café {i * 7}." for i in range(200)]
ODD = "naïve café 漢字\n\tfox"


@pytest.mark.parametrize("task", list(SPECIALS))
def test_a_trained_tokenizer_round_trips_and_is_deterministic(task, tmp_path):
    sentinels = 5 if task == "span-corruption" else 0
    config = TokenizerTrainConfig(vocab_size=400)
    first, second = (train_tokenizer(config, iter(TEXTS), task, context=64, sentinels=sentinels) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 400
    first.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.all_special_ids == first.all_special_ids
    ids = loaded(ODD, add_special_tokens=False)["input_ids"]
    assert ids == first(ODD, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == ODD
    assert len(ids) < len(ODD.encode())
    for name, text in SPECIALS[task].items():
        assert getattr(loaded, name) == text


def test_special_tokens_stand_behind_the_bytes():
    masked, spans = byte_level("masked-lm", context=8), byte_level("span-corruption", context=8, sentinels=3)
    assert len(byte_level("causal-lm", context=8)) == 257
    assert (len(masked), len(spans)) == (260, 261)
    assert special_ids(masked) == ([masked.cls_token_id], [masked.sep_token_id])
    assert special_ids(spans) == ([], [spans.eos_token_id])
    assert masked.mask_token_id == 259
    assert len(masked("é")["input_ids"]) == 4


def test_only_the_beginning_of_the_data_is_read():
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    train_tokenizer(TokenizerTrainConfig(vocab_size=300, characters=500), texts(), "causal-lm", context=8)
    assert len(read) < 10


def test_too_little_text_and_small_vocabularies_are_refused():
    with pytest.raises(DataError, match=r"different tokens only; set vocab_size \(5000\)"):
        train_tokenizer(TokenizerTrainConfig(vocab_size=5000), TEXTS, "causal-lm", context=8)
    with pytest.raises(ConfigError, match="at least 300"):
        TokenizerTrainConfig(vocab_size=100)
