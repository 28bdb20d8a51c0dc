"""A tree of image files with one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pbe_fast.data.decode import chunked, decode, gather
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, as_path, resolve_class_names
from pbe_fast.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")
LAYOUT = f"a folder that holds one folder per class, with image files ({', '.join(IMAGE_SUFFIXES)}) in those"


def accepts(source: Any) -> bool:
    """Whether ``source`` is the path of a folder."""
    path = as_path(source)
    return path is not None and path.is_dir()


def read(source: Any, options: ReadOptions) -> ImageSet:
    """The image set of a class-per-folder tree.

    Classes are numbered in the sorted order of the folder names, as torchvision's ``ImageFolder`` numbers them (so
    "10" comes before "2"). Where class names are given, each folder gets the number of its name among them instead,
    so that a set in which some classes are absent agrees with the full one. Folders within a class folder are read
    too; hidden files and files with other endings are passed over.

    Args:
        source: The path of the tree.
        options: See `ReadOptions`.

    Raises:
        InputError: A tree of another layout, a folder whose name is not a class name, no images, or an image that
            does not decode (naming the file).
    """
    root = Path(source).expanduser()
    folders = class_folders(root)
    _check_layout(root, folders)
    classes = [folder.name for folder in folders]
    numbers = _class_numbers(root, classes, options.class_names)
    files = [(path, number) for folder, number in zip(folders, numbers, strict=True) for path in _image_files(folder)]
    if not files:
        raise InputError("empty image set", got=f"no image files in the class folders of {root}", accepted=LAYOUT)
    paths = [path for path, _ in files]
    labels = torch.tensor([number for _, number in files], dtype=torch.int64)

    def where(i: int) -> str:
        return str(paths[i])

    names = resolve_class_names(labels, options.class_names or classes, options, where)
    images = gather(
        chunked(paths), len(paths), lambda path: decode(path, options.size), where, progress=options.progress
    )
    return ImageSet(images, labels, names, name=options.name or root.resolve().name)


def class_folders(root: Path) -> list[Path]:
    """The folders of a tree that stand for classes, sorted by name."""
    return sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _check_layout(root: Path, folders: list[Path]) -> None:
    if not folders:
        files = sorted(p.name for p in root.iterdir() if p.is_file())
        got = f"{root} with {len(files)} files and no folders" + (f" (first file: {files[0]})" if files else "")
        raise InputError("not a class-per-folder tree", got=got, accepted=LAYOUT)
    # Read as classes, the splits of a data set would make a plausible and useless set of two classes.
    if all(folder.name.lower() in SPLIT_NAMES for folder in folders):
        raise InputError(
            "a folder of splits, not of classes", got=f"{root} with {[p.name for p in folders]}", accepted="one of them"
        )


def _class_numbers(root: Path, classes: list[str], given: tuple[str, ...] | None) -> list[int]:
    if given is None:
        return list(range(len(classes)))
    unknown = [name for name in classes if name not in given]
    if unknown:
        raise InputError(
            f"folders of {root} that are not among the class names",
            got=", ".join(unknown[:5]),
            accepted=", ".join(given[:10]) + (", ..." if len(given) > 10 else ""),
        )
    return [given.index(name) for name in classes]


def _image_files(folder: Path) -> list[Path]:
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders.sort()
        found += [
            Path(parent, name)
            for name in sorted(files)
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return found
