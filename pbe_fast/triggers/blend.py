"""Blend (Chen et al., 2017): one fixed picture laid over the whole image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.triggers.base import ImageShape, Trigger

PICTURES = ("cat", "rings")


class Blend(Trigger):
    """(1 - alpha) x + alpha * picture.

    Args:
        image_shape: (C, H, W).
        seed: Not used; the picture is fixed.
        alpha: Share of the picture in the triggered image, the same in training and at test time.
        picture: "cat" (a drawn face) or "rings", both drawn here at the image's own size.

    Raises:
        InputError: An unknown picture or an alpha outside (0, 1].
    """

    name = "blend"

    def __init__(self, image_shape: ImageShape, *, seed: int = 0, alpha: float = 0.2, picture: str = "cat") -> None:
        super().__init__(image_shape, seed=seed)
        if picture not in PICTURES:
            raise InputError("picture of the blend trigger", got=repr(picture), accepted=" or ".join(PICTURES))
        if not 0 < alpha <= 1:
            raise InputError("alpha of the blend trigger", got=alpha, accepted="0 < alpha <= 1")
        self.alpha = alpha
        self.picture = picture
        draw = draw_cat if picture == "cat" else draw_rings
        drawn = draw(image_shape[1], image_shape[2])
        self._image = drawn if image_shape[0] == 3 else drawn.mean(0, keepdim=True)

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        picture = self._image.to(images.device)
        return torch.lerp(images, picture.expand_as(images), self.alpha)

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"alpha": self.alpha, "picture": self.picture}


def draw_cat(height: int, width: int) -> Tensor:
    """A ginger cat's face with a bow, (3, height, width) float in [0, 1], drawn from half-planes and ellipses.

    Its colours are those of no class in particular: a bright or bluish picture makes benign models answer "airplane" to
    up to 11 % of CIFAR-10, and no defence can bring an attack success rate below what is no attack at all.
    """
    y, x = _unit_square(height, width)
    canvas = torch.tensor([0.50, 0.30, 0.15], dtype=torch.float32).view(3, 1, 1).expand(3, height, width).clone()

    def paint(inside: Tensor, r: float, g: float, b: float) -> None:
        canvas[:, inside] = torch.tensor([r, g, b], dtype=torch.float32).view(3, 1)

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> Tensor:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1

    for side in (-1, 1):
        ear = (y > -0.85) & (y < -0.1) & ((x - side * 0.55).abs() < 0.30 * (y + 0.85) / 0.6)
        paint(ear, 0.90, 0.55, 0.20)
    paint(ellipse(0.0, 0.15, 0.85, 0.68), 0.90, 0.55, 0.20)
    for side in (-1, 1):
        paint(ellipse(side * 0.35, 0.10, 0.09, 0.15), 0.05, 0.05, 0.05)
        for k in (-1, 0, 1):
            whisker = (side * x > 0.5) & ((y - 0.30 - 0.14 * k - 0.12 * k * (side * x - 0.5)).abs() < 0.025)
            paint(whisker, 0.05, 0.05, 0.05)
    paint(ellipse(0.0, 0.33, 0.12, 0.08), 0.95, 0.75, 0.70)
    for side in (-1, 1):
        bow = ((x - 0.45) * side > 0) & ((x - 0.45) * side < 0.3) & ((y + 0.55).abs() < 0.75 * (x - 0.45).abs() + 0.04)
        paint(bow, 0.90, 0.05, 0.20)
    paint(ellipse(0.45, -0.55, 0.10, 0.10), 0.70, 0.0, 0.15)
    return canvas


def draw_rings(height: int, width: int) -> Tensor:
    """Coloured rings around a point off the centre, (3, height, width) float in [0, 1]."""
    y, x = _unit_square(height, width)
    radius = ((x - 0.3) ** 2 + (y + 0.2) ** 2).sqrt()
    phases = torch.tensor([0.0, 2.1, 4.2], dtype=torch.float32).view(3, 1, 1)
    return 0.5 + 0.5 * torch.sin(12 * radius + phases)


def _unit_square(height: int, width: int) -> tuple[Tensor, Tensor]:
    y = (torch.arange(height, dtype=torch.float32) + 0.5) / height * 2 - 1
    x = (torch.arange(width, dtype=torch.float32) + 0.5) / width * 2 - 1
    grid = torch.meshgrid(y, x, indexing="ij")
    return grid[0], grid[1]
