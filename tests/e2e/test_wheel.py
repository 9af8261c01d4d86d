"""The wheel, built from a copy of the sources: with a compiler it brings the kernels, without one it installs all the same and says so."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "moeify/kernels/libmoeify_cpu"


def has(package, version):
    try:
        return int(importlib.metadata.version(package).split(".")[0]) >= version
    except importlib.metadata.PackageNotFoundError:
        return False


# From the network it would take minutes, or never end.
pytestmark = pytest.mark.skipif(not (has("setuptools", 77) and has("pip", 21)), reason="no pip and setuptools at hand")


def wheel(folder, **environment):
    """Unpacks the wheel; gives its file name and what it holds."""
    source, unpacked = folder / "source", folder / "unpacked"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("libmoeify_cpu.*", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    environment = {**{name: value for name, value in os.environ.items() if name != "CXX"}, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unpacked)
        return file.name, archive.namelist()


def doctor(folder):
    """What the unpacked wheel says of its kernels, in a process that sees no sources."""
    code = "import moeify, sys; print(moeify.__file__, file=sys.stderr); from moeify.cli import main; main()"
    command, environment = [sys.executable, "-c", code, "doctor", "--json"], {**os.environ, "PYTHONPATH": str(folder / "unpacked")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder, timeout=120)
    assert done.stderr.startswith(str(folder / "unpacked")), done.stderr
    return json.loads(done.stdout)["compiled_kernels"]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_wheel_serves_every_python_of_a_platform_and_brings_the_kernels(tmp_path):
    name, files = wheel(tmp_path, MOEIFY_CXXFLAGS="-O0")  # soon compiled
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert [file for file in files if file.startswith(LIBRARY)] == [LIBRARY + (".dylib" if sys.platform == "darwin" else ".so")]
    assert not [file for file in files if not file.startswith("moeify")], "neither tests nor sources"
    assert "portable" in doctor(tmp_path)


def test_wheel_without_a_compiler_installs_and_doctor_says_what_is_missing(tmp_path):
    (tmp_path / "bin").mkdir()
    _, files = wheel(tmp_path, PATH=str(tmp_path / "bin"))
    assert "moeify/kernels/cpu.py" in files
    assert not [file for file in files if file.startswith(LIBRARY)]
    assert "no C++17 compiler at installation" in doctor(tmp_path)
