"""torchvision's data sets by name, from a folder where they already are; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbe_fast.data import torch_dataset
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, as_path
from pbe_fast.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One data set: torchvision's class, how it names the split, and what it does not say itself."""

    cls: str
    by_flag: bool = False  # train=True or False, where others take split="train" or "test"
    size: tuple[int, int] | None = None  # for sets whose images differ in size
    num_classes: int | None = None  # for sets without a list of class names


SETS = {
    "cifar10": Entry("CIFAR10", by_flag=True),
    "cifar100": Entry("CIFAR100", by_flag=True),
    "mnist": Entry("MNIST", by_flag=True),
    "fashion-mnist": Entry("FashionMNIST", by_flag=True),
    "svhn": Entry("SVHN", num_classes=10),
    "stl10": Entry("STL10"),
    "gtsrb": Entry("GTSRB", size=(32, 32), num_classes=43),
}
SPLITS = ("train", "test")
FORM = f"'NAME:ROOT:train' or 'NAME:ROOT:test' with NAME one of {', '.join(SETS)}"


def accepts(source: Any) -> bool:
    """Whether ``source`` begins with the name of a known set and a colon."""
    return as_path(source) is not None and str(source).partition(":")[0].lower() in SETS and ":" in str(source)


def read(source: Any, options: ReadOptions) -> ImageSet:
    """The image set of a torchvision data set.

    Args:
        source: "cifar10:ROOT:train", "gtsrb:ROOT:test" and the like; ROOT is what torchvision calls root.
        options: See `ReadOptions`. GTSRB's crops differ in size: they become 32x32 unless it says otherwise.

    Raises:
        InputError: Another split, or a root where the set is not, or not whole.
    """
    name, _, rest = str(source).partition(":")
    root, _, part = rest.rpartition(":")  # from the right: a root may hold a colon (C:\data)
    if part not in SPLITS or not root:
        raise InputError("torchvision data set", got=repr(str(source)), accepted=FORM)
    entry = SETS[name.lower()]
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError("no such folder", got=str(folder), accepted=f"the root of torchvision's {entry.cls}")
    dataset = _open(entry, folder, part)
    numbers = [str(k) for k in range(entry.num_classes)] if entry.num_classes else None
    options = replace(options, name=options.name or f"{name.lower()}-{part}", size=options.size or entry.size)
    # All of these read arrays in memory or open one file per item, so threads do not disturb each other.
    return torch_dataset.read(dataset, options, parallel=True, known=numbers)


def _open(entry: Entry, root: Path, part: str) -> Any:
    from pbe_fast.torchvision_compat import import_torchvision

    make = getattr(import_torchvision().datasets, entry.cls)
    chosen: dict[str, Any] = {"train": part == "train"} if entry.by_flag else {"split": part}
    try:
        return make(root=str(root), download=False, **chosen)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"torchvision's {entry.cls}, {part}",
            got=f"{error}",
            accepted=f"a root that holds it whole; pbe_fast downloads nothing: run torchvision.datasets.{entry.cls}"
            f"({str(root)!r}, download=True) once",
        ) from error
