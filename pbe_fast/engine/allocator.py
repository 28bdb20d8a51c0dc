"""The C library's heap, kept from giving memory back that the next batch will ask for again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# glibc's mallopt parameters, and what it takes at most as threshold (malloc.h, malloc.c).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAX_THRESHOLD = 32 << 20
_DEFAULT_MMAP_MAX = 65536
_KEEP = (1 << 31) - 1

_depth = 0


@contextmanager
def kept_heap() -> Iterator[bool]:
    """Inside, freed tensors on the CPU leave their pages in the process for the next ones.

    glibc returns large blocks to the system when they are freed, and every batch then faults the same pages in again:
    12 % of a training step of a small network. Afterwards the heap's free pages go back to the system, and the
    thresholds stay where glibc itself moves them as soon as a program has freed large blocks. Nothing happens where the
    C library is not glibc, or where the environment already tunes it.

    Yields:
        Whether the heap is kept.
    """
    global _depth
    library = _glibc()
    if library is None:
        yield False
        return
    tune, trim = library
    _depth += 1
    if _depth == 1:
        tune(_TRIM_THRESHOLD, _KEEP)
        tune(_MMAP_MAX, 0)
    try:
        yield True
    finally:
        _depth -= 1
        if _depth == 0:
            tune(_MMAP_MAX, _DEFAULT_MMAP_MAX)
            tune(_MMAP_THRESHOLD, _MAX_THRESHOLD)
            tune(_TRIM_THRESHOLD, 2 * _MAX_THRESHOLD)
            trim(0)


def _glibc() -> tuple[Callable[[int, int], int], Callable[[int], int]] | None:
    tuned = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if os.name != "posix" or tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version"):
        return None
    return process.mallopt, process.malloc_trim
