"""PGD on perturbations that are smooth over the image: a coarse grid of values, spread bilinearly over the pixels.

What PGD finds in a small box is mostly fine noise. A trigger that is a faint picture (Blend) is none: it moves whole
regions, and further than that box reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Spread = tuple[Tensor, Tensor]


def spread_matrices(grid: int, image_shape: Sequence[int], device: torch.device | str = "cpu") -> Spread:
    """How a grid of values is spread over an image, along its rows and along its columns.

    Args:
        grid: Values along each axis; along a shorter one as many as it has pixels.
        image_shape: (..., H, W).
        device: Of the result.

    Returns:
        (H, values) and (W, values) float32, whose rows sum to 1: `F.interpolate`'s bilinear weights.
    """

    def along(size: int) -> Tensor:
        unit = torch.eye(min(grid, size), dtype=torch.float32)
        return F.interpolate(unit[None], size, mode="linear", align_corners=False)[0].T.contiguous().to(device)

    height, width = image_shape[-2:]
    return along(height), along(width)


@torch.no_grad()
def smooth_step_(
    adversarial: Tensor, gradient: Tensor, images: Tensor, spread: Spread, *, eps: float, alpha: float
) -> Tensor:
    """A step of PGD on the grid, in place.

    Every value of the grid moves by ``alpha`` in the direction that raises the loss; a pixel stays within ``eps`` of
    its image, and in [0, 1].

    Args:
        adversarial: (B, C, H, W) float32, changed.
        gradient: Of the loss, (B, C, H, W) of any float dtype.
        images: (B, C, H, W) float32, the centres of the balls.
        spread: Of `spread_matrices`.
        eps: Radius.
        alpha: Step size.

    Returns:
        ``adversarial``.
    """
    # Whatever the caller has switched on: the products are small, and a sign near zero is all that they are for.
    with torch.autocast(adversarial.device.type, enabled=False):
        step = _spread(_gathered(gradient.float(), spread).sign_(), spread)
    adversarial.sub_(images).add_(step, alpha=alpha).clamp_(-eps, eps).add_(images).clamp_(0, 1)
    return adversarial


# Both by two products of matrices that find channels_last as it lies.


def _gathered(gradient: Tensor, spread: Spread) -> Tensor:
    """The gradient with respect to the grid, by the chain rule, (B, values, values, C)."""
    rows, columns = spread
    b, c, h, w = gradient.shape
    lines = rows.T @ gradient.permute(0, 2, 3, 1).reshape(b, h, w * c)
    return columns.T @ lines.view(b, -1, w, c)


def _spread(values: Tensor, spread: Spread) -> Tensor:
    """A grid (B, values, values, C) over the images, (B, C, H, W) in channels_last."""
    rows, columns = spread
    b, n, _, c = values.shape
    lines = (columns @ values).view(b, n, -1)
    return (rows @ lines).view(b, len(rows), len(columns), c).permute(0, 3, 1, 2)
