"""Neural attention distillation (Li et al., ICLR 2021, arXiv:2101.05930): learn from a fine-tuned copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.baselines import NADConfig
from pbe_fast.config import FineTuneConfig
from pbe_fast.defenses.base import Defense, Work
from pbe_fast.engine.copies import deep_copy
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import autocast
from pbe_fast.finetune import FineTuner
from pbe_fast.models import conv_stages, outputs_of


class NAD(Defense[NADConfig]):
    """A fine-tuned copy is the teacher; the student is fine-tuned to share its attention."""

    method = "nad"

    def run(self, work: Work, config: NADConfig) -> None:
        """Make the teacher, then distill it into the infected model."""
        stages = conv_stages(work.infected, to_input(work.clean.images[:2]), len(config.betas))
        betas = dict(zip(stages, config.betas[-len(stages) :], strict=True))
        teacher = deep_copy(work.model)
        work.fine_tune(
            work.clean,
            config.finetune,
            epochs=config.teacher_epochs,
            min_updates=config.min_updates,
            name="teacher",
            model=teacher,
        )
        work.fine_tune(
            work.clean,
            config.finetune,
            epochs=config.epochs,
            min_updates=config.min_updates,
            name="distillation",
            tuner=Distiller,
            guide=teacher.eval().requires_grad_(False),
            betas=betas,
            power=config.attention_power,
        )
        work.history[-1]["finding"] = f"attention at {', '.join(stages)}"


class Distiller(FineTuner):
    """Fine-tuning with the attention loss as a further term.

    Args:
        model: The student.
        config: As for `FineTuner`.
        guide: The teacher, frozen.
        betas: Weight of the attention loss by the name of the module, of both networks, that ends a stage.
        power: p of `attention_map`.
        options: As for `FineTuner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FineTuneConfig,
        *,
        guide: nn.Module,
        betas: dict[str, float],
        power: float,
        **options: Any,
    ) -> None:
        super().__init__(model, config, **options)
        # Its own modules, which a form made for training would pass by, are where the activations are read.
        self._form = model
        self._guide = guide
        self._betas = betas
        self._power = power

    def _clean_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with outputs_of(self._guide, self._betas) as taught, torch.no_grad(), autocast(images.device, self._dtype):
            self._guide(images)
        with outputs_of(self._model, self._betas) as learned:
            logits = self._logits(images)
        attention = [
            beta * attention_loss(learned[name], taught[name], self._power) for name, beta in self._betas.items()
        ]
        return F.cross_entropy(logits, labels) + torch.stack(attention).sum()


def attention_map(activations: Tensor, power: float) -> Tensor:
    """|A|^p summed over the channels, as a unit vector per image: (B, C, H, W) to (B, H * W) float32 (Eq. 2)."""
    return F.normalize(activations.float().abs().pow(power).sum(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean squared difference of two attention maps (Eq. 3; a mean over pixels, as in its authors' code)."""
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


nad = NAD()
