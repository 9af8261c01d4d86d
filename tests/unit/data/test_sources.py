"""Every source, its splits and order, and every bad input; nothing is fetched."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import read, write_jsonl, write_parquet

from moeify.data import DataConfig, is_validation, read_examples, read_texts
from moeify.errors import DataError


def test_read_texts_from_text_file_gives_its_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffhéllo\r\nworld".encode())
    assert read(path) == ["héllo\nworld"]


def test_read_texts_from_long_text_file_cuts_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data.sources._BLOCK_CHARS", 10)
    path = tmp_path / "a.txt"
    path.write_text("first line\nsecond\nthird line is long\n")
    assert read(path) == ["first line\n", "second\nthird line is long\n"]


def test_read_texts_from_folder_is_sorted_recursive_and_ignores_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("third")
    (tmp_path / "b" / "a.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "model.bin").write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    assert read(tmp_path) == ["first", "second", "third"]


def test_read_texts_from_folder_with_tables_ignores_its_readme(tmp_path):
    (tmp_path / "README.md").write_text("about")
    write_parquet(tmp_path / "x.parquet", text=["a", "b"])
    assert read(tmp_path) == ["a", "b"]


def test_read_texts_from_jsonl_reads_column_and_skips_blank_lines_and_nulls(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n\n{"body": null}\n{"body": "b", "x": 1}\n')
    assert read(path, column="body") == ["a", "b"]


def test_read_texts_from_parquet_streams_row_groups_in_order(tmp_path):
    rows = [f"row {i}" for i in range(300)]
    pq.write_table(pa.table({"text": rows, "other": rows}), tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet") == rows


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
    assert read("owner/name", split="train", subset="raw") == ["a", "b"]
    assert read("owner/name") == ["a", "b", "c"]
    assert calls[0] == ("owner/name", "raw", True)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        read("owner/name", split="trian")
    with pytest.raises(DataError, match="no column 'txt'; it has 'text'; did you mean 'text'"):
        read("owner/name", column="txt")


def test_read_texts_with_files_named_by_split_reads_those(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", text=["a"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", text=["b"])
    write_parquet(tmp_path / "validation_tokenised.parquet", text=["c"])
    assert read(tmp_path, split="train") == ["a", "b"]
    assert read(tmp_path, split="validation") == ["c"]
    assert read(tmp_path) == ["a", "b", "c"]
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        read(tmp_path, split="test")


def test_read_texts_with_split_folders_reads_those(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    assert read(tmp_path, split="validation") == ["dev"]


def test_read_texts_with_test_module_among_sources_is_no_split(tmp_path):
    for i in range(30):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}")
    (tmp_path / "test_m.py").write_text("x = -1")
    train, validation = read(tmp_path, split="train"), read(tmp_path, split="validation")
    assert len(train) + len(validation) == 31
    assert len(train) > len(validation) > 0


def test_read_texts_of_one_text_file_is_dealt_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data.sources._SPLIT_PIECE_CHARS", 20)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"this is line {i}\n" for i in range(200)))
    train, validation = read(path, split="train"), read(path, split="validation")
    assert sorted("".join(train + validation).splitlines()) == sorted(path.read_text().splitlines())
    assert len(train) > len(validation) > 0


def test_read_texts_of_rows_is_dealt_by_name_wherever_the_file_lies(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(100)]
    (tmp_path / "elsewhere").mkdir()
    first, second = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "elsewhere" / "a.jsonl", rows)
    assert read(first, split="validation") == read(second, split="validation") != []
    assert len(read(first, split="train")) + len(read(first, split="validation")) == 100
    with pytest.raises(DataError, match="no split 'test'"):
        read(first, split="test")


def test_read_texts_with_seed_shuffles_and_repeats(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(600)])
    plain, one, again, two = read(path), read(path, seed=1), read(path, seed=1), read(path, seed=2)
    assert plain == [str(i) for i in range(600)]
    assert one == again != two
    assert sorted(one) == sorted(plain) != one


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_read_texts_with_seed_takes_as_much_of_every_table_whatever_their_documents(tmp_path, kind):
    book = "".join(f"line {i}\n" for i in range(40_000))
    for name, texts in (("books", [book, book]), ("notes", [f"note {i}\n" * 100 for i in range(1000)])):
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        else:
            write_parquet(tmp_path / f"{name}.parquet", text=texts)
    texts = read(tmp_path, seed=0)
    first = texts[: len(texts) // 2]
    books = sum(len(text) for text in first if text.startswith("line"))
    assert 0.35 < books / sum(map(len, first)) < 0.65
    assert sorted("".join(texts)) == sorted("".join(read(tmp_path)))  # nothing lost, nothing twice
    assert all(text.endswith("\n") for text in texts)


def test_read_texts_with_seed_reads_more_tables_than_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data.sources._OPEN_AT_ONCE", 3)
    for table in range(8):
        write_jsonl(tmp_path / f"{table}.jsonl", [{"text": f"{table} {i}"} for i in range(5 + table)])
    assert sorted(read(tmp_path, seed=0)) == sorted(read(tmp_path))


def test_read_texts_with_seed_keeps_all_pieces_of_a_text_in_one_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i:02} word\n" * 9000} for i in range(40)])
    kept = {split: {text[:2] for text in read(tmp_path / "a.jsonl", split=split, seed=0)} for split in ("train", "validation")}
    assert kept["validation"] and not kept["train"] & kept["validation"]


def test_read_examples_with_seed_leaves_long_texts_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "word\n" * 9000, "label": i} for i in range(3)])
    found = list(read_examples(DataConfig(data=str(tmp_path / "a.jsonl"), seed=0)))
    assert sorted(example.label for example in found) == [0, 1, 2]


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
        read(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="no such device")
def test_read_texts_of_a_device_says_that_it_is_no_file():
    with pytest.raises(DataError, match="'/dev/null' is neither a file nor a folder"):
        read_texts(DataConfig(data="/dev/null"))


def test_read_texts_of_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file or folder: .*corpsu\.txt.*did you mean .*corpus\.txt"):
        read(tmp_path / "corpsu.txt")


def test_read_texts_of_parquet_without_column_fails_at_once(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", sentence=["a"], label=[1])
    with pytest.raises(DataError, match="no column 'text'; it has 'sentence', 'label'"):
        read_texts(DataConfig(data=str(path)))


def test_read_texts_of_folder_without_data_raises(tmp_path):
    with pytest.raises(DataError, match="has no data"):
        read(tmp_path)


def test_read_texts_of_unknown_corpus_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'builtin:pydoc'"):
        read("builtin:pydocs")
    with pytest.raises(DataError, match="no split 'test'"):
        read("builtin:pydoc", split="test")


def test_read_texts_of_hub_id_offline_says_so(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/name' is no file or folder here, and .*offline.*ConnectError") as error:
        read("owner/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("module", "data"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_read_texts_without_optional_package_names_the_extra(tmp_path, monkeypatch, module, data):
    if data == "a.parquet":
        data = str(write_parquet(tmp_path / data, text=["a"]))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'moeify\[data\]'"):
        read(data)


def test_images_of_class_folders_come_from_every_class_in_turn(tmp_path):
    from PIL import Image

    for name, count in (("cat", 3), ("dog", 1), ("elk", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{i}.png")
    assert [e.label for e in read_examples(DataConfig(data=str(tmp_path)))] == ["cat", "dog", "elk", "cat", "elk", "cat"]
