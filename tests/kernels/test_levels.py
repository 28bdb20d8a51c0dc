"""Every level of instructions that this processor has (kernels/levels.h) against the reference, at awkward sizes.

Outputs lie one element past an aligned address, are filled with NaN, and have neighbours that must stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pbe_fast.kernels import backends, pgd_step, warp
from pbe_fast.kernels.tolerances import tolerance

pytestmark = pytest.mark.skipif(backends.native() is None, reason="no native backend here")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
MARGIN = 17


@pytest.fixture(params=range(4), ids=("clones", "avx512", "vbmi", "bf16"))
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    limit = backends.native().limit_level
    reached = limit(request.param) == request.param
    try:
        if not reached:
            pytest.skip("this processor does not have that level")
        yield
    finally:
        limit(3)


def shifted(values: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """A copy in the layout asked for between two margins, and the memory around it."""
    memory = torch.full((values.numel() + 2 * MARGIN,), 77.0).to(values.dtype)
    inner = memory[MARGIN : MARGIN + values.numel()]
    batch, channels, height, width = values.shape
    if layout == torch.channels_last:
        copy = inner.view(batch, height, width, channels).permute(0, 3, 1, 2)
    else:
        copy = inner.view(values.shape)
    return copy.copy_(values), memory


def unwritten(shape: torch.Size, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    return shifted(torch.full(shape, 111 if dtype == torch.uint8 else float("nan"), dtype=dtype), layout)


def check_margins(memory: Tensor) -> None:
    assert bool((memory[:MARGIN] == 77).all()) and bool((memory[-MARGIN:] == 77).all())


def plan_of(height: int, width: int, *, smooth: bool, generator: torch.Generator) -> warp.WarpPlan:
    if smooth:
        return warp.WarpPlan.of(warp.warp_grid(warp.control_field(4, seed=1), height, width))
    return warp.WarpPlan.of(torch.rand(height, width, 2, generator=generator) * 2.4 - 1.2)


def check_warp(images: Tensor, plan: warp.WarpPlan, out_dtype: torch.dtype, *, normalised: bool) -> None:
    channels, generator = images.shape[1], torch.Generator().manual_seed(3)
    mean = torch.rand(channels, generator=generator) if normalised else None
    std = torch.rand(channels, generator=generator) + 0.1 if normalised else None
    taps = warp.Taps(plan.offsets, plan.weights)
    expected = torch.empty_like(images, dtype=out_dtype, memory_format=torch.contiguous_format)
    warp.RUNS["reference"](warp.Job(images, expected, taps, mean, std, False))
    for layout in LAYOUTS:
        source = shifted(images, layout)[0]
        out, memory = unwritten(images.shape, out_dtype, layout)
        warp.RUNS["native"](warp.Job(source, out, taps, mean, std, layout == torch.channels_last))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        check_margins(memory)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 3, 2, 2), (2, 3, 9, 1), (3, 2, 1, 40), (1, 4, 5, 7), (5, 3, 33, 47), (1, 5, 40, 31),
     (1, 1, 8, 64), (2, 3, 16, 130), (1, 40, 6, 17)],
)  # fmt: skip
def test_warp(level: None, shape: tuple[int, ...], smooth: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(shape[2], shape[3], smooth=smooth, generator=generator)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    check_warp(pixels, plan, torch.uint8, normalised=False)
    for dtype, normalised in itertools.product(FLOATS, (False, True)):
        check_warp(pixels, plan, dtype, normalised=normalised)
        check_warp(pixels / 255, plan, dtype, normalised=normalised)


def test_warp_of_what_is_hard_to_round(level: None) -> None:
    # NaN, infinities, subnormal numbers, and what a half type cannot hold.
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(24, 40, smooth=True, generator=generator)
    images = torch.randn(2, 3, 24, 40, generator=generator) * 10 ** torch.empty(2, 3, 24, 40).uniform_(-42, 38)
    images[0, 0, 3, 5], images[1, 2, 9, 30] = float("nan"), float("inf")
    for dtype in FLOATS:
        check_warp(images, plan, dtype, normalised=False)


def test_warp_past_the_caches(level: None) -> None:
    # Large float results are written past the caches, from an aligned address.
    images = torch.rand(3, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    plan = plan_of(512, 512, smooth=True, generator=torch.Generator())
    assert torch.equal(warp.warp(images, plan, backend="native"), warp.warp(images, plan, backend="reference"))


@pytest.mark.parametrize("wrong", [2.0, -0.5, 1e33, float("inf"), float("nan")])
def test_warp_with_weights_of_no_grid(level: None, wrong: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(20, 33, smooth=True, generator=generator)
    plan.weights[:, ::5] *= wrong
    pixels = torch.randint(0, 256, (2, 3, 20, 33), generator=generator, dtype=torch.uint8)
    check_warp(pixels, plan, torch.float32, normalised=False)


@pytest.mark.parametrize("norm", pgd_step.NORMS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 1), (1, 3, 5, 7), (2, 3, 33, 47), (1, 2050, 1, 2), (3, 3, 32, 32), (1, 2, 64, 65)]
)
def test_pgd_step(level: None, shape: tuple[int, ...], norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    origin = (torch.rand(shape, generator=generator) * 1.2 - 0.1).clamp(0, 1)
    adv = (origin + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    if norm == "linf":
        # By turns in all positions of a register: NaN, infinities, zeros, what rounds to nothing in float16.
        for start, value in enumerate((float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-30)):
            grad.view(-1)[start::29] = value
        adv.view(-1)[20::61] = float("nan")
    mean, std = torch.rand(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.1
    sizes = (0.04, 0.02) if norm == "linf" else (1.5, 0.8)
    for grad_dtype, dtype, layout, normalised, wants_input in itertools.product(
        FLOATS, FLOATS, LAYOUTS, (False, True), (False, True)
    ):
        results = {}
        for backend in ("reference", "native"):
            inputs = [shifted(x, layout)[0] for x in (adv, grad.to(grad_dtype), origin)]
            adv_next, memory = unwritten(adv.shape, torch.float32, layout)
            model_input, input_memory = unwritten(adv.shape, dtype, layout)
            pgd_step._RUNS[backend](
                pgd_step.Step(*inputs, adv_next, model_input if wants_input else None, *sizes, norm,
                              mean if normalised else None, std if normalised else None, layout)
            )  # fmt: skip
            check_margins(memory)
            check_margins(input_memory)
            results[backend] = adv_next, model_input
        (expected, expected_input), (ours, our_input) = results["reference"], results["native"]
        exact = {"rtol": 0.0, "atol": 0.0} if norm == "linf" else tolerance(torch.float32)
        torch.testing.assert_close(ours, expected, **exact, equal_nan=True)
        torch.testing.assert_close(our_input, expected_input, **tolerance(dtype), equal_nan=True)
