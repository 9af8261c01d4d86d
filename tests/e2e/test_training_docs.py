"""docs/training.md runs as it stands, one block after the other, on a tiny model."""

import re

import tiny


def test_every_block_of_the_training_page_runs(tmp_path, monkeypatch, request):
    page = (request.config.rootpath / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    name = "HuggingFaceTB/SmolLM2-135M"
    assert name in blocks[0]
    assert len(blocks) == 10
    tiny.save_dense_tiny(tmp_path / "dense", hidden_act="silu")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    quiet = "report_to=[], use_cpu=True, disable_tqdm=True"
    for block in blocks:
        exec(block.replace(name, str(tmp_path / "dense")).replace("report_to=[]", quiet), namespace)
    assert '"hidden_act": "relu"' in (tmp_path / "sparse-model" / "config.json").read_text()
    assert namespace["model"].config.hidden_act == "relu"
