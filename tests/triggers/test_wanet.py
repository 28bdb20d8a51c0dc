from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.triggers import WaNet

SHAPES = [(3, 32, 32), (1, 16, 16), (3, 20, 28)]


def _images(shape: tuple[int, int, int], n: int = 6) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def _literal_grid(shape: tuple[int, int, int], seed: int, k: int, s: float, rescale: float) -> Tensor:
    """Nguyen and Tran's construction with torch's own functions, (1, H, W, 2)."""
    _, h, w = shape
    field = torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    field = F.interpolate(field / field.abs().mean(), (h, w), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    rows, columns = torch.linspace(-1, 1, h), torch.linspace(-1, 1, w)
    identity = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], dim=-1)
    return ((identity + s * field / h) * rescale).clamp(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("k", "s", "rescale"), [(4, 0.5, 1.0), (8, 2.0, 1.0), (2, 0.75, 0.9)])
def test_equals_grid_sample_on_the_literal_grid(shape: tuple[int, int, int], k: int, s: float, rescale: float) -> None:
    images = _images(shape)
    grid = _literal_grid(shape, 3, k, s, rescale).expand(len(images), -1, -1, -1)
    expected = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    got = WaNet(shape, seed=3, control_size=k, warp_strength=s, grid_rescale=rescale).apply(images)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert (got - images).abs().max() > 0.05


def test_the_control_points_move_by_half_the_strength_in_pixels() -> None:
    h = w = 32
    columns = torch.arange(w).expand(h, w) / w  # the value tells the column a pixel came from
    moved = []
    for seed in range(20):
        # With as many control points as pixels, every pixel is one.
        trigger = WaNet((1, h, w), seed=seed, control_size=w, warp_strength=1.0)
        moved.append((trigger.apply(columns[None, None]) - columns)[0, 0, 2:-2, 2:-2].abs().mean() * w)
    assert torch.stack(moved).mean() == pytest.approx(0.5 * 31 / 32, rel=0.02)


def test_the_seed_fixes_the_field() -> None:
    images = _images((3, 16, 16))
    first, again, other = (WaNet((3, 16, 16), seed=s).apply(images) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cover_images_sample_within_the_noise_of_the_warp() -> None:
    h = w = 32
    rows, columns = (torch.arange(32.0) / 31).expand(32, 32).T, (torch.arange(32.0) / 31).expand(32, 32)
    places = torch.stack([columns, rows, columns])[None].expand(200, -1, -1, -1)  # channels 0 and 1: x and y
    trigger = WaNet((3, h, w))
    warped, covered = trigger.apply(places), trigger.cover(places, torch.arange(200))
    moved = (covered - warped)[:, :2] * 2  # in units of the grid, which spans 2
    assert moved.abs().max() <= 1 / 32 + 1e-5
    # Away from the border, where positions are clamped, the noise is U(-1, 1) / H: mean 0, deviation 1/sqrt(3) of it.
    inner = moved[:, :, 4:-4, 4:-4] * 32
    assert inner.mean().abs() < 0.01
    assert inner.std() == pytest.approx(3**-0.5, abs=0.01)
    # Independent from pixel to pixel, from x to y and from image to image.
    for a, b in (
        (inner[..., :-1], inner[..., 1:]),
        (inner[..., :-1, :], inner[..., 1:, :]),
        (inner[:, 0], inner[:, 1]),
        (inner[:-1], inner[1:]),
    ):
        assert (a * b).mean().abs() < 0.01


def test_cover_noise_belongs_to_the_image_and_the_draw() -> None:
    trigger = WaNet((3, 16, 16), seed=2)
    images, ids = _images((3, 16, 16), 4), torch.tensor([7, 5, 2**40, 0])
    whole = trigger.cover(images, ids, draw=1)
    alone = torch.cat([trigger.cover(images[i : i + 1], ids[i : i + 1], draw=1) for i in range(4)])
    assert torch.equal(whole, alone)
    assert torch.equal(whole, trigger.cover(images, ids, draw=1))
    same_image = trigger.cover(images[:1].expand(4, -1, -1, -1), ids, draw=1)
    assert all(not torch.equal(same_image[0], same_image[i]) for i in (1, 2, 3))
    for other in (trigger.cover(images, ids, draw=2), trigger.cover(images, ids + 1, draw=1)):
        assert all(not torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("seed", [-3, 2**40])
def test_any_seed_will_do(seed: int) -> None:
    trigger = WaNet((3, 16, 16), seed=seed)
    covered = trigger.cover(_images((3, 16, 16)), torch.arange(6), draw=seed)
    assert covered.min() >= 0
    assert covered.max() <= 1
