from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.tolerances import tolerance
from pbe_fast.kernels.warp import RUNS, Job, Noise, Taps, WarpPlan, control_field, warp, warp_grid

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FAST = tuple(
    pytest.param(name, marks=pytest.mark.skipif(bool(backends.missing("warp", name)), reason=f"no {name} backend here"))
    for name in ("native", "triton")
)
SHAPES = (
    (1, 1, 1, 1), (2, 3, 1, 7), (2, 3, 7, 1), (2, 1, 2, 2), (3, 3, 9, 8), (2, 1, 28, 28), (2, 3, 32, 32),
    (2, 3, 33, 47), (1, 5, 20, 10), (1, 40, 5, 4),
)  # fmt: skip
# Input, output, channels_last, normalised, noise.
VARIANTS = (
    (torch.uint8, torch.uint8, False, False, False),
    (torch.uint8, torch.bfloat16, True, True, False),
    (torch.float32, torch.float32, False, False, False),
    (torch.uint8, torch.float16, False, True, True),
    (torch.uint8, torch.uint8, True, False, True),
    (torch.float16, torch.float32, True, True, False),
    (torch.uint8, torch.float32, False, False, True),
    (torch.float32, torch.bfloat16, True, False, True),
    (torch.bfloat16, torch.float16, False, True, False),
)


