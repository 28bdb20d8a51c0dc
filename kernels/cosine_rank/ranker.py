"""Ranking in blocks, so that the N x K logits never have to be in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pbe_fast.kernels import cosine_rank


class CosineRanker:
    """Collects the distances of N rows from blocks of logits, in any order.

    Args:
        n_total: N, the number of rows.
        device: Where the distances are kept; 5 bytes per row. Default: the CPU.
    """

    def __init__(self, n_total: int, device: torch.device | str | None = None) -> None:
        if n_total < 0:
            raise ValueError(f"number of rows; got {n_total}; accepted: at least 0")
        self._distances = torch.full((n_total,), torch.nan, dtype=torch.float32, device=device)
        # NaN cannot mark the rows still missing: it is also the distance of a non-finite row.
        self._seen = torch.zeros(n_total, dtype=torch.bool, device=device)

    def update(self, a_block: Tensor, b_block: Tensor, start: int) -> None:
        """Takes the logits of rows start ... start + B - 1; a row given twice keeps the later distance.

        Args:
            a_block: (B, K) logits, as for `cosine_distance`.
            b_block: (B, K) logits on the same device.
            start: Index of the first row.

        Raises:
            ValueError: The block reaches beyond the rows, or `cosine_distance` refuses it.
            TypeError: As `cosine_distance` raises it.
        """
        distance = cosine_rank.cosine_distance(a_block, b_block)
        end = start + distance.shape[0]
        if start < 0 or end > self._distances.shape[0]:
            raise ValueError(f"rows of the block; got {start} to {end}; accepted: within 0 to {len(self._distances)}")
        self._distances[start:end] = distance
        self._seen[start:end] = True

    def distances(self) -> Tensor:
        """The distances of all rows, (N,) float32.

        Raises:
            RuntimeError: Some rows were never given.
        """
        seen = int(self._seen.sum().item())
        if seen < self._seen.shape[0]:
            raise RuntimeError(f"distances of all rows; got the logits of {seen}; accepted: all {len(self._seen)}")
        return self._distances

    def select(self, *, n: int | None = None, fraction: float | None = None) -> Tensor:
        """The n rows of smallest distance, in ascending order of index; see `select_top`."""
        return cosine_rank.select_top(self.distances(), n=n, fraction=fraction)

    def rank(self, *, n: int | None = None, fraction: float | None = None) -> cosine_rank.RankResult:
        """The rows in rank order and the number of non-finite ones; see `rank`."""
        return cosine_rank.rank(self.distances(), n=n, fraction=fraction)
