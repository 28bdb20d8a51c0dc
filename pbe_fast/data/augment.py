"""Random crops and flips of a whole uint8 batch at once, on the device where it rests."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Augment = Literal["none", "crop", "crop+flip"]
AUGMENTS: tuple[Augment, ...] = ("none", "crop", "crop+flip")


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Shift each image by up to a sixteenth of its height (2 px at 32, padded black), and mirror half of them.

    Args:
        images: (B, C, H, W), any dtype.
        kind: "none", "crop" (shifts) or "crop+flip".
        generator: On the CPU, so that the draws are the same on every device.

    Returns:
        (B, C, H, W) of the same dtype; ``images`` itself for "none".
    """
    if kind == "none":
        return images
    batch, _, height, width = images.shape
    pad = max(1, height // 16)
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    shift = torch.randint(0, 2 * pad + 1, (2, batch), generator=generator).to(images.device)
    out = windows[torch.arange(batch, device=images.device), :, shift[0], shift[1]]
    if kind == "crop+flip":
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(images.device)
        out = torch.where(mirrored.view(-1, 1, 1, 1), out.flip(-1), out)
    return out
