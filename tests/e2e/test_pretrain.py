"""`moeify pretrain` in processes of its own: killed at different places, out of disk, stopped by a signal.

One process does an undisturbed run and forks for each other: what is imported need not be imported again. It has one thread, as forks ask.
"""

import json
import signal
import subprocess
import sys

import pytest
from pretraining import recipe_file
from without_moeify import run_without_moeify

DRIVER = """
import json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
folder = sys.argv[2]
import torch
torch.set_num_threads(1)
from pathlib import Path
from moeify import cli
from moeify.ssd import SSD
import moeify.train.hf_callbacks

def at_step(number, step):
    set_step = SSD.set_step
    def patched(self, done):
        set_step(self, done)
        if done == step:
            os.kill(os.getpid(), number)
    SSD.set_step = patched

def while_saving(step):
    rename = Path.rename
    def die(self, target):
        if Path(target).name == f"step-{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.rename = die

def small_disk():
    set_step = SSD.set_step
    def patched(self, done):
        if done == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        set_step(self, done)
    SSD.set_step = patched

def start(name):
    return cli.run(["pretrain", f"{folder}/recipe.toml", "--out", f"{folder}/{name}"])

devnull = os.open(os.devnull, os.O_WRONLY)
stdout = os.dup(1)
os.dup2(devnull, 1)
codes = {"whole": start("whole")}
RUNS = {
    "sparse_phase": [lambda: at_step(signal.SIGKILL, 12), None],
    "saving": [lambda: while_saving(10), None],
    "three_times": [lambda: at_step(signal.SIGKILL, 3), lambda: at_step(signal.SIGKILL, 8), lambda: at_step(signal.SIGKILL, 19), None],
    "disk": [small_disk, None],
    "sigterm": [lambda: at_step(signal.SIGTERM, 11), None],
}
for name, preparations in RUNS.items():
    codes[name] = []
    for i, prepare in enumerate(preparations):
        child = os.fork()
        if child == 0:
            log = os.open(f"{folder}/{name}.{i}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            if prepare is not None:
                prepare()
            os._exit(start(name))
        status = os.waitpid(child, 0)[1]
        codes[name].append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
os.dup2(stdout, 1)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("runs")
    recipe_file(folder)
    arguments = [sys.executable, "-c", DRIVER, str(request.config.rootpath / "tests"), str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def record(folder):
    found = json.loads((folder / "pretrain.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("sparse_phase", [-signal.SIGKILL, 0]),
        ("saving", [-signal.SIGKILL, 0]),
        ("three_times", [-signal.SIGKILL] * 3 + [0]),
        ("disk", [2, 0]),
        ("sigterm", [143, 0]),
    ],
)
def test_whatever_ends_a_run_the_same_command_goes_on_to_the_same_bits(runs, name, codes):
    folder, found = runs
    assert found[name] == codes, (folder / f"{name}.0.err").read_text()
    assert weights(folder / name) == weights(folder / "whole")
    assert record(folder / name) == record(folder / "whole")
    kinds = [
        [(row["kind"], row["step"]) for row in map(json.loads, (folder / run / "log.jsonl").read_text().splitlines())]
        for run in (name, "whole")
    ]
    assert kinds[0] == kinds[1]


def test_what_they_say_is_one_line(runs):
    folder, _ = runs
    disk, stopped = ((folder / f"{name}.0.err").read_text().splitlines()[-1] for name in ("disk", "sigterm"))
    assert disk.startswith("error: cannot write")
    assert "the last state is kept" in disk
    assert stopped == "stopped: SIGTERM: stopped after step 12 of 20, which is saved; the same command goes on there."
    assert "goes on after step 12 of 20." in (folder / "sigterm.1.err").read_text()


def test_the_checkpoint_loads_as_a_dense_model_where_moeify_is_not(runs):
    folder, _ = runs
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"], info
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the quick brown fox", return_tensors="pt").input_ids
print(model(input_ids=ids, labels=ids).loss.item())
"""
    done = run_without_moeify(code, folder / "whole")
    assert done.returncode == 0, done.stderr
    from moeify.controls import set_mode
    from moeify.hf.load import load_model

    model, tokenizer = load_model(folder / "whole")
    set_mode(model, "dense")
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    assert float(done.stdout) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
