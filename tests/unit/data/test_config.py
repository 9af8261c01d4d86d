"""The config of data: what it refuses, and that each field explains itself."""

import pytest

from moeify._config import field_docs
from moeify.data import DataConfig
from moeify.errors import DataError


@pytest.mark.parametrize("options", [{"window": 1}, {"max_tokens": 0}, {"data": ""}])
def test_data_config_with_senseless_value_raises(options):
    with pytest.raises(DataError):
        DataConfig(**{"data": "x.txt", **options})


def test_data_config_documents_every_field():
    assert set(field_docs(DataConfig)) == set(DataConfig.__dataclass_fields__)
