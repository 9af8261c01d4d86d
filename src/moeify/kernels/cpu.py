"""The compiled CPU kernels (csrc/): loads the library, checks tensors, hands over pointers. Autograd and tracing are `cpu_op`'s.

Letters: T tokens, D model width, F FFN width, E experts.

The library knows neither Python nor torch: it is reached through ctypes, and takes its threads from the OpenMP runtime that torch loaded
(same pool, no second one). Everything that could make native code read out of bounds is checked before it is called.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..errors import KernelError
from ..sites.site import FFNWeights

T = TypeVar("T")

_ABI = 8
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""Instruction sets of the library, each better than those before; the index is what the library calls it."""
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu2")
"""Activations of the library; the index is what it calls them."""
RULES = ("threshold", "dynk_max", "dynk_mass", "topk")
"""Selection rules of the library, by their names in `moeify.select.RULES`; the index is what it calls them."""
OUTPUTS = ("exp", "abs")
"""Last steps of a router; the index is the library's ``is_abs``."""
FORCE_ISA = "MOEIFY_CPU_ISA"
"""Environment variable that names the instruction set to use instead of the best one."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of activations, and what the library calls them. Weights are of the same type, or `_INT8`."""
_INT8 = 2
_STATUS = {1: "an argument is out of range", 2: "there is no memory for its workspace", 3: "the instruction set is not there"}
_MOST_NOTE = 2000  # characters
_PLAIN = (Tensor, Parameter)
MATRICES = ("up_FD", "down_FD", "gate_FD")
BIASES = ("up_bias_F", "gate_bias_F", "down_bias_D")
SCALES = ("up_scale_F", "gate_scale_F", "down_scale_D")
"""Fields of `FFNWeights`, in the order in which they are declared."""


class _FFN(ctypes.Structure):
    """``moeify_ffn`` of csrc/moeify.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("up", "gate", "down")),
        *((name, ctypes.c_int64) for name in ("up_stride", "gate_stride", "down_stride")),
        *((name, ctypes.c_void_p) for name in ("up_bias", "gate_bias", "down_bias", "up_scale", "gate_scale", "down_scale")),
        *((name, ctypes.c_int64) for name in ("num_neurons", "num_experts", "d_in", "d_out")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "activation")),
    ]


class _Router(ctypes.Structure):
    """``moeify_router`` of csrc/moeify.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "hidden_bias", "out", "out_bias", "always_on")),
        ("width", ctypes.c_int64),
        ("is_abs", ctypes.c_int32),
        ("rule", ctypes.c_int32),
        ("knob", ctypes.c_float),
    ]


def refusal(x_TD: Tensor, *, activation: str) -> str | None:
    """Why the compiled kernels cannot compute this; None if they can. No host sync."""
    return "it has no forward-mode gradients" if wants_tangents() else _refusal(x_TD.device, x_TD.dtype, activation)


def wants_tangents() -> bool:
    """Whether forward-mode gradients are being computed, of which native code knows nothing."""
    return forward_ad._current_level >= 0


def _refusal(device: torch.device, dtype: torch.dtype, activation: str) -> str | None:
    if (missing := unavailable()) is not None:
        return missing
    if device.type != "cpu":
        return f"it runs on the CPU, x_TD is on {device}"
    if dtype not in DTYPES:
        return f"it takes float32 and bfloat16, x_TD is {dtype}"
    if activation not in ACTIVATIONS:
        return f"it does not know the activation {activation!r}; known: {', '.join(ACTIVATIONS)}"
    return None


def has_rows(weights: FFNWeights) -> bool:
    """Whether each neuron's row is contiguous in every matrix, so that nothing is copied."""
    return all(t is None or _is_rows(t) for t in (weights.up_FD, weights.gate_FD, weights.down_FD))


def is_recorded(x: Tensor) -> bool:
    """Whether somebody must see operators on ``x``, past whom the library may not be called.

    That is torch.compile, torch.export or torch.jit.trace; a mode of torch's dispatcher or a transformation of torch.func; or a subclass
    of Tensor, which may have no memory (FakeTensor).
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or torch._C._is_tracing()
    )


def is_transformed() -> bool:
    """Whether a transformation of torch.func is at work: vmap, grad, jvp."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def unavailable() -> str | None:
    """Why there is no compiled library here; None if there is one."""
    library = _library()
    return str(library) if isinstance(library, str) else None


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes longer than the rest of this package.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isas() -> tuple[str, ...]:
    """Instruction sets that this processor and the library have, the best one last; empty without a library."""
    return tuple(ISAS[i] for i in _available())


