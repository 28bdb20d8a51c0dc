"""Pixel normalisation as a part of the model, so that every caller speaks in images of [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pbe_fast.errors import InputError


class Normalized(nn.Module):
    """A network behind ``(images - mean) / std``.

    Perturbation sizes (eps, alpha) and triggers then stay in pixel units, and an exported graph takes raw images.

    Args:
        net: Takes normalised images (B, C, H, W), returns logits (B, K).
        mean: One mean per channel, in units of [0, 1].
        std: One standard deviation per channel, in units of [0, 1], all above zero.

    Raises:
        InputError: Means and deviations of different lengths, not finite, or a deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = tuple(map(float, mean)), tuple(map(float, std))
        if not means or len(means) != len(stds):
            raise InputError("mean and std", got=f"{len(means)} and {len(stds)} values", accepted="one per channel")
        if not all(map(math.isfinite, means + stds)) or min(stds) <= 0:
            raise InputError("mean and std", got=f"{means} and {stds}", accepted="finite numbers, std above 0")
        self.net = net
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits
