"""What every reader gets, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe_fast.data.image_set import MAX_INFERRED_CLASSES, ImageSet
from pbe_fast.errors import InputError


@dataclass(frozen=True)
class ReadOptions:
    """The keyword arguments of `as_image_set`, checked.

    Args:
        name: What to call the set; None for the reader's own choice.
        num_classes: Number of classes K; None to take it from the source.
        class_names: One name per class; None to take them from the source.
        size: (H, W) to resize every image to; None to keep the images as they are.
        progress: Whether to show a bar for anything over two seconds.

    Raises:
        InputError: A size that is not positive, or class counts that contradict each other.
    """

    name: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise InputError("num_classes", got=self.num_classes, accepted="a whole number of at least 1")
        if self.class_names is not None and not self.class_names:
            raise InputError("class_names", got="no names", accepted="one name per class, or None")
        if None not in (self.num_classes, self.class_names) and self.num_classes != len(self.class_names or ()):
            raise InputError(
                "num_classes and class_names disagree",
                got=f"num_classes={self.num_classes} and {len(self.class_names or ())} names",
                accepted="one of the two, or as many names as classes",
            )
        if self.size is not None and min(self.size) < 1:
            raise InputError("size", got=self.size, accepted="(height, width) in pixels, each at least 1")


@dataclass(frozen=True)
class Reader:
    """One accepted form of data: how to describe it, recognise it and read it, and whether a string can name it."""

    form: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any, ReadOptions], ImageSet]
    named: bool = True


def as_path(source: object) -> Path | None:
    """``source`` as a path where it is a string or a path, else None."""
    return Path(source).expanduser() if isinstance(source, (str, Path)) else None


def resolve_class_names(
    labels: Tensor, known: Sequence[str] | None, options: ReadOptions, where: Callable[[int], str]
) -> tuple[str, ...]:
    """The class names of a set, after checking every label against them.

    Args:
        labels: (N,) int64.
        known: The names that the source itself carries, if any.
        options: What the caller asked for; it goes before what the source carries. Of names that the source lacks some
            of, in other places than its own, `as_image_set` moves the labels afterwards.
        where: Says where item i came from, for the message.

    Returns:
        One name per class; numbers where nobody gave names.

    Raises:
        InputError: An empty set, a label out of range (naming the first such item), or names in an order that
            contradicts the source's.
    """
    if labels.numel() == 0:
        raise InputError("empty image set", got="no labels", accepted="at least one image")
    given, count = options.class_names, options.num_classes
    if given and known and lacks_classes(known, given):
        given = count = None
    if given and known:
        _check_same_order(known, given)
    names = tuple(given or known or ())
    count = count or len(names) or max(min(int(labels.max()) + 1, MAX_INFERRED_CLASSES), 1)
    wrong = ((labels < 0) | (labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            "labels out of range",
            got=f"label {int(labels[first])} at {where(first)} ({len(wrong)} such labels)",
            accepted=f"0 to {count - 1} ({count} classes)",
        )
    return names[:count] + tuple(str(k) for k in range(len(names), count))


def lacks_classes(known: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a set has some of the classes ``names``, numbered without the others, so that its labels must move.

    Names that are mere numbers tell nothing: those are what a set without names has.
    """
    in_place = tuple(known) == tuple(names[: len(known)])
    return set(known) < set(names) and len(set(known)) == len(known) and not in_place and not are_numbers(known)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether these are what a set without class names has."""
    return all(name == str(k) for k, name in enumerate(names))


def _check_same_order(known: Sequence[str], given: Sequence[str]) -> None:
    # The labels are numbers already: the same names in another order would silently swap the classes.
    place = {name: k for k, name in enumerate(given)}
    for k, name in enumerate(known):
        if place.get(name, k) != k:
            raise InputError(
                "class names in another order than those of the data",
                got=f"'{name}' as class {place[name]}, where the data has it as class {k}",
                accepted="one order for all sets and the model, or names that the data does not use",
            )


def as_labels(values: object, count: int) -> Tensor:
    """Labels of any integer dtype as (count,) int64.

    Args:
        values: A tensor, a numpy array or a sequence of whole numbers.
        count: The number of images that they belong to.

    Raises:
        InputError: Another dtype or shape; one-hot labels are recognised and said to be so.
    """
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "labels", got=f"{type(values).__name__} ({error})", accepted="whole numbers, one per image"
        ) from error
    accepted = f"whole numbers of shape ({count},), one per image"
    if labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
        accepted += "; these look one-hot or like logits: pass labels.argmax(1)"
    elif labels.ndim == 2 and labels.shape[1] == 1:
        accepted += "; pass labels[:, 0]"
    is_whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not is_whole or tuple(labels.shape) != (count,):
        raise InputError("labels", got=f"{labels.dtype} of shape {tuple(labels.shape)}", accepted=accepted)
    return labels.detach().to(torch.int64)
