"""Data poisoning: which images get the trigger, and the label that goes with it (Eq. 1 and 2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.seeding import check_seed
from pbe_fast.errors import InputError
from pbe_fast.triggers import Trigger

SETTINGS = ("all_to_one", "all_to_all")
_CHUNK = 4096


def target_labels(labels: Tensor, setting: str, target_label: int, num_classes: int) -> Tensor:
    """The labels that triggered images shall get: ``target_label`` (Eq. 1) or y + 1 (Eq. 2); (N,) int64."""
    if setting == "all_to_one":
        return torch.full_like(labels, target_label)
    return (labels + 1) % num_classes


def poison(
    data: Any,
    trigger: Trigger,
    *,
    poison_rate: float = 0.10,
    setting: str = "all_to_one",
    target_label: int = 0,
    seed: int = 0,
) -> ImageSet:
    """A poisoned copy of a training set, with its ``poison_mask`` and ``true_labels``.

    All-to-one draws from the images of other classes than the target's; a clean-label trigger (SIG) from the target's
    own; all-to-all from all. A clean-label trigger has no clean-label form of all-to-all, so there it changes labels.
    Triggers with cover images (WaNet) get ``cover_ratio`` of them for each poisoned one, as far as there are images
    left; these keep their label and are not in ``poison_mask``.

    Args:
        data: Clean training images: an `ImageSet`, or anything else that `as_image_set` takes.
        trigger: Made for images of this shape.
        poison_rate: Poisoned images as a fraction of the whole set.
        setting: "all_to_one" or "all_to_all".
        target_label: The label that all-to-one aims at.
        seed: Which images are drawn, and what is random in cover images.

    Raises:
        InputError: No trigger, a rate outside (0, 1), a target outside the classes, or more images asked for than there
            are.
    """
    check_trigger(trigger)
    clean = as_image_set(data)
    seed = check_seed(seed)
    candidates, count = poison_candidates(
        clean, trigger, poison_rate=poison_rate, setting=setting, target_label=target_label
    )
    targets = target_labels(clean.labels, setting, target_label, clean.num_classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(candidates), generator=generator).to(clean.device)
    chosen = candidates[order[:count]]
    mask = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    mask[chosen] = True

    images = clean.images.clone()
    _stamp(images, chosen, trigger)
    if trigger.cover_ratio > 0:
        rest = (~mask).nonzero()[:, 0]
        order = torch.randperm(len(rest), generator=generator).to(clean.device)
        covered = rest[order[: round(trigger.cover_ratio * count)]]
        # Each one's other is the one before it, and the first one's a poisoned image: never itself.
        others = torch.cat([chosen[-1:], covered])[:-1]
        _cover(images, covered, clean.images, others, trigger, draw=seed)
    return dataclasses.replace(
        clean,
        images=images,
        labels=torch.where(mask, targets, clean.labels),
        poison_mask=mask,
        true_labels=clean.labels,
        name=f"{clean.name}+{trigger.name}",
    )


def poison_candidates(
    data: ImageSet, trigger: Trigger, *, poison_rate: float, setting: str, target_label: int
) -> tuple[Tensor, int]:
    """The images that `poison` draws from, as indices (int64), and how many it draws; raises what it raises."""
    trigger.check_shape(data.image_shape)
    check_target(setting, target_label, data.num_classes)
    if not 0 < poison_rate < 1:
        raise InputError("poison_rate", got=poison_rate, accepted="a fraction between 0 and 1")
    targets = target_labels(data.labels, setting, target_label, data.num_classes)
    clean_label = trigger.clean_label and setting == "all_to_one"
    candidates = (data.labels == targets if clean_label else data.labels != targets).nonzero()[:, 0]
    count = round(poison_rate * len(data))
    if not 1 <= count <= len(candidates):
        kind = f"images of class {target_label} (clean-label)" if clean_label else "images whose label would change"
        raise InputError(
            f"poison_rate {poison_rate} of {len(data)} images for {trigger.name}",
            got=f"{count} images to poison, but {len(candidates)} {kind}",
            accepted=f"a rate from {1 / len(data):.2g} to {len(candidates) / len(data):.4g}",
        )
    return candidates, count


def triggered_test_set(
    data: ImageSet, trigger: Trigger, *, setting: str = "all_to_one", target_label: int = 0
) -> ImageSet:
    """Every test image with the trigger on it: ``labels`` are the attacker's targets, ``true_labels`` the truth.

    Images whose true class is the target are kept: `metrics.evaluate` leaves them out of ``asr`` and counts them in
    ``asr_with_target``.
    """
    check_trigger(trigger)
    check_target(setting, target_label, data.num_classes)
    images = data.images.clone()
    _stamp(images, torch.arange(len(data), device=data.device), trigger)
    return dataclasses.replace(
        data,
        images=images,
        labels=target_labels(data.labels, setting, target_label, data.num_classes),
        poison_mask=torch.ones(len(data), dtype=torch.bool, device=data.device),
        true_labels=data.labels,
        name=f"{data.name}+{trigger.name}",
    )


def covered_test_set(
    data: ImageSet, trigger: Trigger, *, setting: str = "all_to_one", target_label: int = 0
) -> ImageSet:
    """Every test image as a cover image, which should not trigger; labelled as in `triggered_test_set`.

    Where the trigger depends on the image, each gets the trigger of the image before it.

    Raises:
        InputError: A trigger without cover images, or a single image.
    """
    check_trigger(trigger)
    check_target(setting, target_label, data.num_classes)
    if len(data) < 2:
        raise InputError("test images to cover", got=len(data), accepted="2 or more")
    everything = torch.arange(len(data), device=data.device)
    images = data.images.clone()
    _cover(images, everything, data.images, everything.roll(1), trigger, draw=0)
    return dataclasses.replace(
        data,
        images=images,
        labels=target_labels(data.labels, setting, target_label, data.num_classes),
        poison_mask=torch.zeros(len(data), dtype=torch.bool, device=data.device),
        true_labels=data.labels,
        name=f"{data.name}+{trigger.name} cover",
    )


def check_target(setting: str, target_label: int, num_classes: int) -> None:
    """Raises InputError for an unknown setting or a target that is no class."""
    if setting not in SETTINGS:
        raise InputError("setting", got=repr(setting), accepted=" or ".join(SETTINGS))
    if not 0 <= target_label < num_classes:
        raise InputError("target_label", got=target_label, accepted=f"0 to {num_classes - 1}")


def check_trigger(trigger: object) -> None:
    """Raises InputError for what is no trigger, its name for one."""
    if not isinstance(trigger, Trigger):
        accepted = "a Trigger, as pbe_fast.triggers.make_trigger(name, (C, H, W)) makes it"
        raise InputError("trigger", got=repr(trigger), accepted=accepted)


def _stamp(images: Tensor, where: Tensor, trigger: Trigger) -> None:
    for ids in where.split(_CHUNK):
        images[ids] = _to_uint8(trigger.apply(images[ids].float() / 255, ids))


def _cover(images: Tensor, where: Tensor, clean: Tensor, others: Tensor, trigger: Trigger, *, draw: int) -> None:
    for ids, other_ids in zip(where.split(_CHUNK), others.split(_CHUNK), strict=True):
        other = clean[other_ids].float() / 255
        images[ids] = _to_uint8(trigger.cover(images[ids].float() / 255, ids, draw=draw, others=other))


def _to_uint8(images: Tensor) -> Tensor:
    return (images * 255).round_().to(torch.uint8)
