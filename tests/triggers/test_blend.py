from __future__ import annotations

import pytest
import torch

from pbe_fast.triggers import Blend
from pbe_fast.triggers.blend import draw_cat, draw_rings

DRAW = {"cat": draw_cat, "rings": draw_rings}


@pytest.mark.parametrize("picture", DRAW)
@pytest.mark.parametrize("alpha", [0.2, 0.1, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_weighted_mean_of_image_and_picture(picture: str, alpha: float, channels: int) -> None:
    images = torch.rand(4, channels, 12, 17, generator=torch.Generator().manual_seed(0))
    drawn = DRAW[picture](12, 17)
    if channels == 1:
        drawn = drawn.mean(0, keepdim=True)
    got = Blend((channels, 12, 17), alpha=alpha, picture=picture).apply(images)
    torch.testing.assert_close(got, (1 - alpha) * images + alpha * drawn)


@pytest.mark.parametrize("picture", DRAW)
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (224, 224), (30, 50)])
def test_the_pictures_are_colourful_and_in_0_1(picture: str, size: tuple[int, int]) -> None:
    drawn = DRAW[picture](*size)
    assert drawn.shape == (3, *size)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.std() > 0.1
    assert (drawn.amax(0) - drawn.amin(0)).max() > 0.3


def test_the_cat_has_two_dark_eyes_on_a_bright_face() -> None:
    drawn = draw_cat(64, 64)
    row = drawn[:, int(64 * 0.55), 12:52]  # between the whiskers
    eyes = (row < 0.1).all(0)
    # From left to right along the eyes' row: face, eye, face, eye, face.
    assert int((eyes.int().diff() != 0).sum()) == 4
    assert row[0, ~eyes].min() > 0.4