def has_amx() -> bool:
    """Whether this processor has AMX, which torch's products of bfloat16 then use."""
    return "amx_bf16" in isas()


has_amx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isa() -> str:
    """The instruction set in use: the best one, or what `FORCE_ISA` names."""
    return ISAS[_isa()]


def describe() -> str:
    """One line for `moeify doctor`: instruction set and threads, or why the library is not there."""
    if isinstance(library := _library(), str):
        return library
    threads = "threads of torch's OpenMP" if _openmp() is not None else "one thread: no OpenMP runtime of torch found"
    left_out = f"; {note}" if (note := build_note()) else ""
    return f"{isa()} (this processor and the library have {', '.join(isas())}), {threads}{left_out}"


def build_note() -> str:
    """What the installation left out of the library, or why there is none, and the way out; empty where nothing is to be said."""
    note = _library_file().with_suffix(".txt")  # setup.py writes it
    return " ".join(note.read_text(encoding="utf-8", errors="replace")[:_MOST_NOTE].split()) if note.is_file() else ""


def _library_file() -> Path:
    return Path(__file__).with_name("libmoeify_cpu" + (".dylib" if sys.platform == "darwin" else ".so"))


@dataclass(frozen=True)
class RouterWeights:
    """A norm router and its rule: scores = exp(z / 2) or abs(z), z = out relu(hidden x + hidden_bias) + out_bias."""

    hidden_WD: Tensor
    hidden_bias_W: Tensor
    out_EW: Tensor
    out_bias_E: Tensor
    output: str
    """One of `OUTPUTS`."""
    rule: str
    """One of `RULES`."""
    knob: float
    """Of the rule."""
    always_on: tuple[int, ...] = ()
    """Experts that run for every token."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the library's order."""
        return self.hidden_WD, self.hidden_bias_W, self.out_EW, self.out_bias_E


def routed_refusal(weights: FFNWeights, router: RouterWeights, *, activation: str, dtype: torch.dtype) -> str | None:
    """Why `Routed` cannot be made of these for x of this dtype; None if it can. Looks at no value: it may be asked while tracing."""
    tensors = router.tensors
    if any(t.device.type != "cpu" for t in tensors):
        return "weights and router must all be on the CPU"
    if router.hidden_WD.dim() != 2 or router.out_EW.dim() != 2:
        return "the router's matrices must be 2-D"
    num_experts, (width, d_model) = router.out_EW.shape[0], router.hidden_WD.shape
    if why_not := _ffn_refusal(weights, num_experts=num_experts, activation=activation, dtype=dtype):
        return why_not
    if any(t.dtype is not torch.float32 or not t.is_contiguous() for t in tensors):
        return "the router's tensors must be contiguous float32"
    if (router.out_EW.shape[1], d_model) != (width, weights.up_FD.shape[1]):
        return f"a router of width {width} for {d_model} inputs does not fit {tuple(weights.up_FD.shape)}"
    if router.hidden_bias_W.shape != (width,) or router.out_bias_E.shape != (num_experts,):
        return "the router's biases do not fit its matrices"
    if router.rule not in RULES or router.output not in OUTPUTS:
        return f"it does not know the rule {router.rule!r} with the output {router.output!r}; known: {', '.join((*RULES, *OUTPUTS))}"
    if any(not 0 <= e < num_experts for e in router.always_on):
        return f"always_on must name experts in [0, {num_experts}), got {router.always_on}"
    return None


def _ffn_refusal(weights: FFNWeights, *, num_experts: int, activation: str, dtype: torch.dtype) -> str | None:
    """Why the library cannot read this FFN in place for x of this dtype; None if it can. Looks at no value."""
    if why_not := _refusal(weights.up_FD.device, dtype, activation):
        return why_not
    biases = (weights.up_bias_F, weights.gate_bias_F, weights.down_bias_D)
    scales = (weights.up_scale_F, weights.gate_scale_F, weights.down_scale_D)
    matrices = (weights.up_FD, weights.gate_FD, weights.down_FD)
    if any(t is not None and t.device.type != "cpu" for t in (*matrices, *biases, *scales)):
        return "weights and router must all be on the CPU"
    if any(t is not None and t.dim() != 2 for t in matrices) or weights.up_FD.shape[1] < 1:
        return "the weights' matrices must be 2-D, with at least one input"
    if not has_rows(weights):
        return "the weights' rows are not contiguous (moeify.sites.store_by_neuron)"
    return _misfit(weights, num_experts=num_experts, dtype=dtype)


