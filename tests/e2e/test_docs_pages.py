"""Python of some pages runs as it stands, one block after the other, on tiny models; and what the check of all blocks refuses."""

import re

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import moeify
from moeify.kernels import IMPLS
from moeify.routers import ROUTERS
from moeify.select import RULES, DynKMax
from moeify.split import SPLITS, split_neurons
from scripts import check_docs


def blocks_of(page, request):
    text = (request.config.rootpath / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_extending(tmp_path, monkeypatch, request, capsys):
    for table in (RULES, SPLITS, ROUTERS, IMPLS):
        for name in list(table):
            monkeypatch.setitem(table, name, table[name])
    tiny.save_converted_tiny(tmp_path / "DIR", rule=DynKMax(tau=0.9))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "DIR")
    before = {name: dict(table) for name, table in (("rules", RULES), ("splits", SPLITS), ("routers", ROUTERS), ("impls", IMPLS))}
    namespace = {"model": model, "batch": {"input_ids": torch.arange(12)[None]}}
    blocks = blocks_of("extending.md", request)
    assert len(blocks) == 4
    try:
        for block in blocks:
            exec(block, namespace)
        split = split_neurons(torch.randn(12, 5), method=SPLITS["by_norm"](), num_experts=3)
        assert sorted(split.order_F.tolist()) == list(range(12))
        rule = RULES["mean_multiple"](factor=1.0)
        assert rule(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[False, False, True]]
        scores_TE = torch.rand(7, 5)
        assert torch.equal(rule(scores_TE), type(rule).critical(scores_TE) >= 1.0)
    finally:
        for table, was in ((RULES, "rules"), (SPLITS, "splits"), (ROUTERS, "routers"), (IMPLS, "impls")):
            table.clear()
            table.update(before[was])
    out = capsys.readouterr().out
    assert re.search(r"^\d+ of \d+ experts$", out, flags=re.MULTILINE)


def test_quickstart(tmp_path, monkeypatch, request, capsys):
    model = tiny.tiny_llama()
    batch = {"input_ids": torch.randint(64, (2, 32))}
    moeify.thin(model, [batch], moeify.ThinConfig(skip_frac=0.4))
    model.save_pretrained(tmp_path / "thin")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "thin")
    monkeypatch.chdir(tmp_path)
    for block in blocks_of("quickstart.md", request):
        exec(block, {})
    assert re.search(r"^\d+% of the weights were not read$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nmake demo\n```\n", "p.md:2: 'make demo' is not run; say why"),
        ("```\nmoeify doctor\n```\n", "p.md:2: a fence of language ''"),
        ("```python\nx = = 1\n```\n", "p.md:2: invalid syntax"),
        ("<!-- not run, pip: no index -->\n```bash\nmoeify doctor\n```\n", "p.md:3: no line begins with 'pip'"),
        ("<!-- not run: no index -->\n\nText.\n\n```bash\npip install x\n```\n", "p.md: 1 comments '<!-- not run', but 0 in front"),
        ("Text.\n\n    moeify doctor\n", "p.md: fence the command 'moeify doctor'"),
    ],
)
def test_a_block_that_is_not_run_and_gives_no_reason_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    page = tmp_path / "p.md"
    page.write_text(text)
    assert any(found.startswith(message) for found in check_docs.wrong_blocks(page)), check_docs.wrong_blocks(page)


def test_marks_of_blocks_and_lines_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    page = tmp_path / "p.md"
    page.write_text(
        "<!-- not run, pip: no\nindex -->\n```bash\npip install x  # or\nmoeify doctor \\\n  --json  # all\n```\n"
        "<!-- not run: hours -->\n```python\nx = 1\n```\n"
    )
    assert check_docs.wrong_blocks(page) == []
    first, second = check_docs.blocks_of(page)
    assert first.commands() == ["moeify doctor --json"]
    assert first.skipped == {"pip": "no index"}
    assert (first.reason, second.reason) == (None, "hours")
