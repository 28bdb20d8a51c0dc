"""The definition of the cosine distance and of the ranking by it, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements widened to float64 at a time: the definition must not need several times the memory of what it ranks.
_BLOCK = 1 << 22


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """The distance d = 1/2 |a/|a| - b/|b||^2 = 1 - cos(a, b) by row, in float64; edge cases as in the package.

    1 - <a, b>/(|a| |b|) is the same number, but in float32 all its digits cancel where the cosine is close to 1, and
    that is where the ranking takes place.
    """
    rows = max(_BLOCK // a.shape[1], 1)
    blocks = [_distance(u.double(), v.double()) for u, v in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(blocks).float()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    norm_a = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    norm_b = torch.linalg.vector_norm(b, dim=1, keepdim=True)
    distance = 0.5 * (a / norm_a - b / norm_b).square().sum(dim=1)
    # A zero vector has no direction: cosine 0. Beside a non-finite row the product is NaN, and so is the distance.
    directionless = (norm_a * norm_b)[:, 0] == 0
    return torch.where(directionless, 1.0, distance).clamp(max=2.0)


def rank_order(distance: Tensor) -> Tensor:
    """All indices by ascending distance; ties by ascending index; NaN and infinite distances last, by index."""
    return torch.where(distance.isfinite(), distance, torch.inf).argsort(stable=True)


def select_smallest(distance: Tensor, n: int) -> Tensor:
    """The first n of `rank_order`, in ascending order of index."""
    return rank_order(distance)[:n].sort().values
