"""`torchrun -m moeify pretrain`: told to stop, and gone on by one process."""

import json
import signal
import subprocess
import sys
import time

import pytest
import ranks_pretrain
from pretraining import recipe_file


@pytest.mark.slow
def test_torchrun_told_to_stop_passes_it_on_and_one_process_goes_on(tmp_path):
    recipe, out = recipe_file(tmp_path), tmp_path / "out"
    settings = [f"--set={text}" for text in (*ranks_pretrain.SAME, "train.steps=150", "train.save_every=150", "train.eval_every=150")]
    arguments = ["-m", "moeify", "pretrain", str(recipe), "--out", str(out), *settings]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen([*torchrun, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out.work" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[1][-3000:]
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 1  # torchrun's own, whatever the processes end with
    stopped = [line for line in said if line.startswith("stopped: ")]
    assert len(stopped) == 1 and "SIGTERM: stopped after step" in stopped[0]
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "goes on after step" in ended.stderr
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 151))
