"""The wheel, built from the source distribution: with a compiler it brings the kernels and works in an environment of its own, without one
it installs all the same and says so."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "moeify/kernels/libmoeify_cpu"


def has(package, version):
    try:
        return int(importlib.metadata.version(package).split(".")[0]) >= version
    except importlib.metadata.PackageNotFoundError:
        return False


# From the network it would take minutes, or never end.
pytestmark = pytest.mark.skipif(not (has("setuptools", 77) and has("pip", 22)), reason="no pip and setuptools at hand")


def copied(folder):
    """The sources as a release has them, without what was built."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "csrc", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("libmoeify_cpu.*", "*.egg-info", "__pycache__"))
    return source


def wheel(folder, source, **environment):
    """Builds the wheel of a folder or an sdist; gives its path and what it holds."""
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    environment = {**{name: value for name, value in os.environ.items() if name != "CXX"}, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return file, archive.namelist()


SMOKE = """
import contextlib, io, json, sys
import moeify
from moeify import cli
from moeify.pipeline import read_recipe
from moeify.pipeline.builtin import recipe_names

data = ["--data", "text.txt", "--window", "32", "--max-tokens", "320"]
small = ["--expert-size", "8", "--router-width", "4", "--router-epochs", "1", "--target-active", "0.5"]
for step in (
    ["convert", "dense", "--out", "moe", *small, *data],
    ["report", "moe", "--no-latency", *data],
    ["generate", "moe", "Once", "--max-new-tokens", "2"],
):
    code = cli.run(step)
    assert code == 0, step
said = io.StringIO()
with contextlib.redirect_stdout(said):
    cli.run(["doctor", "--json"])
found = json.loads(said.getvalue())
chosen = next(row["name"] for row in found["kernels"] if row["chosen"] and row["tokens"] == 1)
names = recipe_names()
recipe = read_recipe("gpt_pydoc").name
print(json.dumps({"file": moeify.__file__, "kernels": found["compiled_kernels"], "chosen": chosen, "names": names, "recipe": recipe}))
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_sdist_makes_a_wheel_that_works_outside_of_the_repository(tmp_path):
    source = copied(tmp_path)
    code = "from setuptools.build_meta import build_sdist; build_sdist('../dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True, timeout=120)
    (sdist,) = (tmp_path / "dist").glob("moeify-*.tar.gz")
    shutil.rmtree(source)
    file, files = wheel(tmp_path, sdist, MOEIFY_CXXFLAGS="-O0")  # soon compiled
    assert "-py3-none-" in file.name
    assert not file.name.endswith("-any.whl")
    assert [name for name in files if name.startswith(LIBRARY)] == [LIBRARY + (".dylib" if sys.platform == "darwin" else ".so")]
    assert not [name for name in files if not name.startswith("moeify")], "neither tests nor sources"
    wanted = {f"moeify/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" for path in (ROOT / "recipes").rglob("*.toml")}
    assert wanted == {name for name in files if name.endswith(".toml")}
    with zipfile.ZipFile(file) as archive:
        metadata = archive.read(next(name for name in files if name.endswith("METADATA"))).decode()
    needed = [
        re.match(r"[\w-]+", line)[0] for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE) if "extra" not in line
    ]
    assert sorted(needed) == ["numpy", "rich", "safetensors", "tomli", "torch", "transformers", "typer"]

    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True, timeout=120)
    python = env / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(file)]
    subprocess.run(install, capture_output=True, check=True, timeout=120)
    (place,) = env.glob("lib/python*/site-packages")
    (place / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # for they are large; moeify comes before them
    work = tmp_path / "work"
    work.mkdir()
    tiny.save_dense_tiny(work / "dense")
    (work / "text.txt").write_text("Once upon a time there was a small town by the sea. " * 20)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    run = {"cwd": work, "env": clean, "capture_output": True, "text": True, "timeout": 300}
    assert re.fullmatch(r"moeify \d+\.\d+\.\d+\n", subprocess.run([env / "bin" / "moeify", "--version"], check=True, **run).stdout)
    done = subprocess.run([python, "-c", SMOKE], check=False, **run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"].startswith(str(place))
    assert "portable" in found["kernels"]
    assert found["chosen"] == "cpu"
    assert found["recipe"] == "gpt_pydoc"
    assert set(found["names"]) >= {"gpt_pydoc", "pretrain/gpt"}
    assert "Executed experts by layer" in (work / "moe" / "report" / "report.html").read_text(encoding="utf-8")


def test_wheel_without_a_compiler_installs_and_doctor_says_what_is_missing(tmp_path):
    (tmp_path / "bin").mkdir()
    file, files = wheel(tmp_path, copied(tmp_path), PATH=str(tmp_path / "bin"))
    assert "moeify/kernels/cpu.py" in files
    assert not [name for name in files if name.startswith(LIBRARY)]
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "unpacked")
    code = "import moeify; from moeify.kernels import cpu; print(moeify.__file__); print(cpu.describe())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path, timeout=120
    )
    where, said = done.stdout.splitlines()
    assert where.startswith(str(tmp_path / "unpacked"))
    assert "no C++17 compiler at installation" in said
