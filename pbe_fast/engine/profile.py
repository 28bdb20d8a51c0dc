"""Where a run's time goes: seconds, images and share of the machine's peak by phase, and a Chrome trace."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from pbe_fast.engine.copies import frozen_copy
from pbe_fast.engine.files import write_text
from pbe_fast.engine.machine import Peak, measure_peak

# Of each phase, so many calls of `record` are traced: a whole run would be gigabytes.
_TRACED = 3
_KINETO_LEVEL = "KINETO_LOG_LEVEL"

_active: ContextVar[Profile | None] = ContextVar("pbe_fast.profile", default=None)


def record(*, images: int, forwards: float) -> None:
    """Adds work to the phase that is open; does nothing where no profile is.

    Args:
        images: Images that went through.
        forwards: What was done with them, in forward passes of one image; an update is about three, a step of PGD two.
    """
    profile = _active.get()
    if profile is not None:
        profile.add(images, forwards)


@dataclass
class _Phase:
    seconds: float = 0.0
    images: int = 0
    forwards: float = 0.0


class Profile:
    """The phases of one run.

    Args:
        model: What `record` counts passes of; its floating-point operations are counted once, on one black image.
        image_shape: (C, H, W).
        device: Where the run works.
        dtype: Of its matrix products.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.flops_per_forward = count_flops(model, image_shape, device)
        self.peak: Peak = measure_peak(device, dtype)
        self._device = device
        self._phases: dict[str, _Phase] = {}
        self._open: _Phase | None = None
        self._spans: list[tuple[str, int, int]] = []
        self._events: list[dict[str, Any]] = []
        self._base_ns = 0
        self._tracer: torch.profiler.profile | None = None
        self._left = 0
        self._paused = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, `record` adds to this profile."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One stretch of phase ``name``, up to the device's last operation in it."""
        first = name not in self._phases
        self._open = self._phases.setdefault(name, _Phase())
        if first:
            self._start_tracing()
        self._synchronize()
        begin_ns, start, self._paused = time.time_ns(), time.perf_counter(), 0.0
        try:
            yield
        finally:
            self._synchronize()
            self._stop_tracing()
            self._open.seconds += time.perf_counter() - start - self._paused
            self._open = None
            self._spans.append((name, begin_ns, time.time_ns()))

    def add(self, images: int, forwards: float) -> None:
        """See `record`."""
        if self._open is None:
            return
        self._open.images += images
        self._open.forwards += forwards
        self._left -= 1
        if self._left == 0:
            self._stop_tracing()

    def rows(self) -> list[dict[str, Any]]:
        """One entry per phase: ``seconds``, ``images_per_second``, ``forwards_per_second``, ``share_of_peak``."""
        return [
            {
                "phase": name,
                "seconds": phase.seconds,
                "images_per_second": phase.images / phase.seconds,
                "forwards_per_second": phase.forwards / phase.seconds,
                "share_of_peak": phase.forwards * self.flops_per_forward / phase.seconds / self.peak.flops_per_second,
            }
            for name, phase in self._phases.items()
        ]

    def report(self) -> dict[str, Any]:
        """Plain JSON values: the rows, the FLOPs of a forward pass of one image, and the peak."""
        return {
            "phases": self.rows(),
            "flops_per_forward": self.flops_per_forward,
            "peak_flops_per_second": self.peak.flops_per_second,
            "peak_copy_bytes_per_second": self.peak.copy_bytes_per_second,
        }

    def table(self) -> str:
        """The rows as lines of text."""
        peak = f"of {self.peak.flops_per_second / 1e12:.3g} TFLOP/s"
        lines = [f"{'phase':<20}{'seconds':>10}{'images/s':>12}{'passes/s':>12}{peak:>20}"]
        for row in self.rows():
            figures = f"{row['images_per_second']:>12,.0f}{row['forwards_per_second']:>12,.0f}"
            lines.append(f"{row['phase']:<20}{row['seconds']:>10.2f}{figures}{row['share_of_peak']:>20.1%}")
        return "\n".join(lines)

    def write_trace(self, path: Path) -> Path:
        """The traced steps and the phases around them, for chrome://tracing or Perfetto."""
        spans = [
            {
                "ph": "X",
                "cat": "phase",
                "name": name,
                "pid": "pbe_fast",
                "tid": "phases",
                "ts": (begin - self._base_ns) / 1e3,
                "dur": (end - begin) / 1e3,
            }
            for name, begin, end in self._spans
        ]
        trace = {"displayTimeUnit": "ms", "baseTimeNanoseconds": self._base_ns, "traceEvents": [*spans, *self._events]}
        return write_text(path, json.dumps(trace))

    def _start_tracing(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(activities=activities)
        with _quiet_kineto():
            self._tracer.start()
        self._left = _TRACED

    def _stop_tracing(self) -> None:
        if self._tracer is None:
            return
        start = time.perf_counter()
        self._synchronize()
        self._tracer.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._tracer.export_chrome_trace(str(path))
            exported = json.loads(path.read_text(encoding="utf-8"))
        self._tracer = None
        self._base_ns = int(exported.get("baseTimeNanoseconds", 0))
        self._events += exported["traceEvents"]
        self._paused += time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Kineto, torch's profiler, announces each start and stop on stderr; its level is read once, at its first start."""
    told = _KINETO_LEVEL in os.environ
    os.environ.setdefault(_KINETO_LEVEL, "99")
    try:
        yield
    finally:
        if not told:
            os.environ.pop(_KINETO_LEVEL, None)


def count_flops(model: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of a forward pass of one image, a multiplication and an addition counted as two."""
    images = torch.zeros(1, *image_shape, dtype=torch.float32, device=device)
    copy = frozen_copy(model, device, image_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(images)
    return int(counter.get_total_flops())
