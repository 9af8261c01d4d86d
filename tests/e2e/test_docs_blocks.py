"""Every block of code in README and docs runs, as it stands, in the folder that `docs_world` describes: commands in this process by the
command line's own entry, Python with the names that the page's text speaks of. What is not run says so in the page (scripts/check_docs.py
asks for that)."""

from pathlib import Path

import docs_world
import pytest
import tiny
import torch
import transformers
from pretraining import PROBE, Counting, tiny_gpt
from training import tiny_classifier
from transformers import AutoModelForCausalLM

import moeify
from moeify import cli
from moeify._progress import NO_PROGRESS
from scripts.check_docs import PAGES, ROOT, blocks_of

BLOCKS = {str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES}
PYTHON_ELSEWHERE = {
    "docs/analysis.md": "tests/e2e/test_analysis_docs.py",
    "docs/baselines.md": "tests/unit/baselines/test_ztw.py",
    "docs/export.md": "tests/e2e/test_export_docs.py",
    "docs/extending.md": "tests/e2e/test_docs_pages.py",
    "docs/peft.md": "tests/e2e/test_export_docs.py",
    "docs/pretraining.md": "tests/unit/pipeline/test_pretrain.py",
    "docs/quickstart.md": "tests/e2e/test_docs_pages.py",
    "docs/training.md": "tests/e2e/test_training_docs.py",
}
"""Pages whose Python has a test of its own, which looks at what comes out as well."""


def runs(block):
    """Whether the block has something to run."""
    return block.reason is None and (block.language == "python" or (block.language == "bash" and bool(block.commands())))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("moeify._terminal.make_progress", lambda: NO_PROGRESS)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _figure, path, **_options: Path(path).touch())  # see tests/unit/report
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return docs_world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done():
    """Commands that ran: one that several pages show is run on the first. What a page makes of its output is run on that page."""
    return set()


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """The folder a page is run in: models and data by links, what commands change by copies."""
    docs_world.lay_out(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moeify.pipeline.builtin.recipes_folder", lambda: tmp_path / "recipes")  # `moeify pretrain gpt` finds it there
    return tmp_path


def names_of(page, here):
    """What the text of a page calls by name and its code does not make."""
    if page == "docs/concepts.md":
        return {}
    converted = AutoModelForCausalLM.from_pretrained(here / "DIR")
    names = {"model": converted, "inputs": tiny.tiny_inputs(batch=1), "batches": [tiny.tiny_inputs()]}
    names["rules"] = {name: moeify.Threshold(theta=1.0) for name in moeify.moe_layers(converted)}
    if page in ("docs/ssd.md", "docs/distributed.md"):
        names |= {
            "model": tiny_gpt(),
            "build_model": tiny_gpt,
            "probe": PROBE,
            "data": Counting(),
            "folder": here / "state",
            "out": here / "out",
        }
    return names


def names_of_concepts(block, here):
    """Each block of that page begins with the model that the paragraph is about."""
    if "find_projections" in block.text:
        model, batch = tiny_classifier(), {"input_ids": torch.arange(12)[None]}
    else:
        model, batch = AutoModelForCausalLM.from_pretrained(here / "MODEL"), tiny.tiny_inputs()
    if "model_cost" in block.text:
        model = AutoModelForCausalLM.from_pretrained(here / "DIR")
    return {"moeify": moeify, "model": model, "batch": batch, "batches": [batch], "ids": batch["input_ids"], "tensors": None}


LESS = {
    "max_new_tokens=32": "max_new_tokens=3",
    "range(1000)": "range(2)",
    "for_sequences(48_000)": "for_sequences(512)",
    "steps=10_000, batch_sequences=64": "steps=20, batch_sequences=4",
    "steps=10_000, batch_sequences=512, micro_sequences=16": "steps=20, batch_sequences=4, micro_sequences=2",
    "warmup_steps=200": "warmup_steps=2",
    "save_every=500": "save_every=10",
    'parallel="fsdp"': 'parallel="auto"',  # which needs several processes
    "model.layers.3.mlp": "model.layers.1.mlp",
    '{0: "6GiB", "cpu": "8GiB"}': '{"cpu": "8GiB"}',  # no GPU
    "num_experts=32, selected=8": "num_experts=8, selected=3",
}
"""What is changed in Python: sizes, and what needs a machine of another kind."""


def run_python(block, names):
    text = block.text
    for long, short in LESS.items():
        text = text.replace(long, short)
    exec(compile(text, block.where, "exec"), names)


@pytest.mark.filterwarnings("ignore:.* epochs:UserWarning")  # of so little data
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(runs(block) for block in blocks)])
def test_every_block_of_the_page_runs(page, here, capsys, done):
    blocks = [block for block in BLOCKS[page] if runs(block)]
    has_python = page not in PYTHON_ELSEWHERE and any(block.language == "python" for block in blocks)
    names = names_of(page, here) if has_python else {}
    for block in blocks:
        if block.language == "python":
            if page not in PYTHON_ELSEWHERE:
                run_python(block, names_of_concepts(block, here) if page == "docs/concepts.md" else names)
            continue
        for command in block.commands():
            if has_python or command not in done:
                code = cli.run(docs_world.smaller(docs_world.arguments_of(command)))
                assert code == 0, f"{block.where}: {command}\n{capsys.readouterr().err[-2000:]}"
                done.add(command)


@pytest.mark.parametrize("page", PYTHON_ELSEWHERE)
def test_python_of_the_page_has_a_test_of_its_own(page):
    assert (ROOT / page).name in (ROOT / PYTHON_ELSEWHERE[page]).read_text(encoding="utf-8")
    assert any(block.language == "python" for block in BLOCKS[page])
