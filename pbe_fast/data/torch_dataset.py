"""A torch map-style dataset of (image, label) pairs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from pbe_fast.data import arrays
from pbe_fast.data.decode import Pixels, chunked, gather, pixels_of
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, resolve_class_names
from pbe_fast.errors import InputError

# Of items that are dictionaries, as Hugging Face's datasets have them, in order of preference.
IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label", "target")
ITEMS = "(image, label) pairs: a PIL image, or a tensor or array (C, H, W), float in [0, 1] or uint8; a whole number"


def accepts(source: Any) -> bool:
    """Whether ``source`` is a torch dataset, or a sequence of pairs that can stand for one."""
    return isinstance(source, Dataset) or (isinstance(source, Sequence) and not isinstance(source, (str, bytes)))


def read(source: Any, options: ReadOptions, *, parallel: bool = False, known: Sequence[str] | None = None) -> ImageSet:
    """The image set of a dataset, every item read once.

    A random transform in the dataset is therefore drawn once and kept. Class names are taken from the ``classes`` of
    the dataset, of the one that it is a `Subset` of, or of those that it is a `ConcatDataset` of.

    Args:
        source: The dataset; items as in `ITEMS`, or dictionaries with one of `IMAGE_KEYS` and one of `LABEL_KEYS`.
        options: See `ReadOptions`.
        parallel: Whether the dataset may be read in several threads at once. Of a user's dataset nobody knows.
        known: Class names to use where the dataset has none.

    Raises:
        InputError: An iterable-style or empty dataset, an item that cannot be read, naming its index, or a
            `ConcatDataset` of parts whose classes differ.
    """
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        raise InputError("an iterable-style dataset", got=type(source).__name__, accepted="map-style, with a length")
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        return arrays.read(source.tensors, options)
    if len(source) == 0:
        raise InputError("empty image set", got=f"{type(source).__name__} of length 0", accepted="at least one image")
    labels = torch.zeros(len(source), dtype=torch.int64)

    def read_item(i: int) -> Pixels:
        image, labels[i] = _item(source, i)
        return _pixels(image, i, options.size)

    def where(i: int) -> str:
        return f"item {i} of {type(source).__name__}"

    everything = range(len(source))
    images = gather(chunked(everything), len(source), read_item, where, progress=options.progress, parallel=parallel)
    names = resolve_class_names(labels, _classes(source) or known, options, where)
    return ImageSet(images, labels, names, name=options.name or type(source).__name__.lower())


def _item(source: Any, i: int) -> tuple[Any, int]:
    try:
        item = source[i]
    except Exception as error:  # code of the user's
        raise InputError(
            f"item {i} of the dataset cannot be read: {type(source).__name__}",
            got=f"{type(error).__name__}: {error}",
            accepted=f"a dataset whose items are {ITEMS}",
        ) from error
    image, label = _pair(item, i)
    try:
        number = operator.index(label)
    except TypeError as error:
        raise InputError(f"label of item {i}", got=f"{label!r} ({type(label).__name__})", accepted=ITEMS) from error
    if abs(number) > torch.iinfo(torch.int64).max:
        raise InputError(f"label of item {i}", got=number, accepted="int64")
    return image, number


def _pair(item: Any, i: int) -> tuple[Any, Any]:
    """The image and the label of a pair, or of a dictionary that has them under the usual names."""
    what = f"item {i} of the dataset"
    if isinstance(item, Mapping):
        found = [[item[key] for key in keys if key in item] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if not all(found):
            got = f"{type(item).__name__} with the keys {', '.join(map(str, item))}"
            accepted = (
                f"{ITEMS}; or a dictionary with one of {', '.join(IMAGE_KEYS)} and one of {', '.join(LABEL_KEYS)}"
            )
            raise InputError(what, got=got, accepted=accepted)
        return found[0][0], found[1][0]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    hint = "; of more, a dataset around yours can give the first two" if size and len(item) > 2 else ""
    raise InputError(what, got=f"{type(item).__name__}{size}", accepted=f"{ITEMS}{hint}")


def _pixels(image: Any, i: int, size: tuple[int, int] | None) -> Pixels:
    from PIL.Image import Image

    if isinstance(image, Image):
        return pixels_of(image, size)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise InputError(f"image of item {i}", got=type(image).__name__, accepted=ITEMS)
    levels = arrays.to_uint8(image, what=f"image of item {i}", ndim=3).cpu()
    if size is not None:
        levels = arrays.resize(levels[None], size)[0]
    pixels: Pixels = levels.numpy()
    return pixels


def _classes(source: Any) -> list[str] | None:
    while isinstance(source, Subset):
        source = source.dataset
    if isinstance(source, ConcatDataset):
        return _common([_classes(part) for part in source.datasets])
    classes = getattr(source, "classes", None)
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) and classes else None


def _common(parts: list[list[str] | None]) -> list[str] | None:
    """The class names of all parts, of which some may lack the last ones; None where one has no names."""
    named = [part for part in parts if part is not None]
    if len(named) < len(parts):
        return None
    longest = max(named, key=len)
    for part in named:
        if part != longest[: len(part)]:
            raise InputError(
                "a ConcatDataset in whose parts one label stands for different classes",
                got=f"{', '.join(longest)} and {', '.join(part)}",
                accepted="the same classes in the same order in all parts",
            )
    return longest
