"""WaNet (Nguyen and Tran, 2021): a smooth warp of the whole image, and cover images with a noisier warp."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.kernels.warp import WarpPlan, control_field, warp, warp_grid
from pbe_fast.triggers.base import ImageShape, Trigger

# The field has its square of points; beyond the pixels of an image they say nothing.
_MAX_CONTROL = 1024


class WaNet(Trigger):
    """Bilinear warp by a k x k control field upsampled to the image (WaNet, Eq. 3 to 5).

    Cover images get the same field plus U(-1, 1) / H per pixel and image (its cross mode), which keeps the classifier
    from answering to any warp at all.

    Args:
        image_shape: (C, H, W).
        seed: Fixes the control field and the cover noise.
        control_size: k.
        warp_strength: s: the control points move by s / 2 pixels along each axis in the mean.
        grid_rescale: Factor on the final grid.

    Raises:
        InputError: No control point, or a factor that is not finite.
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
        if not 1 <= control_size <= _MAX_CONTROL:
            raise InputError("control_size of the wanet trigger", got=control_size, accepted=f"1 to {_MAX_CONTROL}")
        if not (math.isfinite(warp_strength) and math.isfinite(grid_rescale)):
            got = f"{warp_strength} and {grid_rescale}"
            raise InputError("warp_strength and grid_rescale of the wanet trigger", got=got, accepted="finite")
        self.control_size = control_size
        self.warp_strength = warp_strength
        self.grid_rescale = grid_rescale
        _, h, w = self.image_shape
        field = control_field(control_size, seed=seed)
        self._plan = WarpPlan.of(warp_grid(field, h, w, warp_strength=warp_strength, grid_rescale=grid_rescale))

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        return warp(images, self._plan.to(images.device))

    def cover(self, images: Tensor, image_ids: Tensor, *, draw: int = 0, others: Tensor | None = None) -> Tensor:
        """The warp plus U(-1, 1) / H per pixel, image and draw."""
        seed = (self.seed % 2**31) << 32 | draw % 2**32
        plan = self._plan.to(images.device)
        return warp(images, plan, noise=1.0, image_ids=image_ids, seed=seed).clamp_(0, 1)

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {
            "control_size": self.control_size,
            "warp_strength": self.warp_strength,
            "grid_rescale": self.grid_rescale,
        }
