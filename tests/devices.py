"""Where a kernel's version computes."""

from __future__ import annotations

from pbe_fast.kernels import backends


def device_of(backend: str | None) -> str:
    """Triton's interpreter takes tensors of the CPU."""
    return "cuda" if backend == "triton" and not backends.triton_interpreted() else "cpu"
