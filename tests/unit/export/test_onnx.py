"""Whole models as ONNX files: onnxruntime against PyTorch, at other batches and lengths than those traced.

Llama is in tests/e2e/test_export_docs.py: tracing takes seconds a model.
"""

from dataclasses import replace

import onnx
import onnxruntime
import pytest
import tiny
import torch
from families import models
from torch import nn

from moeify.controls import set_mode
from moeify.convert import ConvertConfig, convert
from moeify.errors import ConfigError, UnsupportedModelError
from moeify.export import OnnxConfig, to_onnx
from moeify.hf.inputs import example_inputs
from moeify.layers import moe_layers
from moeify.quantize import quantize
from moeify.routers import (
    CentreRouterConfig,
    GateRouterConfig,
    LowRankRouterConfig,
    MLPRouterConfig,
    NormRouterConfig,
)
from moeify.select import RULES, DynKMass, DynKMax, NormBudget, Threshold, TopK
from moeify.sites import find_ffn_sites

FAMILIES = {
    "bert": (DynKMass(mass=0.5), OnnxConfig(), "shared"),
    "vit": (TopK(k=3), OnnxConfig(few_tokens=0, many_tokens="loop"), "loop"),
}


def one_layer(name, monkeypatch):
    family = models.FAMILIES[name]
    monkeypatch.setitem(models.FAMILIES, name, replace(family, options={**family.options, "num_hidden_layers": 1}))
    return models.build(name)


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})]


@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_equals_torch(name, tmp_path, monkeypatch):
    rule, config, way = FAMILIES[name]
    model, inputs = one_layer(name, monkeypatch)
    convert(model, ConvertConfig(expert_size=8, router=NormRouterConfig(width=4), rule=rule), sites=find_ffn_sites(model, inputs))
    report = to_onnx(model, tmp_path / "model.onnx", config=config)
    assert report.max_error < 1e-5
    assert list(report.ffns.values()) == [way]
    for batch, length in ((1, 1), (4, 13)):
        given = example_inputs(model, batch_size=batch, num_tokens=length, seed=2)
        if batch > 1 and "attention_mask" in given:
            given["attention_mask"][1, 9:] = 0
        with torch.no_grad():
            expected = model(**given)[0]
        found = run(tmp_path / "model.onnx", given)[0]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    file = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain for entry in file.opset_import} == {""}, "standard operators alone"
    assert not file.functions


class FFN(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.gate = nn.Linear(6, 11) if gated else None
        self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, x):
        up = self.up(x)
        return x + self.down(nn.functional.silu(up) if self.gate is None else nn.functional.silu(self.gate(x)) * up)


class Net(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.layers = nn.ModuleList(FFN(g) for g in gated)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


ROUTERS = (NormRouterConfig(width=4), MLPRouterConfig(), CentreRouterConfig(), GateRouterConfig(), LowRankRouterConfig(rank=3))
"""One of each kind; linear, random and oracle routers have no operator that these have not."""
CHOSEN = (TopK(k=2), DynKMax(tau=0.7), DynKMass(mass=0.6), NormBudget(beta=0.8), Threshold(theta=0.4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_rule_and_router_is_in_the_graph(tmp_path):
    assert {type(rule) for rule in CHOSEN} == set(RULES.values())
    torch.manual_seed(0)
    net = Net([isinstance(config, GateRouterConfig) for config in ROUTERS]).eval()
    x_TD = torch.randn(9, 6)
    sites = find_ffn_sites(net, {"x": x_TD})
    policy = {site.name: {"router": {"name": config.name, **vars(config)}} for site, config in zip(sites, ROUTERS, strict=True)}
    convert(net, ConvertConfig(expert_size=2, policy=policy), sites=sites)
    for i, moe in enumerate(moe_layers(net).values()):
        moe.router.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
        moe.rule = CHOSEN[i % len(CHOSEN)]
        moe.always_on = (1,) if i == 1 else ()
    report = to_onnx(net, tmp_path / "net.onnx", inputs={"x": x_TD}, config=OnnxConfig(few_tokens=4, many_tokens="loop"))
    assert report.ffns == dict.fromkeys(moe_layers(net), "loop")
    for tokens in (1, 3, 30):
        given = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = net(given)
        masks = [moe.select(given) for moe in moe_layers(net).values()]
        assert not all(mask.all() for mask in masks)
        torch.testing.assert_close(run(tmp_path / "net.onnx", {"x": given})[0], expected, rtol=1e-5, atol=1e-5)


def test_int8_experts_are_written_as_what_they_stand_for_and_dense_mode_as_dense(tmp_path):
    torch.manual_seed(0)
    net = Net([False]).eval()
    x_TD = torch.randn(9, 6)
    convert(net, ConvertConfig(expert_size=2, rule=TopK(k=2)), sites=find_ffn_sites(net, {"x": x_TD}))
    quantize(net)
    assert to_onnx(net, tmp_path / "int8.onnx", inputs={"x": x_TD}).max_error < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "int8.onnx", {"x": x_TD})[0], net(x_TD), rtol=1e-5, atol=1e-5)
        set_mode(net, "dense")
        report = to_onnx(net, tmp_path / "dense.onnx", inputs={"x": x_TD})
        assert report.ffns == {"layers.0": "dense"}
        torch.testing.assert_close(run(tmp_path / "dense.onnx", {"x": x_TD})[0], net(x_TD), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_written_is_refused(tmp_path):
    model = tiny.convert_tiny(tiny.tiny_llama())
    path = tmp_path / "model.onnx"
    with pytest.raises(UnsupportedModelError, match="training mode"):
        to_onnx(model.train(), path)
    with pytest.raises(UnsupportedModelError, match=r"is torch\.bfloat16 on cpu; load the model in float32"):
        to_onnx(model.eval().to(torch.bfloat16), path)
    model = tiny.convert_tiny(tiny.tiny_llama())
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp' cannot be exported: 'up_proj' has a forward hook"):
        to_onnx(model, path)
    with pytest.raises(ConfigError, match="few_tokens must be at least 0"):
        OnnxConfig(few_tokens=-1)
    with pytest.raises(ConfigError, match="batch_size must be at least 2"):
        OnnxConfig(batch_size=1)
    assert not path.exists()
