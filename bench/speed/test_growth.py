"""How time and memory grow with the number of images, without a clean set: the slope of log(seconds) by log(N).

One round whose work is in proportion to N: every image ranked, a tenth of them in the extra set, one pass of step 2.
The network is narrow (width 8; 16 at the full scale and on a GPU), so that what grows faster than N would show.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from cases import DEVICES, SCALE, pixels, sized
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from pbe_fast.config import FineTuneConfig, PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.models import PreActResNet18
from pbe_fast.purify import purify

CONFIG = PurifyConfig(
    finetune=FineTuneConfig(augment="crop+flip"),
    adversarial_steps=1,
    clean_steps=0,
    clean_epochs=1,
    fractions=(0.1,),
    initial="random",
)
GOAL = 1.02


@DEVICES
def test_growth(benchmark: BenchmarkFixture, device: str) -> None:
    counts = sized(tiny=(100, 200), normal=(2_500, 5_000, 10_000, 25_000, 50_000))
    torch.manual_seed(0)
    model = PreActResNet18(10, width=sized(tiny=4, normal=8, full=16, gpu=16, device=device)).eval()
    run(model, 1_000 if SCALE != "tiny" else 100, device)
    measured = benchmark.pedantic(lambda: {n: run(model, n, device) for n in counts}, rounds=1)
    seconds = {n: seconds for n, (seconds, _) in measured.items()}
    peaks = {n: peak for n, (_, peak) in measured.items()}
    slope = log_log_slope(seconds)
    benchmark.extra_info.update(
        unit="images/s",
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        seconds={str(n): value for n, value in seconds.items()},
        peak_mib={str(n): value for n, value in peaks.items()},
        slope=slope,
        promised_slope=GOAL,
    )
    print(f"\n  seconds {seconds}\n  peak MiB {peaks}\n  slope {slope:.3f}")
    if SCALE != "tiny":
        assert slope <= GOAL


def run(model: nn.Module, count: int, device: str) -> tuple[float, float | None]:
    """Seconds of a run on ``count`` images, as it says itself, and the most memory that it held in MiB."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(10, (count,), generator=generator)
    data = ImageSet(pixels(count, 32, "cpu", seed=count), labels, tuple("0123456789"))
    reset_peak(device)
    result = purify(model, data, config=CONFIG, device=device, progress=False)
    return sum(result.seconds.values()), peak_mib(device)


def reset_peak(device: str) -> None:
    """The peak counts from here on, where the system allows that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mib(device: str) -> float | None:
    """Of the GPU's memory what tensors held; of the process, its resident size (None where it is not told)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) / 1024 if line else None


def log_log_slope(seconds: dict[int, float]) -> float:
    """The exponent of N, by least squares."""
    x, y = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    return statistics.linear_regression(x, y).slope
