"""A function over fixed buffers, recorded once as a CUDA graph and then replayed; on other devices it just runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3


class Replay:
    """Calls ``function``, on a GPU as one CUDA graph from the fourth call on.

    The first calls run as they are: they do their work and warm up what a capture must find ready (library handles,
    workspaces), so that no state has to be put aside. What cannot be captured (a network that asks for a value while it
    runs) goes on running as it is, with a warning.

    Args:
        function: Reads and writes the same tensors in every call, allocates what it likes, returns nothing, and asks
            for no value on the host.
        device: Where it works.
        pool: Of `torch.cuda.graph_pool_handle`, shared by functions that never run at the same time.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, pool: Any = None) -> None:
        self._function = function
        self._device = device
        self._pool = pool
        self._warm_up = _WARM_UP if device.type == "cuda" else -1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def __call__(self) -> None:
        """Do what the function does, in the order of the current stream."""
        if self._graph is not None:
            self._graph.replay()
        elif self._warm_up < 0:
            self._function()
        elif self._warm_up > 0:
            self._warm_up -= 1
            self._run_aside()
        elif self._capture():
            self.__call__()
        else:
            self._warm_up = -1
            self._function()

    def _run_aside(self) -> None:
        # On the stream of the capture: autograd remembers where a parameter's gradient was first accumulated.
        current, aside = torch.cuda.current_stream(self._device), self._side_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._function()
        current.wait_stream(aside)

    def _capture(self) -> bool:
        graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        stream = self._side_stream()
        try:
            # The stream is ours to leave: torch.cuda.graph stays on it where beginning or ending the capture raises.
            # thread_local: another thread may be pinning memory for the next batch.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._function()
        except RuntimeError as error:
            _abandon(graph, stream.device.index, pool)
            warnings.warn(
                f"a step runs without a CUDA graph: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=3
            )
            return False
        self._graph = graph
        return True

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream


def _abandon(graph: torch.cuda.CUDAGraph, device_index: int, pool: Any) -> None:
    """Ends what a failed capture began in the allocator.

    An invalidated capture raises as it ends, before torch tells the allocator. While that takes a capture to be under
    way it gives no memory back that another stream has used: every batch that is sent ahead would be lost.
    """
    graph.reset()
    # Of a later torch, or where the capture failed before or after, there is nothing left to end.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device_index, pool)
        torch._C._cuda_releasePool(device_index, pool)
