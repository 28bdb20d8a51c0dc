"""What the tests of fine-tuning tune: a small network, a few images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbe_fast.config import FineTuneConfig, PGDConfig
from pbe_fast.data import ImageSet
from pbe_fast.finetune import FineTuner

ATTACK = PGDConfig(norm="l2", eps=0.5, steps=3)


def plain(**options: object) -> FineTuneConfig:
    """No augmentation and no distillation unless asked for."""
    values = {"lr": 0.05, "batch_size": 8, "augment": "none", "distill_weight": 0.0, "warmup": 0.0} | options
    return FineTuneConfig(**values)  # type: ignore[arg-type]


def few_images() -> ImageSet:
    """21 noisy ones of four classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (21, 3, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (21,), generator=generator), tuple("abcd"))


def network(seed: int = 0) -> nn.Module:
    """With convolutions whose weights are channels_last, as purify makes them."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def tuner(model: nn.Module, config: FineTuneConfig, steps: int, seed: int = 7, **more: object) -> FineTuner:
    return FineTuner(model, config, total_steps=steps, generator=torch.Generator().manual_seed(seed), **more)  # type: ignore[arg-type]


def first_batch(n: int, size: int) -> Tensor:
    """The indices that a `tuner` takes first, of ``n`` images and batches of ``size``."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(7)).tensor_split(-(-n // size))[0]
