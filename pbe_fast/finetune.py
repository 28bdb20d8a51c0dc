"""Steps 1b and 2: fine-tuning, on adversarial images and on the extra set as it is (Eq. 8)."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attacker import PGD
from pbe_fast.config import FineTuneConfig, PGDConfig, WaveConfig
from pbe_fast.data.feeding import Buffers, balanced_batches, draw_batches, endless_batches, steps_per_epoch
from pbe_fast.data.image_set import ImageSet
from pbe_fast.engine import profile
from pbe_fast.engine.allocator import kept_heap
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress
from pbe_fast.engine.replay import Recorder, Replay
from pbe_fast.engine.training import training_form
from pbe_fast.errors import InputError, PBEError
from pbe_fast.waves import Waves

__all__ = [
    "DivergedError",
    "FineTuner",
    "balanced_batches",
    "endless_batches",
    "learning_rate_factor",
    "steps_per_epoch",
]


# What makes the images of step 1b.
Perturbation = PGDConfig | WaveConfig


class DivergedError(PBEError):
    """The loss became NaN or infinite."""


class FineTuner:
    """SGD over one model, with one cosine schedule from its first epoch to its last.

    The model is changed in place. Weights and BN statistics stay in float32; matrix products run in ``dtype``. A step
    works on fixed buffers and asks for no value, so that a GPU replays it as a graph; on a CPU it runs as it stands.

    Args:
        model: Returns (B, K) logits; on the device where the work is done.
        config: Learning rate, batch size and the like.
        total_steps: Updates that the schedule spans.
        generator: On the CPU: order of the images, augmentation, random starts.
        dtype: Of the matrix products.
        teacher: The model whose logits on clean images the distillation term keeps, where its weight is not 0; in eval
            mode. It is copied.
        show_progress: Whether epochs longer than two seconds show a bar.

    Raises:
        InputError: An ``augment`` of "auto", which `pbe_fast.mirroring.resolve_augment` settles first.
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
        if config.augment == "auto":
            raise InputError("augment of a FineTuner", got="auto", accepted="what resolve_augment makes of it")
        self._model = model
        self._config = config
        self._generator = generator
        self._dtype = dtype
        self._show_progress = show_progress
        parameters = list(model.parameters())
        self._device = parameters[0].device
        self._rate = torch.zeros((), dtype=torch.float32, device=self._device)
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        self._optimizer = torch.optim.SGD(
            parameters,
            lr=self._rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        self._attackers: dict[tuple[PGDConfig, tuple[int, int, int]], PGD] = {}
        self._recorded: dict[tuple[int, bool, nn.Module | None], _Step] = {}
        self._recorded_for: tuple[ImageSet, bool] | None = None
        # The model as a step computes it, once the images' shape is known.
        self._form: nn.Module | None = None
        self._recorder = Recorder(self._device)
        self.restart(total_steps=total_steps, teacher=teacher)

    def restart(self, *, total_steps: int, teacher: nn.Module | None = None, where_right: bool = False) -> None:
        """A new schedule from rest, as a new round has it; what was recorded for a GPU without a teacher stays in use.

        Args:
            total_steps: Updates that the schedule spans.
            teacher: As for the class.
            where_right: Whether the teacher is heeded only on images that it answers with their label: a wrong answer
                may be a trigger's.
        """
        self._total_steps = total_steps
        self._step = 0
        self._where_right = where_right
        self._teacher = teacher if self._config.distill_weight > 0 else None
        # A teacher is of one round: its steps would only take memory in the others.
        self._recorded = {key: step for key, step in self._recorded.items() if key[2] is None}
        for parameter in self._model.parameters():
            if parameter.requires_grad and self._config.momentum > 0:
                # From zeros, the first update is the gradient itself, without a first step of another kind.
                velocity = self._optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                velocity.zero_()

    @gradients()
    @kept_heap()
    def run(
        self,
        data: ImageSet,
        *,
        steps: int,
        attack: Perturbation | Sequence[Perturbation] | None = None,
        among: Tensor | None = None,
        streamed: bool = False,
        desc: str = "fine-tuning",
    ) -> float:
        """Updates on ``data``, pass after pass; with ``attack``, on its adversarial images against the current weights.

        Adversarial batches also hold the unperturbed images where ``mix_clean`` says so: half of the loss each.

        Args:
            data: On the device of the model, or on the CPU: then its batches are sent there one by one.
            steps: Number of updates.
            attack: Step 1a, or several that the updates go through in turn; None for step 2.
            among: int64 indices of the images to use, each once in a pass; all, if not given.
            streamed: Read batches ahead also where data and model share a device, as for a memory map.
            desc: Text of the progress bar.

        Returns:
            The mean loss per image, NaN for no steps.

        Raises:
            DivergedError: The mean loss is not finite.
        """
        if steps == 0:
            return math.nan
        attacks = (attack,) if isinstance(attack, PGDConfig | WaveConfig) else tuple(attack or ())
        streamed = streamed or data.device != self._device
        if self._teacher is not None and not isinstance(self._teacher, FrozenCopy):
            self._teacher = FrozenCopy(self._teacher, dtype=self._dtype, image_shape=data.image_shape)
        if self._form is None:
            self._form = training_form(self._model, data.image_shape)
        batches = draw_batches(
            data,
            steps=steps,
            batch_size=self._config.batch_size,
            augment=self._config.augment,
            generator=self._generator,
            device=self._device,
            among=among,
            streamed=streamed,
        )
        shown = progress(batches, total=steps, desc=desc, enabled=self._show_progress)
        self._loss_sum.zero_()
        seen = 0
        # Other random starts in every update, also where a pass brings the same image again.
        randomly = any(attack.draws for attack in attacks)
        first_seed = int(torch.randint(2**62, (), generator=self._generator)) if randomly else 0
        seeds = itertools.count(first_seed)
        turns: Iterator[Perturbation | None] = itertools.cycle(attacks or (None,))
        for rate, batch, turn in zip(self._rates(steps), shown, itertools.islice(turns, steps), strict=True):
            size = len(batch.ids)
            step = self._step_for(data, size, attacked=turn is not None, resident=not streamed)
            step.buffers.load(batch)
            self._rate.copy_(rate)
            step.prepare()
            if turn is not None:
                attacker = self._attacker_for(turn, data, steps // len(attacks))
                step.buffers.adversarial.copy_(
                    attacker(step.buffers.images, step.buffers.labels, batch.ids, seed=next(seeds))
                )
            step.update()
            seen += size
            profile.record(images=size, forwards=size * self._forwards(turn))
        self._step += steps
        self._optimizer.zero_grad(set_to_none=True)
        mean = float(self._loss_sum) / seen
        if not math.isfinite(mean):
            raise DivergedError(
                f"{desc} diverged: got a loss of {mean}; a learning rate below {self._config.lr} may help"
            )
        return mean

    def _rates(self, steps: int) -> Tensor:
        factors = [
            learning_rate_factor(step, self._total_steps, self._config.warmup)
            for step in range(self._step, self._step + steps)
        ]
        return torch.tensor([self._config.lr * factor for factor in factors], dtype=torch.float32).to(self._device)

    def _step_for(self, data: ImageSet, size: int, *, attacked: bool, resident: bool) -> _Step:
        """The step for batches of this size, which a GPU records once: its buffers and its functions over them."""
        if (data, resident) != self._recorded_for:
            # What was recorded reads the other set's memory.
            self._recorded.clear()
            self._recorded_for = (data, resident)
        key = (size, attacked, self._teacher)
        if key not in self._recorded:
            buffers = Buffers(data, size, self._device, resident=resident)
            # No cycle: what the tuner holds goes with it, not when the garbage collector comes by.
            own = weakref.proxy(self)

            def prepare() -> None:
                buffers.fill(own._config.augment != "none")

            def update() -> None:
                if attacked:
                    loss = own._adversarial_loss(buffers.adversarial, buffers.images, buffers.labels)
                else:
                    loss = own._clean_loss(buffers.images, buffers.labels)
                own._update(loss, size)

            def whole() -> None:
                prepare()
                update()

            if attacked:
                # The attack between them is recorded, or not, by itself.
                prepared = Replay(prepare, self._recorder, kind="gathering")
                step = _Step(buffers, prepared, Replay(update, self._recorder, kind="update"))
            else:
                step = _Step(buffers, lambda: None, Replay(whole, self._recorder, kind="update"))
            self._recorded[key] = step
        return self._recorded[key]

    def _forwards(self, attack: Perturbation | None) -> float:
        """Work per image in forward passes: those of the attack; an update is three, the teacher one."""
        work = 3.0 + (self._teacher is not None)
        if attack is not None:
            work += attack.passes + 3 * self._config.mix_clean
            work -= self._teacher is not None and not self._config.mix_clean
        return work

    def _clean_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._logits(images)
        return F.cross_entropy(logits, labels) + self._distillation(logits, images, labels)

    def _attacker_for(self, attack: Perturbation, data: ImageSet, steps: int) -> PGD | Waves:
        """Step 1a against the current weights; what it holds, and records for a GPU, lasts for all rounds."""
        if isinstance(attack, WaveConfig):
            return Waves(attack)
        key = (attack, data.image_shape)
        if key not in self._attackers:
            size = self._config.batch_size
            self._attackers[key] = PGD(
                self._model,
                attack,
                image_shape=data.image_shape,
                batch_size=size,
                dtype=self._dtype,
                planned=steps * size,
                beside=next((pgd for (_, shape), pgd in self._attackers.items() if shape == data.image_shape), None),
                recorder=self._recorder,
            )
        self._attackers[key].refresh(self._model)
        return self._attackers[key]

    def _adversarial_loss(self, adversarial: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        if not self._config.mix_clean:
            return F.cross_entropy(self._logits(adversarial), labels)
        both = torch.cat([adversarial, images]).contiguous(memory_format=torch.channels_last)
        on_adversarial, on_clean = self._logits(both).chunk(2)
        loss = (F.cross_entropy(on_adversarial, labels) + F.cross_entropy(on_clean, labels)) / 2
        return loss + self._distillation(on_clean, images, labels)

    def _logits(self, images: Tensor) -> Tensor:
        assert self._form is not None
        self._model.train()
        with autocast(images.device, self._dtype):
            logits: Tensor = self._form(images)
        return logits.float()

    def _distillation(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor | float:
        """The term weight * T^2 * KL(teacher || model) at temperature T (Hinton et al., 2015), a mean over images."""
        if self._teacher is None:
            return 0.0
        with torch.no_grad():
            taught = self._teacher(images).float()
        t = self._config.distill_temperature
        by_class = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(taught / t, 1), reduction="none", log_target=True
        )
        divergence = by_class.sum(1)
        if self._where_right:
            divergence = divergence * (taught.argmax(1) == labels)
        return self._config.distill_weight * t * t * divergence.mean()

    def _update(self, loss: Tensor, size: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._loss_sum.add_(loss.detach(), alpha=size)


@dataclass(frozen=True, eq=False)
class _Step:
    """What a step does before the attack, and after it or in all."""

    buffers: Buffers
    prepare: Callable[[], None]
    update: Replay


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear over the first ``warmup`` of the steps, and a half cosine over all of them; in [0, 1]."""
    rising = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rising * 0.5 * (1 + math.cos(math.pi * step / total))
