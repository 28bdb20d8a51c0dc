from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe_fast.config import FineTuneConfig
from pbe_fast.data.augment import AUGMENTS, augment
from pbe_fast.errors import InputError


def _images(n: int, channels: int = 3, height: int = 32, width: int = 20) -> Tensor:
    # No pixel of 0, so that padding can be told from the image.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def _shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The image moved by so many pixels; black where it has moved away from."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[:, y, x] = image[:, y - down, x - right]
    return out


def _found(image: Tensor, candidates: dict[tuple[int, int, bool], Tensor]) -> tuple[int, int, bool]:
    (found,) = [key for key, value in candidates.items() if torch.equal(image, value)]
    return found


@pytest.mark.parametrize("kind", ["crop", "crop+flip"])
def test_every_image_is_a_shifted_or_mirrored_copy(kind: str) -> None:
    images = _images(1).expand(200, -1, -1, -1)
    before = images.clone()
    got = augment(images, kind, torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert got.dtype == torch.uint8
    assert got.shape == images.shape
    moves = range(-2, 3)  # a sixteenth of 32
    candidates = {(dy, dx, False): _shifted(images[0], dy, dx) for dy in moves for dx in moves}
    candidates |= {(dy, dx, True): image.flip(-1) for (dy, dx, _), image in candidates.items()}
    found = [_found(image, candidates) for image in got]
    # 200 draws out of 5 x 5 shifts: each number turns up, and the two axes are drawn apart.
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(moves)
    assert len({(dy, dx) for dy, dx, _ in found}) > 15
    mirrored = sum(flip for _, _, flip in found)
    assert 60 < mirrored < 140 if kind == "crop+flip" else mirrored == 0


def test_each_image_keeps_its_place_in_the_batch() -> None:
    images = torch.arange(1, 65, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 3, 16, 16)
    got = augment(images, "crop+flip", torch.Generator().manual_seed(0))
    assert torch.equal(got.amax((1, 2, 3)), images.amax((1, 2, 3)))


def test_none_is_the_images_themselves() -> None:
    images = _images(3)
    assert augment(images, "none", torch.Generator()) is images


def test_the_generator_decides() -> None:
    images = _images(16)
    first, again, other = (augment(images, "crop+flip", torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_small_images_move_by_one_pixel() -> None:
    images = _images(50, channels=1, height=8, width=8)
    got = augment(images, "crop", torch.Generator().manual_seed(0))
    assert (got[:, :, 1:-1, 1:-1] > 0).all()
    assert (got == 0).any()


def test_the_options_offer_what_there_is() -> None:
    choices = FineTuneConfig.__dataclass_fields__["augment"].metadata["choices"]
    assert choices == (*AUGMENTS, "auto")


def test_what_is_not_settled_is_not_taken_for_a_crop() -> None:
    with pytest.raises(InputError, match=r"augment; got 'auto'; accepted: none, crop, crop\+flip"):
        augment(_images(2), "auto", torch.Generator())
