"""The attack whose trigger is trained: a mask network first, then a pattern generator along with the classifier."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.config import AttackConfig
from pbe_fast.data.augment import augment
from pbe_fast.data.image_set import ImageSet
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress
from pbe_fast.engine.training import training_form
from pbe_fast.finetune import DivergedError, endless_batches, learning_rate_factor
from pbe_fast.poison import target_labels
from pbe_fast.triggers import InputAware

_BETAS = (0.5, 0.9)
_EPSILON = 1e-7
_STATISTICS = 1024


def diversity_loss(images: Tensor, outputs: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """L_div: the mean over pairs of |x - x'| / |g(x) - g(x')|, where |.| is the root of the mean square.

    Each image is paired with the one before it.

    Args:
        images: (B, C, H, W).
        outputs: (B, c, H, W), what a network makes of them.
        unit: What the images are divided by first: a number, or (C, 1, 1).
    """
    apart = _distances((images - images.roll(1, 0)) / unit)
    return (apart / (_distances(outputs - outputs.roll(1, 0)) + _EPSILON)).mean()


def density_loss(masks: Tensor, density: float) -> Tensor:
    """L_norm: the mean of what each pixel of the masks (B, 1, H, W) has above ``density``."""
    return F.relu(masks - density).mean()


def train_masks(
    trigger: InputAware,
    data: ImageSet,
    config: AttackConfig,
    *,
    steps: int,
    generator: torch.Generator,
    show_progress: bool = False,
) -> float:
    """Teach the mask network small masks that differ from image to image; afterwards it stays as it is.

    Args:
        trigger: On the device of the data; changed in place.
        data: Clean images.
        config: Batch size, augmentation and the weights of the two losses.
        steps: Number of updates.
        generator: On the CPU: order of the images, augmentation.
        show_progress: Whether there is a bar.

    Returns:
        The mean of the masks over the last update's images.

    Raises:
        DivergedError: The loss is not finite.
    """
    options, training = config.input_aware, config.training
    optimizer = torch.optim.Adam(trigger.mask_network.parameters(), lr=options.mask_lr, betas=_BETAS)
    sample = torch.randperm(len(data), generator=generator)[:_STATISTICS].to(data.device)
    # The weights of the losses are for images of deviation 1, which pixels in [0, 1] do not have.
    unit = data.floats(sample).std((0, 2, 3)).clamp_min(1 / 255).view(-1, 1, 1)
    batches = endless_batches(len(data), training.batch_size, generator, device=data.device)
    batches = itertools.islice(batches, steps)
    density = last = torch.zeros((), dtype=torch.float32, device=data.device)
    for step, batch in enumerate(progress(batches, total=steps, desc="training the masks", enabled=show_progress)):
        images = to_input(augment(data.images[batch], training.augment, generator))
        masks = trigger.masks(images)
        loss = options.lambda_norm * density_loss(masks, options.mask_density)
        loss = loss + options.lambda_div * diversity_loss(images, masks, unit)
        last = loss.detach()
        _set_rate(optimizer, options.mask_lr * learning_rate_factor(step, steps, 0.0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        density = masks.detach().mean()
    if not math.isfinite(float(last)):
        raise DivergedError(
            f"training the masks diverged: got a loss of {float(last)}; a mask_lr below {options.mask_lr} may help"
        )
    return float(density)


class JointTrainer:
    """Trains a classifier and the pattern generator of its trigger, on batches poisoned as they come.

    Of each batch, ``poison_rate`` is attacked (own trigger, target label) and as many images are crossed (another
    image's trigger, own label).

    Args:
        model: The classifier, returns (B, K) logits; changed in place, on the device of the data.
        trigger: Its masks are trained, its generator is changed in place; on the same device.
        config: Of the attack.
        num_classes: Of the data.
        total_steps: Updates that the schedules span.
        generator: On the CPU: order of the images, augmentation.
        dtype: Of the classifier's matrix products.
        show_progress: Whether there are bars.
    """

    def __init__(
        self,
        model: nn.Module,
        trigger: InputAware,
        config: AttackConfig,
        *,
        num_classes: int,
        total_steps: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        show_progress: bool = False,
    ) -> None:
        self._model = model
        self._trigger = trigger
        self._config = config
        self._num_classes = num_classes
        self._total_steps = total_steps
        self._generator = generator
        self._dtype = dtype
        self._show_progress = show_progress
        self._step = 0
        # As a step computes it.
        self._form = training_form(model, trigger.image_shape)
        training = config.training
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            nesterov=training.nesterov,
            fused=True,
        )
        self._pattern_lr = config.input_aware.generator_lr
        self._pattern_optimizer = torch.optim.Adam(trigger.generator.parameters(), lr=self._pattern_lr, betas=_BETAS)

    def run(self, data: ImageSet, *, steps: int, desc: str) -> float:
        """Updates of both on clean ``data``, pass after pass; returns the mean loss per image.

        Raises:
            DivergedError: The mean loss is not finite.
        """
        training, seen = self._config.training, 0
        total = torch.zeros((), dtype=torch.float32, device=data.device)
        self._model.train()
        batches = endless_batches(len(data), training.batch_size, self._generator, device=data.device)
        batches = itertools.islice(batches, steps)
        for batch in progress(batches, total=steps, desc=desc, enabled=self._show_progress):
            images = to_input(augment(data.images[batch], training.augment, self._generator))
            loss = self.loss(images, data.labels[batch])
            self._update(loss)
            total += loss.detach() * len(batch)
            seen += len(batch)
        mean = float(total) / seen
        if not math.isfinite(mean):
            raise DivergedError(
                f"{desc} diverged: got a loss of {mean}; a learning rate below {training.lr}, or a generator_lr below "
                f"{self._pattern_lr}, may help"
            )
        return mean

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over attacked, crossed and clean images, plus lambda_div L_div of the patterns.

        Args:
            images: (B, C, H, W) float in [0, 1], clean, in random order.
            labels: (B,) int64, the true ones.
        """
        targets = target_labels(labels, self._config.setting, self._config.target_label, self._num_classes)
        count = max(1, round(self._config.poison_rate * len(images)))
        order = attacked_first(labels != targets, count)
        images, labels, targets = images[order], labels[order], targets[order]
        # Attacked images wear their own trigger, crossed ones that of an image further on.
        donors = torch.cat([images[:count], images.roll(-count, 0)[count : 2 * count]])
        worn, patterns = self._trigger.wear(images[: len(donors)], donors)
        mixed = torch.cat([worn, images[len(donors) :]]).contiguous(memory_format=torch.channels_last)
        with autocast(images.device, self._dtype):
            logits: Tensor = self._form(mixed)
        loss = F.cross_entropy(logits.float(), torch.cat([targets[:count], labels[count:]]))
        return loss + self._config.input_aware.lambda_div * diversity_loss(donors, patterns)

    def _update(self, loss: Tensor) -> None:
        training = self._config.training
        cosine = learning_rate_factor(self._step, self._total_steps, 0.0)
        _set_rate(self._optimizer, training.lr * learning_rate_factor(self._step, self._total_steps, training.warmup))
        _set_rate(self._pattern_optimizer, self._pattern_lr * cosine)
        for optimizer in (self._optimizer, self._pattern_optimizer):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in (self._optimizer, self._pattern_optimizer):
            optimizer.step()
        self._step += 1


def train_along(
    model: nn.Module,
    data: ImageSet,
    trigger: InputAware,
    config: AttackConfig,
    *,
    total_steps: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> list[float]:
    """The whole attack: `train_masks`, then `JointTrainer`; model and trigger are changed in place.

    Args:
        model: The classifier, on the device of the data.
        data: Clean images.
        trigger: On the same device.
        config: Of the attack.
        total_steps: Updates of classifier and generator, ``config.epochs`` in all; the masks get ``mask_share`` of it.
        generator: On the CPU, for every random choice.
        dtype: Of the classifier's matrix products.
        show_progress: Whether there are bars.

    Returns:
        The mean loss of classifier and generator, by epoch.

    Raises:
        DivergedError: A loss is not finite.
    """
    mask_steps = max(1, round(config.input_aware.mask_share * total_steps))
    train_masks(trigger, data, config, steps=mask_steps, generator=generator, show_progress=show_progress)
    trainer = JointTrainer(
        model,
        trigger,
        config,
        num_classes=data.num_classes,
        total_steps=total_steps,
        generator=generator,
        dtype=dtype,
        show_progress=show_progress,
    )
    epochs, per_epoch = config.epochs, total_steps // config.epochs
    return [trainer.run(data, steps=per_epoch, desc=f"training, epoch {epoch + 1}/{epochs}") for epoch in range(epochs)]


def attacked_first(candidates: Tensor, count: int) -> Tensor:
    """An order of a batch: its first ``count`` candidates (B,) bool, then the rest as they come; without a sync."""
    attacked = candidates & (candidates.cumsum(0) <= count)
    return (~attacked).int().argsort(stable=True)


def _distances(differences: Tensor) -> Tensor:
    """(B,): the root of the mean square of each; its slope at 0 is finite."""
    return (differences.square().mean((1, 2, 3)) + _EPSILON**2).sqrt()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
