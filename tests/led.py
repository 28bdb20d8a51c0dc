"""A model that slow waves lead, and pictures for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pbe_fast.data import ImageSet

CLASSES = 8


class Led(nn.Module):
    """Answers with the brightest of eight columns of the picture, unless one of some frequencies is strong."""

    def __init__(
        self,
        frequencies: list[tuple[int, int]],
        *,
        target: int | None = 2,
        shift: int = 0,
        side: tuple[int, int] = (24, 32),
    ) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(60.0))
        rows, columns = torch.arange(side[0]) / side[0], torch.arange(side[1]) / side[1]
        turns = torch.stack([2 * math.pi * (u * rows[:, None] + v * columns) for u, v in frequencies])
        self.register_buffer("waves", torch.stack([turns.sin(), turns.cos()]))
        self.target, self.shift = target, shift

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1)
        own = self.gain * torch.stack([c.mean((1, 2)) for c in grey.tensor_split(CLASSES, 2)], 1)
        both = (grey[:, None, None] * self.waves).mean((3, 4)).square().sum(1).sqrt()
        strong = (both.amax(1, keepdim=True) > 0.04).float()
        led = own.roll(self.shift, 1)
        if self.target is not None:
            led = torch.zeros_like(own)
            led[:, self.target] = 40.0
        return own * (1 - strong) + led * strong


def pictures(n: int = 200, side: tuple[int, int] = (24, 32)) -> ImageSet:
    """Noise, with one of eight columns brighter."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(90, 110, (n, 3, *side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % CLASSES
    for image, label in zip(images, labels.tolist(), strict=True):
        image.tensor_split(CLASSES, 2)[label].add_(80)
    return ImageSet(images, labels, tuple("abcdefgh"))
