"""Splitting a set in two, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from pbe_fast.data.image_set import ImageSet
from pbe_fast.errors import InputError


def split(data: ImageSet, amount: float, *, seed: int, stratified: bool = True) -> tuple[ImageSet, ImageSet]:
    """Part of a set, drawn at random, and the rest of it.

    Both parts keep the order of ``data``.

    Args:
        data: The set.
        amount: A float in (0, 1) for a fraction of the images, or an int for a number of them.
        seed: Seed of the draw; the same seed draws the same images on every machine.
        stratified: Whether to draw from each class (of ``labels``) in proportion, to within one image.

    Returns:
        (the part drawn, the rest).

    Raises:
        InputError: An amount that leaves either part empty.
    """
    drawn, rest = split_indices(data.labels.cpu(), amount, seed=seed, stratified=stratified)
    return data.select(drawn.to(data.device)), data.select(rest.to(data.device))


def split_indices(labels: Tensor, amount: float, *, seed: int, stratified: bool = True) -> tuple[Tensor, Tensor]:
    """The indices of `split`, each (n,) int64 and ascending, from labels (N,) int64 on the CPU."""
    total = len(labels)
    number = _number(amount, total)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    if stratified:
        shares = _largest_remainder(labels.bincount(), number).tolist()
        drawn = torch.cat([order[labels[order] == k][:n] for k, n in enumerate(shares) if n])
    else:
        drawn = order[:number]
    mask = torch.zeros(total, dtype=torch.bool)
    mask[drawn] = True
    return mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]


def _number(amount: float, total: int) -> int:
    is_fraction = isinstance(amount, float)
    number = round(amount * total) if is_fraction and 0 < amount < 1 else amount
    if isinstance(amount, bool) or not isinstance(number, int) or not 0 < number < total:
        got = f"{amount!r}, which is {number} of {total} images" if is_fraction else f"{amount!r} of {total} images"
        raise InputError(
            "amount to split off", got=got, accepted=f"a fraction in (0, 1) or a whole number from 1 to {total - 1}"
        )
    return number


def _largest_remainder(counts: Tensor, number: int) -> Tensor:
    # Whole-number arithmetic: quotas in floating point could round to one image more or less than asked for.
    total = int(counts.sum())
    shares = counts * number // total
    remainders = counts * number % total
    extra = remainders.argsort(descending=True, stable=True)[: number - int(shares.sum())]
    shares[extra] += 1
    return shares
