"""``import moeify`` is cheap: no device is touched, and what only some commands need is not loaded."""

import subprocess
import sys
from types import ModuleType

HEAVY = (
    "triton",
    "matplotlib",
    "typer",
    "rich",
    "pyarrow",
    "datasets",
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto",
    "transformers.trainer_callback",
    "moeify.train.hf_callbacks",
)

SCRIPT = f"""
import sys
import torch
before = set(sys.modules)
import moeify
loaded = [name for name in sys.modules if name not in before and any(name == h or name.startswith(h + ".") for h in {HEAVY!r})]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


def run(script):
    return subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)


def test_import_moeify_loads_nothing_heavy_and_touches_no_device():
    done = run(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_public_names_are_documented():
    import moeify

    public = {name: value for name, value in vars(moeify).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert {"convert", "find_ffn_sites", "set_rule", "sweep", "load_model"} <= set(public)
    assert [name for name, value in public.items() if not value.__doc__] == []


def test_version_is_a_number():
    import moeify

    assert moeify.__version__[0].isdigit()
