"""Random numbers that depend on what they are for, not on the order in which they are drawn (Salmon et al., 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random words of 32 bits, as int64, from four counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, seed >> 32 & MASK32
    for _ in range(10):
        # int64 products wrap modulo 2^64, and the mask takes the sign off the upper half.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & MASK32) ^ c1 ^ k0, b & MASK32, (a >> 32 & MASK32) ^ c3 ^ k1, a & MASK32
        k0, k1 = k0 + 0x9E3779B9 & MASK32, k1 + 0xBB67AE85 & MASK32
    return c0, c1, c2, c3


def random_words(image_ids: Tensor, seed: int | Tensor, stream: int | Tensor, count: int) -> Tensor:
    """Words of each image, whatever batch it is in: four for each counter (index / 4, stream, id low, id high).

    Args:
        image_ids: (B,) int64.
        seed: 64 bits; a tensor of no dimensions where it changes between the replays of a graph.
        stream: 32 bits that tell one use of a seed from another; likewise.
        count: Words per image.

    Returns:
        (B, count) int64, each of 32 random bits.
    """
    four = torch.arange((count + 3) // 4, device=image_ids.device)
    ids = image_ids.view(-1, 1)
    streams = torch.zeros_like(four) + stream
    words = torch.broadcast_tensors(*philox((four, streams, ids & MASK32, ids >> 32 & MASK32), seed))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]
