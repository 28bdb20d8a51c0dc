"""The definition of the warp, in plain PyTorch: where each output pixel samples, and the weighted sum of its four taps.

Every step is one float32 operation, rounded once, in the order written here. The fast versions keep that order and fuse
no multiply-adds, so all of them agree bit for bit up to the rounding of the stored dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe_fast.kernels.philox import random_words

# Fourth part of the counter beside the pixel and the image: no other operation draws the same numbers from one seed.
STREAM = 0x57415250  # "WARP"


def control_field(control_size: int, seed: int) -> Tensor:
    """U(-1, 1) of shape (1, 2, k, k), divided by the mean of its absolute values; channel 0 is x."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.rand(1, 2, control_size, control_size, dtype=torch.float32, generator=generator) * 2 - 1
    return field / field.abs().mean()


def warp_grid(field: Tensor, height: int, width: int, warp_strength: float, grid_rescale: float) -> Tensor:
    """The sampling positions (H, W, 2): identity plus the upsampled field, in units of 1/H, rescaled and clamped."""
    upsampled = F.interpolate(field.float(), (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = torch.meshgrid(
        *(torch.linspace(-1, 1, size, dtype=torch.float32) for size in (height, width)), indexing="ij"
    )
    identity = torch.stack((x, y), dim=-1)
    return ((identity + warp_strength * upsampled / height) * grid_rescale).clamp(-1, 1)


def axis_taps(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each coordinate along one axis: the first of its two neighbouring taps, and the weights of both.

    The first tap lies in [0, size - 2], so that the second is always the next one in memory (or, where size is 1, the
    same); a tap outside of the image has the weight 0.
    """
    position = (coordinate + 1) * ((size - 1) / 2)
    position = torch.where(position.isnan(), 0.0, position)  # as in grid_sample, NaN reads as -1
    position = position.clamp(-2, size)  # further out no tap is inside either
    low = position.floor()
    fraction = position - low
    first = low.clamp(0, max(size - 2, 0))

    def weight(tap: Tensor) -> Tensor:
        return torch.where(tap == low, 1 - fraction, torch.where(tap == low + 1, fraction, 0.0))

    return first.int(), weight(first), weight(first + 1)


def taps(grid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Offset of the top left tap in the plane, int32 (..., H*W), and the weights (4, ..., H*W) of all four."""
    x, left, right = axis_taps(grid[..., 0], width)
    y, upper, lower = axis_taps(grid[..., 1], height)
    weights = torch.stack((upper * left, upper * right, lower * left, lower * right))
    return (y * width + x).flatten(-2), weights.flatten(-2)


def noise(image_ids: Tensor, seed: int, pixels: int) -> Tensor:
    """U(-1, 1) of shape (B, pixels, 2): one Philox call gives 32 bits to each of four pixels, 16 for x and 16 for y."""
    words = random_words(image_ids, seed, STREAM, pixels)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return (2 * halves + 1).float() * 2.0**-16 - 1  # centres of 2^16 equal intervals: exact in float32


def noisy_grid(grid: Tensor, amplitude: float, image_ids: Tensor, seed: int) -> Tensor:
    """The grid of each image (B, H, W, 2), every position moved by up to ``amplitude`` (units of the grid)."""
    height, width = grid.shape[:2]
    moved = grid + noise(image_ids, seed, height * width).view(-1, height, width, 2) * amplitude
    return moved.clamp(-1, 1)


def affine(mean: Tensor | None, std: Tensor | None, channels: Tensor, is_uint8: bool) -> tuple[Tensor, Tensor]:
    """Factor and summand per channel of (x / range - mean) / std, where range is 255 for uint8 and else 1."""
    mean = torch.zeros_like(channels) if mean is None else mean
    std = torch.ones_like(channels) if std is None else std
    return 1 / (std * 255 if is_uint8 else std), -mean / std


def sample(
    images: Tensor, offsets: Tensor, weights: Tensor, mean: Tensor | None, std: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Samples images (B, C, H, W) at the taps of one grid, offsets (P,), or of a grid per image, offsets (B, P)."""
    batch, channels, height, width = images.shape
    planes = images.reshape(batch, channels, height * width).float()
    top_left = offsets.long().expand(batch, -1)
    right, down = int(width > 1), width if height > 1 else 0
    value = torch.zeros(())
    for tap, step in enumerate((0, right, down, down + right)):
        pixel = planes.gather(2, (top_left + step).unsqueeze(1).expand_as(planes))
        term = weights[tap].expand(batch, -1).unsqueeze(1) * pixel
        value = term if tap == 0 else value + term
    is_uint8 = images.dtype == torch.uint8
    if out_dtype == torch.uint8:
        value = value.round()  # half to even
    elif is_uint8 or mean is not None:
        scale, shift = affine(mean, std, planes.new_ones(channels), is_uint8)
        value = value * scale.view(-1, 1) + shift.view(-1, 1)
    return value.to(out_dtype).view(images.shape)
