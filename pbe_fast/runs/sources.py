"""The image sets of a run: where they come from, and which images are kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_fast.data import ImageSet, as_image_set, split
from pbe_fast.data.folder import class_folders
from pbe_fast.data.reader import are_numbers, lacks_classes
from pbe_fast.errors import InputError
from pbe_fast.models import ModelSpec
from pbe_fast.result import sha256_of_file

# What an attack calls its sets, and where a purification looks for them.
TRAIN_NAME, CLEAN_NAME, TEST_NAME, TRIGGERED_NAME = "train.npz", "clean.npz", "test.npz", "triggered.npz"


@dataclass(frozen=True, eq=False)
class Source:
    """An image set, and what was asked for to get it."""

    data: ImageSet
    origin: str

    @classmethod
    def read(
        cls,
        origin: str | Path,
        *,
        image_size: int | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool = True,
    ) -> Source:
        """Whatever `as_image_set` reads, its classes numbered as ``class_names`` numbers them.

        Args:
            origin: What to read.
            image_size: Height and width to resize all images to.
            class_names: Those of the model, or of the training set, in the order of the logits: a set may lack some.
                Where they, or the set's own, are nothing but its numbers, the numbers count.
            progress: Whether to show a bar.

        Raises:
            InputError: A set that cannot be read, or whose classes have other names.
        """
        return cls(_read(str(origin), class_names, size=image_size, progress=progress), str(origin))

    def describe(self) -> dict[str, Any]:
        """Where the images come from, how many they are and their digest (of the file, where it is one)."""
        path = Path(self.origin).expanduser()
        digest = sha256_of_file(path) if path.is_file() else self.data.sha256()
        return {"source": self.origin, "images": len(self.data), "sha256": digest}


def _read(origin: str, names: Sequence[str] | None, **options: Any) -> ImageSet:
    if names is None:
        return as_image_set(origin, **options)
    names = tuple(names)
    if origin and (root := Path(origin).expanduser()).is_dir():
        # Only the names of its folders say which classes a tree has: it is numbered by them as it is read. A model
        # that knows no names can say nothing about a tree that has some.
        named_otherwise = are_numbers(names) and not {folder.name for folder in class_folders(root)} & set(names)
        return as_image_set(origin, class_names=None if named_otherwise else names, **options)
    data = as_image_set(origin, **options)
    own = data.class_names
    if lacks_classes(own, names):
        return as_image_set(data, class_names=names)
    if are_numbers(own) or are_numbers(names):
        # A subset in a file may not show all the numbers that there are.
        known = names if are_numbers(own) else own
        return dataclasses.replace(data, class_names=known) if len(own) < len(known) else data
    if own != names[: len(own)]:
        k, got = next((k, name) for k, name in enumerate(own) if (name,) != names[k : k + 1])
        raise InputError(
            f"class names of {origin}",
            got=f"'{got}' as class {k}",
            accepted=f"the model's or the training set's, in their order: {_spell_names(names)}",
        )
    return dataclasses.replace(data, class_names=names)


def _spell_names(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def shared_names(specs: Mapping[Path, ModelSpec]) -> tuple[str, ...] | None:
    """The class names of models that are to see the same images; None where none of them knows any.

    Raises:
        InputError: Two models that name their classes differently.
    """
    first: tuple[Path, tuple[str, ...]] | None = None
    for path, spec in specs.items():
        if spec.class_names is None:
            continue
        if first is not None and spec.class_names != first[1]:
            raise InputError(
                f"class names of {path}",
                got=_spell_names(spec.class_names),
                accepted=f"{_spell_names(first[1])}, as {first[0]} has",
            )
        first = first or (path, spec.class_names)
    return None if first is None else first[1]


def sizes_of(sources: Mapping[str, Source | None]) -> dict[str, tuple[int, int]]:
    """(H, W) of the images, by what was asked for to get them."""
    shapes = {source.origin: source.data.image_shape for source in sources.values() if source is not None}
    return {f"the images of {origin}": (height, width) for origin, (_, height, width) in shapes.items()}


def require_same_kind(first: Source, second: Source | None) -> None:
    """Raises InputError for two sets whose images or numbers of classes differ."""
    if second is None:
        return
    for what in ("image_shape", "num_classes"):
        got, wanted = getattr(second.data, what), getattr(first.data, what)
        if got != wanted:
            raise InputError(
                f"{what.replace('_', ' ')} of {second.origin}", got=got, accepted=f"{wanted}, as {first.origin} has"
            )


def require_true_labels(triggered: Source | None) -> None:
    """Raises InputError for a triggered test set that does not say which classes its images really are."""
    if triggered is not None and triggered.data.true_labels is None:
        raise InputError(
            "triggered test images without true labels",
            got=triggered.origin,
            accepted="an .npz whose labels are the attacker's targets, with an array true_labels, as attack writes it",
        )


def reserve(data: ImageSet, *, limit: int | None, clean_count: int, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """A training set, and a clean set of images that are not in it, both drawn class by class.

    Args:
        data: Where both come from.
        limit: Training images; None for all that the clean set leaves.
        clean_count: Clean images; 0 for no clean set.
        seed: Of the draws.

    Raises:
        InputError: More images than there are.
    """
    left = len(data) - clean_count
    if clean_count < 0 or left < 1 or (limit is not None and not 1 <= limit <= left):
        raise InputError(
            f"training images and clean images out of the {len(data)} of {data.name}",
            got=f"{'all' if limit is None else limit} and {clean_count}",
            accepted=f"together at most {len(data)}, and at least one to train on (--limit, --clean-count)",
        )
    clean = None
    if clean_count:
        clean, data = split(data, clean_count, seed=seed)
    if limit is not None and limit < len(data):
        data, _ = split(data, limit, seed=seed + 1)
    return data, clean


def purification_sets(
    model: Path,
    *,
    train: str | None,
    clean: str | None,
    clean_count: int | None,
    test: str | None,
    triggered: str | None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Source | None]:
    """The sets of a purification: those that are named, and what an attack left in the folder of the model.

    Args:
        model: The infected model; if it is a folder, its train.npz, test.npz and triggered.npz stand in for sets that
            are not named. Its clean.npz does not: with a clean set the algorithm is another one.
        train: Training images.
        clean: Clean images.
        clean_count: How many of them to draw, class by class; None for all.
        test: Test images.
        triggered: Test images with the trigger.
        image_size: Height and width to resize all of them to.
        class_names: Those of the model; where they are None, those of the training set hold for the others.
        seed: Of the draw.
        progress: Whether to show a bar.

    Returns:
        The sets as "train", "clean", "test" and "triggered".

    Raises:
        InputError: A set that cannot be read, neither train nor clean, or triggered without test.
    """
    beside = {"train": TRAIN_NAME, "test": TEST_NAME, "triggered": TRIGGERED_NAME}
    origins: dict[str, str | Path | None] = {"train": train, "clean": clean, "test": test, "triggered": triggered}
    for name, file in beside.items():
        if origins[name] is None and (model / file).is_file():
            origins[name] = model / file
    if origins["train"] is None and clean is None:
        raise InputError(f"images to purify {model} with", got="neither train nor clean", accepted="either or both")
    if origins["triggered"] is not None and origins["test"] is None:
        raise InputError("triggered test images", got="no clean test images", accepted="both")
    sets: dict[str, Source | None] = {}
    for name, origin in origins.items():
        sets[name] = source = (
            None
            if origin is None
            else Source.read(origin, image_size=image_size, class_names=class_names, progress=progress)
        )
        if name == "train" and source is not None and class_names is None:
            class_names = source.data.class_names
    require_true_labels(sets["triggered"])
    if (whole := sets["clean"]) is not None and clean_count is not None and clean_count != len(whole.data):
        if not 1 <= clean_count < len(whole.data):
            raise InputError(
                f"clean images to draw from {whole.origin} (--clean-count)",
                got=f"{clean_count} of {len(whole.data)} images",
                accepted=f"1 to {len(whole.data)}",
            )
        sets["clean"] = dataclasses.replace(whole, data=split(whole.data, clean_count, seed=seed)[0])
    return sets
