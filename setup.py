"""Builds the compiled CPU kernels (csrc/) with the package: one plain C library, so one wheel serves every Python and torch.

Everything else stands in pyproject.toml. Without a C++17 compiler the install succeeds without the library, with an older one without the
instruction sets that it does not know; `moeify doctor` says so.
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
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_BF16 = ("-mavx512bf16", "-mavx512vnni")
_AMX = ("-mamx-tile", "-mamx-bf16")
INSTRUCTIONS = {
    _AVX2: "vfmadd231ps %ymm0, %ymm1, %ymm2",
    _AVX512: "vaddps %zmm0, %zmm1, %zmm2",
    _BF16: "vdpbf16ps %zmm0, %zmm1, %zmm2",
    _AMX: "tdpbf16ps %tmm0, %tmm1, %tmm2",
}
"""Flags that go together, and what the assembler must know, too. Where it or the compiler does not, they are left out: the source then sees
that the compiler's macros are missing, and compiles to nothing (csrc/isa_missing.h)."""
SOURCES: dict[str, tuple[tuple[str, ...], ...]] = {"moeify.cpp": (), "isa_portable.cpp": ()}
"""Flags by source file: each instruction set is compiled for itself and chosen at run time."""
if platform.machine().lower() in ("x86_64", "amd64"):
    SOURCES |= {
        "isa_avx2.cpp": (_AVX2,),
        "isa_avx512.cpp": (_AVX2, _AVX512),
        "isa_avx512_bf16.cpp": (_AVX2, _AVX512, _BF16),
        "isa_amx_bf16.cpp": (_AVX2, _AVX512, _BF16, _AMX),
    }
_NEWER = "install g++ 11, clang++ 12 or newer (CXX names another compiler), then moeify again"
_MOST = 300  # characters of a compiler's error


class BuildLibrary(build_ext):
    """Compile and link ``csrc`` into one library beside the module that loads it, and say in a text file there what it lacks, and why."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX  # without the tag of a Python version

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()  # also used by an editable installation
        for ext in self.extensions:
            note, built = self._note(ext), Path(self.build_lib, self.get_ext_filename(ext.name)).with_suffix(".txt")
            note.unlink(missing_ok=True)
            if built.exists():
                self.copy_file(str(built), str(note))

    def build_extension(self, ext: Extension) -> None:
        note = self._note(ext)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            left_out = self._build(Path(self.get_ext_fullpath(ext.name)))
        except CompileError as error:
            note.write_text(f"{error.args[0]}\n", encoding="utf-8")
            raise  # build_ext goes on without an optional extension
        if left_out:
            sets, reasons = ", ".join(left_out), "; ".join(dict.fromkeys(left_out.values()))
            note.write_text(f"left out at installation: {sets} ({reasons}); {_NEWER}\n", encoding="utf-8")

    def _note(self, ext: Extension) -> Path:
        return Path(self.get_ext_fullpath(ext.name)).with_suffix(".txt")

    def _build(self, target: Path) -> dict[str, str]:
        """Makes the library; gives the instruction sets that it lacks, with the reason.

        Raises:
            CompileError: it cannot be made; its first argument says why.
        """
        if sys.platform == "win32":
            raise CompileError("it is not built on Windows; in WSL it is")
        compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(shlex.split(c)[0])), None)
        if compiler is None:
            raise CompileError("there was no C++17 compiler at installation; install g++ or clang++, then moeify again")
        # MOEIFY_CXXFLAGS: what a sanitizer build adds.
        command = [*shlex.split(compiler), *FLAGS, *shlex.split(os.environ.get("MOEIFY_CXXFLAGS", ""))]
        target.unlink(missing_ok=True)  # of an earlier build
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)

        def is_known(flags: tuple[str, ...]) -> bool:
            probe = [*command, *flags, "-x", "c++", "-", "-c", "-o", str(objects / "probe.o")]
            return _run(probe, text=f'void f() {{ asm("{INSTRUCTIONS[flags]}"); }}') is None

        unknown = [flags for flags in dict.fromkeys(group for groups in SOURCES.values() for group in groups) if not is_known(flags)]
        left_out: dict[str, str] = {}
        for source, groups in SOURCES.items():
            if lacking := [flag for group in groups if group in unknown for flag in group]:
                left_out[_isa(source)] = f"'{compiler}' does not know {' '.join(lacking)}"

        def compile_one(source: str) -> tuple[str, str | None]:
            object_file = str(objects / (source + ".o"))
            flags = [flag for group in SOURCES[source] if group not in unknown for flag in group]
            end = ["-c", str(Path("csrc", source)), "-o", object_file]
            error = _run([*command, *flags, *end])
            # Headers of an old compiler may lack what its flags promise: that set is left out, too.
            if error is not None and (not SOURCES[source] or _run([*command, "-DMOEIFY_LEFT_OUT", *end]) is not None):
                raise CompileError(f"it could not be compiled at installation: {error}; {_NEWER}")
            return object_file, error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))
        failed = {_isa(source): f"compile error: {error}" for source, (_, error) in compiled.items() if error is not None}
        if (error := _run([*command, "-shared", *(file for file, _ in compiled.values()), "-o", str(target)])) is not None:
            raise CompileError(f"it could not be linked at installation: {error}; {_NEWER}")
        left_out |= failed
        return {isa: left_out[isa] for isa in map(_isa, SOURCES) if isa in left_out}


def _isa(source: str) -> str:
    """The instruction set of a source file, as moeify.kernels.cpu calls it."""
    return source.removeprefix("isa_").removesuffix(".cpp")


def _run(command: list[str], *, text: str = "") -> str | None:
    """What a compiler says is wrong, in a line, all of it on stderr; None if nothing is."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    if not text:  # what a probe says is expected
        print(f"{shlex.join(command)}\n{done.stderr}", file=sys.stderr)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit code {done.returncode}")
    return first[:_MOST]


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