def _misfit(weights: FFNWeights, *, num_experts: int, dtype: torch.dtype) -> str | None:
    """Why 2-D weights of the CPU are none for x of this dtype, whatever their strides; None if they are."""
    biases = (weights.up_bias_F, weights.gate_bias_F, weights.down_bias_D)
    scales = (weights.up_scale_F, weights.gate_scale_F, weights.down_scale_D)
    matrices = (weights.up_FD, weights.gate_FD, weights.down_FD)
    allowed = (torch.int8, True) if weights.up_FD.dtype is torch.int8 else (dtype, False)
    if any(m is not None and (m.dtype, s is not None) != allowed for m, s in zip(matrices, scales, strict=True)):
        return f"the weights must be {dtype}, or int8 with scales"
    if any(t is not None and (t.dtype is not dtype or not t.is_contiguous()) for t in biases):
        return f"the biases must be contiguous {dtype}"
    if any(t is not None and (t.dtype is not torch.float32 or not t.is_contiguous()) for t in scales):
        return "the scales must be contiguous float32"
    of_neurons = (weights.up_bias_F, weights.gate_bias_F, weights.up_scale_F, weights.gate_scale_F)
    if (
        weights.down_FD.shape[0] != weights.num_neurons
        or (weights.gate_FD is not None and weights.gate_FD.shape != weights.up_FD.shape)
        or any(t is not None and t.shape != weights.up_FD.shape[:1] for t in of_neurons)
        or any(t is not None and t.shape != weights.down_FD.shape[1:] for t in (weights.down_bias_D, weights.down_scale_D))
    ):
        return "the weights' shapes do not fit together"
    if not 1 <= num_experts <= weights.num_neurons:
        return f"{num_experts} experts do not fit {weights.num_neurons} neurons"
    return None


class Routed:
    """Router, rule and FFN of one layer as one native call without autograd, or router and rule alone; its pointers are taken once.

    Holds the tensors that it was made from. Values written into them are seen; whoever puts another tensor in a parameter's place makes
    another `Routed`.

    Raises:
        KernelError: a tensor is not as the library reads it in place; names it.
    """

    def __init__(self, weights: FFNWeights, router: RouterWeights, *, activation: str, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or weights.up_FD.dtype
        if why_not := routed_refusal(weights, router, activation=activation, dtype=dtype):
            raise KernelError(f"impl 'cpu': {why_not}.")
        self._num_experts, width = router.out_EW.shape
        self._always_on = torch.zeros(self._num_experts, dtype=torch.bool, device="cpu")
        self._always_on[list(router.always_on)] = True
        self._keep: object = (weights, router)
        self._d_out, self._dtype = weights.down_FD.shape[1], dtype
        self._ffn = _describe(weights, num_experts=self._num_experts, activation=activation, dtype=dtype)
        self._router = _Router(
            *(_pointer(t) for t in router.tensors),
            self._always_on.data_ptr() if router.always_on else None,
            width,
            OUTPUTS.index(router.output),
            RULES.index(router.rule),
            router.knob,
        )
        self._pointers = (ctypes.byref(self._ffn), ctypes.byref(self._router))
        self._isa, self._call = _isa(), _library().moeify_routed_run

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., O), and mask_TE: which experts ran.

        Args:
            x: (..., D), on the CPU, of the weights' dtype and width (checked: native code takes them for granted).
        """
        y = x.new_empty(*x.shape[:-1], self._d_out)
        return y, self._run(x, y)

    def select(self, x: Tensor) -> Tensor:
        """mask_TE alone: which experts would run. Arguments as of the call."""
        return self._run(x, None)

    def _run(self, x: Tensor, y: Tensor | None) -> Tensor:
        d_in = self._ffn.d_in
        if x.dtype is not self._dtype or x.shape[-1:] != (d_in,) or not x.is_cpu:
            raise KernelError(f"impl 'cpu': x is {tuple(x.shape)} {x.dtype} on {x.device}, expected (..., {d_in}) {self._dtype} on cpu.")
        x = x.contiguous()
        num_tokens = x.numel() // d_in
        mask_TE = x.new_empty(num_tokens, self._num_experts, dtype=torch.bool)
        status = self._call(
            *self._pointers,
            *(x.data_ptr(), d_in, num_tokens, mask_TE.data_ptr()),
            *(_pointer(y), self._d_out, self._isa, torch.get_num_threads()),
        )
        _check_status(status)
        return mask_TE


def routed_once(weights: FFNWeights, router: RouterWeights, *, activation: str, dtype: torch.dtype) -> Routed:
    """A `Routed` for one call, while the caller holds the tensors; made once for the same memory. Arguments and errors as `Routed`'s."""
    memory = _memory((*vars(weights).values(), *router.tensors))
    key = (memory, dtype, activation, router.output, router.rule, router.knob, router.always_on, _isa())
    if memory is None or (routed := _ROUTED.get(key)) is None:
        routed = Routed(weights, router, activation=activation, dtype=dtype)
        routed._keep = None
        _remember(_ROUTED, key, routed)
    return routed


