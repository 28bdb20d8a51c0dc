"""Labels that a purification may forget, or has forgotten: what its caller is warned of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pbe_fast.data import ImageSet
from pbe_fast.errors import PBEWarning

# Of fewer images a share says little.
_FEWEST = 10
_KNOWN, _LOST = 0.5, 0.2
_NAMED = 3


def warn_of_missing(clean: ImageSet, train: ImageSet | None) -> None:
    """A warning where labels that the data has, or the training set where there is one, have no clean image."""
    wanted = torch.arange(clean.num_classes) if train is None else train.labels.unique().cpu()
    there = torch.bincount(clean.labels.cpu(), minlength=int(wanted.max()) + 1) > 0
    missing = wanted[~there[wanted]].tolist()
    if missing:
        names = (clean if train is None else train).class_names
        warnings.warn(
            f"the clean set has no image of {len(missing)} of {len(wanted)} labels ({_named(missing, names)}): a model "
            "that learns from it may forget what it has not",
            PBEWarning,
            # The caller of purify, which is decorated.
            stacklevel=4,
        )


def forgotten_labels(labels: Tensor, before: Tensor, after: Tensor, num_classes: int) -> Tensor:
    """Labels that a model answered with and has ceased to.

    Args:
        labels: (N,) int64.
        before: (N,) bool, where the infected model's answer was the label.
        after: (N,) bool, where the purified model's is.
        num_classes: K.

    Returns:
        (K,) bool on the CPU: of the labels with ten images and more those of which at least half were answered so, and
        of these less than a fifth still are.
    """

    def count(where: Tensor) -> Tensor:
        return torch.bincount(labels[where].cpu(), minlength=num_classes)

    total, known, kept = count(torch.ones_like(before)), count(before), count(before & after)
    return (total >= _FEWEST) & (known >= _KNOWN * total) & (kept < _LOST * known)


def warn_of_forgotten(forgotten: Tensor, names: Sequence[str]) -> None:
    """A warning that names the (K,) bool ``forgotten`` labels, if there are any."""
    lost = forgotten.nonzero()[:, 0].tolist()
    if lost:
        warnings.warn(
            f"the purified model hardly answers any more with {len(lost)} of {len(forgotten)} labels "
            f"({_named(lost, names)}): either nearly all images with the label are poisoned, or it was forgotten; more "
            "clean images of it may help",
            PBEWarning,
            stacklevel=6,
        )


def _named(labels: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(f"{k}: {names[k]}" if names[k] != str(k) else names[k] for k in labels[:_NAMED])
    return f"{shown}, ..." if len(labels) > _NAMED else shown
