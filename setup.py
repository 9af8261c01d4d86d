"""Builds the compiled CPU kernels (csrc/) with the package: one plain C library, so one wheel serves every Python and torch.

Everything else stands in pyproject.toml. Without a C++17 compiler the install succeeds without the library; `moeify doctor` says so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AMX = ["-mamx-tile", "-mamx-bf16"]
"""Flags that are left out where compiler or assembler do not know them (g++ before 11): the source then holds nothing of AMX."""
SOURCES: dict[str, list[str]] = {"moeify.cpp": [], "isa_portable.cpp": []}
"""Flags by source file: each instruction set is compiled for itself and chosen at run time."""
if platform.machine().lower() in ("x86_64", "amd64"):
    SOURCES |= {
        "isa_avx2.cpp": ["-mavx2", "-mfma"],
        "isa_avx512.cpp": _AVX512,
        "isa_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
        "isa_amx_bf16.cpp": [*_AVX512, "-mavx512bf16", *AMX],
    }


class BuildLibrary(build_ext):
    """Compile and link ``csrc`` into one library beside the module that loads it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX  # without the tag of a Python version

    def build_extension(self, ext: Extension) -> None:
        compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(shlex.split(c)[0])), None)
        if compiler is None or sys.platform == "win32":
            raise CompileError("no C++ compiler: moeify's CPU kernels are left out")  # build_ext goes on without an optional extension
        # MOEIFY_CXXFLAGS: what a sanitizer build adds.
        command = [*shlex.split(compiler), *FLAGS, *shlex.split(os.environ.get("MOEIFY_CXXFLAGS", ""))]
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        probe = [*command, *AMX, "-x", "c++", "-", "-c", "-o", str(objects / "probe.o")]
        tiles = 'void f() { asm("tdpbf16ps %tmm0, %tmm1, %tmm2"); }'
        unknown = [] if subprocess.run(probe, input=tiles, capture_output=True, text=True, check=False).returncode == 0 else AMX

        def compile_one(source: str) -> str:
            object_file = str(objects / (source + ".o"))
            _run([*command, *(flag for flag in SOURCES[source] if flag not in unknown), "-c", str(Path("csrc", source)), "-o", object_file])
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = list(pool.map(compile_one, SOURCES))
        _run([*command, "-shared", *files, "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr}")


class WithRecipes(build_py):
    """Puts ``recipes`` beside the modules, where `moeify.pipeline.builtin` finds them; an editable installation has them in the sources."""

    def run(self) -> None:
        super().run()
        for path in [] if self.editable_mode else self._recipes():
            target = Path(self.build_lib, "moeify", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, "moeify", path)) for path in self._recipes())]

    @staticmethod
    def _recipes() -> list[Path]:
        return sorted(Path("recipes").rglob("*.toml"))


class PlatformWheel(bdist_wheel):
    """Tag py3-none-<platform>: the library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension("moeify.kernels.libmoeify_cpu", sources=[], depends=[str(p) for p in sorted(Path("csrc").glob("*"))], optional=True)
    ],
    cmdclass={"build_ext": BuildLibrary, "build_py": WithRecipes, "bdist_wheel": PlatformWheel},
)
