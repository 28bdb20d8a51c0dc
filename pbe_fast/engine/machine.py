"""Where a result came from: versions, processor, commit and date; and what the processor can do at best."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

# Read from the installed metadata: importing triton or torchvision only to ask its version costs seconds, and may fail.
_DISTRIBUTIONS = {
    "torchvision": ("torchvision",),
    "triton": ("triton",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}


def describe() -> dict[str, Any]:
    """What a result depends on besides its inputs.

    Returns:
        Plain JSON values: ``versions`` (a version per package, None where it is missing), ``machine`` (``processor``,
        ``cores`` usable by this process, ``torch_threads``, ``gpu`` (of several the one that this process has used
        most memory of) or None, ``memory_gib``, ``system``), ``commit`` of the package's checkout (with "-dirty" when
        tracked files differ from it; None for an installed package), and ``date`` in UTC, ISO 8601.
    """
    return {
        "versions": _versions(),
        "machine": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "gpu": _gpu_name(),
            "system": platform.platform(),
        },
        "commit": git_commit(Path(__file__).parents[2]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def processor_name() -> str:
    """The processor as its maker calls it, or the architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_reserved))


def git_commit(root: Path) -> str | None:
    """The commit checked out at ``root``, with "-dirty" for uncommitted edits; None when ``root`` is no checkout."""
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An environment inside somebody else's repository would otherwise report that repository's commit.
    if top is None or Path(top).resolve() != root.resolve():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    edits = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and edits else commit or None


@dataclass(frozen=True)
class Peak:
    """What the machine reaches: in a large matrix product, and reading and writing in a large copy."""

    flops_per_second: float
    copy_bytes_per_second: float


def measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few matrix products in ``dtype`` and of a few copies, on the threads in use; about a second.

    Of float32 on a GPU in TF32, where convolutions may use it: they are most of what is compared with the peak.
    """
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with _rounded_as_convolutions(device, dtype):
        product = _shortest(lambda: torch.mm(a, b), device)
    copy = _shortest(lambda: target.copy_(source), device)
    return Peak(2 * size**3 / product, 2 * copied / copy)


@contextmanager
def _rounded_as_convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 matrix products on a GPU use TF32 where convolutions do: by torch's defaults these alone do."""
    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    changed = device.type == "cuda" and dtype == torch.float32 and convolutions == "tf32" != before
    if changed:
        products.fp32_precision = convolutions
    try:
        yield
    finally:
        if changed:
            products.fp32_precision = before


def _shortest(function: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _versions() -> dict[str, str | None]:
    found = {name: _version(*candidates) for name, candidates in _DISTRIBUTIONS.items()}
    return {
        "pbe_fast": str(importlib.import_module("pbe_fast").__version__),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        **found,
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def images_per_pass() -> int:
    """How many images a CPU without AMX should take at a time.

    64 for each thread: activations of more do not stay in its caches from one layer to the next. With AMX convolutions
    are done sooner, and what each call costs weighs more: as many as there are.
    """
    return 64 * torch.get_num_threads()


def usable_cores() -> int:
    """In a container or under taskset the process may own fewer cores than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
