"""Windows of tokens, pieces of texts, special tokens."""

import pytest
import torch

from moeify.data import ByteTokenizer, DataConfig, padded_text_batches, special_ids, text_pieces, text_windows, token_windows
from moeify.errors import DataError


def test_token_windows_of_bytes_are_the_text_in_order():
    windows = token_windows(["abcdefg", "hij"], ByteTokenizer(), window=4)
    assert windows.dtype == torch.int64
    assert [ByteTokenizer().decode(w) for w in windows.tolist()] == ["abcd", "efgh"]


class EosTokenizer(ByteTokenizer):
    eos_token_id = 0


def test_token_windows_with_eos_puts_it_between_documents_only():
    assert token_windows(["ab", "c", "de"], EosTokenizer(), window=7).tolist() == [[97, 98, 0, 99, 0, 100, 101]]


def test_token_windows_with_separator_inserts_text_instead_of_eos():
    windows = token_windows(["ab", "c"], EosTokenizer(), window=5, separator="\n\n")
    assert windows.tolist() == [list(b"ab\n\nc")]


def test_token_windows_with_max_tokens_stops_reading():
    read = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield "x" * 100

    assert token_windows(texts(), ByteTokenizer(), window=10, max_tokens=57).shape == (5, 10)
    assert len(read) < 10


def _words(text):
    """A tokenizer of words with their leading blank, as byte-level BPE cuts."""
    import re

    return [hash_of(word) for word in re.findall(r" ?\S+|\s+(?!\S)|\s+", text)]


def _stripped_words(text):
    """A tokenizer that puts a blank before the text, as SentencePiece does."""
    return _words(" " + text)


def hash_of(word):
    return sum(ord(c) * 31**i for i, c in enumerate(word)) % 65536


@pytest.mark.parametrize("tokenizer", [_words, _stripped_words])
def test_token_windows_in_pieces_equal_whole_text(monkeypatch, tokenizer):
    text = " ".join(f"word{i}  =\n \n  x{i}" for i in range(400))
    whole = tokenizer(text)
    monkeypatch.setattr("moeify.data.tokens._ENCODE_CHARS", 100)
    longest = 0

    def watched(piece):
        nonlocal longest
        longest = max(longest, len(piece))
        return tokenizer(piece)

    windows = token_windows([text], watched, window=5)
    assert windows.flatten().tolist() == whole[: windows.numel()]
    assert longest < 1000


def test_token_windows_where_no_cut_is_safe_encode_whole(monkeypatch):
    monkeypatch.setattr("moeify.data.tokens._ENCODE_CHARS", 20)
    text = "a b " * 100

    def length_dependent(piece):
        return [len(piece)] * len(piece)

    assert token_windows([text], length_dependent, window=8).unique().tolist() == [400]


def test_token_windows_of_transformers_tokenizer_add_no_special_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[EOS]": 2, "[CLS]": 3}, unk_token="b"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[EOS]", model_max_length=2)
    assert token_windows(["a b", "b a a"], tokenizer, window=6).tolist() == [[0, 1, 2, 1, 0, 0]]
    batch = next(padded_text_batches(["a b", "b"], tokenizer, max_length=8, batch_size=2))
    assert batch["input_ids"].tolist() == [[3, 0, 1], [3, 1, 2]]  # no padding token: the end-of-text token stands in
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_token_windows_of_too_little_text_says_how_much(tmp_path):
    with pytest.raises(DataError, match="3 tokens are less than one window of 8"):
        token_windows(["abc"], ByteTokenizer(), window=8)
    with pytest.raises(DataError, match="max_tokens 5 is less than one window of 8"):
        token_windows(["abc"], ByteTokenizer(), window=8, max_tokens=5)
    path = tmp_path / "short.txt"
    path.write_text("abc")
    with pytest.raises(DataError, match=r"short\.txt.*3 tokens are less than one window of 8"):
        text_windows(DataConfig(data=str(path), window=8), ByteTokenizer())


def test_token_windows_tell_progress_up_to_max_tokens():
    told = []

    class Listener:
        def task(self, label, *, total):
            self.total = total
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def advance(self, steps):
            told.append(steps)

    listener = Listener()
    token_windows(["x" * 100] * 3, ByteTokenizer(), window=10, max_tokens=250, progress=listener)
    assert listener.total == sum(told) == 250


def _four_bytes_a_letter(text):
    return [byte for letter in text for byte in letter.encode("utf-32-le")]


@pytest.mark.parametrize(
    ("encode", "text"),
    [
        pytest.param(ByteTokenizer(), "some words of text " * 30, id="bytes: a quarter of the first guess"),
        pytest.param(ByteTokenizer(), "plain " * 20 + "ünïcödé 你好 " * 20, id="letters of one and of three bytes"),
        pytest.param(_four_bytes_a_letter, "x" * 100, id="no white space"),
        pytest.param(lambda text: text.split(), "a few words and so on " * 50, id="words"),
        pytest.param(lambda text: [0, *text.encode(), 1], "some words of text " * 30, id="special tokens"),
    ],
)
def test_text_pieces_loses_nothing_and_fits(encode, text):
    pieces = list(text_pieces([text, "short"], encode, max_length=16))
    assert "".join(pieces) == text + "short"
    lengths = [len(encode(piece)) for piece in pieces]
    assert max(lengths) <= 16
    assert sum(lengths) > 0.6 * 16 * (len(lengths) - 2)


def test_text_pieces_leaves_blank_pieces_out():
    pieces = list(text_pieces(["word" + " " * 40 + "word", " " * 40], ByteTokenizer(), max_length=8))
    assert "".join(pieces).split() == ["word", "word"]
    assert all(piece.strip() for piece in pieces)


def test_text_pieces_of_a_character_that_never_fits_names_it():
    with pytest.raises(DataError, match="the character 'x' is more than 3 tokens"):
        list(text_pieces(["x"], _four_bytes_a_letter, max_length=3))


class _Specials:
    """A stand-in for a tokenizer that puts 101 before a text and 102, 103 after it."""

    def convert_ids_to_tokens(self):
        raise NotImplementedError

    def __call__(self, text, *, add_special_tokens=True):
        return {"input_ids": [101, *text.encode(), 102, 103] if add_special_tokens else list(text.encode())}


def test_special_ids_are_those_around_a_text():
    assert special_ids(_Specials()) == ([101], [102, 103])
    assert special_ids(ByteTokenizer()) == ([], [])
