"""The wheel, built from the source distribution: with a compiler it brings the kernels and works in an environment of its own, without one
it installs all the same and says so."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement

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
import contextlib, importlib.machinery, io, json, sys

REFUSED = set(json.loads(sys.argv[1]))


class BaseOnly(importlib.machinery.PathFinder):
    '''Finds what a base installation has: tests run where everything is installed.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else importlib.machinery.PathFinder.find_spec(name, path, target)


place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = BaseOnly
import moeify
from moeify import cli
from moeify.pipeline import read_recipe
from moeify.pipeline.builtin import recipe_names


def run(code, *step):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = cli.run(list(step))
    assert found == code, (step, found, said.getvalue())
    return said.getvalue()


data = ["--data", "text.txt", "--window", "32", "--max-tokens", "320"]
small = ["--expert-size", "8", "--router-width", "4", "--router-epochs", "1", "--target-active", "0.5"]
run(0, "--help")
run(0, "convert", "dense", "--out", "moe", *small, *data)
run(0, "thin", "dense", "--out", "thin", "--target", "0.4", *data)
run(0, "sweep", "thin", "--values", "0.5,1", "--out", "curve.json", *data)
run(0, "info", "moe")
run(0, "generate", "moe", "Once", "--max-new-tokens", "2")
found = json.loads(run(0, "doctor", "--json"))
missing = run(2, "report", "moe", "--no-latency", *data)
base = sorted(REFUSED & set(sys.modules))
sys.meta_path[place] = importlib.machinery.PathFinder
run(0, "report", "moe", "--no-latency", *data)
chosen = next(row["name"] for row in found["kernels"] if row["chosen"] and row["tokens"] == 1)
names = recipe_names()
recipe = read_recipe("gpt_pydoc").name
print(json.dumps({"file": moeify.__file__, "kernels": found["compiled_kernels"], "chosen": chosen, "names": names, "recipe": recipe,
    "missing": missing, "base": base}))
"""


def not_of_the_base(metadata):
    """Modules of all that is installed here beside what a wheel requires, and what that does; and Jinja2, which torch alone brings."""

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    def without_extras(lines):
        wanted = map(Requirement, lines)
        return [plain(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]

    needed, waiting = {"moeify"}, without_extras(re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE))
    while waiting:
        if (name := waiting.pop()) not in needed:
            needed.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                waiting += without_extras(importlib.metadata.requires(name) or ())
    found = {module: set(map(plain, owners)) for module, owners in importlib.metadata.packages_distributions().items()}
    return sorted(module for module, owners in found.items() if not owners & (needed - {"jinja2", "markupsafe"}))


OLD_COMPILER = """#!/bin/sh
# Knows no AVX-512-BF16, and lacks an intrinsic of AVX2 in its headers.
case "$*" in
  *-mavx512bf16*) echo "odd-c++: error: unrecognized command-line option '-mavx512bf16'" >&2; exit 1 ;;
  *MOEIFY_LEFT_OUT*) ;;
  *csrc/isa_avx2.cpp*) echo "csrc/vec.h:1:1: error: '_mm256_odd' was not declared" >&2; exit 1 ;;
esac
exec %s "$@"
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_sdist_and_an_older_compiler_make_a_wheel_that_works_outside_of_the_repository_without_any_extra(tmp_path):
    source = copied(tmp_path)
    code = "from setuptools.build_meta import build_sdist; build_sdist('../dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True, timeout=120)
    (sdist,) = (tmp_path / "dist").glob("moeify-*.tar.gz")
    shutil.rmtree(source)
    compiler = tmp_path / "odd-c++"
    compiler.write_text(OLD_COMPILER % next(filter(None, map(shutil.which, ("c++", "g++", "clang++")))))
    compiler.chmod(0o755)
    file, files = wheel(tmp_path, sdist, MOEIFY_CXXFLAGS="-O0", CXX=str(compiler))  # soon compiled
    assert "-py3-none-" in file.name
    assert not file.name.endswith("-any.whl")
    library, has_sets = LIBRARY + (".dylib" if sys.platform == "darwin" else ".so"), platform.machine() == "x86_64"
    assert sorted(name for name in files if name.startswith(LIBRARY)) == sorted([library, *[f"{LIBRARY}.txt"] * has_sets])
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
    done = subprocess.run([python, "-c", SMOKE, json.dumps(not_of_the_base(metadata))], check=False, **run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"].startswith(str(place))
    assert "portable" in found["kernels"]
    if has_sets:
        assert "left out at installation: avx2, avx512_bf16, amx_bf16 (" in found["kernels"], "and not avx512, which the compiler knows"
        assert "does not know -mavx512bf16 -mavx512vnni" in found["kernels"]
        assert "compile error: csrc/vec.h:1:1: error: '_mm256_odd' was not declared" in found["kernels"]
    assert found["base"] == []
    assert "pip install 'moeify[report]'" in found["missing"]
    assert found["chosen"] == "cpu"
    assert found["recipe"] == "gpt_pydoc"
    assert set(found["names"]) >= {"gpt_pydoc", "pretrain/gpt"}
    assert "Executed experts by layer" in (work / "moe" / "report" / "report.html").read_text(encoding="utf-8")


def test_wheel_without_a_compiler_installs_and_doctor_says_what_is_missing(tmp_path):
    (tmp_path / "bin").mkdir()
    file, files = wheel(tmp_path, copied(tmp_path), PATH=str(tmp_path / "bin"))
    assert "moeify/kernels/cpu.py" in files
    assert [name for name in files if name.startswith(LIBRARY)] == [f"{LIBRARY}.txt"]
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
