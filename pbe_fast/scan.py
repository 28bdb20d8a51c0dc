"""Is there a backdoor, and where does it lead? Untargeted adversarial images tell (Sec. 3.4.1, Fig. 1 and 4)."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.attraction import reached_labels
from pbe_fast.calibration import LEAST_REPRESENTED
from pbe_fast.config import PGDConfig, ScanConfig, WaveConfig
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.copies import frozen_copy
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import resolve_device
from pbe_fast.engine.rounding import precision_for
from pbe_fast.engine.seeding import check_seed, generator_for, seeded
from pbe_fast.errors import InputError, PBEWarning
from pbe_fast.leading_waves import (
    FEWEST_IMAGES,
    FEWEST_LABELS,
    WAVE_SAMPLE,
    SlowWaves,
    frequency_of,
    standing_out,
)
from pbe_fast.models import check_differentiable, check_model
from pbe_fast.options import check_kind
from pbe_fast.pgd import window_side
from pbe_fast.scan_result import ScanLevel, ScanResult, WaveLevel, most_suspicious, undetectable

__all__ = ["ScanLevel", "ScanResult", "WaveLevel", "most_suspicious", "scan"]

# Which radii are tested: the first that moves a quarter of the images (the way to a faint trigger is the shortest), the
# first that moves most of them, and the first of twice that size (a trigger that changes every pixel takes more).
LEVELS = ("quarter", "most", "beyond")
# What a patch takes: all that a window of its size can hold, by the window's share of the side.
PATCH_LEVELS = {0.125: "patch 1/8", 0.25: "patch 1/4"}
_QUARTER, _MOST, _BEYOND = 0.25, 0.75, 2.0
# Of smaller pictures see `pbe_fast.calibration.WAVES`.
_SMALLEST_FOR_LABELS = 32

# Where the images of fewer than half of the classes are moved nothing is tested (`Largest.represented`).
_PER_CLASS = 2

# `reached_labels` of the sample, for a PGDConfig and the text of its bar.
Reached = Callable[..., Tensor]


@gradients()
def scan(
    model: nn.Module,
    images: Any,
    *,
    config: ScanConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> ScanResult:
    """Look for a backdoor: attack images at several radii, in windows at will, with waves, and see where they end up.

    A benign model's adversarial images spread over the labels, if unevenly; those of an infected one tend to the label
    that the trigger leads to (all-to-one), or each label's to the label s further on (all-to-all).

    Args:
        model: Any module that returns (B, K) logits for float images (B, C, H, W) in [0, 1]. It is not changed.
        images: Clean images or training images, with their labels, in any form that `as_image_set` takes. Those that
            the model answers with another label are left out; a few hundred are enough, of many classes two of each.
        config: The attack, the radii and windows, the significance.
        seed: Of the draw of images and windows.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32" or "bf16".
        progress: Whether steps longer than two seconds show a bar, on stderr.

    Raises:
        InputError: A seed that is none, fewer than three classes, a model that does not fit the images or has no
            gradient with respect to them, images that it answers rightly of fewer than half of the classes, or radii
            too small to move a quarter of them.
    """
    config = config or ScanConfig()
    check_kind(config, ScanConfig)
    seed = check_seed(seed)
    where = resolve_device(device)
    start = time.perf_counter()
    data = as_image_set(images, progress=progress)
    if data.num_classes < 3:
        # With two labels there is one way to go.
        raise InputError("classes of the images to scan with", got=data.num_classes, accepted="3 or more")
    check_model(model, data.image_shape, data.num_classes)
    check_differentiable(model, data.image_shape)
    dtype = precision_for(model, data.image_shape, device=where, requested=precision)
    scanned = frozen_copy(model, where, data.image_shape)
    generator = generator_for(seed, "scan")
    with seeded(seed, where):
        count = max(config.images, _PER_CLASS * data.num_classes)
        sample = _sample(scanned, data, count, generator, dtype, where)
        labels = len(sample.labels.unique())
        if labels < LEAST_REPRESENTED * data.num_classes:
            raise InputError(
                "images to scan with",
                got=f"some that the model answers rightly of {labels} of {data.num_classes} classes",
                accepted="of half of the classes at least",
            )
        reached = functools.partial(
            reached_labels, scanned, sample, generator=generator, dtype=dtype, show_progress=progress
        )
        levels = (
            *_attack(reached, config),
            *_patches(reached, config, sample.image_shape),
            *wave_levels(scanned, sample, config, generator, dtype=dtype, show_progress=progress),
        )
    level, setting, p_value = most_suspicious(levels)
    verdict = setting if p_value < config.significance else "none"
    missed = undetectable(levels, config.significance)
    if missed and verdict == "none":
        warnings.warn(
            f"too few images, or labels that the attack moves, to find a backdoor ({', '.join(missed)}): "
            f"got {len(sample)} that the model answers rightly, of {labels} labels; a few hundred are enough, of many "
            "classes two of each",
            PBEWarning,
            stacklevel=3,
        )
    at = level.best_of(setting)
    return ScanResult(
        verdict=verdict,
        target_label=at if verdict == "all_to_one" else None,
        shift=at + 1 if verdict == "all_to_all" else None,
        score=level.times_even(setting),
        p_value=p_value,
        setting=setting,
        level=level,
        levels=levels,
        class_names=data.class_names,
        config=config,
        images=len(sample),
        seed=seed,
        seconds=time.perf_counter() - start,
        precision=str(dtype).removeprefix("torch."),
    )


def _sample(
    model: nn.Module,
    data: ImageSet,
    count: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> ImageSet:
    """Up to ``count`` images that the model answers rightly, as even by label as there are images."""
    order = torch.randperm(len(data), generator=generator)
    # Enough for a model that is right half of the time; the whole of a large set need not be predicted.
    drawn = data.select(_even(data.labels.cpu()[order], order, 2 * count)).to(device)
    right = predict_logits(model, drawn.images, dtype=dtype).argmax(1) == drawn.labels
    if not right.any():
        raise InputError(
            "images to scan with", got="none that the model answers with its label", accepted="its own data"
        )
    kept = right.nonzero()[:, 0].cpu()
    return drawn.select(_even(drawn.labels.cpu()[kept], kept, count))


def _even(labels: Tensor, indices: Tensor, count: int) -> Tensor:
    """The first ``count`` of ``indices``, taken in turns from each of their labels."""
    turn = torch.zeros_like(labels)
    for k in labels.unique():
        mine = labels == k
        turn[mine] = torch.arange(int(mine.sum()))
    return indices[turn.argsort(stable=True)[:count]]


def _attack(reached: Reached, config: ScanConfig) -> tuple[ScanLevel, ...]:
    """The radii up to the one beyond that which moves most images."""
    levels: list[ScanLevel] = []
    names, beyond = list(LEVELS), 0.0
    for eps in config.eps:
        if eps < beyond:
            continue
        pgd = PGDConfig(norm=config.norm, eps=eps, steps=config.steps)
        counts = reached(pgd, desc=f"attacking, eps {eps:.3g}")
        moved = ScanLevel(None, eps, counts).moved
        if names[0] == "quarter" and moved >= _MOST:
            names.pop(0)  # one radius has one name, and one calibration
        enough = {"quarter": moved >= _QUARTER, "most": moved >= _MOST, "beyond": True}
        name = names.pop(0) if enough[names[0]] else None
        if name == "most":
            beyond = _BEYOND * eps
        levels.append(ScanLevel(name, eps, counts))
        if not names:
            break
    if names[:1] == ["quarter"]:
        raise InputError(
            "radii that move a quarter of the images to another label",
            got=f"{100 * levels[-1].moved:.0f} % moved at eps {config.eps[-1]:.3g}",
            accepted="larger eps",
        )
    return tuple(levels)


def _patches(reached: Reached, config: ScanConfig, image_shape: tuple[int, int, int]) -> tuple[ScanLevel, ...]:
    """The windows, which need no search: their size is the patch's, whatever the model withstands."""
    # In small images two windows may be the same one: it is tested once, as the larger, which is the more cautious.
    windows = {window_side(share, image_shape): share for share in config.patch_windows}
    levels = []
    for share in windows.values():
        pgd = PGDConfig(steps=config.steps).at_will(share)
        counts = reached(pgd, desc=f"attacking windows, {share:.3g} of the side")
        levels.append(ScanLevel(PATCH_LEVELS[share], 1.0, counts, share))
    return tuple(levels)


