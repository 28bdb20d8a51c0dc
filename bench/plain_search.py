"""Step 1a and what is looked for with it, as one would write it down: torchattacks' PGD, eager float32."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import torch
from plain import loader_of, logits_of
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attraction import LARGEST_WINDOW
from pbe_fast.config import PGDConfig, PurifyConfig, WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.leading_waves import FEWEST_IMAGES, FEWEST_LABELS, WAVE_SAMPLE, LeadingWaves, waves_standing_out
from pbe_fast.pgd import random_windows
from pbe_fast.waves import add_waves

# As pbe_fast.attraction and pbe_fast.leading_waves have them.
SAMPLE, HALVINGS, MOVED, WAVE_PART = 1000, 6, 0.25, 0.75


def plain_attack(model: nn.Module, pgd: PGDConfig | WaveConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """torchattacks' PGD; it has no windows, no waves and no grids."""
    import torchattacks

    if isinstance(pgd, WaveConfig):
        return lambda images, labels: add_waves(images, random_ids(images), pgd, seed=0)
    if pgd.window is not None:
        return functools.partial(attack_windows, model, pgd)
    if pgd.grid is not None:
        return functools.partial(attack_smoothly, model, pgd)
    return torchattacks.PGD(model, eps=pgd.eps, alpha=pgd.step_size, steps=pgd.steps, random_start=pgd.random_start)


def attack_windows(model: nn.Module, pgd: PGDConfig, images: Tensor, labels: Tensor) -> Tensor:
    """PGD on one random window of each image; torchattacks has none."""
    assert pgd.window is not None
    window = random_windows(images, random_ids(images), pgd.window, seed=0)
    was_training = model.training
    model.eval()
    adversarial = images.clone()
    for _ in range(pgd.steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adversarial), labels), adversarial)
        moved = adversarial.detach() + pgd.step_size * gradient.sign() * window
        adversarial = torch.clamp(images + torch.clamp(moved - images, -pgd.eps, pgd.eps), 0, 1)
    model.train(was_training)
    return adversarial


def attack_smoothly(model: nn.Module, pgd: PGDConfig, images: Tensor, labels: Tensor) -> Tensor:
    """PGD on a coarse grid of values; torchattacks has none."""
    assert pgd.grid is not None
    was_training = model.training
    model.eval()
    height, width = images.shape[2:]
    nothing = images.new_zeros(*images.shape[:2], min(pgd.grid, height), min(pgd.grid, width), requires_grad=True)

    def spread(values: Tensor) -> Tensor:
        return F.interpolate(values, (height, width), mode="bilinear", align_corners=False)

    adversarial = images.clone()
    for _ in range(pgd.steps):
        loss = F.cross_entropy(model(adversarial + spread(nothing)), labels)
        (gradient,) = torch.autograd.grad(loss, nothing)
        moved = adversarial + pgd.step_size * spread(gradient.sign())
        adversarial = torch.clamp(images + torch.clamp(moved - images, -pgd.eps, pgd.eps), 0, 1)
    model.train(was_training)
    return adversarial


def random_ids(images: Tensor) -> Tensor:
    """Numbers that the random part of a perturbation is drawn by."""
    return torch.randint(2**62, (len(images),), device=images.device)


def attack_counts_plainly(
    model: nn.Module, data: ImageSet, config: PurifyConfig, generator: torch.Generator, device: torch.device
) -> Tensor:
    """`pbe_fast.attraction.attack_counts`, with torchattacks and a model that runs in eager float32."""
    pgd = config.pgd
    patches = [patch for patch in config.patch_attacks if (patch.window or 1) <= LARGEST_WINDOW]
    sample = data.select(torch.randperm(len(data), generator=generator)[: 2 * SAMPLE])
    right = logits_of(model, sample, device).argmax(1) == sample.labels
    if not right.any():
        return torch.zeros(2 + len(patches), data.num_classes, data.num_classes, dtype=torch.int64)
    sample = sample.select(right.nonzero()[:SAMPLE, 0])
    full = reached_plainly(model, sample, pgd, device)
    for halvings in range(HALVINGS, 0, -1):
        smaller = dataclasses.replace(pgd, eps=pgd.eps / 2**halvings, alpha=pgd.step_size / 2**halvings)
        least = reached_plainly(model, sample, smaller, device)
        if moves_enough(least):
            break
    in_windows = [reached_plainly(model, sample, patch, device) for patch in patches]
    return torch.stack([least, full, *(counts * moves_enough(counts) for counts in in_windows)])


def moves_enough(counts: Tensor) -> bool:
    """Whether a quarter of the images reached another label."""
    return bool(counts.sum() - counts.diagonal().sum() >= MOVED * counts.sum())


def reached_plainly(model: nn.Module, data: ImageSet, pgd: PGDConfig, device: torch.device) -> Tensor:
    """(K, K) counts: the label of an image, and the one that it is led to."""
    attack = plain_attack(model, pgd)
    counts = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64)
    for images, labels in loader_of(data, batch_size=250):
        adversarial = attack(images.to(device), labels.to(device))
        with torch.no_grad():
            reached = model((adversarial * 255).round() / 255).argmax(1).cpu()
        counts.index_put_((labels, reached), torch.ones_like(labels), accumulate=True)
    return counts


@torch.no_grad()
def leading_waves_plainly(
    model: nn.Module, data: ImageSet, config: PurifyConfig, generator: torch.Generator, device: torch.device
) -> LeadingWaves:
    """`pbe_fast.leading_waves.leading_waves`, frequency by frequency."""
    k = data.num_classes
    if not config.wave_amplitudes:
        return LeadingWaves(torch.zeros(k, dtype=torch.bool), None, ())
    wave = WaveConfig(amplitude=max(config.wave_amplitudes))
    sample = data.select(torch.randperm(len(data), generator=generator)[: 4 * WAVE_SAMPLE])
    right = (logits_of(model, sample, device).argmax(1) == sample.labels).nonzero()[:WAVE_SAMPLE, 0]
    if k < FEWEST_LABELS or len(right) < FEWEST_IMAGES:
        return LeadingWaves(torch.zeros(k, dtype=torch.bool), None, ())
    images, labels = sample.images[right].float().to(device) / 255, sample.labels[right]
    height, width = sample.image_shape[1:]
    down, across = (int(min(wave.max_cycles, size / 2)) for size in (height, width))
    to_label, by_shift = torch.zeros(2 * down + 1, 2 * across + 1, k), torch.zeros(2 * down + 1, 2 * across + 1, k - 1)
    phase = torch.rand(len(right), 1, 1, 1, generator=generator).to(device)
    rows = torch.arange(height, device=device)[:, None] / height
    columns = torch.arange(width, device=device) / width
    for u, v in itertools.product(range(-down, down + 1), range(across + 1)):
        turns = u * rows + v * columns + phase
        added = WAVE_PART * wave.amplitude * torch.sin(2 * math.pi * turns) if u or v else 0.0
        pictures = ((images + added).clamp(0, 1) * 255).round() / 255
        sure = model(pictures)[:, :k].softmax(1).cpu()
        by_label = {int(label): sure[labels == label].mean(0) for label in labels.unique()}
        for place in ((down + u, across + v), (down - u, across - v)):
            for label in range(k):
                others = [mean[label] for own, mean in by_label.items() if own != label]
                to_label[(*place, label)] = torch.stack(others).mean() if others else 0.0
            for shift in range(1, k):
                led = [mean[(own + shift) % k] for own, mean in by_label.items()]
                by_shift[(*place, shift - 1)] = torch.stack(led).mean()
    return waves_standing_out(to_label, by_shift)
