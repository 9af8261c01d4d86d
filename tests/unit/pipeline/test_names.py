"""Names of types and devices, good and bad."""

import pytest
import torch

from moeify.errors import ConfigError
from moeify.pipeline.names import DTYPES, torch_device, torch_dtype


def test_torch_dtype_of_every_name_is_torchs_own():
    assert {name: torch_dtype(name) for name in DTYPES} == {name: getattr(torch, name) for name in DTYPES}
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        torch_dtype("float1")


@pytest.mark.parametrize(("name", "index"), [("cuda", None), ("cuda:0", 0), ("cuda:1", 1)])
def test_torch_device_of_a_device_that_is_there(monkeypatch, name, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device(name) == torch.device("cuda", index)
    assert torch_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "meta"])
def test_torch_device_of_another_name_says_which_there_are(name):
    with pytest.raises(ConfigError, match="--device must be cpu, cuda or cuda:N, got"):
        torch_device(name)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:1", 1), ("cuda:2", 2)])
def test_torch_device_that_torch_does_not_see_says_how_many_it_sees(monkeypatch, name, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"--device {name}: torch sees {count} CUDA devices"):
        torch_device(name)
