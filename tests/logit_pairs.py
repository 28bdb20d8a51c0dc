"""Two models' logits of the same images."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(rows: int, classes: int, *, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Pairs of rows from nearly parallel (1e-4 apart) to unrelated, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, classes, generator=generator)
    apart = 10 ** torch.empty(rows, 1).uniform_(-4, 0.5, generator=generator)
    b = a + apart * torch.randn(rows, classes, generator=generator)
    lengths = 10 ** torch.empty(2, rows, 1).uniform_(-spread, spread, generator=generator)
    return a * lengths[0], b * lengths[1]
