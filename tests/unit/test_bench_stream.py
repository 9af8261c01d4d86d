"""The case that converts a model larger than memory: what it passes on, and that it sees a process' memory."""

import json
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
