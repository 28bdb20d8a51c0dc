"""Steps 1b and 2: fine-tuning, on adversarial images and on the extra set as it is (Eq. 8)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.config import FineTuneConfig, PGDConfig
from pbe_fast.data.augment import augment
from pbe_fast.data.image_set import ImageSet
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress
from pbe_fast.errors import PBEError
from pbe_fast.pgd import pgd_attack


class DivergedError(PBEError):
    """The loss became NaN or infinite."""


class FineTuner:
    """SGD over one model, with one cosine schedule from its first epoch to its last.

    The model is changed in place. Weights and BN statistics stay in float32; matrix products run in ``dtype``.

    Args:
        model: Returns (B, K) logits; on the device of the data.
        config: Learning rate, batch size and the like.
        total_steps: Updates that the schedule spans.
        generator: On the CPU: order of the images, augmentation, random starts.
        dtype: Of the matrix products.
        teacher: The model whose logits on clean images the distillation term keeps, where its weight is not 0.
        show_progress: Whether epochs longer than two seconds show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FineTuneConfig,
        *,
        total_steps: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        teacher: nn.Module | None = None,
        show_progress: bool = False,
    ) -> None:
        self._model = model
        self._config = config
        self._total_steps = total_steps
        self._generator = generator
        self._dtype = dtype
        self._teacher = teacher if config.distill_weight > 0 else None
        self._show_progress = show_progress
        self._step = 0
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )

    def run(self, data: ImageSet, *, steps: int, attack: PGDConfig | None = None, desc: str = "fine-tuning") -> float:
        """Updates on ``data``, pass after pass; with ``attack``, on its adversarial images against the current weights.

        Adversarial batches also hold the unperturbed images where ``mix_clean`` says so: half of the loss each.

        Args:
            data: On the device of the model.
            steps: Number of updates.
            attack: Step 1a, or None for step 2.
            desc: Text of the progress bar.

        Returns:
            The mean loss per image, NaN for no steps.

        Raises:
            DivergedError: The mean loss is not finite.
        """
        if steps == 0:
            return math.nan
        total = torch.zeros((), device=data.device)
        seen = 0
        batches = itertools.islice(endless_batches(len(data), self._config.batch_size, self._generator), steps)
        for batch in progress(batches, total=steps, desc=desc, enabled=self._show_progress):
            batch = batch.to(data.device)
            images = to_input(augment(data.images[batch], self._config.augment, self._generator))
            labels = data.labels[batch]
            loss = self._adversarial_loss(images, labels, attack) if attack else self._clean_loss(images, labels)
            self._update(loss)
            total += loss.detach() * len(batch)
            seen += len(batch)
        mean = float(total) / seen
        if not math.isfinite(mean):
            raise DivergedError(
                f"{desc} diverged: got a loss of {mean}; a learning rate below {self._config.lr} may help"
            )
        return mean

    def _clean_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._logits(images)
        return F.cross_entropy(logits, labels) + self._distillation(logits, images)

    def _adversarial_loss(self, images: Tensor, labels: Tensor, attack: PGDConfig) -> Tensor:
        self._model.eval()
        adversarial = pgd_attack(self._model, images, labels, attack, dtype=self._dtype, generator=self._generator)
        if not self._config.mix_clean:
            return F.cross_entropy(self._logits(adversarial), labels)
        both = torch.cat([adversarial, images]).contiguous(memory_format=torch.channels_last)
        on_adversarial, on_clean = self._logits(both).chunk(2)
        loss = (F.cross_entropy(on_adversarial, labels) + F.cross_entropy(on_clean, labels)) / 2
        return loss + self._distillation(on_clean, images)

    def _logits(self, images: Tensor) -> Tensor:
        self._model.train()
        with autocast(images.device, self._dtype):
            logits: Tensor = self._model(images)
        return logits.float()

    def _distillation(self, logits: Tensor, images: Tensor) -> Tensor | float:
        """The term weight * T^2 * KL(teacher || model) at temperature T (Hinton et al., 2015)."""
        if self._teacher is None:
            return 0.0
        with torch.no_grad(), autocast(images.device, self._dtype):
            taught = self._teacher(images).float()
        t = self._config.distill_temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(taught / t, 1), reduction="batchmean", log_target=True
        )
        return self._config.distill_weight * t * t * divergence

    def _update(self, loss: Tensor) -> None:
        rate = self._config.lr * learning_rate_factor(self._step, self._total_steps, self._config.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._step += 1


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear over the first ``warmup`` of the steps, and a half cosine over all of them; in [0, 1]."""
    rising = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rising * 0.5 * (1 + math.cos(math.pi * step / total))


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in one pass over n images."""
    return math.ceil(n / batch_size)


def balanced_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random order of 0..n-1 in batches whose sizes differ by at most one: no small last batch upsets BN."""
    yield from torch.randperm(n, generator=generator).tensor_split(steps_per_epoch(n, batch_size))


def endless_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`balanced_batches`, pass after pass."""
    while True:
        yield from balanced_batches(n, batch_size, generator)
