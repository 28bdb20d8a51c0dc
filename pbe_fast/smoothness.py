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
        grid: Values along each axis; of a smaller image as many as it has pixels.
        image_shape: (..., H, W).
        device: Of the result.

    Returns:
        (H, grid) and (W, grid) float32, whose rows sum to 1: `F.interpolate`'s bilinear weights.
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
    """A step of PGD in the max norm of the grid, in place.

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
    rows, columns = spread
    # Whatever the caller has switched on: the products are small, and a sign near zero is all that they are for.
    with torch.autocast(adversarial.device.type, enabled=False):
        # The chain rule: the gradient with respect to the grid.
        values = rows.T @ gradient.float() @ columns
        adversarial.add_(rows @ values.sign() @ columns.T, alpha=alpha)
    adversarial.copy_(torch.maximum(torch.minimum(adversarial, images + eps), images - eps).clamp_(0, 1))
    return adversarial
