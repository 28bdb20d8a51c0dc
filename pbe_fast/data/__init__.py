"""Labelled images: the one form that the package works on, and a reader for each form that they come in."""

from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.npz import save_npz
from pbe_fast.data.sources import as_image_set, as_train_and_clean, require_classes
from pbe_fast.data.splitting import split

__all__ = ["ImageSet", "as_image_set", "as_train_and_clean", "require_classes", "save_npz", "split"]
