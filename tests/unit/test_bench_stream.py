"""The case that converts a model larger than memory: what it passes on, that it sees a process' memory, and its limit at full size."""

import json
import os
import sys

import pytest

from bench import run as bench_run
from bench.cases import stream
from moeify import cli

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


def test_quick_run_converts_with_experts_of_the_size_that_is_asked_for(tmp_path, monkeypatch):
    def in_this_process(command, _folder):  # a process of its own takes seconds to start
        assert tuple(command[: len(stream.COMMAND)]) == stream.COMMAND
        assert cli.run(["convert", *command[len(stream.COMMAND) :]]) == 0
        return dict.fromkeys(stream._FIELDS, 1)

    monkeypatch.setattr(stream, "_peaks", in_this_process)
    out = tmp_path / "rows.jsonl"
    assert bench_run.main(["stream", "--quick", "--layers", "1", "--expert-size", "32", "--json", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["expert_size"], row["experts"]) == (32, 256 // 32)


def test_the_peak_of_a_command_is_its_own(tmp_path):
    code = "for _ in range(4): b'x' * ({} << 20)"
    small, large = (stream._peaks([sys.executable, "-c", code.format(mb)], str(tmp_path))["VmHWM"] / 1024 for mb in (1, 100))
    assert 90 < large - small < 110


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MOEIFY_LARGE_TESTS"), reason="minutes, and 5 GB of disk: set MOEIFY_LARGE_TESTS=1")
def test_a_checkpoint_of_2_gb_is_converted_within_1_gib():
    (row,) = stream.run(quick=False, layers=29)
    assert row["checkpoint_mb"] >= 2000
    assert row["experts"] == 4096 // 8
    assert row["peak_mb"] < 1024
