"""Registration: at once or by the import hook, once, whatever is imported first."""

import subprocess
import sys

import pytest

ORDERS = {
    "everything of transformers first": "import transformers.quantizers.auto; import moeify",
    "moeify first, and again": "import moeify; import transformers.quantizers; moeify.hf.register()",
    "through our own module": "from moeify.hf.quantizer import MoeifyQuantizer",
}

CHECK = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["moeify"].__name__ == "MoeifyQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["moeify"].__name__ == "MoeifyConfig"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("moeify")], "the hook is of one use"
"""

# One process imports torch, which takes longest, and forks for each order of the rest.
FORKING = f"""
import os, sys, traceback
import torch
failed = 0
for name, first in {ORDERS!r}.items():
    child = os.fork()
    if child == 0:
        try:
            exec(first + {CHECK!r}, {{}})
        except BaseException:
            print(name, file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_import_moeify_registers_once_in_every_order():
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
