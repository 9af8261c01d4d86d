"""The config of data: what it refuses, and that each field explains itself."""

import pytest

from moeify._config import field_docs
from moeify.data import DataConfig
from moeify.data.config import BUILTINS, first_line, nearest, of_split
from moeify.errors import DataError


@pytest.mark.parametrize("options", [{"window": 1}, {"max_tokens": 0}, {"data": ""}])
def test_data_config_with_senseless_value_raises(options):
    with pytest.raises(DataError):
        DataConfig(**{"data": "x.txt", **options})


def test_data_config_documents_every_field():
    assert set(field_docs(DataConfig)) == set(DataConfig.__dataclass_fields__)


def test_nearest_with_a_word_like_a_known_one_names_it_and_else_all():
    assert nearest("builtin:pydocs", BUILTINS) == "; did you mean 'builtin:pydoc'?"
    assert nearest("x", (word for word in BUILTINS)) == "; known: builtin:pydoc, builtin:stdlib."


def test_of_split_says_which_part_and_nothing_of_the_whole():
    assert of_split(DataConfig(data="x.txt", split="test")) == " in split 'test'"
    assert of_split(DataConfig(data="x.txt")) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("\n  no such file\nat 0x1"), "no such file"), (ValueError(), "ValueError"), (ValueError(" \n"), "ValueError")],
)
def test_first_line_of_an_error_is_one_line_and_never_empty(error, line):
    assert first_line(error) == line
