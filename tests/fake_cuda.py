"""As much of torch.cuda as recording a graph takes, to test on a CPU what is done in which order, and where."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# torch hands out so many streams of a device, and then the same ones again.
STREAMS = 32


class FakeCuda:
    """Takes the place of torch.cuda's streams and graphs; `torch.cuda.graph` itself stays torch's.

    Attributes:
        device: Tensors of a test stay on the CPU.
        current: The current stream.
        capturing: The graph that is being captured, if any.
        invalid: Whether the capture under way was invalidated, as a question to the device does it.
        underway: Pools that the allocator takes to be captured into.
        references: Captures by pool that hold it.
        captured: Graphs in the order of their capture, successful or not.
        fails: Asked at the beginning of a capture; what it raises, the capture raises.
    """

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams = 0
        self.pools = 0
        self.current: Any = self.stream()
        self.capturing: Any = None
        self.invalid = False
        self.underway: list[Any] = []
        self.references: dict[Any, int] = {}
        self.captured: list[Any] = []
        self.fails: Callable[[], None] = lambda: None

    def ask(self) -> None:
        """What a function does that wants a value."""
        if self.capturing is not None:
            self.invalid = True
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    def stream(self, device: object = None) -> Any:
        """`torch.cuda.Stream`."""
        handle, self.streams = self.streams % STREAMS, self.streams + 1
        return SimpleNamespace(cuda_stream=handle, device=self.device, wait_stream=lambda other: None)

    def pool(self) -> tuple[int, int]:
        """`torch.cuda.graph_pool_handle`."""
        self.pools += 1
        return (0, self.pools)

    def end_allocate(self, device_index: int, pool: object) -> None:
        """`torch._C._cuda_endAllocateToPool`."""
        assert device_index == self.device.index
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device_index: int, pool: object) -> None:
        """`torch._C._cuda_releasePool`."""
        assert device_index == self.device.index
        self.references[pool] -= 1


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A `FakeCuda` in place of torch's."""
    cuda = FakeCuda()

    class OnStream:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, cuda.current = cuda.current, self.stream

        def __exit__(self, *exc: object) -> None:
            cuda.current = self.before

    class Graph:
        def __init__(self) -> None:
            self.replayed = 0
            self.ended = False
            cuda.captured.append(self)

        def capture_begin(self, pool: object = None, **options: object) -> None:
            self.pool, self.stream = pool, cuda.current
            cuda.underway.append(pool)
            cuda.references[pool] = cuda.references.get(pool, 0) + 1
            cuda.fails()
            cuda.capturing, cuda.invalid = self, False

        def capture_end(self) -> None:
            cuda.capturing = None
            if cuda.invalid:
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
            cuda.end_allocate(0, self.pool)
            self.ended = True

        def replay(self) -> None:
            assert self.ended
            self.replayed += 1

        def reset(self) -> None:
            if self.ended:
                cuda.release(0, self.pool)
            self.ended = False

    for name, fake in {
        "Stream": cuda.stream,
        "stream": OnStream,
        "current_stream": lambda device=None: cuda.current,
        "CUDAGraph": Graph,
        "graph_pool_handle": cuda.pool,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release)
    return cuda
