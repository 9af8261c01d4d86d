"""The opt-in distribution that registers moeify in programs which do not import it, installed for one process by a folder on its path."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_converted_tiny

from moeify.select import TopK

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
AUTOLOAD = ROOT / "autoload"

CHECKS = {
    "from_pretrained, transformers serve, and what lm_eval asks before it loads": """
import json
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(DIR)
assert sum(type(m).__name__ == "MoEFFN" for m in model.modules()) == 2
assert not [f for f in sys.meta_path if type(f).__module__.startswith("moeify")], "the hook is of one use"

from transformers.cli.serving.model_manager import ModelManager
(served,) = ModelManager(force_model=DIR, device="cpu").loaded_models.values()
served._timer.cancel()
assert sum(type(m).__name__ == "MoEFFN" for m in served.model.modules()) == 2

from transformers.quantizers.auto import AutoQuantizationConfig
stored = json.load(open(DIR + "/config.json"))["quantization_config"]
assert type(AutoQuantizationConfig.from_dict(stored)).__name__ == "MoeifyConfig"
""",
    "a broken moeify": """
sys.path.insert(0, BROKEN)
import transformers.quantizers.auto as table
assert "moeify" not in table.AUTO_QUANTIZER_MAPPING and "gptq" in table.AUTO_QUANTIZER_MAPPING
""",
}

# One process imports torch, which takes longest, and forks for each check.
FORKING = """
import os, sys, traceback
DIR, BROKEN = sys.argv[1:]
import torch
assert not [m for m in sys.modules if m.split(".")[0] in ("moeify", "transformers")], "import torch imported them"
failed = 0
for name, check in CHECKS.items():
    child = os.fork()
    if child == 0:
        try:
            exec(check, {"sys": sys, "DIR": DIR, "BROKEN": BROKEN})
            sys.stderr.flush()
        except BaseException:
            print(name, file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


def installed(tmp_path: Path) -> Path:
    """A folder which makes importlib.metadata see the distribution, entry points as its pyproject.toml has them."""
    project = tomllib.loads((AUTOLOAD / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"moeify_autoload-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info.parent


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_programs_that_do_not_import_moeify_find_the_hook(tmp_path):
    checkpoint = save_converted_tiny(tmp_path / "converted")
    broken = tmp_path / "broken"
    (broken / "moeify").mkdir(parents=True)
    (broken / "moeify" / "__init__.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n")
    path = os.pathsep.join([str(ROOT / "src"), str(AUTOLOAD / "src"), str(installed(tmp_path))])
    script = f"CHECKS = {CHECKS!r}\n{FORKING}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(broken)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "moeify cannot be imported (OSError: libgomp.so.1: cannot open shared object file)" in done.stderr


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


LM_EVAL = """
import functools, runpy, lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
runpy.run_module("lm_eval", run_name="__main__")
"""
"""``python -m lm_eval``, but for reading the files of its own thousands of tasks, which takes longer than everything else."""


def test_lm_eval_runs_the_sparse_model_where_nobody_imports_moeify(tmp_path):
    pytest.importorskip("lm_eval")
    from moeify.pipeline.harness import evaluate_checkpoint

    checkpoint = save_converted_tiny(tmp_path / "converted", rule=TopK(k=2))
    texts, task = tmp_path / "texts.jsonl", tmp_path / "letters.yaml"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("It rained, so she ran.", "One two", "three", "four")))
    task.write_text(TASK.replace("TEXTS", str(texts)))
    expected = evaluate_checkpoint(checkpoint, tasks=[str(task)], limit=3, dense=True)["results"]
    path = os.pathsep.join([str(ROOT / "src"), str(AUTOLOAD / "src"), str(installed(tmp_path))])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LM_EVAL, "--model", "hf", "--model_args", f"pretrained={checkpoint}", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--tasks", str(task), "--limit", "3", "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **offline, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["letters"]["bits_per_byte,none"]
    assert found == pytest.approx(expected["moe"]["letters"]["bits_per_byte"], rel=1e-6)
    assert found != pytest.approx(expected["dense"]["letters"]["bits_per_byte"], rel=1e-3)


def test_no_extra_names_the_distribution_which_is_on_no_registry():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [wanted for extra in extras.values() for wanted in extra if wanted.startswith("moeify-")]


@pytest.fixture
def autoload(monkeypatch):
    """The module, and an import system whose changes are undone."""
    spec = importlib.util.spec_from_file_location("moeify_autoload", AUTOLOAD / "src" / "moeify_autoload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name == "moeify" or name == "transformers.quantizers.auto"]:
        monkeypatch.delitem(sys.modules, name)
    return module


def awaited(module):
    return [finder.awaited for finder in sys.meta_path if isinstance(finder, module._ImportMoeifyFirst)]


def test_one_hook_however_often_torch_calls(autoload):
    autoload.activate()
    autoload.activate()
    assert awaited(autoload) == ["transformers.quantizers.auto"]


def test_where_the_table_is_what_imports_torch_the_next_module_is_awaited(autoload, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.quantizers.auto", object())
    autoload.activate()
    assert awaited(autoload) == ["transformers.modeling_utils"]


def test_off_by_its_variable_and_where_moeify_is_there_already(autoload, monkeypatch):
    monkeypatch.setenv("MOEIFY_AUTOLOAD", "0")
    autoload.activate()
    monkeypatch.delenv("MOEIFY_AUTOLOAD")
    monkeypatch.setitem(sys.modules, "moeify", object())
    autoload.activate()
    assert awaited(autoload) == []
