"""Races of two functions in one process: in turns, on inputs that left the cache, with medians and pairwise ratios."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Larger than the last-level cache of any processor or GPU that this runs on.
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Race:
    """Seconds per call, round by round; a round runs both."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over the rounds, so that a slow moment spoils one round alone."""
        return statistics.median(p / o for o, p in zip(self.ours, self.peer, strict=True))

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
            "ours_iqr_ms": 1e3 * _iqr(self.ours),
            "peer_ms": 1e3 * statistics.median(self.peer),
            "peer_iqr_ms": 1e3 * _iqr(self.peer),
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
    clock = _seconds_on_gpu if device == "cuda" else _seconds
    runners = (ours, peer)
    times: tuple[list[float], list[float]] = ([], [])
    circle = itertools.cycle(list(inputs))
    for number in range(-warmup, rounds):
        arguments = next(circle)
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = clock(runners[which], arguments, calls)
            if number >= 0:
                times[which].append(seconds)
    return Race(tuple(times[0]), tuple(times[1]))


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
    return _seconds(function, arguments)


def _seconds(function: Callable[..., object], arguments: tuple[Any, ...], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    return (time.perf_counter() - start) / calls


def _seconds_on_gpu(function: Callable[..., object], arguments: tuple[Any, ...], calls: int = 1) -> float:
    _flush_cache().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@cache
def _flush_cache() -> torch.Tensor:
    return torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")


def _iqr(values: tuple[float, ...]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
