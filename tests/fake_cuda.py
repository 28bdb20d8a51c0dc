"""As much of torch.cuda as recording a graph takes, to test on a CPU what is done in which order, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

# torch hands out so many streams of a device, and then the same ones again.
STREAMS = 32


@dataclass(frozen=True)
class FakeStream:
    cuda_stream: int
    device: torch.device

    def wait_stream(self, other: FakeStream) -> None:
        """Streams run in the order of the calls here."""


@dataclass
class Captured:
    """What is known of a graph once it may be gone: its stream, its pool, its replays, and whether it is there."""

    stream: FakeStream
    pool: object
    replayed: int = 0
    alive: bool = True


class FakeCuda:
    """Takes the place of torch.cuda's streams and graphs; `torch.cuda.graph` itself stays torch's.

    Attributes:
        device: Tensors of a test stay on the CPU.
        current: The current stream.
        capturing: The graph that is being captured, if any.
        invalid: Whether the capture under way was invalidated, as a question to the device does it.
        underway: Pools that the allocator takes to be captured into.
        references: Captures by pool that hold it.
        captured: Of every graph, in the order of their captures, failed ones included.
        workspaces: By stream, how often its workspace was freed: as often as a graph captured there was destroyed.
        fails: Asked at the beginning of a capture; what it raises, the capture raises.
    """

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams = 0
        self.pools = 0
        self.current = FakeStream(-1, self.device)
        self.capturing: object = None
        self.invalid = False
        self.underway: list[Any] = []
        self.references: dict[Any, int] = {}
        self.captured: list[Captured] = []
        self.workspaces: dict[FakeStream, int] = {}
        self.fails: Callable[[], None] = lambda: None

    def ask(self) -> None:
        """What a function does that wants a value."""
        if self.capturing is not None:
            self.invalid = True
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    def stream(self, device: object = None) -> FakeStream:
        """`torch.cuda.Stream`."""
        self.streams += 1
        return FakeStream(self.streams % STREAMS, self.device)

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
            self.ended = False

        def capture_begin(self, pool: object = None, **options: object) -> None:
            self.noted = Captured(cuda.current, pool)
            self.workspace = cuda.workspaces.setdefault(cuda.current, 0)
            cuda.captured.append(self.noted)
            cuda.underway.append(pool)
            cuda.references[pool] = cuda.references.get(pool, 0) + 1
            cuda.fails()
            cuda.capturing, cuda.invalid = self, False

        def capture_end(self) -> None:
            cuda.capturing = None
            if cuda.invalid:
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
            cuda.end_allocate(0, self.noted.pool)
            self.ended = True

        def replay(self) -> None:
            assert self.ended
            assert cuda.workspaces[self.noted.stream] == self.workspace, "an illegal memory access was encountered"
            self.noted.replayed += 1

        def reset(self) -> None:
            if self.ended:
                cuda.workspaces[self.noted.stream] += 1
                cuda.release(0, self.noted.pool)
            self.ended = self.noted.alive = False

        def __del__(self) -> None:
            self.reset()

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
