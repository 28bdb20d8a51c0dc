"""The warp against F.grid_sample: `make bench` on a CPU, `make bench-gpu` on a GPU; see test_kernels.py.

On a CPU the batches are those of training (128 images at 32x32, 16 at 224x224), which a cache holds: with larger ones
both sides wait for memory, and the float case at 32x32 cannot be six times as fast as a peer that already runs at a
fifth of the copy bandwidth. The peers get their grid expanded once, outside of the race.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from racing import seconds_to_compile
from test_kernels import Inputs, run_case
from torch import Tensor

from pbe_fast.kernels.tolerances import tolerance
from pbe_fast.kernels.warp import WarpPlan, control_field, warp, warp_grid

BATCH = {32: 128, 224: 16}
GPU_BATCH = {32: 50_000, 224: 10_000}
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class Case:
    """Images of one size, and both sides of the race."""

    def __init__(self, side: int, batch: int, device: str) -> None:
        self.plan = WarpPlan.of(warp_grid(control_field(4, seed=0), side, side)).to(device)
        self.expanded = self.plan.grid.expand(batch, -1, -1, -1)
        self.mean, self.std = torch.tensor([MEAN, STD], device=device)
        self.ids = torch.arange(batch, device=device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, 3, side, side)
        self.pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)

    def plain(self, images: Tensor) -> Tensor:
        return warp(images, self.plan)

    def plain_peer(self, images: Tensor) -> Tensor:
        return F.grid_sample(images, self.expanded, align_corners=True)

    def fused(self, pixels: Tensor) -> Tensor:
        return warp(pixels, self.plan, mean=self.mean, std=self.std, out_dtype=torch.bfloat16)

    def fused_peer(self, pixels: Tensor) -> Tensor:
        sampled = F.grid_sample(pixels.float() / 255, self.expanded, align_corners=True)
        return ((sampled - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)).bfloat16()

    def noisy(self, pixels: Tensor) -> Tensor:
        return warp(pixels, self.plan, noise=1.0, image_ids=self.ids, mean=self.mean, std=self.std,
                    out_dtype=torch.bfloat16)  # fmt: skip

    def noisy_peer(self, pixels: Tensor) -> Tensor:
        noise = torch.rand_like(self.expanded) * 2 - 1
        grids = (self.expanded + noise / pixels.shape[2]).clamp(-1, 1)
        sampled = F.grid_sample(pixels.float() / 255, grids, align_corners=True)
        return ((sampled - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)).bfloat16()


def compiled(peer: Callable[..., Any], arguments: tuple[Any, ...], notes: dict[str, Any]) -> Callable[..., Any]:
    faster: Callable[..., Any] = torch.compile(peer, dynamic=False)
    notes["compile_seconds"] = seconds_to_compile(faster, arguments)
    return faster


def fused_case(benchmark: BenchmarkFixture, case: Case, peer: str, **notes: Any) -> None:
    inputs: Inputs = [(case.pixels,)]
    few = case.pixels[:100]
    expected = Case(few.shape[2], len(few), few.device.type).fused_peer(few)
    bound = tolerance(torch.bfloat16)
    # What a float32 position's rounding does to the pixel comes on top.
    torch.testing.assert_close(case.fused(few), expected, rtol=bound["rtol"], atol=2e-4)
    expression = compiled(case.fused_peer, inputs[0], notes) if peer == "compiled" else case.fused_peer
    run_case(benchmark, case.fused, expression, inputs, bytes_moved=3 * case.pixels.numel(), **notes)


@pytest.mark.parametrize(("side", "ratio"), [(32, 6.0), (224, 3.0)])
def test_warp_of_floats(benchmark: BenchmarkFixture, side: int, ratio: float) -> None:
    case = Case(side, BATCH[side], "cpu")
    images = case.pixels / 255
    torch.testing.assert_close(case.plain(images), case.plain_peer(images), rtol=0, atol=5e-7)
    run_case(
        benchmark, case.plain, case.plain_peer, [(images,)], bytes_moved=8 * images.numel(), ratio=ratio, rounds=101
    )


@pytest.mark.parametrize(("side", "peer", "ratio"), [(32, "eager", 8.0), (224, "eager", 8.0), (32, "compiled", 1.0)])
def test_warp_to_normalised_bf16(benchmark: BenchmarkFixture, side: int, peer: str, ratio: float) -> None:
    fused_case(benchmark, Case(side, BATCH[side], "cpu"), peer, ratio=ratio, rounds=51)


@pytest.mark.parametrize("side", [32, 224])
def test_warp_with_noise(benchmark: BenchmarkFixture, side: int) -> None:
    # The noise is another, so there are no values to compare here; the tests do that.
    case = Case(side, BATCH[side], "cpu")
    moved = 3 * case.pixels.numel()
    run_case(benchmark, case.noisy, case.noisy_peer, [(case.pixels,)], bytes_moved=moved, ratio=1.0, rounds=51)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("peer", ["eager", "compiled"])
def test_warp_to_normalised_bf16_on_a_gpu(benchmark: BenchmarkFixture, side: int, peer: str) -> None:
    # The share is promised at 32x32; at 224x224 it is stored.
    share = 0.75 if side == 32 else 0.0
    fused_case(benchmark, Case(side, GPU_BATCH[side], "cuda"), peer, ratio=1.0, share=share, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 224])
def test_warp_with_noise_on_a_gpu(benchmark: BenchmarkFixture, side: int) -> None:
    case = Case(side, GPU_BATCH[side], "cuda")
    moved = 3 * case.pixels.numel()
    run_case(benchmark, case.noisy, case.noisy_peer, [(case.pixels,)], bytes_moved=moved, ratio=1.0, device="cuda")
