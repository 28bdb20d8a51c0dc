"""Training an infected model: the attacker's side, to have something to purify and to measure on."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pbe_fast.config import AttackConfig
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.data.augment import augment
from pbe_fast.engine.copies import without_hook, working_copy
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import resolve_device
from pbe_fast.engine.rounding import precision_for
from pbe_fast.engine.seeding import check_seed, seeded
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.input_aware import train_along
from pbe_fast.models import check_batch, check_differentiable, check_model, check_trainable
from pbe_fast.options import check_kind
from pbe_fast.poison import check_target, check_trigger, poison, poison_candidates
from pbe_fast.triggers import InputAware, Trigger, make_trigger


@dataclass(frozen=True, eq=False, kw_only=True)
class InfectedModel:
    """What an attack leaves behind.

    Attributes:
        model: In eval mode, on the CPU, in float32.
        train_data: The poisoned training set, with ``poison_mask`` and ``true_labels``. Of an attack that draws its
            poisoned subset anew in each epoch, one such draw; where it trains its trigger, with the trigger at the end.
        trigger: For `triggered_test_set`; trained, where the attack does that.
        config: The options of the attack.
        losses: Mean training loss by epoch.
        seed: Of the run.
    """

    model: nn.Module
    train_data: ImageSet
    trigger: Trigger
    config: AttackConfig
    losses: list[float]
    seed: int


@gradients()
def train_infected(
    model: nn.Module,
    train_data: Any,
    *,
    config: AttackConfig | None = None,
    trigger: Trigger | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> InfectedModel:
    """Train ``model`` (a copy of it) on poisoned images.

    Args:
        model: Returns (B, K) logits for float images in [0, 1].
        train_data: Clean images, in any form that `as_image_set` takes.
        config: Attack, poison rate, target, training.
        trigger: In place of the one that ``config.attack`` names. Where the attack trains it, a copy is trained.
        seed: Fixes every random choice, the trigger's included.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32" or "bf16".
        progress: Whether to show a bar.

    Raises:
        InputError: A model that cannot be trained, or an attack that the data do not allow (for SIG, a rate above the
            target class's size), before any work starts.
    """
    config = AttackConfig() if config is None else config
    check_kind(config, AttackConfig)
    seed = check_seed(seed)
    where = resolve_device(device)
    clean = as_image_set(train_data, progress=progress)
    check_target(config.setting, config.target_label, clean.num_classes)
    check_model(model, clean.image_shape, clean.num_classes)
    check_trainable(model, clean.image_shape)
    check_batch(model, len(clean), "training images")
    trigger = make_trigger(config.attack, clean.image_shape, seed=seed) if trigger is None else trigger
    check_trigger(trigger)
    config = dataclasses.replace(config, attack=trigger.name)
    if isinstance(trigger, InputAware):
        # It learns from what the classifier makes of its images.
        check_differentiable(model, clean.image_shape)

    which: dict[str, Any] = {
        "poison_rate": config.poison_rate,
        "setting": config.setting,
        "target_label": config.target_label,
    }
    poison_candidates(clean, trigger, **which)
    trained = working_copy(model, where, clean.image_shape)
    per_epoch = steps_per_epoch(len(clean), config.training.batch_size)
    tuning: dict[str, Any] = {
        "total_steps": config.epochs * per_epoch,
        "generator": torch.Generator().manual_seed(seed),
        "dtype": precision_for(model, clean.image_shape, device=where, requested=precision),
        "show_progress": progress,
    }
    # A generator takes 64 bits, and the epochs are added to it.
    first_draw = seed * 10_007 % 2**62
    with seeded(seed, where):
        if isinstance(trigger, InputAware):
            trigger, clean = copy.deepcopy(trigger).to(where), clean.to(where)
            losses = train_along(trained, clean, trigger, config, **tuning)
            poisoned = poison(clean, trigger, seed=first_draw, **which)
            trigger.to("cpu")
        else:
            poisoned = poison(clean, trigger, seed=first_draw, **which)
            # One set in one place for all epochs: what a GPU records of a step reads its memory.
            data = poisoned if trigger.redraw_each_epoch else poisoned.to(where)
            training = config.training
            if trigger.redraw_each_epoch:
                # An epoch is one pass: images moved before it, and then triggered, are augmented as they should be.
                training = dataclasses.replace(training, augment="none")
            tuner, losses = FineTuner(trained, training, **tuning), []
            for epoch in range(config.epochs):
                if trigger.redraw_each_epoch:
                    moved = augment(clean.images, config.training.augment, tuning["generator"])
                    drawn = poison(dataclasses.replace(clean, images=moved), trigger, seed=first_draw + epoch, **which)
                    data = data.copy_(drawn) if epoch else drawn.to(where)
                desc = f"training, epoch {epoch + 1}/{config.epochs}"
                losses.append(tuner.run(data, steps=per_epoch, desc=desc))
    return InfectedModel(
        model=without_hook(trained).eval().cpu(),
        train_data=poisoned.to("cpu"),
        trigger=trigger,
        config=config,
        losses=losses,
        seed=seed,
    )
