"""WaNet (Nguyen and Tran, 2021): a smooth warp of the whole image, and cover images with a noisier warp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.triggers.base import ImageShape, Trigger


class WaNet(Trigger):
    """Bilinear warp by a k x k control field upsampled to the image (WaNet, Eq. 4 to 6).

    Cover images get the same field plus U(-1, 1) / H per pixel and image (its cross mode), which keeps the classifier
    from answering to any warp at all.

    Args:
        image_shape: (C, H, W).
        seed: Fixes the control field and the cover noise.
        control_size: k.
        warp_strength: s, in pixels of the mean displacement times two.
        grid_rescale: Factor on the final grid.
    """

    name = "wanet"
    cover_ratio = 2.0
    redraw_each_epoch = True

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        seed: int = 0,
        control_size: int = 4,
        warp_strength: float = 0.5,
        grid_rescale: float = 1.0,
    ) -> None:
        super().__init__(image_shape, seed=seed)
        self.control_size = control_size
        self.warp_strength = warp_strength
        self.grid_rescale = grid_rescale
        _, h, w = image_shape
        generator = torch.Generator().manual_seed(seed)
        field = torch.rand(1, 2, control_size, control_size, generator=generator) * 2 - 1
        field = field / field.abs().mean()
        field = F.interpolate(field, size=(h, w), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        identity = torch.stack(
            torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")[::-1], -1
        )
        self._grid = ((identity + warp_strength * field / h) * grid_rescale).clamp(-1, 1)

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        grid = self._grid.to(images.device).expand(images.shape[0], -1, -1, -1)
        return F.grid_sample(images, grid, align_corners=True)

    def cover(self, images: Tensor, image_ids: Tensor) -> Tensor:
        """The warp plus U(-1, 1) / H per pixel and image."""
        _, h, w = self.image_shape
        noise = torch.rand(images.shape[0], h, w, 2, generator=torch.Generator().manual_seed(self.seed + 1)) * 2 - 1
        grid = (self._grid + noise / h).clamp(-1, 1)
        return F.grid_sample(images, grid.to(images.device), align_corners=True)

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {
            "control_size": self.control_size,
            "warp_strength": self.warp_strength,
            "grid_rescale": self.grid_rescale,
        }