def run(x_TD: Tensor, weights: FFNWeights, mask_TE: Tensor, *, activation: str) -> Tensor:
    """One native call, without autograd. Result as `reference.moe_ffn`.

    Raises:
        KernelError: native code cannot read the tensors; names why.
    """
    num_experts = mask_TE.shape[-1]
    ffn = described(weights, num_experts=num_experts, activation=activation, dtype=x_TD.dtype)
    if ffn is None:
        # Contiguous where native code takes it for granted; the name keeps what is copied alive until the call is over.
        matrices = {name: t if t.dim() != 2 or _is_rows(t) else t.contiguous() for name, t in _present(weights, MATRICES)}
        vectors = {name: t.contiguous() for name, t in _present(weights, (*BIASES, *SCALES))}
        copied = FFNWeights(**matrices, **vectors)
        if why_not := _ffn_refusal(copied, num_experts=num_experts, activation=activation, dtype=x_TD.dtype):
            raise KernelError(f"impl 'cpu': {why_not}.")
        ffn = _describe(copied, num_experts=num_experts, activation=activation, dtype=x_TD.dtype)
        if all(a is b for a, b in zip(vars(weights).values(), vars(copied).values(), strict=True)):
            _remember(_DESCRIBED, (_memory(vars(weights).values()), num_experts, activation, x_TD.dtype), ffn)
    return call(ffn, x_TD, mask_TE)


def call(ffn: _FFN, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
    """`run` for an FFN that is described, of x's dtype."""
    num_tokens = mask_TE.shape[0]
    if x_TD.shape != (num_tokens, ffn.d_in) or mask_TE.shape != (num_tokens, ffn.num_experts):
        shapes = f"x_TD has shape {tuple(x_TD.shape)}, mask_TE {tuple(mask_TE.shape)}"
        raise KernelError(f"impl 'cpu': {shapes}, expected ({num_tokens}, {ffn.d_in}) and ({num_tokens}, {ffn.num_experts}).")
    if mask_TE.dtype is not torch.bool or not (x_TD.is_cpu and mask_TE.is_cpu):
        raise KernelError(f"impl 'cpu': x_TD is on {x_TD.device}, mask_TE {mask_TE.dtype} on {mask_TE.device}; expected cpu, and bool.")
    if not x_TD.is_contiguous() and not _is_rows(x_TD):
        x_TD = x_TD.contiguous()
    mask_TE = mask_TE.contiguous()
    y_TD = x_TD.new_empty(num_tokens, ffn.d_out)
    status = _library().moeify_ffn_run(
        *(ctypes.byref(ffn), _pointer(x_TD), x_TD.stride(0), _pointer(mask_TE), num_tokens),
        *(_pointer(y_TD), ffn.d_out, _isa(), torch.get_num_threads()),
    )
    _check_status(status)
    return y_TD


def _check_status(status: int) -> None:
    if status:
        raise KernelError(f"impl 'cpu': {_STATUS.get(status, f'status {status}')}.")


_DESCRIBED: dict[tuple[object, ...], _FFN] = {}
_ROUTED: dict[tuple[object, ...], Routed] = {}
"""What has been checked and made for native code, by everything that it was made from (`_memory`): it holds no tensor, and whatever changes
is not found again."""
_MOST = 1024


def described(weights: FFNWeights, *, num_experts: int, activation: str, dtype: torch.dtype) -> _FFN | None:
    """The library's record of an FFN that `run` has computed in the same memory for x of the same dtype; None if there is none."""
    memory = _memory(vars(weights).values())
    return None if memory is None else _DESCRIBED.get((memory, num_experts, activation, dtype))


def _memory(tensors: Iterable[Tensor | None]) -> tuple[object, ...] | None:
    """Where tensors lie in memory, and how: all that native code knows of them. None if one is not, or may not be, in the CPU's memory."""
    found: list[object] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in _PLAIN and tensor.is_cpu:
            found.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
        else:
            return None
    return tuple(found)


def _remember(table: dict[tuple[object, ...], T], key: tuple[object, ...], value: T) -> None:
    if key[0] is None:
        return
    if len(table) >= _MOST:
        table.clear()
    table[key] = value


def _describe(weights: FFNWeights, *, num_experts: int, activation: str, dtype: torch.dtype) -> _FFN:
    """The library's record of an FFN whose input is of this dtype; borrows the tensors' memory."""
    matrices = (weights.up_FD, weights.gate_FD, weights.down_FD)
    return _FFN(
        *(_pointer(t) for t in matrices),
        *(0 if t is None else t.stride(0) for t in matrices),
        *(_pointer(t) for t in (weights.up_bias_F, weights.gate_bias_F, weights.down_bias_D)),
        *(_pointer(t) for t in (weights.up_scale_F, weights.gate_scale_F, weights.down_scale_D)),
        *(weights.up_FD.shape[0], num_experts, weights.up_FD.shape[1], weights.down_FD.shape[1]),
        *(DTYPES[dtype], _INT8 if weights.up_FD.dtype is torch.int8 else DTYPES[dtype], ACTIVATIONS.index(activation)),
    )


def _present(weights: FFNWeights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name in names if (tensor := getattr(weights, name)) is not None)


def _is_rows(tensor: Tensor) -> bool:
    """Contiguous along the last axis, rows apart: what the library reads in place."""
    return tensor.is_contiguous() or (tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1])  # a single row has any stride


