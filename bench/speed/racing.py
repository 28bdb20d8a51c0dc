"""Races of functions in one process: in turns, on inputs that left the cache, with medians and pairwise ratios.

How long PyTorch takes on a CPU depends on whether glibc gives the memory of a freed tensor back to the system: the next
one then faults its pages in again, up to ten times the work itself. Which blocks are given back depends on the largest
that the process has freed so far. So every race starts in the state of a process that has worked for a while: blocks of
up to 32 MiB are kept, larger ones are not.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pbe_fast.engine.allocator import kept_heap

# Larger than the last-level cache of any processor or GPU that this runs on.
_COPY_BYTES = 1 << 28
# Half a millisecond of a GPU: longer than Python takes to queue a few kernels.
_LAUNCH_CYCLES = 1_000_000


@dataclass(frozen=True)
class Race:
    """Seconds per call, round by round; a round runs both."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over the rounds, so that a slow moment spoils one round alone."""
        return ratio(self.ours, self.peer)

    def summary(self, *, bytes_moved: int, device: str = "cpu") -> dict[str, Any]:
        """Medians, interquartile ranges, the ratio, and how close ours comes to copying as many bytes.

        Args:
            bytes_moved: What the operation has to read and to write at least.
            device: Where it ran; its copy bandwidth is measured.
        """
        ceiling = copy_ceiling(device)
        ours = statistics.median(self.ours)
        return {
            "ours_ms": 1e3 * ours,
            "ours_iqr_ms": 1e3 * iqr(self.ours),
            "peer_ms": 1e3 * statistics.median(self.peer),
            "peer_iqr_ms": 1e3 * iqr(self.peer),
            "ratio": self.ratio,
            "rounds": len(self.ours),
            "copy_gb_per_s": ceiling / 1e9,
            "share_of_copy": bytes_moved / ours / ceiling,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }


def race(
    ours: Callable[..., object],
    peer: Callable[..., object],
    *,
    inputs: Iterable[tuple[Any, ...]] = ((),),
    rounds: int = 15,
    warmup: int = 3,
    calls: int = 1,
    device: str = "cpu",
) -> Race:
    """Times both in turns, with the same arguments in a round; who goes first changes every round.

    Args:
        ours: Called as ``ours(*arguments)``.
        peer: Called as ``peer(*arguments)``.
        inputs: Argument tuples that the rounds go through in a circle; enough of them do not fit in a cache together.
        rounds: Timed turns of each.
        warmup: Turns of each before.
        calls: Calls in a turn, whose mean counts. With more than one, what fits in the cache is found there, as in a
            loop over one operation; a call shorter than a millisecond needs it to stand out from the clock.
        device: "cpu", or "cuda" for times taken by the device's own clock.
    """
    times = race_all(
        {"ours": ours, "peer": peer}, inputs=inputs, rounds=rounds, warmup=warmup, calls=calls, device=device
    )
    return Race(times["ours"], times["peer"])


def race_all(
    runners: Mapping[str, Callable[..., object]],
    *,
    inputs: Iterable[tuple[Any, ...]] = ((),),
    rounds: int = 5,
    warmup: int = 1,
    calls: int = 1,
    device: str = "cpu",
) -> dict[str, tuple[float, ...]]:
    """`race` of any number: seconds per call by name, round by round. Each round starts with the next one."""
    if device == "cpu":
        with kept_heap():
            pass  # leaves the thresholds where glibc itself moves them after a large block was freed
    clock = _seconds_on_gpu if device == "cuda" else _seconds
    times: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    circle = itertools.cycle(list(inputs))
    for number in range(-warmup, rounds):
        arguments = next(circle)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = clock(runners[name], arguments, calls)
            if number >= 0:
                times[name].append(seconds)
    return {name: tuple(values) for name, values in times.items()}


def ratio(ours: tuple[float, ...], peer: tuple[float, ...]) -> float:
    """The median over the rounds of the peer's seconds by ours."""
    return statistics.median(p / o for o, p in zip(ours, peer, strict=True))


@cache
def copy_ceiling(device: str) -> float:
    """Bytes per second, read and written, of a large copy: measured once, as the median of nine."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    clock = _seconds_on_gpu if device == "cuda" else _seconds
    seconds = [clock(target.copy_, (source,)) for _ in range(12)][3:]
    return 2 * _COPY_BYTES / statistics.median(seconds)


def seconds_to_compile(function: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """How long the first call takes: compile time is told apart from run time."""
    start = time.perf_counter()
    function(*arguments)
    wait_for_device()
    return time.perf_counter() - start


def wait_for_device() -> None:
    """Until what was queued on a GPU, if there is one, is done: it would be counted as time of what comes next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(function: Callable[..., object], arguments: tuple[Any, ...], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    return (time.perf_counter() - start) / calls


def _seconds_on_gpu(function: Callable[..., object], arguments: tuple[Any, ...], calls: int = 1) -> float:
    _flush_cache().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device is kept busy until the calls are queued: what it waits for the host is not the kernels' time.
    torch.cuda._sleep(_LAUNCH_CYCLES)
    start.record()
    for _ in range(calls):
        function(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@cache
def _flush_cache() -> torch.Tensor:
    return torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")


def iqr(values: tuple[float, ...]) -> float:
    """Interquartile range; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
