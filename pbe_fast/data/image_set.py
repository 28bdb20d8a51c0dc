"""`ImageSet`: labelled images at rest, the one form of data that the rest of the package sees."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbe_fast.errors import InputError

MAX_INFERRED_CLASSES = 1_000_000
_DIGEST_IMAGES = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in one uint8 tensor, with what is known about their poisoning.

    Args:
        images: (N, C, H, W) uint8, C of 1 or 3, N of at least 1.
        labels: (N,) int64 in [0, number of classes). What training sees: of a poisoned image, the attacker's.
        class_names: One name per class, so that ``num_classes == len(class_names)``.
        poison_mask: (N,) bool, True where the image carries the trigger; None where the truth is not known.
        true_labels: (N,) int64, the labels before poisoning; None where they are not known.
        name: What to call the set in tables and reports.

    Raises:
        InputError: A shape, dtype or label that does not fit the above, or an empty set.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    poison_mask: Tensor | None = None
    true_labels: Tensor | None = None
    name: str = "images"

    def __post_init__(self) -> None:
        _check_images(self.images)
        n = self.images.shape[0]
        _check_vector("labels", self.labels, torch.int64, n, self.images.device)
        if not self.class_names:
            # A stray label such as 2**40 must become an error below, not that many names.
            count = max(min(int(self.labels.max()) + 1, MAX_INFERRED_CLASSES), 1)
            object.__setattr__(self, "class_names", tuple(str(k) for k in range(count)))
        _check_labels("labels", self.labels, len(self.class_names))
        if self.poison_mask is not None:
            _check_vector("poison_mask", self.poison_mask, torch.bool, n, self.images.device)
        if self.true_labels is not None:
            _check_vector("true_labels", self.true_labels, torch.int64, n, self.images.device)
            _check_labels("true_labels", self.true_labels, len(self.class_names))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        c, h, w = self.images.shape[1:]
        return int(c), int(h), int(w)

    @property
    def device(self) -> torch.device:
        """Where the images rest."""
        return self.images.device

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with all its tensors on ``device``."""
        return dataclasses.replace(self, **{k: v.to(device) for k, v in self._tensors().items()})

    def copy_(self, other: ImageSet) -> ImageSet:
        """Takes the tensors of another set of the same size into its own memory, and returns itself.

        Raises:
            InputError: Another number or shape of images, other classes, or not the same knowledge of poisoning.
        """
        mine, others = self._tensors(), other._tensors()
        shapes, wanted = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (others, mine))
        if shapes != wanted or other.class_names != self.class_names:
            raise InputError("set to copy", got=f"{shapes} of {other.num_classes} classes", accepted=f"{wanted}")
        for name, tensor in mine.items():
            tensor.copy_(others[name])
        return self

    def select(self, indices: Tensor | Sequence[int], *, name: str | None = None) -> ImageSet:
        """The images at ``indices`` (int64, or a bool mask over the set), in that order."""
        where = torch.as_tensor(indices, device=self.device)
        if where.numel() == 0:
            where = where.long()  # an empty list makes a float tensor, which torch refuses as an index
        return dataclasses.replace(self, name=name or self.name, **{k: v[where] for k, v in self._tensors().items()})

    def floats(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """The images at ``indices`` as float32 in [0, 1], (n, C, H, W)."""
        return self.images[indices].float().div_(255)

    def sha256(self) -> str:
        """Digest of the images, their shape and their labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        # Part by part: a memory-mapped set may not fit in memory.
        for part in self.images.split(_DIGEST_IMAGES):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Any]:
        named = {
            "images": self.images,
            "labels": self.labels,
            "poison_mask": self.poison_mask,
            "true_labels": self.true_labels,
        }
        return {k: v for k, v in named.items() if v is not None}


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            "images of an ImageSet",
            got=f"{images.dtype} of shape {tuple(images.shape)}",
            accepted="uint8 of shape (N, C, H, W) with C of 1 or 3; pbe_fast.as_image_set converts floats in [0, 1]",
        )
    if images.numel() == 0:
        raise InputError("empty image set", got=f"shape {tuple(images.shape)}", accepted="at least one image")


def _check_vector(name: str, value: Tensor, dtype: torch.dtype, n: int, device: torch.device) -> None:
    if value.dtype != dtype or tuple(value.shape) != (n,) or value.device != device:
        raise InputError(
            f"{name} of an ImageSet",
            got=f"{value.dtype} of shape {tuple(value.shape)} on {value.device}",
            accepted=f"{dtype} of shape ({n},) on {device}, one per image",
        )


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"{name} out of range",
            got=f"values from {low} to {high}",
            accepted=f"0 to {num_classes - 1} ({num_classes} classes)",
        )
