"""Which number format to compute in: probed on the machine, never assumed."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn import functional as F

from pbe_fast.errors import InputError

Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on; "auto" takes a GPU where there is one.

    Raises:
        InputError: A device that this machine does not have, or none at all.
    """
    if not isinstance(device, str | torch.device):
        raise InputError("device", got=repr(device), accepted='text such as "cuda:1", or a torch.device')
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # A value back from it: meta has none.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "device",
            got=f"{str(device)!r} ({str(error).splitlines()[0]})",
            accepted="auto, cpu, or cuda where there is a GPU",
        ) from error
    return torch.device(device)


def resolve_precision(device: torch.device, requested: str = "auto") -> torch.dtype:
    """The dtype of the matrix products; weights, BN statistics and losses stay in float32.

    "auto" takes bfloat16 where it is faster: on every GPU that has it, and on a CPU if a convolution measured here
    runs faster than in float32 (without AVX512-BF16 or AMX it is many times slower).

    Raises:
        InputError: Another name than "auto", "fp32" or "bf16".
    """
    if requested not in PRECISIONS:
        raise InputError("precision", got=repr(requested), accepted=", ".join(PRECISIONS))
    if requested == "fp32":
        return torch.float32
    if requested == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_prefers_bf16() else torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision for forward passes; at float32 none, whatever the caller has switched on."""
    # torch drops what it keeps of casts at the end of the outermost autocast. Inside one of the caller's that would be
    # after all updates, and every pass would see the weights of the first. So nothing is kept, and what a model's own
    # autocast keeps is dropped.
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on a GPU are float32's; torch lets convolutions use TF32, with 10 bits of 23, otherwise.

    Of all threads, as torch keeps it. What the settings of convolutions, RNNs and products had inherited from
    ``torch.backends.fp32_precision`` is their own afterwards.
    """
    if device.type != "cuda":
        yield
        return
    settings: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@functools.cache
def _cpu_prefers_bf16() -> bool:
    """Whether one 3 x 3 convolution is faster in bfloat16 than in float32 on this processor; a few milliseconds."""
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    operands = {
        dtype: [
            torch.ones(s, dtype=dtype).to(memory_format=torch.channels_last) for s in ((4, 32, 16, 16), (32, 32, 3, 3))
        ]
        for dtype in best
    }
    threads = torch.get_num_threads()
    # Several threads wait for each other where the machine is busy, which is then all that is measured.
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            # In turns, so that a burst of other work falls on both.
            for _ in range(8):
                for dtype, (x, weight) in operands.items():
                    start = time.perf_counter()
                    F.conv2d(x, weight, padding=1)
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] < best[torch.float32]
