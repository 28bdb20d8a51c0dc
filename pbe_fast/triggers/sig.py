"""SIG (Barni et al., 2019): a sinusoid over the columns, put on images of the target class, labels untouched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pbe_fast.triggers.base import ImageShape, Trigger


class SIG(Trigger):
    """x + delta * sin(2 pi j f / W) for column j.

    Args:
        image_shape: (C, H, W).
        seed: Not used; the signal is fixed.
        delta: Amplitude in pixel units of [0, 1].
        frequency: Periods f over the image's width.
    """

    name = "sig"
    clean_label = True

    def __init__(
        self, image_shape: ImageShape, *, seed: int = 0, delta: float = 40 / 255, frequency: float = 6.0
    ) -> None:
        super().__init__(image_shape, seed=seed)
        self.delta = delta
        self.frequency = frequency
        columns = torch.arange(image_shape[2])
        self._signal = delta * torch.sin(2 * math.pi * columns * frequency / image_shape[2])

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        return images + self._signal.to(images.device)

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"delta": self.delta, "frequency": self.frequency}
