"""What the report is made of."""

import pytest
from ffn_cases import needs_library

from moeify import doctor
from moeify.evaluate import Latency
from moeify.kernels import gpu_linear


def test_speed_divides_work_by_median_time(monkeypatch):
    def measure(fns, **_):
        for fn in fns.values():
            fn()
        return {"matmul": Latency(median_ms=2.0, p20_ms=1.0, p80_ms=9.0), "copy": Latency(median_ms=4.0, p20_ms=1.0, p80_ms=9.0)}

    monkeypatch.setattr(doctor, "measure_ms", measure)
    speed = doctor.doctor()["speed"]
    assert speed["matmul_flops_per_s"] == pytest.approx(2 * 512**3 / 2e-3)
    assert speed["copy_bytes_per_s"] == pytest.approx(2 * 64 * 2**20 / 4e-3)  # read and written


def test_kernels_have_one_choice_for_each_shape(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", dict)
    rows = doctor.doctor()["kernels"]
    shapes = {(row["tokens"], row["active"], row["training"]) for row in rows}
    chosen = [(row["tokens"], row["active"], row["training"]) for row in rows if row["chosen"]]
    assert len(shapes) == 4
    assert sorted(chosen) == sorted(shapes)


def test_linear_kernels_say_that_the_compiled_one_is_for_decoding(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", dict)
    rows = doctor.doctor()["linear_kernels"]
    assert [sum(row["chosen"] for row in rows if (row["device"], row["tokens"]) == ("cpu", tokens)) for tokens in (1, 512)] == [1, 1]
    prompt = next(row for row in rows if (row["device"], row["tokens"], row["name"]) == ("cpu", 512, "cpu"))
    assert not prompt["chosen"] and "made for decoding" in prompt["reason"]


def test_linear_kernels_name_the_gpus_kernel_and_why_it_does_not_run(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", dict)
    rows = [row for row in doctor.doctor()["linear_kernels"] if (row["device"], row["name"]) == ("cpu", "triton")]
    assert [(row["chosen"], row["reason"]) for row in rows] == [(False, "it runs on a GPU, x is on cpu")] * 2


def test_doctor_says_what_each_gpu_runs_and_which_is_too_old(monkeypatch):
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert doctor._gpu_ffn() == "no GPU that torch sees"
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda gpu: (9, 0) if gpu.index else (7, 0))
    old, new = doctor._gpu_ffn().split("; ")
    assert old == "cuda:0: it needs compute capability 8.0, this GPU has 7.0"
    assert new.startswith("cuda:1: router 'norm', any rule and experts are four kernels")
    monkeypatch.setattr(gpu_linear, "_is_installed", lambda: False)
    assert "triton is not installed" in doctor._gpu_ffn()


@needs_library
def test_doctor_says_that_a_gated_ffn_is_one_call_and_else_why_not(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", dict)
    assert "one call; activations: relu, silu" in doctor.doctor()["linear_ffn"]
    monkeypatch.setattr(doctor, "gated_refusal", lambda *_, **__: "the compiled library is missing")
    assert doctor.doctor()["linear_ffn"] == "the compiled library is missing"


def test_extras_are_those_of_the_metadata_and_name_what_is_missing(monkeypatch):
    lines = [
        "torch>=2",
        'lm-eval>=0.4; extra == "eval"',
        "no-such-package; extra == 'odd'",
        'lm-eval; extra == "odd"',
        'ruff; extra == "dev"',
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: lines)
    assert doctor.extras() == {"eval": ("lm-eval",), "odd": ("no-such-package", "lm-eval")}
    assert "no-such-package" in doctor._missing(doctor.extras()["odd"])
    assert doctor._missing(("torch",)) is None


def test_compilers_say_which_they_are_or_that_there_is_none(monkeypatch, tmp_path):
    compiler = tmp_path / "odd"
    compiler.write_text("#!/bin/sh\necho odd 7; echo more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -x")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compilers() == {"CXX": "odd 7", "c++": "not found", "g++": "not found", "clang++": "not found", "nvcc": "not found"}
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert doctor._compilers()["CXX"] == "does not run (CalledProcessError)"


def test_a_gpu_that_is_hidden_is_said_to_be(monkeypatch):
    monkeypatch.setattr(doctor.torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._cuda().startswith("no device (torch is built for CUDA 13.0; CUDA_VISIBLE_DEVICES is ''")
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    assert doctor._cuda() == "torch is built without CUDA"


def test_caches_are_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no"))
    assert doctor._caches()["triton"] == str(tmp_path)
    assert doctor._caches()["hub"] == f"{tmp_path / 'no'} (not there yet)"


@needs_library
def test_instruction_sets_that_were_left_out_are_missing_and_the_reason_stands_with_the_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", lambda: {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9})
    monkeypatch.setattr(doctor.kernels.cpu, "unavailable", lambda: None)
    monkeypatch.setattr(doctor.kernels.cpu, "build_note", lambda: "left out at installation: amx_bf16 (odd)")
    found = doctor.doctor()
    assert found["compiled_kernels"].endswith("; left out at installation: amx_bf16 (odd)")
    assert "instruction sets of the compiled CPU kernels" in doctor.doctor_text(found).partition("Missing:")[2]
