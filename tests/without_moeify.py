"""Scripts in processes where moeify cannot be imported, installed or not: forked from one that has imported torch and transformers, which
take longer than the scripts do."""

import atexit
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SERVER = """
import json, os, sys, traceback
sys.modules["moeify"] = None
import torch, transformers
import safetensors.torch, transformers.modeling_utils, transformers.models.auto.modeling_auto

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate(asked["streams"], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["-c", *asked["arguments"]]
        code = 0
        try:
            exec(compile(asked["script"], "<script>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_without_moeify(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """What ``python -c script arguments`` gives in such a process; an exception is exit code 1 and its traceback on stderr."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        asked = {"script": script, "arguments": list(map(str, arguments)), "streams": list(map(str, streams))}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(["python", "-c", script], code, *(path.read_text(encoding="utf-8") for path in streams))


@cache
def _server() -> "subprocess.Popen[str]":
    """One for all tests of this process; it ends with its stdin."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_end, server)
    return server


def _end(server: "subprocess.Popen[str]") -> None:
    server.communicate()
