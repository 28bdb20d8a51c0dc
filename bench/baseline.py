"""Algorithm 1 as one would write it down: eager float32, a DataLoader with torchvision's transforms, torchattacks' PGD.

The recipe and every hyperparameter are `PurifyConfig`'s, and the images of the extra sets are chosen by pbe_fast's own
functions, so that the outcome is of equal quality; all work of the model is done in the plain way. `purify_plainly` is
what `bench/speed/test_purify.py` races `pbe_fast.purify` against.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from plain import loader_of, logits_of, sgd, training_loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pbe_fast.attraction import LARGEST_WINDOW, attracting_labels
from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig, WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.extra_set import first_of_each, initial_extra_set, judging_extra_set, next_extra_set
from pbe_fast.finetune import learning_rate_factor
from pbe_fast.pgd import random_windows
from pbe_fast.ranking import (
    FEWEST_LABELS,
    Ranking,
    changed_labels,
    label_ahead,
    label_distances,
    rank_images,
    rank_over_rounds,
)
from pbe_fast.steadiness import VIEWS, kept, rise, seen
from pbe_fast.waves import add_waves

# As pbe_fast.attraction and pbe_fast.rounds have them.
SAMPLE, HALVINGS, MOVED, SUREST = 1000, 6, 0.25, 0.1


@dataclass(frozen=True, eq=False)
class PlainResult:
    """The purified model in eval mode, and the last ranking of the training set."""

    model: nn.Module
    ranking: Ranking | None


def purify_plainly(
    model: nn.Module,
    train: ImageSet | None = None,
    *,
    clean: ImageSet | None = None,
    config: PurifyConfig,
    seed: int = 0,
    device: str = "cpu",
) -> PlainResult:
    """Algorithm 1, with a clean set or without; arguments as for `pbe_fast.purify`, ``augment`` other than "auto"."""
    torch.manual_seed(seed)
    where = torch.device(device)
    infected = copy.deepcopy(model).to(where).eval().requires_grad_(False)
    purified = copy.deepcopy(infected).requires_grad_(True)
    train = None if train is None else train.to("cpu")
    steady = None
    generator = torch.Generator().manual_seed(seed)
    if clean is not None:
        fine_tune(purified, clean, None, config, teacher=infected, device=where)
        if train is None:
            return PlainResult(purified.eval(), None)
        ranking, agrees = rank_plainly(infected, purified, train, where)
        changed = suspects = changed_labels(label_distances(ranking, train.labels, train.num_classes))
        if config.refining_fractions:
            counts = attack_counts_plainly(infected, train, config, generator, where)
            suspects = changed | attracting_labels(counts)
    else:
        assert train is not None
        suspects = torch.zeros(train.num_classes, dtype=torch.bool)
        if config.initial != "random":
            suspects = attracting_labels(attack_counts_plainly(infected, train, config, generator, where))
        fragile, changed = None, torch.zeros_like(suspects)
        logits = logits_of(infected, train, where)
        if config.initial == "steady" and not suspects.any():
            fragile = fragility_plainly(infected, train, logits, where)
            share, floor = 1 - config.fragile_share, config.label_floor
            steady = torch.zeros_like(fragile, dtype=torch.bool)
            steady[first_of_each(fragile.argsort(stable=True), train.labels, share, floor)] = True
            if config.leave_out and len(train.labels.unique()) >= 2 * FEWEST_LABELS:
                changed = suspects = forgotten_labels_plainly(
                    infected, train, logits, config, generator, fragile, where
                )
            if int(suspects.sum()) == 1:
                fragile = steady = None
        first_round_plainly(purified, infected, train, logits, suspects, config, generator, fragile, where)
        ranking, agrees = rank_plainly(infected, purified, train, where)
    of_changed = changed[train.labels]
    for fraction in config.fractions[1:] if clean is None else config.refining_fractions:
        chosen = next_extra_set(
            ranking,
            train.labels,
            suspects,
            fraction,
            agrees=agrees,
            changed=changed,
            steady=steady,
            floor=config.label_floor if clean is None else 0.0,
        )
        fine_tune(purified, train, chosen, config, teacher=None, device=where)
        now = rank_plainly(infected, purified, train, where)
        ranking, agrees = rank_over_rounds((ranking, agrees), now, of_changed)
    return PlainResult(purified.eval(), ranking)


def rank_plainly(
    infected: nn.Module, purified: nn.Module, train: ImageSet, device: torch.device
) -> tuple[Ranking, Tensor]:
    """Lines 6 and 7, which ask both models in every round; and where the purified one agrees with the label."""
    infected_logits, purified_logits = logits_of(infected, train, device), logits_of(purified, train, device)
    return rank_images(infected_logits, purified_logits), purified_logits.argmax(1) == train.labels


def first_round_plainly(
    purified: nn.Module,
    infected: nn.Module,
    train: ImageSet,
    logits: Tensor,
    left_out: Tensor,
    config: PurifyConfig,
    generator: torch.Generator,
    fragile: Tensor | None,
    device: torch.device,
) -> None:
    """The round on D_ext^0, without images of some labels; of these the infected model teaches what it knows."""
    chosen = initial_extra_set(logits, train.labels, left_out, config, generator, fragility=fragile)
    fine_tune(purified, train, chosen, config, teacher=infected if left_out.any() else None, device=device)


def forgotten_labels_plainly(
    infected: nn.Module,
    train: ImageSet,
    logits: Tensor,
    config: PurifyConfig,
    generator: torch.Generator,
    fragile: Tensor,
    device: torch.device,
) -> Tensor:
    """Labels that change far more than others where half of the labels is left out."""
    forgotten = torch.zeros(train.num_classes, dtype=torch.bool)
    loss = F.cross_entropy(logits, train.labels, reduction="none")
    surest = first_of_each(loss.argsort(stable=True), train.labels, SUREST, 1.0)
    for everywhere, half in itertools.product((False, True), range(2)):
        if half == 0 and forgotten.any():
            break
        left_out = torch.zeros_like(forgotten)
        left_out[train.labels.unique()[half::2]] = True
        purified = copy.deepcopy(infected).requires_grad_(True)
        chosen = judging_extra_set(logits, train.labels, left_out, fragile, config, generator)
        fine_tune(purified, train, chosen, config, teacher=infected, everywhere=everywhere, device=device)
        ranking, _ = rank_plainly(infected, purified, train, device)
        distances = label_distances(ranking, train.labels, train.num_classes, among=surest) * left_out
        forgotten |= changed_labels(distances) | label_ahead(distances)
    return forgotten


def fragility_plainly(model: nn.Module, data: ImageSet, logits: Tensor, device: torch.device) -> Tensor:
    """pbe_fast.steadiness.fragility, image set by image set."""
    worst = torch.zeros(len(data))
    for view in VIEWS.values():
        changed = dataclasses.replace(data, images=seen(data.images, view))
        answers = logits_of(model, changed, device)
        if kept(answers, logits, data.labels):
            worst = torch.maximum(worst, rise(answers, logits, data.labels))
    return worst.argsort(stable=True).argsort() / len(worst) if worst.any() else worst


def fine_tune(
    model: nn.Module,
    data: ImageSet,
    chosen: Tensor | None,
    config: PurifyConfig,
    *,
    teacher: nn.Module | None,
    device: torch.device,
    everywhere: bool = False,
) -> None:
    """Steps 1 and 2 of a round; the teacher is heeded where it is right, of chosen images, unless ``everywhere``."""
    tuning = config.finetune
    size = len(data) if chosen is None else len(chosen)
    per_epoch = math.ceil(size / tuning.batch_size)
    clean_steps = max(config.clean_steps, config.clean_epochs * per_epoch)
    total = config.adversarial_steps + clean_steps
    optimizer = sgd(model, tuning)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total, tuning.warmup)
    )
    attacks = [plain_attack(model, pgd) for pgd in config.attacks]
    batches = endless(training_loader(data, tuning, chosen=chosen))
    for step in range(total):
        images, labels = (tensor.to(device) for tensor in next(batches))
        heeded = None if chosen is None or everywhere else labels
        model.train()
        if step < config.adversarial_steps:
            adversarial = attacks[step % len(attacks)](images, labels)
            if tuning.mix_clean:
                on_adversarial, logits = model(torch.cat([adversarial, images])).chunk(2)
                loss = (F.cross_entropy(on_adversarial, labels) + F.cross_entropy(logits, labels)) / 2
                loss = loss + distillation(logits, images, heeded, teacher, tuning)
            else:
                loss = F.cross_entropy(model(adversarial), labels)
        else:
            logits = model(images)
            loss = F.cross_entropy(logits, labels) + distillation(logits, images, heeded, teacher, tuning)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


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


def endless(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    """Pass after pass."""
    while True:
        yield from loader


def distillation(
    logits: Tensor, images: Tensor, labels: Tensor | None, teacher: nn.Module | None, config: FineTuneConfig
) -> Tensor:
    """weight * T^2 * KL(teacher || model) at temperature T; with labels, where the teacher answers with them."""
    if teacher is None or config.distill_weight == 0:
        return logits.new_zeros(())
    with torch.no_grad():
        taught = teacher(images)
    t = config.distill_temperature
    kl = F.kl_div(F.log_softmax(logits / t, 1), F.softmax(taught / t, 1), reduction="none").sum(1)
    if labels is not None:
        kl = kl * (taught.argmax(1) == labels)
    return config.distill_weight * t * t * kl.mean()


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