def wave_levels(
    model: nn.Module,
    sample: ImageSet,
    config: ScanConfig,
    generator: torch.Generator,
    *,
    all_sizes: bool = False,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> tuple[WaveLevel, ...]:
    """The slow waves, which need no search either.

    Args:
        model: In eval mode.
        sample: Images that it answers rightly, on its device.
        config: Whether waves are tried at all.
        generator: On the CPU.
        all_sizes: Ask for a label in small pictures as well, of which nothing is known.
        dtype: Of the matrix products.
        show_progress: Whether there is a bar.

    Returns:
        One of each setting; none of few images or labels, and of small images none for a label.
    """
    if not config.waves or len(sample) < FEWEST_IMAGES or sample.num_classes < FEWEST_LABELS:
        return ()
    some = sample.select(torch.randperm(len(sample), generator=generator)[:WAVE_SAMPLE].to(sample.device))
    waves = SlowWaves(some, WaveConfig(), generator)
    to_label, by_shift = waves.mean_probabilities(model, dtype=dtype, show_progress=show_progress)
    tested = {"all_to_one": to_label, "all_to_all": by_shift}
    if min(sample.image_shape[1:]) < _SMALLEST_FOR_LABELS and not all_sizes:
        del tested["all_to_one"]
    levels = []
    for setting, probabilities in tested.items():
        unguarded, _ = standing_out(probabilities)
        above, places = standing_out(probabilities, beyond=to_label if setting == "all_to_all" else None)
        best = int(above.argmax())
        at, frequency = probabilities[places[best]], frequency_of(places[best], probabilities)
        levels.append(
            WaveLevel(
                name="waves",
                eps=waves.amplitude,
                counts=waves.reached(model, frequency, dtype=dtype),
                setting=setting,
                frequency=frequency,
                probabilities=at,
                best=best,
                around=float(at[best] - above[best]),
                # Of all other labels or shifts, whether they count or not.
                next_above=float(torch.cat([unguarded[:best], unguarded[best + 1 :]]).max()),
            )
        )
    return tuple(levels)