def _pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's values are.

    Raises:
        KernelError: nowhere: it is a FakeTensor or another stand-in, or its storage was given back.
    """
    if tensor is None:
        return None
    pointer = tensor.data_ptr() if not isinstance(tensor, FakeTensor) else 0
    if not pointer and tensor.numel():
        raise KernelError(f"impl 'cpu': a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory.")
    return pointer


def _isa() -> int:
    forced = os.environ.get(FORCE_ISA)
    if forced is None:
        return _available()[-1]
    if forced not in isas():
        raise KernelError(f"{FORCE_ISA}={forced!r} is no instruction set of this processor and the library; they have {', '.join(isas())}.")
    return ISAS.index(forced)


@functools.lru_cache(maxsize=1)
def _available() -> tuple[int, ...]:
    library = _library()
    return () if isinstance(library, str) else tuple(i for i in range(len(ISAS)) if library.moeify_has_isa(i))


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    """The loaded library, or the reason why there is none."""
    path = _library_file()
    if not path.is_file():
        return f"the compiled library is missing: {build_note() or 'it was never built; pip install moeify where there is g++ or clang++'}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled library cannot be loaded ({error}); install moeify again"
    if (abi := library.moeify_abi()) != _ABI:
        return f"the compiled library has interface {abi}, this moeify wants {_ABI}; install moeify again"
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.moeify_ffn_run.argtypes = [pointer, pointer, i64, pointer, i64, pointer, i64, i32, i32]
    library.moeify_routed_run.argtypes = [pointer, pointer, pointer, i64, i64, pointer, pointer, i64, i32, i32]
    library.moeify_neurons_run.argtypes = [pointer, pointer, pointer, i64, i64, pointer, pointer, i64, i32, i32]
    for function in (library.moeify_linear_run, library.moeify_gated_run):
        function.argtypes = [pointer, pointer, i64, i64, pointer, i64, i32, i32]
    library.moeify_mask_run.argtypes = [pointer, pointer, i64, i64, i32, pointer, i32, i32]
    library.moeify_train_forward.argtypes = [pointer, pointer, i64, pointer, i64, pointer, i64, pointer, i64, i32, i32]
    library.moeify_train_backward.argtypes = [pointer, pointer, i64, pointer, i64, pointer, i64, pointer, i64, pointer, i32, i32]
    library.moeify_use_openmp.argtypes = [pointer] * 3
    library.moeify_use_openmp.restype = None
    if (openmp := _openmp()) is not None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        library.moeify_use_openmp(*(ctypes.cast(getattr(openmp, name), pointer) for name in names))
    return library


@functools.lru_cache(maxsize=1)
def _openmp() -> Any:
    """The OpenMP runtime that torch has loaded, whatever its file is called; None where that cannot be told."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "omp" in line}
    for file in sorted(files, key=lambda f: "/torch/" not in f):  # another package may have brought one of its own
        if Path(file).name.startswith(("libgomp", "libiomp5", "libomp")):
            openmp = ctypes.CDLL(file)
            if hasattr(openmp, "GOMP_parallel"):  # LLVM's and Intel's have it, too
                return openmp
    return None