def random_images(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return images if dtype == torch.uint8 else (images / 255).to(dtype)


def random_grid(height: int, width: int, seed: int, *, reach: float = 1.0) -> Tensor:
    """WaNet's grid for a reach of 1; beyond that rougher, and partly outside of the image."""
    grid = warp_grid(control_field(min(4, height), seed=seed), height, width, warp_strength=reach * reach / 2)
    return grid * reach


def normalisation(channels: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.rand(2, channels, generator=generator)
    return {"mean": mean, "std": std * 0.5 + 0.1}


def noise_of(batch: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(-(2**62), 2**62, (batch,), generator=torch.Generator().manual_seed(seed))
    return {"noise": 1.0, "image_ids": ids, "seed": 2**62 + seed}


def case(shape: tuple[int, ...], variant: tuple[Any, ...], seed: int, device: str = "cpu") -> dict[str, Any]:
    in_dtype, out_dtype, channels_last, normalised, noisy = variant
    images = random_images(shape, in_dtype, seed).to(device)
    arguments: dict[str, Any] = {
        "images": images.contiguous(memory_format=LAYOUTS[channels_last]),
        "grid": WarpPlan.of(random_grid(*shape[2:], seed, reach=1.0 if seed % 2 else 1.5)).to(device),
        "out_dtype": out_dtype,
    }
    arguments |= normalisation(shape[1], seed) if normalised else {}
    arguments |= noise_of(shape[0], seed) if noisy else {}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def run_into(backend: str, out: Tensor, images: Tensor, grid: WarpPlan, mean: Tensor | None = None,
             std: Tensor | None = None, noise: float | None = None, image_ids: Tensor | None = None, seed: int = 0,
             out_dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """One version, writing to memory that the caller has filled."""
    source: Taps | Noise = Taps(grid.offsets, grid.weights)
    if noise is not None:
        assert image_ids is not None
        source = Noise(grid.grid, noise / images.shape[2], image_ids, seed)
    RUNS[backend](Job(images, out, source, mean, std, not images.is_contiguous()))


def same(actual: Tensor, expected: Tensor, backend: str) -> None:
    """Equal to the last bit; Triton's interpreter truncates where it should round to bfloat16."""
    if actual.dtype == torch.bfloat16 and backend == "triton" and backends.triton_interpreted():
        torch.testing.assert_close(actual, expected, **tolerance(torch.bfloat16))
    else:
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reach", [1.0, 1.5])
def test_reference_is_grid_sample(shape: tuple[int, ...], reach: float) -> None:
    images = random_images(shape, torch.float32, 0)
    grid = random_grid(*shape[2:], 0, reach=reach)
    expected = F.grid_sample(images, grid.expand(shape[0], -1, -1, -1), align_corners=True)
    torch.testing.assert_close(warp(images, grid, backend="reference"), expected, atol=5e-7, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_noise_moves_the_grid_of_each_image(backend: str) -> None:
    device = device_of(backend)
    images = random_images((3, 3, 16, 12), torch.float32, 0).to(device)
    grid = random_grid(16, 12, 0).to(device)
    noisy = warp(images, grid, noise=2.0, image_ids=torch.tensor([7, 8, 9], device=device), seed=3, backend=backend)
    still = warp(images, grid, backend=backend)
    # The displacements, read off images that hold the coordinates, are up to 2/H of the grid's units both ways.
    ramp = torch.linspace(-1, 1, 12).expand(3, 1, 16, 12).contiguous().to(device)
    moved = warp(ramp, grid, noise=2.0, image_ids=torch.tensor([7, 8, 9], device=device), seed=3, backend=backend)
    by = (moved - warp(ramp, grid, backend=backend)).abs()
    assert 0.95 * 2 / 16 < by.max() <= 2 / 16 + 1e-6
    assert not torch.equal(noisy, still)
    assert not torch.equal(by[0], by[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_fast_versions_equal_the_reference(backend: str, shape: tuple[int, ...]) -> None:
    # The interpreter takes about 0.1 s a call, so each of its shapes gets another third of the variants.
    variants = VARIANTS if backend == "native" else VARIANTS[SHAPES.index(shape) % 3 :: 3]
    for seed, variant in enumerate(variants, SHAPES.index(shape)):
        arguments = case(shape, variant, seed, device_of(backend))
        expected = warp(**arguments, backend="reference")
        out = torch.empty_like(arguments["images"], dtype=arguments["out_dtype"])
        out.fill_(171 if out.dtype == torch.uint8 else math.nan)
        run_into(backend, out, **arguments)
        same(out, expected, backend)
        assert warp(**arguments, backend=backend).stride() == arguments["images"].stride()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_large_images_agree(backend: str, channels_last: bool, noisy: bool) -> None:
    # Two channels and five rows of blocks are enough for the interpreter, which takes 0.1 s a block.
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    shape = (1, 2, 22, 224) if interpreted else (2, 3, 224, 224)
    arguments = case(shape, (torch.uint8, torch.float16, channels_last, True, noisy), 1, device_of(backend))
    same(warp(**arguments, backend=backend), warp(**arguments, backend="reference"), backend)


def test_taps_that_lie_far_apart_and_rows_at_the_end_of_memory() -> None:
    # Rough grids leave the native version's windows; shifted ones push them over every edge.
    for shape in ((2, 3, 40, 40), (2, 2, 4, 33), (1, 3, 3, 100), (3, 1, 31, 16), (2, 1, 12, 31), (1, 20, 9, 9)):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            scale = (0.0, 0.05, 0.3, 2.0)[seed]
            grid = warp_grid(control_field(2, seed=seed), *shape[2:])
            for shift in (-1.0, 0.0, 1.0):
                moved = (grid + shift + scale * torch.randn(grid.shape, generator=generator)).clamp(-1, 1)
                for dtype in (torch.uint8, torch.float32):
                    for layout in LAYOUTS:
                        images = random_images(shape, dtype, seed).contiguous(memory_format=layout)
                        expected = warp(images, moved, backend="reference")
                        assert torch.equal(warp(images, moved), expected)


def exact(images: Tensor, grid: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In float64, independent of the reference: F.grid_sample, then the normalisation."""
    pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
    sampled = F.grid_sample(pixels, grid.double().expand(len(images), -1, -1, -1), align_corners=True)
    return (sampled - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)


def test_dispatched_version_against_float64() -> None:
    largest: dict[torch.dtype, float] = dict.fromkeys(FLOATS, 0.0)

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 24), st.integers(1, 24)),
        seed=st.integers(0, 2**31),
        in_dtype=st.sampled_from((torch.uint8, torch.float32)),
        out_dtype=st.sampled_from(FLOATS),
        channels_last=st.booleans(),
        reach=st.floats(0, 2),
    )
    def check(
        shape: tuple[int, ...],
        seed: int,
        in_dtype: torch.dtype,
        out_dtype: torch.dtype,
        channels_last: bool,
        reach: float,
    ) -> None:
        images = random_images(shape, in_dtype, seed).contiguous(memory_format=LAYOUTS[channels_last])
        grid, affine = random_grid(*shape[2:], seed, reach=reach), normalisation(shape[1], seed)
        actual = warp(images, grid, out_dtype=out_dtype, **affine).double()
        expected = exact(images, grid, **affine)
        error = ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item()
        largest[out_dtype] = max(largest[out_dtype], error)
        bound = tolerance(out_dtype)
        # A float32 position is off by up to size * 2^-24, the pixels beside it by up to 1, and 1/std scales that.
        position = sum(shape[2:]) * 2.0**-23 / affine["std"].min().item()
        torch.testing.assert_close(actual, expected, rtol=bound["rtol"], atol=bound["atol"] + position)

    check()
    print("largest errors:", {str(dtype): f"{error:.1e}" for dtype, error in largest.items()})
    assert 0 < largest[torch.float32] < 2e-5


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_uint8_rounds_half_to_even(backend: str) -> None:
    device = device_of(backend)
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack((levels[:-1], levels[1:]), dim=1).view(15, 17, 1, 2).to(device)
    middle = torch.zeros(1, 2, 2, device=device)
    expected = torch.arange(255).add(0.5).round().to(torch.uint8)
    assert warp(images, middle, backend=backend)[..., 0, 0].flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_identity_grid_returns_the_images(backend: str) -> None:
    for shape in ((2, 3, 1, 1), (1, 1, 1, 9), (2, 3, 17, 5)):
        images = random_images(shape, torch.uint8, 0).to(device_of(backend))
        grid = warp_grid(control_field(4, seed=0), *shape[2:], warp_strength=0.0).to(images.device)
        assert torch.equal(warp(images, grid, backend=backend), images)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_noise_depends_on_the_image_alone(backend: str) -> None:
    arguments = case((5, 3, 12, 10), VARIANTS[3], 0, device_of(backend))
    whole = warp(**arguments, backend=backend)
    for chosen in ([4], [2, 0], [3, 3, 1, 4, 0, 2]):
        part = arguments | {"images": arguments["images"][chosen], "image_ids": arguments["image_ids"][chosen]}
        assert torch.equal(warp(**part, backend=backend), whole[chosen])
    for change in (
        {"seed": 1},
        {"image_ids": arguments["image_ids"] ^ 1},
        {"image_ids": arguments["image_ids"] ^ 2**40},
    ):
        assert not torch.equal(warp(**arguments | change, backend=backend), whole)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_pixels_that_are_not_numbers_stay_where_they_are(backend: str) -> None:
    images = random_images((1, 1, 20, 20), torch.float32, 0)
    images[0, 0, 10, 10] = math.nan
    images[0, 0, 3, 3] = math.inf
    images = images.to(device_of(backend))
    grid = random_grid(20, 20, 1).to(images.device)
    finite = warp(images, grid, backend=backend)[0, 0].isfinite().cpu()
    assert not finite.all()
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[8:13, 8:13] = touched[1:6, 1:6] = True
    assert finite[~touched].all()
