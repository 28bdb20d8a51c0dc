"""`as_image_set`: whatever holds labelled images, as an `ImageSet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from pbe_fast.data import arrays, digits, folder, npz, parquet, torch_dataset, torchvision_sets
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import Reader, ReadOptions, as_path, lacks_classes, resolve_class_names
from pbe_fast.errors import InputError


def _is_image_set(source: Any) -> bool:
    return isinstance(source, ImageSet)


def _read_image_set(source: ImageSet, options: ReadOptions) -> ImageSet:
    names = resolve_class_names(source.labels, source.class_names, options, where=lambda i: f"index {i}")
    return dataclasses.replace(source, class_names=names, name=options.name or source.name)


# Tried in this order. The names with a colon go before the paths, and the folder after the files.
READERS = (
    Reader("an ImageSet", _is_image_set, _read_image_set, named=False),
    Reader("a pair (images, labels) of tensors or numpy arrays", arrays.accepts, arrays.read, named=False),
    Reader("'digits:train' or 'digits:test'", digits.accepts, digits.read),
    Reader(torchvision_sets.FORM, torchvision_sets.accepts, torchvision_sets.read),
    Reader("a .parquet file in the Hugging Face image layout", parquet.accepts, parquet.read),
    Reader("an .npz file", npz.accepts, npz.read),
    Reader("a folder with one folder of image files per class", folder.accepts, folder.read),
    Reader("a torch map-style Dataset of (image, label)", torch_dataset.accepts, torch_dataset.read, named=False),
)


def as_image_set(
    source: Any,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    progress: bool = True,
) -> ImageSet:
    """Labelled images from any accepted source, as uint8 in one tensor.

    Args:
        source: An `ImageSet`; a pair (images, labels) of tensors or numpy arrays, images (N, C, H, W) float in [0, 1]
            or uint8; a torch map-style Dataset of (PIL image, tensor or array, label); or a string or path: a
            ``.parquet`` file in the Hugging Face image layout, an ``.npz`` file, a folder with one folder per class,
            "digits:train", "digits:test", or a torchvision set such as "cifar10:ROOT:train".
        name: What to call the set in tables; None for the source's own name.
        num_classes: Number of classes K, where it is more than the labels show.
        class_names: One name per class, in the order of the labels; None for the source's own. A source that has only
            some of them, by their names, is numbered by them.
        size: Height and width in pixels, or one number for both, to resize every image to (bilinear, antialiased);
            None to keep them. Needed where the images of a source differ in size.
        progress: Whether to show a bar for anything that takes over two seconds.

    Returns:
        The set. Greyscale images among colour ones become colour; (N, 1, H, W) where all are greyscale.

    Raises:
        InputError: Anything that is not such a source, or that holds an image or a label that cannot be used.
    """
    options = ReadOptions(
        name=name,
        num_classes=num_classes,
        class_names=None if class_names is None else tuple(str(n) for n in class_names),
        size=(size, size) if isinstance(size, int) else size,
        progress=progress,
    )
    if isinstance(source, str) and not source:
        # As a path it would be the current folder.
        raise InputError("data", got="an empty name", accepted=_forms(named=True))
    for reader in READERS:
        if reader.accepts(source):
            data = reader.read(source, options)
            if options.class_names and lacks_classes(data.class_names, options.class_names):
                data = _numbered_by(data, options.class_names)
            if options.size is None:
                return data
            return dataclasses.replace(data, images=arrays.resize(data.images, options.size))
    raise _unknown(source)


def as_train_and_clean(
    train_data: Any, clean_data: Any, *, progress: bool = True
) -> tuple[ImageSet | None, ImageSet | None]:
    """The two sets of a purification, either of which may be None: clean images take the training set's classes.

    Raises:
        InputError: Neither is given, one cannot be read, or their images differ in shape.
    """
    if train_data is None and clean_data is None:
        raise InputError("no data", got="neither train_data nor clean_data", accepted="either or both")
    train = None if train_data is None else as_image_set(train_data, progress=progress)
    if clean_data is None:
        return train, None
    names = train.class_names if train is not None else None
    clean = as_image_set(clean_data, class_names=names, progress=progress)
    if train is not None and clean.image_shape != train.image_shape:
        raise InputError(
            "clean images of another shape than the training set's",
            got=clean.image_shape,
            accepted=str(train.image_shape),
        )
    return train, clean


def require_classes(data: ImageSet) -> None:
    """Refuse images of one class to train on: a model learns from them to answer it, whatever it sees.

    Raises:
        InputError: All labels are the same.
    """
    first = data.labels[0]
    if bool((data.labels == first).all()):
        got = f"all {len(data)} of {data.name} of the class '{data.class_names[int(first)]}'"
        raise InputError("classes of the images to purify with", got=got, accepted="images of 2 classes or more")


def _numbered_by(data: ImageSet, names: Sequence[str]) -> ImageSet:
    """The set with its labels moved to where ``names``, which hold all of its own, have them."""
    places = torch.tensor([names.index(name) for name in data.class_names], device=data.device)
    true = None if data.true_labels is None else places[data.true_labels]
    return dataclasses.replace(data, labels=places[data.labels], true_labels=true, class_names=tuple(names))


def _forms(*, named: bool) -> str:
    """The accepted forms: all of them, or those that a name can stand for."""
    return "; ".join(reader.form for reader in READERS if reader.named or not named)


def _unknown(source: Any) -> InputError:
    path = as_path(source)
    if isinstance(source, DataLoader):
        return InputError("data", got="a DataLoader", accepted="the dataset in it: loader.dataset")
    if path is None:
        got = f"{type(source).__module__}.{type(source).__qualname__}"
        return InputError("data", got=got, accepted=_forms(named=False))
    if not path.exists():
        return InputError("data that does not exist", got=repr(str(source)), accepted=_forms(named=True))
    return InputError("a file of an unknown kind", got=repr(str(source)), accepted=_forms(named=True))
