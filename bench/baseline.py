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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plain import logits_of, sgd, training_loader
from plain_search import attack_counts_plainly, leading_waves_plainly, plain_attack
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pbe_fast.attraction import attracting_labels
from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig, WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.seeding import generator_for
from pbe_fast.extra_set import first_of_each, initial_extra_set, judging_extra_set, next_extra_set, steady_images
from pbe_fast.finetune import learning_rate_factor
from pbe_fast.ranking import (
    FEWEST_LABELS,
    Ranking,
    changed_labels,
    label_ahead,
    label_distances,
    rank_images,
    rank_over_rounds,
)
from pbe_fast.steadiness import VIEWS, kept, rise, seen, without_waves

# As pbe_fast.rounds has it.
SUREST = 0.1


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
    generator = generator_for(seed, "purify")
    waves = leading_waves_plainly(infected, clean or train, config, generator, where)
    attacks = [
        dataclasses.replace(attack, near=waves.frequencies) if isinstance(attack, WaveConfig) else attack
        for attack in config.attacks
    ]
    tune = functools.partial(fine_tune, config=config, attacks=attacks, device=where)
    if clean is not None:
        tune(purified, clean, None, teacher=infected)
        if train is None:
            return PlainResult(purified.eval(), None)
        ranking, agrees = rank_plainly(infected, purified, train, where)
        changed = suspects = changed_labels(label_distances(ranking, train.labels, train.num_classes)) | waves.labels
        if config.refining_fractions and waves.shift is None:
            counts = attack_counts_plainly(infected, train, config, generator, where)
            suspects = changed | attracting_labels(counts)
        if config.refining_fractions and config.fragile_share > 0 and not suspects.any():
            logits = logits_of(infected, train, where)
            fragile = fragility_plainly(infected, train, logits, waves.frequencies, where)
            steady = steady_images(fragile, train.labels, config)
    else:
        assert train is not None
        changed = suspects = torch.zeros(train.num_classes, dtype=torch.bool)
        if config.initial != "random":
            changed = waves.labels
            if waves.shift is None:
                counts = attack_counts_plainly(infected, train, config, generator, where)
                suspects = attracting_labels(counts) | waves.labels
        fragile = None
        logits = logits_of(infected, train, where)
        if config.initial == "steady" and not suspects.any():
            fragile = fragility_plainly(infected, train, logits, waves.frequencies, where)
            steady = steady_images(fragile, train.labels, config)
            enough = len(train.labels.unique()) >= 2 * FEWEST_LABELS
            if config.leave_out and waves.shift is None and enough:
                changed = suspects = forgotten_labels_plainly(
                    infected, train, logits, config, generator, fragile, tune, where
                )
            if int(suspects.sum()) == 1:
                fragile = steady = None
        chosen = initial_extra_set(logits, train.labels, suspects, config, generator, fragility=fragile)
        # Of the labels left out the infected model teaches what it knows.
        tune(purified, train, chosen, teacher=infected if suspects.any() else None)
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
        tune(purified, train, chosen, teacher=None)
        now = rank_plainly(infected, purified, train, where)
        ranking, agrees = rank_over_rounds((ranking, agrees), now, of_changed)
    return PlainResult(purified.eval(), ranking)


def rank_plainly(
    infected: nn.Module, purified: nn.Module, train: ImageSet, device: torch.device
) -> tuple[Ranking, Tensor]:
    """Lines 6 and 7, which ask both models in every round; and where the purified one agrees with the label."""
    infected_logits, purified_logits = logits_of(infected, train, device), logits_of(purified, train, device)
    return rank_images(infected_logits, purified_logits), purified_logits.argmax(1) == train.labels


def forgotten_labels_plainly(
    infected: nn.Module,
    train: ImageSet,
    logits: Tensor,
    config: PurifyConfig,
    generator: torch.Generator,
    fragile: Tensor,
    tune: Callable[..., None],
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
        tune(purified, train, chosen, teacher=infected, everywhere=everywhere)
        ranking, _ = rank_plainly(infected, purified, train, device)
        distances = label_distances(ranking, train.labels, train.num_classes, among=surest) * left_out
        forgotten |= changed_labels(distances) | label_ahead(distances)
    return forgotten


def fragility_plainly(
    model: nn.Module, data: ImageSet, logits: Tensor, frequencies: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    """pbe_fast.steadiness.fragility, image set by image set."""
    worst = torch.zeros(len(data))
    notch = [functools.partial(without_waves, frequencies=frequencies)] if frequencies else []
    for view in [*VIEWS.values(), *notch]:
        changed = dataclasses.replace(data, images=seen(data.images, view))
        answers = logits_of(model, changed, device)
        if kept(answers, logits, data.labels):
            worst = torch.maximum(worst, rise(answers, logits, data.labels))
    return worst.argsort(stable=True).argsort() / len(worst) if worst.any() else worst


def fine_tune(
    model: nn.Module,
    data: ImageSet,
    chosen: Tensor | None,
    *,
    config: PurifyConfig,
    attacks: Sequence[PGDConfig | WaveConfig],
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
    turns = [plain_attack(model, attack) for attack in attacks]
    batches = endless(training_loader(data, tuning, chosen=chosen))
    for step in range(total):
        images, labels = (tensor.to(device) for tensor in next(batches))
        heeded = None if chosen is None or everywhere else labels
        model.train()
        if step < config.adversarial_steps:
            adversarial = turns[step % len(turns)](images, labels)
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
