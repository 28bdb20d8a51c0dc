"""The parts that are computed once, and the noise: plain PyTorch, compared with what F.interpolate and others give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pbe_fast.kernels.warp import WarpPlan, control_field, reference, warp_grid


def test_control_field_is_centred_uniform_and_has_mean_size_one() -> None:
    field = control_field(64, seed=3)
    assert field.shape == (1, 2, 64, 64) and field.dtype == torch.float32
    assert field.abs().mean().item() == pytest.approx(1.0, abs=1e-6)
    # U(-1, 1) over its mean size 1/2: up to 2 both ways, without a preferred direction.
    assert field.abs().max().item() == pytest.approx(2.0, abs=0.05)
    assert abs(field.mean().item()) < 0.05
    assert torch.equal(field, control_field(64, seed=3))
    assert not torch.equal(field, control_field(64, seed=4))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("rescale", [1.0, 0.9])
def test_grid_is_the_formula_of_wanet(height: int, width: int, rescale: float) -> None:
    field = control_field(4, seed=0)
    grid = warp_grid(field, height, width, warp_strength=0.5, grid_rescale=rescale)
    up = F.interpolate(field.double(), (height, width), mode="bicubic", align_corners=True)[0]
    for i in range(height):
        for j in range(width):
            x = -1.0 + 2.0 * j / max(width - 1, 1) + 0.5 * up[0, i, j].item() / height
            y = -1.0 + 2.0 * i / max(height - 1, 1) + 0.5 * up[1, i, j].item() / height
            expected = [min(max(value * rescale, -1.0), 1.0) for value in (x, y)]
            assert grid[i, j].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 6), (6, 1), (1, 1), (2, 2)])
def test_taps_reproduce_every_position_inside(height: int, width: int) -> None:
    torch.manual_seed(0)
    grid = torch.rand(height, width, 2) * 2 - 1
    grid[0, 0] = torch.tensor([-1.0, -1.0])
    grid[-1, -1] = torch.tensor([1.0, 1.0])
    plan = WarpPlan.of(grid)
    right, down = int(width > 1), width if height > 1 else 0
    assert plan.offsets.min() >= 0 and plan.offsets.max() + right + down < height * width
    torch.testing.assert_close(plan.weights.sum(0), torch.ones(height * width))
    assert plan.weights.min() >= 0
    x = torch.zeros(height * width)
    y = torch.zeros(height * width)
    for weight, step in zip(plan.weights, (0, right, down, down + right), strict=True):
        tap = plan.offsets + step
        x += weight * (tap % width)
        y += weight * tap.div(width, rounding_mode="floor")
    torch.testing.assert_close(x, (grid[..., 0].flatten() + 1) / 2 * (width - 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(y, (grid[..., 1].flatten() + 1) / 2 * (height - 1), atol=1e-5, rtol=0)


def test_taps_far_outside_are_inside_the_plane_with_weight_zero() -> None:
    grid = torch.tensor([-1e30, -5.0, 5.0, 1e30, -math.inf, math.inf]).view(-1, 1, 1).expand(6, 6, 2).contiguous()
    offsets, weights = reference.taps(grid, 6, 6)
    assert offsets.min() >= 0 and offsets.max() + 7 < 36
    assert weights.count_nonzero() == 0


def test_noise_is_uniform_and_belongs_to_the_image() -> None:
    ids = torch.tensor([0, 1, 2**32, 2**62, -1])
    noise = reference.noise(ids, 5, 4001)
    assert noise.shape == (5, 4001, 2) and noise.dtype == torch.float32
    assert noise.abs().max() < 1
    counts = torch.histc(noise.flatten(), 20, -1, 1)
    assert (counts - 2000).abs().max() < 200  # 4.5 standard deviations
    # x, y, neighbouring pixels and images are unrelated.
    flat = noise.permute(0, 2, 1).flatten(0, 1)
    correlation = torch.corrcoef(torch.cat((flat[:, :-1], flat[:, 1:]))).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4000)
    for pixels in (1, 2, 3, 4, 4000):
        assert torch.equal(reference.noise(ids[[3, 1]], 5, pixels), noise[[3, 1], :pixels])
    assert not torch.equal(reference.noise(ids, 6, 4001), noise)
    assert not torch.equal(reference.noise(ids, 5 + 2**32, 4001), noise)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: control_field(0, seed=0), "control_size; got 0; accepted: at least 1"),
        (
            lambda: warp_grid(torch.zeros(1, 1, 4, 4), 8, 8),
            r"field; got shape \(1, 1, 4, 4\); accepted: \(1, 2, k, k\)",
        ),
        (lambda: warp_grid(torch.zeros(1, 2, 4, 3), 8, 8), "field; got shape"),
        (lambda: warp_grid(torch.zeros(1, 2, 4, 4), 0, 8), "size of the images; got 0 x 8"),
        (lambda: warp_grid(torch.full((1, 2, 4, 4), math.nan), 8, 8), "field; got NaN"),
        (
            lambda: warp_grid(torch.zeros(1, 2, 4, 4), 8, 8, warp_strength=math.inf),
            "warp_strength, grid_rescale; got inf",
        ),
        (lambda: WarpPlan.of(torch.zeros(1, 8, 8, 2)), r"grid; got shape \(1, 8, 8, 2\); accepted: \(H, W, 2\)"),
        (lambda: WarpPlan.of(torch.zeros(8, 8, 3)), "grid; got shape"),
        (lambda: WarpPlan.of(torch.zeros(0, 8, 2)), "grid; got shape"),
        (lambda: WarpPlan.of(torch.zeros(8, 8, 2, dtype=torch.float64)), "grid; got torch.float64; accepted: float32"),
        (lambda: WarpPlan.of(torch.full((8, 8, 2), math.nan)), "grid; got NaN or infinity; accepted: finite"),
        (lambda: WarpPlan.of(torch.full((8, 8, 2), math.inf)), "grid; got NaN or infinity"),
    ],
)
def test_bad_arguments_say_what_is_accepted(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]
