"""BadNets (Gu et al., 2017): a solid patch in the bottom-right corner."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.triggers.base import ImageShape, Trigger


class BadNets(Trigger):
    """A white square, 3 x 3 at 32 pixels and growing with the image.

    Args:
        image_shape: (C, H, W).
        seed: Not used; the patch is fixed.
        patch_size: Side of the patch as a fraction of the image's shorter side.
        patch_value: Brightness in [0, 1].

    Raises:
        InputError: A patch larger than the image or a brightness outside [0, 1].
    """

    name = "badnets"

    def __init__(
        self, image_shape: ImageShape, *, seed: int = 0, patch_size: float = 3 / 32, patch_value: float = 1.0
    ) -> None:
        super().__init__(image_shape, seed=seed)
        if not 0 < patch_size <= 1:
            raise InputError("patch_size of the badnets trigger", got=patch_size, accepted="0 < patch_size <= 1")
        if not 0 <= patch_value <= 1:
            raise InputError("patch_value of the badnets trigger", got=patch_value, accepted="0 to 1")
        self.patch_size = patch_size
        self.patch_value = patch_value
        self._side = max(1, round(patch_size * min(self.image_shape[1:])))

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        out = images.clone()
        out[:, :, -self._side :, -self._side :] = self.patch_value
        return out

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"patch_size": self.patch_size, "patch_value": self.patch_value}
