"""docs/analysis.md runs as it stands, one block after the other, on a tiny model."""

import re

import pytest
import tiny

from moeify.select import DynKMax


def test_every_block_of_the_analysis_page_runs(tmp_path, monkeypatch, request, capsys):
    pytest.importorskip("matplotlib")
    page = (request.config.rootpath / "docs" / "analysis.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    tiny.save_converted_tiny(tmp_path / "DIR", rule=DynKMax(tau=0.9))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(block.replace('"DIR"', f'"{tmp_path / "DIR"}"'), namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"DIR", "experts.png", "active.png", "tokens.html", "nonzeros.png"}
    assert "| perplexity at all FLOPs of |" in capsys.readouterr().out
    assert {layer.mode for layer in namespace["moeify"].moe_layers(namespace["model"]).values()} == {"moe"}
