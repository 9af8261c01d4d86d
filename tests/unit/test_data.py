"""Every source, every bad input, windows and batches; nothing is fetched."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moeify._config import field_docs
from moeify.data import (
    ByteTokenizer,
    DataConfig,
    check_source,
    class_ids,
    image_batches,
    is_validation,
    lm_batches,
    padded_text_batches,
    read_examples,
    read_images,
    read_texts,
    seq2seq_batches,
    special_ids,
    text_pieces,
    text_windows,
    token_windows,
)
from moeify.errors import DataError


def _read(path, **options):
    return list(read_texts(DataConfig(data=str(path), **options)))


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


# -- sources


def test_read_texts_from_text_file_gives_its_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffhéllo\r\nworld".encode())
    assert _read(path) == ["héllo\nworld"]


def test_read_texts_from_long_text_file_cuts_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data._BLOCK_CHARS", 10)
    path = tmp_path / "a.txt"
    path.write_text("first line\nsecond\nthird line is long\n")
    assert _read(path) == ["first line\n", "second\nthird line is long\n"]


def test_read_texts_from_folder_is_sorted_recursive_and_ignores_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("third")
    (tmp_path / "b" / "a.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "model.bin").write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    assert _read(tmp_path) == ["first", "second", "third"]


def test_read_texts_from_folder_with_tables_ignores_its_readme(tmp_path):
    (tmp_path / "README.md").write_text("about")
    _parquet(tmp_path / "x.parquet", text=["a", "b"])
    assert _read(tmp_path) == ["a", "b"]


def test_read_texts_from_jsonl_reads_column_and_skips_blank_lines_and_nulls(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n\n{"body": null}\n{"body": "b", "x": 1}\n')
    assert _read(path, column="body") == ["a", "b"]


def test_read_texts_from_parquet_streams_row_groups_in_order(tmp_path):
    rows = [f"row {i}" for i in range(300)]
    pq.write_table(pa.table({"text": rows, "other": rows}), tmp_path / "a.parquet", row_group_size=7)
    assert _read(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("corpus", ["builtin:pydoc", "builtin:stdlib"])
def test_read_texts_from_builtin_corpus_splits_without_overlap(corpus):
    names = {}
    for split in ("train", "validation", "all"):
        config = DataConfig(data=corpus, split=split)
        texts = read_texts(config)
        names[split] = list(texts) if corpus == "builtin:pydoc" else [next(texts), next(texts)]
    assert not set(names["train"]) & set(names["validation"])
    if corpus == "builtin:pydoc":
        assert sorted(names["train"] + names["validation"]) == sorted(names["all"])
        assert 0.02 < len(names["validation"]) / len(names["all"]) < 0.25


def test_is_validation_is_the_same_on_every_python():
    assert [name for name in map(str, range(40)) if is_validation(name)] == ["9", "39"]


def test_read_texts_from_hub_streams_the_split(monkeypatch):
    calls = []

    def load_dataset(name, subset, streaming):
        calls.append((name, subset, streaming))
        return {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert _read("owner/name", split="train", subset="raw") == ["a", "b"]
    assert _read("owner/name") == ["a", "b", "c"]
    assert calls[0] == ("owner/name", "raw", True)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        _read("owner/name", split="trian")
    with pytest.raises(DataError, match="no column 'txt'; it has 'text'; did you mean 'text'"):
        _read("owner/name", column="txt")


# -- splits


def test_read_texts_with_files_named_by_split_reads_those(tmp_path):
    _parquet(tmp_path / "train-00000-of-00002.parquet", text=["a"])
    _parquet(tmp_path / "train-00001-of-00002.parquet", text=["b"])
    _parquet(tmp_path / "validation_tokenised.parquet", text=["c"])
    assert _read(tmp_path, split="train") == ["a", "b"]
    assert _read(tmp_path, split="validation") == ["c"]
    assert _read(tmp_path) == ["a", "b", "c"]
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        _read(tmp_path, split="test")


def test_read_texts_with_split_folders_reads_those(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    assert _read(tmp_path, split="validation") == ["dev"]


def test_read_texts_with_test_module_among_sources_is_no_split(tmp_path):
    for i in range(30):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}")
    (tmp_path / "test_m.py").write_text("x = -1")
    train, validation = _read(tmp_path, split="train"), _read(tmp_path, split="validation")
    assert len(train) + len(validation) == 31
    assert len(train) > len(validation) > 0


def test_read_texts_of_one_text_file_is_dealt_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data._SPLIT_PIECE_CHARS", 20)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"this is line {i}\n" for i in range(200)))
    train, validation = _read(path, split="train"), _read(path, split="validation")
    assert sorted("".join(train + validation).splitlines()) == sorted(path.read_text().splitlines())
    assert len(train) > len(validation) > 0


def test_read_texts_of_rows_is_dealt_by_name_wherever_the_file_lies(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(100)]
    (tmp_path / "elsewhere").mkdir()
    first, second = _jsonl(tmp_path / "a.jsonl", rows), _jsonl(tmp_path / "elsewhere" / "a.jsonl", rows)
    assert _read(first, split="validation") == _read(second, split="validation") != []
    assert len(_read(first, split="train")) + len(_read(first, split="validation")) == 100
    with pytest.raises(DataError, match="no split 'test'"):
        _read(first, split="test")


def test_read_texts_with_seed_shuffles_and_repeats(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(600)])
    plain, one, again, two = _read(path), _read(path, seed=1), _read(path, seed=1), _read(path, seed=2)
    assert plain == [str(i) for i in range(600)]
    assert one == again != two
    assert sorted(one) == sorted(plain) != one


# -- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"", "is empty", id="empty file"),
        pytest.param("a.txt", b" \n ", "has no text", id="blank file"),
        pytest.param("a.txt", b"abc\0def", "is binary", id="NUL bytes"),
        pytest.param("a.txt", b"\xff\xfe\x80", "binary or not UTF-8", id="not UTF-8"),
        pytest.param("a.xyz", b"abc", "unknown extension '.xyz'; known: .html, .jsonl", id="unknown extension"),
        pytest.param("a.csv", b"abc", "unknown extension '.csv'", id="table of another kind"),
        pytest.param("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON", id="broken jsonl"),
        pytest.param("a.jsonl", b"[1]\n", "line 1 is a JSON list", id="jsonl of lists"),
        pytest.param("a.jsonl", b'{"txt": "a"}\n', "no column 'text'; it has 'txt'; did you mean 'txt'", id="jsonl without the column"),
        pytest.param("a.jsonl", b'{"text": 3}\n', "column 'text' holds int", id="jsonl with numbers"),
        pytest.param("a.jsonl", b"\xff\n", "binary or not UTF-8", id="binary jsonl"),
        pytest.param("a.parquet", b"PAR1 but not really", "not a readable parquet file", id="truncated parquet"),
    ],
)
def test_read_texts_of_bad_file_names_file_and_fault_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        _read(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"\0", "is binary", id="binary"),
        pytest.param("a.txt", b"", "is empty", id="empty"),
        pytest.param("a.jsonl", b"{", "line 1 is not JSON", id="no JSON"),
        pytest.param("a.jsonl", b'{"txt": "a"}', "no column 'text'", id="no such column"),
        pytest.param("a.jsonl", b"\n", "has no data", id="blank"),
        pytest.param("b.txt", b"a", "no such file or folder", id="missing"),
    ],
)
def test_check_source_finds_what_the_first_document_shows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_source(DataConfig(data=str(tmp_path / name.replace("b", "c"))))


def test_check_source_reads_one_document_and_takes_images(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    check_source(DataConfig(data=str(tmp_path / "a.jsonl"), seed=1))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not opened")
    check_source(DataConfig(data=str(tmp_path / "images")))
    check_source(DataConfig(data="builtin:pydoc"))


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="no such device")
def test_read_texts_of_a_device_says_that_it_is_no_file():
    with pytest.raises(DataError, match="'/dev/null' is neither a file nor a folder"):
        read_texts(DataConfig(data="/dev/null"))


def test_read_texts_of_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file or folder: .*corpsu\.txt.*did you mean .*corpus\.txt"):
        _read(tmp_path / "corpsu.txt")


def test_read_texts_of_parquet_without_column_fails_at_once(tmp_path):
    path = _parquet(tmp_path / "a.parquet", sentence=["a"], label=[1])
    with pytest.raises(DataError, match="no column 'text'; it has 'sentence', 'label'"):
        read_texts(DataConfig(data=str(path)))


def test_read_texts_of_folder_without_data_raises(tmp_path):
    with pytest.raises(DataError, match="has no data"):
        _read(tmp_path)


def test_read_texts_of_unknown_corpus_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'builtin:pydoc'"):
        _read("builtin:pydocs")
    with pytest.raises(DataError, match="no split 'test'"):
        _read("builtin:pydoc", split="test")


def test_read_texts_of_hub_id_offline_says_so(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/name' is no file or folder here, and .*offline.*ConnectError") as error:
        _read("owner/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("module", "data"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_read_texts_without_optional_package_names_the_extra(tmp_path, monkeypatch, module, data):
    if data == "a.parquet":
        data = str(_parquet(tmp_path / data, text=["a"]))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'moeify\[data\]'"):
        _read(data)


@pytest.mark.parametrize("options", [{"window": 1}, {"max_tokens": 0}, {"data": ""}])
def test_data_config_with_senseless_value_raises(options):
    with pytest.raises(DataError):
        DataConfig(**{"data": "x.txt", **options})


def test_data_config_documents_every_field():
    assert set(field_docs(DataConfig)) == set(DataConfig.__dataclass_fields__)


# -- windows


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
    monkeypatch.setattr("moeify.data._ENCODE_CHARS", 100)
    longest = 0

    def watched(piece):
        nonlocal longest
        longest = max(longest, len(piece))
        return tokenizer(piece)

    windows = token_windows([text], watched, window=5)
    assert windows.flatten().tolist() == whole[: windows.numel()]
    assert longest < 1000


def test_token_windows_where_no_cut_is_safe_encode_whole(monkeypatch):
    monkeypatch.setattr("moeify.data._ENCODE_CHARS", 20)
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


# -- batches


def test_lm_batches_cover_all_windows_in_order_or_shuffled():
    windows = torch.arange(20).view(5, 4)
    batches = lm_batches(windows, batch_size=2)
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), windows)
    shuffled = torch.cat([b["input_ids"] for b in lm_batches(windows, batch_size=2, seed=0)])
    assert not torch.equal(shuffled, windows)
    assert torch.equal(shuffled.sort(0).values, windows)


def test_padded_text_batches_cut_pad_mask_and_label():
    first, second = padded_text_batches(["abcdef", "gh", "i"], ByteTokenizer(), max_length=4, batch_size=2, labels=[2, 0, 1])
    assert first["input_ids"].tolist() == [[97, 98, 99, 100], [103, 104, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert first["labels"].tolist() == [2, 0]
    assert second["input_ids"].tolist() == [[105]]


def test_padded_text_batches_without_text_or_with_wrong_labels_raises():
    with pytest.raises(DataError, match="no text"):
        list(padded_text_batches([], ByteTokenizer(), max_length=4, batch_size=2))
    with pytest.raises(ValueError, match="shorter"):
        list(padded_text_batches(["a", "b"], ByteTokenizer(), max_length=4, batch_size=1, labels=[1]))


# -- labelled data


def test_read_examples_of_text_gives_labels_as_they_are(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "x", "mood": "joy"}, {"text": "y", "mood": "anger"}])
    examples = list(read_examples(DataConfig(data=str(path), label_column="mood")))
    assert [(e.text, e.label) for e in examples] == [("x", "joy"), ("y", "anger")]
    with pytest.raises(DataError, match="no column 'label'; it has 'text', 'mood'"):
        list(read_examples(DataConfig(data=str(path))))


def test_read_examples_with_float_or_missing_label_raises(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0.5}])
    with pytest.raises(DataError, match=r"label 0\.5 is neither"):
        list(read_examples(DataConfig(data=str(path))))


def test_read_examples_of_unlabelled_sources_raises(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no labels"):
        read_examples(DataConfig(data=str(tmp_path)))
    with pytest.raises(DataError, match="no labels"):
        read_examples(DataConfig(data="builtin:pydoc"))


def test_class_ids_of_names_integers_and_known_heads():
    assert class_ids(["joy", "anger", "joy"]) == {"anger": 0, "joy": 1}
    assert class_ids([2, 0]) == {0: 0, 2: 2}
    assert class_ids(["joy"], known={"anger": 4, "joy": 5}) == {"joy": 5}
    with pytest.raises(DataError, match="did you mean 'anger'"):
        class_ids(["angre"], known={"anger": 0, "joy": 1})
    with pytest.raises(DataError, match="mix"):
        class_ids(["joy", 1])


def _png(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path)
    return path


def test_read_examples_of_class_folders_takes_folder_names_and_split(tmp_path):
    _png(tmp_path / "train" / "cat" / "1.png", 10)
    _png(tmp_path / "train" / "dog" / "1.png", 20)
    _png(tmp_path / "test" / "cat" / "2.png", 30)
    examples = list(read_examples(DataConfig(data=str(tmp_path), split="train")))
    assert [(e.label, e.image.getpixel((0, 0))) for e in examples] == [("cat", 10), ("dog", 20)]
    with pytest.raises(DataError, match="holds images"):
        _read(tmp_path)


def test_image_batches_from_parquet_bytes_stack_pixels_and_labels(tmp_path):
    raw = [_png(tmp_path / f"{i}.png", i).read_bytes() for i in (1, 2, 3)]
    path = _parquet(tmp_path / "a.parquet", image=[{"bytes": b, "path": None} for b in raw], label=[7, 8, 9])

    def to_tensor(image):
        assert image.mode == "RGB"
        return torch.full((3, 4, 4), float(image.getpixel((0, 0))[0]))

    batches = list(image_batches(read_examples(DataConfig(data=str(path), column="image")), to_tensor, batch_size=2))
    assert [b["pixel_values"][:, 0, 0, 0].tolist() for b in batches] == [[1.0, 2.0], [3.0]]
    assert [b["labels"].tolist() for b in batches] == [[7, 8], [9]]


def test_image_batches_with_broken_image_or_unknown_label_names_it(tmp_path):
    path = _parquet(tmp_path / "a.parquet", image=[b"not a png"], label=["cat"])
    with pytest.raises(DataError, match=r"a\.parquet:0: not a readable image"):
        list(read_examples(DataConfig(data=str(path), column="image")))
    path = _parquet(tmp_path / "b.parquet", image=[_png(tmp_path / "1.png", 1).read_bytes()], label=["cat"])
    examples = list(read_examples(DataConfig(data=str(path), column="image")))
    with pytest.raises(DataError, match="pass class_ids"):
        list(image_batches(examples, lambda image: torch.zeros(1), batch_size=1))
    with pytest.raises(DataError, match="'cat' is unknown"):
        list(image_batches(examples, lambda image: torch.zeros(1), batch_size=1, class_ids={"dog": 0}))


def test_read_images_takes_folders_and_columns_without_labels(tmp_path):
    raw = _png(tmp_path / "photos" / "1.png", 10).read_bytes()
    assert [image.getpixel((0, 0)) for image in read_images(DataConfig(data=str(tmp_path / "photos")))] == [10]
    table = _parquet(tmp_path / "a.parquet", image=[raw])
    assert [image.getpixel((0, 0)) for image in read_images(DataConfig(data=str(table), column="image"))] == [10]
    text = _jsonl(tmp_path / "a.jsonl", [{"text": "no image"}])
    with pytest.raises(DataError, match="holds str, neither text nor image bytes"):
        list(read_images(DataConfig(data=str(text))))


# -- pieces of text, and text in two halves


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


def test_seq2seq_batches_halve_each_window():
    windows = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    first, second = seq2seq_batches(windows, batch_size=2, start_id=0, specials=([101], [102, 103]))
    assert first["input_ids"].tolist() == [[101, 1, 2, 102, 103], [101, 5, 6, 102, 103]]
    assert first["decoder_input_ids"].tolist() == [[0, 3, 4], [0, 7, 8]]
    assert second["decoder_input_ids"].tolist() == [[0, 11, 12]]
    assert first["input_ids"].dtype == first["decoder_input_ids"].dtype == torch.int64


def test_images_of_class_folders_come_from_every_class_in_turn(tmp_path):
    from PIL import Image

    for name, count in (("cat", 3), ("dog", 1), ("elk", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{i}.png")
    assert [e.label for e in read_examples(DataConfig(data=str(tmp_path)))] == ["cat", "dog", "elk", "cat", "elk", "cat"]
