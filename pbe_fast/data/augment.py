"""Random crops and flips of a whole uint8 batch at once, on the device where it rests."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.errors import InputError

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
    moves = draw_moves(len(images), int(images.shape[2]), kind, generator)
    # Out of memory that is not pinned, it is read before the call returns.
    return move(images, moves.to(images.device, non_blocking=True))


def draw_moves(count: int, height: int, kind: str, generator: torch.Generator) -> Tensor:
    """How each of ``count`` images is moved: (count, 3) int16 on the CPU of (down, right, mirrored).

    Drawn for a whole pass at once, so that a pass costs one transfer to the device.

    Raises:
        InputError: Another ``kind``; "auto" is for a model to settle first.
    """
    if kind not in AUGMENTS:
        raise InputError("augment", got=repr(kind), accepted=", ".join(AUGMENTS))
    moves = torch.zeros(count, 3, dtype=torch.int16)
    if kind != "none":
        reach = _reach(height)
        moves[:, :2] = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    if kind == "crop+flip":
        moves[:, 2] = torch.rand(count, dtype=torch.float32, generator=generator) < 0.5
    return moves


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Images (B, C, H, W) moved by (B, 3) ``moves`` on their device, as `draw_moves` makes them for their height."""
    batch, channels, height, width = images.shape
    reach = _reach(height)
    down, right, mirrored = moves.long()[:, :, None].unbind(1)
    rows = torch.arange(height, device=images.device) + (reach - down)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored == 1, columns.flip(0), columns) + (reach - right)
    # One gather out of black-framed planes: no windows, no mirrored copy, and nothing that asks for a value.
    source = (rows[:, :, None] * (width + 2 * reach) + columns[:, None, :]).view(batch, 1, -1)
    framed = F.pad(images, (reach,) * 4).flatten(2)
    return framed.gather(2, source.expand(-1, channels, -1)).view(images.shape)


def _reach(height: int) -> int:
    return max(1, height // 16)
