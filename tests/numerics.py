"""Tolerance by rule: a kernel may be at most a factor worse than plain PyTorch in the same dtype, both measured against fp64."""

import torch
from torch import Tensor


def assert_as_accurate_as_torch(out: Tensor, *, oracle: Tensor, baseline: Tensor, factor: float = 2.0) -> None:
    """Fail where ``out`` is further from the fp64 oracle than ``factor`` times plain PyTorch's own error.

    max|out - oracle| <= factor * max|baseline - oracle| + eps(dtype) * max|oracle|

    Args:
        out: what is tested; must be finite and have the baseline's dtype.
        oracle: the plainest loop, float64.
        baseline: plain PyTorch in ``out``'s dtype.
        factor: allowed ratio of the two errors.

    The last term is one rounding of the result: where the baseline happens to be exact, the other order of additions need not be.
    """
    assert oracle.dtype is torch.float64, f"the oracle must be float64, got {oracle.dtype}"
    assert out.shape == oracle.shape == baseline.shape, f"shapes differ: {tuple(out.shape)}, {tuple(oracle.shape)}, {tuple(baseline.shape)}"
    assert out.dtype == baseline.dtype, f"dtypes differ: {out.dtype}, {baseline.dtype}"
    if not out.numel():
        return
    assert out.isfinite().all(), f"{(~out.isfinite()).sum().item()} of {out.numel()} values are not finite"
    error = (out.double() - oracle).abs().max().item()
    allowed = factor * (baseline.double() - oracle).abs().max().item() + torch.finfo(out.dtype).eps * oracle.abs().max().item()
    assert error <= allowed, f"error {error:.3e} against fp64 exceeds {allowed:.3e} ({factor} x plain PyTorch + one rounding)"
