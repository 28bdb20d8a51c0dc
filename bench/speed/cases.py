"""What the model benchmarks share: their scale, their networks, and how a race becomes a stored result.

``PBE_BENCH_SCALE`` is "normal" (the default: all of `make bench` in under 15 minutes on two cores), "tiny" (does
everything run? its figures mean nothing, and nothing is promised of them) or "full" (the issue's own sizes: hours).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from racing import iqr, race_all, ratio
from torch import Tensor, nn

from pbe_fast.engine.machine import measure_peak
from pbe_fast.engine.precision import resolve_precision
from pbe_fast.engine.profile import count_flops
from pbe_fast.models import Normalized, PreActResNet18
from pbe_fast.torchvision_compat import import_torchvision

SCALE = os.environ.get("PBE_BENCH_SCALE", "normal")
if SCALE not in ("tiny", "normal", "full"):
    raise ValueError(f"PBE_BENCH_SCALE; got {SCALE!r}, accepted: tiny, normal, full")
SEED = 0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

T = TypeVar("T")


def sized(*, tiny: T, normal: T, full: T | None = None, gpu: T | None = None, device: str = "cpu") -> T:
    """The value for the scale and the device; where no other is given, the normal one."""
    if SCALE == "tiny":
        return tiny
    if device == "cuda" and gpu is not None:
        return gpu
    return full if SCALE == "full" and full is not None else normal


def network(name: str, device: str) -> tuple[nn.Module, int]:
    """ "preact-<width>" or "resnet18", and the side of its images, in eval mode, with statistics of random images."""
    torch.manual_seed(SEED)
    if name == "resnet18":
        side, net = sized(tiny=64, normal=224), import_torchvision().models.resnet18(num_classes=10)
    else:
        side, net = 32, PreActResNet18(10, width=sized(tiny=4, normal=int(name.partition("-")[2])))
    model = Normalized(net, MEAN, STD).to(device)
    with torch.no_grad():
        model.train()(pixels(16, side, device, seed=1).float() / 255)
    return model.eval(), side


def pixels(count: int, side: int, device: str, *, seed: int) -> Tensor:
    """(count, 3, side, side) uint8 noise: the time of these networks does not depend on what they see."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8, device=device)


def best_dtype(device: str) -> torch.dtype:
    """What "auto" precision takes on this machine: also what strengthened peers compute in."""
    return resolve_precision(torch.device(device))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for one batch size; at the tiny scale without its code generation, which takes a minute."""
    compiled_one: Callable[..., Any] = torch.compile(
        function, dynamic=False, backend="eager" if SCALE == "tiny" else "inductor"
    )
    return compiled_one


@cache
def peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of three measurements, so that a busy moment does not lower it."""
    return max(measure_peak(torch.device(device), dtype).flops_per_second for _ in range(sized(tiny=1, normal=3)))


def flops(model: nn.Module, side: int, device: str) -> int:
    """Floating-point operations of one image's forward pass."""
    return count_flops(model, (3, side, side), torch.device(device))


def run_field(
    benchmark: BenchmarkFixture,
    runners: Mapping[str, Callable[..., object]],
    *,
    inputs: Iterable[tuple[Any, ...]] = ((),),
    work: int,
    unit: str,
    flops_per_unit: float,
    device: str,
    fp32: Iterable[str],
    promises: Mapping[tuple[str, str], float],
    rounds: int,
    warmup: int = 1,
    share: float = 0.0,
    **notes: Any,
) -> dict[str, tuple[float, ...]]:
    """Races all, stores the outcome with the benchmark, and checks what was promised of it.

    Args:
        benchmark: Its own column is the length of the whole race.
        runners: By name; those that are ours begin with "ours".
        inputs: As for `race_all`.
        work: Units of work in a call.
        unit: Their name.
        flops_per_unit: For the share of the peak of matrix products in the format that each computes in.
        device: "cpu" or "cuda".
        fp32: Names of those that compute in float32; the others do in `best_dtype`.
        promises: The least ratio for pairs (ours, peer).
        rounds: Timed turns of each.
        warmup: Turns of each before.
        share: The least share of the peak that the best of ours reaches.
        notes: Stored as well.
    """
    dtypes = {name: torch.float32 if name in set(fp32) else best_dtype(device) for name in runners}
    times: dict[str, tuple[float, ...]] = benchmark.pedantic(
        race_all,
        args=(runners,),
        kwargs={"inputs": inputs, "rounds": rounds, "warmup": warmup, "device": device},
        rounds=1,
    )
    runs = {}
    for name, seconds in times.items():
        rate = work / statistics.median(seconds)
        runs[name] = {
            "seconds": statistics.median(seconds),
            "iqr_seconds": iqr(seconds),
            "rate": rate,
            "share_of_peak": rate * flops_per_unit / peak(device, dtypes[name]),
            "dtype": str(dtypes[name]).removeprefix("torch."),
        }
    ours = [name for name in runners if name.startswith("ours")]
    ratios = {f"{one} / {peer}": ratio(times[one], times[peer]) for one in ours for peer in runners if peer not in ours}
    promised = {f"{one} / {peer}": least for (one, peer), least in promises.items()}
    benchmark.extra_info.update(
        unit=unit,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        rounds=rounds,
        work=work,
        runs=runs,
        ratios=ratios,
        promised=promised,
        promised_share=share,
        peak_gflops={
            str(d).removeprefix("torch."): peak(device, d) / 1e9 for d in sorted(set(dtypes.values()), key=str)
        },
        **notes,
    )
    print()
    for name, run in runs.items():
        print(f"  {name:28s} {run['rate']:12.1f} {unit}, {100 * run['share_of_peak']:5.1f} % of {run['dtype']} peak")
    if SCALE != "tiny":
        missed = {pair: (ratios[pair], least) for pair, least in promised.items() if ratios[pair] < least}
        assert not missed, f"ratios (measured, promised): {missed}"
        reached = max(runs[name]["share_of_peak"] for name in ours)
        assert reached >= share, f"share of peak; measured {reached:.3f}, promised {share}"
    return times
