"""NumPy's ``.npz``: images and labels, and what is known about the poisoning."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pbe_fast.data import arrays, memory_map
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, as_labels, as_path, resolve_class_names
from pbe_fast.engine.files import atomic_write
from pbe_fast.errors import InputError, OutputError

LAYOUT = (
    "an .npz with arrays 'images' (N, C, H, W) and 'labels' (N,); optional: 'class_names', 'name', "
    "'poison_mask', 'true_labels'"
)


def accepts(source: Any) -> bool:
    """Whether ``source`` is the path of an ``.npz`` file."""
    path = as_path(source)
    return path is not None and path.suffix.lower() == ".npz"


def read(source: Any, options: ReadOptions) -> ImageSet:
    """The image set of an ``.npz`` file, written by `save_npz` or by hand.

    The images of an uncompressed file of 1 GiB or more stay in it and are read as they are used.

    Args:
        source: The path of the file.
        options: See `ReadOptions`.

    Raises:
        InputError: A missing or damaged file, absent arrays, an array of Python objects (which is a pickle, and is
            not loaded), or contents that make no image set.
    """
    path = Path(source).expanduser()
    stored = _load(path)
    try:
        return _image_set(stored, path, options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def save_npz(data: ImageSet, path: str | Path) -> None:
    """Write an image set, all of it, to an ``.npz`` file; `as_image_set` reads it back.

    The file appears under its name only when it is whole: it is written beside it first and then renamed.

    Args:
        data: The set.
        path: Where to; must end in ``.npz``. A file that is there is replaced, missing folders are made.

    Raises:
        InputError: Another ending.
        OutputError: A folder that cannot be made or written to, or a disk that is full.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".npz":
        raise InputError("file to write an image set to", got=str(path), accepted="a path that ends in .npz")
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **_arrays_of(data))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def _arrays_of(data: ImageSet) -> dict[str, Any]:
    tensors = {
        "images": data.images,
        "labels": data.labels,
        "poison_mask": data.poison_mask,
        "true_labels": data.true_labels,
    }
    stored: dict[str, Any] = {key: t.cpu().numpy() for key, t in tensors.items() if t is not None}
    return stored | {"class_names": np.array(data.class_names), "name": np.array(data.name)}


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise InputError("no such file", got=str(path), accepted=LAYOUT)
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("a file that is no zip archive, or not a whole one")
        with np.load(path, allow_pickle=False) as loaded:
            large = path.stat().st_size >= memory_map.MAP_FROM_BYTES and "images" in loaded.files
            images = memory_map.map_member(path, "images") if large else None
            mapped = {} if images is None else {"images": images}
            return {key: loaded[key] for key in loaded.files if key not in mapped} | mapped
    except Exception as error:  # a damaged file fails in whatever way its bytes suggest
        got = str(error) or type(error).__name__
        if "allow_pickle" in got:
            # numpy's advice is to load it all the same, which would run what is in it.
            got = "an array of Python objects, which is a pickle and was not loaded"
        raise InputError(f"an .npz file that cannot be read: {path}", got=got, accepted=LAYOUT) from error


def _image_set(stored: dict[str, NDArray[Any]], path: Path, options: ReadOptions) -> ImageSet:
    missing = [key for key in ("images", "labels") if key not in stored]
    if missing:
        raise InputError(
            f"arrays missing: {', '.join(missing)}", got=", ".join(stored) or "an empty archive", accepted=LAYOUT
        )
    images = arrays.to_uint8(stored["images"])
    labels = as_labels(stored["labels"], len(images))
    known = _class_names(stored["class_names"]) if "class_names" in stored else None
    names = resolve_class_names(labels, known, options, where=lambda i: f"index {i}")
    truth = stored.get("true_labels")
    mask = stored.get("poison_mask")
    if mask is not None and mask.dtype != np.bool_:
        accepted = f"bool of shape ({len(images)},), one per image"
        raise InputError("poison_mask", got=f"{mask.dtype} of shape {mask.shape}", accepted=accepted)
    return ImageSet(
        images,
        labels,
        names,
        poison_mask=None if mask is None else torch.as_tensor(mask),
        true_labels=None if truth is None else as_labels(truth, len(images)),
        name=options.name or (str(stored["name"]) if "name" in stored else path.stem),
    )


def _class_names(stored: NDArray[Any]) -> list[str]:
    if stored.ndim != 1:
        raise InputError("class_names", got=f"an array of shape {stored.shape}", accepted="(K,), one name per class")
    return [str(name) for name in stored.tolist()]
