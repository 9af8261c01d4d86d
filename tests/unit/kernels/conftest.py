"""What tests of Triton kernels share: the compiler for GPUs that are not here."""

import pytest

from moeify.kernels import gpu_linear


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile one of the kernels for NVIDIA's GPU, or AMD's of such a name; all is a multiple of 16, but for what is named."""
    if gpu_linear.is_interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_for(kernel, capability, *, pointers, constants, odd=(), num_warps=4, num_stages=3):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*constants, *odd)}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=even)
        wave = 64 if str(capability).startswith("gfx9") else 32
        target = GPUTarget("hip", capability, wave) if isinstance(capability, str) else GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})

    return compile_for
