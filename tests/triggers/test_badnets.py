from __future__ import annotations

import pytest
import torch

from pbe_fast.triggers import BadNets


@pytest.mark.parametrize(("size", "side"), [(32, 3), (224, 21), (16, 2), (64, 6), (8, 1), (4, 1)])
def test_a_white_square_in_the_bottom_right_corner(size: int, side: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.9
    triggered = BadNets((3, size, size)).apply(images)
    changed = (triggered != images).any(0).any(0)
    rows, columns = changed.nonzero().T
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == list(range(size - side, size))
    assert int(changed.sum()) == side * side
    assert (triggered[:, :, -side:, -side:] == 1).all()


def test_rows_and_columns_29_to_31_at_32_pixels() -> None:
    triggered = BadNets((1, 32, 32)).apply(torch.zeros(1, 1, 32, 32))
    assert triggered[0, 0].nonzero().tolist() == [[r, c] for r in (29, 30, 31) for c in (29, 30, 31)]


def test_the_shorter_side_counts_and_the_brightness_is_an_option() -> None:
    triggered = BadNets((1, 20, 64), patch_size=0.25, patch_value=0.5).apply(torch.zeros(1, 1, 20, 64))
    expected = torch.zeros(20, 64)
    expected[15:, 59:] = 0.5
    assert torch.equal(triggered[0, 0], expected)
