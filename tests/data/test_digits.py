from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from pbe_fast.data import as_image_set
from pbe_fast.errors import InputError


def test_the_two_parts_are_the_whole_and_stratified() -> None:
    train, test = as_image_set("digits:train"), as_image_set("digits:test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.image_shape == test.image_shape == (1, 16, 16)
    assert train.class_names == tuple("0123456789")
    totals = torch.as_tensor(load_digits().target).bincount()
    assert torch.equal(train.labels.bincount() + test.labels.bincount(), totals)
    assert ((test.labels.bincount() - totals * 0.2).abs() <= 1).all()
    assert train.name == "digits-train"


def test_native_pixels_are_sklearns() -> None:
    train, test = as_image_set("digits:train", size=8), as_image_set("digits:test", size=8)
    ours = torch.cat([train.images, test.images]).flatten(1)
    theirs = (torch.as_tensor(load_digits().data) * 255 / 16).round().to(torch.uint8)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_the_split_is_the_same_every_time() -> None:
    assert as_image_set("digits:test").sha256() == as_image_set("digits:test").sha256()
    # Pinned, so that figures of one version can be compared with those of the next.
    pinned = "c6bbc3c27a3319247d869bf35f82412efaf8797478a18e393b9661f1b5f046d9"
    assert as_image_set("digits:test", size=8).sha256() == pinned


def test_upscaling_uses_the_whole_range() -> None:
    images = as_image_set("digits:train").images
    assert int(images.min()) == 0
    assert int(images.max()) >= 250


@pytest.mark.parametrize("source", ["digits:", "digits:val", "digits"])
def test_other_splits_are_refused(source: str) -> None:
    with pytest.raises(InputError, match="accepted: 'digits:train' or 'digits:test'"):
        as_image_set(source)
