"""What sources hold: a first look, labelled examples, images."""

import pytest
from data_files import read, write_jsonl, write_parquet, write_png

from moeify.data import DataConfig, check_source, read_examples, read_images
from moeify.errors import DataError


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


def test_read_examples_of_text_gives_labels_as_they_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "mood": "joy"}, {"text": "y", "mood": "anger"}])
    examples = list(read_examples(DataConfig(data=str(path), label_column="mood")))
    assert [(e.text, e.label) for e in examples] == [("x", "joy"), ("y", "anger")]
    with pytest.raises(DataError, match="no column 'label'; it has 'text', 'mood'"):
        list(read_examples(DataConfig(data=str(path))))


def test_read_examples_with_float_or_missing_label_raises(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0.5}])
    with pytest.raises(DataError, match=r"label 0\.5 is neither"):
        list(read_examples(DataConfig(data=str(path))))


def test_read_examples_of_unlabelled_sources_raises(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no labels"):
        read_examples(DataConfig(data=str(tmp_path)))
    with pytest.raises(DataError, match="no labels"):
        read_examples(DataConfig(data="builtin:pydoc"))


def test_read_examples_of_class_folders_takes_folder_names_and_split(tmp_path):
    write_png(tmp_path / "train" / "cat" / "1.png", 10)
    write_png(tmp_path / "train" / "dog" / "1.png", 20)
    write_png(tmp_path / "test" / "cat" / "2.png", 30)
    examples = list(read_examples(DataConfig(data=str(tmp_path), split="train")))
    assert [(e.label, e.image.getpixel((0, 0))) for e in examples] == [("cat", 10), ("dog", 20)]
    with pytest.raises(DataError, match="holds images"):
        read(tmp_path)


def test_read_images_takes_folders_and_columns_without_labels(tmp_path):
    raw = write_png(tmp_path / "photos" / "1.png", 10).read_bytes()
    assert [image.getpixel((0, 0)) for image in read_images(DataConfig(data=str(tmp_path / "photos")))] == [10]
    table = write_parquet(tmp_path / "a.parquet", image=[raw])
    assert [image.getpixel((0, 0)) for image in read_images(DataConfig(data=str(table), column="image"))] == [10]
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "no image"}])
    with pytest.raises(DataError, match="holds str, neither text nor image bytes"):
        list(read_images(DataConfig(data=str(text))))
