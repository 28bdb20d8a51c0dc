"""Which versions of the operations this machine can run, and the one library object they are registered in.

Every operation has a folder with a ``reference`` (plain PyTorch), a ``native`` (C++ on CPUs) and mostly a ``triton``
(GPU) version. The dispatcher picks by device; where a build is missing, the reference takes its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

OPS = ("warp", "cosine_rank", "pgd_step", "conv3x3", "conv_grad", "affine_relu", "batch_norm")
# Those with a GPU version: there the convolutions are cuDNN's, and torch.compile fuses what follows them.
TRITON_OPS = ("warp", "cosine_rank", "pgd_step")
BACKENDS = ("reference", "native", "triton")

# A second Library of the same name could not define anything, so there is this one, kept alive by the module.
LIB = torch.library.Library("pbe_fast", "DEF")

# The codes of enum class DType in convert.h.
DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


@functools.cache
def native() -> Any:
    """The module ``pbe_fast._native``, or None where it was not built or PBE_FAST_NATIVE=0 turns it off."""
    if os.environ.get("PBE_FAST_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("pbe_fast._native")
    except ImportError:
        return None


def native_op(op: str) -> Any:
    """The C++ functions of one operation, or None."""
    return getattr(native(), op, None)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, that is on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None


def missing(op: str, backend: str) -> str | None:
    """Why a version of an operation cannot run here, or None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        module = native_op(op)
        if module is None:
            return "the native module pbe_fast._native is not built or turned off"
        supported = getattr(module, "is_supported", lambda: True)()
        return None if supported else "this processor lacks the instructions for it (AVX512-BF16)"
    if op not in TRITON_OPS:
        return f"{op} has no Triton version"
    if not triton_installed():
        return "the package triton is not installed"
    if not triton_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs Triton's interpreter)"
    return None


def available_backends() -> dict[str, tuple[str, ...]]:
    """The versions of each operation that this machine can run.

    Returns:
        The names "reference", "native" (C++, CPU) and "triton" (GPU) that are there, by operation.
    """
    return {op: tuple(backend for backend in BACKENDS if missing(op, backend) is None) for op in OPS}


def require(op: str, backend: str, tensor: torch.Tensor | None = None) -> None:
    """Checks that a version asked for by name can run, on what is given.

    Raises:
        ValueError: There is no such operation or backend, or it is for another device than the tensor's.
        RuntimeError: It is not there on this machine; the message says why.
    """
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"backend of an operation; got {backend!r} of {op!r}; accepted: {BACKENDS} of {OPS}")
    reason = missing(op, backend)
    if reason is not None:
        raise RuntimeError(f"backend of {op}; got {backend!r}, but {reason}; accepted here: {available_backends()[op]}")
    device = "cpu" if backend == "native" or triton_interpreted() else "cuda"
    if tensor is not None and backend != "reference" and tensor.device.type != device:
        raise ValueError(f"device of {op}; got {tensor.device}; accepted by backend {backend!r}: {device}")


def require_bf16(name: str, tensor: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Checks an argument of an operation that takes bfloat16 tensors.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape, or another device.
    """
    if tensor.dtype != torch.bfloat16:
        raise TypeError(f"{name}; got {tensor.dtype}; accepted: bfloat16")
    if tensor.shape != torch.Size(shape) or tensor.device != device:
        got = f"{tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}; got {got}; accepted: {tuple(shape)} on {device}")


def address(tensor: torch.Tensor | None) -> int:
    """As the native versions take it: 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """In memory (B, H, W, C), whatever the strides of dimensions of size one."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def implement(name: str, *, reference: Any, cpu: Any, fake: Any) -> None:
    """Registers an operator of `LIB`: its reference for all devices, another version for CPUs, its shapes alone."""
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    LIB.impl(name, cpu, "CPU")
    torch.library.register_fake(f"pbe_fast::{name}", fake, lib=LIB)


def below_autograd(op: Any, *arguments: Any) -> torch.Tensor:
    """What an operator computes, without its own gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        out: torch.Tensor = op(*arguments)
    return out


def applied(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """What the autograd function computes, with its gradient."""
    out: torch.Tensor = function.apply(*arguments)
    return out
