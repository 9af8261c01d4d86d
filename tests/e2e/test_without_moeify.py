"""A converted checkpoint without this library: plain transformers loads it as the equal dense model and warns about what it left out.

With int8 weights, or linear layers replaced by MLPs, there is no equal dense model: nothing loads.
"""

import json

import pytest
import tiny
import torch
from families.models import build
from safetensors.torch import save_file
from without_moeify import run_without_moeify

from moeify.convert import ConvertConfig, convert, replace_projections
from moeify.quantize import quantize
from moeify.routers import NormRouterConfig
from moeify.select import TopK
from moeify.sites import find_ffn_sites, find_projections

MODELS = {
    "llama": lambda: (tiny.tiny_llama(), tiny.tiny_inputs()),  # GLU in an MLP of its own
    "bert": lambda: build("bert"),  # FFN split over two modules
    "vit": lambda: build("vit"),  # keys in the file are not module paths
    "gpt2": lambda: build("gpt2"),  # transposed weights
}

SCRIPT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file

errors = {}
for name, (directory, kind) in json.loads(sys.argv[1]).items():
    model = getattr(transformers, kind).from_pretrained(directory)
    tensors = load_file(directory + "/expected.st")
    expected = tensors.pop("expected")
    with torch.no_grad():
        found = next(v for v in model(**tensors).values() if isinstance(v, torch.Tensor))
    assert not any("moe" in n for n, _ in model.named_modules())
    errors[name] = ((found - expected).abs().max() / expected.abs().max()).item()
print(json.dumps(errors))
"""


def first_tensor(model, inputs):
    with torch.no_grad():
        return next(v for v in model(**inputs).values() if isinstance(v, torch.Tensor)).contiguous()


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """One process without moeify loads every checkpoint: its relative errors against the dense models, and what it wrote to stderr."""
    saved = {}
    for name, make in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        model, inputs = make()
        expected = first_tensor(model, inputs)
        config = ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=TopK(k=1))
        convert(model, config, sites=find_ffn_sites(model, inputs))
        assert not torch.equal(first_tensor(model, inputs), expected), "one expert is not the dense model"
        model.save_pretrained(directory)
        save_file({"expected": expected, **inputs}, directory / "expected.st")
        saved[name] = (str(directory), type(model).__name__)
    done = run_without_moeify(SCRIPT, json.dumps(saved))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_converted_checkpoint_without_moeify_equals_the_dense_model(loaded_elsewhere, name):
    assert loaded_elsewhere[0][name] < 1e-5


def test_converted_checkpoint_without_moeify_only_warns(loaded_elsewhere):
    assert "Unknown quantization type, got moeify" in loaded_elsewhere[1]
    assert "moe.router" in loaded_elsewhere[1], "it names what it left out"


REFUSED_SCRIPT = """
import json, sys
import transformers

errors = {}
for name, (directory, kind) in json.loads(sys.argv[1]).items():
    try:
        getattr(transformers, kind).from_pretrained(directory)
    except RuntimeError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""


def test_int8_checkpoints_without_moeify_are_refused_by_every_family(tmp_path):
    saved = {}
    # The last one's dense shapes are the same whichever way round: what tells them apart must not be the order of F and D.
    makers = MODELS | {"as wide as deep": lambda: (tiny.tiny_llama(intermediate_size=32), tiny.tiny_inputs())}
    for name, make in makers.items():
        model, inputs = make()
        convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4)), sites=find_ffn_sites(model, inputs))
        quantize(model)
        model.save_pretrained(tmp_path / name)
        saved[name] = (str(tmp_path / name), type(model).__name__)
    done = run_without_moeify(REFUSED_SCRIPT, json.dumps(saved))
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == saved.keys(), "the others loaded, as something that nobody trained"
    assert all("mismatch" in error for error in errors.values())
    assert "Unknown quantization type, got moeify" in done.stderr
    assert "up_proj.weight" in done.stderr, "it names what does not fit"


def test_checkpoints_with_replaced_layers_are_refused_by_every_family(tmp_path):
    saved, first = {}, {"llama": "q_proj", "bert": "query", "vit": "query", "gpt2": "c_attn"}
    for name, make in MODELS.items():
        for attention in (("q", "k", "v", "o"), ("v",)):
            model, inputs = make()
            replace_projections(model, find_projections(model, inputs, attention=attention), None)
            if len(attention) == 1:  # a converted one has routers besides
                convert(model, ConvertConfig(), sites=find_ffn_sites(model, inputs))
            key = f"{name} {len(attention)}"
            model.save_pretrained(tmp_path / key)
            saved[key] = (str(tmp_path / key), type(model).__name__)
    done = run_without_moeify(REFUSED_SCRIPT, json.dumps(saved))
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == saved.keys(), "the others loaded, with layers that nobody trained"
    assert all("mismatch" in error for error in errors.values())
    assert all(layer in done.stderr for layer in first.values()), "it names what does not fit"
