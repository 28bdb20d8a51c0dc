"""Scikit-learn's bundled digits: 1,797 handwritten digits that need no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, as_path, resolve_class_names
from pbe_fast.data.splitting import split_indices
from pbe_fast.errors import InputError

SPLITS = ("train", "test")
TEST_FRACTION = 0.2
SPLIT_SEED = 0
# At the native 8x8 a 3x3 patch covers 14 % of the image, a warping field has no room to be smooth, and a network that
# halves the image twice ends on 2x2 pixels; at 16x16 it is 3.5 % and 4x4. Bilinear, because nearest would make every
# image of constant 2x2 blocks, in which any trigger finer than a block would be told apart by that alone.
SIZE = (16, 16)
LEVELS = 16


def accepts(source: Any) -> bool:
    """Whether ``source`` names the digits."""
    path = as_path(source)
    return path is not None and (str(source).startswith("digits:") or (str(source) == "digits" and not path.exists()))


def read(source: Any, options: ReadOptions) -> ImageSet:
    """The training (1,438) or test (359) digits, split once and for all, each class in the same proportion.

    Args:
        source: "digits:train" or "digits:test".
        options: See `ReadOptions`; the size is 16x16 unless it says otherwise (the native one is 8x8).

    Raises:
        InputError: Another split.
    """
    part = str(source).removeprefix("digits:")
    if part not in SPLITS:
        raise InputError("split of the digits", got=repr(str(source)), accepted="'digits:train' or 'digits:test'")
    native, targets = _load()
    test, train = split_indices(targets, TEST_FRACTION, seed=SPLIT_SEED, stratified=True)
    where = train if part == "train" else test
    size = options.size or SIZE
    floats = F.interpolate(native[where] * (255 / LEVELS), size=size, mode="bilinear", antialias=True)
    labels = targets[where]
    names = resolve_class_names(labels, [str(k) for k in range(10)], options, where=lambda i: f"index {i}")
    return ImageSet(
        floats.round_().clamp_(0, 255).to(torch.uint8), labels, names, name=options.name or f"digits-{part}"
    )


@cache
def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.as_tensor(digits.images, dtype=torch.float32)[:, None], torch.as_tensor(digits.target).long()
