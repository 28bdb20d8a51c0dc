"""A function over fixed buffers, recorded once as a CUDA graph and then replayed; on other devices it just runs."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3
# A capture costs as much as some calls: it has to wait for the device, to give cached memory back, to instantiate.
_WORTH_CAPTURING = 8
# torch hands out so many streams of a device, and then the same ones again.
_STREAMS = 32


class Recorder:
    """Where one owner's functions are recorded: they never run at the same time, and share one pool of memory.

    They also share the stream of their captures, without which nothing of the pool would be shared. But a graph that is
    destroyed takes the stream's cuBLAS workspace with it, which the others captured there go on using
    (pytorch#193402). So every graph is kept, replayed or not, and those whose capture failed as well, until the
    recorder itself goes, and no two recorders share a stream. A graph that is kept takes no memory of the pool from the
    others.

    Args:
        device: Where the functions work. Nothing is recorded where that is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._failed: set[str] = set()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        _recorders.add(self)

    def records(self, kind: str) -> bool:
        """Whether functions of a kind can be recorded, as far as is known."""
        return self.device.type == "cuda" and kind not in self._failed

    def run_aside(self, function: Callable[[], None]) -> None:
        """Call a function on the stream of the captures, in the order of the current one."""
        current, aside = torch.cuda.current_stream(self.device), self._side_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            function()
        current.wait_stream(aside)

    def capture(self, function: Callable[[], None], kind: str) -> torch.cuda.CUDAGraph | None:
        """The function as a graph; None, with a warning, where it cannot be captured: no other of its kind is tried."""
        graph, stream = torch.cuda.CUDAGraph(), self._side_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # The stream is ours to leave: torch.cuda.graph stays on it where beginning or ending the capture raises.
            # thread_local: another thread may be pinning memory for the next batch.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            _abandon(stream.device.index, self._pool)
            # What was allocated while it failed may still be in use, and torch may take the pool to be under way.
            self._pool = None
            self._graphs.append(graph)
            self._failed.add(kind)
            warnings.warn(
                f"a step runs without a CUDA graph: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=4
            )
            return None
        self._graphs.append(graph)
        return graph

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            taken = {other._stream for other in _recorders}
            tries = (torch.cuda.Stream(self.device) for _ in range(_STREAMS))
            self._stream = next((stream for stream in tries if stream not in taken), None)
        if self._stream is None:
            # More owners at a time than there are streams.
            self._stream = torch.cuda.Stream(self.device)
        return self._stream


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


class Replay:
    """Calls ``function``, on a GPU as one CUDA graph from the fourth call on.

    The first calls run as they are: they do their work and warm up what a capture must find ready (library handles,
    workspaces), so that no state has to be put aside. They run on the stream of the capture, since autograd remembers
    where a parameter's gradient was first accumulated. What cannot be captured (a network that asks for a value while
    it runs) goes on running as it is, with a warning.

    Args:
        function: Reads and writes the same tensors in every call, allocates what it likes, returns nothing, and asks
            for no value on the host.
        recorder: Its owner's.
        kind: Functions of one kind are alike: after one that cannot be captured no other is tried.
        expected: Calls in all, where that is known. Fewer than 8 run as they are; only those beyond count towards a
            graph.
    """

    def __init__(
        self, function: Callable[[], None], recorder: Recorder, *, kind: str = "step", expected: int | None = None
    ) -> None:
        self._function = function
        self._recorder = recorder
        self._kind = kind
        self._plain = expected if expected is not None and expected < _WORTH_CAPTURING else 0
        self._warm_up = _WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    @property
    def settled(self) -> bool:
        """Whether the next call is like most to come: replayed, or as it is where no graph is to be expected."""
        return self.captured or self._plain > 0 or not self._recorder.records(self._kind)

    def __call__(self) -> None:
        """Do what the function does, in the order of the current stream."""
        if self._plain > 0:
            self._plain -= 1
        elif self._graph is None and self._recorder.records(self._kind):
            if self._warm_up > 0:
                self._warm_up -= 1
                self._recorder.run_aside(self._function)
                return
            self._graph = self._recorder.capture(self._function, self._kind)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._function()


def _abandon(device_index: int, pool: Any) -> None:
    """Ends what a failed capture began in the allocator.

    An invalidated capture raises as it ends, before torch tells the allocator. While that takes a capture to be under
    way it gives no memory back that another stream has used: every batch that is sent ahead would be lost.
    """
    # Of a later torch, or where the capture itself ended well (out of memory, say), there is nothing left to end.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device_index, pool)
        torch._C._cuda_releasePool(device_index, pool)
