from __future__ import annotations

from typing import Any

import pytest
import torch

from pbe_fast.data import ImageSet, split
from pbe_fast.errors import InputError


def _numbered(counts: list[int]) -> ImageSet:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    names = tuple(str(k) for k in range(len(counts)))
    return ImageSet(images, labels, names, poison_mask=images.flatten() % 2 == 0)


def _ids(data: ImageSet) -> list[int]:
    return data.images.flatten().tolist()


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("amount", "number"), [(0.25, 50), (7, 7), (199, 199), (0.001 + 0.004, 1), (1, 1)])
def test_two_parts_in_order_that_make_the_whole(amount: float, number: int, stratified: bool) -> None:
    data = _numbered([100, 60, 0, 40])
    drawn, rest = split(data, amount, seed=3, stratified=stratified)
    assert len(drawn) == number
    assert sorted(_ids(drawn) + _ids(rest)) == list(range(200))
    assert _ids(drawn) == sorted(_ids(drawn))
    for part in (drawn, rest):
        assert torch.equal(part.labels, data.labels[_ids(part)])
        assert part.poison_mask is not None
        assert part.poison_mask.tolist() == [i % 2 == 0 for i in _ids(part)]


def test_each_class_in_proportion() -> None:
    drawn, _ = split(_numbered([100, 60, 0, 40]), 0.1, seed=0)
    assert drawn.labels.bincount(minlength=4).tolist() == [10, 6, 0, 4]
    drawn, _ = split(_numbered([33, 33, 34]), 10, seed=0)
    assert sorted(drawn.labels.bincount().tolist()) == [3, 3, 4]


def test_the_seed_decides() -> None:
    data = _numbered([100, 100])
    assert _ids(split(data, 0.5, seed=1)[0]) == _ids(split(data, 0.5, seed=1)[0])
    assert _ids(split(data, 0.5, seed=1)[0]) != _ids(split(data, 0.5, seed=2)[0])
    # Drawn at random, not from the front.
    assert _ids(split(data, 0.5, seed=1)[0])[:20] != list(range(20))


@pytest.mark.parametrize("amount", [0, 10, 11, -1, 0.0, 1.0, 1.5, 0.01, 0.99, float("nan"), True])
def test_amounts_that_leave_a_part_empty(amount: Any) -> None:
    with pytest.raises(InputError, match=r"amount to split off; got .*accepted: a fraction in"):
        split(_numbered([5, 5]), amount, seed=0)
