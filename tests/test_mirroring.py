from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.config import AttackConfig, FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.errors import InputError
from pbe_fast.finetune import FineTuner
from pbe_fast.mirroring import resolve_augment


class Brighter(nn.Module):
    """Answers 1 where the left (or, not handed, any) half is brighter than a middling grey."""

    def __init__(self, handed: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.handed = handed

    def forward(self, images: Tensor) -> Tensor:
        left, right = (half.mean((1, 2, 3)) for half in images.chunk(2, dim=3))
        level = left if self.handed else torch.maximum(left, right)
        return torch.stack([0.5 * self.scale.expand(len(images)), level], dim=1)


def _halves(n: int) -> ImageSet:
    labels = torch.arange(n) % 2
    images = torch.zeros(n, 1, 4, 8, dtype=torch.uint8)
    images[labels == 1, :, :, :4] = 255
    return ImageSet(images, labels, ("dark", "bright"))


def _resolve(config: FineTuneConfig, model: nn.Module) -> FineTuneConfig:
    return resolve_augment(
        config, model.eval(), _halves(50), device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(("handed", "expected"), [(False, "crop+flip"), (True, "crop")])
def test_auto_mirrors_where_the_model_does_not_mind(handed: bool, expected: str) -> None:
    config = FineTuneConfig(augment="auto", lr=0.5)
    resolved = _resolve(config, Brighter(handed))
    assert (resolved.augment, resolved.lr) == (expected, 0.5)


@pytest.mark.parametrize("kind", ["none", "crop", "crop+flip"])
def test_what_was_asked_for_by_name_stays(kind: str) -> None:
    config = FineTuneConfig(augment=kind)
    assert _resolve(config, Brighter(handed=True)) is config


def test_an_attack_has_no_model_to_ask() -> None:
    with pytest.raises(InputError, match=r"augment.*got auto; accepted: none, crop, crop\+flip in an attack"):
        AttackConfig(training=FineTuneConfig(augment="auto"))
    (field,) = (f for f in dataclasses.fields(AttackConfig().training) if f.name == "augment")
    assert "auto" not in field.metadata["choices"] and "auto" not in field.metadata["help"]


def test_the_fine_tuner_wants_it_settled() -> None:
    with pytest.raises(InputError, match=r"augment.*auto"):
        FineTuner(Brighter(handed=True), FineTuneConfig(augment="auto"), total_steps=1, generator=torch.Generator())
