"""SIG (Barni et al., 2019): a sinusoid over the columns, put on images of the target class, labels untouched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.triggers.base import ImageShape, Trigger


class SIG(Trigger):
    """x + delta * sin(2 pi j f / W) for column j.

    Args:
        image_shape: (C, H, W).
        seed: Not used; the signal is fixed.
        delta: Amplitude in pixel units of [0, 1].
        frequency: Periods f over the image's width.

    Raises:
        InputError: An amplitude outside (0, 1], or a frequency that is not positive.
    """

    name = "sig"
    clean_label = True

    def __init__(
        self, image_shape: ImageShape, *, seed: int = 0, delta: float = 40 / 255, frequency: float = 6.0
    ) -> None:
        super().__init__(image_shape, seed=seed)
        if not 0 < delta <= 1:
            raise InputError("delta of the sig trigger", got=delta, accepted="0 < delta <= 1, in pixel units of [0, 1]")
        if not 0 < frequency < math.inf:
            raise InputError("frequency of the sig trigger", got=frequency, accepted="above 0")
        self.delta = delta
        self.frequency = frequency
        columns = torch.arange(self.image_shape[2], dtype=torch.float32)
        self._signal = delta * torch.sin(2 * math.pi * columns * frequency / self.image_shape[2])

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        return images + self._signal.to(images.device)

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"delta": self.delta, "frequency": self.frequency}
