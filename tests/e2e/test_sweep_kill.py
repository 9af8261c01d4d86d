"""A sweep that dies of SIGKILL goes on where it was when run again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import transformers

import moeify
from moeify import cli
from moeify.data import DataConfig
from moeify.pipeline import CalibrationConfig, convert_checkpoint
from moeify.routers import CentreRouterConfig
from moeify.split import ContiguousSplit

VALUES = (0.0, 0.5, 0.9, 1.0)

# The values that were measured go to stdout; of as many points as the argument says, the file with the last one does not get in place.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from moeify import cli
import moeify.evaluate.sweep

module = sys.modules["moeify.evaluate.sweep"]
points, dies_at = [], int(sys.argv[1])
measure, replace = module._measure_point, Path.replace

def measured(*args, **options):
    points.append(measure(*args, **options))
    print(points[-1].value, flush=True)
    return points[-1]

def die(self, target):
    if len(points) == dies_at and Path(target).name == "curve.json":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)

module._measure_point, Path.replace = measured, die
sys.exit(cli.run(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("sweep")
    config = moeify.ConvertConfig(expert_size=8, router=CentreRouterConfig(), split=ContiguousSplit(), rule=moeify.DynKMax(tau=0.0))
    calibration = CalibrationConfig(max_tokens=512, window=32)
    data = DataConfig(data="builtin:pydoc")
    convert_checkpoint(str(tiny.save_dense_tiny(root / "dense")), root / "moe", data=data, config=config, calibration=calibration)
    return root / "moe"


def test_sweep_killed_and_run_again_measures_the_rest_and_writes_the_same_file(converted, tmp_path):
    options = ["--data", "builtin:pydoc", "--window", "32", "--max-tokens", "128", "--values", ",".join(map(str, VALUES)), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}

    def process(*, dies_at):
        command = [sys.executable, "-c", SCRIPT, str(dies_at), "sweep", str(converted), "--out", str(tmp_path / "curve.json"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        return done.returncode, [float(line) for line in done.stdout.splitlines() if not line.startswith("{")]

    assert process(dies_at=3) == (-signal.SIGKILL, [0.0, 0.5, 0.9])
    assert [point["value"] for point in json.loads((tmp_path / "curve.json").read_text())["points"]] == [0.0, 0.5], "the old file is whole"
    assert process(dies_at=0) == (0, [0.9, 1.0]), "earlier points are not measured again"

    assert cli.run(["sweep", str(converted), "--out", str(tmp_path / "whole.json"), *options]) == 0
    assert (tmp_path / "curve.json").read_text() == (tmp_path / "whole.json").read_text()
